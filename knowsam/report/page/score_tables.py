"""The scores of runs as tables: each run's outputs and classes, runs beside each other, and the lowest cases."""

from collections.abc import Mapping, Sequence
from typing import Any

from knowsam.engine.scores import IMAGE_LEVEL, MEAN
from knowsam.metrics.segmentation import MAIN_METRICS, PIXEL_METRICS, STATUSES
from knowsam.report.checks import checkpoint_kind
from knowsam.report.numbers import LENGTHS, NONE, exact, mean_sd, metric_name, number
from knowsam.report.runs import Run
from knowsam.report.table import Table


def score_table(run: Run) -> Table:
    """All outputs and classes of one run: mean ± sd over cases; the deployed output's mean set off."""
    names = [*run.scores["class_names"], *([MEAN] if len(run.scores["class_names"]) > 1 else [])]
    metrics = shared_metrics([run])
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


def error_table(run: Run) -> Table:
    """All outputs and classes of one run: pixels called wrongly, and structures found image by image."""
    names = [*run.scores["class_names"], *([MEAN] if len(run.scores["class_names"]) > 1 else [])]
    metrics = [metric for metric in PIXEL_METRICS if metric in run.scores["metrics"]]
    rows = [
        [output, class_label(name), *_error_cells(run, output, name, metrics)]
        for output in run.outputs
        for name in names
    ]
    return Table(
        "errors", f"{run.setting}: pixels and structures found", ["output", "class", *_error_head(metrics)], rows, 2
    )


def errors_side_by_side(runs: Sequence[Run], outputs: Mapping[str, str], class_name: str) -> Table:
    """As ``error_table``, a row per run; arguments as of ``side_by_side``."""
    metrics = [metric for metric in PIXEL_METRICS if all(metric in run.scores["metrics"] for run in runs)]
    rows = [
        [run.setting, outputs[run.setting], *_error_cells(run, outputs[run.setting], class_name, metrics)]
        for run in runs
    ]
    what = f"mean over {len(runs[0].scores['class_names'])} classes" if class_name == MEAN else class_name
    title = f"pixels and structures found on {runs[0].scores['split']}: {what}"
    return Table(f"errors-{class_name}", title, ["run", "output", *_error_head(metrics)], rows, 2)


def subgroup_table(runs: Sequence[Run], outputs: Mapping[str, str]) -> Table | None:
    """A row per run and subgroup, mean over classes; None where no run was scored by subgroup.

    Args:
        runs: of the page.
        outputs: name of the run -> output.
    """
    having = [run for run in runs if run.scores.get("subgroups")]
    if not having:
        return None
    metrics, rows = shared_metrics(having), []
    for run in having:
        for name, found in run.scores["subgroups"]["groups"].items():
            row = found["summary"][outputs[run.setting]][MEAN]
            rows.append([run.setting, name, _counted(row), *summary_cells(row, metrics)])
    by = ", ".join(dict.fromkeys(str(run.scores["subgroups"]["by"]) for run in having))
    without = {run.setting: run.scores["subgroups"]["without"] for run in having}
    left = "; ".join(f"{count} cases of {name} in none" for name, count in without.items() if count)
    title = f"scores by {by}, mean over classes, mean ± sd over cases" + (f" ({left})" if left else "")
    head = ["run", "subgroup", "cases", *(metric_name(m, shared_units(having)) for m in metrics)]
    return Table("subgroups", title, [*head, "missed", "false", "empty"], rows, 2)


def other_data_table(runs: Sequence[Run], outputs: Mapping[str, str]) -> Table | None:
    """A row per run and data set that it was not trained for, mean over classes; None without any.

    Args:
        runs: scored on other data, ``dataset`` of each says which.
        outputs: name of the run -> output; one that was not scored there gives way to the deployed one.
    """
    if not runs:
        return None
    metrics, rows = shared_metrics(runs), []
    for run in runs:
        output = outputs.get(run.setting, run.outputs[0])
        output = output if output in run.outputs else run.outputs[0]
        row = run.scores["summary"][output][MEAN]
        rows.append([f"{run.setting} on {run.dataset}", output, _counted(row), *summary_cells(row, metrics)])
    head = ["run and data", "output", "cases", *(metric_name(m, shared_units(runs)) for m in metrics)]
    title = f"{runs[0].scores['split']} of other data, mean over classes, mean ± sd over cases"
    return Table("other data", title, [*head, "missed", "false", "empty"], rows, 2)


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
    """The cases with the lowest Dice, each class with what was wrong; and those that miss a structure besides.

    Args:
        run: scored.
        output: whose Dice, mean over the case's classes.
        count: of the lowest cases at most, and of those that miss a structure and are not among them.
    """
    values = run.case_values(output, MEAN, "dice")
    ranked = sorted(values, key=lambda case: (values[case], case))
    lowest, missed = ranked[:count], set(missed_cases(run, output))
    # With several classes a case may lack one and have a good mean all the same.
    more = [case for case in ranked[count:] if case in missed]
    order = [*lowest, *more[:count]]
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
    title = f"{run.setting}: the {len(lowest)} lowest Dice of {output}"
    title += f", and {min(count, len(more))} of {len(more)} others that miss a structure" if more else ""
    title += f"; {len(missed)} of {len(values)} cases miss one" if missed else "; no case misses a structure"
    return Table("worst", title, head, rows, 1)


def missed_cases(run: Run, output: str) -> list[str]:
    """The cases of whose structures at least one was not found at all, in the order of the scores."""
    rows = (row for row in run.rows if row["output"] == output and row["status"] == "missed")
    return list(dict.fromkeys(row["case"] for row in rows))


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
            "mean": exact(values["mean"]),
            "sd": exact(values["sd"]),
            "n": str(row["n"]),
            "cases": str(row["cases"]),
            **{status: str(row[status]) for status in STATUSES},
            "checkpoint": checkpoint_kind(run),
            "step": exact(None if run.checkpoint is None else run.checkpoint["step"]),
            "data": run.dataset or "own",
        }
        for run in runs
        for output in run.outputs
        for name, row in run.scores["summary"][output].items()
        for metric, values in _all_values(run, output, name, row).items()
    ]


def _all_values(run: Run, output: str, name: str, row: Mapping[str, Any]) -> dict[str, Mapping[str, float | None]]:
    """Metric -> mean and sd, and the image-level rates, which have no sd."""
    found: dict[str, Mapping[str, float | None]] = {metric: row[metric] for metric in run.scores["metrics"]}
    rates = zip(IMAGE_LEVEL, run.image_level(output, name), strict=True)
    return found | {metric: {"mean": rate, "sd": None} for metric, rate in rates if rate is not None}


def _error_head(metrics: Sequence[str]) -> list[str]:
    return [metric_name(metric, "") for metric in (*metrics, *IMAGE_LEVEL)]


def _error_cells(run: Run, output: str, name: str, metrics: Sequence[str]) -> list[str]:
    """Mean ± sd of each metric, then the image-level rates with their counts."""
    row = run.scores["summary"][output][name]
    texts = [mean_sd(metric, row[metric]["mean"], row[metric]["sd"]) for metric in metrics]
    of = (row["ok"], row["ok"] + row["missed"]), (row["empty_both"], row["empty_both"] + row["false_positive"])
    for metric, rate, (some, many) in zip(IMAGE_LEVEL, run.image_level(output, name), of, strict=True):
        # The mean over classes is no ratio of sums.
        counts = "" if rate is None or name == MEAN else f" ({some} of {many})"
        texts.append(number(metric, rate) + counts)
    return texts


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
    """The metrics of the first table that every run has."""
    return [m for m in MAIN_METRICS if all(m in run.scores["metrics"] for run in runs)]


def shared_units(runs: Sequence[Run]) -> str:
    """The unit of distances; ``px/mm`` if the runs differ."""
    return "/".join(dict.fromkeys(run.scores["unit"] for run in runs))


def _counted(row: Mapping[str, Any]) -> str:
    """How many cases are in the mean."""
    return str(row["n"]) if row["n"] == row["cases"] else f"{row['n']} of {row['cases']}"
