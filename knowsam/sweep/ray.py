"""Workers on a Ray cluster, through Ray Tune: an existing one, or one made for this sweep on this machine."""

import os
import signal
import threading
from typing import Any

from knowsam.errors import ConfigError
from knowsam.sweep.store import Store
from knowsam.sweep.words import progress
from knowsam.sweep.worker import Stop, child_environment, work

_STORES: dict[str, Store] = {}


def launch(store: Store, options: dict[str, Any]) -> None:
    """Run the sweep to its end, or until a signal asks for one.

    Tune runs as many slots as there are trials to do; a slot takes the next trial from the study, which stays the only
    record. When Ray ends a slot's process, the trial's process is told (SIGTERM), saves its checkpoint and ends.

    Args:
        store: the sweep; its folder must be on a file system that all machines see.
        options: ``address`` of a cluster, such as ``auto`` (null: a Ray of this machine, which ends with the sweep),
            ``workers``: trials at a time, ``threads`` and ``gpus_per_trial``: what a trial takes, ``parameters``: more
            for ``ray.init``.
    Raises:
        ConfigError: Ray is not installed, or the cluster cannot be reached.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would report to its makers
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS", "0")
    try:
        import ray
        from ray import tune
    except ImportError as error:
        raise ConfigError("launcher ray needs Ray", hint="pip install 'knowsam[sweep]'") from error

    workers, threads = options.get("workers", 1), options.get("threads") or 1
    gpus = options.get("gpus_per_trial", 0)
    address = options.get("address")
    init: dict[str, Any] = {"address": address, "log_to_driver": False, "logging_level": "ERROR"}
    if address is None:
        init |= {"address": "local", "num_cpus": workers * threads, "include_dashboard": False}
    if not ray.is_initialized():
        try:
            variables = {"PYTHONPATH": child_environment(None)["PYTHONPATH"]}
            ray.init(**{**init, "runtime_env": {"env_vars": variables}, **options.get("parameters", {})})
        except (ConnectionError, ValueError, RuntimeError, TypeError) as error:
            raise ConfigError(
                f"launcher ray: {error}", hint="Start the cluster first (ray start --head), or leave address out."
            ) from error
    folder = str(store.folder.absolute())

    def slot(config: dict[str, Any]) -> None:
        # Ray runs this in a thread of an actor that serves one slot after the other, so the study stays open.
        run_slot(folder, threads)
        tune.report({"done": 1})

    tuner = tune.Tuner(
        tune.with_resources(slot, {"cpu": threads, "gpu": gpus}),
        param_space={"slot": tune.grid_search(list(range(store.left())))},
        tune_config=tune.TuneConfig(max_concurrent_trials=workers, reuse_actors=True),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(store.folder.absolute() / "ray"),
            verbose=0,
        ),
    )
    ended = threading.Event()
    threading.Thread(target=_tell, args=(store, ended), daemon=True).start()
    before = signal.getsignal(signal.SIGTERM)
    try:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, lambda *_: os.kill(os.getpid(), signal.SIGINT))  # which Tune listens to
        tuner.fit()
    except KeyboardInterrupt:
        pass
    finally:
        ended.set()
        signal.signal(signal.SIGTERM, before)
        ray.shutdown()


def _tell(store: Store, ended: threading.Event) -> None:
    told = ""
    while not ended.wait(5.0):
        if (now := progress(store)) != told:
            told = now
            print(now, flush=True)


def run_slot(folder: str, threads: int) -> None:
    """One slot: claim the next trial and run it. In an actor's process."""
    os.environ |= child_environment(threads)
    if folder not in _STORES:
        _STORES[folder] = Store(folder)
    work(_STORES[folder], max_trials=1, stop=Stop(), say=lambda line: None)
