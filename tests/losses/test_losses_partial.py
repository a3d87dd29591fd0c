"""Masks that label some classes only: against a plain loop, the ordinary loss of merged logits, and its limits."""

import math

import pytest
import torch

from knowsam.losses import IGNORE, marginal_log_probs, partial_segmentation_loss, segmentation_loss

every_k = pytest.mark.parametrize("num_classes", [2, 4, 9])
every_shape = pytest.mark.parametrize("shape", [(3, 5, 6), (2, 3, 4, 5)])


def drawn(num_classes, shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    batch, *spatial = shape
    logits = 2 * torch.randn(batch, num_classes, *spatial, generator=generator)
    mask = torch.randint(num_classes, shape, generator=generator)
    classes = torch.rand(batch, num_classes, generator=generator) > 0.5
    return logits, mask, classes


@every_k
@every_shape
def test_equals_the_ordinary_loss_where_all_classes_are_labelled(num_classes, shape):
    logits, mask, _ = drawn(num_classes, shape)
    mask[:, 0] = IGNORE
    valid = torch.rand(shape) > 0.3
    every = torch.ones(shape[0], num_classes, dtype=torch.bool)
    pixels = every.view(*every.shape, *(1,) * (len(shape) - 1)).expand(*every.shape, *shape[1:])
    gradients = []
    for classes in (None, every, pixels):
        x = logits.clone().requires_grad_()
        loss = partial_segmentation_loss(x, mask, classes, valid=valid)
        torch.testing.assert_close(loss, segmentation_loss(logits, mask, valid=valid))
        gradients += torch.autograd.grad(loss, x)
    torch.testing.assert_close(gradients[0], gradients[1])
    torch.testing.assert_close(gradients[1], gradients[2])


def by_loop(logits, mask, classes, smooth=1e-10):
    """Pixel by pixel in double precision."""
    probs = logits.double().softmax(1)
    batch, num_classes = probs.shape[:2]
    nats, counted = 0.0, 0
    top, bottom = [0.0] * num_classes, [0.0] * num_classes
    known = [False] * num_classes
    for b in range(batch):
        own = [k == 0 or bool(classes[b, k]) for k in range(num_classes)]
        for place in range(mask[b].numel()):
            label = int(mask[b].flatten()[place])
            if label == IGNORE:
                continue
            p = [float(probs[b, k].flatten()[place]) for k in range(num_classes)]
            p[0] += sum(p[k] for k in range(num_classes) if not own[k])
            label = label if own[label] else 0
            nats -= math.log(p[label])
            counted += 1
            for k in range(num_classes):
                if own[k]:
                    known[k] = True
                    top[k] += 2 * p[k] * (label == k)
                    bottom[k] += p[k] ** 2 + (label == k)
    dice = [1 - (top[k] + smooth) / (bottom[k] + smooth) for k in range(num_classes) if known[k]]
    return nats / max(counted, 1) + sum(dice) / max(len(dice), 1)


@every_k
@every_shape
def test_equals_a_plain_loop(num_classes, shape):
    logits, mask, classes = drawn(num_classes, shape, seed=3)
    mask[:, 1] = IGNORE
    loss = partial_segmentation_loss(logits, mask, classes)
    assert loss.item() == pytest.approx(by_loop(logits, mask, classes), abs=1e-5)


@every_shape
def test_equals_the_ordinary_loss_of_merged_logits(shape):
    """One source, classes 0, 2 of 0..3 known: three ids are background, so two classes remain."""
    logits, mask, _ = drawn(4, shape)
    classes = torch.tensor([True, False, True, False]).expand(shape[0], 4)
    merged = torch.stack([logits[:, [0, 1, 3]].logsumexp(1), logits[:, 2]], 1)
    expected = segmentation_loss(merged, (mask == 2).long())
    torch.testing.assert_close(partial_segmentation_loss(logits, mask, classes), expected)


@every_k
def test_finding_an_unlabelled_class_in_the_background_costs_nothing(num_classes):
    logits = torch.zeros(2, num_classes, 3, 4)
    mask = torch.zeros(2, 3, 4, dtype=torch.long)
    mask[:, 0] = 1
    logits.scatter_(1, mask[:, None], 60.0)
    classes = torch.zeros(2, num_classes, dtype=torch.bool)
    classes[:, 1] = True
    for k in (0, *range(2, num_classes)):
        sure = torch.where((mask == 0)[:, None], torch.eye(num_classes)[k].view(1, -1, 1, 1) * 60, logits)
        assert partial_segmentation_loss(sure, mask, classes).item() == pytest.approx(0, abs=1e-6)
    missed = logits.flip(1) if num_classes > 2 else logits.roll(1, 1)
    assert partial_segmentation_loss(missed, mask, classes) > 1


def test_the_entry_of_the_background_is_not_looked_at():
    logits, mask, classes = drawn(4, (3, 5, 6))
    values = [
        partial_segmentation_loss(logits, mask, torch.cat([first.expand(3, 1), classes[:, 1:]], 1))
        for first in (torch.tensor(True), torch.tensor(False))
    ]
    assert torch.equal(*values)


@every_k
def test_no_labelled_class_at_all_teaches_nothing(num_classes):
    logits, mask, _ = drawn(num_classes, (2, 5, 6))
    logits.requires_grad_()
    loss = partial_segmentation_loss(logits, mask, torch.zeros(2, num_classes, dtype=torch.bool))
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6) and logits.grad.abs().max() < 1e-6


@every_k
@every_shape
def test_gradient(num_classes, shape):
    logits, mask, classes = drawn(num_classes, shape, seed=5)
    classes[:, 1] = torch.arange(shape[0]) > 0
    mask[:, 0] = IGNORE
    logits.requires_grad_()
    partial_segmentation_loss(logits, mask, classes).backward()
    gradient = logits.grad
    assert gradient.isfinite().all()
    assert (gradient.movedim(1, -1)[mask == IGNORE] == 0).all()
    # Of a pixel of background, all merged classes are pushed the same way: up.
    background = (mask == 0) & (mask != IGNORE)
    merged = torch.cat([torch.ones_like(classes[:, :1]), ~classes[:, 1:]], 1)
    pushed = gradient.movedim(1, -1)[background]
    assert (pushed[merged.view(shape[0], *(1,) * (len(shape) - 1), -1).expand(*shape, -1)[background]] <= 1e-7).all()
    # Numbers: one logit moved by a little.
    for place in ((0, 1, *(2,) * (len(shape) - 1)), (1, 0, *(1,) * (len(shape) - 1))):
        step = torch.zeros_like(logits)
        step[place] = 1e-2
        up, down = (partial_segmentation_loss(logits.detach() + s, mask, classes) for s in (step, -step))
        assert ((up - down) / 2e-2).item() == pytest.approx(gradient[place].item(), abs=2e-4)


@pytest.mark.parametrize("shape", [(2, 5, 6), (2, 3, 4, 5), (0, 5, 6), (0, 3, 4, 5)])
@pytest.mark.parametrize("by_pixel", [False, True])
def test_nothing_but_ignored_pixels_or_no_image_is_zero_with_a_graph(shape, by_pixel):
    logits = torch.randn(shape[0], 3, *shape[1:], requires_grad=True)
    classes = torch.tensor([True, False, True]).expand(shape[0], 3)
    if by_pixel:
        classes = classes.view(shape[0], 3, *(1,) * (len(shape) - 1)).expand_as(logits)
    value = partial_segmentation_loss(logits, torch.full(shape, IGNORE), classes)
    value.backward()
    assert value.item() == 0 and torch.equal(logits.grad, torch.zeros_like(logits))


def test_each_pixel_by_its_own_source():
    """Two sources side by side in one image: as two images."""
    logits, mask, _ = drawn(4, (1, 6, 8))
    left, right = torch.tensor([[True, True, False, False]]), torch.tensor([[True, False, True, True]])
    classes = torch.cat([left.view(1, 4, 1, 1).expand(1, 4, 6, 4), right.view(1, 4, 1, 1).expand(1, 4, 6, 4)], 3)
    apart = partial_segmentation_loss(
        torch.cat(logits.split(4, 3)), torch.cat(mask.split(4, 2)), torch.cat([left, right])
    )
    torch.testing.assert_close(partial_segmentation_loss(logits, mask, classes), apart)


def test_extreme_logits_stay_finite():
    logits, mask, classes = drawn(9, (2, 5, 6))
    logits = (300 * logits).requires_grad_()
    loss = partial_segmentation_loss(logits, mask, classes)
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all()


def test_marginals_are_probabilities():
    logits, _, classes = drawn(4, (3, 5, 6))
    probs = marginal_log_probs(logits, classes).exp()
    torch.testing.assert_close(probs.sum(1), torch.ones(3, 5, 6))
    assert (probs[:, 1:][~classes[:, 1:]] == 0).all()


@pytest.mark.parametrize(
    "classes", [torch.ones(2, 3), torch.ones(3, 2, dtype=torch.bool), torch.ones(2, dtype=torch.bool)]
)
def test_classes_of_another_shape_or_type_are_refused(classes):
    with pytest.raises(
        ValueError, match=r"valid_classes must be bool \(B, K\) = \(2, 3\) or \(B, K, \*S\) = \(2, 3, 4, 5\)"
    ):
        partial_segmentation_loss(torch.zeros(2, 3, 4, 5), torch.zeros(2, 4, 5, dtype=torch.long), classes)
