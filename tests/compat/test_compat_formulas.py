"""The published formulas for K = 2, 3 and 4, against plain loops written from their description."""

import math

import numpy as np
import pytest
import torch

from knowsam.compat.fusion import PublishedFusionHead
from knowsam.compat.losses import (
    entropy_map_nats,
    last_class_consistency_loss,
    log_two_entropy_loss,
    width_two_distillation_loss,
)
from knowsam.compat.method import formulas
from knowsam.compat.rows import ROWS
from knowsam.compat.schedules import one_step_late, stairs_rampup
from knowsam.engine.optim import sgd
from knowsam.losses import consistency_loss, entropy_map, sam_distillation_loss
from knowsam.methods.knowsam import Formulas
from knowsam.models.fusion import FusionHead
from knowsam.schedules import sigmoid_rampup

every_k = pytest.mark.parametrize("num_classes", [2, 3, 4])


def logits(num_classes, seed, scale=2.0, side=6):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(2, num_classes, side, side, generator=generator)


def softmax(row):
    powers = [math.exp(value - max(row)) for value in row]
    return [power / sum(powers) for power in powers]


def pixels(tensor):
    """Every pixel's K logits as a list, in (B, H, W) order."""
    return tensor.detach().double().movedim(1, -1).reshape(-1, tensor.shape[1]).tolist()


@every_k
def test_consistency_of_the_last_class(num_classes):
    a, b = logits(num_classes, 0), logits(num_classes, 1)
    total = 0.0
    for x, y in zip(pixels(a), pixels(b), strict=True):
        p, t = softmax(x)[-1], softmax(y)[-1]
        p = min(max(p, 1e-8), 1 - 1e-7)
        total -= t * math.log(p) + (1 - t) * math.log(1 - p)
    assert last_class_consistency_loss(a, b).item() == pytest.approx(total / len(pixels(a)), rel=1e-5)
    mean = consistency_loss(a, b).item()
    # With two classes both say the same; with more, the others count in ours only.
    assert (abs(mean / last_class_consistency_loss(a, b).item() - 1) < 1e-4) == (num_classes == 2)


@pytest.mark.parametrize(("logit", "clamped"), [(-40.0, 1e-8), (40.0, 1 - 1e-7)])
def test_consistency_is_clamped_and_has_no_gradient_there(logit, clamped):
    prediction = torch.zeros(1, 2, 1, 1)
    prediction[:, 1] = logit
    prediction.requires_grad_()
    target = torch.zeros(1, 2, 1, 1)
    loss = last_class_consistency_loss(prediction, target)
    p = float(np.float32(clamped))
    assert loss.item() == pytest.approx(-0.5 * math.log(p) - 0.5 * math.log(1 - p), rel=2e-2)  # 1 - p in float32
    loss.backward()
    assert prediction.grad.abs().max() == 0


def consistency_terms(rows, first, second):
    """Each student's term."""
    of_first, of_second = formulas(rows).consistency
    return of_first(first, second), of_second(second, first)


@every_k
def test_swapped_consistency_trains_the_first_student_alone(num_classes):
    first, second = logits(num_classes, 0).requires_grad_(), logits(num_classes, 1).requires_grad_()
    one, two = consistency_terms(tuple(ROWS), first, second)
    assert one.item() == pytest.approx(two.item(), rel=1e-6)  # same prediction, same target
    assert not two.requires_grad
    gradients = torch.autograd.grad(one, (first, second), allow_unused=True)
    assert gradients[0].abs().sum() > 0 and gradients[1] is None

    one, two = consistency_terms(("consistency_swapped",), first, second)
    torch.testing.assert_close(two, consistency_loss(first, second))
    assert not two.requires_grad and one.requires_grad
    one, two = consistency_terms(("consistency_last_class",), first, second)
    torch.testing.assert_close(two, last_class_consistency_loss(second, first))
    assert two.requires_grad


@every_k
def test_distillation_over_rows_of_two(num_classes):
    student, sam = logits(num_classes, 0), logits(num_classes, 1)
    flat = [[v for pixel in pixels(x) for v in pixel] for x in (student, sam)]
    rows = len(flat[0]) // 2
    total = 0.0
    for i in range(rows):
        q, p = (softmax([v / 10 for v in values[2 * i : 2 * i + 2]]) for values in flat)
        total += sum(b * (math.log(b) - math.log(a)) for a, b in zip(q, p, strict=True))
    found = width_two_distillation_loss(student, sam, temperature=10.0)
    assert found.item() == pytest.approx(100 * total / rows, rel=1e-4)
    ours = sam_distillation_loss(student, sam, temperature=10.0)
    assert (abs(ours.item() / found.item() - 1) < 1e-4) == (num_classes == 2)


def test_distillation_trains_the_student_alone_and_needs_an_even_number():
    student, sam = logits(4, 0).requires_grad_(), logits(4, 1).requires_grad_()
    width_two_distillation_loss(student, sam).backward()
    assert student.grad.abs().sum() > 0 and sam.grad is None
    with pytest.raises(ValueError, match="rows of width 2"):
        width_two_distillation_loss(torch.zeros(1, 3, 3, 3), torch.zeros(1, 3, 3, 3))


@every_k
def test_entropy(num_classes):
    x = logits(num_classes, 0)
    expected = [-sum(p * math.log(p + 1e-6) for p in softmax(row)) for row in pixels(x)]
    np.testing.assert_allclose(entropy_map_nats(x).flatten().numpy(), expected, rtol=1e-4, atol=1e-6)
    assert log_two_entropy_loss(x).item() == pytest.approx(np.mean(expected) / math.log(2), rel=1e-5)
    assert log_two_entropy_loss(torch.zeros(1, num_classes, 2, 2)).item() == pytest.approx(math.log2(num_classes), 1e-5)


def test_ramp_has_two_hundred_stairs():
    def expected(step, max_steps):
        x = min(max(step // int(max_steps / 200), 0), 200) / 200
        return math.exp(-5 * (1 - x) ** 2)

    for max_steps in (200, 1000, 1234, 50_000):
        for step in (0, 1, 4, 5, 199, 999, 1199, 1200, 1233, 25_000, 49_999):
            assert stairs_rampup(step, max_steps) == pytest.approx(expected(step, max_steps), rel=1e-12)
    assert stairs_rampup(0, 50_000) == stairs_rampup(249, 50_000) == math.exp(-5) < stairs_rampup(250, 50_000)
    assert stairs_rampup(1200, 1234) == 1.0 > sigmoid_rampup(1200, 1234)  # a stair of 6 steps reaches the top early
    assert stairs_rampup(7, 0) == 1.0
    with pytest.raises(ValueError, match="a ramp of 199 steps has no 200 stairs"):
        stairs_rampup(0, 199)


def test_learning_rate_is_one_step_late():
    late = one_step_late(sgd([torch.nn.Parameter(torch.zeros(1))], lr=0.01))
    used = [late.set_lr(step, 1000) for step in range(6)]
    # The first step uses the initial value; after step t it is set to initial * (1 - t / max_steps).
    assert used == pytest.approx([0.01, *(0.01 * (1 - t / 1000) for t in range(5))], rel=1e-12)
    assert late.optimizer.param_groups[0]["lr"] == used[-1]
    assert min(late.set_lr(step, 1000) for step in range(0, 3000, 7)) >= 0


@every_k
def test_agreement_by_xor(num_classes):
    head = PublishedFusionHead(num_classes)
    a, b = logits(num_classes, 0), logits(num_classes, 1)
    found = head.agreement_map(a, b)
    rows = [(softmax(x), softmax(y)) for x, y in zip(pixels(a), pixels(b), strict=True)]
    expected = [[1.0 - ((p > 0.5) != (q > 0.5)) for p, q in zip(x, y, strict=True)] for x, y in rows]
    assert found.movedim(1, -1).reshape(-1, num_classes).tolist() == expected
    same = torch.equal(found, FusionHead(num_classes).agreement_map(a, b))
    assert same == (num_classes == 2)  # above 0.5 is the argmax of two


@every_k
def test_certainty_in_nats(num_classes):
    a = logits(num_classes, 0)
    torch.testing.assert_close(PublishedFusionHead(num_classes).certainty_map(a), 1 - entropy_map_nats(a))
    plain = PublishedFusionHead(num_classes, entropy_nats=False).certainty_map(a)
    torch.testing.assert_close(plain, 1 - entropy_map(a))


def test_rectified_head():
    torch.manual_seed(0)
    head = PublishedFusionHead(4)
    assert [type(layer).__name__ for layer in head.head] == ["Conv2d", "BatchNorm2d", "LeakyReLU"]
    assert head.head[0].bias is None and head.head[2].negative_slope == 0.2
    assert sum(p.numel() for p in PublishedFusionHead(2).parameters()) == 40_548  # 40.5 k
    assert isinstance(PublishedFusionHead(4, rectified=False).head, torch.nn.Conv2d)
    a, b = logits(4, 0, side=16), logits(4, 1, side=16)
    assert head(a, b).shape == a.shape


def test_uncertainty_and_pick_of_mixing():
    assert formulas(("mix_least_uncertain",)).uncertainty is entropy_map_nats
    assert ROWS["mix_least_uncertain"].sets == {"method.mix.pick": "least_uncertain"}


def test_no_rows_are_our_formulas():
    assert formulas(()) == Formulas()


@pytest.mark.parametrize("num_classes", [2, 4])
@pytest.mark.parametrize(
    "formula",
    [
        lambda x, y, valid: last_class_consistency_loss(x, y, valid=valid),
        lambda x, y, valid: width_two_distillation_loss(x, y, valid=valid),
        lambda x, y, valid: log_two_entropy_loss(x, valid=valid),
    ],
)
def test_invalid_pixels_change_nothing(formula, num_classes):
    x, y, noise = (logits(num_classes, seed) for seed in (0, 1, 2))
    valid = torch.rand(x[:, 0].shape, generator=torch.Generator().manual_seed(3)) > 0.4
    kept = [torch.where(valid[:, None], tensor, noise) for tensor in (x, y)]
    torch.testing.assert_close(formula(*kept, valid), formula(x, y, valid))
    assert not torch.allclose(formula(x, y, valid), formula(x, y, None))
    torch.testing.assert_close(formula(x, y, torch.ones_like(valid)), formula(x, y, None))
    assert formula(x, y, torch.zeros_like(valid)) == 0
