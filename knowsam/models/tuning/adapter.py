"""Bottleneck adapters for SAM's encoder and mask decoder (KnowSAM)."""

from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from knowsam.models.sam.encoder import SamImageEncoder
from knowsam.models.sam.hooks import Hooked
from knowsam.models.sam.mask_decoder import SamMaskDecoder, SamTwoWayTransformer


class Adapter(nn.Module):
    """Bottleneck: scale * fc2(gelu(fc1(x))), plus x if ``skip``.

    Args:
        width: channels of x.
        hidden: channels between.
        skip: add x, for a serial adapter; a parallel one has none.
        scale: factor of the branch.
        zero_init: start ``fc2`` at zero, so that at first the adapter changes nothing.
    Source:
        arXiv:1902.00751 (serial), arXiv:2110.04366 (parallel, scaled).
    """

    def __init__(
        self, width: int, hidden: int, *, skip: bool = False, scale: float = 1.0, zero_init: bool = True
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.skip = skip
        self.scale = scale
        if zero_init:
            nn.init.zeros_(self.fc2.weight)
            nn.init.zeros_(self.fc2.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> (..., width)."""
        branch: Tensor = self.scale * self.fc2(F.gelu(self.fc1(x)))
        return x + branch if self.skip else branch

    def extra_repr(self) -> str:
        """Shown by print(module)."""
        return f"skip={self.skip}, scale={self.scale}"


def add_adapters(
    encoder: SamImageEncoder,
    mask_decoder: SamMaskDecoder,
    *,
    ratio: float = 0.25,
    scale: float = 0.5,
    zero_init: bool = True,
    encoder_adapters: bool = True,
    decoder_adapters: bool = True,
) -> None:
    """Attach KnowSAM's adapters, in place; freezing is the caller's.

    Every encoder block and every two-way block of the decoder gets a serial adapter on its attention outputs and a
    parallel one beside its MLP; the decoder's transformer a serial one on its last attention output.

    Args:
        encoder: this one, or another with ``width`` and ``blocks`` that have the hooks ``post_attention`` and
            ``parallel_mlp``.
        mask_decoder: this one, or another with ``transformer_dim`` and a ``transformer`` that has the same hooks.
        ratio: hidden / width of an adapter.
        scale: factor of the parallel adapters.
        zero_init: start with the untuned model's output.
        encoder_adapters: tune the encoder.
        decoder_adapters: tune the mask decoder.
    Raises:
        ValueError: ratio <= 0, or nothing to tune.
    Source:
        arXiv:2412.13742 (KnowSAM). Its published code also creates adapters that never run; these are left out.
    """
    if ratio <= 0:
        raise ValueError(f"ratio is {ratio}; it must be above 0")
    if not (encoder_adapters or decoder_adapters):
        raise ValueError("encoder_adapters and decoder_adapters are both off; leave the tuning out instead")

    def attach_pair(block: nn.Module, width: int) -> None:
        hidden, place = max(1, round(ratio * width)), cast(Hooked, block)
        place.attach("post_attention", Adapter(width, hidden, skip=True, zero_init=zero_init))
        place.attach("parallel_mlp", Adapter(width, hidden, scale=scale, zero_init=zero_init))

    if encoder_adapters:
        for block in encoder.blocks:
            attach_pair(block, encoder.width)
    if decoder_adapters:
        transformer, width = cast(SamTwoWayTransformer, mask_decoder.transformer), mask_decoder.transformer_dim
        for block in transformer.layers:
            attach_pair(block, width)
        hidden = max(1, round(ratio * width))
        transformer.attach("post_attention", Adapter(width, hidden, skip=True, zero_init=zero_init))
