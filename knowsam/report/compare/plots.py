"""Plots of a comparison: scores against the number of labelled cases, and each case's difference to the baseline."""

import numpy as np

from knowsam.engine.scores import MEAN
from knowsam.report.compare.comparison import TableSet
from knowsam.report.drawing import COLOURS, INK, draw_box, drawing, jitter, wrapped
from knowsam.report.numbers import metric_name, scale

_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


def label_efficiency(tables: TableSet, metric: str) -> str:
    """Mean over seeds against the number of labelled cases, a line per method with a band of one sd.

    Args:
        tables: with curves.
        metric: one of its metrics.
    Returns:
        SVG.
    """
    counts = sorted({count for curve in tables.curves for count, _ in curve.points})
    with drawing(f"label_efficiency {tables.experiment} {metric}", 3.9) as plot:
        axes = plot.axes
        for i, curve in enumerate(tables.curves):
            colour = COLOURS[i % len(COLOURS)]
            points = [(count, row.cells[MEAN, metric].values) for count, row in curve.points]
            points = [(count, values) for count, values in points if values.mean is not None]
            x = [count for count, _ in points]
            y = np.array([values.mean for _, values in points]) * scale(metric)
            sd = np.array([values.sd or 0.0 for _, values in points]) * scale(metric)
            marker = _MARKERS[i % len(_MARKERS)]
            axes.plot(x, y, color=colour, marker=marker, markersize=5.5, linewidth=1.8, label=curve.name)
            if sd.any():
                axes.fill_between(x, y - sd, y + sd, color=colour, alpha=0.18, linewidth=0)
        if counts[-1] / counts[0] >= 6:
            axes.set_xscale("log")
        axes.set_xticks(counts, labels=[str(count) for count in counts])
        axes.minorticks_off()
        axes.grid(axis="y")
        axes.set_xlabel("labelled cases")
        axes.set_ylabel(f"{metric_name(metric, tables.units)} ({tables.scores['split']})")
        axes.legend(loc="best")
        plot.figure.tight_layout()
    return plot.svg


def differences(tables: TableSet, metric: str) -> str:
    """Each case's difference to the baseline: a dot per case, a box over its quartiles, a row per setting.

    Args:
        tables: with a baseline.
        metric: one of its metrics.
    Returns:
        SVG.
    """
    rows = [row for row in tables.rows if row.cells[MEAN, metric].differences]
    with drawing(f"differences {tables.experiment} {metric}", 1.25 + 0.5 * len(rows)) as plot:
        axes = plot.axes
        axes.axvline(0, color=INK, linewidth=1)
        for i, row in enumerate(rows):
            values = np.array(list(row.cells[MEAN, metric].differences.values())) * scale(metric)
            colour = COLOURS[i % len(COLOURS)]
            axes.scatter(values, i + jitter(len(values)), s=9, color=colour, alpha=0.5, linewidths=0)
            draw_box(axes, values, i, width=0.34, median=2)
        axes.set_yticks(range(len(rows)), labels=[wrapped(row.setting) for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x")
        unit = "points" if scale(metric) != 1 else tables.units
        name = metric_name(metric, tables.units, arrow=False).rpartition(" ")[0]
        better = "right" if metric_name(metric, "").endswith("↑") else "left"
        axes.set_xlabel(f"{name} minus that of {wrapped(str(tables.baseline), 40)}\n{unit} a case; {better} is better")
        plot.figure.tight_layout()
    return plot.svg
