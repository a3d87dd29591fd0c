"""Autocast, frozen weights stored in the precision that they are used in, and the first calls of the maths library."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}

PRODUCTS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
"""Layers whose inputs and weights autocast makes half precision."""


def autocast_dtype(precision: str) -> torch.dtype | None:
    """The dtype of autocast for ``fp32``, ``bf16`` or ``fp16``; None for none."""
    return DTYPES[precision]


@contextlib.contextmanager
def autocast(device: torch.device, precision: str) -> Iterator[None]:
    """Autocast of a training step; nothing for ``fp32``."""
    dtype = DTYPES[precision]
    with torch.autocast(device.type, dtype, enabled=dtype is not None):
        yield


def store_frozen(module: nn.Module, dtype: torch.dtype | None) -> int:
    """Store the frozen weights of linear layers and convolutions in autocast's dtype, in place.

    Autocast would make the same copy of them in every forward pass (it remembers those of trained weights only), and
    keep the float32 ones beside it. Results under autocast are the same to the bit.

    Args:
        module: whose parameters without ``requires_grad`` are stored anew; nothing may move them, as the average
            of an EMA teacher does.
        dtype: of autocast; None, for no autocast, changes nothing.
    Returns:
        Bytes saved.
    """
    if dtype is None:
        return 0
    saved = 0
    for layer in module.modules():
        if isinstance(layer, PRODUCTS):
            for parameter in layer.parameters(recurse=False):
                if not parameter.requires_grad and parameter.dtype == torch.float32:
                    saved += parameter.nbytes // 2
                    parameter.data = parameter.data.to(dtype)
    return saved


def settle_math() -> None:
    """Call the functions of the CPU's vector maths library once each, from one thread, before results count.

    MKL chooses its variant for this processor at a function's first call. When two threads make that call at once, one
    of them may be answered by another variant, whose last bit differs: with torch 2.13 and two threads the first
    ``exp`` of a training did so in one process of eight, and everything after it differed from then on.
    """
    few = torch.full((8,), 0.5)
    for function in (torch.exp, torch.expm1, torch.log, torch.log1p, torch.log2, torch.log10, torch.tanh, torch.sqrt):
        function(few)
        function(few.double())
    for function in (torch.sin, torch.cos, torch.tan, torch.asin, torch.acos, torch.atan, torch.erf, torch.erfc):
        function(few)
        function(few.double())
