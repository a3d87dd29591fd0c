"""Attention of SAM's ViT by torch's fused kernel, with relative positions and without computing on padding."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from knowsam.models.sam.hooks import Hooked, Hooks
from knowsam.models.sam.official import Attention

FEW_WEIGHTS = 512 * 512
"""Attention weights per head up to which they are kept for the backward pass on a CPU."""

Tokens = tuple[Tensor, Tensor]
"""Keys and values, each (N, heads, n, c)."""


class SamAttention(Hooked, Attention):
    """segment-anything's attention with relative positions, computed by torch's fused kernel.

    Hooks:

    * ``qkv``: (..., d) -> (..., 3d), added to the query-key-value projection (LoRA)
    * ``kv_tokens``: x (B, H, W, d) -> keys and values (heads, n, c), or (B, heads, n, c) for each image its own, which
      every query attends to beside those of its window (prefix tokens). They have no place, so no relative position
    """

    HOOKS = ("qkv", "kv_tokens")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.adapters = Hooks()

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
        tokens = self.key_value_tokens(x)
        if not window or (height == window and width == window):
            whole: Tensor = self.proj(self._attend_windows(projected, (height, width), (height, width), None, tokens))
            return whole
        padding = self.project(x.new_zeros(1, 1, 1, dim)) if height % window or width % window else None
        # split and cat: their gradients are a cat and views, where slices would each fill and add a whole grid
        bands = []
        for band in torch.split(projected, _parts(height, window), dim=1):
            parts = []
            for part in torch.split(band, _parts(width, window), dim=2):
                size = (min(window, part.shape[1]), min(window, part.shape[2]))
                parts.append(self._attend_windows(part, size, (window, window), padding, tokens))
            bands.append(torch.cat(parts, dim=2))
        attended: Tensor = self.proj(torch.cat(bands, dim=1))
        return attended

    def project(self, x: Tensor) -> Tensor:
        """(..., d) -> queries, keys and values (..., 3d)."""
        return self.add("qkv", x, self.qkv(x))

    def key_value_tokens(self, x: Tensor) -> Tokens | None:
        """What the modules at ``kv_tokens`` make of x (B, H, W, d): keys and values (B, heads, n, c); None without."""
        made = [module(x) for module in self.attached("kv_tokens")]
        if not made:
            return None
        batch = x.shape[0]
        keys, values = (torch.cat([t.expand(batch, -1, -1, -1) for t in kind], 2) for kind in zip(*made, strict=True))
        return keys, values

    def _attend_windows(
        self,
        projected: Tensor,
        size: tuple[int, int],
        window: tuple[int, int],
        padding: Tensor | None,
        tokens: Tokens | None,
    ) -> Tensor:
        """Attention inside equal windows that fill a part of the grid.

        Args:
            projected: (B, m h, n w, 3d), of which h x w are the windows' real tokens.
            size: h, w.
            window: the padded size, which the relative positions are made for.
            padding: query, key and value of a padding token (1, 1, 1, 3d).
            tokens: keys and values (B, heads, n, c) besides.
        Returns:
            (B, m h, n w, d).
        """
        batch, (height, width) = projected.shape[0], size  # len() would be a constant of a traced network
        down, across = projected.shape[1] // height, projected.shape[2] // width
        qkv = projected.reshape(batch, down, height, across, width, 3, self.num_heads, -1)
        qkv = qkv.permute(5, 0, 1, 3, 6, 2, 4, 7).reshape(3, batch * down * across, self.num_heads, height * width, -1)
        q, k, v = qkv.unbind(0)  # (N, heads, hw, c) each, N = B m n windows
        pad = None
        if size != window:
            assert padding is not None, "part of a window is padding"
            _, key, value = padding.view(3, self.num_heads, 1, -1).unbind(0)  # (heads, 1, c) each
            pad = key, value
        if tokens is not None:  # the same in every window of an image
            keys, values = (t[:, None].expand(-1, down * across, -1, -1, -1).flatten(0, 1) for t in tokens)
            tokens = keys, values
        out = self.attend(q, k, v, size, window, pad, tokens)  # (N, heads, hw, c)
        out = out.view(batch, down, across, self.num_heads, height, width, -1)
        return out.permute(0, 1, 4, 2, 5, 3, 6).reshape(batch, down * height, across * width, -1)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        size: tuple[int, int],
        window: tuple[int, int],
        padding: Tokens | None = None,
        tokens: Tokens | None = None,
    ) -> Tensor:
        """softmax(scale q k^T + bias) v on (N, heads, hw, c).

        ``padding`` are key and value (heads, 1, c) of a padding token, ``tokens`` are further keys and values.

        What a query adds for a key's row and column enters as more channels of the dot product, so that no
        (hw, hw) bias is made and torch's fused kernel serves with gradients: q' = (q, rows, columns), k' = (k, one-hot
        of its row, one-hot of its column).
        """
        height, width = size
        if self.use_rel_pos:
            grid = torch.unflatten(q, 2, size)  # (N, heads, h, w, c)
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
        q, k = (parts_q[0], k) if len(parts_q) == 1 else (torch.cat(parts_q, -1), torch.cat(parts_k, -1))
        if padding is not None:
            own = q.new_zeros(q.shape[-1])
            own[-1] = 1
            k = torch.cat([k, own.expand(*k.shape[:2], 1, -1)], 2)
            v = torch.cat([v, padding_value.to(v.dtype).expand(v.shape[0], -1, -1, -1)], 2)
        if tokens is not None:
            keys, values = (t.to(v.dtype) for t in tokens)
            k = torch.cat([k, F.pad(keys, (0, k.shape[-1] - keys.shape[-1]))], 2)
            v = torch.cat([v, values], 2)
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
