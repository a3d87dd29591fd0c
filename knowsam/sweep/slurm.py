"""Workers as jobs of a SLURM array, through submitit; preempted jobs go back into the queue."""

import getpass
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knowsam.errors import ConfigError, StorageError
from knowsam.signals import StopSignal
from knowsam.sweep.locks import FileLock
from knowsam.sweep.status import trial_line
from knowsam.sweep.store import FINISHED, Store
from knowsam.sweep.worker import GRACE, INTERRUPTED, child_environment, die_with
from knowsam.text import did_you_mean

if TYPE_CHECKING:
    from submitit.helpers import DelayedSubmission

MINUTES = 240
"""Time limit of a job if none is given. What is not done by then is requeued and goes on from its checkpoint."""

REQUEUES = 1000
"""How often a job may reach its time limit and be queued again. A trial without end is for ``time_limit``."""

NOTICE = int(GRACE) + 60
"""Seconds before its time limit at which a job is warned: what a trial may take to save itself, and the requeueing."""

ASK = 15.0
"""Seconds between two questions to SLURM, which has other users too."""

PROGRAMS = ("sbatch", "srun", "squeue", "scontrol")
# submitit's names for what every kind of cluster has; all others are sbatch's and get the prefix slurm_.
GENERAL = {"nodes", "tasks_per_node", "cpus_per_task", "gpus_per_node", "mem_gb", "timeout_min", "stderr_to_stdout"}
OURS = {
    "time": "minutes",
    "timeout_min": "minutes",
    "cpus_per_task": "threads",
    "gpus_per_node": "gpus_per_trial",
    "array_parallelism": "workers",
    "setup": "setup",
}


class WorkerJob:
    """What one job runs: a worker as a process of its own, so that submitit and the worker each get their signals.

    SLURM sends SIGUSR2 to all processes of a job before its time limit (and before a preemption, where the cluster is
    set up so). submitit's handler runs in this process, calls ``checkpoint`` and requeues the job.

    Args:
        folder: of the sweep.
        trials: the worker ends after so many; None for no limit.
        threads: CPU threads of the trial; those that SLURM gave if None.
    """

    def __init__(self, folder: str, trials: int | None, threads: int | None) -> None:
        self.folder, self.trials, self.threads = folder, trials, threads
        self.worker: int | None = None

    def __call__(self) -> None:
        """Work. Raises RuntimeError when the worker failed, for submitit to record."""
        command = [sys.executable, "-m", "knowsam", "sweep", "work", self.folder]
        command += ["--trials", str(self.trials)] if self.trials else []
        threads = self.threads or int(os.environ.get("SLURM_CPUS_PER_TASK", 0))
        parent = os.getpid()
        process = subprocess.Popen(
            command,
            env=child_environment(threads),
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=lambda: die_with(parent),
        )
        self.worker = process.pid
        _wait_for(process.pid)
        code = process.wait()
        if code in (INTERRUPTED, -signal.SIGTERM):
            # SIGTERM and no SIGUSR2: SLURM takes the job off its machine, and requeues it itself if it was preempted.
            # To return would say that the job is done.
            time.sleep(NOTICE)
        if code:
            raise RuntimeError(f"the worker ended with exit code {code}")

    def checkpoint(self) -> "DelayedSubmission":
        """Called by submitit on its signal: end the worker, whose trial saves its checkpoint; then the same again."""
        from submitit.helpers import DelayedSubmission

        if self.worker is not None:
            if not _ended(self.worker):
                os.kill(self.worker, signal.SIGTERM)
            _wait_for(self.worker)
        return DelayedSubmission(WorkerJob(self.folder, self.trials, self.threads))


def _ended(pid: int) -> bool:
    """Whether a child has ended. Popen's own methods would wait for a lock that the interrupted main code may hold."""
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None
    except ChildProcessError:
        return True


def _wait_for(pid: int) -> None:
    while not _ended(pid):
        time.sleep(0.1)


def launch(store: Store, options: dict[str, Any]) -> None:
    """Put the sweep into the queue, unless it is there, and wait for it. A signal ends the waiting, not the jobs.

    Args:
        store: the sweep; its folder must be on a file system that all machines see.
        options: ``workers``: jobs at a time (1); ``trials_per_job`` (1); ``threads`` and ``gpus_per_trial``: what a
            job asks for; ``minutes``: time limit of a job; ``setup``: shell lines before it; ``parameters``: more of
            sbatch's, such as ``{partition: gpu, mem_gb: 32}``. With ``parameters: {cluster: local}`` the jobs are
            processes of this machine, as many as ``workers``: for trying it out.
    Raises:
        ConfigError: submitit or SLURM is not here, or doesn't know a parameter.
        StorageError: the queue can't be asked.
    """
    cluster = options.get("parameters", {}).get("cluster", "slurm")
    folder = store.folder.absolute() / "slurm"
    executor = _executor(folder, cluster, store.plan["name"], options)
    with FileLock(store.folder / "locks" / "submit"):  # a second start waits, and then finds the jobs of the first
        before = active(folder, cluster)
        if before is None:
            raise StorageError("squeue does not respond", hint="Try again when it does; nothing was submitted.")
        left, per_job = store.left(), options.get("trials_per_job", 1) if cluster == "slurm" else None
        wanted = -(-left // per_job) if per_job else min(options.get("workers", 1), left)
        if before:
            print(f"in the queue already: {_numbers(before)} ({len(before)} jobs)", flush=True)
        if wanted > len(before):
            ids = _submit(executor, WorkerJob(str(store.folder.absolute()), per_job, options.get("threads")),
                          wanted - len(before))  # fmt: skip
            print(f"submitted: {_numbers(ids)} ({len(ids)} jobs); their output: {folder}", flush=True)
    with StopSignal() as stop:
        _wait(store, stop, lambda: active(folder, cluster), seconds=ASK if cluster == "slurm" else 1.0)
        if stop.name:
            cancel = f"scancel {_numbers(active(folder, cluster) or [])}" if cluster == "slurm" else "kill them"
            print(f"The jobs go on without this command. To end them: {cancel}", flush=True)
        elif store.left():
            print(
                f"All jobs have ended and {store.left()} trials are left; see the jobs' output in {folder}", flush=True
            )


def _wait(store: Store, stop: StopSignal, ask: Callable[[], list[str] | None], *, seconds: float) -> None:
    """Report every trial that ends, until none is left or, asked twice, no job is; silence is no reason to end."""
    reported = {item["folder"] for item in store.trials() if item["state"] in FINISHED}
    asked, empty = time.monotonic(), 0
    while not stop.name and empty < 2:
        for item in store.trials():
            if item["state"] in FINISHED and item["folder"] not in reported:
                reported.add(item["folder"])
                print(trial_line(store, item["folder"], item["state"]), flush=True)
        if not store.left():
            return
        if time.monotonic() - asked >= seconds:
            empty, asked = empty + 1 if ask() == [] else 0, time.monotonic()
        time.sleep(0.5)


def active(folder: Path, cluster: str) -> list[str] | None:
    """Numbers of the jobs submitted from ``folder`` that wait or run; None if the queue does not respond.

    What submitit leaves in the folder is the record: a job without its file there could do nothing.

    Args:
        folder: submitit's, below the sweep's.
        cluster: ``slurm``, or ``local``.
    """
    suffix = "_submitted.pkl"
    ids = sorted(file.name.removesuffix(suffix) for file in folder.glob(f"*{suffix}"))
    ids = [job for job in ids if not (folder / f"{job}_0_result.pkl").exists()]
    if not ids:
        return []
    if cluster != "slurm":
        return [job for job in ids if _is_controller(job, folder)]
    command = ["squeue", "--noheader", "--array", "--user", getpass.getuser(), "--format", "%i"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        return None
    queued = set(done.stdout.split())
    return [job for job in ids if job in queued] if done.returncode == 0 else None


def _is_controller(pid: str, folder: Path) -> bool:
    """Whether a process lives and is submitit's, for this folder."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    # A process that has just been started has no arguments yet.
    return state != "Z" and (arguments == [b""] or {b"submitit.local._local", str(folder).encode()} <= set(arguments))


def _numbers(ids: Sequence[str]) -> str:
    """``1234``: arrays by their number, as scancel takes them."""
    return " ".join(dict.fromkeys(job.partition("_")[0] for job in ids))


def _submit(executor: Any, job: WorkerJob, count: int) -> list[str]:
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    try:
        return [submitted.job_id for submitted in executor.submit_array([job] * count)]
    except (FailedJobError, FailedSubmissionError, subprocess.CalledProcessError) as error:
        raise ConfigError(
            f"sbatch refused {count} jobs: {error}",
            hint="Correct launcher.parameters; if there are too many jobs, raise launcher.trials_per_job.",
        ) from error


def _executor(folder: Path, cluster: str, name: str, options: dict[str, Any]) -> Any:
    """submitit's executor with all parameters."""
    try:
        import submitit
    except ImportError as error:
        raise ConfigError("launcher slurm needs submitit", hint="pip install 'knowsam[sweep]'") from error
    if cluster not in ("slurm", "local"):
        raise ConfigError(f"launcher.parameters.cluster must be slurm or local, got {cluster!r}")
    missing = [program for program in PROGRAMS if not shutil.which(program)]
    if cluster == "slurm" and missing:
        raise ConfigError(
            f"launcher slurm needs {', '.join(missing)}, which this machine does not have",
            hint="Start the sweep on a login node of the cluster, or use --launcher local here.",
        )
    if "%" in str(folder):
        raise ConfigError(f"launcher slurm: the folder {folder} holds a %, which SLURM replaces", hint="Rename it.")

    # The jobs inherit it: submitit imports this module there.
    os.environ["PYTHONPATH"] = child_environment(None)["PYTHONPATH"]
    try:
        limits = {"slurm_max_num_timeout": REQUEUES, "local_max_num_timeout": REQUEUES}
        executor = submitit.AutoExecutor(folder=folder, cluster=cluster, **limits)
        executor.update_parameters(**_parameters(cluster, name, options))
    except (RuntimeError, ValueError, NameError, TypeError, AssertionError) as error:
        raise ConfigError(f"launcher slurm: {error}", hint="docs/sweeps.md shows launcher.parameters.") from error
    return executor


def _parameters(cluster: str, name: str, options: dict[str, Any]) -> dict[str, Any]:
    """By submitit's names: ours, and over them those of ``parameters``."""
    from submitit.slurm.slurm import SlurmExecutor

    threads, minutes = options.get("threads"), options.get("minutes", MINUTES)
    chosen: dict[str, Any] = {
        "name": f"knowsam-{name}",
        "timeout_min": minutes,
        "cpus_per_task": threads,
        "gpus_per_node": options.get("gpus_per_trial") or None,
        "slurm_array_parallelism": options.get("workers", 1),
        "slurm_signal_delay_s": min(NOTICE, 20 * minutes),
        # Since SLURM 22.05 a step does not get the cores of its job unless it asks for them.
        "slurm_srun_args": [f"--cpus-per-task={threads}"] if threads else None,
        "slurm_additional_parameters": {"requeue": True},  # clusters may have it off
        f"{cluster}_setup": options.get("setup"),
    }
    known = sorted(GENERAL | SlurmExecutor._valid_parameters())
    for key, value in options.get("parameters", {}).items():
        plain = key.removeprefix("slurm_")
        if plain == "cluster":
            continue
        if plain in OURS:
            raise ConfigError(f"launcher.parameters.{key}: say it as launcher.{OURS[plain]}")
        if plain not in known:
            raise ConfigError(
                f"launcher.parameters.{key}: unknown key{did_you_mean(plain, known)}",
                hint="Options of sbatch that submitit doesn't know go into additional_parameters: {option: value}.",
            )
        full = plain if plain in GENERAL else f"slurm_{plain}"
        chosen[full] = {**chosen[full], **value} if plain == "additional_parameters" else value
    return {key: value for key, value in chosen.items() if value is not None}
