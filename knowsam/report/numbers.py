"""Scores as a reader sees them: names of metrics, percent or pixels, and in one sentence the rule behind them."""

from collections.abc import Mapping, Sequence
from typing import Any

from knowsam.engine.scores import IMAGE_LEVEL
from knowsam.inference.postprocess import describe
from knowsam.metrics.segmentation import DISTANCE_METRICS, PIXEL_METRICS

NONE = "-"
"""Stands for a number that does not exist."""

LENGTHS = ("hd95", "asd")
"""Metrics that are distances; the others are fractions, 0 .. 1."""

_NAMES = {"dice": "Dice", "iou": "IoU", "hd95": "HD95", "asd": "ASD", "nsd": "NSD"}
_NAMES |= {name: name.replace("_", " ") for name in (*PIXEL_METRICS, *IMAGE_LEVEL)}


def metric_name(metric: str, unit: str, *, arrow: bool = True) -> str:
    """``Dice % ↑`` or ``HD95 px ↓``; the arrow points to the better side.

    Args:
        metric: such as ``dice``.
        unit: of distances, ``px`` or ``mm``.
        arrow: whether there is one.
    """
    if metric in LENGTHS:
        return f"{_NAMES[metric]} {unit}" + (" ↓" if arrow else "")
    return f"{_NAMES[metric]} %" + (" ↑" if arrow else "")


def scale(metric: str) -> float:
    """What a score is multiplied by to be shown: 100 for Dice, IoU and NSD, which are shown in percent; else 1."""
    return 1.0 if metric in LENGTHS else 100.0


def number(metric: str, value: float | None, *, signed: bool = False) -> str:
    """Two decimals, in percent or in the unit of distances; ``-`` for None.

    Args:
        metric: what the value is of.
        value: a fraction or a distance.
        signed: a plus before what is larger than zero.
    """
    if value is None:
        return NONE
    scaled = value * scale(metric)
    # No "-0.00": a difference that rounds to nothing has no sign.
    return f"{round(scaled, 2) + 0.0:{'+' if signed and round(scaled, 2) else ''}.2f}"


def mean_sd(metric: str, mean: float | None, sd: float | None, *, signed: bool = False) -> str:
    """``70.36 ± 2.10``; without the sd where there is none, as of a single value.

    Args:
        metric: what the values are of.
        mean, sd: fractions or distances.
        signed: a plus before a mean that is larger than zero.
    """
    text = number(metric, mean, signed=signed)
    return text if sd is None else f"{text} ± {number(metric, sd)}"


def exact(value: object) -> str:
    """For files that programs read: ten significant digits, more than any score carries, and the same on every machine
    that computes alike; empty for None."""
    if value is None:
        return ""
    return f"{value:.10g}" if isinstance(value, float) else str(value)


def scoring_rule(scores: Mapping[str, Any], metrics: Sequence[str], units: str) -> str:
    """What the numbers are, and what became of cases without a structure, in one sentence.

    Args:
        scores: what ``load_evaluation`` gives.
        metrics: that are shown.
        units: of distances.
    """
    text = f"{scores['num_cases']} {scores['split']} cases, metric rules {scores['metric_rules']}"
    if set(metrics) & set(DISTANCE_METRICS):
        text += f", distances in {units}"
    if "nsd" in metrics:
        text += f", NSD within {scores['nsd_tolerance']:g} {units}"
    empty = "left out of the means" if scores["empty"] == "exclude" else "counted as right"
    text += f"; missed or false structures count as Dice 0 and the image's diagonal; empty on both sides: {empty}"
    ignored = scores.get("ignored")
    if ignored:
        share = f"{100 * ignored['share']:.2g} % of all pixels"
        text += f"; pixels of which nothing is known are left out ({share}, in {ignored['cases']} cases)"
    return text + "."


def postprocessing(scores: Mapping[str, Any], output: str) -> str:
    """What was done to an output's predictions before they were scored, in words; empty where nothing was asked for.

    Args:
        scores: what ``load_evaluation`` gives.
        output: one of its outputs.
    """
    found = scores.get("postprocess")
    if not found:
        return ""
    chosen = " (chosen on validation)" if found["asked"] == "auto" else ""
    return describe(found["applied"].get(output)) + chosen
