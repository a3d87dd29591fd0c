"""The published code's SAM, as exchangeable parts of ours."""

from collections.abc import Container
from functools import partial
from typing import Any

from torch import Tensor

from knowsam.models.sam.encoder import SamBlock, SamImageEncoder
from knowsam.models.sam.mask_decoder import SamMaskDecoder, SamTwoWayBlock, SamTwoWayTransformer
from knowsam.models.sam.official import window_partition, window_unpartition

# Official tensors that the published code does not load.
RELATIVE_POSITIONS = r"^image_encoder\.blocks\.\d+\.attn\.rel_pos_[hw]$"
DECODER_MLPS = r"^mask_decoder\.transformer\.layers\.\d+\.mlp\."


class PaddedFirstBlock(SamBlock):
    """Pads windows before the norm, which turns padding into tokens that hold the norm's bias."""

    def attention(self, x: Tensor) -> Tensor:
        """Windows, norm1, attention, ``post_attention``, back to the grid: (B, E, E, d), without the residual."""
        if self.window_size == 0:
            return super().attention(x)
        windows, padded = window_partition(x, self.window_size)  # (B * windows, w, w, d)
        windows = self.adapt("post_attention", self.attn(self.norm1(windows)))
        return window_unpartition(windows, self.window_size, padded, x.shape[1:3])


class PaddedFirstEncoder(SamImageEncoder):
    """SAM's encoder made of such blocks."""

    block_type = PaddedFirstBlock


class PublishedTwoWayBlock(SamTwoWayBlock):
    """Two-way block of the published mask decoder.

    Attributes:
        first_residual: the first block's self-attention has a residual too (SAM has none there, and neither has
            positions there).
        positions_stay: a later block adds the positions to the tokens themselves, so that values and residual of its
            self-attention hold them; SAM adds them to queries and keys only.
    """

    first_residual = True
    positions_stay = True

    def self_attention(self, queries: Tensor, query_pe: Tensor) -> Tensor:
        """Self-attention of the tokens with its residual."""
        if self.skip_first_layer_pe:
            attended = super().self_attention(queries, query_pe)
            return queries + attended if self.first_residual else attended
        if not self.positions_stay:
            return super().self_attention(queries, query_pe)
        queries = queries + query_pe
        return queries + self.adapt("post_attention", self.self_attn(q=queries, k=queries, v=queries))


class PublishedTransformer(SamTwoWayTransformer):
    """Two-way transformer of the published mask decoder.

    Attributes:
        adapter_twice: send the tokens through the last adapter a second time, after the final norm.
    """

    block_type = PublishedTwoWayBlock
    adapter_twice = True

    def forward(self, image_embedding: Tensor, image_pe: Tensor, point_embedding: Tensor) -> tuple[Tensor, Tensor]:
        """Image and positions (N, 256, E, E), tokens (N, tokens, 256) -> tokens, image (N, E * E, 256)."""
        tokens, image = super().forward(image_embedding, image_pe, point_embedding)
        return self.adapt("post_attention", tokens) if self.adapter_twice else tokens, image


def mask_decoder(
    *, first_residual: bool, positions_stay: bool, adapter_twice: bool, freeze_mlps: bool
) -> SamMaskDecoder:
    """SAM's mask decoder with any of the published code's peculiarities.

    Args:
        first_residual, positions_stay: see :class:`PublishedTwoWayBlock`.
        adapter_twice: see :class:`PublishedTransformer`.
        freeze_mlps: never train the two-way blocks' MLPs; whether weights are loaded into them is the caller's.
    """
    transformer = PublishedTransformer()
    transformer.adapter_twice = adapter_twice
    for block in transformer.layers:
        block.first_residual, block.positions_stay = first_residual, positions_stay
        if freeze_mlps:
            block.mlp.requires_grad_(False)
    return SamMaskDecoder(transformer)


def guide_arguments(rows: Container[str]) -> dict[str, Any]:
    """What ``build_sam_guide`` needs beside the experiment's ``sam`` block; nothing if no row of ``rows`` is SAM's."""
    arguments: dict[str, Any] = {}
    omitted = {"no_relative_positions": RELATIVE_POSITIONS, "random_decoder_mlps": DECODER_MLPS}
    if omit := [pattern for row, pattern in omitted.items() if row in rows]:
        arguments["omit"] = omit
    if "windows_padded_first" in rows or "no_relative_positions" in rows:
        encoder = PaddedFirstEncoder if "windows_padded_first" in rows else SamImageEncoder
        arguments["encoder_type"] = partial(encoder, use_rel_pos="no_relative_positions" not in rows)
    decoder = {
        "first_residual": "decoder_first_residual" in rows,
        "positions_stay": "decoder_positions_stay" in rows,
        "adapter_twice": "decoder_adapter_twice" in rows,
        "freeze_mlps": "random_decoder_mlps" in rows,
    }
    if any(decoder.values()):
        arguments["decoder_type"] = partial(mask_decoder, **decoder)
    return arguments
