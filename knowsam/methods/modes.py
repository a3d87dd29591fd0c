"""Eval mode for a while, part by part."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put every part of a module into eval mode, and each back as it was.

    ``train()`` afterwards would also wake what somebody keeps in eval mode, such as a frozen batch norm.
    """
    modes = [(part, part.training) for part in module.modules()]
    for part, _ in modes:
        part.training = False
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def has_modes(module: nn.Module) -> bool:
    """Whether a part of it computes otherwise in training than in eval mode: dropout, batch norm, stochastic depth."""
    return any(
        (isinstance(part, nn.modules.batchnorm._NormBase) and part.track_running_stats)
        or (isinstance(part, nn.modules.dropout._DropoutNd) and part.p > 0)
        or getattr(part, "drop_prob", 0)
        for part in module.modules()
    )
