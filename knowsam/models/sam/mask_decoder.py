"""SAM's mask decoder for B images x K prompt sets in one pass, with hooks for adapters."""

import torch
from torch import Tensor, nn

from knowsam.models.sam.encoder import attach
from knowsam.models.sam.official import MaskDecoder, TwoWayAttentionBlock, TwoWayTransformer


class SamTwoWayBlock(TwoWayAttentionBlock):
    """segment-anything's two-way block with hooks.

    Each hook holds at most one module, in ``adapters`` under the hook's name:

    * ``post_attention``: x -> x, one instance on the outputs of self-, token-to-image and image-to-token attention,
      each before its residual; tokens (N, tokens, 256) or image (N, E * E, 256)
    * ``parallel_mlp``: its output on the MLP's input is added beside the MLP's (any scale is the module's)
    """

    HOOKS = ("post_attention", "parallel_mlp")

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.adapters = nn.ModuleDict()

    def attach(self, hook: str, module: nn.Module) -> None:
        """Attach ``module`` at ``hook``; ValueError if there is no such hook or it is taken."""
        attach(self, hook, module, self.HOOKS)

    def adapt(self, hook: str, x: Tensor) -> Tensor:
        """x through the module at ``hook``, if there is one."""
        return self.adapters[hook](x) if hook in self.adapters else x

    def forward(self, queries: Tensor, keys: Tensor, query_pe: Tensor, key_pe: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (N, tokens, 256) and image (N, E * E, 256), each with its positions -> the same two."""
        queries = self.norm1(self.self_attention(queries, query_pe))

        attended = self.cross_attn_token_to_image(q=queries + query_pe, k=keys + key_pe, v=keys)
        queries = self.norm2(queries + self.adapt("post_attention", attended))

        mlp_out = self.mlp(queries)
        if "parallel_mlp" in self.adapters:
            mlp_out = mlp_out + self.adapters["parallel_mlp"](queries)
        queries = self.norm3(queries + mlp_out)

        attended = self.cross_attn_image_to_token(q=keys + key_pe, k=queries + query_pe, v=queries)
        keys = self.norm4(keys + self.adapt("post_attention", attended))
        return queries, keys

    def self_attention(self, queries: Tensor, query_pe: Tensor) -> Tensor:
        """Self-attention of the tokens with its residual; SAM's first block has neither positions nor residual."""
        if self.skip_first_layer_pe:
            return self.adapt("post_attention", self.self_attn(q=queries, k=queries, v=queries))
        q = queries + query_pe
        return queries + self.adapt("post_attention", self.self_attn(q=q, k=q, v=queries))


class SamTwoWayTransformer(TwoWayTransformer):
    """segment-anything's two-way transformer with a hook at its end.

    Hook ``post_attention``: x -> x, on the final token-to-image attention output (N, tokens, 256), before its residual.
    """

    HOOKS = ("post_attention",)
    block_type = SamTwoWayBlock

    def __init__(self, *, depth: int = 2, embedding_dim: int = 256, num_heads: int = 8, mlp_dim: int = 2048):
        super().__init__(depth=0, embedding_dim=embedding_dim, num_heads=num_heads, mlp_dim=mlp_dim)
        self.depth = depth
        for index in range(depth):
            self.layers.append(
                self.block_type(embedding_dim, num_heads, mlp_dim=mlp_dim, skip_first_layer_pe=index == 0)
            )
        self.adapters = nn.ModuleDict()

    def attach(self, hook: str, module: nn.Module) -> None:
        """Attach ``module`` at ``hook``; ValueError if there is no such hook or it is taken."""
        attach(self, hook, module, self.HOOKS)

    def adapt(self, hook: str, x: Tensor) -> Tensor:
        """x through the module at ``hook``, if there is one."""
        return self.adapters[hook](x) if hook in self.adapters else x

    def forward(self, image_embedding: Tensor, image_pe: Tensor, point_embedding: Tensor) -> tuple[Tensor, Tensor]:
        """Image and positions (N, 256, E, E), tokens (N, tokens, 256) -> tokens, image (N, E * E, 256)."""
        keys = image_embedding.flatten(2).transpose(1, 2)  # (N, E * E, 256)
        key_pe = image_pe.flatten(2).transpose(1, 2)
        queries = point_embedding
        for layer in self.layers:
            queries, keys = layer(queries=queries, keys=keys, query_pe=point_embedding, key_pe=key_pe)
        attended = self.final_attn_token_to_image(q=queries + point_embedding, k=keys + key_pe, v=keys)
        return self.norm_final_attn(queries + self.adapt("post_attention", attended)), keys


class SamMaskDecoder(MaskDecoder):
    """SAM's mask decoder, single-mask output (mask token 0), for K prompt sets on each of B images.

    segment-anything's decoder takes one image and repeats it for its prompts; this one takes B images at once. It has
    segment-anything's parameters and names; those that mask 0 does not use (IoU head, hyper-networks 1 to 3) are kept
    for the checkpoint and frozen here.

    Args:
        transformer: two-way transformer of width ``embed_dim``; SAM's if None.
        embed_dim: width of embedding and prompts; 256 in every SAM.
    Source:
        arXiv:2304.02643; segment-anything 1.0.
    """

    def __init__(self, transformer: nn.Module | None = None, *, embed_dim: int = 256):
        if transformer is None:
            transformer = SamTwoWayTransformer(embedding_dim=embed_dim)
        super().__init__(transformer_dim=embed_dim, transformer=transformer)
        # no forward reaches them, and DDP stops at a trainable parameter without gradient
        self.iou_prediction_head.requires_grad_(False)
        self.output_hypernetworks_mlps[1:].requires_grad_(False)

    def forward(self, image_embedding: Tensor, image_pe: Tensor, sparse: Tensor, dense: Tensor) -> Tensor:
        """One mask per image and prompt set.

        Args:
            image_embedding: (B, 256, E, E).
            image_pe: (1, 256, E, E), the prompt encoder's dense positions.
            sparse: (B, K, n, 256) prompt tokens, n may be 0.
            dense: (B, K, 256, E, E) dense prompts, or broadcastable to it.
        Returns:
            (B, K, 4E, 4E) logits.
        """
        batch, prompts = sparse.shape[:2]
        own = torch.cat([self.iou_token.weight, self.mask_tokens.weight])  # (1 + 4, 256)
        tokens = torch.cat([own.expand(batch, prompts, -1, -1), sparse], dim=2).flatten(0, 1)  # (BK, 5 + n, 256)
        image = (image_embedding[:, None] + dense).flatten(0, 1)  # (BK, 256, E, E)

        tokens, image_tokens = self.transformer(image, image_pe.expand_as(image), tokens)

        image = image_tokens.transpose(1, 2).unflatten(2, image.shape[-2:])
        upscaled = self.output_upscaling(image)  # (BK, 32, 4E, 4E)
        weights = self.output_hypernetworks_mlps[0](tokens[:, 1])  # (BK, 32), of mask token 0; token 0 is the IoU token
        logits = weights[:, None] @ upscaled.flatten(2)  # (BK, 1, 16 E E)
        return logits.unflatten(2, upscaled.shape[-2:]).view(batch, prompts, *upscaled.shape[-2:])
