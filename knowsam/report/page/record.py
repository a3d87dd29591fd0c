"""One run as its own page shows it: everything that train and evaluate left, finished or not, scored or not."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from knowsam.engine.log import read_metrics
from knowsam.engine.runfolder import RunFolder
from knowsam.errors import DataError, KnowsamError
from knowsam.report.folders import named_folders, without_places
from knowsam.report.page.history import History, read_history
from knowsam.report.runs import Reader, Run, how_to_score, other_data, read_run
from knowsam.report.warnings import Warned, logged_warnings


@dataclass(frozen=True)
class Record:
    """A run.

    Attributes:
        name: what it is called on the page; no two runs share one.
        folder: for messages and to open its checkpoints; never for files that are written.
        seed: of the run.
        settings: dotted key -> value, all of them, without folders of this machine.
        status: ``state``, ``step``, ``reason``; empty when the run does not say.
        splits, environment: as the run wrote them.
        defaults: dotted key -> value that this version takes where the run's configuration says nothing.
        overrides: arguments of the command line.
        diff_lines: length of the kept ``git.diff``; 0 when there is none.
        sam_weights: what became of SAM's weights, some lines; empty when the run does not say.
        history: what it logged.
        scores: on the split, as a setting of the run's own name; None when it has none.
        unscored: what to do about that.
        others: scores on other data than its own.
        warnings: what its training was warned of, and what its scores show.
    """

    name: str
    folder: str
    seed: int
    settings: Mapping[str, Any]
    status: Mapping[str, Any]
    splits: Mapping[str, Any]
    environment: Mapping[str, Any]
    defaults: Mapping[str, Any]
    overrides: list[str]
    diff_lines: int
    sam_weights: str
    history: History
    scores: Run | None
    unscored: str = ""
    others: tuple[Run, ...] = ()
    warnings: tuple[Warned, ...] = ()

    @property
    def method(self) -> str:
        """``knowsam``, or ``supervised + SKD``."""
        skd = any(key == "skd" or key.startswith("skd.") for key, value in self.settings.items() if value is not None)
        return str(self.settings.get("method.name", "unknown")).rpartition(":")[2] + (" + SKD" if skd else "")

    @property
    def list_hashes(self) -> dict[str, str]:
        """SHA-256 of the split lists by file name; empty when the run does not say."""
        hashes = self.splits.get("sha256")
        return {str(name): str(value) for name, value in hashes.items()} if isinstance(hashes, dict) else {}

    @property
    def step(self) -> int | None:
        """Updates done; None when nothing tells, or where scores are of no training of ours."""
        if "called" in self.status:
            return None
        step = self.status.get("step")
        if isinstance(step, int):
            return step
        return max((s.steps[-1] for s in self.history.train.values() if s.steps), default=None)

    @property
    def state(self) -> str:
        """``complete``, ``running``, ``interrupted``, ``failed`` or ``unknown``."""
        return str(self.status.get("state") or "unknown")


def read_records(arguments: Sequence[str], reader: Reader) -> list[Record]:
    """Read the runs that the arguments name, in their order.

    Args:
        arguments: run folders, also as ``NAME=FOLDER`` and with patterns, as for ``compare``.
        reader: how folders are read, and the split.
    Raises:
        NotFoundError: an argument names no folder, or a folder without a run.
        ConfigError: a folder is named twice.
        DataError: a file that cannot be read.
    """
    named = named_folders(arguments)
    names = _names([(name, os.path.realpath(folder), reader.settings(folder)[1]) for name, folder in named])
    return [read_record(folder, reader, name) for name, (_, folder) in zip(names, named, strict=True)]


def read_record(folder: str | os.PathLike[str], reader: Reader, name: str) -> Record:
    """Read one run.

    Args:
        folder: of the run.
        reader: how, and the split.
        name: what to call it.
    Raises:
        NotFoundError: there is no run.
        DataError: a file that cannot be read.
    """
    run = RunFolder(folder, create=False)
    experiment, seed, _ = reader.settings(folder)
    config = _text(run.config)
    scored = (run.evaluation / f"{reader.split}.json").is_file()
    scores = read_run(folder, reader, setting=name, experiment=experiment) if scored else None
    return Record(
        name=name,
        folder=str(run),
        seed=seed,
        settings={key: without_places(value) for key, value in reader.flatten(config).items()},
        status=run.read_status(),
        splits=run.read_json(run.splits),
        environment=run.read_json(run.environment),
        defaults=reader.defaults(config),
        overrides=[without_places(line) for line in _text(run.overrides).splitlines()],
        diff_lines=len(_text(run.diff).splitlines()),
        sam_weights=without_places(_text(run.sam_weights)).strip(),
        history=read_history(read_metrics(run.metrics)),
        # Every run is a setting of its own, called by the name of the run.
        scores=scores,
        others=tuple(
            read_run(folder, reader, setting=name, experiment=experiment, dataset=dataset)
            for dataset in other_data(folder, reader.split)
        ),
        warnings=tuple(logged_warnings(run)) if scores is None else scores.warnings,
        unscored="" if scored else f"no scores on {reader.split}. {how_to_score(reader.split, Path(folder).name)}",
    )


def scored_runs(records: Sequence[Record]) -> list[Run]:
    """The scores of those runs that have some; each ``setting`` is the name of its record."""
    return [record.scores for record in records if record.scores is not None]


def on_one_line(error: KnowsamError) -> str:
    """What an error says, for the page: without its hint, line breaks and places."""
    return without_places(" ".join(str(error).split()))


def _names(runs: Sequence[tuple[str | None, str, int]]) -> list[str]:
    """The user's names, with the seed where several runs share one; else the names of the folders.

    Args:
        runs: (name that the user gave or None, folder, seed).
    """
    given = [name for name, _, _ in runs]
    names = [
        name if name and given.count(name) == 1 else f"{name}, seed {seed}" if name else Path(folder).name
        for name, folder, seed in runs
    ]
    # Folders of one name in different places, or a name and a seed twice.
    names = [
        name if names.count(name) == 1 else f"{name} ({Path(folder).parent.name}/{Path(folder).name})"
        for name, (_, folder, _) in zip(names, runs, strict=True)
    ]
    return [name if names.count(name) == 1 else f"{name} ({i + 1})" for i, name in enumerate(names)]


def _text(path: Path) -> str:
    """Content of a file; empty when it is not there.

    Raises:
        DataError: it is no text.
    """
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}", hint="It is a file that train wrote.") from error


def shown(value: Any) -> str:
    """A setting as text: ``null``, ``true``, ``[1, 2]``, or the text itself."""
    return value if isinstance(value, str) else json.dumps(value, default=str)
