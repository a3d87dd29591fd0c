"""The curves of one run's page, or of several runs beside each other: which there are, and what stands below them."""

import math
from collections.abc import Iterable, Iterator, Sequence

from knowsam.report.document import Figure, figure
from knowsam.report.page.history import ERROR, NORM, RATE, SPEED, TOP, WEIGHTS, History, Series
from knowsam.report.page.plots import POINTS, Line, curve_plot
from knowsam.report.page.record import Record

TEACHING = {
    "sam_confidence": "SAM's confidence on unlabelled training images (mean of its largest class probability)",
    "sam_agreement": "Share of pixels of unlabelled training images on which SAM and the fused prediction agree",
}
"""What KnowSAM logs of SAM's predictions on unlabelled images, without any mask."""

_KINDS = {
    "loss": "the sum that is minimised",
    "seg": "supervised, on labelled images",
    "sam": "SAM's own, supervised",
    "skd": "distillation from SAM",
    "entropy": "uncertainty of predictions",
    "consistency": "agreement of predictions",
    "mix": "on mixed images",
}


def curve_figures(records: Sequence[Record]) -> Iterator[Figure]:
    """All over the steps: validation Dice, losses by kind, errors, rates, norms, what the method logs, speed.

    Args:
        records: one run, whose outputs, terms and groups share a plot; or several, which share one for each of these.
    """
    yield from _dice(records)
    yield from _losses(records)
    yield from _grouped(records, ERROR, "wrong %", "Labelled training pixels that are wrong", factor=100.0)
    yield from _grouped(records, RATE, "learning rate", "Learning rate", log=True)
    yield from _grouped(records, NORM, "gradient norm", "Gradient norm before clipping", log=True)
    yield from _grouped(records, WEIGHTS, "norm", "Norm of the trained weights")
    yield from _monitors(records)
    lines = _by_run(records, [record.history.train.get(SPEED) for record in records])
    yield from _figure("speed", lines, "images/s", "Training images a second, over all processes", records)


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


def teaching_figures(records: Sequence[Record]) -> Iterator[Figure]:
    """What is known of the pseudo-labels without any mask of an unlabelled image."""
    for name, caption in TEACHING.items():
        lines = _by_run(records, [record.history.train.get(name) for record in records], factor=100.0)
        yield from _figure(name, lines, "%", f"{caption}; logged while training, without any mask", records)
    top = "Share of the commonest class in the predictions on unlabelled training images"
    yield from _grouped(records, TOP, "%", f"{top} (truth: in the labelled masks)", factor=100.0)


def _dice(records: Sequence[Record]) -> Iterator[Figure]:
    """Of all outputs for a run, of the deployed ones for several."""
    if len(records) == 1:
        history = records[0].history
        best = history.best and history.best[0]
        lines = [
            Line(name, series, i, 100.0, best if i == 0 else None)
            for i, (name, series) in enumerate(history.dice.items())
        ]
        many = "mean over classes; ring: best of the deployed output, kept as best.pt"
        yield from _figure("val dice", lines, "Dice %", f"Validation Dice, {many}", records)
        return
    lines = []
    for i, record in enumerate(records):
        first = next(iter(record.history.dice.values()), None)
        if first is not None:
            lines.append(Line(record.name, first, i, 100.0, record.history.best and record.history.best[0]))
    yield from _figure("val dice", lines, "Dice %", "Validation Dice of the deployed output; ring: best", records)


def _losses(records: Sequence[Record]) -> Iterator[Figure]:
    """A plot per kind: its terms for a run, their sum for several."""
    by_kind = [_by_kind(record.history) for record in records]
    for kind in dict.fromkeys(kind for kinds in by_kind for kind in kinds):
        if len(records) == 1:
            terms = by_kind[0][kind]
            lines = [Line(name.removeprefix(f"{kind}_"), series, i) for i, (name, series) in enumerate(terms.items())]
        else:
            lines = _by_run(records, [_sum(kinds[kind].values()) if kind in kinds else None for kinds in by_kind])
        names = dict.fromkeys(name for kinds in by_kind for name in kinds.get(kind, ()))
        if kind == "loss":
            caption = f"Loss, {_KINDS['loss']}"
        else:
            caption = f"Loss term {kind}" + (f": {_KINDS[kind]}" if kind in _KINDS else "")
            caption += f" ({', '.join(names)})" if list(names) != [kind] else ""
            caption += ", summed" if len(records) > 1 and len(names) > 1 else ""
        yield from _figure(f"loss {kind}", lines, kind, caption, records, log=True)


def _monitors(records: Sequence[Record]) -> Iterator[Figure]:
    """What the method logs beside its losses: one plot for a run, one a name for several."""
    names = dict.fromkeys(name for record in records for name in record.history.monitors if name not in TEACHING)
    if len(records) == 1:
        lines = [Line(name, records[0].history.monitors[name], i) for i, name in enumerate(names)]
        yield from _figure("weights", lines, "value", "Values that the method logs beside its losses", records)
        return
    for name in names:
        lines = _by_run(records, [record.history.monitors.get(name) for record in records])
        yield from _figure(f"weight {name}", lines, name, f"{name}, logged by the method", records)


def _grouped(
    records: Sequence[Record], prefix: str, label: str, caption: str, *, log: bool = False, factor: float = 1.0
) -> Iterator[Figure]:
    """What the loop logs of each student, SAM or group of parameters: one plot for a run, one a group for several."""
    found = [record.history.named(prefix) for record in records]
    if len(records) == 1:
        lines = [Line(group, series, i, factor) for i, (group, series) in enumerate(found[0].items())]
        yield from _figure(label, lines, label, caption, records, log=log)
        return
    for group in dict.fromkeys(group for series in found for group in series):
        lines = _by_run(records, [series.get(group) for series in found], factor=factor)
        yield from _figure(f"{label} {group}", lines, label, f"{caption}: {group}", records, log=log)


def _figure(
    name: str, lines: Sequence[Line], ylabel: str, caption: str, records: Sequence[Record], *, log: bool = False
) -> Iterator[Figure]:
    """One figure, or none if there is nothing to draw. Several runs share one legend outside the plots."""
    lines = [line for line in lines if line.series.finite]
    if not lines:
        return
    every = max(math.ceil(len(line.series.steps) / POINTS) for line in lines)
    caption += f"; a point is the mean of {every} logged values" if every > 1 else ""
    yield figure(curve_plot(name, lines, ylabel, legend=len(records) == 1, log=log), caption)


def _by_run(records: Sequence[Record], series: Sequence[Series | None], *, factor: float = 1.0) -> list[Line]:
    """A line per run that has the series; a run without one keeps its colour for the other plots."""
    pairs = enumerate(zip(records, series, strict=True))
    return [Line(record.name, found, i, factor) for i, (record, found) in pairs if found is not None]


def _by_kind(history: History) -> dict[str, dict[str, Series]]:
    """Losses grouped by how their names begin: seg, skd, ...; the sum of all first."""
    found: dict[str, dict[str, Series]] = {}
    for name, series in history.losses.items():
        found.setdefault(name.partition("_")[0], {})[name] = series
    return found


def _sum(terms: Iterable[Series]) -> Series:
    """The sum at each step of the terms that were logged there: some begin later than others."""
    at: dict[int, float] = {}
    for series in terms:
        for step, value in zip(series.steps, series.values, strict=True):
            at[step] = at.get(step, 0.0) + value
    return Series(sorted(at), [at[step] for step in sorted(at)])
