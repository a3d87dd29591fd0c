"""Which runs are compared: run folders or the folder of a sweep, as named settings with their seeds."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from knowsam.engine.runfolder import RunFolder
from knowsam.errors import ConfigError, DataError, NotFoundError
from knowsam.report.compare.naming import name_settings, telling_keys
from knowsam.report.folders import named_folders
from knowsam.report.runs import Reader, Run, how_to_score, other_data, read_run

TRIALS = "trials.json"
"""File by which a folder is known as a sweep's."""

FORMAT = 1
"""Layout of ``trials.json`` that is understood here."""

RETIRED = "retired"
"""State of a trial that an earlier plan of the sweep held, and the last one does not."""


@dataclass(frozen=True)
class Absent:
    """A run that is counted and named, but has no place in a mean.

    Attributes:
        setting, experiment, seed: as of ``Run``.
        state: ``failed``, ``retired``, ``pruned``, ``waiting``, ``running`` or ``interrupted``.
        exit_code: of its process; None when unknown.
        message: for the console; may name paths, so it goes into no file.
    """

    setting: str
    experiment: str
    seed: int
    state: str
    exit_code: int | None = None
    message: str = ""


@dataclass
class Found:
    """All that a comparison is made of.

    Attributes:
        name: of the sweep, or of the experiment that all runs share, or ``runs``.
        split: whose scores.
        settings: per experiment, names in plan order, also of settings without a finished run.
        runs: finished ones, in plan order.
        absent: the others.
        baseline: setting named by the sweep; None when none is.
        place: the folder of the sweep where its comparison belongs; None for run folders.
    """

    name: str
    split: str
    settings: dict[str, list[str]]
    runs: list[Run]
    absent: list[Absent] = field(default_factory=list)
    baseline: str | None = None
    place: Path | None = None


def collect(arguments: Sequence[str], reader: Reader, data: Collection[str] | None = None) -> Found:
    """Read the runs that the arguments name.

    Args:
        arguments: one sweep folder; or run folders, each also as ``NAME=FOLDER`` to name its setting. Patterns such as
            ``full=runs/full_*`` are expanded.
        reader: how run folders are read.
        data: names of other data of which scores are read, too; None for all that the runs were scored on.
    Raises:
        NotFoundError: an argument names nothing, or a finished run has no scores of the split; no run has scores on one
            of ``data``.
        ConfigError: a YAML file, a sweep among other arguments, a seed that one setting has twice, runs of one name
            that differ in more than their seed.
        DataError: a file that cannot be read.
    """
    for path in arguments:
        if path.endswith((".yaml", ".yml")) and Path(path).is_file():
            raise ConfigError(
                f"{path} is a file; compare takes folders",
                hint=f"A sweep keeps its trials in runs/sweeps/<name>, here probably runs/sweeps/{Path(path).stem}.",
            )
    sweeps = [path for path in arguments if (Path(path) / TRIALS).is_file()]
    if not sweeps:
        found = _from_folders(arguments, reader)
    elif len(arguments) == 1:
        found = _from_sweep(Path(arguments[0]), reader)
    else:
        raise ConfigError(
            f"{sweeps[0]} is the folder of a sweep and stands among other arguments",
            hint="Compare one sweep alone, or name the run folders below its trials/.",
        )
    _refuse_mixed_settings(found)
    if not found.runs:
        raise NotFoundError("none of the runs is finished", hint="Compare again when they are.")
    _add_other_data(found, reader, data)
    return found


def _add_other_data(found: Found, reader: Reader, wanted: Collection[str] | None) -> None:
    """Scores on other data, each data set as an experiment of its own: its cases are others."""
    own, names = list(found.runs), {run.folder: other_data(run.folder, reader.split) for run in found.runs}
    there = sorted({name for some in names.values() for name in some})
    absent = [name for name in wanted or () if name not in there]
    if absent:
        raise NotFoundError(
            f"no run has {reader.split} scores on {', '.join(absent)}; there are {', '.join(there) or 'none'}",
            hint=f"Score them: knowsam evaluate RUN --data EXPERIMENT.yaml --split {reader.split}",
        )
    for experiment in list(found.settings):
        for name in there if wanted is None else sorted(set(wanted)):
            title = on_data(experiment, name)
            runs = [run for run in own if run.experiment == experiment]
            scored = [run for run in runs if name in names[run.folder]]
            if not scored:
                continue
            found.settings[title] = found.settings[experiment]
            found.runs += [
                read_run(run.folder, reader, setting=run.setting, experiment=title, dataset=name) for run in scored
            ]
            others = [run for run in runs if run not in scored]
            found.absent += [Absent(run.setting, title, run.seed, f"not scored on {name}") for run in others]


def on_data(experiment: str, dataset: str) -> str:
    """What the tables of an experiment on other data are called."""
    return f"{experiment}, on {dataset}"


# ---------------------------------------------------------------- a sweep


def _from_sweep(folder: Path, reader: Reader) -> Found:
    try:
        record = json.loads((folder / TRIALS).read_text(encoding="utf-8"))
        if record["format"] != FORMAT:
            raise ValueError(f"format {record['format']!r}, known is {FORMAT}")
        name, baseline, trials = str(record["name"]), record["baseline"], list(record["trials"])
        items = [_trial(item) for item in trials]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DataError(
            f"{folder / TRIALS} cannot be read: {error!r}", hint="It is the file that sweep wrote."
        ) from error
    settings: dict[str, list[str]] = {}
    for absent, _ in items:
        names = settings.setdefault(absent.experiment, [])
        if absent.state != RETIRED and absent.setting not in names:
            names.append(absent.setting)
    complete = [(absent, folder / where) for absent, where in items if absent.state == "complete"]
    unscored = [str(where) for _, where in complete if not _scored(where, reader.split)]
    if unscored:
        raise NotFoundError(
            f"{len(unscored)} complete trials have no scores on {reader.split}: {', '.join(unscored[:5])}"
            + (", ..." if len(unscored) > 5 else ""),
            hint=how_to_score(reader.split, unscored[0])
            + ". A search leaves test alone: choose by validation first, then score what was chosen.",
        )
    runs = [read_run(path, reader, setting=a.setting, experiment=a.experiment) for a, path in complete]
    for run, (absent, path) in zip(runs, complete, strict=True):
        if run.seed != absent.seed:
            raise DataError(f"{path} has seed {run.seed}, {TRIALS} says {absent.seed}", hint="Run the sweep again.")
    return Found(
        name,
        reader.split,
        {experiment: names for experiment, names in settings.items() if names},
        runs,
        [absent for absent, _ in items if absent.state != "complete"],
        None if baseline is None else str(baseline),
        folder / "comparison",
    )


def _trial(item: Mapping[str, Any]) -> tuple[Absent, str]:
    code = item.get("exit_code")
    return (
        Absent(
            str(item["setting"]),
            str(item["experiment"]),
            int(item["seed"]),
            str(item["state"]),
            None if code is None else int(code),
            str(item.get("message") or ""),
        ),
        str(item["folder"]),
    )


def _scored(folder: Path, split: str) -> bool:
    return (RunFolder(folder, create=False).evaluation / f"{split}.json").is_file()


# ---------------------------------------------------------------- run folders


def _from_folders(arguments: Sequence[str], reader: Reader) -> Found:
    named = named_folders(arguments)
    read = [(given or _own_name(folder), folder, *reader.settings(folder)) for given, folder in named]
    titles = {title for _, _, title, _, _ in read}
    experiment = titles.pop() if len(titles) == 1 else "runs"
    names = name_settings([(given, settings, Path(folder).name) for given, folder, _, _, settings in read])
    found = Found(experiment, reader.split, {experiment: list(dict.fromkeys(names))}, [])
    for setting, (_, folder, _, seed, _) in zip(names, read, strict=True):
        status = RunFolder(folder, create=False).read_status()
        state = status.get("state", "complete" if _scored(Path(folder), reader.split) else "interrupted")
        if state == "complete":
            found.runs.append(read_run(folder, reader, setting=setting, experiment=experiment))
        else:
            code = status.get("code")
            message = str(status.get("reason") or "")
            found.absent.append(Absent(setting, experiment, seed, state, code if code else None, message))
    return found


def _own_name(folder: str) -> str | None:
    """What scores without a training are called: masks by their tool, an ensemble as such; None for a run."""
    run = RunFolder(folder, create=False)
    name = run.read_status().get("called")
    return None if name is None else str(name)


# ---------------------------------------------------------------- both


def _refuse_mixed_settings(found: Found) -> None:
    """A mean over seeds is one only if the runs differ in nothing else, and every seed is there once."""
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in found.runs:
        groups.setdefault((run.experiment, run.setting), []).append(run)
    for (_, setting), runs in groups.items():
        for i, run in enumerate(runs):
            twin = next((other for other in runs[:i] if other.seed == run.seed), None)
            if twin is not None:
                raise ConfigError(
                    f"setting {setting!r} has seed {run.seed} twice: {twin.folder} and {run.folder}",
                    hint="Give one of them, or name them apart: first=FOLDER second=FOLDER.",
                )
            keys = telling_keys([runs[0].settings, run.settings])
            if keys:
                off = "; ".join(f"{key}: {runs[0].settings.get(key)!r}, {run.settings.get(key)!r}" for key in keys)
                raise ConfigError(
                    f"setting {setting!r} holds runs of different settings: {runs[0].folder} and {run.folder} ({off})",
                    hint="Only the seed may differ within a setting; give them different names.",
                )
