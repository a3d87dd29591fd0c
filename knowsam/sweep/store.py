"""The record of a sweep: its plan, and an Optuna study with the state of every trial."""

import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knowsam.config import parse_config, to_yaml
from knowsam.config.identity import config_changes, experiment_key
from knowsam.errors import ConfigError, KnowsamError, NotFoundError, StorageError
from knowsam.files import write_text
from knowsam.sweep.locks import FileLock
from knowsam.sweep.spec import Search, Sweep, resolve, run_folder

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial

FORMAT = 1
STATES = {"WAITING": "waiting", "RUNNING": "running", "COMPLETE": "complete", "FAIL": "failed", "PRUNED": "pruned"}
FINISHED = ("complete", "failed", "pruned")


class Store:
    """One sweep folder.

    ``plan.json``: what the sweep file asks for now. ``journal.log``: the Optuna study, one line an event.
    ``configs/<key>.yaml``: resolved experiments. ``trials/``: run folders. ``logs/<key>.log``: what a trial printed.
    ``locks/``: held by whoever runs a trial. ``trials.json``: plan and states together, for people and for compare.

    Args:
        folder: made by :meth:`enrol`.
    Raises:
        NotFoundError: the folder holds no sweep.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder)
        self.plan = self._read(self.folder / "plan.json")
        if not self.plan:
            raise NotFoundError(
                f"{self.folder} holds no sweep (no plan.json)", hint="Start it with: knowsam sweep SWEEP.yaml"
            )
        self.study = open_study(self.folder, self.plan["storage"], self.plan["name"], self.plan["search"])

    # ------------------------------------------------------------ making

    @classmethod
    def enrol(cls, sweep: Sweep, *, retry_failed: bool = False) -> "Store":
        """Write the plan and add what is new to the study; finished trials stay as they are.

        Args:
            sweep: the expanded sweep file.
            retry_failed: give failed trials one more try.
        Raises:
            ConfigError: the folder holds another sweep.
            StorageError: it cannot be written.
        """
        folder = sweep.folder
        try:
            for name in ("configs", "locks", "logs", "trials"):
                (folder / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(
                f"cannot make {folder}: {error.strerror}", hint="Name another folder in the sweep file (folder: ...)."
            ) from error
        with FileLock(folder / "locks" / "plan"):
            before = cls._read(folder / "plan.json")
            folders = {item["key"]: item["folder"] for item in cls._read(folder / "trials.json").get("trials", [])}
            folders |= {item["key"]: item["folder"] for item in before.get("trials", [])}
            if before and (before["name"], before["storage"]) != (sweep.name, sweep.storage):
                raise ConfigError(
                    f"{folder} holds the sweep {before['name']!r} (storage {before['storage']}), "
                    f"this is {sweep.name!r} (storage {sweep.storage})",
                    hint="Name another folder in the sweep file (folder: ...).",
                )
            if before and (before["search"] or {}).get("space") != (sweep.search.space if sweep.search else None):
                raise ConfigError(
                    f"{folder} was made by a {'search over other ranges' if before['search'] else 'list of trials'}",
                    hint="A study has one space: name another folder in the sweep file (folder: ...).",
                )
            if sweep.search is not None:
                cls._keep_base(folder, to_yaml(resolve(sweep.base, {**sweep.overrides, "train.seed": sweep.seed})))
            for trial in sweep.trials:
                file = folder / "configs" / f"{trial.key}.yaml"
                if not file.exists():
                    write_text(file, trial.config)
            plan = {
                "format": FORMAT,
                "name": sweep.name,
                "baseline": sweep.baseline,
                "storage": sweep.storage,
                "launcher": sweep.launcher,
                "time_limit": sweep.time_limit,
                "retries": sweep.retries,
                "keep": sweep.keep,
                "command": sweep.command,
                "search": asdict(sweep.search) if sweep.search else None,
                "seed": sweep.seed,
                "trials": [
                    {
                        "key": trial.key,
                        "setting": trial.setting,
                        "experiment": trial.experiment,
                        "seed": trial.seed,
                        # It keeps its folder when its setting gets another name, or when it was away and comes back.
                        "folder": folders.get(trial.key, trial.folder),
                        "overrides": trial.overrides,
                    }
                    for trial in sweep.trials
                ],
            }
            write_text(folder / "plan.json", json.dumps(plan, indent=1) + "\n")
            store = cls(folder)
            store._add_missing(retry_failed)
        store.export()
        return store

    @staticmethod
    def _keep_base(folder: Path, text: str) -> None:
        """Write the experiment that a search varies; refuse another one, for one study compares all its trials."""
        base = folder / "configs" / "base.yaml"
        if base.exists() and (changes := config_changes(base.read_text(encoding="utf-8"), parse_config(text, base))):
            raise ConfigError(
                f"{folder} was made by a search around other settings:\n" + "\n".join(f"  {line}" for line in changes),
                hint="One study compares all its trials: name another folder in the sweep file (folder: ...).",
            )
        if not base.exists():
            write_text(base, text)

    def _add_missing(self, retry_failed: bool) -> None:
        from optuna.trial import TrialState, create_trial

        if self.plan["search"] and retry_failed:
            self._retry_search()
        known = self._latest()
        for item in self.plan["trials"]:
            trial = known.get(item["key"])
            if trial is None or (retry_failed and trial.state == TrialState.FAIL):
                attrs = {name: item[name] for name in ("key", "setting", "experiment", "seed", "folder")}
                attrs["overrides"] = item["overrides"]
                self.study.add_trial(create_trial(state=TrialState.WAITING, user_attrs=attrs))

    def _retry_search(self) -> None:
        """Each failed trial once more, as one whose process died: the next worker goes on with it."""
        from optuna.trial import TrialState, create_trial

        trials = self.study.get_trials(deepcopy=False)
        retried = _retried(trials)
        for trial in trials:
            # Without a folder its settings are impossible, and stay so.
            if trial.state == TrialState.FAIL and trial.user_attrs.get("folder") and trial.number not in retried:
                attrs = {**self._item(trial), "retry_of": trial.number}
                self.study.add_trial(
                    create_trial(
                        state=TrialState.RUNNING,
                        params=trial.params,
                        distributions=trial.distributions,
                        user_attrs=attrs,
                    )
                )

    # ------------------------------------------------------------ reading

    def trials(self) -> list[dict[str, Any]]:
        """The plan's trials with ``state``, ``message``, ``exit_code``, ``value``; then those retired from the plan.

        A search's trials come from the study alone.
        """
        if self.plan["search"]:
            trials = self.study.get_trials(deepcopy=False)
            retried = _retried(trials)
            drawn = [trial for trial in trials if "folder" in trial.user_attrs and trial.number not in retried]
            return [{**self._item(trial), **self._outcome(trial)} for trial in drawn]
        latest = self._latest()
        items = [{**item, **self._outcome(latest.get(item["key"]))} for item in self.plan["trials"]]
        planned = {item["key"] for item in items}
        gone = [trial for key, trial in latest.items() if key not in planned]
        return items + [{**self._item(trial), **self._outcome(trial), "state": "retired"} for trial in gone]

    def _latest(self) -> dict[str, "FrozenTrial"]:
        """Key -> its newest entry in the study: the ones before it are failures that were to be tried again."""
        return {
            trial.user_attrs["key"]: trial
            for trial in self.study.get_trials(deepcopy=False)
            if "key" in trial.user_attrs
        }

    @staticmethod
    def _item(trial: "FrozenTrial") -> dict[str, Any]:
        """What the plan would say of a trial, from the study."""
        attrs = trial.user_attrs
        return {name: attrs[name] for name in ("key", "setting", "experiment", "seed", "folder", "overrides")}

    @staticmethod
    def _outcome(trial: "FrozenTrial | None") -> dict[str, Any]:
        if trial is None:
            return {"state": "waiting", "message": None, "exit_code": None, "value": None, "seconds": None}
        outcome = {"message": None, "exit_code": None, "value": None} | trial.user_attrs.get("outcome", {})
        return {"state": STATES[trial.state.name], **outcome, "seconds": trial.user_attrs.get("seconds")}

    def export(self) -> list[dict[str, Any]]:
        """Write ``trials.json``; returns its trials."""
        with FileLock(self.folder / "locks" / "export"):
            items = self.trials()  # under the lock, so that no older state is written over a newer one
            record = {
                "format": FORMAT,
                "name": self.plan["name"],
                "baseline": self.plan["baseline"],
                "trials": [{k: v for k, v in item.items() if k != "seconds"} for item in items],
            }
            write_text(self.folder / "trials.json", json.dumps(record, indent=1) + "\n")
        return items

    # ------------------------------------------------------------ claiming

    def claim(self, skip: Collection[str] = ()) -> "Claim | None":
        """The next unfinished trial that nobody runs, locked for this process; None if there is none.

        Args:
            skip: keys of trials that this process does not want.

        A trial whose state is ``running`` and whose lock is free belonged to a process that died: it is resumed.
        """
        if self.plan["search"]:
            return self._claim_search(skip)
        latest = self._latest()
        for item in self.plan["trials"]:
            trial = latest.get(item["key"])
            if trial is None or STATES[trial.state.name] in FINISHED or item["key"] in skip:
                continue
            lock = FileLock(self.folder / "locks" / item["key"])
            if not lock.acquire(wait=False):
                continue
            trial = self._latest()[item["key"]]  # again, now that nobody else can change it
            if STATES[trial.state.name] in FINISHED:
                lock.release()
                continue
            return self._start(item, trial, lock)
        return None

    def _start(self, item: dict[str, Any], trial: "FrozenTrial", lock: FileLock) -> "Claim":
        from optuna.trial import TrialState

        resumed = trial.state == TrialState.RUNNING
        if not resumed:
            self.study._storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING)
        return Claim(self, item, trial._trial_id, trial.number, lock, resumed)

    def _claim_search(self, skip: Collection[str]) -> "Claim | None":
        from optuna.trial import TrialState

        search = Search(**self.plan["search"])
        with FileLock(self.folder / "locks" / "ask"):  # one at a time: each draw knows the ones before
            for trial in self.study.get_trials(deepcopy=False):
                if trial.state != TrialState.RUNNING or trial.user_attrs.get("key") in skip:
                    continue
                lock = FileLock(self.folder / "locks" / f"trial{trial.number}")
                if lock.acquire(wait=False):
                    trial = self.study._storage.get_trial(trial._trial_id)  # again, now that nobody can change it
                    if trial.state != TrialState.RUNNING:
                        lock.release()
                        continue
                    if "folder" in trial.user_attrs:
                        return self._start(self._item(trial), trial, lock)
                    # Whoever drew it died before it was written down.
                    self.study._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
                    lock.release()
            while len(self.trials()) < search.trials:
                claim = self._draw(search)
                if claim is not None:
                    return claim
        return None

    def _draw(self, search: Search) -> "Claim | None":
        """A new trial of the search; None when its settings are impossible or were drawn before."""
        from knowsam.sweep.search import ask, setting_text

        number = len(self.study.get_trials(deepcopy=False))
        lock = FileLock(self.folder / "locks" / f"trial{number}")
        lock.acquire()
        trial = ask(self.study, search, number)
        assert trial.number == number, "drawn under the lock"
        setting, seed = setting_text(trial.params), self.plan["seed"]
        item = {
            "key": f"trial{number}",
            "setting": setting,
            "experiment": self.plan["name"],
            "seed": seed,
            "overrides": dict(trial.params),
            "folder": "",  # recorded last: it says that the trial was written down whole
        }
        claim = Claim(self, item, trial._trial_id, number, lock, resumed=False)
        earlier = {other["key"]: other for other in self.trials()}
        try:
            config = resolve(self.folder / "configs" / "base.yaml", trial.params)
            item["key"] = experiment_key(config)
            item["folder"] = run_folder(setting, seed, item["key"])
            same = earlier.get(item["key"])
            if same is None:
                write_text(self.folder / "configs" / f"{item['key']}.yaml", to_yaml(config))
        except KnowsamError as error:
            claim.note(**item)
            claim.finish("failed", exit_code=error.exit_code, message=str(error), dice=None)
            return None
        claim.note(**item)
        if same is None:
            return claim
        message = f"the same settings as an earlier trial, which is {same['state']}"
        state = "complete" if same["state"] == "complete" else "pruned"
        claim.finish(state, exit_code=same["exit_code"], message=message, dice=same["value"])
        return None

    def held(self) -> bool:
        """Whether some unfinished trial is being run by a living process, here or elsewhere."""
        return any(alive for _, alive in self._begun())

    def interrupted(self) -> set[str]:
        """Keys of trials that were begun and that nobody runs: the next worker goes on with them."""
        return {key for key, alive in self._begun() if not alive}

    def _begun(self) -> Iterator[tuple[str, bool]]:
        """Key of every trial that was begun and has not ended, and whether a living process holds it."""
        for trial in self.study.get_trials(deepcopy=False):
            if STATES[trial.state.name] == "running":
                key = trial.user_attrs.get("key", "")
                lock = FileLock(self.folder / "locks" / (f"trial{trial.number}" if self.plan["search"] else key))
                free = lock.acquire(wait=False)
                if free:
                    lock.release()
                yield key, not free

    def left(self) -> int:
        """Trials that are neither finished nor retired."""
        items = self.trials()
        if self.plan["search"]:
            return max(0, self.plan["search"]["trials"] - sum(item["state"] in FINISHED for item in items))
        return sum(item["state"] in ("waiting", "running") for item in items)

    @staticmethod
    def _read(path: Path) -> dict[str, Any]:
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise StorageError(
                f"{path} cannot be read: {error}", hint="Remove it and start the sweep again."
            ) from error
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise StorageError(f"{path} is not of format {FORMAT}", hint="Use the version that wrote it.")
        return value


class Claim:
    """A trial that this process may run.

    Attributes:
        item: its part of the plan: ``key``, ``setting``, ``seed``, ``folder``, ...
        number: in the study.
        resumed: it was begun by a process that died or was interrupted.
        lock: inherited by the trial's process, so that the trial counts as running for as long as that lives.
    """

    def __init__(self, store: Store, item: dict[str, Any], trial_id: int, number: int, lock: FileLock, resumed: bool):
        self.store = store
        self.item = item
        self.trial_id = trial_id
        self.number = number
        self.lock = lock
        self.resumed = resumed

    def note(self, **values: Any) -> None:
        """Record user attributes; plain values."""
        for name, value in values.items():
            self.store.study._storage.set_trial_user_attr(self.trial_id, name, value)

    def finish(self, state: str, *, exit_code: int | None, message: str | None, dice: float | None) -> None:
        """Record the end.

        Args:
            state: ``complete``, ``failed`` or ``pruned``.
            exit_code: of the trial's process.
            message: why it failed.
            dice: best validation Dice of the deployed output, 0..1; None if the program reports none.
        """
        from optuna.trial import TrialState

        self.note(outcome={"exit_code": exit_code, "message": message, "value": dice})
        target = {"complete": TrialState.COMPLETE, "failed": TrialState.FAIL, "pruned": TrialState.PRUNED}[state]
        values = None if state == "failed" else [0.0 if dice is None else dice]
        self.store.study._storage.set_trial_state_values(self.trial_id, target, values)
        self.release()

    def release(self) -> None:
        """Give the trial back; another worker goes on with it."""
        self.lock.release()


def _retried(trials: "Sequence[FrozenTrial]") -> set[int]:
    """Numbers of failed trials of a search that were begun again, under another number."""
    return {trial.user_attrs["retry_of"] for trial in trials if "retry_of" in trial.user_attrs}


def open_study(folder: Path, url: str | None, name: str, search: Mapping[str, Any] | None) -> "Study":
    """The Optuna study of a sweep, made if it is not there.

    Args:
        folder: of the sweep.
        url: database; None: a journal file in the folder.
        name: of the study.
        search: its settings, for the pruner; None: a list of trials.
    Raises:
        ConfigError: Optuna is not installed, or the database cannot be opened.
    """
    try:
        import optuna
    except ImportError as error:
        raise ConfigError("sweeps need Optuna, which is not installed", hint="pip install 'knowsam[sweep]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    from knowsam.sweep.search import make_pruner

    try:
        storage: optuna.storages.BaseStorage
        if url is None:
            from knowsam.sweep.journal import Journal

            storage = optuna.storages.JournalStorage(Journal(folder / "journal.log"))
        else:
            storage = optuna.storages.get_storage(url)
        pruner = make_pruner(Search(**search)) if search else None
        return optuna.create_study(
            storage=storage, study_name=name, direction="maximize", load_if_exists=True, pruner=pruner
        )
    except _storage_errors() as error:
        raise ConfigError(f"storage {url or folder / 'journal.log'} cannot be opened: {error}") from error


def _storage_errors() -> tuple[type[Exception], ...]:
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import SQLAlchemyError  # comes with Optuna, and is slow to import

    return ValueError, ImportError, StorageInternalError, SQLAlchemyError
