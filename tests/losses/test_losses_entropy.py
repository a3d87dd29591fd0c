"""Entropy normalised by log K."""

import math

import numpy as np
import pytest
import torch

from knowsam.losses import entropy_loss, entropy_map


@pytest.mark.parametrize("num_classes", [2, 4, 9])
def test_uniform_is_one_and_certain_is_zero(num_classes):
    assert torch.allclose(entropy_map(torch.full((2, num_classes, 3, 3), 0.7)), torch.ones(2, 3, 3))
    certain = 1000.0 * torch.nn.functional.one_hot(torch.randint(num_classes, (2, 3, 3)), num_classes).movedim(-1, 1)
    assert entropy_loss(certain).item() == 0


@pytest.mark.parametrize(
    ("probs", "nats"),
    [
        ([0.5, 0.5], math.log(2)),
        ([0.25, 0.75], 0.5623351446),
        ([0.5, 0.25, 0.25], 1.0397207708),
        ([0.5, 0.5, 0.0, 0.0], math.log(2)),
        ([0.1, 0.2, 0.3, 0.4], 1.2798542258),
    ],
)
def test_hand_computed(probs, nats):
    logits = torch.tensor(probs).clamp(min=1e-30).log().view(1, -1, 1, 1)
    assert entropy_map(logits).item() == pytest.approx(nats / math.log(len(probs)), abs=1e-6)


@pytest.mark.parametrize("num_classes", [2, 4, 9])
@pytest.mark.parametrize("spatial", [(5,), (4, 5), (2, 3, 4)])
def test_equals_plain_loop(num_classes, spatial):
    logits = 2 * torch.randn(2, num_classes, *spatial, generator=torch.Generator().manual_seed(1))
    result = entropy_map(logits)
    assert result.shape == (2, *spatial)
    x = logits.double().numpy()
    for place in np.ndindex(2, *spatial):
        e = np.exp(x[(place[0], slice(None), *place[1:])])
        p = e / e.sum()
        expected = -sum(v * math.log(v) for v in p) / math.log(num_classes)
        assert result[place].item() == pytest.approx(expected, abs=1e-6)
    assert entropy_loss(logits).item() == pytest.approx(result.mean().item(), abs=1e-7)
    valid = torch.rand(2, *spatial, generator=torch.Generator().manual_seed(2)) > 0.5
    assert entropy_loss(logits, valid=valid).item() == pytest.approx(result[valid].mean().item(), abs=1e-6)


def test_float32_under_autocast():
    logits = torch.randn(2, 3, 4, 4).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        value = entropy_map(logits)
    assert value.dtype == torch.float32
    assert torch.equal(value, entropy_map(logits.float()))


@pytest.mark.parametrize("num_classes", [2, 4, 9])
def test_descending_makes_confident(num_classes):
    logits = torch.randn(1, num_classes, 4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    value = entropy_loss(logits)
    value.backward()
    assert (logits.grad.abs().sum((0, 2, 3)) > 0).all()
    assert entropy_loss(logits - 5.0 * logits.grad) < value


def test_gradient_of_a_certain_pixel_is_finite():
    logits = torch.tensor([200.0, -200.0, 0.0]).view(1, 3, 1, 1).requires_grad_()
    entropy_loss(logits).backward()
    assert logits.grad.isfinite().all()


def test_one_class_has_no_entropy():
    with pytest.raises(ValueError, match=r"K >= 2 classes on axis 1, got shape \(1, 1, 4, 4\)"):
        entropy_map(torch.zeros(1, 1, 4, 4))
