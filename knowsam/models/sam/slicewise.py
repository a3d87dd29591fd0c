"""A guide of images as a guide of volumes, slice by slice."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from knowsam.models.sam.guide import SamGuide
from knowsam.models.sam.sam import Embedding

AT_ONCE = 32
"""Slices that go through SAM together where nothing is learned; as many as there are where something is."""


@dataclass
class SliceEmbedding(Embedding):
    """What an encoder made of slices of volumes.

    Attributes:
        image, taps: of B x n slices, those of a volume one after the other.
        depth: n, slices of a volume that were encoded.
        shape: D, H, W of the volumes.
        chosen: int64 (B, n), which slices these are, ascending; None: all, n = D.
    """

    shape: tuple[int, int, int] = (0, 0, 0)
    chosen: Tensor | None = None

    def __getitem__(self, items: slice) -> "SliceEmbedding":
        """The first, the last, ... volumes; without a step."""
        part = super().__getitem__(items)
        assert isinstance(part, SliceEmbedding)
        return replace(part, chosen=None if self.chosen is None else self.chosen[items])

    def joined(self, other: Embedding) -> "SliceEmbedding":
        """These volumes and then the other ones."""
        assert isinstance(other, SliceEmbedding) and self.shape == other.shape, "volumes of one size"
        both = super().joined(other)
        assert isinstance(both, SliceEmbedding)
        if self.chosen is None or other.chosen is None:
            return both
        return replace(both, chosen=torch.cat([self.chosen, other.chosen]))

    def slices(self) -> Embedding:
        """The same as an embedding of images."""
        return Embedding(self.image, self.taps)

    def _each(self, change: Callable[[Tensor, int | str | None], Tensor]) -> "SliceEmbedding":
        taps = {name: change(tensor, name) for name, tensor in self.taps.items()}
        return replace(self, image=change(self.image, None), taps=taps)


class SliceWiseGuide(nn.Module):
    """The same face as :class:`SamGuide` for volumes: their slices are the images of one batch.

    Slices that are not as large as SAM's images are resized (squashed where they are no squares), its logits back.

    Training may ask SAM for some slices of each volume only, which takes that share of its time and memory. They lie
    evenly, D / n apart, from a place that is drawn for every volume at every call, from torch's random state: the loop
    sets it for every step, so a resumed run draws the same. The logits of the others are 0, which says nothing, and
    :meth:`valid` tells them apart. In eval mode SAM is always asked for all.

    Args:
        guide: of images.
        slices: n >= 1, how many of a volume in training; all if None, or if there are no more.
    Raises:
        ValueError: ``slices`` below 1.
    """

    def __init__(self, guide: SamGuide, slices: int | None = None) -> None:
        super().__init__()
        if slices is not None and slices < 1:
            raise ValueError(f"slices is {slices}; allowed is a number from 1, or None for all slices of a volume")
        self.guide = guide
        self.slices = slices

    @property
    def sam(self) -> nn.Module:
        """The guide's."""
        return self.guide.sam

    @property
    def image_encoder(self) -> nn.Module:
        """SAM's."""
        return self.guide.image_encoder

    @property
    def prompt_generator(self) -> nn.Module:
        """The guide's."""
        return self.guide.prompt_generator

    @property
    def num_classes(self) -> int:
        """K, background included."""
        return self.guide.num_classes

    def forward(self, volumes: Tensor, coarse_logits: Tensor | None = None) -> Tensor:
        """Class logits of SAM.

        Args:
            volumes: (B, 3 or 1, D, H, W) in 0..1.
            coarse_logits: (B, K, D, h, w), any h and w; detached here.
        Returns:
            (B, K, D, H, W) float32 logits.
        Raises:
            ValueError: shapes that do not fit, volumes that are not in 0..1.
        """
        return self.decode(self.encode(volumes), coarse_logits)

    def encode(self, volumes: Tensor) -> SliceEmbedding:
        """Volumes (B, 3 or 1, D, H, W) in 0..1 -> the embedding of their slices, or of some in train mode.

        Raises:
            ValueError: no volumes.
        """
        if volumes.ndim != 5:
            raise ValueError(f"volumes are {tuple(volumes.shape)}; expected (B, C, D, H, W)")
        batch, _, depth, height, width = volumes.shape
        chosen = None
        if self.training and self.slices is not None and self.slices < depth:
            chosen = evenly(batch, depth, self.slices).to(volumes.device, non_blocking=True)
        images, side = to_slices(volumes, chosen), self.guide.image_size
        if (height, width) != (side, side):
            images = F.interpolate(images, (side, side), mode="bilinear", align_corners=False, antialias=True)
        found = reduce(
            Embedding.joined, [self.guide.encode(some) for some in torch.split(images, self._at_once(images))]
        )
        asked = depth if chosen is None else chosen.shape[1]
        return SliceEmbedding(found.image, found.taps, asked, (depth, height, width), chosen)

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
            size: side, or height and width, of the result, or depth, height and width; the volumes' own if None.
            first: decode so many of the volumes; all if None.
        Returns:
            (B, K, D, height, width) float32 logits, B = ``first`` if given; 0 where SAM was not asked.
        Raises:
            ValueError: coarse logits or a size of another depth.
        """
        assert isinstance(embedding, SliceEmbedding), "an embedding of this guide's encode"
        (depth, *plane), asked = self._shape(embedding, size), embedding.depth or 1
        if coarse_logits is not None:
            if coarse_logits.ndim != 5 or coarse_logits.shape[2] != depth:
                raise ValueError(
                    f"coarse_logits are {tuple(coarse_logits.shape)}; expected (B, K, D, h, w) with D = {depth}"
                )
            coarse_logits = to_slices(coarse_logits.detach(), embedding.chosen)
        logits = self._decode(embedding.slices(), coarse_logits, plane, None if first is None else first * asked)
        logits = logits.reshape(-1, asked, *logits.shape[1:])  # (B, n, K, height, width)
        if embedding.chosen is not None:
            chosen = embedding.chosen[:first]
            rows = torch.arange(len(chosen), device=chosen.device)[:, None]
            everywhere = logits.new_zeros(len(chosen), depth, *logits.shape[2:])
            logits = everywhere.index_put((rows, chosen), logits)
        return logits.transpose(1, 2)

    def valid(self, embedding: Embedding, size: int | Sequence[int] | None = None) -> Tensor | None:
        """Where SAM was asked: the ``valid`` of every loss that learns from its logits, or that it learns by.

        Args:
            embedding: of B volumes.
            size: as for :meth:`decode`.
        Returns:
            bool (B, D, height, width); None: everywhere.
        """
        assert isinstance(embedding, SliceEmbedding), "an embedding of this guide's encode"
        depth, height, width = self._shape(embedding, size)
        if embedding.chosen is None:
            return None
        asked = torch.zeros(len(embedding), depth, dtype=torch.bool, device=embedding.image.device)
        return asked.scatter(1, embedding.chosen, True)[:, :, None, None].expand(-1, -1, height, width)

    def compilable(self) -> list[nn.Module]:
        """Parts whose own forward runs at every step."""
        return self.guide.compilable()

    def _decode(self, slices: Embedding, coarse: Tensor | None, plane: Sequence[int], first: int | None) -> Tensor:
        """(n, K, *plane), some at a time where nothing is learned: there, slices do not see each other."""
        at_once = self._at_once(slices.image)
        if at_once >= len(slices):
            return self.guide.decode(slices, coarse, plane, first)
        count = len(slices) if first is None else first
        places = [slice(start, min(start + at_once, count)) for start in range(0, max(count, 1), at_once)]
        return torch.cat(
            [
                self.guide.decode(slices[at], None if coarse is None else coarse[at], plane, at.stop - at.start)
                for at in places
            ]
        )

    def _at_once(self, rows: Tensor) -> int:
        learning = self.training or torch.is_grad_enabled()
        return max(1, len(rows)) if learning else AT_ONCE

    @staticmethod
    def _shape(embedding: SliceEmbedding, size: int | Sequence[int] | None) -> tuple[int, int, int]:
        """Depth, height and width of a result."""
        depth, height, width = embedding.shape
        if size is None:
            return embedding.shape
        sides = (size, size) if isinstance(size, int) else tuple(size)
        if len(sides) == 3 and sides[0] != depth:
            raise ValueError(f"size is {sides}, the embedding is of volumes {depth} slices deep")
        height, width = sides[-2:]
        return depth, height, width


def evenly(batch: int, depth: int, count: int) -> Tensor:
    """Slices of volumes, evenly apart, from a place that is drawn from torch's random state for each.

    Args:
        batch: B volumes.
        depth: D slices each.
        count: n of them, 1..D.
    Returns:
        int64 (B, n) on the CPU, ascending; every slice is as likely.
    """
    places = (torch.arange(count) + torch.rand(batch, 1, dtype=torch.float64)) * (depth / count)
    return places.long().clamp(max=depth - 1)


def to_slices(volumes: Tensor, chosen: Tensor | None = None) -> Tensor:
    """(B, C, D, H, W) -> (B D, C, H, W), or (B n, C, H, W) of the slices ``chosen`` (B, n)."""
    slices = volumes.transpose(1, 2)
    if chosen is not None:
        slices = slices[torch.arange(len(chosen), device=chosen.device)[:, None], chosen]
    return slices.flatten(0, 1)
