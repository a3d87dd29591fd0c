"""The scores of runs as tables: each run's outputs and classes, runs beside each other, and the lowest cases."""

from collections.abc import Mapping, Sequence
from typing import Any

from knowsam.engine.scores import MEAN
from knowsam.metrics.segmentation import STATUSES
from knowsam.report.checks import checkpoint_kind
from knowsam.report.numbers import LENGTHS, NONE, exact, mean_sd, metric_name, number
from knowsam.report.runs import Run
from knowsam.report.table import Table


def score_table(run: Run) -> Table:
    """All outputs and classes of one run: mean ± sd over cases; the deployed output's mean set off."""
    names = [*run.scores["class_names"], *([MEAN] if len(run.scores["class_names"]) > 1 else [])]
    metrics = run.scores["metrics"]
    rows: list[list[str]] = []
    strong = set()
    for output in run.outputs:
        for name in names:
            if output == run.outputs[0] and name == names[-1]:
                strong.add(len(rows))
            row = run.scores["summary"][output][name]
            rows.append([output, class_label(name), _counted(row), *summary_cells(row, metrics)])
    head = ["output", "class", "cases", *(metric_name(m, run.scores["unit"]) for m in metrics)]
    head += ["missed", "false", "empty"]
    title = f"{run.setting}: {run.scores['num_cases']} {run.scores['split']} cases, mean ± sd over cases"
    return Table("scores", title, head, rows, 2, frozenset(strong))


def side_by_side(runs: Sequence[Run], outputs: Mapping[str, str], class_name: str) -> Table:
    """A row per run: its chosen output on one class, mean ± sd over cases; the best Dice set off.

    Args:
        runs: of the same classes.
        outputs: name of the run -> output.
        class_name: one of their classes, or ``MEAN``.
    """
    metrics = shared_metrics(runs)
    units = shared_units(runs)
    rows = []
    for run in runs:
        row = run.scores["summary"][outputs[run.setting]][class_name]
        rows.append([run.setting, outputs[run.setting], _counted(row), *summary_cells(row, metrics)])
    means = [run.mean(outputs[run.setting], class_name, "dice") for run in runs]
    best = max((mean for mean in means if mean is not None), default=None)
    strong = frozenset(i for i, mean in enumerate(means) if mean == best and best is not None)
    head = ["run", "output", "cases", *(metric_name(metric, units) for metric in metrics), "missed", "false", "empty"]
    what = f"mean over {len(runs[0].scores['class_names'])} classes" if class_name == MEAN else class_name
    title = f"{what} on {runs[0].scores['split']}, mean ± sd over cases; set off: highest mean Dice"
    return Table(f"runs-{class_name}", title, head, rows, 2, strong)


def worst_cases(run: Run, output: str, count: int = 10) -> Table:
    """The cases with the lowest Dice, each class with what was wrong.

    Args:
        run: scored.
        output: whose Dice, mean over the case's classes.
        count: of cases at most.
    """
    values = run.case_values(output, MEAN, "dice")
    order = sorted(values, key=lambda case: (values[case], case))[:count]
    names = run.scores["class_names"]
    found = {(row["case"], row["class"]): row for row in run.rows if row["output"] == output}
    rows = []
    for case in order:
        cells = [found[case, name] for name in names]
        texts = [number("dice", cell["dice"]) if cell["status"] != "empty_both" else NONE for cell in cells]
        wrong = [
            f"{name} {cell['status'].replace('_', ' ')}"
            for name, cell in zip(names, cells, strict=True)
            if cell["status"] in ("missed", "false_positive")
        ]
        mean = [number("dice", values[case])] if len(names) > 1 else []
        rows.append([case, *texts, *mean, ", ".join(wrong) or NONE])
    head = ["case", *(f"{name} Dice %" for name in names), *(["mean"] if len(names) > 1 else []), "status"]
    return Table("worst", f"{run.setting}: the {len(rows)} lowest Dice of {output}", head, rows, 1)


def score_records(runs: Sequence[Run]) -> list[dict[str, str]]:
    """Every mean and sd of every run, unrounded, a record per output, class and metric."""
    return [
        {
            "run": run.setting,
            "seed": str(run.seed),
            "split": run.scores["split"],
            "output": output,
            "class": name,
            "metric": metric,
            "unit": run.scores["unit"] if metric in LENGTHS else "fraction",
            "mean": exact(row[metric]["mean"]),
            "sd": exact(row[metric]["sd"]),
            "n": str(row["n"]),
            "cases": str(row["cases"]),
            **{status: str(row[status]) for status in STATUSES},
            "checkpoint": checkpoint_kind(run),
            "step": "" if run.checkpoint is None else str(run.checkpoint["step"]),
        }
        for run in runs
        for output in run.outputs
        for name, row in run.scores["summary"][output].items()
        for metric in run.scores["metrics"]
    ]


def summary_cells(row: Mapping[str, Any], metrics: Sequence[str]) -> list[str]:
    """Mean ± sd of each metric, and the three counts of what was empty.

    Args:
        row: of ``Evaluation.summary``, one output and class.
        metrics: that are shown.
    """
    texts = [mean_sd(metric, row[metric]["mean"], row[metric]["sd"]) for metric in metrics]
    return [*texts, *(str(row[status]) for status in ("missed", "false_positive", "empty_both"))]


def class_label(name: str) -> str:
    """The name of a class as a table shows it."""
    return "mean over classes" if name == MEAN else name


def shared_metrics(runs: Sequence[Run]) -> list[str]:
    """The metrics that every run has, in the order of the first."""
    return [m for m in runs[0].scores["metrics"] if all(m in run.scores["metrics"] for run in runs)]


def shared_units(runs: Sequence[Run]) -> str:
    """The unit of distances; ``px/mm`` if the runs differ."""
    return "/".join(dict.fromkeys(run.scores["unit"] for run in runs))


def _counted(row: Mapping[str, Any]) -> str:
    """How many cases are in the mean."""
    return str(row["n"]) if row["n"] == row["cases"] else f"{row['n']} of {row['cases']}"
