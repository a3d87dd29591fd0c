"""Text for people: the nearest right key, and how long something takes."""

import difflib
import math
from collections.abc import Iterable
from typing import Any


def duration(seconds: float) -> str:
    """``0:04:09``, or ``2d 03:04:09``; ``--`` for what is not known (NaN, infinite, negative)."""
    if not math.isfinite(seconds) or seconds < 0:
        return "--"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return f"{days}d {hour:02d}:{minute:02d}:{second:02d}" if days else f"{hour}:{minute:02d}:{second:02d}"


def did_you_mean(name: str, known: Iterable[Any]) -> str:
    """``; did you mean 'x'?`` for the nearest of the known names, or nothing."""
    near = difflib.get_close_matches(name, [str(k) for k in known], n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""
