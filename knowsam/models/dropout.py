"""Dropout that does not keep a CPU waiting for random numbers."""

import torch
from torch import Tensor, nn


class Dropout(nn.Dropout):
    """``nn.Dropout`` whose mask, on a CPU, comes from 16 random bits an element.

    torch draws one Bernoulli number an element there, one after the other on one core: thirty times as long as the
    product with the mask. Elsewhere, compiled, and where nothing is dropped this is ``nn.Dropout`` itself. The rate is
    rounded to a multiple of 2^-16, and what stays is scaled by exactly that rate. Other numbers are drawn than
    ``nn.Dropout`` draws from the same seed.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Any shape, same shape and dtype."""
        dropped = round(self.p * 2**16)
        if not self.training or x.device.type != "cpu" or not 0 < dropped < 2**16 or torch.compiler.is_compiling():
            return super().forward(x)
        return _Drop.apply(x, dropped)


class _Drop(torch.autograd.Function):
    """Product with a mask of zeros and ones, scaled; the mask alone is kept for the backward pass."""

    @staticmethod
    def forward(ctx, x: Tensor, dropped: int) -> Tensor:
        bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
        kept = torch.empty_like(x, requires_grad=False)  # of x's dtype and memory order: products with it are fast
        kept.as_strided((x.numel(),), (1,)).copy_(bits[: x.numel()] >= dropped - 2**15)
        ctx.scale = 2**16 / (2**16 - dropped)
        ctx.save_for_backward(kept)
        return x.mul(kept).mul_(ctx.scale)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        (kept,) = ctx.saved_tensors
        return gradient.mul(kept).mul_(ctx.scale), None
