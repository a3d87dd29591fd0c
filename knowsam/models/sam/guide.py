"""SAM with its own prompts: images (and coarse logits) in, class logits out."""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor, nn

from knowsam.models.sam.prompts import Prompts
from knowsam.models.sam.sam import Embedding, Sam, freeze_unreached


class SamGuide(nn.Module):
    """SAM, a prompt generator and a mask prompt: one prompt a class, all decoded in one batched pass.

    The mask prompt of class k is a student's coarse logits of class k, detached: SAM learns from them, they learn
    nothing here. Parameters that no forward can reach are frozen by the constructor, so DDP around anything that holds
    a guide finds no unused parameter (with ``mask_prompt``, give coarse logits at every training step).

    Args:
        sam: its mask decoder is asked for mask 0 alone, and for no scores.
        prompt_generator: image embedding (B, C, E, E) -> :class:`Prompts` with P = K: sparse tokens, a dense prompt, or
            whatever else SAM takes but masks.
        num_classes: K, background included.
        mask_prompt: use coarse logits; without, the feedback from the students is off.
        freeze: freeze what no forward of a guide reaches; False where the same ``sam`` is used otherwise, too.
    Raises:
        ValueError: num_classes below 1, or differs from the prompt generator's.
    Source:
        arXiv:2304.02643 (SAM), arXiv:2412.13742 (KnowSAM).
    """

    new_parameters = ("prompt_generator",)

    def __init__(
        self,
        sam: Sam,
        prompt_generator: nn.Module,
        num_classes: int,
        *,
        mask_prompt: bool = True,
        freeze: bool = True,
    ) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes is {num_classes}; it counts the background and must be at least 1")
        if getattr(prompt_generator, "num_classes", num_classes) != num_classes:
            raise ValueError(
                f"num_classes is {num_classes}, but the prompt generator was built for {prompt_generator.num_classes}"
            )
        self.sam = sam
        self.prompt_generator = prompt_generator
        self.num_classes = num_classes
        self.mask_prompt = mask_prompt
        if freeze:
            freeze_unreached(sam, points=False, boxes=False, masks=mask_prompt, multimask=False, scores=False)

    @property
    def image_size(self) -> int:
        """The one side S of images that it takes, pixels."""
        return self.sam.image_size

    @property
    def image_encoder(self) -> nn.Module:
        """SAM's."""
        return self.sam.image_encoder

    def forward(self, images: Tensor, coarse_logits: Tensor | None = None) -> Tensor:
        """Class logits of SAM.

        Args:
            images: (B, 3 or 1, S, S) in 0..1.
            coarse_logits: (B, K, h, w), any size; detached here. None: SAM's embedding for "no mask" stands in.
        Returns:
            (B, K, S, S) float32 logits.
        Raises:
            ValueError: shapes that do not fit, images that are not in 0..1.
        """
        return self.decode(self.encode(images), coarse_logits, size=images.shape[-2:])

    def encode(self, images: Tensor) -> Embedding:
        """Images (B, 3 or 1, S, S) in 0..1 -> their embedding, whose ``image`` is (B, C, E, E)."""
        return self.sam.encode(images)

    def decode(
        self,
        embedding: Embedding,
        coarse_logits: Tensor | None = None,
        size: int | Sequence[int] | None = None,
        first: int | None = None,
    ) -> Tensor:
        """Class logits from an embedding, so that a second decoding need not encode again.

        Args:
            embedding: of B images.
            coarse_logits: (B, K, h, w), any size; detached here.
            size: side, or height and width, of the result; the images' if None.
            first: decode so many of the images; all if None. Prompts are made of all in any case, whose batch norms
                in train mode look at the whole batch.
        Returns:
            (B, K, height, width) float32 logits, B = ``first`` if given.
        """
        masks = self._mask_prompt(embedding.image.shape[0], coarse_logits)
        prompts = self.prompts(embedding)
        if first is not None:
            embedding, prompts = embedding[:first], prompts[:first]
            masks = None if masks is None else masks[:first]
        return self.sam.decode(embedding, replace(prompts, masks=masks), size, scores=False).logits.squeeze(2)

    def prompts(self, embedding: Embedding) -> Prompts:
        """What the prompt generator makes of an embedding: one prompt a class, without masks.

        Raises:
            TypeError, ValueError: it is no ``Prompts``, or not of K prompts.
        """
        prompts = self.prompt_generator(embedding.image)
        if not isinstance(prompts, Prompts):
            raise TypeError(
                f"{type(self.prompt_generator).__name__} gave a {type(prompts).__name__}; a prompt generator gives "
                "Prompts(sparse=..., dense=...)"
            )
        if prompts.count != self.num_classes:
            raise ValueError(
                f"{type(self.prompt_generator).__name__} gave {prompts.count} prompts an image; there are "
                f"{self.num_classes} classes"
            )
        return prompts

    def embed_masks(self, embedding: Embedding, coarse_logits: Tensor | None) -> Tensor:
        """Mask embedding of every class: (B, K, C, E, E), or (1, 1, C, 1, 1) where there is no mask."""
        return self.sam.prompt_encoder.embed_masks(self._mask_prompt(embedding.image.shape[0], coarse_logits))

    def compilable(self) -> list[nn.Module]:
        """Parts whose own forward runs at every step."""
        return [*self.sam.compilable(), self.prompt_generator]

    def _mask_prompt(self, batch: int, coarse_logits: Tensor | None) -> Tensor | None:
        if coarse_logits is None or not self.mask_prompt:
            return None
        if coarse_logits.ndim != 4 or coarse_logits.shape[:2] != (batch, self.num_classes):
            raise ValueError(
                f"coarse_logits are {tuple(coarse_logits.shape)}; expected (B, K, h, w) with B = {batch}, "
                f"K = {self.num_classes}"
            )
        return coarse_logits.detach()
