"""Pure functions of the step: ramp-ups, learning-rate factors, EMA decay. No state: a resume needs the step alone."""

import math


def sigmoid_rampup(step: float, length: float) -> float:
    """exp(-5 (1 - t)^2) with t = step / length clipped to 0..1: from 0.0067 to 1; always 1 for length <= 0.

    Source: arXiv:1610.02242 (temporal ensembling), arXiv:1703.01780 (mean teacher).
    """
    if length <= 0:
        return 1.0
    t = min(max(step / length, 0.0), 1.0)
    return math.exp(-5.0 * (1.0 - t) ** 2)


def lr_factor(step: int, max_steps: int, *, schedule: str = "linear", warmup: int = 0, power: float = 0.9) -> float:
    """Factor on the initial learning rate at ``step``, never below 0.

    Args:
        step: optimizer updates done so far.
        max_steps: length of the run; the factor reaches 0 there (``constant`` excepted).
        schedule: ``constant``, ``linear``, ``polynomial`` (1 - t)^power, or ``cosine``.
        warmup: updates over which the factor climbs linearly from 1 / (warmup + 1).
    Raises:
        ValueError: unknown ``schedule``.
    """
    t = min(max(step / max(max_steps, 1), 0.0), 1.0)
    factors = {
        "constant": 1.0,
        "linear": 1.0 - t,
        "polynomial": (1.0 - t) ** power,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * t)),
    }
    if schedule not in factors:
        raise ValueError(f"schedule must be one of {', '.join(factors)}; got {schedule!r}")
    factor = factors[schedule]
    return factor * min(1.0, (step + 1) / (warmup + 1))


def ema_decay(step: int, decay: float) -> float:
    """Decay of a teacher's average after update ``step``: min(1 - 1/(step + 1), decay), so early steps count fully.

    Source: arXiv:1703.01780.
    """
    return min(1.0 - 1.0 / (step + 1), decay)
