"""SAM with its own prompts: images (and coarse logits) in, class logits out."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_STD = (58.395, 57.12, 57.375)


class SamGuide(nn.Module):
    """SAM, a prompt generator and a mask prompt, decoded once per class in one batched pass.

    The mask prompt of class k is a student's coarse logits of class k, detached: SAM learns from them, they learn
    nothing here. Parameters that no forward can reach are frozen by the constructor, so DDP around anything that holds
    a guide finds no unused parameter (with ``mask_prompt``, give coarse logits at every training step).

    Args:
        image_encoder: normalised images (B, 3, S, S) -> (B, 256, E, E), E = S / 16.
        prompt_encoder: segment-anything's, built for E and S.
        mask_decoder: embedding, positions, sparse (B, K, n, 256), dense (B, K, 256, E, E) -> logits (B, K, 4E, 4E).
        prompt_generator: embedding -> sparse (B, K, n, 256), dense (B, K, 256, E, E) or None.
        num_classes: K, background included.
        pixel_mean, pixel_std: per channel, for pixel values 0..255; SAM's.
        mask_prompt: use coarse logits; without, the feedback from the students is off.
    Raises:
        ValueError: num_classes below 1, or differs from the prompt generator's; pixel statistics that are not three
            numbers, or a pixel_std that is not positive.
    Source:
        arXiv:2304.02643 (SAM), arXiv:2412.13742 (KnowSAM).
    """

    def __init__(
        self,
        image_encoder: nn.Module,
        prompt_encoder: nn.Module,
        mask_decoder: nn.Module,
        prompt_generator: nn.Module,
        num_classes: int,
        pixel_mean: Sequence[float] = PIXEL_MEAN,
        pixel_std: Sequence[float] = PIXEL_STD,
        *,
        mask_prompt: bool = True,
    ):
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes is {num_classes}; it counts the background and must be at least 1")
        if getattr(prompt_generator, "num_classes", num_classes) != num_classes:
            raise ValueError(
                f"num_classes is {num_classes}, but the prompt generator was built for {prompt_generator.num_classes}"
            )
        if len(pixel_mean) != 3 or len(pixel_std) != 3 or min(pixel_std) <= 0:
            raise ValueError(
                f"pixel_mean is {tuple(pixel_mean)}, pixel_std {tuple(pixel_std)}; each needs a number per channel, "
                "three in all, and those of pixel_std must be above 0"
            )
        self.image_encoder = image_encoder
        self.prompt_encoder = prompt_encoder
        self.mask_decoder = mask_decoder
        self.prompt_generator = prompt_generator
        self.num_classes = num_classes
        self.mask_prompt = mask_prompt
        # not persistent: segment-anything's checkpoints do not hold them
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(3, 1, 1) / 255, persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(3, 1, 1) / 255, persistent=False)
        # no points or boxes are ever given, and only one of the two mask embeddings is used
        prompt_encoder.point_embeddings.requires_grad_(False)
        prompt_encoder.not_a_point_embed.requires_grad_(False)
        unused = prompt_encoder.no_mask_embed if mask_prompt else prompt_encoder.mask_downscaling
        unused.requires_grad_(False)

    def forward(self, images: Tensor, coarse_logits: Tensor | None = None) -> Tensor:
        """Class logits of SAM.

        Args:
            images: (B, 3, S, S) in 0..1.
            coarse_logits: (B, K, h, w), any size; detached here. None: SAM's embedding for "no mask" stands in.
        Returns:
            (B, K, S, S) float32 logits.
        Raises:
            ValueError: shapes that do not fit.
        """
        return self.decode(self.encode(images), coarse_logits, size=images.shape[-2:])

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, S, S) in 0..1 -> image embedding (B, 256, E, E)."""
        return self.image_encoder((images - self.pixel_mean) / self.pixel_std)

    def decode(
        self,
        image_embedding: Tensor,
        coarse_logits: Tensor | None = None,
        size: int | Sequence[int] | None = None,
        first: int | None = None,
    ) -> Tensor:
        """Class logits from an embedding, so that a second decoding need not encode again.

        Args:
            image_embedding: (B, 256, E, E).
            coarse_logits: (B, K, h, w), any size; detached here.
            size: side, or height and width, of the result; 16E if None.
            first: decode so many of the images; all if None. Prompts are made of all in any case, whose batch norms
                in train mode look at the whole batch.
        Returns:
            (B, K, height, width) float32 logits, B = ``first`` if given.
        """
        sparse, dense = self.prompt_generator(image_embedding)
        if first is not None:
            image_embedding, sparse = image_embedding[:first], sparse[:first]
            dense = None if dense is None else dense[:first]
            coarse_logits = None if coarse_logits is None else coarse_logits[:first]
        mask_embedding = self.embed_masks(image_embedding, coarse_logits)  # (B or 1, K or 1, 256, E, E)
        dense = mask_embedding if dense is None else mask_embedding + dense
        low_resolution = self.mask_decoder(image_embedding, self.positions(), sparse, dense)  # (B, K, 4E, 4E)
        if size is None:
            size = 16 * image_embedding.shape[-1]
        size = (size, size) if isinstance(size, int) else tuple(size)
        return F.interpolate(low_resolution.float(), size=size, mode="bilinear", align_corners=False)

    def embed_masks(self, image_embedding: Tensor, coarse_logits: Tensor | None) -> Tensor:
        """Mask embedding of every class: (B, K, 256, E, E), or (1, 1, 256, 1, 1) where there is no mask."""
        if coarse_logits is None or not self.mask_prompt:
            return self.prompt_encoder.no_mask_embed.weight.view(1, 1, -1, 1, 1)
        batch, _, height, width = image_embedding.shape
        if coarse_logits.ndim != 4 or coarse_logits.shape[:2] != (batch, self.num_classes):
            raise ValueError(
                f"coarse_logits are {tuple(coarse_logits.shape)}; expected (B, K, h, w) with B = {batch}, "
                f"K = {self.num_classes}"
            )
        masks = coarse_logits.detach().float()
        masks = F.interpolate(masks, size=(4 * height, 4 * width), mode="bilinear", align_corners=False)
        _, embedded = self.prompt_encoder(points=None, boxes=None, masks=masks.flatten(0, 1)[:, None])
        return embedded.unflatten(0, (batch, self.num_classes))

    def positions(self) -> Tensor:
        """Positions of the embedding's pixels (1, 256, E, E)."""
        # a frequency times a coordinate in bfloat16 would be wrong by a good part of a radian
        with torch.autocast(self.pixel_mean.device.type, enabled=False):
            return self.prompt_encoder.get_dense_pe()
