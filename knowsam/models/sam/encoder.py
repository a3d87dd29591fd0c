"""SAM's image encoder (ViT) for any image side, with named places where adapters attach."""

import math
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from knowsam.models.sam.official import Attention, Block, ImageEncoderViT

PATCH_SIZE = 16
FEW_WEIGHTS = 512 * 512
"""Attention weights per head up to which they are kept for the backward pass on a CPU."""


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

    def forward(self, x: Tensor, window: int = 0) -> Tensor:
        """Attention inside windows, or over the whole grid.

        segment-anything pads the grid with zeros to whole windows. The padding takes part in its softmax: with logits
        that depend on the place and with one value for all, the bias. Here the padding of a window is one more key
        whose logit is the log of the sum over the places, which gives the same result without computing on padding:
        at 256 px the grid has 256 tokens, its padded windows 784.

        Args:
            x: tokens (B, H, W, d).
            window: side of a window; 0 attends to the whole grid.
        Returns:
            (B, H, W, d).
        """
        _, height, width, dim = x.shape
        projected = self.project(x)  # (B, H, W, 3d)
        if not window or (height == window and width == window):
            return self.proj(self._attend_windows(projected, (height, width), (height, width), None))
        padding = self.project(x.new_zeros(1, 1, 1, dim)) if height % window or width % window else None
        # split and cat: their gradients are a cat and views, where slices would each fill and add a whole grid
        bands = []
        for band in projected.split(_parts(height, window), dim=1):
            parts = []
            for part in band.split(_parts(width, window), dim=2):
                size = (min(window, part.shape[1]), min(window, part.shape[2]))
                parts.append(self._attend_windows(part, size, (window, window), padding))
            bands.append(torch.cat(parts, dim=2))
        return self.proj(torch.cat(bands, dim=1))

    def project(self, x: Tensor) -> Tensor:
        """(..., d) -> queries, keys and values (..., 3d)."""
        qkv = self.qkv(x)
        return qkv + self.adapters["qkv"](x) if "qkv" in self.adapters else qkv

    def _attend_windows(
        self, projected: Tensor, size: tuple[int, int], window: tuple[int, int], padding: Tensor | None
    ) -> Tensor:
        """Attention inside equal windows that fill a part of the grid.

        Args:
            projected: (B, m h, n w, 3d), of which h x w are the windows' real tokens.
            size: h, w.
            window: the padded size, which the relative positions are made for.
            padding: query, key and value of a padding token (1, 1, 1, 3d).
        Returns:
            (B, m h, n w, d).
        """
        batch, (height, width) = len(projected), size
        down, across = projected.shape[1] // height, projected.shape[2] // width
        qkv = projected.reshape(batch, down, height, across, width, 3, self.num_heads, -1)
        qkv = qkv.permute(5, 0, 1, 3, 6, 2, 4, 7).reshape(3, batch * down * across, self.num_heads, height * width, -1)
        q, k, v = qkv.unbind(0)  # (N, heads, hw, c) each, N = B m n windows
        extra = None
        if size != window:
            assert padding is not None, "part of a window is padding"
            extra = padding.view(3, self.num_heads, 1, -1).unbind(0)[1:]  # key, value (heads, 1, c)
        out = self.attend(q, k, v, size, window, extra)  # (N, heads, hw, c)
        out = out.view(batch, down, across, self.num_heads, height, width, -1)
        return out.permute(0, 1, 4, 2, 5, 3, 6).reshape(batch, down * height, across * width, -1)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        size: tuple[int, int],
        window: tuple[int, int],
        padding: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """softmax(scale q k^T + bias) v on (N, heads, hw, c), ``padding`` being key and value of a padding token.

        What a query adds for a key's row and column enters as more channels of the dot product, so that no
        (hw, hw) bias is made and torch's fused kernel serves with gradients: q' = (q, rows, columns), k' = (k, one-hot
        of its row, one-hot of its column).
        """
        height, width = size
        if self.use_rel_pos:
            grid = q.unflatten(2, size)  # (N, heads, h, w, c)
            rows = torch.einsum("bnhwc,hkc->bnhwk", grid, _by_distance(self.rel_pos_h, window[0])[:height])
            columns = torch.einsum("bnhwc,wkc->bnhwk", grid, _by_distance(self.rel_pos_w, window[1])[:width])
            rows, columns = rows.flatten(2, 3), columns.flatten(2, 3)  # (N, heads, hw, window)
        if padding is not None:
            padding_key, padding_value = padding
            logit = self.scale * (q * padding_key).sum(-1, keepdim=True).float()  # (N, heads, hw, 1)
            if self.use_rel_pos:
                logit = logit + _log_sum_padding(rows.float(), columns.float(), height, width)[..., None]
            else:
                logit = logit + math.log(window[0] * window[1] - height * width)
        parts_q, parts_k = [self.scale * q], [k]
        if self.use_rel_pos:
            parts_q += [rows[..., :height].to(q.dtype), columns[..., :width].to(q.dtype)]
            places = _one_hot_places(height, width, q)  # (hw, h + w)
            parts_k.append(places.expand(*k.shape[:2], -1, -1))
        if padding is not None:
            parts_q.append(logit.to(q.dtype))
            parts_k.append(q.new_zeros(1).expand(*k.shape[:3], 1))
        if len(parts_q) == 1:
            return _attention(self.scale * q, k, v)
        q, k = torch.cat(parts_q, -1), torch.cat(parts_k, -1)
        if padding is not None:
            own = q.new_zeros(q.shape[-1])
            own[-1] = 1
            k = torch.cat([k, own.expand(*k.shape[:2], 1, -1)], 2)
            v = torch.cat([v, padding_value.to(v.dtype).expand(len(v), -1, -1, -1)], 2)
        return _attention(q, k, v)


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T) v for q, k (..., c) and v (..., d), d <= c, the scale being in q already."""
    # On CPUs the backward pass of torch's fused kernel takes twice as long as three products, which cost memory.
    few = q.shape[-2] * k.shape[-2] <= FEW_WEIGHTS
    if q.device.type == "cpu" and few and torch.is_grad_enabled() and (q.requires_grad or v.requires_grad):
        return (q @ k.transpose(-2, -1)).softmax(-1) @ v
    channels = v.shape[-1]
    # the fused kernels want keys and values of one width
    v = F.pad(v, (0, q.shape[-1] - channels))
    return F.scaled_dot_product_attention(q, k, v, scale=1.0)[..., :channels]


def _parts(length: int, window: int) -> list[int]:
    """Lengths of the part of an axis that whole windows fill, and of the rest; what is empty is left out."""
    rest = length % window
    return [part for part in (length - rest, rest) if part]


def _one_hot_places(height: int, width: int, like: Tensor) -> Tensor:
    """Row and column of each place, one-hot: (hw, h + w)."""
    rows = torch.eye(height, dtype=like.dtype, device=like.device).repeat_interleave(width, 0)
    columns = torch.eye(width, dtype=like.dtype, device=like.device).repeat(height, 1)
    return torch.cat([rows, columns], 1)


def _log_sum_padding(rows: Tensor, columns: Tensor, height: int, width: int) -> Tensor:
    """log of the sum of exp(row + column) over the places of a window that are padding.

    Args:
        rows: what each query adds for each row (..., H).
        columns: likewise (..., W).
        height, width: the first h rows and w columns are real; not all of both.
    Returns:
        (...).
    """
    below = torch.logsumexp(rows[..., height:], -1) + torch.logsumexp(columns, -1)  # empty: -inf
    if width == columns.shape[-1]:
        return below
    beside = torch.logsumexp(rows[..., :height], -1) + torch.logsumexp(columns[..., width:], -1)
    return beside if height == rows.shape[-1] else torch.logaddexp(below, beside)


def _by_distance(table: Tensor, size: int) -> Tensor:
    """Table of 2 size - 1 distances -> (size queries, size keys, c)."""
    position = torch.arange(size, device=table.device)
    return table[position[:, None] - position[None, :] + size - 1]


class SamBlock(Block):
    """segment-anything's ViT block with hooks.

    Each hook holds at most one module, in ``adapters`` under the hook's name:

    * ``pre_block``: x -> x, before everything, tokens (B, E, E, d)
    * ``post_attention``: x -> x, token by token, on the projected attention output (B, E, E, d), before the
      residual
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
        return self.adapt("post_attention", self.attn(self.norm1(x), self.window_size))


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
        # The convolution's channels-first memory would pass through every residual sum and slow all of them.
        x = self.patch_embed(images).contiguous() + self.pos_embed  # (B, E, E, d)
        for block in self.blocks:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return self.neck(x.permute(0, 3, 1, 2))
