"""What a training costs: seconds by part, and the largest memory. Rank 0's, for the report; nothing depends on it."""

import math
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

PARTS = ("data", "validation", "checkpoints")
"""What is counted apart; all else is the steps themselves."""


class Cost:
    """Seconds since the training began, and peak memory. A resumed run goes on counting where its checkpoint stood.

    Args:
        device: of this process.
        records: of ``metrics.jsonl`` up to the checkpoint from which the run goes on; what was done after it is lost,
            and so is its time.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        device: torch.device,
        records: Sequence[Mapping[str, Any]] = (),
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._device = device
        self._clock = clock
        earlier = (record for record in reversed(records) if record.get("kind") == "cost")
        self._before: Mapping[str, Any] = next(earlier, {})
        self._parts = dict.fromkeys(PARTS, 0.0)
        self._began = clock()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what happens inside as one of ``PARTS``: waiting for the loader, validating, saving."""
        began = self._clock()
        try:
            yield
        finally:
            self._parts[name] += self._clock() - began

    def values(self) -> dict[str, float]:
        """``seconds`` in all, ``seconds_<part>``, ``peak_host_mib`` of this process, ``peak_device_mib`` on CUDA.

        The memory of a device is what the process took from it, not only what its tensors filled.
        """
        now = {"seconds": self._clock() - self._began, **{f"seconds_{name}": s for name, s in self._parts.items()}}
        result = {name: seconds + self._earlier(name) for name, seconds in now.items()}
        # Kilobytes on Linux, bytes on macOS.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
        result["peak_host_mib"] = max(peak, self._earlier("peak_host_mib"))
        if self._device.type == "cuda":
            peak = torch.cuda.max_memory_reserved(self._device) / 2**20
            result["peak_device_mib"] = max(peak, self._earlier("peak_device_mib"))
        return result

    def _earlier(self, name: str) -> float:
        value = self._before.get(name)
        return float(value) if isinstance(value, int | float) and math.isfinite(value) else 0.0
