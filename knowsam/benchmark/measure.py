"""Medians, spreads and ratios of paired measurements."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def median(values: Sequence[float]) -> float:
    """Middle value."""
    return statistics.median(values)


def spread(values: Sequence[float]) -> float:
    """Half the distance between the quartiles, as a fraction of the median: how far a single measurement may be off."""
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / 2 / median(values)


def paired_ratio(first: Sequence[float], second: Sequence[float]) -> tuple[float, float, float]:
    """How many times longer the first takes: median of the ratios pair by pair, with the smallest and the largest.

    Args:
        first, second: measured in turn, so that value i of both met the same state of the machine.
    Raises:
        ValueError: different lengths, or nothing measured.
    """
    if len(first) != len(second) or not first:
        raise ValueError(f"need as many measurements of both, at least one; got {len(first)} and {len(second)}")
    ratios = [a / b for a, b in zip(first, second, strict=True)]
    return median(ratios), min(ratios), max(ratios)


def timed(run: Callable[[], Any], device: "torch.device", repeats: int, *, warmup: int = 2) -> list[float]:
    """Seconds of each of ``repeats`` calls, after ``warmup`` that do not count.

    Args:
        run: what is timed; called without arguments.
        device: whose work must have ended before the clock is read.
        repeats: calls that count.
        warmup: calls before them.
    """
    times = []
    for _ in range(warmup + repeats):
        synchronize(device)
        begin = time.perf_counter()
        run()
        synchronize(device)
        times.append(time.perf_counter() - begin)
    return times[warmup:]


def synchronize(device: "torch.device") -> None:
    """Wait until a GPU has done its work; nothing on a CPU."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
