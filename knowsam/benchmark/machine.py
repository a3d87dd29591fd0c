"""What the machine can do at best, measured in the same run, and what it is."""

import os
import platform
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch

from knowsam.benchmark.measure import median

MATRIX = {"cpu": 2048, "cuda": 8192}
COPY_BYTES = {"cpu": 256 << 20, "cuda": 4 << 30}


def describe(device: torch.device) -> dict[str, Any]:
    """Processor or GPU, threads, versions, commit and date, for the head of a table."""
    from knowsam.engine.checkpoint import environment_fingerprint

    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "gpu": gpu,
        "device": str(device),
        "threads": torch.get_num_threads(),
        **{k: v for k, v in environment_fingerprint(device).items() if k in ("torch", "cuda", "git_commit", "commit")},
    }


def ceilings(device: torch.device, *, repeats: int = 7) -> dict[str, float]:
    """FLOP/s of a large matrix product per dtype, and bytes/s of a large copy (read plus written).

    Args:
        device: where.
        repeats: the median of so many counts.
    Returns:
        ``fp32``, ``bf16`` in FLOP/s; ``copy`` in bytes/s.
    """
    side = MATRIX[device.type]
    found: dict[str, float] = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        first, second = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        out = torch.empty(side, side, device=device, dtype=dtype)
        found[name] = 2 * side**3 / _seconds(partial(torch.mm, first, second, out=out), device, repeats)
    source = torch.zeros(COPY_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    found["copy"] = 2 * source.nbytes / _seconds(lambda: target.copy_(source), device, repeats)
    return found


def _seconds(function: Callable[[], Any], device: torch.device, repeats: int) -> float:
    times = []
    for _ in range(repeats + 2):
        begin = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begin)
    return median(times[2:])


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
