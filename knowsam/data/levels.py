"""Intensities as they are kept (levels) and as networks see them (0..1)."""

import numpy as np
import torch
from torch import Tensor

WHITE = {torch.uint8: 255, torch.int32: 65535, torch.uint16: 65535}
"""The level that is 1.0, by the type that levels are kept in."""


def as_tensor(levels: np.ndarray) -> Tensor:
    """Levels of any shape, or class ids, as a tensor; uint16, of which torch knows little, becomes int32.

    The memory is shared where the type stays.
    """
    return torch.from_numpy(levels.astype(np.int32) if levels.dtype == np.uint16 else levels)


def to_unit(levels: Tensor) -> Tensor:
    """Levels of any shape -> float32 in 0..1; floating point numbers are there already."""
    return levels if levels.is_floating_point() else levels.float() / WHITE[levels.dtype]
