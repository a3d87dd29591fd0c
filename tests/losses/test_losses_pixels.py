"""What all losses share: shapes are checked, pixels that do not count change nothing, and no value is waited for."""

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from knowsam import losses
from knowsam.losses import IGNORE, average

SHAPES = [(2, 4, 5), (2, 2, 3, 4)]  # (B, H, W), (B, D, H, W)


def against_mask(loss):
    return lambda logits, other, **given: loss(logits, other.argmax(1), **given)


SUPERVISED = {
    "cross_entropy": against_mask(losses.cross_entropy_loss),
    "soft_dice": against_mask(losses.soft_dice_loss),
    "segmentation": against_mask(losses.segmentation_loss),
}


def partial(logits, other, **given):
    """Two of three classes labelled."""
    labelled = torch.tensor([k % 3 < 2 for k in range(logits.shape[1])], device=logits.device)
    return losses.partial_segmentation_loss(logits, other.argmax(1), labelled.expand(logits.shape[:2]), **given)


AGREEMENT = {
    "consistency": losses.consistency_loss,
    "mse": losses.mse_consistency_loss,
    "pseudo_label": losses.pseudo_label_loss,
    "kl": losses.kl_loss,
    "sam_distillation": losses.sam_distillation_loss,
}
LOSSES = (
    SUPERVISED
    | {"partial_segmentation": partial}
    | AGREEMENT
    | {"entropy": lambda logits, other, **given: losses.entropy_loss(logits, **given)}
)
WEIGHTED = ["cross_entropy", *AGREEMENT]
every_loss = pytest.mark.parametrize("name", LOSSES)
every_shape = pytest.mark.parametrize("shape", SHAPES)


def drawn(shape, num_classes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    batch, *spatial = shape
    logits, other = (2 * torch.randn(batch, num_classes, *spatial, generator=generator) for _ in range(2))
    return logits, other, torch.rand(shape, generator=generator) > 0.4, torch.rand(shape, generator=generator)


def test_every_loss_is_here():
    public = {name for name in losses.__all__ if name.endswith("_loss")}
    assert {f"{name}_loss" for name in LOSSES} == {name.replace("mse_consistency", "mse") for name in public}


@every_loss
@every_shape
@pytest.mark.parametrize("num_classes", [2, 4, 9])
def test_invalid_pixels_change_nothing(name, shape, num_classes):
    logits, other, valid, _ = drawn(shape, num_classes)
    noise, noise2, *_ = drawn(shape, num_classes, seed=1)
    value = LOSSES[name](logits, other, valid=valid)
    elsewhere = LOSSES[name](
        torch.where(valid[:, None], logits, 5 * noise), torch.where(valid[:, None], other, noise2), valid=valid
    )
    torch.testing.assert_close(value, elsewhere)
    everywhere = LOSSES[name](logits, other, valid=torch.ones_like(valid))
    torch.testing.assert_close(everywhere, LOSSES[name](logits, other))
    assert (value - everywhere).abs() > 1e-4
    logits.requires_grad_()
    LOSSES[name](logits, other, valid=valid).backward()
    reached = logits.grad.abs().sum(1) > 0
    assert torch.equal(reached, valid)


@pytest.mark.parametrize("name", WEIGHTED)
@every_shape
def test_weights_are_factors_of_pixels(name, shape):
    logits, other, valid, weight = drawn(shape)
    loss = LOSSES[name]
    torch.testing.assert_close(loss(logits, other, weight=torch.ones(shape)), loss(logits, other))
    twice = loss(logits, other, weight=2 * weight, valid=valid)
    torch.testing.assert_close(twice, 2 * loss(logits, other, weight=weight, valid=valid))
    # The average is over the valid pixels, whatever they weigh.
    as_weight = loss(logits, other, weight=valid.float())
    torch.testing.assert_close(as_weight, loss(logits, other, valid=valid) * valid.float().mean())


@every_loss
@every_shape
def test_no_valid_pixel_is_exactly_zero_with_a_graph(name, shape):
    logits, other, valid, _ = drawn(shape)
    logits.requires_grad_()
    value = LOSSES[name](logits, other, valid=torch.zeros_like(valid))
    value.backward()
    assert value.item() == 0 and torch.equal(logits.grad, torch.zeros_like(logits))


@every_loss
@pytest.mark.parametrize("spatial", [(4, 5), (2, 3, 4)])
def test_an_empty_batch_is_zero_with_a_graph(name, spatial):
    valid, weight = torch.ones(0, *spatial, dtype=torch.bool), torch.ones(0, *spatial)
    for given in ({}, {"valid": valid}, *([{"weight": weight}] if name in WEIGHTED else [])):
        logits = torch.zeros(0, 3, *spatial, requires_grad=True)
        value = LOSSES[name](logits, torch.zeros(0, 3, *spatial), **given)
        value.backward()
        assert value.item() == 0 and logits.grad.shape == logits.shape


@every_loss
@every_shape
def test_a_mask_of_another_shape_is_refused(name, shape):
    logits, other, valid, weight = drawn(shape)
    both = rf"valid must be \(B, \*S\) = \({shape[0]}, .*\) for .*logits \({shape[0]}, 4, .*\), got \({shape[0]}, 1, "
    with pytest.raises(ValueError, match=both):  # it would be broadcast to a loss that is B times too large
        LOSSES[name](logits, other, valid=valid.unsqueeze(1))
    with pytest.raises(ValueError, match="valid must be"):
        LOSSES[name](logits, other, valid=valid[:1])
    with pytest.raises(ValueError, match=r"valid must be bool, got torch.float32; .* weight"):
        LOSSES[name](logits, other, valid=weight)
    with pytest.raises(ValueError, match=r"valid must be bool, got torch.uint8"):
        LOSSES[name](logits, other, valid=valid.byte())
    if name in WEIGHTED:
        with pytest.raises(ValueError, match=r"weight must be \(B, \*S\)"):
            LOSSES[name](logits, other, weight=weight[:, None])
        with pytest.raises(ValueError, match=r"weight must be a floating tensor, got torch.bool"):
            LOSSES[name](logits, other, weight=valid)


@pytest.mark.parametrize("name", AGREEMENT)
def test_a_target_of_another_shape_is_refused(name):
    with pytest.raises(ValueError, match=r"logits \(2, 4, 4, 5\) and .*logits \(2, 4, 5, 5\) differ"):
        LOSSES[name](torch.zeros(2, 4, 4, 5), torch.zeros(2, 4, 5, 5))
    with pytest.raises(ValueError, match="differ"):
        LOSSES[name](torch.zeros(2, 4, 4, 5), torch.zeros(1, 4, 4, 5))


@pytest.mark.parametrize("name", SUPERVISED)
def test_a_mask_that_is_none_is_refused(name):
    loss = getattr(losses, f"{name}_loss")
    logits = torch.zeros(2, 3, 4, 5)
    with pytest.raises(ValueError, match=r"mask must be \(B, \*S\) = \(2, 4, 5\) .*, got \(2, 1, 4, 5\)"):
        loss(logits, torch.zeros(2, 1, 4, 5, dtype=torch.long))
    with pytest.raises(ValueError, match=r"integer class ids of at most 254 classes, got mask of torch\.float32"):
        loss(logits, torch.zeros(2, 4, 5))
    with pytest.raises(ValueError, match="got K = 255"):
        loss(torch.zeros(1, IGNORE, 2, 2), torch.zeros(1, 2, 2, dtype=torch.long))
    assert loss(torch.zeros(1, IGNORE - 1, 2, 2), torch.full((1, 2, 2), IGNORE - 2)).isfinite()


@every_loss
@every_shape
@pytest.mark.parametrize("masked", [False, True])
def test_no_loss_waits_for_a_value(name, shape, masked):
    """With tensors that have no values, a step that needs one on the host (a synchronisation on a GPU) is an error."""
    with FakeTensorMode():
        logits = torch.zeros(shape[0], 4, *shape[1:], requires_grad=True)
        valid = torch.zeros(shape, dtype=torch.bool)
        with pytest.raises(DataDependentOutputException):
            bool(valid.any())  # that it is one
        given = {"valid": valid} if masked else {}
        if masked and name in WEIGHTED:
            given["weight"] = torch.zeros(shape)
        LOSSES[name](logits, torch.zeros_like(logits), **given).backward()


def test_average_by_hand():
    loss = torch.tensor([[1.0, 2.0], [3.0, 6.0]])
    valid, weight = torch.tensor([[True, False], [True, True]]), torch.tensor([[1.0, 9.0], [0.5, 2.0]])
    assert average(loss).item() == 3
    assert average(loss, valid).item() == pytest.approx(10 / 3)
    assert average(loss, weight=weight).item() == pytest.approx((1 + 18 + 1.5 + 12) / 4)
    assert average(loss, valid, weight).item() == pytest.approx((1 + 1.5 + 12) / 3)
    by_class = torch.stack([loss, 3 * loss], 1)  # (B, K, S)
    assert average(by_class, valid).item() == pytest.approx(20 / 3)
