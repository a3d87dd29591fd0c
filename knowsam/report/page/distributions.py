"""How the scores of cases are distributed: which plots there are, and what stands below them."""

from collections.abc import Iterator, Mapping, Sequence

from knowsam.report.document import Figure, figure
from knowsam.report.numbers import metric_name
from knowsam.report.page.plots import distribution_plot
from knowsam.report.page.score_tables import shared_metrics, shared_units
from knowsam.report.runs import Run

SHOWN_FIRST = ("dice", "hd95")
"""Metrics whose distributions need no unfolding."""


def distribution_figures(runs: Sequence[Run], outputs: Mapping[str, str]) -> tuple[list[Figure], list[Figure]]:
    """Plots that are shown at once, and those that are unfolded: a panel per class, a row per output or run.

    Args:
        runs: of the same classes.
        outputs: name of each run -> the output that stands for it among several.
    """
    if not runs:
        return [], []
    metrics = shared_metrics(runs)
    if len(runs) == 1:
        rows = {output: (runs[0], output) for output in runs[0].outputs}
    else:
        rows = {run.setting: (run, outputs[run.setting]) for run in runs}
    first = [_figure(metric, rows) for metric in metrics if metric in SHOWN_FIRST]
    more = [_figure(metric, rows) for metric in metrics if metric not in SHOWN_FIRST]
    if len(runs) > 1:
        more += _other_outputs(runs, outputs, metrics[0])
    return first, more


def _other_outputs(runs: Sequence[Run], outputs: Mapping[str, str], metric: str) -> Iterator[Figure]:
    """The runs beside each other by every output that does not stand for all of them anyway."""
    for output in dict.fromkeys(output for run in runs for output in run.outputs):
        having = [run for run in runs if output in run.outputs]
        if any(outputs[run.setting] != output for run in having):
            yield _figure(metric, {run.setting: (run, output) for run in having}, f" of {output}")


def _figure(metric: str, rows: Mapping[str, tuple[Run, str]], of: str = "") -> Figure:
    """One metric.

    Args:
        metric: that all runs have.
        rows: name of a row -> run and output.
        of: goes on after the metric's name.
    """
    runs = [run for run, _ in rows.values()]
    units = shared_units(runs)
    panels = {
        name: {row: list(run.case_values(output, name, metric).values()) for row, (run, output) in rows.items()}
        for name in runs[0].scores["class_names"]
    }
    colours = {row: i for i, row in enumerate(rows)}
    caption = f"{metric_name(metric, units, arrow=False)}{of}: a dot a case; box: quartiles, line: median, "
    caption += "whiskers: 5 % to 95 %"
    return figure(distribution_plot(f"cases {metric}{of}", panels, metric, units, colours), caption)
