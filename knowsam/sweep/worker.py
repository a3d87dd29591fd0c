"""A worker: takes trials from a sweep, one after the other, and runs each in a process of its own."""

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

from knowsam.config import REPOSITORY
from knowsam.signals import StopSignal
from knowsam.sweep.status import trial_line
from knowsam.sweep.store import Claim, Store

INTERRUPTED = 75
LOCKED = 73
NOT_STARTED = 127  # as shells have it
GRACE = 120.0
"""Seconds that a trial has to save its checkpoint after SIGTERM, before it is killed."""

POLL = 1.0
"""Seconds between looks at a trial's metrics, time limit and the stop signal; its end is noticed within 0.05 s."""


def work(
    sweep: str | os.PathLike[str] | Store,
    *,
    max_trials: int | None = None,
    stop: StopSignal | None = None,
    say: Callable[[str], None] = print,
) -> int:
    """Run trials of a sweep until none is left that nobody else runs, or a signal comes.

    Args:
        sweep: its folder, or the opened store.
        max_trials: end after so many.
        stop: entered by the caller; asked between and during trials. This call listens for signals itself if None.
        say: called with one line a trial.
    Returns:
        How many trials this worker ended (complete, failed or pruned).
    """
    store = sweep if isinstance(sweep, Store) else Store(sweep)
    ended = taken = 0
    skip: set[str] = set()
    with nullcontext(stop) if stop else StopSignal() as stop:
        while not stop.name and (max_trials is None or taken < max_trials):
            claim = store.claim(skip)
            if claim is None:
                break
            taken += 1
            state = run_trial(claim, stop)
            if state == "interrupted":
                skip.add(claim.item["key"])  # by somebody who may do it again: left to another worker or a later start
            if state in ("complete", "failed", "pruned"):
                ended += 1
                store.export()
            say(trial_line(store, claim.item["folder"], state))
    return ended


def run_trial(claim: Claim, stop: StopSignal) -> str:
    """Run a claimed trial to its end, and record it.

    Args:
        claim: of the trial; released or finished by this call.
        stop: asks the trial to save and end once a signal has come.
    Returns:
        ``complete``, ``failed``, ``pruned``; or ``interrupted``: somebody may go on with it.
    """
    store, plan = claim.store, claim.store.plan
    run = (store.folder / claim.item["folder"]).absolute()
    command = _command(plan, store.folder / "configs" / f"{claim.item['key']}.yaml", run)
    log = store.folder / "logs" / f"{claim.item['key']}.log"
    attempts, begin = 0, time.monotonic()
    before = _attrs(claim).get("seconds") or 0.0
    limit = plan["time_limit"] or float("inf")
    while True:
        attempts += 1
        size = log.stat().st_size if log.exists() else 0
        code, ended = _run_once(claim, command, log, run, stop, limit - before - (time.monotonic() - begin))
        if plan["search"]:
            _fell_behind(claim, run, set())  # too late to end it, but others are compared with its last validations
        claim.note(seconds=round(before + time.monotonic() - begin, 3))
        dice = best_dice(run)
        if ended == "pruned":
            claim.finish("pruned", exit_code=code, message="validation Dice fell behind the other trials", dice=dice)
            return "pruned"
        if code == 0:  # also when it ended just as its time was over
            claim.finish("complete", exit_code=0, message=None, dice=dice)
            # After the end is on record: who dies in between leaves a file too many, not a trial to train again.
            if plan.get("keep") == "best" and (run / "best.pt").exists():
                (run / "last.pt").unlink(missing_ok=True)
            return "complete"
        if ended == "time_limit":
            message = f"exceeded time_limit ({limit:g} s)"
        elif stop.name or code == LOCKED or (code == INTERRUPTED and attempts > plan["retries"]):
            claim.release()
            return "interrupted"
        elif code == INTERRUPTED:
            continue
        elif code < 0:
            message = f"killed by {_signal_name(-code)}" + (" (out of memory?)" if code == -signal.SIGKILL else "")
            if attempts <= plan["retries"]:
                continue
        else:
            message = _last_message(log, size) or f"exit code {code}"
        claim.finish("failed", exit_code=code, message=message, dice=dice)
        return "failed"


def _run_once(
    claim: Claim, command: list[str], log: Path, run: Path, stop: StopSignal, seconds: float
) -> tuple[int, str | None]:
    """Exit code, and ``pruned`` or ``time_limit`` if that is why it was ended."""
    deadline = time.monotonic() + seconds
    reported: set[int] = set()
    why: str | None = None
    parent = os.getpid()
    assert claim.lock.handle is not None, "a claim holds its lock"
    with open(log, "ab") as output:
        try:
            process = subprocess.Popen(
                command,
                env=child_environment(None),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                # The trial counts as running while its process lives, even if this worker is killed.
                pass_fds=[claim.lock.handle],
                # Ctrl-C in the terminal reaches the trial through this worker only, once.
                start_new_session=True,
                preexec_fn=lambda: die_with(parent),
            )
        except OSError as error:
            output.write(f"cannot start {command[0]}: {error.strerror}\n".encode())
            return NOT_STARTED, None
    while True:
        try:
            return process.wait(timeout=POLL), why
        except subprocess.TimeoutExpired:
            pass
        except KeyboardInterrupt:
            process.kill()
            process.wait()
            raise
        if why is None and not stop.name:
            if time.monotonic() > deadline:
                why = "time_limit"
            elif claim.store.plan["search"] and _fell_behind(claim, run, reported):
                why = "pruned"
        if why is not None or stop.name:
            return _end(process), why


def _end(process: subprocess.Popen[bytes]) -> int:
    """Ask the trial to save its checkpoint and end; kill it and its children if it does not."""
    process.terminate()
    try:
        return process.wait(timeout=GRACE)
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        return process.wait()


def child_environment(threads: int | None) -> dict[str, str]:
    """Variables of a process that runs knowsam: this checkout comes first on its path, even if it is not installed."""
    path = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(path))}
    if threads:
        variables |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    return variables


# Found before any fork: to open a library in the child of a process with threads, as Ray's are, could hang.
_PRCTL = ctypes.CDLL(None).prctl if sys.platform.startswith("linux") else None


def die_with(parent: int) -> None:
    """In a new process: SIGTERM, so that the trial saves its checkpoint, when its parent dies (Linux only).

    SLURM sends SIGUSR1 and SIGUSR2 to every process of a job; a trial that doesn't know them would die of them, so it
    begins with both ignored and gets SIGTERM from its worker.
    """
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    if _PRCTL is not None:
        pr_set_pdeathsig = 1
        _PRCTL(pr_set_pdeathsig, int(signal.SIGTERM))
        if os.getppid() != parent:  # it died before the line above
            os._exit(INTERRUPTED)


def _command(plan: dict[str, Any], experiment: Path, run: Path) -> list[str]:
    if plan["command"]:
        return [part.replace("{config}", str(experiment)).replace("{run}", str(run)) for part in plan["command"]]
    processes = plan["launcher"].get("gpus_per_trial", 0)
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    # A search may not look at the test split: the best of many settings would have been chosen on it.
    score = [] if plan["search"] else ["--evaluate"]
    return [sys.executable, *launch, "-m", "knowsam", "train", str(experiment), f"run={run}", *score]


def best_dice(run: Path) -> float | None:
    """Best validation Dice so far of the deployed output, 0..1; None if there is none."""
    values = [value for _, value in validation_dice(run)]
    return max(values, default=None)


def validation_dice(run: Path) -> list[tuple[int, float]]:
    """(step, validation Dice of the deployed output) of every validation of a run so far."""
    found = []
    with suppress(FileNotFoundError):
        for line in (run / "metrics.jsonl").read_bytes().splitlines():
            # A line that is being written, or a Dice that is not a number, which is recorded as null.
            with suppress(ValueError, StopIteration, AttributeError, KeyError, TypeError):
                record = json.loads(line)
                if record.get("kind") == "val":
                    deployed = next(key for key in record if key.startswith("dice_"))  # written first
                    found.append((int(record["step"]), float(record[deployed])))
    return found


def _fell_behind(claim: Claim, run: Path, reported: set[int]) -> bool:
    storage, study = claim.store.study._storage, claim.store.study
    new = [(step, value) for step, value in validation_dice(run) if step not in reported]
    for step, value in new:
        storage.set_trial_intermediate_value(claim.trial_id, step, value)
        reported.add(step)
    return bool(new) and study.pruner.prune(study, storage.get_trial(claim.trial_id))


def _attrs(claim: Claim) -> dict[str, Any]:
    return claim.store.study._storage.get_trial(claim.trial_id).user_attrs


def _signal_name(number: int) -> str:
    with suppress(ValueError):
        return signal.Signals(number).name
    return f"signal {number}"


def _last_message(log: Path, start: int) -> str:
    """The error that the trial printed, or its last line; of this attempt."""
    with open(log, "rb") as file:
        file.seek(start)
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    for i, line in enumerate(lines):
        if line.startswith("error["):
            following = lines[i + 1] if i + 1 < len(lines) and not lines[i + 1].startswith("hint:") else ""
            return f"{line} {following}".strip()
    return lines[-1] if lines else ""
