"""Scores as tables for the console: one model's, and several beside each other."""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from knowsam.engine.scores import MEAN, Evaluation, load_evaluation
from knowsam.errors import DataError
from knowsam.metrics.segmentation import METRIC_NAMES, OVERLAP_METRICS

_TITLES = {"dice": "Dice %", "iou": "IoU %", "hd95": "HD95", "asd": "ASD", "nsd": "NSD %"}


def score_table(scores: Evaluation) -> Table:
    """One model: a row per output and class, mean ± sd over cases; Dice, IoU and NSD in percent."""
    # Of the deployed output alone: a sum over outputs would be larger than the number of masks.
    counts = scores.summary()[scores.outputs[0]][MEAN]
    table = _table(
        f"{scores.split}: {_plural(len(scores.cases), 'case')}, mean ± sd over cases"
        + (f", distances in {scores.unit}" if scores.distances else "")
        + f"; {escape(scores.outputs[0])}: {counts['missed']} missed, {counts['false_positive']} false positive, "
        f"{counts['empty_both']} empty in both",
        ("output", "class"),
        scores.metrics,
        scores.unit,
    )
    table.caption = _rule_text(scores.empty, scores.metrics, scores.nsd_tolerance, scores.unit)
    if len(scores.class_names) > 1:
        table.caption += f"; {MEAN}: over the classes' means, its sd over the cases' own means"
    for output, classes in scores.summary().items():
        # A mean over one class would only repeat the line above it.
        shown = {name: row for name, row in classes.items() if name != MEAN or len(scores.class_names) > 1}
        for i, (name, row) in enumerate(shown.items()):
            table.add_row(
                escape(output) if i == 0 else "",
                escape(name),
                *_cells(row, scores.metrics),
                _empties(row),
                end_section=i == len(shown) - 1,
            )
    return table


def comparison_table(named: Mapping[str, Evaluation | dict[str, Any] | str | os.PathLike[str]]) -> Table:
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
    table.caption = _rule_text(first["empty"], metrics, first["nsd_tolerance"], unit)
    for name, item in loaded.items():
        for i, (output, classes) in enumerate(item["summary"].items()):
            row = classes[MEAN]
            table.add_row(
                escape(name) if i == 0 else "",
                escape(output),
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
                found = "; ".join(f"{name}: {value}" for name, value in values.items())
                raise DataError(
                    f"these runs cannot be compared, their {key} differs ({found})",
                    hint="Evaluate them again with the same data, split and settings.",
                )


def _has_distances(item: Mapping[str, Any]) -> bool:
    return "hd95" in item["metrics"]


def _table(title: str, texts: Sequence[str], metrics: Sequence[str], unit: str) -> Table:
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


def _rule_text(empty: str, metrics: Sequence[str], nsd_tolerance: float, unit: str) -> str:
    parts = ["missed and false positive count as Dice 0"]
    if "hd95" in metrics:
        parts[0] += " and the image's diagonal"
        parts.append(f"NSD within {nsd_tolerance:g} {unit}")
    parts.append("empty in both: " + ("left out of the means" if empty == "exclude" else "counted as right"))
    return "; ".join(parts)


def _plural(count: int, one: str, many: str = "") -> str:
    return f"{count} {one if count == 1 else many or one + 's'}"
