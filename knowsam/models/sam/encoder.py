"""SAM's image encoder (ViT) for any image side, with named places where adapters attach."""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from knowsam.models.sam.official import Attention, Block, ImageEncoderViT, window_partition, window_unpartition

PATCH_SIZE = 16


def attach(owner: nn.Module, hook: str, module: nn.Module, hooks: Sequence[str]) -> None:
    """Put ``module`` at ``hook`` of ``owner.adapters``, so that its parameters sit under ``adapters.``.

    Raises:
        ValueError: no such hook, or something is attached there already.
    """
    if hook not in hooks:
        raise ValueError(f"{type(owner).__name__} has no hook {hook!r}; it has {', '.join(hooks)}")
    if hook in owner.adapters:
        raise ValueError(f"hook {hook!r} is taken by a {type(owner.adapters[hook]).__name__}: tune a model only once")
    owner.adapters[hook] = module


class SamAttention(Attention):
    """segment-anything's attention with relative positions, computed by torch's fused kernel.

    Hook ``qkv``: a module (..., d) -> (..., 3d) whose output is added to the query-key-value projection (LoRA).
    For key-value tokens, replace ``block.attn`` by a subclass that overrides :meth:`attend`.
    """

    HOOKS = ("qkv",)

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.adapters = nn.ModuleDict()

    def attach(self, hook: str, module: nn.Module) -> None:
        """Attach ``module`` at ``hook``; ValueError if there is no such hook or it is taken."""
        attach(self, hook, module, self.HOOKS)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, d) tokens -> (B, H, W, d); a window counts as an image."""
        batch, height, width, _ = x.shape
        qkv = self.qkv(x)  # (B, H, W, 3d)
        if "qkv" in self.adapters:
            qkv = qkv + self.adapters["qkv"](x)
        qkv = qkv.reshape(batch, height * width, 3, self.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, heads, HW, c) each
        out = self.attend(q, k, v, height, width)  # (B, heads, HW, c)
        return self.proj(out.transpose(1, 2).reshape(batch, height, width, -1))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, height: int, width: int) -> Tensor:
        """softmax(scale q k^T + bias) v on (B, heads, HW, c)."""
        bias = self.relative_bias(q, height, width) if self.use_rel_pos else None
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=self.scale)

    def relative_bias(self, q: Tensor, height: int, width: int) -> Tensor:
        """What each query adds for a key's row and column distance: (B, heads, HW, HW)."""
        grid = q.unflatten(2, (height, width))  # (B, heads, H, W, c)
        rows = torch.einsum("bnhwc,hkc->bnhwk", grid, _by_distance(self.rel_pos_h, height))
        columns = torch.einsum("bnhwc,wkc->bnhwk", grid, _by_distance(self.rel_pos_w, width))
        bias = rows[..., :, None] + columns[..., None, :]  # (B, heads, H, W, H, W)
        # the kernel wants queries and bias of one type; under autocast they need not be
        return bias.flatten(4).flatten(2, 3).to(q.dtype)


def _by_distance(table: Tensor, size: int) -> Tensor:
    """Table of 2 size - 1 distances -> (size queries, size keys, c)."""
    position = torch.arange(size, device=table.device)
    return table[position[:, None] - position[None, :] + size - 1]


class SamBlock(Block):
    """segment-anything's ViT block with hooks.

    Each hook holds at most one module, in ``adapters`` under the hook's name:

    * ``pre_block``: x -> x, before everything, tokens (B, E, E, d)
    * ``post_attention``: x -> x, on the projected attention output, before the residual; in a windowed block inside the
      windows (B * windows, w, w, d)
    * ``parallel_mlp``: its output on norm2(x) is added beside the MLP's (any scale is the module's)
    * ``post_block``: x -> x, after everything
    """

    HOOKS = ("pre_block", "post_attention", "parallel_mlp", "post_block")
    attention_type = SamAttention

    def __init__(self, dim: int, num_heads: int, *, window_size: int, grid_size: int, use_rel_pos: bool = True):
        norm = partial(nn.LayerNorm, eps=1e-6)
        size = (grid_size, grid_size)
        super().__init__(
            dim, num_heads, norm_layer=norm, use_rel_pos=use_rel_pos, window_size=window_size, input_size=size
        )
        attended = (window_size, window_size) if window_size else size
        self.attn = self.attention_type(dim, num_heads=num_heads, use_rel_pos=use_rel_pos, input_size=attended)
        self.adapters = nn.ModuleDict()

    def attach(self, hook: str, module: nn.Module) -> None:
        """Attach ``module`` at ``hook``; ValueError if there is no such hook or it is taken."""
        attach(self, hook, module, self.HOOKS)

    def adapt(self, hook: str, x: Tensor) -> Tensor:
        """x through the module at ``hook``, if there is one."""
        return self.adapters[hook](x) if hook in self.adapters else x

    def forward(self, x: Tensor) -> Tensor:
        """(B, E, E, d) -> (B, E, E, d)."""
        x = self.adapt("pre_block", x)
        x = x + self.attention(x)
        normed = self.norm2(x)
        x = x + self.mlp(normed)
        if "parallel_mlp" in self.adapters:
            x = x + self.adapters["parallel_mlp"](normed)
        return self.adapt("post_block", x)

    def attention(self, x: Tensor) -> Tensor:
        """norm1, windows, attention, ``post_attention``, back to the grid: (B, E, E, d), without the residual."""
        height, width = x.shape[1:3]
        x = self.norm1(x)  # before the padding, as in segment-anything: the padded zeros are not normalised
        if self.window_size == 0:
            return self.adapt("post_attention", self.attn(x))
        windows, padded = window_partition(x, self.window_size)  # (B * windows, w, w, d)
        windows = self.adapt("post_attention", self.attn(windows))
        return window_unpartition(windows, self.window_size, padded, (height, width))


class SamImageEncoder(ImageEncoderViT):
    """SAM's ViT at a fixed image side S, with segment-anything's parameter names.

    Positions are created at the size that S needs: pos_embed (1, E, E, d), relative ones of global blocks (2E - 1, c),
    E = S / 16. :func:`knowsam.models.sam.weights.load_official` resizes those of a checkpoint once.

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
    Raises:
        ValueError: image_size, width, heads or global_blocks do not fit together.
    Source:
        arXiv:2304.02643; segment-anything 1.0.
    """

    block_type = SamBlock

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
    ):
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
        self.width = width
        self.out_channels = out_channels
        self.checkpointing = checkpointing
        for index in range(depth):
            self.blocks.append(
                self.block_type(
                    width,
                    heads,
                    window_size=0 if index in global_blocks else window,
                    grid_size=image_size // PATCH_SIZE,
                    use_rel_pos=use_rel_pos,
                )
            )

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images (B, 3, S, S) -> image embedding (B, 256, E, E).

        Raises:
            ValueError: images of another size than the encoder was built for.
        """
        if images.shape[1:] != (3, self.image_size, self.image_size):
            raise ValueError(
                f"images are {tuple(images.shape)}; this encoder was built for (B, 3, {self.image_size}, "
                f"{self.image_size}): resize them, or build it with another image_size"
            )
        x = self.patch_embed(images) + self.pos_embed  # (B, E, E, d)
        for block in self.blocks:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return self.neck(x.permute(0, 3, 1, 2))
