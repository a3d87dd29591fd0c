"""Plots of single runs as SVG text: curves over the training, and how the scores of cases are distributed."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from knowsam.report.drawing import COLOURS, draw_box, drawing, jitter, wrapped
from knowsam.report.numbers import metric_name, scale
from knowsam.report.page.history import Series

if TYPE_CHECKING:
    from matplotlib.axes import Axes

POINTS = 400
"""Points of a curve; longer ones are averaged over neighbours."""

_WIDTH = 4.4
"""Inches: three beside each other on a screen, one on a telephone."""

_LEGEND = 46
"""Letters that fit beside each other above a plot."""

_STYLES = ("-", "--", ":", "-.")


@dataclass(frozen=True)
class Line:
    """One curve.

    Attributes:
        name: for the legend.
        series: its numbers.
        colour: place in the palette; the same run or output has the same colour in every plot of a page.
        factor: values are multiplied by it, 100 for percent.
        mark: step at which to set a dot, such as that of the best checkpoint.
    """

    name: str
    series: Series
    colour: int
    factor: float = 1.0
    mark: int | None = None


def thinned(series: Series) -> tuple[Series, int]:
    """A series of at most ``POINTS`` points, each the mean of neighbours, and of how many they are.

    A value that is not finite takes no part; where none of the neighbours is finite there is a gap.
    """
    every = math.ceil(len(series.steps) / POINTS)
    if every <= 1:
        return series, 1
    blocks = [slice(i, i + every) for i in range(0, len(series.steps), every)]
    values = [[v for v in series.values[block] if math.isfinite(v)] for block in blocks]
    means = [math.fsum(some) / len(some) if some else math.nan for some in values]
    return Series([series.steps[block][-1] for block in blocks], means), every


def curve_plot(name: str, lines: Sequence[Line], ylabel: str, *, legend: bool = True, log: bool = False) -> str:
    """Curves over the steps of the training.

    Args:
        name: different for every plot of a page.
        lines: what to draw; those without a number are left out.
        ylabel: what the numbers are.
        legend: whether to name the lines.
        log: logarithmic where all values are positive and span more than a factor of 20.
    Returns:
        SVG.
    """
    drawn = [line for line in lines if line.series.finite]
    across = max(1, min(len(drawn), _LEGEND // (max((len(line.name) for line in drawn), default=1) + 5)))
    rows = math.ceil(len(drawn) / across) if legend and len(drawn) > 1 else 0
    with drawing(name, 2.5 + 0.22 * rows, _WIDTH) as plot:
        axes = plot.axes
        for line in drawn:
            series, _ = thinned(line.series)
            x, y = np.array(series.steps), np.array(series.values) * line.factor
            colour, style = COLOURS[line.colour % len(COLOURS)], _STYLES[line.colour // len(COLOURS) % len(_STYLES)]
            # A value between two gaps would be drawn as nothing.
            dots: dict[str, Any] = {"marker": "o", "markersize": 3.5} if len(x) <= 30 or _lonely(y) else {}
            axes.plot(x, y, style, color=colour, linewidth=1.6, label=line.name, **dots)
            if line.mark is not None and line.mark in line.series.steps:
                value = line.series.values[line.series.steps.index(line.mark)] * line.factor
                axes.plot([line.mark], [value], "o", markersize=8, markerfacecolor="none", color=colour, mew=1.8)
        finite = [value for line in drawn for value in line.series.finite]
        if log and finite and min(finite) > 0 and max(finite) / min(finite) > 20:
            axes.set_yscale("log")
        _plain_numbers(axes)
        axes.grid(axis="y")
        axes.margins(x=0.02)
        axes.locator_params(axis="x", integer=True, nbins=5)
        axes.set_xlabel("step")
        axes.set_ylabel(ylabel)
        if rows:
            axes.legend(
                loc="lower left",
                bbox_to_anchor=(-0.02, 1.0),
                borderaxespad=0.2,
                ncols=across,
                columnspacing=1.2,
                handlelength=1.6,
            )
        plot.figure.tight_layout(pad=0.4, rect=(0, 0, 0.98, 1))
    return plot.svg


def distribution_plot(
    name: str, panels: Mapping[str, Mapping[str, Sequence[float]]], metric: str, unit: str, colours: Mapping[str, int]
) -> str:
    """The scores of cases: a dot per case, a box over the quartiles, a row each.

    Args:
        name: different for every plot of a page.
        panels: title of a panel, such as a class -> name of a row, such as an output or a run -> scores.
        metric, unit: what they are.
        colours: name of a row -> place in the palette.
    Returns:
        SVG.
    """
    rows = [(title, row, values) for title, of in panels.items() for row, values in of.items()]
    titled = len(panels) > 1
    positions, place = [], 0.0
    for i, (title, _, _) in enumerate(rows):
        place += (1.0 if i else 0.0) + (0.75 if titled and i and title != rows[i - 1][0] else 0.0)
        positions.append(place)
    top = -1.15 if titled else -0.6
    names = {row: wrapped(row, 18) for _, row, _ in rows}
    lines = max(text.count("\n") + 1 for text in names.values())
    height = 0.75 + (positions[-1] + 0.6 - top) * max(0.36, 0.17 * lines)
    with drawing(name, height, _WIDTH) as plot:
        axes = plot.axes
        left = axes.get_yaxis_transform()
        for (title, row, values), position in zip(rows, positions, strict=True):
            if titled and row == next(iter(panels[title])):
                axes.text(0, position - 0.72, title, transform=left, va="center", weight="bold")
            if not values:
                axes.text(0.01, position, "no case counts", transform=left, va="center", alpha=0.7)
                continue
            scaled = np.array(values) * scale(metric)
            _draw_dots(axes, scaled, position + jitter(len(scaled)) * 1.1, COLOURS[colours[row] % len(COLOURS)])
            draw_box(axes, scaled, position, width=0.42, median=2.2)
        axes.set_yticks(positions, labels=[names[row] for _, row, _ in rows])
        axes.set_ylim(positions[-1] + 0.6, top)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x")
        if scale(metric) == 100:
            axes.set_xlim(-2, 102)
        else:
            axes.set_xlim(left=min(0, axes.get_xlim()[0]))
        axes.set_xlabel(metric_name(metric, unit))
        plot.figure.tight_layout(pad=0.4, rect=(0, 0, 0.98, 1))
    return plot.svg


def _draw_dots(axes: "Axes", x: np.ndarray, y: np.ndarray, colour: str) -> None:
    """A dot per value, all of them one path: a marker each would make pages of several runs huge."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    ends = np.repeat(np.column_stack([x, y]), 2, axis=0)
    path = Path(ends, [Path.MOVETO, Path.LINETO] * len(x))
    path.should_simplify = False
    axes.add_patch(PathPatch(path, fill=False, edgecolor=colour, linewidth=3.2, capstyle="round", alpha=0.5))
    axes.update_datalim(ends)
    axes.autoscale_view()


def _lonely(values: np.ndarray) -> bool:
    """Whether some value has a gap on both sides."""
    gap = np.concatenate([[True], ~np.isfinite(values), [True]])
    return bool((~gap[1:-1] & gap[:-2] & gap[2:]).any())


def _plain_numbers(axes: "Axes") -> None:
    """``0.0004`` instead of ``4`` with a factor in the corner, and ``1e-06`` instead of a formula."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.6g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    if axes.get_yscale() == "log":
        low, high = axes.get_ylim()
        # Less than two decades may hold a single power of ten, which is no scale.
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 100 else (1,), numticks=8))
