"""The tables of a comparison as rows of text, whatever they will be printed as."""

from collections.abc import Sequence

from knowsam.engine.scores import IMAGE_LEVEL, MEAN
from knowsam.metrics.segmentation import PIXEL_METRICS
from knowsam.report.checks import UNKNOWN
from knowsam.report.compare.collect import RETIRED
from knowsam.report.compare.comparison import Cell, Row, TableSet
from knowsam.report.compare.statistics import Spread
from knowsam.report.numbers import LENGTHS, NONE, exact, mean_sd, metric_name, number
from knowsam.report.runs import Run
from knowsam.report.table import Table


def spread_text(metric: str, values: Spread | None, *, signed: bool = False) -> str:
    """``70.36 ± 2.10``; without the sd of fewer than two values, and ``-`` for None.

    Args:
        metric: what the values are of.
        values: fractions or distances.
        signed: a plus before a mean that is larger than zero.
    """
    return NONE if values is None else mean_sd(metric, values.mean, values.sd, signed=signed)


def probability(p: float | None) -> str:
    """Three decimals; ``< 0.001`` below."""
    if p is None:
        return NONE
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def results(tables: TableSet, class_name: str = MEAN) -> Table:
    """A row per setting: every metric, and the main metric's difference to the baseline with its test.

    Args:
        tables: with rows.
        class_name: one of its classes.
    """
    first = tables.metrics[0]
    outputs = len({row.output for row in tables.rows}) > 1
    head = ["setting", *(["output"] if outputs else []), "seeds"]
    head += [metric_name(metric, tables.units) for metric in tables.metrics]
    if tables.baseline is not None:
        # A difference of percentages is in points; "Δ %" would be read as relative.
        name = metric_name(first, tables.units, arrow=False).replace(" %", ", points")
        head += [f"Δ {name}", "p (Holm)", "effect r"]
    rows = []
    for row in tables.rows:
        texts = [_row_name(tables, row), *([row.output] if outputs else []), _seeds_text(tables, row)]
        texts += [spread_text(metric, row.cells[class_name, metric].values) for metric in tables.metrics]
        if tables.baseline is not None:
            cell = row.cells[class_name, first]
            test = cell.test
            texts += [spread_text(first, cell.delta, signed=True), probability(test.p_holm if test else None)]
            texts += [_signed(test.effect if test else None)]
        rows.append(texts)
    title = f"{tables.experiment}: {_class_label(tables, class_name)} on {tables.scores['split']}, mean ± sd over seeds"
    return Table("results", title, head, rows, 2 if outputs else 1, _strong(tables))


def errors(tables: TableSet, class_name: str = MEAN) -> Table:
    """A row per setting: pixels called wrongly, and structures found image by image. No tests.

    Args:
        tables: with rows.
        class_name: one of its classes.
    """
    every = (*PIXEL_METRICS, *IMAGE_LEVEL)
    metrics = [m for m in every if any(row.errors[class_name, m].values.n for row in tables.rows)]
    rows = [
        [_row_name(tables, row), *(spread_text(metric, row.errors[class_name, metric].values) for metric in metrics)]
        for row in tables.rows
    ]
    title = (
        f"{tables.experiment}: {_class_label(tables, class_name)} on {tables.scores['split']}, pixels and structures "
    )
    title += "found, mean ± sd over seeds"
    head = ["setting", *(metric_name(metric, tables.units) for metric in metrics)]
    return Table("errors", title, head, rows, 1, _strong(tables))


def data_sets(sets: Sequence[TableSet]) -> Table | None:
    """The settings on their own data and on others, by the main metric, and the mean of these; None without others.

    Args:
        sets: of one experiment, its own data first.
    """
    filled = [item for item in sets if item.rows]
    if len(filled) < 2:
        return None
    metric = filled[0].metrics[0]
    rows = []
    for row in filled[0].rows:
        values = []
        for item in filled:
            there = next((other for other in item.rows if other.setting == row.setting), None)
            cell = None if there is None else there.cells.get((MEAN, metric))
            values.append(None if cell is None else cell.values)
        means = [value.mean for value in values if value is not None and value.mean is not None]
        mean = sum(means) / len(means) if len(means) == len(filled) else None
        rows.append([_row_name(filled[0], row), *(spread_text(metric, v) for v in values), number(metric, mean)])
    name = metric_name(metric, filled[0].units)
    title = f"{filled[0].experiment}: {name}, mean over classes, on its own {filled[0].scores['split']} and other data"
    head = ["setting", *("its own" if item.dataset is None else item.dataset for item in filled), "mean of these"]
    return Table("data sets", f"{title}, mean ± sd over seeds", head, rows, 1, _strong(filled[0]))


def tests(tables: TableSet, class_name: str = MEAN, metrics: Sequence[str] | None = None) -> Table:
    """A row per metric and setting: all that belongs to the test against the baseline. A metric is a family of Holm.

    Args:
        tables: with a baseline; without one the table is empty.
        class_name: one of its classes.
        metrics: all of them if None.
    """
    head = ["setting", "metric", "Δ mean ± sd", "seeds", "median Δ", "cases", "zero Δ", "W"]
    head += ["p", "p (Holm)", "effect r", "p is"]
    rows = []
    for metric in tables.metrics if metrics is None else metrics:
        for row in tables.rows:
            cell = row.cells[class_name, metric]
            test = cell.test
            if test is None or cell.delta is None:
                continue
            rows.append(
                [
                    row.setting,
                    metric_name(metric, tables.units, arrow=False),
                    spread_text(metric, cell.delta, signed=True),
                    str(cell.delta.n),
                    number(metric, test.median, signed=True),
                    str(test.pairs),
                    str(test.zeros),
                    NONE if test.statistic is None else f"{test.statistic:g}",
                    probability(test.p),
                    probability(test.p_holm),
                    _signed(test.effect),
                    test.method or test.reason,
                ]
            )
    title = f"{tables.experiment}: {_class_label(tables, class_name)}, each setting against {tables.baseline!r}"
    title += ", paired over cases"
    return Table("tests", title, head, rows, 2)


def settings(tables: TableSet) -> Table:
    """What the first setting is, and in what each other differs from it."""
    rows = []
    for i, row in enumerate(tables.rows):
        keys = [key for key, values in tables.settings.items() if i == 0 or str(values[i]) != str(values[0])]
        values = [f"{key}={_value(tables.settings[key][i])}" for key in keys]
        rows.append([_row_name(tables, row), ", ".join(values) or "no key differs"])
    head = ["setting", f"keys (those in which it differs from {tables.rows[0].setting!r})"]
    return Table("settings", f"{tables.experiment}: what the settings are", head, rows, 2, _strong(tables))


def checkpoints(tables: TableSet) -> Table:
    """Every finished run: which weights were scored, and what chose them."""
    rows = [
        [
            row.setting,
            str(run.seed),
            row.output,
            *_checkpoint(run),
            UNKNOWN if run.labelled is None else str(run.labelled),
        ]
        for row in tables.rows
        for run in row.runs
    ]
    head = ["setting", "seed", "output", "scored", "chosen by", "step", "its value %", "labelled cases"]
    return Table("checkpoints", f"{tables.experiment}: what was scored", head, rows, 5)


def records(tables: TableSet) -> list[dict[str, str]]:
    """Everything, a record per class, setting and metric; numbers as they are, not in percent."""
    found = [
        _record(tables, row, class_name, metric, row.cells[class_name, metric])
        for class_name in tables.classes
        for row in tables.rows
        for metric in tables.metrics
    ]
    # Without a test.
    found += [
        _record(tables, row, class_name, metric, cell)
        for class_name in tables.classes
        for row in tables.rows
        for (name, metric), cell in row.errors.items()
        if name == class_name and metric not in tables.metrics and cell.values.n
    ]
    return [{name: exact(value) for name, value in record.items()} for record in found]


def _row_name(tables: TableSet, row: Row) -> str:
    """The setting, marked where it is the baseline."""
    return f"{row.setting} (baseline)" if row.setting == tables.baseline else row.setting


def _seeds_text(tables: TableSet, row: Row) -> str:
    """Finished seeds, ``2 of 3`` where some are missing."""
    missing = sum(item.setting == row.setting and item.state != RETIRED for item in tables.absent)
    return f"{len(row.runs)} of {len(row.runs) + missing}" if missing else str(len(row.runs))


def _class_label(tables: TableSet, class_name: str) -> str:
    """``mean over 3 classes``, or the name of the class."""
    names = tables.scores["class_names"]
    if class_name != MEAN:
        return class_name
    return f"mean over {len(names)} classes" if len(names) > 1 else names[0]


def _record(tables: TableSet, row: Row, class_name: str, metric: str, cell: Cell) -> dict[str, object]:
    labelled = {run.labelled for run in row.runs}
    alone = class_name == MEAN and len(tables.classes) == 1
    test, delta = cell.test, cell.delta
    return {
        "experiment": tables.experiment,
        "split": tables.scores["split"],
        "setting": row.setting,
        "is_baseline": "yes" if row.setting == tables.baseline else "no",
        "output": row.output,
        "class": tables.scores["class_names"][0] if alone else class_name,
        "metric": metric,
        "unit": tables.units if metric in LENGTHS else "fraction",
        "labelled_cases": labelled.pop() if len(labelled) == 1 else None,
        "n_seeds": cell.values.n,
        "seeds": " ".join(map(str, cell.by_seed)),
        "mean": cell.values.mean,
        "sd": cell.values.sd,
        "values_by_seed": " ".join(map(exact, cell.by_seed.values())),
        "delta_n_seeds": delta and delta.n,
        "delta_mean": delta and delta.mean,
        "delta_sd": delta and delta.sd,
        "n_cases": test and test.pairs,
        "n_zero": test and test.zeros,
        "W": test and test.statistic,
        "p": test and test.p,
        "p_holm": test and test.p_holm,
        "p_is": test and (test.method or test.reason),
        "effect_r": test and test.effect,
        "median_difference": test and test.median,
        "counted_here_only": test and cell.one_sided[0],
        "counted_in_baseline_only": test and cell.one_sided[1],
        "scored": "; ".join(dict.fromkeys(_checkpoint(run)[0] for run in row.runs)),
        "data": tables.dataset or "own",
    }


def _checkpoint(run: Run) -> list[str]:
    """File, what chose it, step, the value that chose."""
    found = run.checkpoint
    if found is None:
        return [UNKNOWN, UNKNOWN, UNKNOWN, NONE]
    value = NONE if found.get("value") is None else f"{100 * found['value']:.2f}"
    step = NONE if found.get("step") is None else str(found["step"])
    return [str(found["file"]), str(found["chosen_by"]), step, value]


def _strong(tables: TableSet) -> frozenset[int]:
    return frozenset(i for i, row in enumerate(tables.rows) if row.setting == tables.baseline)


def _signed(value: float | None) -> str:
    return NONE if value is None else f"{value:+.2f}"


def _value(value: object) -> str:
    return "null" if value is None else str(value) if value != "" else "(absent)"
