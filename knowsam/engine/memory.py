"""Host memory: how the C library hands it out, and how much a process has taken."""

import ctypes
import os
import resource
import sys
from contextlib import suppress
from pathlib import Path

# mallopt's parameters, from glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Have glibc keep freed memory for the next tensor instead of giving it back to the system.

    By default every tensor above 32 MB is a mapping of its own, whose pages the kernel clears one by one at each use:
    on a CPU that takes several times as long as a batch norm or a rectifier itself. Results are the same.

    Returns:
        Whether it was done: not without glibc, nor where a ``MALLOC_...`` or ``GLIBC_TUNABLES`` variable or another
        allocator says that somebody has decided this already.
    """
    if any(name.startswith("MALLOC_") for name in os.environ) or "GLIBC_TUNABLES" in os.environ:
        return False
    if not sys.platform.startswith("linux") or "malloc" in os.environ.get("LD_PRELOAD", ""):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # musl has none
        return False
    return bool(mallopt(_MMAP_MAX, 0) and mallopt(_TRIM_THRESHOLD, 2**31 - 1))


def peak_host_memory() -> int:
    """The most bytes this process has had in memory since it began, or since :func:`forget_peak`."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    scale = 1 if sys.platform == "darwin" else 1024
    return scale * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def forget_peak() -> bool:
    """Let :func:`peak_host_memory` begin anew; True where the system can."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True
