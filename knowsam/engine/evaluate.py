"""Score whatever answers with logits, on the cases of a split. Knows nothing of training.

``evaluate`` serves the evaluate command, on either split; ``validate`` is the training loop's and has no word for the
test split, so a checkpoint cannot be chosen on it by mistake.
"""

import contextlib
import csv
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO

import numpy as np
import torch

from knowsam.data.source import Source
from knowsam.errors import DataError, NotFoundError, StorageError
from knowsam.inference.predict import PredictFn, Resize, predict_cases
from knowsam.metrics.segmentation import (
    EMPTY_MODES,
    METRIC_NAMES,
    METRIC_RULES,
    NSD_TOLERANCE,
    OVERLAP_METRICS,
    STATUSES,
    case_metrics,
    counts_in_mean,
)

if TYPE_CHECKING:
    from rich.table import Table

FORMAT = 1
"""Layout of the JSON file; raise it when a key changes its meaning."""

MEAN = "mean"
"""Name of the row that averages over classes; no class may bear it."""

Spacing = Literal["source"] | Sequence[float] | None

_TITLES = {"dice": "Dice %", "iou": "IoU %", "hd95": "HD95", "asd": "ASD", "nsd": "NSD %"}


@dataclass(frozen=True)
class Evaluation:
    """The scores of one model on one split, case by case.

    Attributes:
        rows: one dict per case, output and class with ``case``, ``output``, ``class``, ``dice``, ``iou``, ``hd95``,
            ``asd``, ``nsd`` (the last three None without distances) and ``status`` (see ``metrics.segmentation``).
        split: ``"val"`` or ``"test"``.
        outputs: names in the method's order, the deployed one first.
        class_names: of the K - 1 foreground classes.
        unit: of HD95, ASD and the NSD tolerance: ``"mm"`` or ``"px"``.
        nsd_tolerance: in ``unit``.
        empty: whether ``"include"`` or ``"exclude"`` rows of status ``empty_both`` in means.
        distances: whether HD95, ASD and NSD were measured.
        metric_rules: ``METRIC_RULES`` of the code that scored.
        checkpoint: which weights were scored and how they were chosen: ``file``, ``step``, ``chosen_by`` (words),
            ``split`` and ``value`` (the split and the score that chose; None when none did). None when the model did
            not come from a run's checkpoint.
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
    _summary: dict = field(default_factory=dict, repr=False, compare=False)

    @property
    def cases(self) -> list[str]:
        """Case ids in the order in which they were scored."""
        return list(dict.fromkeys(row["case"] for row in self.rows))

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics that were measured."""
        return METRIC_NAMES if self.distances else OVERLAP_METRICS

    def summary(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Mean and spread, ``[output][class]`` with one more class ``"mean"``.

        Returns:
            Per output and class: ``{metric: {"mean": float | None, "sd": float | None}}``, ``n`` (cases in the mean),
            ``cases`` (all), and the counts of ``ok``, ``empty_both``, ``missed`` and ``false_positive``. ``sd`` is over
            cases, with n - 1. A value that does not exist is None: a mean of no case, an sd of fewer than two.

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
        return result | {MEAN: overall}

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
        return value

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
            "summary": self.summary(),
        }

    def write(self, folder: str | os.PathLike, stem: str) -> list[Path]:
        """Write ``<stem>_cases.csv``, ``<stem>_summary.csv`` and ``<stem>.json``; each appears whole or not at all.

        Dice, IoU and NSD go from 0 to 1, distances are in ``unit``, and a field is empty where a value does not exist.
        The summary CSV has 4 digits, for reading. The cases CSV and the JSON keep full precision: rounded scores of two
        models tie where the models differ, and a paired test drops or shares the ranks of such cases. Text that a
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
        summary_rows = [
            [output, name]
            + [row[metric][key] for metric in self.metrics for key in ("mean", "sd")]
            + [row[count] for count in counts]
            for output, classes in self.summary().items()
            for name, row in classes.items()
        ]
        summary_head = ["output", "class", *(f"{m}_{key}" for m in self.metrics for key in ("mean", "sd")), *counts]
        case_head = ["case", "output", "class", *METRIC_NAMES, "status"]
        paths = [folder / f"{stem}_cases.csv", folder / f"{stem}_summary.csv", folder / f"{stem}.json"]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with _whole_file(paths[0]) as file:
                _write_csv(file, case_head, [[_exactly(row[key]) for key in case_head] for row in self.rows])
            with _whole_file(paths[1]) as file:
                _write_csv(file, summary_head, summary_rows)
            with _whole_file(paths[2]) as file:
                json.dump(self.to_dict(), file, indent=2, ensure_ascii=False, allow_nan=False)
                file.write("\n")
        except OSError as error:
            raise StorageError(f"cannot write the scores to {folder}: {error}", hint="Free some space.") from error
        return paths

    def table(self) -> "Table":
        """For the console: a row per output and class, mean ± sd over cases; Dice, IoU and NSD in percent."""
        # Of the deployed output alone: a sum over outputs would be larger than the number of masks.
        counts = _counts([row for row in self.rows if row["output"] == self.outputs[0]])
        table = _table(
            f"{self.split}: {_plural(len(self.cases), 'case')}, mean ± sd over cases"
            + (f", distances in {self.unit}" if self.distances else "")
            + f"; {_plain(self.outputs[0])}: {counts['missed']} missed, {counts['false_positive']} false positive, "
            f"{counts['empty_both']} empty in both",
            ("output", "class"),
            self.metrics,
            self.unit,
        )
        table.caption = _rule_in_words(self.empty, self.metrics, self.nsd_tolerance, self.unit)
        for output, classes in self.summary().items():
            # A mean over one class would only repeat the line above it.
            shown = {name: row for name, row in classes.items() if name != MEAN or len(self.class_names) > 1}
            for i, (name, row) in enumerate(shown.items()):
                table.add_row(
                    _plain(output) if i == 0 else "",
                    _plain(name),
                    *_cells(row, self.metrics),
                    _empties(row),
                    end_section=i == len(shown) - 1,
                )
        return table


def evaluate(
    method_predict: PredictFn,
    source: Source,
    split: str,
    *,
    outputs: Sequence[str] | None = None,
    image_size: int,
    batch_size: int,
    device: torch.device | str,
    class_names: Sequence[str] | None = None,
    spacing: Spacing = "source",
    nsd_tolerance: float = NSD_TOLERANCE,
    distances: bool = True,
    empty: str = "exclude",
    autocast: torch.dtype | None = None,
    resize: Resize | None = None,
    read_ahead: int = 4,
    progress: Callable[[int, int], None] | None = None,
    cases: Sequence[str] | None = None,
) -> Evaluation:
    """Predict every case of a split at native resolution and score it. The training loop calls ``validate`` instead.

    Args:
        method_predict: (B, 3, S, S) in 0..1 -> logits (B, K, h, w) by output name; eval mode and no_grad are set here.
        source: the data set; images and masks of ``split`` are read, nothing else.
        split: ``"val"`` or ``"test"``.
        outputs: names to score, the deployed one first; all that ``method_predict`` gives if None.
        image_size: S, side of the square the network sees, in pixels.
        batch_size: images or slices at a time, >= 1.
        device: where the network lives.
        class_names: of the K - 1 foreground classes; ``class 1`` and so on if None.
        spacing: ``"source"`` measures in mm when the source knows the spacing of every case, in pixels when of none;
            one tuple in mm for all cases; or None for pixels.
        nsd_tolerance: >= 0, in mm or pixels as the distances are.
        distances: False leaves HD95, ASD and NSD out, which is quick.
        empty: whether cases where target and prediction both lack a class ``"include"`` or ``"exclude"`` in its means.
        autocast: bfloat16 or float16 for the network; None computes in its own precision.
        resize: how images come to S x S; the training reader's if None.
        read_ahead: cases that a background thread reads while the network works.
        progress: called as ``progress(done, total)`` after each case.
        cases: ids to score instead of a split's, which ``split`` then only names.
    Raises:
        DataError: the split is empty, a mask does not fit its image or the classes, only some cases have a spacing.
        ValueError: another split, an output that does not exist, logits of another K, class names that do not fit.
        NumericError: logits that are not finite.
    """
    if cases is None and split not in ("val", "test"):
        raise ValueError(f"split is {split!r}; allowed: 'val', 'test'")
    if empty not in EMPTY_MODES:
        raise ValueError(f"empty is {empty!r}; allowed: {', '.join(map(repr, EMPTY_MODES))}")
    names = _class_names(class_names, source.num_classes)
    case_ids = list(source.eval_ids(split) if cases is None else cases)
    if not case_ids:
        raise DataError(f"split {split!r} holds no case", hint="Name its cases in the split list, or make a split.")
    spacings, unit = _spacings(source, case_ids, spacing if distances else None)

    predictions = predict_cases(
        method_predict,
        source,
        case_ids,
        image_size=image_size,
        batch_size=batch_size,
        device=device,
        num_classes=source.num_classes,
        outputs=outputs,
        autocast=autocast,
        resize=resize,
        read_ahead=read_ahead,
    )
    rows: list[dict[str, Any]] = []
    found: tuple[str, ...] = ()
    # Closed at once when something below raises: the module must be back in training mode, and the reader gone.
    with contextlib.closing(predictions):
        for done, (case_id, labels) in enumerate(predictions, start=1):
            found = found or tuple(labels)
            mask = source.mask(case_id)
            for output, prediction in labels.items():
                try:
                    records = case_metrics(
                        prediction,
                        mask,
                        num_classes=source.num_classes,
                        spacing=spacings[case_id],
                        nsd_tolerance=nsd_tolerance,
                        distances=distances,
                    )
                except ValueError as error:
                    raise DataError(f"case {case_id!r}, output {output!r} cannot be scored: {error}") from error
                rows += [
                    {"case": case_id, "output": output, "class": names[record.class_id - 1]}
                    | {metric: getattr(record, metric) for metric in METRIC_NAMES}
                    | {"status": record.status}
                    for record in records
                ]
            if progress is not None:
                progress(done, len(case_ids))
    return Evaluation(rows, split, found, names, unit, float(nsd_tolerance), empty, distances)


def validate(
    method_predict: PredictFn,
    source: Source,
    *,
    outputs: Sequence[str] | None = None,
    image_size: int,
    batch_size: int,
    device: torch.device | str,
    class_names: Sequence[str] | None = None,
    autocast: torch.dtype | None = None,
    resize: Resize | None = None,
    read_ahead: int = 4,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Dice and IoU on the validation split: what training may look at. There is no argument for another split.

    Args:
        As for ``evaluate``.
    Raises:
        DataError: as ``evaluate``, and when no validation mask holds any foreground, so that no Dice could choose.
    """
    result = evaluate(
        method_predict,
        source,
        "val",
        outputs=outputs,
        image_size=image_size,
        batch_size=batch_size,
        device=device,
        class_names=class_names,
        distances=False,
        autocast=autocast,
        resize=resize,
        read_ahead=read_ahead,
        progress=progress,
    )
    if not any(row["status"] in ("ok", "missed") for row in result.rows):
        raise DataError(
            f"none of the {len(result.cases)} validation masks holds any foreground",
            hint="Add validation cases that show the structure; a checkpoint cannot be chosen on empty ones.",
        )
    return result


def load_evaluation(path: str | os.PathLike) -> dict[str, Any]:
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


def comparison_table(named: Mapping[str, Evaluation | dict[str, Any] | str | os.PathLike]) -> "Table":
    """Several runs beside each other: a row per run and output, mean over classes, mean ± sd over cases.

    Args:
        named: by the name to show, an ``Evaluation``, what ``load_evaluation`` gives, or the path of a JSON file.
    Raises:
        ValueError: nothing to compare.
        DataError: the runs were scored by different rules, units, splits, classes or cases, or a file cannot be read.
    """
    if not named:
        raise ValueError("nothing to compare; at least one evaluation is needed")
    loaded: dict[str, dict[str, Any]] = {}
    for name, item in named.items():
        if isinstance(item, Evaluation):
            loaded[name] = item.to_dict()
        else:
            loaded[name] = item if isinstance(item, dict) else load_evaluation(item)
    _refuse_mixture(loaded)
    first = next(iter(loaded.values()))
    metrics = tuple(metric for metric in METRIC_NAMES if any(metric in item["metrics"] for item in loaded.values()))
    # The unit of a run without distances says nothing.
    unit = next((item["unit"] for item in loaded.values() if _has_distances(item)), first["unit"])
    table = _table(
        f"{first['split']}: {_plural(first['num_cases'], 'case')}, "
        f"mean over {_plural(len(first['class_names']), 'class', 'classes')}, mean ± sd over cases"
        + (f", distances in {unit}" if len(metrics) > len(OVERLAP_METRICS) else ""),
        ("run", "output"),
        metrics,
        unit,
    )
    table.caption = _rule_in_words(first["empty"], metrics, first["nsd_tolerance"], unit)
    for name, item in loaded.items():
        for i, (output, classes) in enumerate(item["summary"].items()):
            row = classes[MEAN]
            table.add_row(
                _plain(name) if i == 0 else "",
                _plain(output),
                *_cells(row, metrics),
                _empties(row),
                end_section=i == len(item["summary"]) - 1,
            )
    return table


def _refuse_mixture(loaded: Mapping[str, dict[str, Any]]) -> None:
    """Numbers that were made by different rules must not stand in one table."""
    keys = ["metric_rules", "empty", "split", "num_cases", "cases_sha256", "class_names"]
    measured = {name: item for name, item in loaded.items() if _has_distances(item)}
    for group, group_keys in ((loaded, keys), (measured, ["unit", "nsd_tolerance"])):
        for key in group_keys:
            values = {name: item.get(key) for name, item in group.items()}
            if len({json.dumps(value) for value in values.values()}) > 1:
                told = "; ".join(f"{name}: {value}" for name, value in values.items())
                raise DataError(
                    f"these runs cannot be compared, their {key} differs ({told})",
                    hint="Evaluate them again with the same data, split and settings.",
                )


def _has_distances(item: Mapping[str, Any]) -> bool:
    return "hd95" in item["metrics"]


def _class_names(given: Sequence[str] | None, num_classes: int) -> tuple[str, ...]:
    if given is None:
        return tuple(f"class {i}" for i in range(1, num_classes))
    names = tuple(given)
    if len(names) != num_classes - 1 or len(set(names)) != len(names) or MEAN in names:
        raise ValueError(
            f"class_names is {list(names)}; allowed: {num_classes - 1} different names of the foreground classes, "
            f"none of them {MEAN!r}"
        )
    return names


def _spacings(
    source: Source, case_ids: Sequence[str], spacing: Spacing
) -> tuple[dict[str, tuple[float, ...] | None], str]:
    """mm per axis of every case, or None of every case; and the unit."""
    if spacing is None:
        return dict.fromkeys(case_ids), "px"
    if not isinstance(spacing, str):
        return dict.fromkeys(case_ids, tuple(float(s) for s in spacing)), "mm"
    if spacing != "source":
        raise ValueError(f"spacing is {spacing!r}; allowed: 'source', numbers in mm, or None for pixels")
    known = {case_id: source.spacing(case_id) for case_id in case_ids}
    without = [case_id for case_id, value in known.items() if value is None]
    if without and len(without) < len(case_ids):
        # A mean over millimetres and pixels is neither.
        raise DataError(
            f"{len(without)} of {len(case_ids)} cases have no spacing, {without[0]!r} for one",
            hint="Add the spacing to these cases, or measure all of them in pixels with spacing None.",
        )
    return known, "px" if without else "mm"


def _mean_sd(values: Sequence[float]) -> dict[str, float | None]:
    return {
        "mean": float(np.mean(values)) if values else None,
        "sd": float(np.std(values, ddof=1)) if len(values) > 1 else None,
    }


def _counts(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    return {"cases": len(rows)} | {status: sum(row["status"] == status for row in rows) for status in STATUSES}


def _digest(cases: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(sorted(cases)).encode()).hexdigest()


@contextlib.contextmanager
def _whole_file(path: Path) -> Iterator[TextIO]:
    """Write beside and rename, so that a reader or a crash never meets half a file."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(beside, "w", encoding="utf-8", newline="") as file:
            yield file
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def _write_csv(file: TextIO, head: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(head)
    writer.writerows([_csv_field(value) for value in row] for row in rows)


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


def _table(title: str, texts: Sequence[str], metrics: Sequence[str], unit: str) -> "Table":
    from rich import box
    from rich.table import Table

    # A log or a pipe has 80 columns. There "±sd" goes below the mean, but no digit may be cut off: hence the least
    # widths, the narrow padding, and one column for three counts.
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.title_justify = table.caption_justify = "left"
    for name in texts:
        table.add_column(name, overflow="fold")
    table.add_column("n", justify="right", min_width=3, overflow="fold")
    for metric in metrics:
        name = _TITLES[metric] + (f" {unit}" if metric in ("hd95", "asd") else "")
        table.add_column(name, justify="right", min_width=7, overflow="fold")
    table.add_column("missed/ false/ empty", justify="right", min_width=7, overflow="fold")
    return table


def _cells(row: Mapping[str, Any], metrics: Sequence[str]) -> list[str]:
    """Number of counted cases (``n/cases`` if fewer than all), then mean ± sd of each metric."""
    n = str(row["n"]) if row["n"] == row["cases"] else f"{row['n']}/{row['cases']}"
    return [n, *(_mean_sd_text(row.get(metric), percent=metric not in ("hd95", "asd")) for metric in metrics)]


def _empties(row: Mapping[str, Any]) -> str:
    return "/".join(str(row[status]) for status in ("missed", "false_positive", "empty_both"))


def _mean_sd_text(value: Mapping[str, float | None] | None, *, percent: bool) -> str:
    if value is None or value["mean"] is None:
        return "-"
    factor = 100 if percent else 1
    sd = "" if value["sd"] is None else f" ±{value['sd'] * factor:.2f}"
    return f"{value['mean'] * factor:.2f}{sd}"


def _rule_in_words(empty: str, metrics: Sequence[str], nsd_tolerance: float, unit: str) -> str:
    parts = ["missed and false positive count as Dice 0"]
    if "hd95" in metrics:
        parts[0] += " and the image's diagonal"
        parts.append(f"NSD within {nsd_tolerance:g} {unit}")
    parts.append("empty in both: " + ("left out of the means" if empty == "exclude" else "counted as right"))
    return "; ".join(parts)


def _plain(text: str) -> str:
    """Names are shown as they are: square brackets in them are no markup."""
    from rich.markup import escape

    return escape(text)


def _plural(count: int, one: str, many: str = "") -> str:
    return f"{count} {one if count == 1 else many or one + 's'}"
