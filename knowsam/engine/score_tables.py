"""Scores as tables for the console: one model's, and several beside each other."""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from knowsam.engine.scores import MEAN, Evaluation, image_level, load_evaluation
from knowsam.errors import DataError
from knowsam.inference.postprocess import describe
from knowsam.metrics.segmentation import MAIN_METRICS, PIXEL_METRICS

_TITLES = {"dice": "Dice %", "iou": "IoU %", "hd95": "HD95", "asd": "ASD", "nsd": "NSD %"}
_TITLES |= {"precision": "precision %", "recall": "recall %", "specificity": "specif. %"}


def score_table(scores: Evaluation) -> Table:
    """One model: a row per output and class, mean ± sd over cases; Dice, IoU and NSD in percent."""
    metrics = [metric for metric in scores.metrics if metric in MAIN_METRICS]
    # Of the deployed output alone: a sum over outputs would be larger than the number of masks.
    counts = scores.summary()[scores.outputs[0]][MEAN]
    table = _table(
        f"{_whose(scores)}: {_plural(len(scores.cases), 'case')}, mean ± sd over cases"
        + (f", distances in {scores.unit}" if scores.distances else "")
        + f"; {escape(scores.outputs[0])}: {counts['missed']} missed, {counts['false_positive']} false positive, "
        f"{counts['empty_both']} empty in both",
        ("output", "class"),
        metrics,
        scores.unit,
    )
    table.caption = _rule_text(scores.empty, metrics, scores.nsd_tolerance, scores.unit)
    if scores.ignored is not None:
        many = _plural(int(scores.ignored["cases"]), "case")
        table.caption += f"; {many} with ignored pixels ({100 * scores.ignored['share']:.2g} % of all), left out"
    applied: dict[str, list[str]] = {}
    for output, spec in ((scores.postprocess or {}).get("applied") or {}).items():
        applied.setdefault(describe(spec), []).append(output)
    for what, outputs in applied.items():
        table.caption += f"; post-processing of {escape(', '.join(outputs))}: {what}"
    if len(scores.class_names) > 1:
        table.caption += f"; {MEAN}: over the classes' means, its sd over the cases' own means"
    for output, classes in scores.summary().items():
        # A mean over one class would only repeat the line above it.
        shown = {name: row for name, row in classes.items() if name != MEAN or len(scores.class_names) > 1}
        for i, (name, row) in enumerate(shown.items()):
            table.add_row(
                escape(output) if i == 0 else "",
                escape(name),
                *_cells(row, metrics),
                _empties(row),
                end_section=i == len(shown) - 1,
            )
    return table


def error_table(scores: Evaluation) -> Table:
    """One model: pixels called wrongly (precision, recall, specificity) and structures found or not, image by image."""
    metrics = [metric for metric in scores.metrics if metric in PIXEL_METRICS]
    table = _table(f"{_whose(scores)}: pixels and structures found", ("output", "class"), metrics, scores.unit, last="")
    for name in ("image sens. %", "image spec. %"):
        table.add_column(name, justify="right", min_width=9, overflow="fold")
    table.caption = (
        "pixels: mean ± sd over cases, recall is sensitivity; image sensitivity: of the cases that show the "
        "structure the share where some of it was found; image specificity: of the others the share where none was"
    )
    for output, classes in scores.summary().items():
        shown = {name: row for name, row in classes.items() if name != MEAN or len(scores.class_names) > 1}
        for i, (name, row) in enumerate(shown.items()):
            rates = image_level(classes, name)
            of = (row["ok"], row["ok"] + row["missed"]), (row["empty_both"], row["empty_both"] + row["false_positive"])
            texts = [
                # The mean over classes is no ratio of sums.
                "-" if rate is None else f"{100 * rate:.1f}" + ("" if name == MEAN else f" ({some}/{many})")
                for rate, (some, many) in zip(rates, of, strict=True)
            ]
            table.add_row(
                escape(output) if i == 0 else "",
                escape(name),
                *_cells(row, metrics),
                *texts,
                end_section=i == len(shown) - 1,
            )
    return table


def subgroup_table(scores: Evaluation) -> Table:
    """The deployed output's scores in each subgroup, mean over classes; and the mean of the subgroups' means."""
    metrics = [metric for metric in scores.metrics if metric in MAIN_METRICS]
    found = scores.subgroups()
    without = len(scores.cases) - sum(len(group.cases) for group in found.values())
    output = scores.outputs[0]
    table = _table(
        f"{_whose(scores)}: {escape(output)} by {escape(scores.grouped_by)}", ("subgroup",), metrics, scores.unit
    )
    rows = {name: group.summary()[output][MEAN] for name, group in found.items()}
    for i, (name, row) in enumerate(rows.items()):
        table.add_row(escape(name), *_cells(row, metrics), _empties(row), end_section=i == len(rows) - 1)
    means = []
    for metric in metrics:
        values = [row[metric]["mean"] for row in rows.values() if row[metric]["mean"] is not None]
        mean = {"mean": sum(values) / len(values) if values else None, "sd": None}
        means.append(_mean_sd_text(mean, percent=metric not in ("hd95", "asd")))
    table.add_row("mean of these", str(len(rows)), *means, "")
    if without:
        table.caption = f"{_plural(without, 'case')} in no subgroup"
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
    metrics = tuple(metric for metric in MAIN_METRICS if any(metric in item["metrics"] for item in loaded.values()))
    # The unit of a run without distances says nothing.
    unit = next((item["unit"] for item in loaded.values() if _has_distances(item)), first["unit"])
    table = _table(
        f"{first['split']}: {_plural(first['num_cases'], 'case')}, "
        f"mean over {_plural(len(first['class_names']), 'class', 'classes')}, mean ± sd over cases"
        + (f", distances in {unit}" if "hd95" in metrics else ""),
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
    keys = ["metric_rules", "dataset", "empty", "split", "num_cases", "cases_sha256", "class_names"]
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


def _whose(scores: Evaluation) -> str:
    """The split, with its data set where that is another than the run's own."""
    return f"{escape(scores.dataset)} {scores.split}" if scores.dataset else scores.split


def _table(
    title: str, texts: Sequence[str], metrics: Sequence[str], unit: str, *, last: str = "missed/ false/ empty"
) -> Table:
    # A log or a pipe has 80 columns. There "±sd" goes below the mean, but no digit may be cut off: hence the least
    # widths, the narrow padding, and one column for three counts.
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.title_justify = table.caption_justify = "left"
    for name in texts:
        table.add_column(name, overflow="fold")
    table.add_column("n", justify="right", min_width=3, overflow="fold")
    for metric in metrics:
        name = _TITLES[metric] + (f" {unit}" if metric in ("hd95", "asd") else "")
        width = max(7, len(_TITLES[metric].split()[0]))
        table.add_column(name, justify="right", min_width=width, overflow="fold")
    if last:
        table.add_column(last, justify="right", min_width=7, overflow="fold")
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
