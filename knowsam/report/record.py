"""One run as its own page shows it: everything that train and evaluate left, finished or not, scored or not."""

import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from knowsam.engine.log import read_metrics
from knowsam.engine.runfolder import RunFolder
from knowsam.errors import ConfigError, DataError
from knowsam.report.collect import expand
from knowsam.report.runs import Reader, Run, how_to_score, read_run

RATE, NORM, WEIGHTS, SPEED = "lr_", "grad_norm_", "param_norm_", "images_per_second"
"""What the loop itself records beside the losses; see ``engine.train``."""

TOP, ERROR = "top_class_", "error_"
"""What it records of the answers; see ``engine.watch.label_statistics``."""

# What methods log and do not minimise; a name that this does not know is taken for a loss term and shown with them.
_MONITOR = re.compile(r"_(weight|rampup|confidence|agreement)$")

_PLACES = re.compile(r"(?<![\w.:/])(?:/[^\s/:'\",]+)+/(?=[^\s/:'\",])")


@dataclass(frozen=True)
class Series:
    """A number over the training.

    Attributes:
        steps: updates done, rising.
        values: NaN where the run met a number that was not finite.
    """

    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    @property
    def finite(self) -> list[float]:
        """The values that are numbers."""
        return [value for value in self.values if math.isfinite(value)]


@dataclass(frozen=True)
class History:
    """What a training logged.

    Attributes:
        train: of ``train`` lines, by name.
        dice: validation Dice, 0 .. 1, by output, the deployed one first.
        cost: the last ``cost`` line: ``seconds`` and so on; empty for a run that did not measure it.
    """

    train: dict[str, Series]
    dice: dict[str, Series]
    cost: dict[str, float]

    @property
    def losses(self) -> dict[str, Series]:
        """``loss`` and its terms."""
        return {name: series for name, series in self.train.items() if not _is_monitor(name)}

    @property
    def monitors(self) -> dict[str, Series]:
        """What methods log beside their losses, such as the ramp of a weight."""
        return {name: series for name, series in self.train.items() if _MONITOR.search(name)}

    def named(self, prefix: str) -> dict[str, Series]:
        """The series whose names begin so, without the prefix."""
        return {name.removeprefix(prefix): s for name, s in self.train.items() if name.startswith(prefix)}

    @property
    def best(self) -> tuple[int, float] | None:
        """Step and value of the best validation Dice of the deployed output: what chose ``best.pt``."""
        deployed = next(iter(self.dice.values()), Series())
        pairs = [pair for pair in zip(deployed.steps, deployed.values, strict=True) if math.isfinite(pair[1])]
        return max(pairs, key=lambda pair: (pair[1], -pair[0]), default=None)

    @property
    def not_finite(self) -> int:
        """Logged values that were NaN or infinite; the speed of the first moment is none."""
        some = [s for name, s in self.train.items() if name != SPEED]
        return sum(len(s.values) - len(s.finite) for s in (*some, *self.dice.values()))


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
        overrides: words of the command line.
        diff_lines: length of the kept ``git.diff``; 0 when there is none.
        sam_weights: what became of SAM's weights, some lines; empty when the run does not say.
        history: what it logged.
        scores: on the split; None when it has none.
        unscored: what to do about that.
    """

    name: str
    folder: str
    seed: int
    settings: Mapping[str, Any]
    status: Mapping[str, Any]
    splits: Mapping[str, Any]
    environment: Mapping[str, Any]
    overrides: list[str]
    diff_lines: int
    sam_weights: str
    history: History
    scores: Run | None
    unscored: str = ""

    @property
    def method(self) -> str:
        """``knowsam``, or ``supervised + SKD``."""
        skd = any(key == "skd" or key.startswith("skd.") for key, value in self.settings.items() if value is not None)
        return str(self.settings.get("method.name", "unknown")).rpartition(":")[2] + (" + SKD" if skd else "")

    @property
    def step(self) -> int | None:
        """Updates done; None when nothing tells."""
        if isinstance(self.status.get("step"), int):
            return self.status["step"]
        return max((s.steps[-1] for s in self.history.train.values() if s.steps), default=None)

    @property
    def state(self) -> str:
        """``complete``, ``running``, ``interrupted``, ``failed`` or ``unknown``."""
        return str(self.status.get("state") or "unknown")


def read_records(words: Sequence[str], reader: Reader) -> list[Record]:
    """Read the runs that the words name, in their order.

    Args:
        words: run folders, also as ``NAME=FOLDER`` and with patterns, as for ``compare``.
        reader: how folders are read, and the split.
    Raises:
        NotFoundError: a word names no folder, or a folder without a run.
        ConfigError: a folder or a name twice.
        DataError: a file that cannot be read.
    """
    named = [pair for word in words for pair in expand(word)]
    seen: set[str] = set()
    for _, folder in named:
        if (real := os.path.realpath(folder)) in seen:
            raise ConfigError(f"{folder} is named twice", hint="Give each run once.")
        seen.add(real)
    names = _names([(name, os.path.realpath(folder), reader.settings(folder)[1]) for name, folder in named])
    return [read_record(folder, reader, name) for name, (_, folder) in zip(names, named, strict=True)]


def read_record(folder: str | os.PathLike, reader: Reader, name: str) -> Record:
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
    scored = (run.evaluation / f"{reader.split}.json").is_file()
    return Record(
        name=name,
        folder=str(run),
        seed=seed,
        settings={key: without_places(value) for key, value in reader.flatten(_text(run.config)).items()},
        status=run.read_status(),
        splits=run.read_json(run.splits),
        environment=run.read_json(run.environment),
        overrides=[str(without_places(word)) for word in _text(run.overrides).splitlines()],
        diff_lines=len(_text(run.diff).splitlines()),
        sam_weights=str(without_places(_text(run.sam_weights))).strip(),
        history=read_history(read_metrics(run.metrics)),
        # Every run is a setting of its own: what one differs in from another is told by its name.
        scores=read_run(folder, reader, setting=name, experiment=experiment) if scored else None,
        unscored="" if scored else f"no scores on {reader.split}. {how_to_score(reader.split, Path(folder).name)}",
    )


def read_history(records: Iterable[Mapping[str, Any]]) -> History:
    """Sort the lines of a ``metrics.jsonl``."""
    train: dict[str, Series] = {}
    dice: dict[str, Series] = {}
    cost: dict[str, float] = {}
    for record in records:
        kind = record.get("kind")
        values = {k: _number(v) for k, v in record.items() if k not in ("step", "kind") and _is_number(v)}
        if kind == "cost":
            cost = {name: value for name, value in values.items() if math.isfinite(value)}
        elif kind in ("train", "val"):
            for name, value in values.items():
                if kind == "val" and not name.startswith("dice_"):
                    continue
                series = (train if kind == "train" else dice).setdefault(name.removeprefix("dice_"), Series())
                series.steps.append(record["step"])
                series.values.append(value)
    return History(train, dice, cost)


def without_places(value: Any) -> Any:
    """Text, or a list of it, with ``.../name`` for each absolute path: a page may be shown to anybody."""
    if isinstance(value, list):
        return [without_places(item) for item in value]
    return _PLACES.sub("…/", value) if isinstance(value, str) else value


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


def _is_monitor(name: str) -> bool:
    return bool(_MONITOR.search(name)) or name.startswith((RATE, NORM, WEIGHTS, TOP, ERROR)) or name == SPEED


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def shown(value: Any) -> str:
    """A setting as text: ``null``, ``true``, ``[1, 2]``, or the words themselves."""
    return value if isinstance(value, str) else json.dumps(value, default=str)
