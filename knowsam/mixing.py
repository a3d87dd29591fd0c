"""Uncertainty-guided cell swaps (UGDA): vectorised, no loop over images or cells, no device-host sync."""

import torch
import torch.nn.functional as F
from torch import Tensor


def select_cells(uncertainty: Tensor, *, grid: int = 4, cells: int = 5, pick: str = "most_uncertain") -> Tensor:
    """Choose grid cells of every image by their mean uncertainty.

    Args:
        uncertainty: (B, H, W).
        grid: cells per side.
        cells: how many to choose per image, 0..grid^2.
        pick: ``most_uncertain`` or ``least_uncertain`` (the published code's choice).
    Returns:
        bool (B, grid, grid), exactly ``cells`` True per image.
    Raises:
        ValueError: unknown ``pick``, or more cells than the grid has.
    Source:
        arXiv:2412.13742 (UGDA).
    """
    if pick not in ("most_uncertain", "least_uncertain"):
        raise ValueError(f"pick must be 'most_uncertain' or 'least_uncertain', got {pick!r}")
    if not 0 <= cells <= grid * grid:
        raise ValueError(f"cells must be in 0..{grid * grid} for a {grid} x {grid} grid, got {cells}")
    score = F.adaptive_avg_pool2d(uncertainty.float().unsqueeze(1), grid).flatten(1)  # (B, grid^2)
    chosen = score.topk(cells, dim=1, largest=pick == "most_uncertain").indices
    selected = torch.zeros_like(score, dtype=torch.bool).scatter_(1, chosen, True)
    return selected.view(-1, grid, grid)


def cells_to_mask(cells: Tensor, size: tuple[int, int]) -> Tensor:
    """Blow chosen cells up to pixels: bool (B, grid, grid) -> bool (B, H, W)."""
    return F.interpolate(cells.unsqueeze(1).float(), size=size, mode="nearest").squeeze(1).bool()


def paste(own: Tensor, other: Tensor, where: Tensor) -> Tensor:
    """``other`` where ``where`` is True, ``own`` elsewhere.

    Args:
        own, other: (B, C, H, W) images or (B, H, W) masks.
        where: bool (B, H, W).
    """
    return torch.where(where.unsqueeze(1) if own.ndim == 4 else where, other, own)
