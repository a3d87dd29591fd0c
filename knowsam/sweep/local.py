"""Workers as processes of this machine, each bound to its GPUs or to its share of the cores."""

import os
import subprocess
import sys
import time
from contextlib import suppress
from typing import Any

from knowsam.signals import StopSignal
from knowsam.sweep.store import Store
from knowsam.sweep.worker import child_environment, die_with

RESTARTS = 3
"""How often, per worker, one that was killed is replaced."""


def launch(store: Store, options: dict[str, Any]) -> None:
    """Run the sweep to its end, or until a signal asks for one.

    Args:
        store: the sweep.
        options: ``workers`` (1), ``threads`` per worker (the cores shared evenly), ``gpus_per_trial`` (1 where there
            are GPUs).
    """
    workers = options.get("workers", 1)
    environments = [environment(i, workers, options) for i in range(workers)]
    restarts = RESTARTS * workers
    rounds = RESTARTS
    with StopSignal() as stop:
        running: dict[int, subprocess.Popen[bytes]] = {}
        ended: set[int] = set()
        while not stop.name:
            for i in range(workers):
                process = running.get(i)
                if process is None and i not in ended:
                    running[i] = _start(store, *environments[i])
                elif process is not None and process.poll() is not None:
                    del running[i]
                    if process.returncode < 0 and restarts:  # killed: its trial is taken up again by a new one
                        restarts -= 1
                    else:
                        ended.add(i)
            if not running:
                rounds -= 1
                if rounds < 0 or not wait_for_orphans(store, stop):
                    break
                ended.clear()
            time.sleep(0.05)
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()


def wait_for_orphans(store: Store, stop: StopSignal, seconds: float = 60.0) -> bool:
    """True when trials are left to be claimed: a killed worker's, once their processes have saved and ended.

    Args:
        store: the sweep.
        stop: ends the waiting once a signal has come.
        seconds: most to wait.
    """
    deadline = time.monotonic() + seconds
    while store.left() and store.held() and not stop.name and time.monotonic() < deadline:
        time.sleep(0.5)
    return bool(store.left()) and not store.held() and not stop.name


def _start(store: Store, variables: dict[str, str], cores: set[int] | None) -> subprocess.Popen[bytes]:
    parent = os.getpid()

    def prepare() -> None:
        die_with(parent)
        if cores:
            with suppress(OSError):
                os.sched_setaffinity(0, cores)

    return subprocess.Popen(
        [sys.executable, "-m", "knowsam", "sweep", "work", str(store.folder)],
        env=variables,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=prepare,
    )


def environment(index: int, workers: int, options: dict[str, Any]) -> tuple[dict[str, str], set[int] | None]:
    """Environment and cores of worker ``index``; no cores are bound where they would have to be shared.

    Args:
        index: of the worker, from 0.
        workers: how many there are.
        options: ``threads`` and ``gpus_per_trial``, see ``launch``.
    """
    cores = available_cores()
    threads = options.get("threads") or max(1, len(cores) // workers)
    variables = child_environment(threads)
    gpus = visible_gpus()
    per_trial = options.get("gpus_per_trial", 1 if gpus else 0)
    if gpus and not per_trial:
        variables["CUDA_VISIBLE_DEVICES"] = ""
    if gpus and per_trial:
        first = index * per_trial % max(1, len(gpus) - len(gpus) % per_trial)
        variables["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[first : first + per_trial])
    bound = set(cores[index * threads : (index + 1) * threads]) if workers * threads <= len(cores) else None
    return variables, bound


def available_cores() -> list[int]:
    """Numbers of the cores that this process may use."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def visible_gpus() -> list[str]:
    """Indices or names of the GPUs that this process may use."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name for name in given.split(",") if name.strip() and name.strip() != "-1"]
    with suppress(OSError, subprocess.SubprocessError):
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20)
        if listed.returncode == 0:
            return [str(i) for i, line in enumerate(listed.stdout.splitlines()) if line.startswith("GPU ")]
    return []
