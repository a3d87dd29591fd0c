"""SKD: a per-pixel KL over all K classes, in which SAM is a constant."""

import math

import numpy as np
import pytest
import torch

from knowsam.losses import kl_loss, sam_distillation_loss

CLASSES = (2, 4, 9)


def pair(num_classes, seed=0, shape=(2, 4, 5), scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    batch, *spatial = shape
    return (scale * torch.randn(batch, num_classes, *spatial, generator=generator) for _ in range(2))


def per_pixel_by_loop(student, sam, temperature):
    s, t = (x.double().numpy() / temperature for x in (student, sam))
    result = np.zeros((s.shape[0], *s.shape[2:]))
    for place in np.ndindex(*result.shape):
        at = (place[0], slice(None), *place[1:])
        p, q = np.exp(t[at]) / np.exp(t[at]).sum(), np.exp(s[at]) / np.exp(s[at]).sum()
        result[place] = temperature**2 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    return result


def test_hand_computed():
    """K = 2, T = 1: SAM says .5 / .5, the student .25 / .75: .5 log(2) + .5 log(2/3)."""
    student = torch.tensor([0.25, 0.75]).log().view(1, 2, 1, 1)
    loss = sam_distillation_loss(student, torch.zeros(1, 2, 1, 1), temperature=1.0)
    assert loss.item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3), abs=1e-6)
    # T = 2 halves the student's logits: sqrt(3) : 1 odds, times 4
    q = 1 / (1 + math.sqrt(3))
    loss = sam_distillation_loss(student, torch.zeros(1, 2, 1, 1), temperature=2.0)
    assert loss.item() == pytest.approx(4 * (0.5 * math.log(0.5 / q) + 0.5 * math.log(0.5 / (1 - q))), abs=1e-6)


@pytest.mark.parametrize("num_classes", CLASSES)
@pytest.mark.parametrize("temperature", [1.0, 4.0, 10.0])
@pytest.mark.parametrize("shape", [(2, 4, 5), (2, 2, 3, 4)])
def test_equals_explicit_sum(num_classes, temperature, shape):
    student, sam = pair(num_classes, shape=shape)
    expected = per_pixel_by_loop(student, sam, temperature)
    value = sam_distillation_loss(student, sam, temperature=temperature)
    assert value.item() == pytest.approx(expected.mean(), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("num_classes", CLASSES)
def test_zero_when_equal_up_to_a_constant(num_classes):
    student, sam = pair(num_classes)
    assert sam_distillation_loss(sam, sam).item() == pytest.approx(0, abs=1e-6)
    assert sam_distillation_loss(sam + 3.0, sam).item() == pytest.approx(0, abs=1e-4)
    assert sam_distillation_loss(student, sam) > 0.1


@pytest.mark.parametrize("num_classes", CLASSES)
def test_only_the_student_learns_in_every_class(num_classes):
    student, sam = (x.requires_grad_() for x in pair(num_classes))
    sam_distillation_loss(student, sam).backward()
    assert sam.grad is None
    assert (student.grad.abs().sum((0, 2, 3)) > 0).all()


@pytest.mark.parametrize("num_classes", CLASSES)
def test_gradient_keeps_its_size_when_temperature_changes(num_classes):
    norms = []
    for temperature in (5.0, 10.0, 40.0, 160.0):
        student, sam = (x.requires_grad_() for x in pair(num_classes, scale=1.0))
        sam_distillation_loss(student, sam, temperature=temperature).backward()
        norms.append(student.grad.norm().item())
    assert max(norms) < 1.15 * min(norms)


def test_gradient_is_that_of_the_formula():
    """d/ds_k = T (softmax(s / T) - softmax(sam / T))_k per pixel, over the number of pixels."""
    student, sam = pair(4)
    student.requires_grad_()
    sam_distillation_loss(student, sam, temperature=10.0).backward()
    expected = 10.0 * ((student.detach() / 10).softmax(1) - (sam / 10).softmax(1)) / (2 * 4 * 5)
    torch.testing.assert_close(student.grad, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("num_classes", CLASSES)
@pytest.mark.parametrize("shape", [(2, 4, 5), (2, 2, 3, 4)])
def test_valid_pixels_alone_count_and_weights_are_factors(num_classes, shape):
    student, sam = pair(num_classes, shape=shape)
    per_pixel = per_pixel_by_loop(student, sam, 10.0)
    generator = torch.Generator().manual_seed(1)
    valid, weight = torch.rand(shape, generator=generator) > 0.5, 2 * torch.rand(shape, generator=generator)
    value = sam_distillation_loss(student, sam, valid=valid)
    assert value.item() == pytest.approx(per_pixel[valid.numpy()].mean(), rel=1e-4, abs=1e-5)
    value = sam_distillation_loss(student, sam, weight=weight)
    assert value.item() == pytest.approx((per_pixel * weight.numpy()).mean(), rel=1e-4, abs=1e-5)
    value = sam_distillation_loss(student, sam, valid=valid, weight=weight)
    assert value.item() == pytest.approx((per_pixel * weight.numpy())[valid.numpy()].mean(), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("num_classes", CLASSES)
def test_kl_is_the_same_divergence_at_temperature_one(num_classes):
    student, target = pair(num_classes)
    assert kl_loss(student, target).item() == pytest.approx(per_pixel_by_loop(student, target, 1.0).mean(), rel=1e-4)
    assert torch.equal(kl_loss(student, target, temperature=10.0), sam_distillation_loss(student, target))
    with pytest.raises(ValueError, match=r"^logits \(1, 2, 4\) and target_logits \(1, 2, 5\) differ"):
        kl_loss(torch.zeros(1, 2, 4), torch.zeros(1, 2, 5))


def test_no_valid_pixel_is_zero():
    student, sam = pair(3)
    student.requires_grad_()
    value = sam_distillation_loss(student, sam, valid=torch.zeros(2, 4, 5, dtype=torch.bool))
    value.backward()
    assert value.item() == 0 and student.grad.abs().sum() == 0


def test_float32_under_autocast():
    student, sam = (x.bfloat16() for x in pair(4))
    with torch.autocast("cpu", torch.bfloat16):
        value = sam_distillation_loss(student, sam)
    assert value.dtype == torch.float32
    assert torch.equal(value, sam_distillation_loss(student.float(), sam.float()))


def test_extreme_logits_stay_finite():
    student = torch.tensor([1e4, -1e4]).view(1, 2, 1, 1).requires_grad_()
    value = sam_distillation_loss(student, -student)
    value.backward()
    assert value.isfinite() and student.grad.isfinite().all()


@pytest.mark.parametrize(
    ("student", "sam", "temperature", "text"),
    [
        ((1, 2, 4, 4), (1, 3, 4, 4), 10.0, r"student_logits \(1, 2, 4, 4\) and sam_logits \(1, 3, 4, 4\) differ"),
        ((1, 2, 4, 4), (1, 2, 8, 8), 10.0, "differ"),
        ((1, 1, 4, 4), (1, 1, 4, 4), 10.0, r"K >= 2 classes on axis 1, got shape \(1, 1, 4, 4\)"),
        ((4,), (4,), 10.0, "K >= 2"),
        ((1, 2, 4, 4), (1, 2, 4, 4), 0.0, "temperature must be > 0, got 0.0"),
        ((1, 2, 4, 4), (1, 2, 4, 4), -1, "temperature must be > 0, got -1"),
    ],
)
def test_refusals(student, sam, temperature, text):
    with pytest.raises(ValueError, match=text):
        sam_distillation_loss(torch.zeros(student), torch.zeros(sam), temperature=temperature)
