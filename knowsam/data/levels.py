"""Intensities as they are kept (levels) and as networks see them (0..1)."""

import torch
from torch import Tensor

WHITE = {torch.uint8: 255, torch.int32: 65535, torch.uint16: 65535}
"""The level that is 1.0, by the type that levels are kept in."""


def to_unit(levels: Tensor) -> Tensor:
    """Levels of any shape -> float32 in 0..1; floating point numbers are there already."""
    return levels if levels.is_floating_point() else levels.float() / WHITE[levels.dtype]
