"""SAM as one promptable network: images in, embeddings; embeddings and prompts in, masks."""

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from knowsam.models.sam.channels import Channels
from knowsam.models.sam.mask_decoder import Masks
from knowsam.models.sam.prompts import Prompts, SamPromptEncoder

PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_STD = (58.395, 57.12, 57.375)

TOLERANCE = 0.05
"""How far intensities may leave 0..1: an interpolation may overshoot."""
CHECKED_CALLS = 3
"""Calls whose images are looked at. Each waits for the device, so training cannot look at all of them."""


@dataclass
class Embedding:
    """What an encoder made of images.

    Attributes:
        image: (B, C, E, E), what the mask decoder works on.
        taps: what the encoder gives besides, by index of its block or by stride: (B, c, e, e).
        depth: D, where the images are the slices of volumes, B = volumes x D.
    """

    image: Tensor
    taps: dict[int | str, Tensor] = field(default_factory=dict)
    depth: int | None = None

    def __len__(self) -> int:
        """Number of images, or of volumes."""
        return len(self.image) // (self.depth or 1)

    def __getitem__(self, items: slice) -> "Embedding":
        """The first, the last, ... images or volumes; without a step."""
        start, stop, step = items.indices(len(self))
        assert step == 1, "a part of a batch is contiguous"
        rows = slice(start * (self.depth or 1), stop * (self.depth or 1))
        return self._each(lambda tensor, _: tensor[rows])

    def detach(self) -> "Embedding":
        """The same without gradient."""
        return self._each(lambda tensor, _: tensor.detach())

    def joined(self, other: "Embedding") -> "Embedding":
        """These images and then the other ones."""
        assert self.taps.keys() == other.taps.keys() and self.depth == other.depth, "embeddings of one encoder"
        return self._each(lambda tensor, name: torch.cat([tensor, other.image if name is None else other.taps[name]]))

    def _each(self, change: Callable[[Tensor, int | str | None], Tensor]) -> "Embedding":
        taps = {name: change(tensor, name) for name, tensor in self.taps.items()}
        return Embedding(change(self.image, None), taps, self.depth)


@dataclass
class Decoded:
    """What the mask decoder made of an embedding and of prompts.

    Attributes:
        logits: (B, P, M, h, w) float32.
        low_res: (B, P, M, 4E, 4E) float32, as the decoder makes them; a mask prompt for another round.
        iou: (B, P, M) float32, the decoder's guess of each mask's IoU; None if not asked for, or if it has none.
        features: (B, P, c, 4E, 4E); None if not asked for.
    """

    logits: Tensor
    low_res: Tensor
    iou: Tensor | None = None
    features: Tensor | None = None


class Sam(nn.Module):
    """Promptable SAM for B images x P prompts in one pass. It freezes nothing: :func:`freeze_unreached`.

    Args:
        image_encoder: normalised images (B, c, S, S) -> (B, C, E, E), or that and taps {name: tensor}. It states
            ``out_channels`` C, ``grid`` E, ``stride`` S / E and, if it is not 3, ``in_channels`` c. One that looks at
            prompts itself takes ``extra``.
        prompt_encoder: built for C, E and S.
        mask_decoder: embedding (B, C, E, E), its positions (1, C, E, E), sparse (B, P, n, C), dense (B, P, C, E, E) or
            broadcastable, and ``multimask``, ``scores``, ``features`` -> :class:`Masks`. It may state ``needs_taps``,
            names for the encoder's ``tap``, and is then given ``taps``; and it may have ``upscale(masks, size)``, which
            makes logits of (height, width) in the place of bilinear interpolation.
        pixel_mean, pixel_std: per channel, for pixel values 0..255; SAM's.
        channels: images of any number of channels -> 3, for an encoder that takes 3; None: 3, or 1 repeated.
    Attributes:
        checked_calls: how many more calls of ``encode`` look at the range of their images.
    Raises:
        ValueError: parts that do not fit together; pixel statistics that are not one number a channel, or a pixel_std
            that is not positive.
    Source:
        arXiv:2304.02643; segment-anything 1.0.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self,
        image_encoder: nn.Module,
        prompt_encoder: SamPromptEncoder,
        mask_decoder: nn.Module,
        pixel_mean: Sequence[float] = PIXEL_MEAN,
        pixel_std: Sequence[float] = PIXEL_STD,
        channels: Channels | None = None,
    ) -> None:
        super().__init__()
        encoder_channels = getattr(image_encoder, "in_channels", 3)
        if len(pixel_mean) != encoder_channels or len(pixel_std) != encoder_channels or min(pixel_std) <= 0:
            raise ValueError(
                f"pixel_mean is {tuple(pixel_mean)}, pixel_std {tuple(pixel_std)}; each needs a number per channel, "
                f"{encoder_channels} in all, and those of pixel_std must be above 0"
            )
        stride, grid, embed_dim = (stated(image_encoder, name) for name in ("stride", "grid", "out_channels"))
        found = prompt_encoder.embed_dim, prompt_encoder.image_embedding_size, prompt_encoder.input_image_size
        if found != (embed_dim, (grid, grid), (stride * grid, stride * grid)):
            raise ValueError(
                f"the prompt encoder is for {found[0]} channels on a grid {found[1]} of images {found[2]}; the encoder "
                f"makes {embed_dim} channels on a grid {(grid, grid)} of images {(stride * grid, stride * grid)}"
            )
        if taps := getattr(mask_decoder, "needs_taps", ()):
            if not hasattr(image_encoder, "tap"):
                raise ValueError(
                    f"{type(mask_decoder).__name__} needs taps {taps} of the encoder, and "
                    f"{type(image_encoder).__name__} has no tap(names) to ask for them"
                )
            cast(Any, image_encoder).tap(taps)
        self.image_encoder = image_encoder
        self.prompt_encoder = prompt_encoder
        self.mask_decoder = mask_decoder
        self.stride, self.embed_dim = stride, embed_dim
        self.image_size = stride * grid
        self.in_channels = encoder_channels
        self.channels = Channels() if channels is None else channels
        self.checked_calls = CHECKED_CALLS
        # not persistent: segment-anything's checkpoints do not hold them
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean) / 255, persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std) / 255, persistent=False)

    def forward(
        self, images: Tensor, prompts: Prompts, size: int | Sequence[int] | None = None, **asked: Any
    ) -> Decoded:
        """Masks of images (B, 3, S, S) in 0..1: :meth:`encode`, then :meth:`decode`."""
        return self.decode(self.encode(images), prompts, size, **asked)

    def encode(self, images: Tensor, extra: Tensor | None = None) -> Embedding:
        """Embedding of images.

        Args:
            images: (B, c, S, S) in 0..1, see ``channels``; SAM's own normalisation is done here.
            extra: what an encoder that looks at prompts itself takes besides.
        Raises:
            ValueError: images that are no floating point numbers in 0..1 (the range is looked at in the first calls
                only), another number of channels; ``extra`` for an encoder that takes none.
        """
        if not images.is_floating_point() or (self.checked_calls and not torch.compiler.is_compiling()):
            check_images(images)
            self.checked_calls -= 1
        if extra is not None and "extra" not in inspect.signature(self.image_encoder.forward).parameters:
            raise ValueError(f"{type(self.image_encoder).__name__} takes no extra input, got {tuple(extra.shape)}")
        if self.in_channels == 3:
            images = self.channels(images)
        statistics = (-1, *(1,) * (images.ndim - 2))
        normal = (images - self.pixel_mean.view(statistics)) / self.pixel_std.view(statistics)
        found = self.image_encoder(normal) if extra is None else self.image_encoder(normal, extra=extra)
        return Embedding(*found) if isinstance(found, tuple) else Embedding(found)

    def decode(
        self,
        embedding: Embedding,
        prompts: Prompts,
        size: int | Sequence[int] | None = None,
        *,
        multimask: bool = False,
        scores: bool = True,
        features: bool = False,
    ) -> Decoded:
        """Masks of P prompts on each of B images.

        Args:
            embedding: of :meth:`encode`.
            prompts: of as many images.
            size: side, or height and width, of the logits; the images' if None.
            multimask: M = 3 masks of mask tokens 1 to 3, for prompts that may mean several things, rather than M = 1.
            scores: also the decoder's guess of each mask's IoU.
            features: also the upscaled embedding of each prompt.
        Raises:
            ValueError: prompts that do not fit the embedding.
        """
        image = embedding.image
        prompts.check(image)
        sparse, dense = self.prompt_encoder(prompts, image.shape[0])
        taps = {"taps": embedding.taps} if getattr(self.mask_decoder, "needs_taps", ()) else {}
        masks: Masks = self.mask_decoder(
            image, self.positions(), sparse, dense, multimask=multimask, scores=scores, features=features, **taps
        )
        if size is None:
            size = [self.stride * side for side in image.shape[-2:]]
        height, width = (size, size) if isinstance(size, int) else size
        masks.low_res = masks.low_res.float()
        iou = None if masks.iou is None else masks.iou.float()
        logits = getattr(self.mask_decoder, "upscale", upscale)(masks, (height, width))
        return Decoded(logits, masks.low_res, iou, masks.features)

    def positions(self) -> Tensor:
        """Positions of the embedding's places (1, C, E, E), float32."""
        return self.prompt_encoder.positions()

    def compilable(self) -> list[nn.Module]:
        """Parts whose own forward runs at every step."""
        return [self.image_encoder, self.mask_decoder]


def upscale(masks: Masks, size: tuple[int, int]) -> Tensor:
    """Low-resolution logits (B, P, M, 4E, 4E) -> (B, P, M, *size), bilinear."""
    low_res = masks.low_res
    full = F.interpolate(low_res.flatten(1, 2), size=size, mode="bilinear", align_corners=False)
    return torch.unflatten(full, 1, low_res.shape[1:3])


def stated(encoder: nn.Module, name: str) -> int:
    """A whole number that an encoder states about itself: ``stride``, ``grid`` or ``out_channels``.

    Raises:
        ValueError: it does not.
    """
    value = getattr(encoder, name, None)
    if not isinstance(value, int):
        raise ValueError(
            f"{type(encoder).__name__} states no {name}: an image encoder has the whole numbers stride, grid and "
            "out_channels"
        )
    return value


def check_images(images: Tensor) -> None:
    """Refuse images that are not in 0..1. Waits for the device.

    Raises:
        ValueError: says what they look like, and what to do.
    """
    wanted = "SAM takes floating point numbers in 0..1 and normalises them itself"
    if not images.is_floating_point():
        kind = str(images.dtype).removeprefix("torch.")
        raise ValueError(f"images are {kind}; {wanted}: images.float() / 255 for pixel values 0..255")
    if not images.numel():
        return
    low, high = torch.stack(images.detach().aminmax()).tolist()
    if low >= -TOLERANCE and not high > 1 + TOLERANCE:
        return
    found = f"images are in {low:.4g}..{high:.4g}"
    if low < -TOLERANCE:
        raise ValueError(f"{found}, as if they were standardised (z-scores) or in -1..1; {wanted}: leave that out")
    if high <= 255.5:
        raise ValueError(f"{found}, as if they were pixel values 0..255; {wanted}: divide them by 255")
    raise ValueError(f"{found}; {wanted}: cut and scale intensities to that range first")


def freeze_unreached(
    sam: Sam, *, points: bool, boxes: bool, masks: bool | None, multimask: bool | None, scores: bool
) -> None:
    """Freeze what no forward pass reaches when SAM is used as said, so that DDP finds no unused parameter.

    Each part says what that is (``unreached``); a part that does not is left alone.

    Args:
        points, boxes: whether prompts have any.
        masks: True where all have them, False where none has, None where some have.
        multimask: as given to ``decode``; None where now one, now the other is.
        scores: as given to ``decode``.
    """
    use = {"points": points, "boxes": boxes, "masks": masks, "multimask": multimask, "scores": scores}
    for part in (sam.image_encoder, sam.prompt_encoder, sam.mask_decoder):
        unreached: Callable[..., Iterable[nn.Parameter]] | None = getattr(part, "unreached", None)
        for parameter in unreached(**use) if unreached is not None else ():
            parameter.requires_grad_(False)
