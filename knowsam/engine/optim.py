"""Optimizers whose learning rate is a pure function of the step."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from knowsam.schedules import lr_factor


@dataclass
class ScheduledOptimizer:
    """An optimizer, its initial learning rate and the shape of its decay.

    Attributes:
        optimizer: torch's.
        lr: learning rate before the schedule.
        schedule: ``constant``, ``linear``, ``polynomial`` or ``cosine``.
        warmup: updates over which the rate climbs.
    """

    optimizer: torch.optim.Optimizer
    lr: float
    schedule: str
    warmup: int

    def __post_init__(self) -> None:
        lr_factor(0, 1, schedule=self.schedule)  # an unknown name raises here rather than in the first step
        if self.warmup < 0:
            raise ValueError(f"warmup must be >= 0, got {self.warmup}")

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What it updates."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def set_lr(self, step: int, max_steps: int) -> float:
        """Set and return the learning rate of update ``step``."""
        lr = self.lr * lr_factor(step, max_steps, schedule=self.schedule, warmup=self.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        return lr


def sgd(
    parameters: Iterable[nn.Parameter],
    *,
    lr: float = 0.01,
    momentum: float = 0.9,
    weight_decay: float = 1e-4,
    nesterov: bool = False,
    schedule: Literal["constant", "linear", "polynomial", "cosine"] = "linear",
    warmup: int = 0,
) -> ScheduledOptimizer:
    """Stochastic gradient descent; the defaults are KnowSAM's for the subnets."""
    optimizer = torch.optim.SGD(parameters, lr, momentum, weight_decay=weight_decay, nesterov=nesterov, fused=True)
    return ScheduledOptimizer(optimizer, lr, schedule, warmup)


def adam(
    parameters: Iterable[nn.Parameter],
    *,
    lr: float = 1e-4,
    betas: tuple[float, float] = (0.9, 0.999),
    weight_decay: float = 0.0,
    schedule: Literal["constant", "linear", "polynomial", "cosine"] = "linear",
    warmup: int = 0,
) -> ScheduledOptimizer:
    """Adam; the defaults are KnowSAM's for SAM."""
    optimizer = torch.optim.Adam(parameters, lr, (betas[0], betas[1]), weight_decay=weight_decay, fused=True)
    return ScheduledOptimizer(optimizer, lr, schedule, warmup)


def adamw(
    parameters: Iterable[nn.Parameter],
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    weight_decay: float = 0.01,
    schedule: Literal["constant", "linear", "polynomial", "cosine"] = "linear",
    warmup: int = 0,
) -> ScheduledOptimizer:
    """Adam with decoupled weight decay: learns faster than SGD in short runs."""
    optimizer = torch.optim.AdamW(parameters, lr, (betas[0], betas[1]), weight_decay=weight_decay, fused=True)
    return ScheduledOptimizer(optimizer, lr, schedule, warmup)
