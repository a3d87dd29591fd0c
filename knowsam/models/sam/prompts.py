"""Prompts of SAM for B images x P prompts each, and the encoder that embeds them all in one pass."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from knowsam.models.sam.official import PromptEncoder

# What each kind must look like: the axes after B and P; a number is a fixed length.
SHAPES: dict[str, tuple[str | int, ...]] = {
    "points": ("N", 2),
    "labels": ("N",),
    "boxes": (4,),
    "masks": ("h", "w"),
    "sparse": ("n", "C"),
    "dense": ("C", "E", "E"),
}


@dataclass
class Prompts:
    """P prompts for each of B images; every prompt gets masks of its own. Each kind may be given or None.

    Of a prompt, points, box and sparse tokens follow each other; points without a box get one padding token, as in SAM.
    The dense prompt is added to the mask's embedding, or to SAM's embedding for "no mask".

    Attributes:
        points: (B, P, N, 2), x and y in pixels of the image that was encoded, pixel centres at whole numbers.
        labels: (B, P, N), of each point: 1 inside, 0 outside, -1 padding.
        boxes: (B, P, 4), x and y of two opposite corners, upper left and lower right, in pixels.
        masks: (B, P, h, w) logits of any size.
        sparse: (B, P, n, C) tokens that enter the decoder as they are.
        dense: (B, P, C, E, E).
    Raises:
        ValueError: shapes that do not fit each other, points without labels or labels without points, other labels
            (only on a CPU: elsewhere looking at them would wait for the device).
    """

    points: Tensor | None = None
    labels: Tensor | None = None
    boxes: Tensor | None = None
    masks: Tensor | None = None
    sparse: Tensor | None = None
    dense: Tensor | None = None

    def __post_init__(self) -> None:
        if torch.jit.is_tracing():  # type: ignore[attr-defined,no-untyped-call]
            return  # sizes are then tensors, which compare by what they are, not by their number
        given = dict(self._given())
        for name, tensor in given.items():
            tail = SHAPES[name]
            found = tuple(tensor.shape)
            fixed = all(have == want for have, want in zip(found[2:], tail, strict=False) if isinstance(want, int))
            if len(found) != 2 + len(tail) or not fixed:
                raise ValueError(f"{name} are {found}; expected (B, P, {', '.join(map(str, tail))})")
        if len({tensor.shape[:2] for tensor in given.values()}) > 1:
            sizes = ", ".join(f"{name} {tuple(tensor.shape[:2])}" for name, tensor in given.items())
            raise ValueError(f"prompts disagree about images and prompts an image (B, P): {sizes}")
        if (self.points is None) != (self.labels is None):
            raise ValueError("points and labels go together: give both or neither")
        if self.points is not None and self.labels is not None:
            if self.points.shape[:3] != self.labels.shape:
                raise ValueError(f"points are {tuple(self.points.shape)}, labels {tuple(self.labels.shape)}: N differs")
            if self.labels.device.type == "cpu" and ((self.labels < -1) | (self.labels > 1)).any():
                raise ValueError(f"labels must be 1, 0 or -1 (padding), got {torch.unique(self.labels).tolist()}")

    def _given(self) -> Iterator[tuple[str, Tensor]]:
        for field in fields(self):
            tensor = getattr(self, field.name)
            if tensor is not None:
                yield field.name, tensor

    @property
    def count(self) -> int:
        """P; 1 where nothing is given: SAM then segments what it likes."""
        return next((tensor.shape[1] for _, tensor in self._given()), 1)

    def __getitem__(self, images: slice) -> "Prompts":
        """Those of some of the images."""
        return Prompts(**{name: tensor[images] for name, tensor in self._given()})

    def check(self, image: Tensor) -> None:
        """Refuse an embedding (B, C, E, E) that they do not fit.

        Raises:
            ValueError: another number of images, of channels or of places.
        """
        batch, channels = image.shape[:2]
        for name, tensor in self._given():
            if len(tensor) != batch:
                raise ValueError(f"{name} are for {len(tensor)} images, the embedding is of {batch}")
        if self.sparse is not None and self.sparse.shape[3] != channels:
            raise ValueError(f"sparse are {tuple(self.sparse.shape)}; the embedding has {channels} channels")
        if self.dense is not None and self.dense.shape[2:] != image.shape[1:]:
            raise ValueError(f"dense are {tuple(self.dense.shape)}; the embedding is {tuple(image.shape)}")


class SamPromptEncoder(PromptEncoder):
    """segment-anything's prompt encoder for B images x P prompts in one pass; the same parameters and names.

    Args:
        embed_dim: C, an even number; 256 in every SAM.
        grid: E, places of the embedding a side.
        image_size: S, pixels a side.
        mask_channels: hidden channels of the mask's embedding.
    Source:
        arXiv:2304.02643; segment-anything 1.0.
    """

    def __init__(self, *, embed_dim: int = 256, grid: int, image_size: int, mask_channels: int = 16) -> None:
        super().__init__(
            embed_dim=embed_dim,
            image_embedding_size=(grid, grid),
            input_image_size=(image_size, image_size),
            mask_in_chans=mask_channels,
        )

    def forward(self, prompts: Prompts, batch: int) -> tuple[Tensor, Tensor]:
        """Embeddings of the prompts.

        Args:
            prompts: of ``batch`` images, or empty.
            batch: B.
        Returns:
            sparse (B, P, n, C), n = 0 where there are none; dense (B, P, C, E, E), or broadcastable to it.
        """
        tokens = []
        if prompts.points is not None and prompts.labels is not None:
            tokens.append(self.embed_points(prompts.points, prompts.labels))
            if prompts.boxes is None:
                tokens.append(self.not_a_point_embed.weight.expand(batch, prompts.count, -1, -1))
        if prompts.boxes is not None:
            tokens.append(self.embed_boxes(prompts.boxes))
        if prompts.sparse is not None:
            tokens.append(prompts.sparse)
        if not tokens:
            tokens.append(self.no_mask_embed.weight.new_zeros(batch, prompts.count, 0, self.embed_dim))
        dense = self.embed_masks(prompts.masks)
        return (
            tokens[0] if len(tokens) == 1 else torch.cat(tokens, dim=2),
            dense if prompts.dense is None else dense + prompts.dense,
        )

    def embed_points(self, points: Tensor, labels: Tensor) -> Tensor:
        """Points (B, P, N, 2) with labels (B, P, N) -> tokens (B, P, N, C)."""
        outside, inside, _, _ = self._kinds()
        kind = torch.where((labels == 1)[..., None], inside, outside)
        padding = (labels == -1)[..., None]
        return torch.where(padding, self.not_a_point_embed.weight, self.embed_places(points) + kind)

    def embed_boxes(self, boxes: Tensor) -> Tensor:
        """Boxes (B, P, 4) -> tokens of their two corners (B, P, 2, C)."""
        corners = torch.cat(self._kinds()[2:])
        return self.embed_places(torch.unflatten(boxes, -1, (2, 2))) + corners

    def _kinds(self) -> list[Tensor]:
        """Embeddings (1, C) of a point outside, one inside, a box's upper left and its lower right corner."""
        return [cast(nn.Embedding, module).weight for module in self.point_embeddings]

    def embed_masks(self, masks: Tensor | None) -> Tensor:
        """Logits (B, P, h, w) -> (B, P, C, E, E); without any, SAM's embedding for "no mask", (1, 1, C, 1, 1)."""
        if masks is None:
            return self.no_mask_embed.weight.view(1, 1, -1, 1, 1)
        masks = masks.float()
        if masks.shape[-2:] != self.mask_input_size:
            masks = F.interpolate(masks, size=self.mask_input_size, mode="bilinear", align_corners=False)
        embedded: Tensor = self.mask_downscaling(masks.flatten(0, 1)[:, None])
        return torch.unflatten(embedded, 0, masks.shape[:2])

    def embed_places(self, places: Tensor) -> Tensor:
        """x and y in pixels (..., 2) -> Fourier features (..., C), float32."""
        with _exact(places):
            return self.pe_layer._pe_encoding((places.float() + 0.5) / self.input_image_size[0])

    def positions(self) -> Tensor:
        """Fourier features of the embedding's places (1, C, E, E), float32."""
        with _exact(self.no_mask_embed.weight):
            return self.get_dense_pe()

    def unreached(self, *, points: bool, boxes: bool, masks: bool | None, **_: object) -> Iterator[nn.Parameter]:
        """Parameters that no forward reaches when these are what prompts consist of.

        Args:
            points, boxes: whether there are any. Points without boxes have a padding token.
            masks: True where every forward has them, False where none has, None where some have.
        """
        unused: list[nn.Module] = []
        if not points:
            unused += [self.not_a_point_embed, *self.point_embeddings[:2]]
        if not boxes:
            unused += [*self.point_embeddings[2:]]
        if masks is not None:
            unused.append(self.no_mask_embed if masks else self.mask_downscaling)
        for module in unused:
            yield from module.parameters()


def _exact(like: Tensor) -> torch.autocast:
    """No autocast: a frequency times a coordinate in bfloat16 would be wrong by a good part of a radian."""
    return torch.autocast(like.device.type, enabled=False)
