"""SAM's image encoder (ViT) for any image side, with named places where tunings attach."""

from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from knowsam.models.sam.attention import SamAttention
from knowsam.models.sam.hooks import Hooked, Hooks
from knowsam.models.sam.official import Block, ImageEncoderViT

PATCH_SIZE = 16


class Stream(Protocol):
    """A second stream of tokens, or a side network: what a module at the encoder's hook ``stream`` offers."""

    def start(self, images: Tensor, tokens: Tensor) -> Any:
        """The stream's state before the first block, made of the normalised images (B, 3, S, S) and of the tokens
        (B, E, E, d) with their positions."""

    def __call__(self, tokens: Tensor, state: Any, index: int) -> tuple[Tensor, Any]:
        """Tokens (B, E, E, d) that enter block ``index``, and the stream's next state; once more after the last block,
        with its number plus one."""


class SamBlock(Hooked, Block):
    """segment-anything's ViT block with hooks.

    * ``pre_block``: x -> x, before everything, tokens (B, E, E, d)
    * ``post_attention``: x -> x, token by token, on the projected attention output (B, E, E, d), before the
      residual
    * ``parallel_mlp``: its output on norm2(x) is added beside the MLP's (any scale is the module's)
    * ``post_block``: x -> x, after everything
    """

    HOOKS = ("pre_block", "post_attention", "parallel_mlp", "post_block")
    attention_type: type[nn.Module] = SamAttention

    def __init__(self, dim: int, num_heads: int, *, window_size: int, grid_size: int, use_rel_pos: bool = True) -> None:
        norm = partial(nn.LayerNorm, eps=1e-6)
        size = (grid_size, grid_size)
        super().__init__(
            dim, num_heads, norm_layer=norm, use_rel_pos=use_rel_pos, window_size=window_size, input_size=size
        )
        attended = (window_size, window_size) if window_size else size
        self.attn = self.attention_type(dim, num_heads=num_heads, use_rel_pos=use_rel_pos, input_size=attended)
        self.adapters = Hooks()

    def forward(self, x: Tensor) -> Tensor:
        """(B, E, E, d) -> (B, E, E, d)."""
        x = self.adapt("pre_block", x)
        x = x + self.attention(x)
        normed = self.norm2(x)
        x = x + self.mlp(normed)
        return self.adapt("post_block", self.add("parallel_mlp", normed, x))

    def attention(self, x: Tensor) -> Tensor:
        """norm1, windows, attention, ``post_attention``, back to the grid: (B, E, E, d), without the residual."""
        return self.adapt("post_attention", self.attn(self.norm1(x), self.window_size))


class SamImageEncoder(Hooked, ImageEncoderViT):
    """SAM's ViT at a fixed image side S, with segment-anything's parameter names.

    Positions are created at the size that S needs: pos_embed (1, E, E, d), relative ones of global blocks (2E - 1, c),
    E = S / 16. :func:`knowsam.models.sam.weights.load_official` resizes those of a checkpoint once.

    Hook ``stream``: a :class:`Stream`, a module that runs before every block with a state of its own.

    Args:
        image_size: S, a multiple of 16.
        width: d, a multiple of ``heads``.
        depth: number of blocks.
        heads: attention heads.
        global_blocks: indices of the blocks that attend to the whole image; the others attend inside windows.
        window: side of a window, tokens.
        out_channels: channels of the embedding; 256 in every SAM.
        use_rel_pos: relative positions; SAM has them.
        checkpointing: recompute each block in the backward pass instead of keeping its activations.
        taps: indices of blocks whose outputs are given, too.
    Attributes:
        stride: pixels per place of the embedding.
        grid: E, places a side.
        in_channels: of the images.
    Raises:
        ValueError: image_size, width, heads, global_blocks or taps do not fit together.
    Source:
        arXiv:2304.02643; segment-anything 1.0.
    """

    HOOKS = ("stream",)
    block_type: type[SamBlock] = SamBlock
    stride = PATCH_SIZE
    in_channels = 3

    def __init__(
        self,
        *,
        image_size: int = 256,
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
        global_blocks: Sequence[int] = (2, 5, 8, 11),
        window: int = 14,
        out_channels: int = 256,
        use_rel_pos: bool = True,
        checkpointing: bool = False,
        taps: Sequence[int] = (),
    ) -> None:
        if image_size < PATCH_SIZE or image_size % PATCH_SIZE:
            raise ValueError(f"image_size is {image_size}; it must be a positive multiple of {PATCH_SIZE}")
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of heads {heads}")
        if depth < 1 or window < 1:
            raise ValueError(f"depth is {depth} and window {window}; both must be at least 1")
        if not set(global_blocks) <= set(range(depth)):
            raise ValueError(f"global_blocks {tuple(global_blocks)} go beyond the blocks 0..{depth - 1}")
        # depth 0: we add our own blocks, and vit_h's would take seconds to initialise for nothing
        super().__init__(img_size=image_size, patch_size=PATCH_SIZE, embed_dim=width, depth=0, out_chans=out_channels)
        # segment-anything leaves zeros, as it always loads weights; a random encoder should know places from the start
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.image_size = image_size
        self.grid = image_size // PATCH_SIZE
        self.width = width
        self.out_channels = out_channels
        self.checkpointing = checkpointing
        self.adapters = Hooks()
        for index in range(depth):
            self.blocks.append(
                self.block_type(
                    width,
                    heads,
                    window_size=0 if index in global_blocks else window,
                    grid_size=self.grid,
                    use_rel_pos=use_rel_pos,
                )
            )
        self.taps: tuple[int, ...] = ()
        self.tap(taps)

    def tap(self, indices: Sequence[int]) -> None:
        """From now on also give the outputs of these blocks.

        Raises:
            ValueError: there are no such blocks.
        """
        if not set(indices) <= set(range(len(self.blocks))):
            raise ValueError(f"taps {tuple(indices)} go beyond the blocks 0..{len(self.blocks) - 1}")
        self.taps = tuple(sorted({*self.taps, *indices}))

    def attach(self, hook: str, module: nn.Module) -> None:
        """Attach a :class:`Stream` at ``stream``.

        Raises:
            ValueError: no such hook, or the module has no ``start``.
        """
        if hook in self.HOOKS and not hasattr(module, "start"):
            raise ValueError(f"{type(module).__name__} has no start(images, tokens), which hook {hook!r} calls")
        super().attach(hook, module)

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, dict[int, Tensor]]:
        """Normalised images (B, 3, S, S) -> image embedding (B, C, E, E); with taps beside them by index of the block.

        A tap is (B, d, E, E), without a norm.

        Raises:
            ValueError: images of another size than the encoder was built for.
        """
        if images.shape[1:] != (3, self.image_size, self.image_size):
            raise ValueError(
                f"images are {tuple(images.shape)}; this encoder was built for (B, 3, {self.image_size}, "
                f"{self.image_size}): resize them, or build it with another image_size"
            )
        # The convolution's channels-first memory would pass through every residual sum and slow all of them.
        x = self.patch_embed(images).contiguous() + self.pos_embed  # (B, E, E, d)
        return self.through_blocks(images, x)

    def through_blocks(self, images: Tensor, x: Tensor) -> Tensor | tuple[Tensor, dict[int, Tensor]]:
        """Blocks, streams and neck: tokens (B, E, E, d) -> what :meth:`forward` gives."""
        streams = [cast(Stream, module) for module in self.attached("stream")]
        states = [stream.start(images, x) for stream in streams]
        taps: dict[int, Tensor] = {}
        for index, block in enumerate(self.blocks):
            x = _advance(streams, states, x, index)
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
            if index in self.taps:
                taps[index] = x.permute(0, 3, 1, 2)
        x = _advance(streams, states, x, len(self.blocks))
        embedding: Tensor = self.neck(x.permute(0, 3, 1, 2))
        return (embedding, taps) if self.taps else embedding


def _advance(streams: Sequence[Stream], states: list[Any], x: Tensor, index: int) -> Tensor:
    """Tokens that enter block ``index``, each stream having had its turn; replaces the states."""
    for i, stream in enumerate(streams):
        x, states[i] = stream(x, states[i], index)
    return x
