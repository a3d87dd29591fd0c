"""What one training step sees."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass
class Batch:
    """One step's images, already augmented and on the device.

    Attributes:
        labelled: (L, 3, S, S) float32 in 0..1, weakly augmented.
        mask: (L, S, S) int64 class ids, moved with ``labelled``.
        weak: (U, 3, S, S) unlabelled images, weak view.
        strong: (U, 3, S, S) the same images, same geometry, strong view.
    """

    labelled: Tensor
    mask: Tensor
    weak: Tensor
    strong: Tensor

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device."""
        return Batch(*(getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)))
