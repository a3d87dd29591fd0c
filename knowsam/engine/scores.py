"""The scores of one model on one split: case by case, their summary, and the files that keep them."""

import csv
import hashlib
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from knowsam.errors import DataError, NotFoundError
from knowsam.files import storage_error, write_text
from knowsam.metrics.segmentation import (
    MAIN_METRICS,
    METRIC_NAMES,
    METRIC_RULES,
    NSD_TOLERANCE,
    OVERLAP_METRICS,
    STATUSES,
    counts_in_mean,
)

FORMAT = 1
"""Layout of the JSON file; raise it when a key changes its meaning."""

IMAGE_LEVEL = ("image_sensitivity", "image_specificity")
"""Of the cases that show a structure the share where it was found; of the others the share where none was."""

MEAN = "mean"
"""Name of the row that averages over classes; no class may bear it."""


@dataclass(frozen=True)
class Evaluation:
    """The scores of one model on one split, case by case.

    Attributes:
        rows: one dict per case, output and class with ``case``, ``output``, ``class``, every one of ``METRIC_NAMES``
            (``hd95``, ``asd``, ``nsd`` None without distances) and ``status`` (see ``metrics.segmentation``).
        split: ``"val"`` or ``"test"``.
        outputs: names in the method's order, the deployed one first.
        class_names: of the K - 1 foreground classes.
        unit: of HD95, ASD and the NSD tolerance: ``"mm"`` or ``"px"``.
        nsd_tolerance: in ``unit``.
        empty: whether ``"include"`` or ``"exclude"`` rows of status ``empty_both`` in means.
        distances: whether HD95, ASD and NSD were measured.
        metric_rules: ``METRIC_RULES`` of the code that scored.
        checkpoint: which weights were scored and how they were chosen: ``file``, ``step``, ``outputs`` (all that these
            weights have), ``chosen_by`` (text), ``split`` and ``value`` (the split and the score that chose; None when
            none did). None when the model did not come from a run's checkpoint.
        postprocess: ``asked`` (as in ``evaluate.postprocess``) and ``applied`` (output -> spec); None for nothing.
        dataset: name of the experiment whose data these are; None for the data that the run was trained for.
        groups: case -> subgroup, of the cases that have one.
        grouped_by: what the subgroups are, in words; empty without any.
        ignored: pixels that were left out because nothing is known of them: ``cases`` that have some, ``share`` of all
            pixels. None when there are none.
        near_duplicates: case -> group, of the cases that show nearly the same as another of them; None when none does.
    """

    rows: list[dict[str, Any]]
    split: str
    outputs: tuple[str, ...]
    class_names: tuple[str, ...]
    unit: str
    nsd_tolerance: float = NSD_TOLERANCE
    empty: str = "exclude"
    distances: bool = True
    metric_rules: str = METRIC_RULES
    checkpoint: Mapping[str, Any] | None = None
    postprocess: Mapping[str, Any] | None = None
    dataset: str | None = None
    groups: Mapping[str, str] | None = None
    grouped_by: str = ""
    ignored: Mapping[str, float] | None = None
    near_duplicates: Mapping[str, str] | None = None
    _summary: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def cases(self) -> list[str]:
        """Case ids in the order in which they were scored."""
        return list(dict.fromkeys(row["case"] for row in self.rows))

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics that were measured."""
        names = METRIC_NAMES if self.distances else OVERLAP_METRICS
        return tuple(name for name in names if not self.rows or name in self.rows[0])

    def summary(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Mean and spread, ``[output][class]`` with one more class ``"mean"``.

        Returns:
            Per output and class: ``{metric: {"mean": float | None, "sd": float | None}}``, ``n`` (cases in the mean),
            ``cases`` (all), and the counts of ``ok``, ``empty_both``, ``missed`` and ``false_positive``. ``sd`` is over
            cases, with n - 1. A value that does not exist is None: a mean of no case, an sd of fewer than two. Beside
            them ``image_sensitivity`` and ``image_specificity``, see ``image_level``.

            ``"mean"``: ``mean`` is the mean over classes of the classes' means, so a rare class weighs as much as a
            common one; a class without a counted case is left out, and ``classes`` says how many took part. ``sd`` is
            that of the cases' own means over their counted classes, and ``n`` the number of such cases; the counts
            are sums over the classes.
        """
        if not self._summary:
            self._summary.update({output: self._summarise(output) for output in self.outputs})
        return self._summary

    def _summarise(self, output: str) -> dict[str, dict[str, Any]]:
        rows = [row for row in self.rows if row["output"] == output]
        counted = [row for row in rows if counts_in_mean(row["status"], self.empty)]
        result: dict[str, dict[str, Any]] = {}
        for name in self.class_names:
            of_class = [row for row in counted if row["class"] == name]
            result[name] = {metric: _mean_sd([row[metric] for row in of_class]) for metric in self.metrics}
            result[name] |= _counts([row for row in rows if row["class"] == name]) | {"n": len(of_class)}
        took_part = [name for name in self.class_names if result[name]["n"]]
        by_case: dict[str, list[dict[str, Any]]] = {}
        for row in counted:
            by_case.setdefault(row["case"], []).append(row)
        overall: dict[str, Any] = {}
        for metric in self.metrics:
            overall[metric] = {
                "mean": _mean_sd([result[name][metric]["mean"] for name in took_part])["mean"],
                "sd": _mean_sd([float(np.mean([row[metric] for row in some])) for some in by_case.values()])["sd"],
            }
        overall |= _counts(rows) | {"n": len(by_case), "cases": len(self.cases), "classes": len(took_part)}
        result[MEAN] = overall
        for name, row in result.items():
            row |= dict(zip(IMAGE_LEVEL, image_level(result, name), strict=True))
        return result

    def subgroups(self) -> "dict[str, Evaluation]":
        """The scores of each subgroup's cases by its name, sorted; cases without a subgroup are in none."""
        groups = self.groups or {}
        return {
            name: replace(
                self,
                rows=[row for row in self.rows if groups.get(row["case"]) == name],
                groups=None,
                grouped_by="",
                ignored=None,
                near_duplicates=None,
                _summary={},
            )
            for name in sorted({groups[case] for case in self.cases if case in groups})
        }

    def dice(self, output: str | None = None) -> float:
        """The number to choose a checkpoint by: mean over classes of the mean Dice over cases, 0 .. 1.

        Args:
            output: one of ``outputs``; the deployed one if None.
        Raises:
            ValueError: no such output, or no case counts in any mean (``validate`` refuses such splits beforehand).
        """
        output = self.outputs[0] if output is None else output
        if output not in self.outputs:
            raise ValueError(f"no output {output!r}; allowed: {', '.join(map(repr, self.outputs))}")
        value = self.summary()[output][MEAN]["dice"]["mean"]
        if value is None:
            raise ValueError(f"split {self.split!r} holds no foreground, in masks or predictions: there is no Dice")
        return float(value)

    def to_dict(self) -> dict[str, Any]:
        """What ``<stem>.json`` holds: the summary and everything that decides whether two of them may be compared."""
        return {
            "format": FORMAT,
            "split": self.split,
            "num_cases": len(self.cases),
            "cases_sha256": _digest(self.cases),
            "outputs": list(self.outputs),
            "class_names": list(self.class_names),
            "metrics": list(self.metrics),
            "unit": self.unit,
            "metric_rules": self.metric_rules,
            "nsd_tolerance": self.nsd_tolerance,
            "empty": self.empty,
            **({} if self.checkpoint is None else {"checkpoint": dict(self.checkpoint)}),
            **({} if self.postprocess is None else {"postprocess": dict(self.postprocess)}),
            **({} if self.dataset is None else {"dataset": self.dataset}),
            **({} if self.ignored is None else {"ignored": dict(self.ignored)}),
            **({} if not self.near_duplicates else {"near_duplicates": dict(self.near_duplicates)}),
            "summary": self.summary(),
            **({} if not self.groups else {"subgroups": self._subgroup_record()}),
        }

    def _subgroup_record(self) -> dict[str, Any]:
        """What the subgroups are by, how many cases have none, and each one's number of cases and summary."""
        found = self.subgroups()
        grouped = sum(len(group.cases) for group in found.values())
        return {
            "by": self.grouped_by,
            "without": len(self.cases) - grouped,
            "groups": {
                name: {"num_cases": len(group.cases), "summary": group.summary()} for name, group in found.items()
            },
        }

    def write(self, folder: str | os.PathLike[str], stem: str) -> list[Path]:
        """Write ``<stem>_cases.csv``, ``<stem>_summary.csv`` and ``<stem>.json``; each appears whole or not at all.

        Dice, IoU and NSD go from 0 to 1, distances are in ``unit``, and a field is empty where a value does not exist.
        The summary CSV has 4 digits, for reading. The cases CSV and the JSON keep full precision: rounded scores of two
        models tie where the models differ, and a paired test drops or shares the ranks of such cases. Columns that came
        later stand behind those that were there before; ``group`` only where there are subgroups. Text that a
        spreadsheet would take for a formula gets a leading apostrophe in the CSV files.

        Args:
            folder: made if it is not there.
            stem: file name without ending.
        Returns:
            The three paths.
        Raises:
            StorageError: the disk refuses.
        """
        folder = Path(folder)
        counts = ("n", "cases", *STATUSES)
        main = [metric for metric in self.metrics if metric in MAIN_METRICS]
        later = [metric for metric in self.metrics if metric not in main]
        summary_rows = [
            [output, name]
            + [row[metric][key] for metric in main for key in ("mean", "sd")]
            + [row[count] for count in counts]
            + [row[metric][key] for metric in later for key in ("mean", "sd")]
            + [row[rate] for rate in IMAGE_LEVEL]
            for output, classes in self.summary().items()
            for name, row in classes.items()
        ]
        summary_head = ["output", "class", *(f"{m}_{key}" for m in main for key in ("mean", "sd")), *counts]
        summary_head += [*(f"{m}_{key}" for m in later for key in ("mean", "sd")), *IMAGE_LEVEL]
        case_head = ["case", "output", "class", *MAIN_METRICS, "status", *later]
        groups = self.groups or {}
        case_rows = [
            [_exactly(row[key]) for key in case_head] + ([groups.get(row["case"], "")] if groups else [])
            for row in self.rows
        ]
        case_head += ["group"] if groups else []
        paths = [folder / f"{stem}_cases.csv", folder / f"{stem}_summary.csv", folder / f"{stem}.json"]
        cases_csv = _csv(case_head, case_rows)
        whole = json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise storage_error(folder, error) from error
        for path, text in zip(paths, (cases_csv, _csv(summary_head, summary_rows), whole), strict=True):
            write_text(path, text)
        return paths


def image_level(classes: Mapping[str, Mapping[str, Any]], name: str) -> tuple[float | None, float | None]:
    """Image-level sensitivity and specificity: is a structure found where there is one, and none where there is none?

    A structure is there, or found, when one pixel is. Both follow from the counts of a summary, so files that were
    written before they stood there give them too.

    Args:
        classes: class -> row of ``Evaluation.summary``, of one output.
        name: of a class; ``MEAN`` for the mean over the classes that have such cases.
    Returns:
        found / shown and right / absent, 0..1; None where no case shows the structure, or all do.
    """
    if name == MEAN:
        each = [image_level(classes, one) for one in classes if one != MEAN]
        sensitivities, specificities = ([v for v in values if v is not None] for values in zip(*each, strict=True))
        return _mean_sd(sensitivities)["mean"], _mean_sd(specificities)["mean"]
    row = classes[name]
    shown, absent = row["ok"] + row["missed"], row["empty_both"] + row["false_positive"]
    return (row["ok"] / shown if shown else None), (row["empty_both"] / absent if absent else None)


def load_evaluation(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a ``<stem>.json`` that ``Evaluation.write`` left; the result is what ``Evaluation.to_dict`` gives.

    Raises:
        NotFoundError: no such file.
        DataError: not such a file, or one of another format.
    """
    path = Path(path)
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise NotFoundError(f"no scores at {path}", hint="Run the evaluate command first.") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"cannot read scores from {path}: {error}", hint="Run the evaluate command again.") from error
    if not isinstance(loaded, dict) or loaded.get("format") != FORMAT or "summary" not in loaded:
        raise DataError(
            f"{path} is not a scores file of format {FORMAT}", hint="Run the evaluate command again with this version."
        )
    return loaded


def _mean_sd(values: Sequence[float]) -> dict[str, float | None]:
    return {
        "mean": float(np.mean(values)) if values else None,
        "sd": float(np.std(values, ddof=1)) if len(values) > 1 else None,
    }


def _counts(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    return {"cases": len(rows)} | {status: sum(row["status"] == status for row in rows) for status in STATUSES}


def _digest(cases: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(sorted(cases)).encode()).hexdigest()


def _csv(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(head)
    writer.writerows([_csv_field(value) for value in row] for row in rows)
    return file.getvalue()


def _exactly(value: Any) -> Any:
    """A float as the shortest text that reads back to the same float; all else as it is."""
    return repr(float(value)) if isinstance(value, float) and math.isfinite(value) else value


def _csv_field(value: Any) -> Any:
    if value is None:
        return ""
    if isinstance(value, float):
        assert math.isfinite(value), "the metric rules give no NaN"
        return f"{value:.4f}"
    # Spreadsheets run such text as a formula, and case ids come from other people's file names.
    if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")):
        return "'" + value
    return value
