"""SAM's mask decoder for B images x P prompts in one pass, with hooks for tunings."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from knowsam.models.sam.hooks import Hooked, Hooks
from knowsam.models.sam.official import MaskDecoder, TwoWayAttentionBlock, TwoWayTransformer


@dataclass
class Masks:
    """What a mask decoder makes of B images with P prompts each.

    Attributes:
        low_res: (B, P, M, 4E, 4E) logits of M masks a prompt.
        iou: (B, P, M), how good the decoder thinks they are (IoU with the truth); None if not asked for.
        features: (B, P, C / 8, 4E, 4E), the image as each prompt has it, upscaled: what masks are products with; None
            if not asked for.
    """

    low_res: Tensor
    iou: Tensor | None = None
    features: Tensor | None = None


class SamTwoWayBlock(Hooked, TwoWayAttentionBlock):
    """segment-anything's two-way block with hooks.

    * ``post_attention``: x -> x, one instance on the outputs of self-, token-to-image and image-to-token attention,
      each before its residual; tokens (N, tokens, C) or image (N, E * E, C)
    * ``parallel_mlp``: its output on the MLP's input is added beside the MLP's (any scale is the module's)
    """

    HOOKS = ("post_attention", "parallel_mlp")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.adapters = Hooks()

    def forward(self, queries: Tensor, keys: Tensor, query_pe: Tensor, key_pe: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (N, tokens, C) and image (N, E * E, C), each with its positions -> the same two."""
        queries = self.norm1(self.self_attention(queries, query_pe))

        attended = self.cross_attn_token_to_image(q=queries + query_pe, k=keys + key_pe, v=keys)
        queries = self.norm2(queries + self.adapt("post_attention", attended))

        queries = self.norm3(queries + self.add("parallel_mlp", queries, self.mlp(queries)))

        attended = self.cross_attn_image_to_token(q=keys + key_pe, k=queries + query_pe, v=queries)
        keys = self.norm4(keys + self.adapt("post_attention", attended))
        return queries, keys

    def self_attention(self, queries: Tensor, query_pe: Tensor) -> Tensor:
        """Self-attention of the tokens with its residual; SAM's first block has neither positions nor residual."""
        if self.skip_first_layer_pe:
            return self.adapt("post_attention", self.self_attn(q=queries, k=queries, v=queries))
        q = queries + query_pe
        return queries + self.adapt("post_attention", self.self_attn(q=q, k=q, v=queries))


class SamTwoWayTransformer(Hooked, TwoWayTransformer):
    """segment-anything's two-way transformer with a hook at its end; SAM's own at 256 channels, smaller below.

    Hook ``post_attention``: x -> x, on the final token-to-image attention output (N, tokens, C), before its residual.

    Args:
        embed_dim: C, an even number.
        depth: number of blocks.
        heads: of every attention, a divisor of C / 2; one for 32 channels if None, 8 in SAM.
        mlp_dim: hidden width of the blocks' MLPs; 8 C if None, 2048 in SAM.
    """

    HOOKS = ("post_attention",)
    block_type = SamTwoWayBlock

    def __init__(
        self, *, embed_dim: int = 256, depth: int = 2, heads: int | None = None, mlp_dim: int | None = None
    ) -> None:
        if heads is None:
            heads = next(h for h in range(max(1, embed_dim // 32), 0, -1) if embed_dim // 2 % h == 0)
        mlp_dim = 8 * embed_dim if mlp_dim is None else mlp_dim
        super().__init__(depth=0, embedding_dim=embed_dim, num_heads=heads, mlp_dim=mlp_dim)
        self.depth = depth
        for index in range(depth):
            self.layers.append(self.block_type(embed_dim, heads, mlp_dim=mlp_dim, skip_first_layer_pe=index == 0))
        self.adapters = Hooks()

    def forward(self, image_embedding: Tensor, image_pe: Tensor, point_embedding: Tensor) -> tuple[Tensor, Tensor]:
        """Image and positions (N, C, E, E), tokens (N, tokens, C) -> tokens, image (N, E * E, C)."""
        keys = image_embedding.flatten(2).transpose(1, 2)  # (N, E * E, C)
        key_pe = image_pe.flatten(2).transpose(1, 2)
        queries = point_embedding
        for layer in self.layers:
            queries, keys = layer(queries=queries, keys=keys, query_pe=point_embedding, key_pe=key_pe)
        attended = self.final_attn_token_to_image(q=queries + point_embedding, k=keys + key_pe, v=keys)
        return self.norm_final_attn(queries + self.adapt("post_attention", attended)), keys


class SamMaskDecoder(MaskDecoder):
    """SAM's mask decoder for P prompts on each of B images.

    segment-anything's decoder takes one image and repeats it for its prompts; this one takes B images at once, and
    computes no mask and no score that is not asked for. It has segment-anything's parameters and names.

    A decoder with outputs of its own overrides :meth:`output_tokens`, to add its tokens after SAM's, and
    :meth:`forward`, which finds them among the tokens that :meth:`attend` gives. It declares its parameters in
    ``new_parameters``.

    Args:
        embed_dim: C, width of embedding and prompts, a multiple of 8; 256 in every SAM.
        transformer: two-way transformer of that width; :class:`SamTwoWayTransformer` if None.
    Attributes:
        new_parameters: names, or beginnings of names, of parameters that no official file holds.
        needs_taps: which of the encoder's taps ``forward`` wants, as ``taps``; none by default.
    Raises:
        ValueError: embed_dim is not a multiple of 8.
    Source:
        arXiv:2304.02643; segment-anything 1.0.
    """

    new_parameters: tuple[str, ...] = ()
    needs_taps: tuple[int | str, ...] = ()

    def __init__(self, *, embed_dim: int = 256, transformer: nn.Module | None = None) -> None:
        if embed_dim < 8 or embed_dim % 8:
            raise ValueError(f"embed_dim is {embed_dim}; the decoder's upscaling needs a multiple of 8")
        if transformer is None:
            transformer = SamTwoWayTransformer(embed_dim=embed_dim)
        super().__init__(transformer_dim=embed_dim, transformer=transformer, iou_head_hidden_dim=embed_dim)

    def forward(
        self,
        image: Tensor,
        image_pe: Tensor,
        sparse: Tensor,
        dense: Tensor,
        *,
        multimask: bool = False,
        scores: bool = True,
        features: bool = False,
    ) -> Masks:
        """Masks of every image and prompt.

        Args:
            image: image embedding (B, C, E, E).
            image_pe: (1, C, E, E), the prompt encoder's positions.
            sparse: (B, P, n, C) prompt tokens, n may be 0.
            dense: (B, P, C, E, E) dense prompts, or broadcastable to it.
            multimask: M = 3 masks, of whole, part and part of a part as SAM learned them (mask tokens 1 to 3), rather
                than M = 1 of mask token 0.
            scores: also ``iou``.
            features: also ``features``.
        """
        batch, prompts = sparse.shape[:2]
        tokens, upscaled = self.attend(image, image_pe, sparse, dense)
        chosen = range(1, self.num_mask_tokens) if multimask else range(1)
        weights = torch.stack([self.output_hypernetworks_mlps[i](tokens[:, 1 + i]) for i in chosen], dim=1)
        low_res = weights @ upscaled.flatten(2)  # (BP, M, 16 E E)
        iou = None
        if scores:  # token 0 is the IoU token
            iou = self.iou_prediction_head(tokens[:, 0])[:, chosen.start : chosen.stop]
        return Masks(
            low_res.view(batch, prompts, len(chosen), *upscaled.shape[-2:]),
            None if iou is None else torch.unflatten(iou, 0, (batch, prompts)),
            torch.unflatten(upscaled, 0, (batch, prompts)) if features else None,
        )

    def output_tokens(self) -> Tensor:
        """The decoder's own tokens (tokens, C): IoU, masks 0 to 3."""
        return torch.cat([self.iou_token.weight, self.mask_tokens.weight])

    def attend(self, image: Tensor, image_pe: Tensor, sparse: Tensor, dense: Tensor) -> tuple[Tensor, Tensor]:
        """Two-way transformer and upscaling, arguments as of :meth:`forward`.

        Returns:
            Output tokens, then prompt tokens (BP, tokens + n, C), and the upscaled image (BP, C / 8, 4E, 4E).
        """
        batch, prompts = sparse.shape[:2]
        tokens = torch.cat([self.output_tokens().expand(batch, prompts, -1, -1), sparse], dim=2).flatten(0, 1)
        image = (image[:, None] + dense).expand(-1, prompts, -1, -1, -1).flatten(0, 1)  # (BP, C, E, E)
        size = image.shape[-2:]
        tokens, image = self.transformer(image, image_pe.expand_as(image), tokens)
        return tokens, self.output_upscaling(torch.unflatten(image.transpose(1, 2), 2, size))

    def unreached(self, *, multimask: bool | None, scores: bool, **_: object) -> Iterator[nn.Parameter]:
        """Parameters that no forward reaches when this is what it is asked for.

        Args:
            multimask: as of :meth:`forward`; None where now one, now the other is asked for.
            scores: whether the IoU is asked for.
        """
        heads = self.output_hypernetworks_mlps
        if multimask is not None:
            yield from (heads[:1] if multimask else heads[1:]).parameters()
        if not scores:
            yield from self.iou_prediction_head.parameters()
