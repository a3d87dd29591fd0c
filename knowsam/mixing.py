"""Images made of parts of others, in 2-D and 3-D: uncertainty-guided cells (UGDA), CutMix boxes, copy-paste boxes.

Vectorised, without a loop over images or cells, and no function waits for a GPU. *S is (H, W) or (D, H, W).
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Pick = Literal["most_uncertain", "least_uncertain"]


def select_cells(
    uncertainty: Tensor,
    *,
    grid: int = 4,
    cells: int = 5,
    pick: Pick = "most_uncertain",
    valid: Tensor | None = None,
) -> Tensor:
    """Choose grid cells of every image by their mean uncertainty.

    Args:
        uncertainty: (B, *S), every side of at least ``grid`` pixels.
        grid: cells per side.
        cells: how many to choose per image, 0..grid^2, or 0..grid^3 of a volume.
        pick: ``most_uncertain`` or ``least_uncertain`` (the published code's choice).
        valid: bool (B, *S), pixels whose uncertainty counts; all if None. A cell without any is chosen last.
    Returns:
        bool (B, grid, grid) or (B, grid, grid, grid), exactly ``cells`` True per image.
    Raises:
        ValueError: unknown ``pick``, more cells than the grid has, or another shape.
    Source:
        arXiv:2412.13742 (UGDA).
    """
    if pick not in ("most_uncertain", "least_uncertain"):
        raise ValueError(f"pick must be 'most_uncertain' or 'least_uncertain', got {pick!r}")
    dims = uncertainty.ndim - 1
    if dims not in (2, 3) or min(uncertainty.shape[1:]) < grid:
        shape = tuple(uncertainty.shape)
        raise ValueError(f"uncertainty must be (B, H, W) or (B, D, H, W), sides of at least grid = {grid}, got {shape}")
    if not 0 <= cells <= grid**dims:
        raise ValueError(f"cells must be in 0..{grid**dims} for a {' x '.join([str(grid)] * dims)} grid, got {cells}")
    pool = F.adaptive_avg_pool2d if dims == 2 else F.adaptive_avg_pool3d
    if valid is None:
        score = pool(uncertainty.float().unsqueeze(1), grid).flatten(1)  # (B, grid^dims)
    else:
        if valid.shape != uncertainty.shape or valid.dtype != torch.bool:
            raise ValueError(
                f"valid must be bool (B, *S) = {tuple(uncertainty.shape)}, got {valid.dtype} {tuple(valid.shape)}"
            )
        share = pool(valid.float().unsqueeze(1), grid).flatten(1)
        score = pool(uncertainty.float().masked_fill(~valid, 0).unsqueeze(1), grid).flatten(1)
        last = -torch.inf if pick == "most_uncertain" else torch.inf
        score = torch.where(share > 0, score / share, last)
    chosen = score.topk(cells, dim=1, largest=pick == "most_uncertain").indices
    selected = torch.zeros_like(score, dtype=torch.bool).scatter_(1, chosen, True)
    return selected.view(-1, *(grid,) * dims)


def cells_to_mask(cells: Tensor, size: Sequence[int]) -> Tensor:
    """Blow chosen cells up to pixels.

    Args:
        cells: bool (B, grid, grid) or (B, grid, grid, grid).
        size: (H, W), or (D, H, W).
    Returns:
        bool (B, *S).
    Raises:
        ValueError: another shape, or a size of other dimensions.
    """
    if cells.ndim not in (3, 4) or len(size) != cells.ndim - 1:
        raise ValueError(
            f"cells must be (B, grid, grid) for a size (H, W), (B, grid, grid, grid) for (D, H, W), "
            f"got {tuple(cells.shape)} for {tuple(size)}"
        )
    return F.interpolate(cells.unsqueeze(1).float(), size=tuple(size), mode="nearest").squeeze(1).bool()


def paste(own: Tensor, other: Tensor, where: Tensor) -> Tensor:
    """``other`` where ``where`` is True, ``own`` elsewhere.

    Args:
        own, other: (B, C, *S) images, or (B, *S) masks.
        where: bool (B, *S).
    Returns:
        As ``own``.
    Raises:
        ValueError: other shapes, or a ``where`` that is not bool: broadcasting would mix what does not belong together.
    """
    pixels = tuple(where.shape)
    masks = tuple(own.shape) == pixels
    images = own.ndim == where.ndim + 1 and (own.shape[0], *own.shape[2:]) == pixels
    if own.shape != other.shape or not (masks or images) or where.dtype != torch.bool:
        raise ValueError(
            "own and other must both be (B, C, *S) or (B, *S) for a bool where (B, *S), "
            f"got {tuple(own.shape)}, {tuple(other.shape)} and {where.dtype} {pixels}"
        )
    return torch.where(where if masks else where.unsqueeze(1), other, own)


def random_boxes(
    batch: int,
    size: Sequence[int],
    *,
    share: tuple[float, float] = (0.02, 0.4),
    aspect: float = 1 / 0.3,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """A box at a random place in every image, for CutMix.

    Drawn on the CPU, so that the draws are the same on every device.

    Args:
        batch: B.
        size: *S, pixels.
        share: least and greatest share of an image's pixels in its box, but for rounding; uniform.
        aspect: greatest ratio of two sides of a box, each as a share of the image's side; at least 1.
        generator: of the CPU; torch's default one if None.
        device: of the result; the CPU if None.
    Returns:
        bool (B, *S), True inside.
    Raises:
        ValueError: shares outside 0..1 or in the wrong order, or an aspect below 1.
    Source:
        arXiv:1905.04899 (CutMix); the default ranges are those common in semi-supervised segmentation.
    """
    if not 0 <= share[0] <= share[1] <= 1:
        raise ValueError(f"share must be least and greatest within 0..1, got {share}")
    if not aspect >= 1:
        raise ValueError(f"aspect must be at least 1, got {aspect}")
    sides = torch.tensor(_sides(size), dtype=torch.float64)  # (d,)
    dims = len(sides)
    drawn = torch.rand(batch, 1 + 2 * dims, generator=generator, dtype=torch.float64)
    shrink = (share[0] + (share[1] - share[0]) * drawn[:, :1]).clamp(min=1e-12).log() / dims  # (B, 1), at most 0
    stretch = (drawn[:, 1 : 1 + dims] - 0.5) * math.log(aspect)  # (B, d), apart by log(aspect) at most
    stretch = stretch - stretch.mean(1, keepdim=True)  # the share stays
    # No side may be longer than the image's: then all are stretched less.
    stretch = stretch * (-shrink / stretch.amax(1, keepdim=True).clamp(min=1e-12)).clamp(max=1)
    box = ((shrink + stretch).exp() * sides).round().clamp(min=1)
    return _inside(box, drawn[:, 1 + dims :], sides, device)


def centred_or_random_box(
    size: Sequence[int],
    *,
    share: float = 2 / 3,
    centred: bool = False,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """One box for copy-paste between images; ``box.expand(B, *S)`` is a ``where`` of :func:`paste`.

    Args:
        size: *S, pixels.
        share: of every *side* of the image, rounded down to pixels; 0..1.
        centred: put it into the middle rather than at a random place.
        generator: of the CPU, on which the place is drawn; torch's default one if None.
        device: of the result; the CPU if None.
    Returns:
        bool (*S), True inside.
    Raises:
        ValueError: a share outside 0..1.
    Source:
        arXiv:2305.00673 (bidirectional copy-paste).
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must be in 0..1, got {share}")
    sides = torch.tensor(_sides(size), dtype=torch.float64)
    # A product such as 2 / 3 * 96 must not lose a pixel to rounding.
    box = (sides * share + 1e-9).floor()
    if centred:
        place = torch.full((1, len(sides)), 0.5, dtype=torch.float64)
    else:
        place = torch.rand(1, len(sides), generator=generator, dtype=torch.float64)
    return _inside(box[None], place, sides, device)[0]


def _sides(size: Sequence[int]) -> tuple[int, ...]:
    if len(size) not in (2, 3) or min(size) < 1:
        raise ValueError(f"size must be (H, W) or (D, H, W), in pixels, got {tuple(size)}")
    return tuple(size)


def _inside(box: Tensor, place: Tensor, sides: Tensor, device: torch.device | str | None) -> Tensor:
    """Boxes (B, d) in pixels, as far from the first corner as ``place`` (B, d) in 0..1 says: bool (B, *S)."""
    # Of the S - b + 1 places each is as likely; 0.5 is the middle one.
    start = torch.minimum((place * (sides - box + 1)).floor(), sides - box)
    bounds = torch.stack([start, start + box]).long().to(device)  # (2, B, d)
    inside = torch.ones((), dtype=torch.bool, device=bounds.device)
    for axis, side in enumerate(sides.tolist()):
        along = torch.arange(int(side), device=bounds.device)
        within = (along >= bounds[0, :, axis, None]) & (along < bounds[1, :, axis, None])  # (B, side)
        shape = [len(box), *(int(side) if other == axis else 1 for other in range(len(sides)))]
        inside = inside & within.view(shape)
    return inside
