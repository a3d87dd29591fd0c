"""Weights that nothing trains, stored in the precision that they are used in."""

import torch
from torch import nn

PRODUCTS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
"""Layers whose inputs and weights autocast makes half precision."""


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
