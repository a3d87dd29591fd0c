"""Cross-entropy and soft Dice against hand-computed numbers, a numpy loop, and MONAI."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from monai.losses import DiceCELoss, DiceLoss

from knowsam.losses import IGNORE, cross_entropy_loss, segmentation_loss, soft_dice_loss

CLASSES = (2, 4, 9)


def drawn(num_classes, seed=0, shape=(2, 5, 6)):
    generator = torch.Generator().manual_seed(seed)
    batch, *spatial = shape
    logits = 2 * torch.randn(batch, num_classes, *spatial, generator=generator)
    mask = torch.randint(num_classes, shape, generator=generator)
    return logits, mask, torch.rand(shape, generator=generator) > 0.4


def softmax(logits):
    e = np.exp(logits - logits.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def dice_by_loop(logits, mask, valid, smooth=1e-10):
    probs, mask, valid = softmax(logits.double().numpy()), mask.numpy(), valid.numpy()
    terms = []
    for k in range(probs.shape[1]):
        top = bottom = 0.0
        for place in zip(*np.nonzero(valid), strict=True):
            p, t = probs[(place[0], k, *place[1:])], float(mask[place] == k)
            top += 2 * p * t
            bottom += p * p + t * t
        terms.append(1 - (top + smooth) / (bottom + smooth))
    return sum(terms) / len(terms)


def cross_entropy_by_loop(logits, mask, valid):
    probs, mask = softmax(logits.double().numpy()), mask.numpy()
    places = list(zip(*np.nonzero(valid.numpy()), strict=True))
    return -sum(math.log(probs[(p[0], mask[p], *p[1:])]) for p in places) / max(len(places), 1)


# (probabilities of the classes at two pixels, their masks, soft Dice loss, cross-entropy), by hand
TABLE = [
    # K = 2, pixel 0 sure and right, pixel 1 undecided: class 0: 1 - 2 / (1.25 + 1), class 1: 1 - 1 / (.25 + 1)
    ([[1.0, 0.0], [0.5, 0.5]], [0, 1], (1 / 9 + 1 / 5) / 2, math.log(2) / 2),
    # K = 3, uniform: classes 0 and 1: 1 - (2/3) / (2/9 + 1), class 2 absent: 1 - 0 / (2/9)
    ([[1 / 3] * 3, [1 / 3] * 3], [0, 1], (2 * (1 - (2 / 3) / (11 / 9)) + 1) / 3, math.log(3)),
    # K = 4, both pixels of class 3, p = .1 .2 .3 .4
    ([[0.1, 0.2, 0.3, 0.4]] * 2, [3, 3], (3 + 1 - 1.6 / 2.32) / 4, -math.log(0.4)),
]


@pytest.mark.parametrize(("probs", "mask", "dice", "cross_entropy"), TABLE)
def test_hand_computed(probs, mask, dice, cross_entropy):
    logits = torch.tensor(probs).clamp(min=1e-30).log().T[None, :, None]  # (1, K, 1, 2)
    mask = torch.tensor(mask)[None, None]
    assert soft_dice_loss(logits, mask).item() == pytest.approx(dice, abs=1e-6)
    assert segmentation_loss(logits, mask).item() == pytest.approx(dice + cross_entropy, abs=1e-6)


@pytest.mark.parametrize("num_classes", CLASSES)
@pytest.mark.parametrize("shape", [(1, 7, 5), (3, 4, 6), (2, 3, 4, 5)])
def test_equals_plain_loops(num_classes, shape):
    logits, mask, valid = drawn(num_classes, shape=shape)
    everywhere = torch.ones_like(valid)
    dice, ce = dice_by_loop(logits, mask, everywhere), cross_entropy_by_loop(logits, mask, everywhere)
    assert soft_dice_loss(logits, mask).item() == pytest.approx(dice, abs=1e-6)
    assert segmentation_loss(logits, mask).item() == pytest.approx(dice + ce, abs=1e-5)
    dice, ce = dice_by_loop(logits, mask, valid), cross_entropy_by_loop(logits, mask, valid)
    assert soft_dice_loss(logits, mask, valid=valid).item() == pytest.approx(dice, abs=1e-6)
    assert segmentation_loss(logits, mask, valid=valid).item() == pytest.approx(dice + ce, abs=1e-5)
    assert cross_entropy_loss(logits, mask, valid=valid).item() == pytest.approx(ce, abs=1e-5)


@pytest.mark.parametrize("num_classes", CLASSES)
def test_weighted_cross_entropy(num_classes):
    logits, mask, valid = drawn(num_classes)
    weight = torch.rand(mask.shape, generator=torch.Generator().manual_seed(5))
    per_pixel = -torch.log_softmax(logits.double(), 1).gather(1, mask[:, None])[:, 0] * weight
    value = cross_entropy_loss(logits, mask, weight=weight)
    assert value.item() == pytest.approx(per_pixel.mean().item(), abs=1e-6)
    value = cross_entropy_loss(logits, mask, valid=valid, weight=weight)
    assert value.item() == pytest.approx(per_pixel[valid].mean().item(), abs=1e-6)


@pytest.mark.parametrize("num_classes", CLASSES)
def test_equals_monai(num_classes):
    logits, mask, _ = drawn(num_classes)
    settings = {
        "softmax": True, "to_onehot_y": True, "squared_pred": True, "batch": True,
        "smooth_nr": 1e-10, "smooth_dr": 1e-10,
    }  # fmt: skip
    torch.testing.assert_close(soft_dice_loss(logits, mask), DiceLoss(**settings)(logits, mask[:, None]))
    torch.testing.assert_close(segmentation_loss(logits, mask), DiceCELoss(**settings)(logits, mask[:, None]))


@pytest.mark.parametrize("num_classes", CLASSES)
def test_perfect_prediction_is_zero_and_one_missed_class_is_felt(num_classes):
    mask = (torch.arange(24).view(1, 4, 6) * num_classes) // 24  # every class is there
    perfect = 100.0 * torch.nn.functional.one_hot(mask, num_classes).movedim(-1, 1)
    assert segmentation_loss(perfect, mask).item() == pytest.approx(0, abs=1e-6)
    for k in range(num_classes):
        missed = perfect.clone()
        missed[:, k] = -100.0
        assert soft_dice_loss(missed, mask).item() > 0.9 / num_classes


@pytest.mark.parametrize("loss", [soft_dice_loss, segmentation_loss])
def test_valid_ignores_the_rest(loss):
    logits, mask, valid = drawn(3)
    torch.testing.assert_close(loss(logits, mask, valid=torch.ones_like(valid)), loss(logits, mask))
    other = torch.where(valid[:, None], logits, torch.randn_like(logits) * 9)
    other_mask = torch.where(valid, mask, (mask + 1) % 3)
    torch.testing.assert_close(loss(other, other_mask, valid=valid), loss(logits, mask, valid=valid))
    logits.requires_grad_()
    loss(logits, mask, valid=valid).backward()
    assert (logits.grad.movedim(1, -1)[~valid] == 0).all()
    assert (logits.grad.movedim(1, -1)[valid] != 0).all()


@pytest.mark.parametrize("loss", [soft_dice_loss, segmentation_loss])
def test_no_valid_pixel_is_zero_with_zero_gradient(loss):
    logits, mask, valid = drawn(3)
    logits.requires_grad_()
    value = loss(logits, mask, valid=torch.zeros_like(valid))
    value.backward()
    assert value.item() == 0
    assert logits.grad.abs().sum() == 0


@pytest.mark.parametrize("loss", [soft_dice_loss, segmentation_loss])
@pytest.mark.parametrize("num_classes", CLASSES)
def test_float32_under_autocast(loss, num_classes):
    logits, mask, _ = drawn(num_classes)
    low = logits.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(low, mask)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, loss(low.float(), mask), rtol=0, atol=0)


@pytest.mark.parametrize("num_classes", CLASSES)
def test_every_class_gets_gradient(num_classes):
    logits, mask, _ = drawn(num_classes)
    for loss in (soft_dice_loss, segmentation_loss):
        x = logits.clone().requires_grad_()
        loss(x, mask).backward()
        assert (x.grad.abs().sum((0, 2, 3)) > 0).all()


def test_extreme_logits_stay_finite():
    logits = torch.tensor([1e4, -1e4]).view(1, 2, 1, 1).expand(1, 2, 3, 3).clone().requires_grad_()
    for mask in (torch.zeros(1, 3, 3, dtype=torch.long), torch.ones(1, 3, 3, dtype=torch.long)):
        value = segmentation_loss(logits, mask)
        (gradient,) = torch.autograd.grad(value, logits)
        assert value.isfinite() and gradient.isfinite().all()


# ---------------------------------------------------------------- ignored pixels


def without_ignoring(logits, mask, valid=None):
    """Cross-entropy + soft Dice as they were before ids could be ignored."""
    probs = logits.float().softmax(1)
    target = F.one_hot(mask, probs.shape[1]).movedim(-1, 1).to(probs.dtype)
    if valid is None:
        cross_entropy = F.cross_entropy(logits.float(), mask)
    else:
        per_pixel = F.cross_entropy(logits.float(), mask, reduction="none")
        cross_entropy = (per_pixel * valid).sum() / valid.sum().clamp(min=1)
        keep = valid.unsqueeze(1).to(probs.dtype)
        probs, target = probs * keep, target * keep
    over = (0, *range(2, probs.ndim))
    intersection = (probs * target).sum(over)
    denominator = probs.square().sum(over) + target.square().sum(over)
    return cross_entropy + (1.0 - (2.0 * intersection + 1e-10) / (denominator + 1e-10)).mean()


@pytest.mark.parametrize("num_classes", CLASSES)
@pytest.mark.parametrize("shape", [(2, 33, 40), (4, 64, 64), (2, 4, 8, 6)])
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ordinary_masks_give_the_same_bits(num_classes, shape, layout, dtype):
    logits, mask, valid = drawn(num_classes, shape=shape)
    if layout == "channels last":
        last = torch.channels_last if len(shape) == 3 else torch.channels_last_3d
        logits = logits.contiguous(memory_format=last)
    for given in (None, valid):
        ours, before = (logits.to(dtype).detach().clone().requires_grad_() for _ in range(2))
        value, expected = segmentation_loss(ours, mask, valid=given), without_ignoring(before, mask, given)
        (0.37 * value).backward()
        (0.37 * expected).backward()
        assert torch.equal(value, expected) and torch.equal(ours.grad, before.grad)


@pytest.mark.parametrize("loss", [cross_entropy_loss, soft_dice_loss, segmentation_loss])
@pytest.mark.parametrize("num_classes", CLASSES)
@pytest.mark.parametrize("shape", [(2, 5, 6), (2, 3, 4, 5)])
def test_ignored_pixels_are_invalid_ones(loss, num_classes, shape):
    logits, mask, known = drawn(num_classes, shape=shape)
    valid = torch.rand(shape, generator=torch.Generator().manual_seed(3)) > 0.3
    ignoring = mask.masked_fill(~known, IGNORE)
    torch.testing.assert_close(loss(logits, ignoring), loss(logits, mask, valid=known))
    torch.testing.assert_close(loss(logits, ignoring, valid=valid), loss(logits, mask, valid=known & valid))
    logits.requires_grad_()
    loss(logits, ignoring).backward()
    assert (logits.grad.movedim(1, -1)[~known] == 0).all() and (logits.grad.movedim(1, -1)[known] != 0).all()


@pytest.mark.parametrize("loss", [cross_entropy_loss, soft_dice_loss, segmentation_loss])
@pytest.mark.parametrize("shape", [(2, 5, 6), (2, 3, 4, 5), (0, 5, 6), (0, 3, 4, 5)])
@pytest.mark.parametrize("with_valid", [False, True])
def test_nothing_but_ignored_pixels_or_no_image_is_zero_with_a_graph(loss, shape, with_valid):
    logits = torch.randn(shape[0], 3, *shape[1:], requires_grad=True)
    mask = torch.full(shape, IGNORE)
    value = loss(logits, mask, valid=torch.ones(shape, dtype=torch.bool) if with_valid else None)
    value.backward()
    assert value.item() == 0 and torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_any_integer_mask(dtype):
    logits, mask, known = drawn(4)
    mask = mask.masked_fill(~known, IGNORE)
    assert torch.equal(segmentation_loss(logits, mask.to(dtype)), segmentation_loss(logits, mask))


@pytest.mark.parametrize("loss", [cross_entropy_loss, soft_dice_loss])
def test_an_id_that_is_no_class_is_no_ignored_one(loss):
    logits, mask, _ = drawn(3)
    mask[0, 0, 0] = 3
    with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
        loss(logits, mask)
