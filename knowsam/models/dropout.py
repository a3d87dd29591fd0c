"""Dropout that does not keep a CPU waiting for random numbers."""

import torch
from torch import Tensor, nn


class Dropout(nn.Dropout):
    """``nn.Dropout`` whose mask, on a CPU, comes from 16 random bits an element.

    torch draws one Bernoulli number an element there, one after the other on one core: thirty times as long as the
    product with the mask. Elsewhere, where nothing is dropped, and compiled this is ``nn.Dropout`` itself: inductor has
    fast random numbers of its own, and of torch 2.13 misplaces a mask that is filled through another view. The rate is
    rounded to a multiple of 2^-16, and what stays is scaled by exactly that rate. Other numbers are drawn than
    ``nn.Dropout`` draws from the same seed.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Any shape, same shape and dtype."""
        dropped = round(self.p * 2**16)
        eager = self.training and x.device.type == "cpu" and not torch.compiler.is_compiling()
        if not eager or not 0 < dropped < 2**16:
            return super().forward(x)
        count = x.numel()
        bits = torch.randint(-(2**63), 2**63 - 1, (-(-count // 4),), dtype=torch.int64).view(torch.int16)
        kept = torch.empty_like(x, requires_grad=False)  # of x's dtype and memory order: products with it are fast
        kept.as_strided((count,), (1,)).copy_(bits[:count] >= dropped - 2**15)
        return x.mul(kept).mul_(2**16 / (2**16 - dropped))
