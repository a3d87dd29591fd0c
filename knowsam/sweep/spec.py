"""A sweep file in, a list of trials out: every combination as a checked, resolved experiment."""

import itertools
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from knowsam.components import type_error
from knowsam.config import Config, load_config, to_yaml
from knowsam.config.identity import experiment_key
from knowsam.config.reading import read_with_parents
from knowsam.errors import ConfigError, KnowsamError, NotFoundError
from knowsam.text import did_you_mean

LAUNCHERS = ("local", "slurm", "ray")
SAMPLERS = ("tpe", "random", "qmc", "gp")
PRUNERS = ("none", "median", "hyperband", "asha")

Overrides = dict[str, Any]

Complain = Callable[[str, str], None]
"""Takes down what is wrong: the dotted key, and what about it."""


@dataclass(frozen=True)
class Trial:
    """One ``train`` + ``evaluate``.

    Attributes:
        key: hash of the resolved configuration and its split lists.
        setting: what distinguishes it from the others but the seed, for people.
        experiment: name of the base experiment; results of different ones never stand in one table.
        seed: of the run.
        overrides: dotted keys over the base experiment, the seed included.
        config: resolved configuration as YAML text.
    """

    key: str
    setting: str
    experiment: str
    seed: int
    overrides: Overrides
    config: str = field(repr=False)

    @property
    def folder(self) -> str:
        """Run folder, below the sweep's."""
        return run_folder(self.setting, self.seed, self.key)


@dataclass(frozen=True)
class Search:
    """Settings that Optuna chooses, by validation Dice.

    Attributes:
        space: dotted key -> list of choices, or ``{low, high[, log][, step]}``.
        trials: how many settings are tried in all.
        sampler: one of ``SAMPLERS``; its draws are a function of the seed and of the results so far.
        pruner: one of ``PRUNERS``: what ends a trial early whose validation Dice falls behind.
        warmup_steps: no trial is ended before this training step.
        startup_trials: so many trials run in full before any is ended early.
        seed: of the sampler.
    """

    space: dict[str, Any]
    trials: int = 20
    sampler: str = "tpe"
    pruner: str = "median"
    warmup_steps: int = 0
    startup_trials: int = 5
    seed: int = 0


@dataclass
class SweepFile:
    """The keys of a sweep file; ``inherits:`` names another one to begin from, as in experiments.

    Attributes:
        name: of the sweep; that of the file if not given.
        base: experiment file beside the sweep file, or several: ``{name: file}``.
        overrides: dotted keys for every trial.
        list: ``{setting: {dotted key: value}}``.
        grid: ``{dotted key: [values]}``, or ``{dotted key: {label: value}}``; the product of all.
        paired: a block ``{dotted key: [values]}`` whose keys change together, or a list of such blocks.
        exclude: conditions ``{dotted key | setting | experiment | seed: value or [values]}``; a trial that meets all
            parts of one is dropped.
        seeds: of ``train.seed``.
        search: see ``Search``; excludes list, grid and paired.
        baseline: name of the setting that comparisons refer to.
        folder: where everything goes; ``runs/sweeps/<name>`` if not given.
        storage: database URL of the Optuna study; a journal file in the folder if not given.
        launcher: ``{name: local | slurm | ray, workers, threads, gpus_per_trial, ...}``.
        time_limit: seconds after which a trial is ended and recorded as failed; 0 for none.
        retries: how often a trial whose process was killed is taken up again, from its checkpoint, by one worker.
        keep: ``all``, or ``best``: a complete trial's ``last.pt`` (weights and optimizers) goes, its ``best.pt`` stays.
        command: what runs one trial, a list; ``{config}`` and ``{run}`` stand for its files. knowsam's own if None.
    """

    base: Any = None
    name: str | None = None
    overrides: dict[str, Any] = field(default_factory=dict)
    list: dict[str, Any] = field(default_factory=dict)
    grid: dict[str, Any] = field(default_factory=dict)
    paired: Any = None
    exclude: Any = None
    seeds: Sequence[int] = (0,)
    search: dict[str, Any] | None = None
    baseline: str | None = None
    folder: str | None = None
    storage: str | None = None
    launcher: dict[str, Any] = field(default_factory=dict)
    time_limit: float = 0.0
    retries: int = 2
    keep: str = "all"
    command: Sequence[str] | None = None


@dataclass(frozen=True)
class Sweep:
    """A checked sweep.

    Attributes:
        name, folder, storage, baseline, launcher, time_limit, retries, keep, command: as in ``SweepFile``, with
            defaults.
        trials: in the order of the file; empty for a search.
        search: None for a list of trials.
        base: experiment file of a search.
        seed: of the runs of a search.
        overrides: dotted keys for every trial of a search.
        warnings: what is allowed and probably not meant.
    """

    name: str
    folder: Path
    trials: list[Trial]
    storage: str | None = None
    baseline: str | None = None
    launcher: dict[str, Any] = field(default_factory=dict)
    time_limit: float = 0.0
    retries: int = 2
    keep: str = "all"
    command: list[str] | None = None
    search: Search | None = None
    base: str = ""
    seed: int = 0
    overrides: Overrides = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def load_sweep(path: str | Path) -> Sweep:
    """Read a sweep file, expand it and check every trial's configuration.

    Raises:
        NotFoundError: the file or a base experiment is not there.
        ConfigError: everything that is wrong, in one message.
    """
    path = Path(path)
    if not path.is_file():
        raise NotFoundError(f"there is no sweep file {path}")
    values, where = read_with_parents(path)
    if "base" not in values and {"data", "method", "train"} & set(values):
        raise ConfigError(
            f"{path} is an experiment, not a sweep",
            hint=f"A sweep file names it and what to vary, as in 'base: {path.name}' and 'seeds: [0, 1, 2]'.",
        )
    problems: list[str] = []

    def complain(key: str, text: str) -> None:
        parts = key.split(".")
        place = next((where[k] for n in range(len(parts), 0, -1) if (k := ".".join(parts[:n])) in where), str(path))
        problems.append(f"{place} {key}: {text}")

    file = _fill(values, complain)
    launcher = _launcher(file.launcher, complain)
    search = _search(file, complain) if file.search is not None else None
    bases = _bases(file.base, path.parent, complain)
    seeds = list(file.seeds)
    if not seeds or len(set(seeds)) != len(seeds):
        complain("seeds", f"needs different whole numbers, at least one, got {seeds}")
    axes = _axes(file, complain)
    excluded = _conditions(file.exclude, complain)
    varied = [*(key for axis in axes for _, part in axis for key in part), *(search.space if search else ())]
    if "train.seed" in [*file.overrides, *varied]:
        complain("train.seed", "belongs into seeds")
    if file.time_limit < 0 or file.retries < 0:
        complain("time_limit", f"and retries must be at least 0, got {file.time_limit} and {file.retries}")
    if file.keep not in ("all", "best"):
        complain("keep", f"must be all or best, got {file.keep!r}")
    _raise(problems, path)

    name = file.name or path.stem
    sweep = Sweep(
        name=name,
        folder=Path(file.folder or f"runs/sweeps/{name}"),
        trials=[],
        storage=file.storage,
        launcher=launcher,
        time_limit=file.time_limit,
        retries=file.retries,
        keep=file.keep,
        command=list(file.command) if file.command else None,
    )
    if search is not None:
        overrides = dict(file.overrides)
        base = next(iter(bases.values()))
        try:
            resolve(base, {**overrides, **first_point(search), "train.seed": seeds[0]})
        except KnowsamError as error:
            raise type(error)(f"{path}: the first point of the search space: {error}", hint=error.hint) from error
        return replace(sweep, search=search, base=str(base), seed=seeds[0], overrides=overrides)

    warnings: list[str] = []
    trials = _expand(file, bases, axes, excluded, seeds, problems, warnings)
    _raise(problems, path)
    settings = list(dict.fromkeys(trial.setting for trial in trials))
    if file.baseline is not None and file.baseline not in settings:
        complain("baseline", f"there is no setting {file.baseline!r}{did_you_mean(file.baseline, settings)}")
        _raise(problems, path)
    return replace(sweep, trials=trials, baseline=file.baseline, warnings=warnings)


def run_folder(setting: str, seed: int, key: str) -> str:
    """Where a trial's run goes, below the sweep's folder: readable, and unique by its key.

    Args:
        setting: what distinguishes the trial but the seed; may hold anything.
        seed: of the run.
        key: of the trial.
    """
    readable = re.sub(r"[^A-Za-z0-9.=+-]+", "_", setting).strip("_.")[:60]
    return f"trials/{readable}_seed{seed}_{key}"


def resolve(base: str | Path, overrides: Overrides) -> Config:
    """The experiment with dotted keys over it.

    Args:
        base: experiment file.
        overrides: dotted key -> value.
    Raises:
        NotFoundError, ConfigError: as ``load_config``.
    """
    return load_config(base, [f"{key}={_inline(value)}" for key, value in overrides.items()])


def _inline(value: Any) -> str:
    """A value as YAML on one line: JSON, but keys may be numbers, as in ``data.labels``, and values infinite."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_inline(key)}: {_inline(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_inline, value)) + "]"
    if isinstance(value, float) and not math.isfinite(value):
        return {math.inf: ".inf", -math.inf: "-.inf"}.get(value, ".nan")
    if isinstance(value, str):
        plain = (c if c.isprintable() and c not in '"\\' else f"\\U{ord(c):08x}" for c in value)
        return f'"{"".join(plain)}"'
    return json.dumps(value)


def _raise(problems: list[str], path: Path) -> None:
    if problems:
        different = list(dict.fromkeys(problems))
        shown = different[:20] + ([f"and {len(different) - 20} more"] if len(different) > 20 else [])
        raise ConfigError(f"{path} is not a sweep that can run:\n" + "\n".join(f"  {line}" for line in shown))


# ---------------------------------------------------------------- reading


_KINDS = {
    "name": "str | None",
    "overrides": "dict",
    "list": "dict",
    "grid": "dict",
    "seeds": "list[int]",
    "search": "dict | None",
    "baseline": "str | None",
    "folder": "str | None",
    "storage": "str | None",
    "launcher": "dict",
    "time_limit": "float",
    "retries": "int",
    "keep": "str",
    "command": "list[str] | None",
}


def _fill(values: Mapping[str, Any], complain: Complain) -> SweepFile:
    file = SweepFile()
    for key, value in values.items():
        if key not in vars(file):
            complain(str(key), f"unknown key{did_you_mean(str(key), vars(file))}")
        elif key in _KINDS and (problem := type_error(value, _KINDS[key])):
            complain(key, problem)
        else:
            setattr(file, key, value)
    if file.search is not None and (file.list or file.grid or file.paired or file.exclude):
        complain("search", "chooses the settings itself; leave list, grid, paired and exclude out")
    if file.search is not None and file.baseline is not None:
        complain("baseline", "has no meaning in a search")
    if file.search is not None and (len(file.seeds) != 1 or (isinstance(file.base, dict) and len(file.base) > 1)):
        complain("search", "tries one base with one seed; run its best settings with several seeds through list:")
    return file


def _bases(base: Any, beside: Path, complain: Complain) -> dict[str, Path]:
    """Experiment name -> file."""
    if isinstance(base, str):
        base = {Path(base).stem: base}
    if not isinstance(base, dict) or not base or not all(isinstance(file, str) for file in base.values()):
        complain("base", f"must be an experiment file, or {{name: file}} for several, got {base!r}")
        return {}
    found = {str(name): beside / file for name, file in base.items()}
    for name, file in found.items():
        if not file.is_file():
            complain("base", f"there is no experiment file {file} ({name}); it is sought beside the sweep file")
    return found


_LAUNCHER_KINDS = {
    "workers": "int",
    "threads": "int",
    "gpus_per_trial": "int",
    "trials_per_job": "int",
    "minutes": "int",
    "parameters": "dict",
    "setup": "list[str]",
    "address": "str | None",
}


def _launcher(block: Mapping[str, Any], complain: Complain) -> dict[str, Any]:
    name = block.get("name", "local")
    if name not in LAUNCHERS:
        complain("launcher.name", f"there is no launcher {name!r}; known: {', '.join(LAUNCHERS)}")
    for key, value in block.items():
        if key == "name":
            continue
        if key not in _LAUNCHER_KINDS:
            complain(f"launcher.{key}", f"unknown key{did_you_mean(str(key), _LAUNCHER_KINDS)}")
        elif problem := type_error(value, _LAUNCHER_KINDS[key]):
            complain(f"launcher.{key}", problem)
        elif isinstance(value, int) and value < (key in ("workers", "trials_per_job", "minutes")):
            complain(f"launcher.{key}", f"must be at least {int(key != 'gpus_per_trial')}, got {value}")
    return {"name": name, **block}


def _search(file: SweepFile, complain: Complain) -> Search:
    block = dict(file.search or {})
    space = block.pop("space", None)
    if not isinstance(space, dict) or not space:
        complain("search.space", f"needs {{dotted key: [choices] or {{low, high}}}}, got {space!r}")
        space = {}
    for key, choice in space.items():
        if problem := _range_problem(choice):
            complain(f"search.space.{key}", problem)
    kinds = {
        "trials": "int",
        "sampler": f"Literal{list(SAMPLERS)}",
        "pruner": f"Literal{list(PRUNERS)}",
        "warmup_steps": "int",
        "startup_trials": "int",
        "seed": "int",
    }
    good = {}
    for key, value in block.items():
        if key not in kinds:
            complain(f"search.{key}", f"unknown key{did_you_mean(str(key), [*kinds, 'space'])}")
        elif problem := type_error(value, kinds[key]):
            complain(f"search.{key}", problem)
        elif isinstance(value, int) and value < (key == "trials"):
            complain(f"search.{key}", f"must be at least {int(key == 'trials')}, got {value}")
        else:
            good[key] = value
    return Search(space, **good)


def _range_problem(choice: Any) -> str | None:
    if isinstance(choice, list):
        plain = all(isinstance(value, str | int | float | bool | None) for value in choice)
        return None if choice and plain else f"needs plain values to choose from, got {choice!r}"
    if not isinstance(choice, dict) or not {"low", "high"} <= set(choice) <= {"low", "high", "log", "step"}:
        return f"must be a list of choices or {{low, high[, log][, step]}}, got {choice!r}"
    low, high, log, step = choice["low"], choice["high"], choice.get("log", False), choice.get("step")
    if any(type_error(value, "float") for value in (low, high)) or not -math.inf < low < high < math.inf:
        return f"needs numbers low < high, got {low!r} and {high!r}"
    if step is not None and not type_error(step, "float") and not 0 < step <= high - low:
        return f"needs a step above 0 and not beyond the range, got {step!r}"
    if type_error(log, "bool") or type_error(step, "float | None") or (log and (low <= 0 or step is not None)):
        return "log must be true or false, needs low > 0, and excludes step"
    return None


def first_point(search: Search) -> Overrides:
    """One point of the space: the first choice, the low end of each range."""
    return {key: choice[0] if isinstance(choice, list) else choice["low"] for key, choice in search.space.items()}


# ---------------------------------------------------------------- expanding

Axis = list[tuple[str, Overrides]]


def _axes(file: SweepFile, complain: Complain) -> list[Axis]:
    """Each axis is a list of (label, overrides); the trials are their product."""
    axes: list[Axis] = []
    if file.list:
        for name, part in file.list.items():
            if not isinstance(part, dict | None):
                complain(f"list.{name}", f"must hold dotted keys and values, got {part!r}")
        axes.append(
            [(str(name), dict(part or {})) for name, part in file.list.items() if isinstance(part, dict | None)]
        )
    for key, choices in file.grid.items():
        if isinstance(choices, dict) and choices:
            axes.append([(str(label), {key: value}) for label, value in choices.items()])
        elif isinstance(choices, list) and choices:
            axes.append([(_label(key, value), {key: value}) for value in choices])
        else:
            complain(f"grid.{key}", f"needs [values] or {{label: value}}, got {choices!r}")
    blocks = file.paired if isinstance(file.paired, list) else [file.paired] if file.paired is not None else []
    for block in blocks:
        columns = block if isinstance(block, dict) else {}
        lengths = {len(column) if isinstance(column, list) else -1 for column in columns.values()}
        if len(lengths) != 1 or min(lengths) < 1:
            complain("paired", f"needs {{dotted key: [values]}} with lists of one length, got {block!r}")
            continue
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        axes.append([(", ".join(_label(key, value) for key, value in row.items()), row) for row in rows])
    keys = [sorted({key for _, part in axis for key in part}) for axis in axes]
    for first, second in itertools.combinations(keys, 2):
        for key in set(first) & set(second):
            complain(key, "is set by two of list, grid and paired, so one of them would have no effect")
    return axes


def _label(key: str, value: Any) -> str:
    """``lr=0.01``; of a component the name alone."""
    text = value if isinstance(value, str) else json.dumps(value)
    short = key.rpartition(".")[2]
    return text if short == "name" else f"{short}={text}"


def _conditions(exclude: Any, complain: Complain) -> list[dict[str, Any]]:
    blocks = exclude if isinstance(exclude, list) else [exclude] if exclude is not None else []
    for block in blocks:
        if not isinstance(block, dict) or not block:
            complain("exclude", f"needs conditions {{dotted key: value}}, got {block!r}")
    return [block for block in blocks if isinstance(block, dict) and block]


def _expand(
    file: SweepFile,
    bases: Mapping[str, Path],
    axes: list[Axis],
    excluded: list[dict[str, Any]],
    seeds: list[int],
    problems: list[str],
    warnings: list[str],
) -> list[Trial]:
    trials: dict[str, Trial] = {}
    used = [False] * len(excluded)
    for (experiment, base), setting, overrides in _combinations(bases, axes):
        for seed in seeds:
            facts = {**file.overrides, **overrides, "seed": seed, "setting": setting, "experiment": experiment}
            met = [_meets(facts, condition) for condition in excluded]
            used = [a or b for a, b in zip(used, met, strict=True)]
            if any(met):
                continue
            merged = {**file.overrides, **overrides, "train.seed": seed}
            try:
                config = resolve(base, merged)
            except KnowsamError as error:
                problems.append(f"setting {setting!r}: {str(error).replace(chr(10), chr(10) + '  ')}")
                break
            key = experiment_key(config)
            if key in trials:
                problems.append(
                    f"settings {trials[key].setting!r} and {setting!r} of seed {seed} are the same experiment "
                    "(exclude one of them)"
                )
                break
            trials[key] = Trial(key, setting, experiment, seed, merged, to_yaml(config))
    warnings += [f"exclude {c} drops nothing" for c, hit in zip(excluded, used, strict=True) if not hit]
    if not trials and not problems:
        problems.append("no trial is left; exclude drops all of them")
    return list(trials.values())


def _combinations(bases: Mapping[str, Path], axes: list[Axis]) -> Iterator[tuple[tuple[str, Path], str, Overrides]]:
    for base in bases.items():
        for parts in itertools.product(*axes):
            overrides = {key: value for _, part in parts for key, value in part.items()}
            yield base, ", ".join(label for label, _ in parts) or "base", overrides


def _meets(facts: Mapping[str, Any], condition: Mapping[str, Any]) -> bool:
    for key, wanted in condition.items():
        if key not in facts:
            return False
        if facts[key] not in (wanted if isinstance(wanted, list) else [wanted]):
            return False
    return True
