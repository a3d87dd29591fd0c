"""Uncertainty-guided cell swaps, CutMix boxes and copy-paste boxes, in 2-D and 3-D."""

import itertools
import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from knowsam.mixing import cells_to_mask, centred_or_random_box, paste, random_boxes, select_cells

SIZES = [(64, 64), (48, 96), (16, 32, 48)]


def cell_map(values, side):
    """(grid, grid) values -> (1, grid * side, grid * side) piecewise constant map."""
    return torch.tensor(values).repeat_interleave(side, 0).repeat_interleave(side, 1)[None].float()


@pytest.mark.parametrize("grid", [2, 4, 7])
@pytest.mark.parametrize("pick", ["most_uncertain", "least_uncertain"])
@pytest.mark.parametrize("size", [32, 56, 96])
def test_exactly_n_cells_also_for_ties(grid, pick, size):
    maps = torch.stack([torch.zeros(size, size), torch.ones(size, size), torch.rand(size, size)])
    for cells in (0, 1, 3, grid * grid):
        chosen = select_cells(maps, grid=grid, cells=cells, pick=pick)
        assert chosen.shape == (3, grid, grid) and chosen.dtype == torch.bool
        assert chosen.flatten(1).sum(1).tolist() == [cells] * 3


def test_hand_made_map():
    uncertainty = cell_map([[0.1, 0.9, 0.2], [0.8, 0.3, 0.4], [0.0, 0.5, 0.7]], side=4)
    most = select_cells(uncertainty, grid=3, cells=3)
    least = select_cells(uncertainty, grid=3, cells=3, pick="least_uncertain")
    assert most[0].tolist() == [[False, True, False], [True, False, False], [False, False, True]]
    assert least[0].tolist() == [[True, False, True], [False, False, False], [True, False, False]]


def test_a_cell_is_judged_by_its_mean_not_its_peak():
    uncertainty = torch.zeros(1, 8, 8)
    uncertainty[0, 0, 0] = 1.0  # mean 1/16
    uncertainty[0, 4:, 4:] = 0.1
    assert select_cells(uncertainty, grid=2, cells=1)[0].tolist() == [[False, False], [False, True]]


def test_images_are_judged_separately():
    one = cell_map([[9.0, 8.0], [0.0, 0.0]], side=3)
    both = torch.cat([one, one.flip(1)])
    chosen = select_cells(both, grid=2, cells=2)
    assert chosen[0].tolist() == [[True, True], [False, False]]
    assert chosen[1].tolist() == [[False, False], [True, True]]


def test_cells_blow_up_to_their_pixels():
    chosen = torch.tensor([[[True, False], [False, True]]])
    mask = cells_to_mask(chosen, (6, 8))
    assert mask.shape == (1, 6, 8) and mask.dtype == torch.bool
    expected = torch.zeros(1, 6, 8, dtype=torch.bool)
    expected[0, :3, :4] = True
    expected[0, 3:, 4:] = True
    assert torch.equal(mask, expected)
    assert cells_to_mask(torch.ones(2, 3, 3, dtype=torch.bool), (32, 32)).all()


def test_labels_follow_images_pixel_for_pixel():
    generator = torch.Generator().manual_seed(0)
    mask = torch.randint(4, (3, 48, 48), generator=generator)
    image = mask[:, None].expand(-1, 3, -1, -1).float() + torch.tensor([0.0, 0.25, 0.5]).view(1, 3, 1, 1)
    partner = torch.tensor([1, 2, 0])
    where = cells_to_mask(select_cells(torch.rand(3, 48, 48, generator=generator)), (48, 48))
    mixed, mixed_mask = paste(image, image[partner], where), paste(mask, mask[partner], where)
    assert mixed_mask.dtype == mask.dtype
    assert torch.equal(mixed[:, 0].long(), mixed_mask)
    assert where.float().mean().item() == pytest.approx(5 / 16)
    for b in range(3):  # by loop
        for y in range(48):
            row = torch.where(where[b, y], mask[partner[b], y], mask[b, y])
            assert torch.equal(mixed_mask[b, y], row)


def test_untouched_pixels_are_bit_identical():
    own, other = torch.randn(2, 3, 32, 32), torch.randn(2, 3, 32, 32)
    own[0, 0, 0, 0], other[0, 0, -1, -1] = float("nan"), float("inf")  # a product with a 0/1 mask would spread these
    where = torch.zeros(2, 32, 32, dtype=torch.bool)
    where[:, 16:] = True
    mixed = paste(own, other, where)
    assert torch.equal(mixed[:, :, :16].nan_to_num(7.5), own[:, :, :16].nan_to_num(7.5))
    assert torch.equal(mixed[:, :, 16:], other[:, :, 16:])
    assert torch.equal(paste(own, other, torch.zeros_like(where)).nan_to_num(7.5), own.nan_to_num(7.5))


def test_cells_of_volumes():
    uncertainty = torch.zeros(2, 6, 8, 10)
    uncertainty[0, :3, 4:, :5] = 1.0
    uncertainty[1, 3:, :4, 5:] = 1.0
    chosen = select_cells(uncertainty, grid=2, cells=1)
    assert chosen.shape == (2, 2, 2, 2) and chosen.nonzero().tolist() == [[0, 0, 1, 0], [1, 1, 0, 1]]
    mask = cells_to_mask(chosen, (6, 8, 10))
    assert torch.equal(mask, uncertainty.bool())
    assert select_cells(torch.rand(3, 8, 8, 8), grid=3, cells=20).flatten(1).sum(1).tolist() == [20] * 3


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("channels", [1, 3])
def test_paste_of_images_and_masks(size, channels):
    generator = torch.Generator().manual_seed(0)
    where = torch.rand(2, *size, generator=generator) > 0.5
    images = torch.rand(2, channels, *size, generator=generator)
    masks = torch.randint(4, (2, *size), generator=generator)
    mixed, mixed_masks = paste(images, images.flip(0), where), paste(masks, masks.flip(0), where)
    for b in range(2):
        for c in range(channels):
            assert torch.equal(mixed[b, c][where[b]], images[1 - b, c][where[b]])
            assert torch.equal(mixed[b, c][~where[b]], images[b, c][~where[b]])
        assert torch.equal(mixed_masks[b], torch.where(where[b], masks[1 - b], masks[b]))


def test_gradient_reaches_what_was_pasted():
    own, other = torch.rand(2, 1, 3, 8, 8).requires_grad_().unbind(0)
    where = torch.zeros(1, 8, 8, dtype=torch.bool)
    where[:, :4] = True
    gradients = torch.autograd.grad(paste(own, other, where).sum(), (own, other))
    assert torch.equal(gradients[0], (~where).float()[:, None].expand(1, 3, 8, 8))
    assert torch.equal(gradients[1], where.float()[:, None].expand(1, 3, 8, 8))


@pytest.mark.parametrize(
    ("own", "other", "where"),
    [
        ((2, 3, 8, 8), (2, 3, 8, 8), (2, 1, 8, 8)),  # would be broadcast
        ((2, 3, 8, 8), (2, 3, 8, 8), (8, 8)),
        ((2, 3, 8, 8), (1, 3, 8, 8), (2, 8, 8)),
        ((2, 3, 8, 8), (2, 3, 8, 8), (2, 8, 4)),
        ((3, 4, 8, 8), (3, 4, 8, 8), (4, 8, 8)),
        ((2, 4, 8, 8, 8), (2, 4, 8, 8, 8), (2, 8, 8)),
    ],
)
def test_paste_refuses_shapes_that_would_be_broadcast(own, other, where):
    with pytest.raises(ValueError, match=r"own and other must both be \(B, C, \*S\) or \(B, \*S\)"):
        paste(torch.zeros(own), torch.zeros(other), torch.zeros(where, dtype=torch.bool))


def test_paste_refuses_a_float_where():
    with pytest.raises(ValueError, match=r"for a bool where \(B, \*S\), got .* torch\.float32 \(2, 8, 8\)"):
        paste(torch.zeros(2, 8, 8), torch.zeros(2, 8, 8), torch.zeros(2, 8, 8))


def extents(boxes):
    """Sides of the boxes (B, *S), after making sure that they are boxes: (B, d)."""
    dims = boxes.ndim - 1
    sides = []
    for axis in range(1, dims + 1):
        along = boxes.flatten(1, axis - 1).any(1) if axis > 1 else boxes
        sides.append(along.flatten(2).any(2).sum(1) if along.ndim > 2 else along.sum(1))
    sides = torch.stack(sides, 1)
    assert torch.equal(sides.prod(1), boxes.flatten(1).sum(1))
    return sides


@pytest.mark.parametrize("size", SIZES)
def test_random_boxes_are_boxes_of_the_asked_share_and_aspect(size):
    boxes = random_boxes(500, size, generator=torch.Generator().manual_seed(0))
    assert boxes.shape == (500, *size) and boxes.dtype == torch.bool
    relative = extents(boxes) / torch.tensor(size)
    share = relative.prod(1)
    assert 0.01 < share.min() < 0.05 and 0.35 < share.max() < 0.45  # 0.02..0.4 but for rounding to pixels
    assert share.mean() == pytest.approx(0.21, abs=0.02)
    ratio = relative.amax(1) / relative.amin(1)
    assert 2 < ratio.max() < 1.35 / 0.3
    squares = random_boxes(50, size, share=(0.1, 0.1), aspect=1.0)
    sides = extents(squares) - 0.1 ** (1 / len(size)) * torch.tensor(size)
    assert sides.abs().max() <= 0.5


@pytest.mark.parametrize("size", [(40, 40), (24, 24, 24)])
def test_random_boxes_reach_every_place_and_lie_within(size):
    boxes = random_boxes(2000, size, share=(0.25, 0.25), generator=torch.Generator().manual_seed(0)).float().mean(0)
    assert boxes.min() > 0  # the corners too
    for axis in range(len(size)):
        assert (boxes - boxes.flip(axis)).abs().max() < 0.12  # no side is preferred
    full = random_boxes(3, size, share=(1.0, 1.0))
    assert full.all()
    assert (random_boxes(5, size, share=(0.0, 0.0)).flatten(1).sum(1) == 1).all()  # never empty


@pytest.mark.parametrize("size", SIZES)
def test_the_generator_decides(size):
    def draw(seed):
        return random_boxes(4, size, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    torch.manual_seed(3)
    first = random_boxes(4, size)
    torch.manual_seed(3)
    assert torch.equal(first, random_boxes(4, size))
    assert random_boxes(4, size, device="meta").device.type == "meta"


@pytest.mark.parametrize("size", [(96, 96), (7, 10), (16, 32, 48)])
def test_copy_paste_boxes(size):
    inside = [int(2 * side / 3) for side in size]
    centred = centred_or_random_box(size, centred=True)
    assert centred.shape == size and extents(centred[None]).tolist() == [inside]
    for axis, side in enumerate(size):
        along = centred.movedim(axis, 0).flatten(1).any(1).nonzero()
        before, after = along.min().item(), side - 1 - along.max().item()
        assert 0 <= before - after <= 1
    drawn = {tuple(centred_or_random_box(size).nonzero()[0].tolist()) for _ in range(200)}
    assert len(drawn) > 5
    assert all(
        0 <= start <= side - box for place in drawn for start, side, box in zip(place, size, inside, strict=True)
    )
    for share in (0.0, 1.0):
        assert centred_or_random_box(size, share=share).float().mean() == share
    images = torch.rand(2, 1, *size)
    mixed = paste(images, images.flip(0), centred.expand(2, *size))  # one box for the batch
    assert torch.equal(mixed[:, :, centred], images.flip(0)[:, :, centred])


@pytest.mark.parametrize("size", SIZES)
def test_nothing_waits_for_a_value(size):
    """With tensors that have no values, whatever needs one on the host (a synchronisation on a GPU) is an error."""
    with FakeTensorMode():
        uncertainty, images = torch.rand(2, *size), torch.rand(2, 3, *size)
        where = cells_to_mask(select_cells(uncertainty), size)
        assert paste(images, images, where).shape == images.shape
        assert paste(uncertainty, uncertainty, where).shape == uncertainty.shape


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: select_cells(torch.rand(1, 1, 8, 8)), r"sides of at least grid = 4, got \(1, 1, 8, 8\)"),
        (lambda: select_cells(torch.rand(8, 8)), r"must be \(B, H, W\) or \(B, D, H, W\)"),
        (lambda: select_cells(torch.rand(1, 8, 8, 8), cells=65), "0..64 for a 4 x 4 x 4 grid, got 65"),
        (lambda: cells_to_mask(torch.ones(1, 4, 4), (8, 8, 8)), r"got \(1, 4, 4\) for \(8, 8, 8\)"),
        (lambda: cells_to_mask(torch.ones(1, 4, 4, 4), (8, 8)), r"got \(1, 4, 4, 4\) for \(8, 8\)"),
        (lambda: random_boxes(1, (8,)), r"size must be \(H, W\) or \(D, H, W\), in pixels, got \(8,\)"),
        (lambda: random_boxes(1, (8, 8), share=(0.4, 0.2)), r"within 0..1, got \(0.4, 0.2\)"),
        (lambda: random_boxes(1, (8, 8), aspect=math.nan), "aspect must be at least 1, got nan"),
        (lambda: random_boxes(1, (8, 8), aspect=0.3), "aspect must be at least 1, got 0.3"),
        (lambda: centred_or_random_box((8, 0)), "size must be"),
        (lambda: centred_or_random_box((8, 8), share=1.5), "share must be in 0..1, got 1.5"),
    ],
)
def test_refused_shapes_and_shares(make, text):
    with pytest.raises(ValueError, match=text):
        make()


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"pick": "most"}, "pick must be 'most_uncertain' or 'least_uncertain', got 'most'"),
        ({"cells": 17}, "cells must be in 0..16 for a 4 x 4 grid, got 17"),
        ({"cells": -1}, "got -1"),
        ({"grid": 2, "cells": 5}, "0..4 for a 2 x 2 grid"),
    ],
)
def test_refusals(settings, text):
    with pytest.raises(ValueError, match=text):
        select_cells(torch.rand(1, 8, 8), **settings)


@pytest.mark.parametrize("dims", [2, 3])
def test_cells_are_chosen_by_their_valid_pixels(dims):
    generator = torch.Generator().manual_seed(0)
    uncertainty = torch.rand(3, *(8,) * dims, generator=generator)
    valid = torch.rand(uncertainty.shape, generator=generator) > 0.4
    for pick in ("most_uncertain", "least_uncertain"):
        everywhere = select_cells(uncertainty, grid=2, cells=2, pick=pick, valid=torch.ones_like(valid))
        assert torch.equal(everywhere, select_cells(uncertainty, grid=2, cells=2, pick=pick))
        chosen = select_cells(uncertainty, grid=2, cells=2, pick=pick, valid=valid)
        noise = torch.where(valid, uncertainty, 99 * torch.rand(uncertainty.shape, generator=generator))
        assert torch.equal(select_cells(noise, grid=2, cells=2, pick=pick, valid=valid), chosen)
        for image in range(3):  # by a loop over cells
            means = {}
            for cell in itertools.product((0, 1), repeat=dims):
                part = tuple(slice(4 * c, 4 * c + 4) for c in cell)
                means[cell] = uncertainty[image][part][valid[image][part]].mean().item()
            best = sorted(means, key=means.get, reverse=pick == "most_uncertain")[:2]
            assert sorted(map(tuple, chosen[image].nonzero().tolist())) == sorted(best)


@pytest.mark.parametrize("pick", ["most_uncertain", "least_uncertain"])
def test_a_cell_without_valid_pixels_is_chosen_last(pick):
    uncertainty, valid = torch.rand(1, 8, 8), torch.ones(1, 8, 8, dtype=torch.bool)
    valid[:, :4, :4] = False
    assert not select_cells(uncertainty, grid=2, cells=3, pick=pick, valid=valid)[0, 0, 0]
    assert select_cells(uncertainty, grid=2, cells=4, pick=pick, valid=valid).all()
    assert select_cells(uncertainty, grid=2, cells=1, pick=pick, valid=torch.zeros_like(valid)).sum() == 1
    with pytest.raises(ValueError, match=r"valid must be bool \(B, \*S\) = \(1, 8, 8\), got torch.float32"):
        select_cells(uncertainty, grid=2, cells=1, pick=pick, valid=valid.float())
