"""An averaged copy of networks, as teacher."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from knowsam.schedules import ema_decay


class EmaTeacher(nn.Module):
    """An exponential moving average of a network's weights and buffers; never trained, always in eval mode.

    Nothing moves it but :meth:`update`: no forward pass, no optimizer, no ``train()`` of what holds it.

    Args:
        network: what is averaged; it stays its owner's.
        decay: of the average per step, 0..1; early steps count more: min(1 - 1 / (step + 1), decay).
    Raises:
        ValueError: decay outside 0..1.
    Source:
        arXiv:1703.01780.
    """

    def __init__(self, network: nn.Module, decay: float = 0.99):
        super().__init__()
        if not 0 <= decay <= 1:
            raise ValueError(f"decay must be in 0..1, got {decay}")
        self.average = copy.deepcopy(network).requires_grad_(False).eval()
        self.decay = decay
        self._source = (network,)  # in a tuple, so that it is no part of this module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the network's."""
        return self.average(*args, **kwargs)

    def train(self, mode: bool = True) -> "EmaTeacher":
        """Stays in eval mode."""
        return super().train(False)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the network, after update ``step``; integer buffers are copied."""
        decay = ema_decay(step, self.decay)
        for averaged, current in zip(
            self.average.state_dict().values(), self._source[0].state_dict().values(), strict=True
        ):
            if averaged.is_floating_point():
                averaged.lerp_(current, 1.0 - decay)
            else:
                averaged.copy_(current)

    @torch.no_grad()
    def reset(self) -> None:
        """Become a copy of the network as it is now."""
        self.average.load_state_dict(self._source[0].state_dict())

    @contextmanager
    def mc_dropout(self) -> Iterator[None]:
        """Within, dropout is drawn as in training, and batch statistics stay the averaged ones."""
        dropouts = [m for m in self.average.modules() if isinstance(m, nn.modules.dropout._DropoutNd)]
        for module in dropouts:
            module.training = True
        try:
            yield
        finally:
            for module in dropouts:
                module.training = False
