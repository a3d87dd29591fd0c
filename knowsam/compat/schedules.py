"""The published code's arithmetic of the step."""

import math

from knowsam.engine.optim import ScheduledOptimizer

STAIRS = 200


def stairs_rampup(step: float, length: float) -> float:
    """exp(-5 (1 - x)^2) with x = clip(step // int(length / 200), 0, 200) / 200; always 1 for length <= 0.

    The last stair is reached before ``length`` where it is no multiple of 200.

    Raises:
        ValueError: a ramp of 1..199 steps, which cannot have 200 stairs (the published code divides by zero).
    """
    if length <= 0:
        return 1.0
    if int(length / STAIRS) < 1:
        raise ValueError(f"a ramp of {length:g} steps has no {STAIRS} stairs; it needs at least {STAIRS} steps")
    x = min(max(step // int(length / STAIRS), 0), STAIRS) / STAIRS
    return math.exp(-5.0 * (1.0 - x) ** 2)


class LateOptimizer(ScheduledOptimizer):
    """Sets the learning rate *after* a step from that step's number, so each update uses the rate of the one before."""

    def set_lr(self, step: int, max_steps: int) -> float:
        """Set and return the learning rate of update ``step``: the schedule's of ``step - 1``, at first the initial."""
        return super().set_lr(max(step - 1, 0), max_steps)


def one_step_late(item: ScheduledOptimizer) -> LateOptimizer:
    """The same optimizer, its schedule one step late."""
    return LateOptimizer(item.optimizer, item.lr, item.schedule, item.warmup)
