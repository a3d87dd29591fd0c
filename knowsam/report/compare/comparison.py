"""From runs to numbers: settings beside each other, each against the baseline. No text is laid out here."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from knowsam.engine.scores import IMAGE_LEVEL, MEAN
from knowsam.errors import ConfigError
from knowsam.metrics.segmentation import PIXEL_METRICS
from knowsam.report.checks import choose_metrics, choose_outputs, refuse_mixture
from knowsam.report.compare.collect import Absent, Found
from knowsam.report.compare.naming import differing_keys
from knowsam.report.compare.statistics import (
    PairedTest,
    Spread,
    averaged_by,
    holm,
    paired_differences,
    paired_test,
    spread,
)
from knowsam.report.runs import OLD_DIGITS, Run

LABELLED = "data.labelled"
"""The setting along which a curve runs."""


@dataclass(frozen=True)
class Cell:
    """One setting, class and metric.

    Attributes:
        by_seed: seed -> the run's own mean over cases; runs without any counted case are absent.
        values: mean and sd of these over seeds.
        delta: of the differences to the baseline, seed by seed; None for the baseline, or without one.
        test: over cases, against the baseline; None likewise.
        differences: case -> difference to the baseline, of which the test is.
        one_sided: (case, seed) pairs that count for this setting only, and for the baseline only.
    """

    by_seed: dict[int, float]
    values: Spread
    delta: Spread | None = None
    test: PairedTest | None = None
    differences: dict[str, float] = field(default_factory=dict)
    one_sided: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Row:
    """One setting.

    Attributes:
        setting: its name.
        output: whose scores.
        runs: finished ones.
        cells: (class, metric) -> numbers.
        errors: (class, metric) -> numbers of the metrics without a test: pixels called wrongly, and structures found
            image by image.
    """

    setting: str
    output: str
    runs: list[Run]
    cells: dict[tuple[str, str], Cell]
    errors: dict[tuple[str, str], Cell] = field(default_factory=dict)

    @property
    def seeds(self) -> list[int]:
        """Of the finished runs."""
        return [run.seed for run in self.runs]


@dataclass(frozen=True)
class Curve:
    """How a method gains by labels.

    Attributes:
        name: what the settings have in common but the labelled cases.
        points: (number of labelled cases, row), by number.
    """

    name: str
    points: list[tuple[int, Row]]


@dataclass(frozen=True)
class TableSet:
    """All numbers of one experiment.

    Attributes:
        experiment: its name.
        rows: baseline first, then in plan order; settings without a finished run have none.
        absent: runs that are in no row.
        planned: settings in plan order.
        baseline: None when there is nothing to compare with.
        baseline_origin: who named it, in words.
        classes: ``MEAN``, then the classes when there are several.
        metrics: shown, the first of them the main one.
        left_out: metrics that only some runs have.
        mixed: what differs and was allowed to.
        digits: decimals to which cases were rounded for the tests; None for none.
        settings: dotted key -> value by row, for the keys in which the rows differ.
        curves: empty unless settings differ in their labelled cases.
    """

    experiment: str
    rows: list[Row]
    absent: list[Absent]
    planned: list[str]
    baseline: str | None = None
    baseline_origin: str = ""
    classes: tuple[str, ...] = (MEAN,)
    metrics: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    mixed: tuple[str, ...] = ()
    digits: int | None = None
    settings: dict[str, list[Any]] = field(default_factory=dict)
    curves: list[Curve] = field(default_factory=list)

    @property
    def scores(self) -> Mapping[str, Any]:
        """Split, unit and rules: those of the first run. The others' are equal, or ``mixed`` says so."""
        return self.rows[0].runs[0].scores

    @property
    def dataset(self) -> str | None:
        """The data that were scored, where they are not the runs' own."""
        return self.rows[0].runs[0].dataset if self.rows else None

    @property
    def units(self) -> str:
        """Of distances, ``px/mm`` if they were mixed."""
        return "/".join(dict.fromkeys(run.scores["unit"] for row in self.rows for run in row.runs))


@dataclass(frozen=True)
class Comparison:
    """What ``knowsam compare`` shows.

    Attributes:
        name: of the sweep, or of the experiment, or ``runs``.
        split: whose scores.
        sets: one per experiment; runs of different ones never stand in one table.
    """

    name: str
    split: str
    sets: list[TableSet]


def compare(
    found: Found,
    *,
    baseline: str | None = None,
    output: str | None = None,
    metrics: Sequence[str] | None = None,
    allow: Collection[str] = (),
) -> Comparison:
    """Compute every table.

    Args:
        found: the runs.
        baseline: name of the setting to compare with; the sweep's if None, else the first setting.
        output: whose scores; each run's deployed output if None.
        metrics: to show, the main one first; all that every run has if None.
        allow: what may differ within a table, of ``checks.KINDS``.
    Raises:
        ConfigError: no such baseline; an output or a metric that some run lacks.
        DataError: runs that must not stand in one table.
    """
    known = list(dict.fromkeys(name for names in found.settings.values() for name in names))
    if baseline is not None and baseline not in known:
        raise ConfigError(
            f"there is no setting {baseline!r} to be the baseline; there are {', '.join(map(repr, known))}",
            hint="Name one of them, or name a setting yourself: NAME=FOLDER.",
        )
    sets = []
    for experiment, planned in found.settings.items():
        runs = [run for run in found.runs if run.experiment == experiment]
        absent = [item for item in found.absent if item.experiment == experiment]
        if not runs:
            sets.append(TableSet(experiment, [], absent, planned))
            continue
        chosen, origin = _baseline(baseline, found.baseline, [run.setting for run in runs], planned)
        named = TableSet(experiment, [], absent, planned, chosen, origin)
        sets.append(_computed(named, runs, output, metrics, allow))
    return Comparison(found.name, found.split, sets)


def _baseline(
    asked: str | None, named: str | None, have: Sequence[str], planned: Sequence[str]
) -> tuple[str | None, str]:
    """The baseline of one experiment, and in words where it comes from or why there is none."""
    wanted, origin = (asked, "named by --baseline") if asked else (named, "named by the sweep")
    if wanted is None:
        first = next(name for name in planned if name in have)
        return first, "the first setting; --baseline names another"
    if wanted not in have:
        return None, f"{wanted!r} ({origin}) has no finished run here"
    return wanted, origin


def _computed(
    tables: TableSet, runs: Sequence[Run], output: str | None, asked: Sequence[str] | None, allow: Collection[str]
) -> TableSet:
    """The tables of one experiment, of which runs, settings and the baseline are known."""
    outputs = choose_outputs(runs, output)
    metrics, left_out = choose_metrics(runs, asked)
    mixed = refuse_mixture(runs, metrics, allow)
    names = runs[0].scores["class_names"]
    classes = (MEAN, *names) if len(names) > 1 else (MEAN,)
    # Rounded cases beside exact ones would turn equal scores into small differences.
    digits = OLD_DIGITS if any(run.rounded for run in runs) else None
    baseline, planned = tables.baseline, tables.planned
    order = sorted(dict.fromkeys(run.setting for run in runs), key=lambda name: (name != baseline, planned.index(name)))
    grouped = {name: sorted((run for run in runs if run.setting == name), key=lambda run: run.seed) for name in order}
    cells: dict[str, dict[tuple[str, str], Cell]] = {name: {} for name in order}
    for class_name in classes:
        for metric in metrics:
            column = _column(grouped, outputs, class_name, metric, baseline, digits)
            for name, cell in column.items():
                cells[name][class_name, metric] = cell
    rows = [
        Row(name, outputs[name], grouped[name], cells[name], _errors(grouped[name], outputs[name], classes))
        for name in order
    ]
    settings = [row.runs[0].settings for row in rows]
    return replace(
        tables,
        rows=rows,
        baseline=baseline if len(rows) > 1 else None,
        baseline_origin=tables.baseline_origin if len(rows) > 1 else "",
        classes=classes,
        metrics=tuple(metrics),
        left_out=tuple(left_out),
        mixed=tuple(mixed),
        digits=digits,
        settings={key: [item.get(key, "") for item in settings] for key in differing_keys(settings)},
        curves=_curves(rows),
    )


def _errors(runs: Sequence[Run], output: str, classes: Sequence[str]) -> dict[tuple[str, str], Cell]:
    """Numbers of what has no test, of every class."""
    found: dict[tuple[str, str], Cell] = {}
    for name in classes:
        by_metric = {metric: [run.mean(output, name, metric) for run in runs] for metric in PIXEL_METRICS}
        rates = [run.image_level(output, name) for run in runs]
        by_metric |= {metric: [rate[i] for rate in rates] for i, metric in enumerate(IMAGE_LEVEL)}
        for metric, values in by_metric.items():
            by_seed = {run.seed: value for run, value in zip(runs, values, strict=True) if value is not None}
            found[name, metric] = Cell(by_seed, spread(list(by_seed.values())))
    return found


def _column(
    grouped: Mapping[str, Sequence[Run]],
    outputs: Mapping[str, str],
    class_name: str,
    metric: str,
    baseline: str | None,
    digits: int | None,
) -> dict[str, Cell]:
    """Every setting's numbers of one class and metric; its tests are one family for Holm."""
    by_seed: dict[str, dict[int, float]] = {}
    cases: dict[str, dict[int, dict[str, float]]] = {}
    for name, runs in grouped.items():
        means = [(run.seed, run.mean(outputs[name], class_name, metric)) for run in runs]
        by_seed[name] = {seed: value for seed, value in means if value is not None}
        cases[name] = {run.seed: run.case_values(outputs[name], class_name, metric, digits) for run in runs}
    column = {name: Cell(values, spread(list(values.values()))) for name, values in by_seed.items()}
    if baseline is None:
        return column
    theirs = by_seed[baseline]
    tests: dict[str, PairedTest] = {}
    for name, ours in by_seed.items():
        if name == baseline:
            continue
        differences = paired_differences(cases[name], cases[baseline])
        differences = averaged_by(differences, grouped[name][0].alike)
        tests[name] = paired_test(list(differences.values()))
        column[name] = replace(
            column[name],
            delta=spread([ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]),
            differences=differences,
            one_sided=(_only(cases[name], cases[baseline]), _only(cases[baseline], cases[name])),
        )
    for (name, test), p in zip(tests.items(), holm([test.p for test in tests.values()]), strict=True):
        column[name] = replace(column[name], test=replace(test, p_holm=p))
    return column


def _only(these: Mapping[int, Mapping[str, float]], others: Mapping[int, Mapping[str, float]]) -> int:
    """Cases, over the shared seeds, that count here and not there."""
    return sum(len(these[seed].keys() - others[seed].keys()) for seed in these.keys() & others.keys())


def _curves(rows: Sequence[Row]) -> list[Curve]:
    """Rows that differ in their labelled cases alone, joined; empty when no two do."""
    groups: list[tuple[dict[str, Any], list[Row]]] = []
    for row in rows:
        rest = {key: value for key, value in row.runs[0].settings.items() if key != LABELLED}
        same = next((group for other, group in groups if other == rest), None)
        if same is None:
            groups.append((rest, [row]))
        else:
            same.append(row)
    if all(len({str(row.runs[0].settings.get(LABELLED)) for row in group}) == 1 for _, group in groups):
        return []
    curves = []
    for _, group in groups:
        points = [(row.runs[0].labelled, row) for row in group if row.runs[0].labelled is not None]
        if points:
            curves.append(Curve(_common_name(group), sorted(points, key=lambda point: point[0])))
    names = [curve.name for curve in curves]
    # What the names have in common may be the same for two groups: then the first setting's whole name.
    return [
        curve if names.count(curve.name) == 1 else replace(curve, name=curve.points[0][1].setting) for curve in curves
    ]


def _common_name(rows: Sequence[Row]) -> str:
    """``KnowSAM`` for ``KnowSAM, 5 %`` and ``KnowSAM, 10 %``; without a common part, the method."""
    parts = [row.setting.split(", ") for row in rows]
    if len(rows) == 1:
        label = str(rows[0].runs[0].settings.get(LABELLED))
        common = [part for part in parts[0] if part not in (label, f"{LABELLED}={label}")]
    else:
        common = [part for part in parts[0] if all(part in other for other in parts[1:])]
    return ", ".join(common) or str(rows[0].runs[0].settings.get("method.name") or rows[0].setting).rpartition(":")[2]
