"""The published code's SAM, as exchangeable parts of ours."""

from collections.abc import Container, Mapping
from typing import Any, cast

from torch import Tensor

from knowsam.compat.rows import ROWS, settings
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
        _, height, width, _ = x.shape
        windows, padded = window_partition(x, self.window_size)  # (B * windows, w, w, d)
        windows = self.adapt("post_attention", self.attn(self.norm1(windows)))
        return window_unpartition(windows, self.window_size, padded, (height, width))


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
        """Image and positions (N, C, E, E), tokens (N, tokens, C) -> tokens, image (N, E * E, C)."""
        tokens, image = super().forward(image_embedding, image_pe, point_embedding)
        return self.adapt("post_attention", tokens) if self.adapter_twice else tokens, image


def mask_decoder(
    *,
    embed_dim: int = 256,
    first_residual: bool = False,
    positions_stay: bool = False,
    adapter_twice: bool = False,
    freeze_mlps: bool = False,
) -> SamMaskDecoder:
    """SAM's mask decoder with any of the published code's peculiarities.

    Args:
        embed_dim: as of :class:`SamMaskDecoder`.
        first_residual, positions_stay: see :class:`PublishedTwoWayBlock`.
        adapter_twice: see :class:`PublishedTransformer`.
        freeze_mlps: never train the two-way blocks' MLPs; whether weights are loaded into them is the caller's.
    """
    transformer = PublishedTransformer(embed_dim=embed_dim)
    transformer.adapter_twice = adapter_twice
    for layer in transformer.layers:
        block = cast(PublishedTwoWayBlock, layer)
        block.first_residual, block.positions_stay = first_residual, positions_stay
        if freeze_mlps:
            block.mlp.requires_grad_(False)
    return SamMaskDecoder(embed_dim=embed_dim, transformer=transformer)


def sam_blocks(rows: Container[str], sam: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of ``build_sam_guide`` that an experiment's ``sam`` block becomes with the chosen rows.

    Args:
        rows: of the published code.
        sam: encoder, decoder, prompt, tuning, ... of the experiment; not changed.
    Returns:
        The block as it is where no row is SAM's.
    Raises:
        ValueError: a row changes SAM's own mask decoder, and the block names another one.
    """
    blocks = dict(sam)
    for key, value in settings(tuple(name for name in ROWS if name in rows)).items():
        owner, _, place = key.partition(".")
        part, _, option = place.partition(".")
        if owner == "sam" and part == "tuning":
            blocks[part] = [b | {option: value} if b["name"] == "adapter" else b for b in as_list(blocks.get(part))]
        elif owner == "sam":
            blocks[part] = as_block(blocks.get(part), "learned") | {option: value} if option else value
    omitted = {"no_relative_positions": RELATIVE_POSITIONS, "random_decoder_mlps": DECODER_MLPS}
    if omit := [pattern for row, pattern in omitted.items() if row in rows]:
        blocks["omit"] = omit
    encoder: dict[str, Any] = {"encoder_type": PaddedFirstEncoder} if "windows_padded_first" in rows else {}
    if "no_relative_positions" in rows:
        encoder["use_rel_pos"] = False
    if encoder:
        blocks["encoder"] = as_block(blocks.get("encoder"), "vit_b") | encoder
    changes = {
        "decoder_first_residual": "first_residual",
        "decoder_positions_stay": "positions_stay",
        "decoder_adapter_twice": "adapter_twice",
        "random_decoder_mlps": "freeze_mlps",
    }
    if decoder := {option: True for row, option in changes.items() if row in rows}:
        block = as_block(blocks.get("decoder"), "sam")
        if block["name"] != "sam":
            raise ValueError(
                f"the published code's rows change SAM's own mask decoder; sam.decoder is {block['name']!r}"
            )
        blocks["decoder"] = block | decoder | {"name": mask_decoder}
    return blocks


def as_block(value: Any, default: str) -> dict[str, Any]:
    """A part's block with its name, which may have been given alone or left out."""
    return {"name": default, **value} if isinstance(value, Mapping) else {"name": value or default}


def as_list(tuning: Any) -> list[dict[str, Any]]:
    """The tunings' blocks, of which one may have been given alone."""
    several = tuning if isinstance(tuning, list | tuple) else [] if tuning is None else [tuning]
    return [as_block(block, "") for block in several]
