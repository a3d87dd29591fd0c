"""The curves of one run's page, or of several runs beside each other: which there are, and what stands below them."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

from knowsam.report import run_plots as plots
from knowsam.report.page import Figure, figure
from knowsam.report.record import ERROR, NORM, RATE, SPEED, TOP, WEIGHTS, History, Record, Series
from knowsam.report.run_plots import POINTS, Line

TEACHING = ("sam_confidence", "sam_agreement")
"""What KnowSAM logs of SAM's answers on unlabelled images, without any mask."""

_KINDS = {
    "loss": "the sum that is minimised",
    "seg": "supervised, on labelled images",
    "sam": "SAM's own, supervised",
    "skd": "distillation from SAM",
    "entropy": "uncertainty of predictions",
    "consistency": "agreement of predictions",
    "mix": "on mixed images",
}


def curves(records: Sequence[Record]) -> Iterator[Figure]:
    """All over the steps: validation Dice, losses by kind, errors, rates, norms, what the method logs, speed."""
    yield from _dice_curves(records)
    kinds = dict.fromkeys(kind for record in records for kind in _by_kind(record.history))
    for kind in kinds:
        if len(records) == 1:
            terms = _by_kind(records[0].history)[kind]
            lines = [Line(name.removeprefix(f"{kind}_"), series, i) for i, (name, series) in enumerate(terms.items())]
        else:
            lines = [
                Line(record.name, _sum(_by_kind(record.history)[kind].values()), i)
                for i, record in enumerate(records)
                if kind in _by_kind(record.history)
            ]
        names = dict.fromkeys(name for record in records for name in _by_kind(record.history).get(kind, ()))
        words = f"{kind}: {_KINDS[kind]}" if kind in _KINDS else kind
        if kind != "loss":
            words = f"Loss term {words}" + (f" ({', '.join(names)})" if list(names) != [kind] else "")
            words += ", summed" if len(records) > 1 and len(names) > 1 else ""
        else:
            words = f"Loss, {_KINDS['loss']}"
        yield from _figure(f"loss {kind}", lines, kind, words, records, log=True)
    yield from _grouped(records, ERROR, "wrong %", "Labelled training pixels that are wrong", scale=100.0)
    yield from _grouped(records, RATE, "learning rate", "Learning rate", log=True)
    yield from _grouped(records, NORM, "gradient norm", "Gradient norm before clipping", log=True)
    yield from _grouped(records, WEIGHTS, "norm", "Norm of the trained weights")
    weights = dict.fromkeys(name for r in records for name in r.history.monitors if name not in TEACHING)
    if len(records) == 1:
        lines = [Line(name, records[0].history.monitors[name], i) for i, name in enumerate(weights)]
        yield from _figure("weights", lines, "value", "Values that the method logs beside its losses", records)
    else:
        for name in weights:
            lines = _by_run(records, lambda record, name=name: record.history.monitors.get(name))
            yield from _figure(f"weight {name}", lines, name, f"{name}, logged by the method", records)
    lines = _by_run(records, lambda record: record.history.train.get(SPEED))
    yield from _figure("speed", lines, "images/s", "Training images a second, over all processes", records)


def _dice_curves(records: Sequence[Record]) -> Iterator[Figure]:
    words = "Validation Dice"
    if len(records) == 1:
        history = records[0].history
        best = history.best and history.best[0]
        lines = [
            Line(name, series, i, 100.0, best if i == 0 else None)
            for i, (name, series) in enumerate(history.dice.items())
        ]
        many = ", mean over classes; ring: best of the deployed output, kept as best.pt"
        yield from _figure("val dice", lines, "Dice %", words + many, records)
        return
    lines = []
    for i, record in enumerate(records):
        first = next(iter(record.history.dice.values()), None)
        if first is not None:
            lines.append(Line(record.name, first, i, 100.0, record.history.best and record.history.best[0]))
    yield from _figure("val dice", lines, "Dice %", f"{words} of the deployed output; ring: best", records)


def _grouped(
    records: Sequence[Record], prefix: str, label: str, words: str, *, log: bool = False, scale: float = 1.0
) -> Iterator[Figure]:
    """What the loop logs of each student, SAM or group of parameters: one plot for a run, one a group for several."""
    found = [record.history.named(prefix) for record in records]
    if len(records) == 1:
        lines = [Line(group, series, i, scale) for i, (group, series) in enumerate(found[0].items())]
        yield from _figure(label, lines, label, words, records, log=log)
        return
    for group in dict.fromkeys(group for series in found for group in series):
        lines = [
            Line(record.name, series[group], i, scale)
            for i, (record, series) in enumerate(zip(records, found, strict=True))
            if group in series
        ]
        yield from _figure(f"{label} {group}", lines, label, f"{words}: {group}", records, log=log)


def _figure(
    name: str, lines: Sequence[Line], ylabel: str, words: str, records: Sequence[Record], *, log: bool = False
) -> Iterator[Figure]:
    """One figure, or none if there is nothing to draw. Several runs share one legend outside the plots."""
    lines = [line for line in lines if line.series.finite]
    if not lines:
        return
    every = max(math.ceil(len(line.series.steps) / POINTS) for line in lines)
    words += f"; a point is the mean of {every} logged values" if every > 1 else ""
    yield figure(plots.curves(name, lines, ylabel, legend=len(records) == 1, log=log), words)


def _by_run(records: Sequence[Record], series_of: Any) -> list[Line]:
    pairs = [(i, record.name, series_of(record)) for i, record in enumerate(records)]
    return [Line(name, series, i) for i, name, series in pairs if series is not None]


def _by_kind(history: History) -> dict[str, dict[str, Series]]:
    """Losses grouped by their first word: seg, skd, ...; the sum of all first."""
    found: dict[str, dict[str, Series]] = {}
    for name, series in history.losses.items():
        found.setdefault(name.partition("_")[0], {})[name] = series
    return found


def _sum(terms: Any) -> Series:
    """The sum at each step of the terms that were logged there: some begin later than others."""
    at: dict[int, float] = {}
    for series in terms:
        for step, value in zip(series.steps, series.values, strict=True):
            at[step] = at.get(step, 0.0) + value
    return Series(sorted(at), [at[step] for step in sorted(at)])


def curve_notes(records: Sequence[Record]) -> list[str]:
    """Where names were guessed wrong: a method of one's own may log values that are no loss terms."""
    notes = []
    for record in records:
        losses = dict(record.history.losses)
        total = losses.pop("loss", None)
        if total is None or not losses or not total.steps:
            continue
        last = total.steps[-1]
        terms = [s.values[s.steps.index(last)] for s in losses.values() if last in s.steps]
        off = abs(math.fsum(v for v in terms if math.isfinite(v)) - total.values[-1])
        if math.isfinite(total.values[-1]) and off > 1e-3 * max(1.0, abs(total.values[-1])):
            notes.append(f"{record.name}: not everything that is shown as a loss term is part of the sum.")
    return notes


def teaching(records: Sequence[Record]) -> Iterator[Figure]:
    """What is known of the pseudo-labels without any mask of an unlabelled image."""
    words = {
        "sam_confidence": "SAM's confidence on unlabelled training images (mean of its largest class probability)",
        "sam_agreement": "Share of pixels of unlabelled training images on which SAM and the fused prediction agree",
    }
    for name in TEACHING:
        lines = _by_run(records, lambda record, name=name: record.history.train.get(name))
        lines = [Line(line.name, line.series, line.colour, 100.0) for line in lines]
        yield from _figure(name, lines, "%", f"{words[name]}; logged while training, without any mask", records)
    top = "Share of the commonest class in the answers on unlabelled training images (truth: in the labelled masks)"
    yield from _grouped(records, TOP, "%", top, scale=100.0)
