"""Workers on a Ray cluster, through Ray Tune: an existing cluster, or one made for this sweep on this machine."""

import os
import shutil
import signal
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from knowsam.errors import ConfigError, KnowsamError, StorageError
from knowsam.signals import StopSignal
from knowsam.sweep.local import RESTARTS, available_cores, wait_for_orphans
from knowsam.sweep.locks import FileLock
from knowsam.sweep.store import Store
from knowsam.sweep.worker import child_environment, work

OBJECT_STORE = 80 * 2**20
"""Bytes of shared memory of a Ray of our own; nothing is ever put there, and this is the least that Ray takes."""

SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",  # Ray would report to its makers
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_kill_child_processes_on_worker_exit": "0",  # with SIGKILL; they get SIGTERM by die_with, and save
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # our study is the record
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C is ours: the trials are to save their checkpoints
    "TUNE_GLOBAL_CHECKPOINT_S": "600",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
}


class StopFile(StopSignal):
    """Asks for a file instead of listening for signals, as the driver and the trials may be on different machines."""

    def __init__(self, path: Path):
        super().__init__()
        self.path = path

    @property
    def name(self) -> str:
        """``stop`` once the file is there; empty before."""
        return "stop" if self.path.exists() else ""

    @name.setter
    def name(self, value: str) -> None:
        pass


def launch(store: Store, options: dict[str, Any]) -> None:
    """Run the sweep to its end, or until a signal asks for one.

    Tune is given slots, as long as there are trials to do; a slot claims the next trial and runs it as any worker does,
    so that our study stays the only record, and what Ray kills is resumed by the next slot or the next start.

    Args:
        store: the sweep; its folder must be on a file system that all machines see.
        options: ``address`` of a cluster, such as ``auto`` (null: a Ray of this machine, which ends with the sweep),
            ``workers``: trials at a time (1), ``threads`` and ``gpus_per_trial``: what a trial takes, ``parameters``:
            more for ``ray.init``.
    Raises:
        ConfigError: Ray is not installed, or the cluster can't be reached.
        StorageError: a worker could not read or write the sweep.
    """
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError as error:
        raise ConfigError("launcher ray needs Ray", hint="pip install 'knowsam[sweep]'") from error
    started = not ray.is_initialized()
    if started:
        _start(options)
    folder, lock = store.folder.absolute() / "ray", FileLock(store.folder / "locks" / "ray")
    if lock.acquire(wait=False):  # nobody else runs this sweep on Ray, so these were left by one who was killed
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=folder))
    try:
        with StopSignal() as stop:
            rounds = RESTARTS
            while store.left() and not stop.name:
                _run_slots(store, options, stop, scratch)
                rounds -= 1
                if rounds < 0 or not wait_for_orphans(store, stop):
                    break
    finally:
        (scratch / "stop").touch()  # for slots that outlive an error here
        if started:
            ray.shutdown()
        shutil.rmtree(scratch, ignore_errors=True)
        lock.release()


def _start(options: dict[str, Any]) -> None:
    """``ray.init``: join a cluster, or make one of this machine."""
    import ray

    address, parameters = options.get("address"), options.get("parameters", {})
    variables = {k: v for k, v in os.environ.items() if k.startswith("KNOWSAM_") or k in SETTINGS}
    variables["PYTHONPATH"] = child_environment(None)["PYTHONPATH"]
    init: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address is None:
        os.environ |= variables  # Ray's processes inherit them
        cores, wanted = len(available_cores()), options.get("workers", 1) * _threads(options)
        # Ray counts cores instead of binding to them: more threads than cores is the user's choice, as in local.
        init |= {"address": "local", "num_cpus": max(cores, wanted), "include_dashboard": False}
        init |= {"object_store_memory": OBJECT_STORE}
    else:
        init |= {"address": address, "runtime_env": {"env_vars": variables}}
    try:
        ray.init(**{**init, **parameters})
    except (ConnectionError, ValueError, RuntimeError, TypeError) as error:
        hint = "Leave address out for a Ray of this machine, or start a cluster: ray start --head."
        raise ConfigError(f"launcher ray: {error}", hint=hint) from error


def _threads(options: dict[str, Any]) -> int:
    """Of a trial; on a machine of our own the cores are shared evenly, as by the local launcher."""
    alone = options.get("address") is None
    return options.get("threads") or (max(1, len(available_cores()) // options.get("workers", 1)) if alone else 1)


def _run_slots(store: Store, options: dict[str, Any], stop: StopSignal, scratch: Path) -> None:
    """One run of Tune: slots until one of them finds nothing to do, or ``stop``."""
    import ray
    from ray import tune
    from ray.tune.search import Searcher

    workers, threads = options.get("workers", 1), _threads(options)
    gpus = options.get("gpus_per_trial", 1 if ray.cluster_resources().get("GPU") else 0)
    stop_file = scratch / "stop"
    state: dict[str, Any] = {"over": False, "lost": 0, "problem": None}

    before = signal.getsignal(signal.SIGUSR1)

    class Slots(Searcher):
        """Tune asks it for trials; each is a slot, without settings of its own."""

        def suggest(self, trial_id: str) -> Any:
            return Searcher.FINISHED if state["over"] or stop.name else {}

        def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
            if error:  # its process was killed, or its machine is gone; the trial is resumed by another slot
                state["lost"] += 1
                state["over"] |= state["lost"] > RESTARTS * workers

        def save(self, checkpoint_path: str) -> None: ...

        def restore(self, checkpoint_path: str) -> None: ...

    class Watch(tune.Callback):
        def setup(self, **info: Any) -> None:
            with suppress(ValueError):  # not in the main thread
                signal.signal(signal.SIGUSR1, before)  # Tune has just taken it for itself

        def on_step_begin(self, **info: Any) -> None:
            if stop.name and not stop_file.exists():
                stop_file.touch()

        def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any) -> None:
            state["problem"] = state["problem"] or result["problem"]
            state["over"] |= not result["line"] or result["problem"] is not None
            if result["line"]:
                print(result["line"], flush=True)

    tune.Tuner(
        tune.with_resources(_slot_class(), {"cpu": threads, "gpu": gpus}),
        param_space={
            "folder": str(store.folder.absolute()),
            "stop": str(stop_file),
            "directory": os.getcwd(),
            "threads": threads,
        },
        tune_config=tune.TuneConfig(
            num_samples=-1, search_alg=Slots(), max_concurrent_trials=workers, reuse_actors=True
        ),
        run_config=tune.RunConfig(
            name="slots",
            storage_path=str(scratch),
            verbose=0,
            callbacks=[Watch()],
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
        ),
    ).fit()
    if state["problem"]:
        raise StorageError(state["problem"], hint="Correct it and start the sweep again; it goes on from there.")


def _slot_class() -> type:
    from ray import tune

    class Slot(tune.Trainable):
        """Runs one trial a step, in an actor that serves one slot after the other, so that the study stays open."""

        def setup(self, config: dict[str, Any]) -> None:
            self.store: Store | None = None

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            return True

        def step(self) -> dict[str, Any]:
            directory = self.config["directory"]
            if os.path.isdir(directory):
                os.chdir(directory)  # paths in experiments are relative to where the sweep was started
            os.environ |= child_environment(self.config["threads"])
            lines: list[str] = []
            problem = None
            try:
                self.store = self.store or Store(self.config["folder"])
                work(self.store, max_trials=1, stop=StopFile(Path(self.config["stop"])), say=lines.append)
            except KnowsamError as error:
                problem = str(error)
            return {"done": True, "line": "\n".join(lines), "problem": problem}

    return Slot
