"""Agreement losses: all classes count, only the first argument learns."""

import math

import numpy as np
import pytest
import torch

from knowsam.losses import consistency_loss, mse_consistency_loss, pseudo_label_loss, sharpen

CLASSES = (2, 4, 9)
SHAPES = [(3, 4, 5), (2, 2, 3, 4)]  # (B, H, W), (B, D, H, W)
LOSSES = (consistency_loss, mse_consistency_loss, pseudo_label_loss)


def pair(num_classes, seed=0, shape=(2, 4, 5)):
    generator = torch.Generator().manual_seed(seed)
    batch, *spatial = shape
    return (torch.randn(batch, num_classes, *spatial, generator=generator) for _ in range(2))


def as_logits(probs):
    return torch.tensor(probs).clamp(min=1e-30).log().view(1, -1, 1, 1)


def by_loop(student, teacher, per_pixel, valid=None, weight=None):
    """Mean over (valid) pixels of a (weighted) function of the two distributions."""
    p, q = (x.double().softmax(1).numpy() for x in (student, teacher))
    total, count = 0.0, 0
    for place in np.ndindex(p.shape[0], *p.shape[2:]):
        if valid is None or valid[place]:
            count += 1
            at = (place[0], slice(None), *place[1:])
            total += per_pixel(p[at], q[at]) * (1.0 if weight is None else weight[place].item())
    return total / max(count, 1)


def binary_cross_entropy(p, q):
    return -sum(t * math.log(v) + (1 - t) * math.log(1 - v) for v, t in zip(p, q, strict=True)) / len(p)


def squared(p, q):
    return sum((v - t) ** 2 for v, t in zip(p, q, strict=True)) / len(p)


def to_argmax(p, q, threshold=0.0):
    return -math.log(p[int(q.argmax())]) if q.max() >= threshold else 0.0


@pytest.mark.parametrize(
    ("probs", "target", "bce", "mse", "hard"),
    [
        ([0.5, 0.5], [0.5, 0.5], math.log(2), 0.0, math.log(2)),
        ([0.25, 0.75], [1.0, 0.0], math.log(4), 0.5625, math.log(4)),
        # target classes 0.5, 0.5, 0: (2 * BCE(.5; .25) + BCE(0; .5)) / 3
        (
            [0.25, 0.25, 0.5],
            [0.5, 0.5, 0.0],
            (-(math.log(0.25) + math.log(0.75)) + math.log(2)) / 3,
            (0.0625 + 0.0625 + 0.25) / 3,
            math.log(4),
        ),
        ([0.1, 0.2, 0.3, 0.4], [0.0, 0.0, 0.0, 1.0],
         -(math.log(0.9) + math.log(0.8) + math.log(0.7) + math.log(0.4)) / 4,
         (0.01 + 0.04 + 0.09 + 0.36) / 4, -math.log(0.4)),
    ],
)  # fmt: skip
def test_hand_computed(probs, target, bce, mse, hard):
    student, teacher = as_logits(probs), as_logits(target)
    assert consistency_loss(student, teacher).item() == pytest.approx(bce, abs=1e-5)
    assert mse_consistency_loss(student, teacher).item() == pytest.approx(mse, abs=1e-6)
    assert pseudo_label_loss(student, teacher).item() == pytest.approx(hard, abs=1e-6)


@pytest.mark.parametrize("num_classes", CLASSES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("masked", ["all", "valid", "weight", "valid and weight"])
def test_equals_plain_loop(num_classes, shape, masked):
    student, teacher = pair(num_classes, shape=shape)
    generator = torch.Generator().manual_seed(7)
    given = {
        "valid": torch.rand(shape, generator=generator) > 0.4,
        "weight": 2 * torch.rand(shape, generator=generator),
    }
    given = {name: tensor for name, tensor in given.items() if name in masked}
    for loss, rule in ((consistency_loss, binary_cross_entropy), (mse_consistency_loss, squared)):
        assert loss(student, teacher, **given).item() == pytest.approx(
            by_loop(student, teacher, rule, **given), abs=1e-5
        )
    for threshold in (0.0, 0.6, 0.99):
        expected = by_loop(student, teacher, lambda p, q, t=threshold: to_argmax(p, q, t), **given)
        value = pseudo_label_loss(student, teacher, confidence_threshold=threshold, **given)
        assert value.item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("num_classes", CLASSES)
def test_only_the_student_learns(loss, num_classes):
    student, teacher = (x.requires_grad_() for x in pair(num_classes))
    loss(student, teacher).backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0


@pytest.mark.parametrize("num_classes", CLASSES)
def test_every_class_counts(num_classes):
    """The published code kept the last class only: move each class' target alone, and the loss must move."""
    student, teacher = pair(num_classes)
    student.requires_grad_()
    consistency_loss(student, teacher).backward()
    assert (student.grad.abs().sum((0, 2, 3)) > 0).all()

    # The direct contribution of class k to the derivative with respect to its own probability is the same for all k.
    p = torch.full((1, num_classes, 1, 1), 1.0 / num_classes)
    values = []
    for k in range(num_classes):
        target = torch.full((1, num_classes, 1, 1), -50.0)
        target[0, k] = 50.0
        values.append(consistency_loss(p.log(), target).item())
    assert values == pytest.approx([values[0]] * num_classes, abs=1e-6)
    assert values[0] == pytest.approx(
        (math.log(num_classes) - (num_classes - 1) * math.log(1 - 1 / num_classes)) / num_classes, abs=1e-5
    )


@pytest.mark.parametrize("num_classes", CLASSES)
def test_smallest_when_both_agree(num_classes):
    student, teacher = pair(num_classes)
    for loss in (consistency_loss, mse_consistency_loss):
        agreed = teacher.clone().requires_grad_()
        value = loss(agreed, teacher)
        assert value <= loss(student, teacher)
        (gradient,) = torch.autograd.grad(value, agreed)
        assert gradient.abs().max() < 1e-6
    assert mse_consistency_loss(teacher, teacher).item() == 0


def test_unsure_pixels_do_not_teach():
    student, teacher = pair(3)
    student.requires_grad_()
    assert pseudo_label_loss(student, torch.zeros_like(teacher), confidence_threshold=0.5).item() == 0
    pseudo_label_loss(student, teacher, confidence_threshold=0.6).backward()
    sure = teacher.softmax(1).amax(1) >= 0.6
    assert sure.any() and not sure.all()
    reached = student.grad.abs().sum(1) > 0
    assert torch.equal(reached, sure)


@pytest.mark.parametrize("loss", LOSSES)
def test_float32_under_autocast(loss):
    student, teacher = (x.bfloat16() for x in pair(4))
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(student, teacher)
    assert value.dtype == torch.float32
    assert torch.equal(value, loss(student.float(), teacher.float()))


@pytest.mark.parametrize("loss", LOSSES)
def test_extreme_logits_stay_finite(loss):
    student = torch.tensor([1e4, -1e4, 0.0]).view(1, 3, 1, 1).requires_grad_()
    value = loss(student, -student.detach())
    value.backward()
    assert value.isfinite() and student.grad.isfinite().all()


@pytest.mark.parametrize("num_classes", CLASSES)
def test_a_confidently_wrong_student_still_gets_gradient(num_classes):
    logits = torch.full((1, num_classes, 1, 1), -20.0)
    logits[:, 0] = 20.0
    target = logits.roll(1, dims=1)
    logits.requires_grad_()
    consistency_loss(logits, target).backward()
    assert torch.isfinite(logits.grad).all()
    assert logits.grad[0, 0] > 0.1 > 0 > -0.1 > logits.grad[0, 1]


@pytest.mark.parametrize("num_classes", CLASSES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("temperature", [1.0, 0.5, 0.1])
def test_sharpened_probabilities(num_classes, shape, temperature):
    probs = next(pair(num_classes, shape=shape)).softmax(1)
    power = probs.double() ** (1 / temperature)
    torch.testing.assert_close(
        sharpen(probs, temperature).double(), power / power.sum(1, keepdim=True), rtol=1e-4, atol=1e-7
    )


def test_sharpening_keeps_ties_zeros_and_the_graph():
    even = torch.full((1, 4, 1, 1), 0.25)
    torch.testing.assert_close(sharpen(even, 0.01), even)  # 0.25^100 is 0 in float32
    probs = torch.tensor([0.0, 0.3, 0.7]).view(1, 3, 1, 1).requires_grad_()
    sharper = sharpen(probs, 0.5)
    torch.testing.assert_close(sharper.flatten(), torch.tensor([0.0, 9 / 58, 49 / 58]))
    sharper[:, 2].sum().backward()
    assert probs.grad.isfinite().all() and probs.grad[0, 2] > 0 > probs.grad[0, 1]
    with pytest.raises(ValueError, match="temperature must be > 0, got 0"):
        sharpen(probs, 0)
