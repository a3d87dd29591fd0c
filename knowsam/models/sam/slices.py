"""A guide of images as a guide of volumes, slice by slice."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from knowsam.models.sam.guide import SamGuide
from knowsam.models.sam.sam import Embedding


class SliceWise(nn.Module):
    """The same face as :class:`SamGuide` for volumes: their slices are the images of one batch.

    Args:
        guide: for slices of the volumes' height and width.
    """

    def __init__(self, guide: SamGuide) -> None:
        super().__init__()
        self.guide = guide

    @property
    def sam(self) -> nn.Module:
        """The guide's."""
        return self.guide.sam

    @property
    def image_encoder(self) -> nn.Module:
        """SAM's."""
        return self.guide.image_encoder

    @property
    def num_classes(self) -> int:
        """K, background included."""
        return self.guide.num_classes

    def forward(self, volumes: Tensor, coarse_logits: Tensor | None = None) -> Tensor:
        """Class logits of SAM.

        Args:
            volumes: (B, 3 or 1, D, S, S) in 0..1.
            coarse_logits: (B, K, D, h, w), any h and w; detached here.
        Returns:
            (B, K, D, S, S) float32 logits.
        Raises:
            ValueError: shapes that do not fit, volumes that are not in 0..1.
        """
        return self.decode(self.encode(volumes), coarse_logits, size=volumes.shape[-2:])

    def encode(self, volumes: Tensor) -> Embedding:
        """Volumes (B, 3 or 1, D, S, S) in 0..1 -> their embedding, whose ``image`` is (B D, C, E, E).

        Raises:
            ValueError: no volumes.
        """
        if volumes.ndim != 5:
            raise ValueError(f"volumes are {tuple(volumes.shape)}; expected (B, C, D, S, S)")
        return replace(self.guide.encode(to_slices(volumes)), depth=volumes.shape[2])

    def decode(
        self,
        embedding: Embedding,
        coarse_logits: Tensor | None = None,
        size: int | Sequence[int] | None = None,
        first: int | None = None,
    ) -> Tensor:
        """Class logits from an embedding, as :meth:`SamGuide.decode`.

        Args:
            embedding: of B volumes.
            coarse_logits: (B, K, D, h, w), any h and w; detached here.
            size: side, or height and width, of the result, or depth, height and width; the slices' if None.
            first: decode so many of the volumes; all if None.
        Returns:
            (B, K, D, height, width) float32 logits, B = ``first`` if given.
        Raises:
            ValueError: coarse logits or a size of another depth.
        """
        depth = embedding.depth or 1
        if isinstance(size, Sequence) and len(size) == 3:
            if size[0] != depth:
                raise ValueError(f"size is {tuple(size)}, the embedding is of volumes {depth} slices deep")
            size = size[1:]
        if coarse_logits is not None:
            if coarse_logits.ndim != 5 or coarse_logits.shape[2] != depth:
                raise ValueError(
                    f"coarse_logits are {tuple(coarse_logits.shape)}; expected (B, K, D, h, w) with D = {depth}"
                )
            coarse_logits = to_slices(coarse_logits)
        slices = replace(embedding, depth=None)
        logits = self.guide.decode(slices, coarse_logits, size, None if first is None else first * depth)
        return torch.unflatten(logits, 0, (-1, depth)).transpose(1, 2)

    def compilable(self) -> list[nn.Module]:
        """Parts whose own forward runs at every step."""
        return self.guide.compilable()


def to_slices(volumes: Tensor) -> Tensor:
    """(B, C, D, H, W) -> (B D, C, H, W)."""
    return volumes.transpose(1, 2).flatten(0, 1)
