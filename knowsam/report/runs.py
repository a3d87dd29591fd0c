"""One finished run as the report sees it: its settings, its scores, and each case's scores."""

import csv
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from knowsam.engine.runfolder import RunFolder
from knowsam.engine.scores import MEAN, image_level, load_evaluation
from knowsam.errors import DataError, NotFoundError
from knowsam.metrics.segmentation import EMPTY_MODES, STATUSES, counts_in_mean
from knowsam.report.warnings import Warned, logged_warnings, score_warnings

SEED = "train.seed"
"""The setting in which the runs of one setting differ."""

OLD_DIGITS = 4
"""Decimals of a cases file that was written before they were kept in full."""


@dataclass(frozen=True)
class Reader:
    """How run folders are read.

    Attributes:
        split: ``"test"`` or ``"val"``: whose scores.
        flatten: text of a ``config.yaml`` -> dotted key -> value; ValueError for what is none.
        cosmetic: keys that change no result, left out of the settings.
        defaults: text of a ``config.yaml`` -> dotted key -> value that this version takes where the text says nothing;
            empty for a text that this version does not accept.
    """

    split: str
    flatten: Callable[[str], dict[str, Any]]
    cosmetic: frozenset[str]
    defaults: Callable[[str], dict[str, Any]]

    def settings(self, folder: str | os.PathLike[str]) -> tuple[str, int, dict[str, Any]]:
        """Name of the experiment, seed, and every other setting that matters.

        Raises:
            NotFoundError: the folder holds no run.
            DataError: its configuration cannot be read.
        """
        run = RunFolder(folder, create=False)
        try:
            flat = self.flatten(run.config.read_text(encoding="utf-8"))
            seed = int(flat[SEED])
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise DataError(
                f"{run.config} cannot be read: {error!r}", hint="It is the file that train wrote."
            ) from error
        rest = {key: value for key, value in flat.items() if key != SEED and key not in self.cosmetic}
        return str(flat.get("name", "")), seed, rest


@dataclass(frozen=True)
class Run:
    """A finished run and its scores.

    Attributes:
        folder: as it was given; for messages, never for files that are written.
        setting: name of the group of runs that differ in their seed alone.
        experiment: runs of different ones never stand in one table.
        seed: of the run.
        settings: dotted key -> value, without the seed and what changes no result.
        splits: what the run says of its lists (``splits.json``).
        world_size: processes of the training; empty when unknown.
        scores: what ``load_evaluation`` gives.
        rows: of the cases file, scores as numbers.
        rounded: the cases file was written with ``OLD_DIGITS`` decimals.
        dataset: name of the data that were scored, where they are not the run's own; None for its own.
        warnings: what its training was warned of, and what its scores show.
    """

    folder: str
    setting: str
    experiment: str
    seed: int
    settings: Mapping[str, Any]
    splits: Mapping[str, Any]
    world_size: str
    scores: Mapping[str, Any]
    rows: list[dict[str, Any]] = field(repr=False)
    rounded: bool
    dataset: str | None = None
    warnings: tuple[Warned, ...] = ()

    @property
    def outputs(self) -> list[str]:
        """Names of the scored outputs, the deployed one first."""
        return list(self.scores["outputs"])

    @property
    def checkpoint(self) -> Mapping[str, Any] | None:
        """What was scored and how it was chosen; None for scores that do not say."""
        return self.scores.get("checkpoint")

    @property
    def labelled(self) -> int | None:
        """Number of labelled training cases; None when the run does not say."""
        return len(self.splits["labelled"]) if isinstance(self.splits.get("labelled"), list) else None

    def mean(self, output: str, class_name: str, metric: str) -> float | None:
        """The run's own value: the mean over cases; for ``MEAN`` the mean over classes of these. None of no case."""
        found = self.scores["summary"][output][class_name].get(metric)
        return None if found is None else found["mean"]

    def image_level(self, output: str, class_name: str) -> tuple[float | None, float | None]:
        """Image-level sensitivity and specificity, see ``engine.scores.image_level``; also of older scores."""
        return image_level(self.scores["summary"][output], class_name)

    @property
    def alike(self) -> Mapping[str, str]:
        """Case -> group, of the cases that show nearly the same as others; empty where none is known to."""
        found = self.scores.get("near_duplicates")
        return found if isinstance(found, Mapping) else {}

    def case_values(self, output: str, class_name: str, metric: str, digits: int | None = None) -> dict[str, float]:
        """Case -> value, of the cases that count; for ``MEAN`` the mean over the case's classes that count.

        Args:
            output, class_name, metric: of the scores.
            digits: decimals to which every score is rounded first; None for none.
        """
        found: dict[str, list[float]] = {}
        for row in self._counted.get(output, ()):
            if class_name in (row["class"], MEAN):
                value = row[metric]
                found.setdefault(row["case"], []).append(value if digits is None else round(value, digits))
        return {case: math.fsum(values) / len(values) for case, values in found.items()}

    @cached_property
    def _counted(self) -> dict[str, list[dict[str, Any]]]:
        result: dict[str, list[dict[str, Any]]] = {}
        for row in self.rows:
            if counts_in_mean(row["status"], self.scores["empty"]):
                result.setdefault(row["output"], []).append(row)
        return result


def other_data(folder: str | os.PathLike[str], split: str) -> list[str]:
    """Names of the data, other than its own, on which a run has scores of a split; sorted.

    Args:
        folder: of the run.
        split: ``test`` or ``val``.
    """
    end = f"_{split}"
    files = RunFolder(folder, create=False).evaluation.glob(f"*{end}.json")
    return sorted(file.stem.removesuffix(end) for file in files if file.stem != end)


def read_run(
    folder: str | os.PathLike[str], reader: Reader, *, setting: str, experiment: str, dataset: str | None = None
) -> Run:
    """Read what train and evaluate left in a run folder.

    Args:
        folder: of the run.
        reader: how, and whose scores.
        setting, experiment: see ``Run``.
        dataset: one of ``other_data``; None for the run's own data.
    Raises:
        NotFoundError: no run, or it has no scores of the split.
        DataError: a file that cannot be read, or cases and summary that do not belong together.
    """
    run = RunFolder(folder, create=False)
    _, seed, settings = reader.settings(folder)
    stem = f"{dataset}_{reader.split}" if dataset else reader.split
    path = run.evaluation / f"{stem}.json"
    if not path.is_file():
        raise NotFoundError(f"{run} has no scores on {reader.split}", hint=how_to_score(reader.split, str(run)))
    scores = load_evaluation(path)
    rows, rounded = _read_cases(run.evaluation / f"{stem}_cases.csv", scores["metrics"])
    found = Run(
        folder=str(run),
        setting=setting,
        experiment=experiment,
        seed=seed,
        settings=settings,
        splits=run.read_json(run.splits),
        world_size=str(run.read_json(run.environment).get("world_size", "")),
        scores=scores,
        rows=rows,
        rounded=rounded,
        dataset=dataset,
        warnings=(*score_warnings(scores), *logged_warnings(run)),
    )
    _refuse_strangers(found, stem)
    return found


def how_to_score(split: str, folder: str) -> str:
    """The command that scores a run, as a hint.

    Args:
        split: to be scored.
        folder: of the run.
    """
    return f"Score it: knowsam evaluate {folder}" + (f" --split {split}" if split != "test" else "")


def _read_cases(path: Path, metrics: list[str]) -> tuple[list[dict[str, Any]], bool]:
    """The rows with numbers for text, and whether every number has the four decimals of older files."""
    rows, texts = [], []
    try:
        with open(path, encoding="utf-8", newline="") as file:
            for raw in csv.DictReader(file):
                row: dict[str, Any] = {key: _plain(raw[key]) for key in ("case", "output", "class")}
                row["status"] = raw["status"]
                if row["status"] not in STATUSES:
                    raise ValueError(f"status {row['status']!r}")
                texts += [raw[metric] for metric in metrics]
                row |= {metric: float(raw[metric]) for metric in metrics}
                rows.append(row)
    except FileNotFoundError as error:
        raise NotFoundError(
            f"{path} is not there, but its summary is", hint="Run the evaluate command again."
        ) from error
    except (OSError, ValueError, LookupError, TypeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read: {error!r}", hint="Run the evaluate command again.") from error
    return rows, bool(texts) and all(len(text.partition(".")[2]) == OLD_DIGITS for text in texts)


def _plain(text: str) -> str:
    """Undo the apostrophe that keeps spreadsheets from running a name as a formula."""
    return text[1:] if text[:1] == "'" and text[1:2] in ("=", "+", "-", "@", "\t", "\r") else text


def _refuse_strangers(run: Run, stem: str) -> None:
    """Cases and summary are two files: an evaluation that was killed between them, or an edited one, shows here."""
    scores = run.scores
    tolerance = 10.0**-OLD_DIGITS if run.rounded else 1e-9
    belong = scores["empty"] in EMPTY_MODES and len({row["case"] for row in run.rows}) == scores["num_cases"]
    for output in scores["outputs"]:
        for name in scores["class_names"]:
            for metric in scores["metrics"]:
                values = list(run.case_values(output, name, metric).values()) if belong else []
                mean = run.mean(output, name, metric)
                if (mean is None) != (not values):
                    belong = False
                elif mean is not None:
                    # Distances are larger than 1, and so are the rounding errors of their sums.
                    belong = belong and abs(math.fsum(values) / len(values) - mean) <= tolerance * max(1.0, abs(mean))
    if not belong:
        raise DataError(
            f"{run.folder}: evaluation/{stem}_cases.csv and {stem}.json do not belong together",
            hint="Run the evaluate command again.",
        )
