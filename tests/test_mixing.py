"""Uncertainty-guided cell swaps."""

import pytest
import torch

from knowsam.mixing import cells_to_mask, paste, select_cells


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
