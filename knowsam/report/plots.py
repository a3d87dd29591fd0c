"""Plots as SVG text: the same bytes for the same numbers, and colours that a page can replace."""

import io
import math
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from knowsam.engine.scores import MEAN
from knowsam.report.comparison import TableSet
from knowsam.report.tables import metric_name, scale

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, FAINT = "#1f2328", "#d0d7de"
"""Text and axes; grid lines. No series has these colours, so a page may exchange them for those of a dark theme."""

# Okabe and Ito's palette, which colour-blind readers can tell apart; dark enough for white, light enough for black.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56a4d9", "#8a6fc7", "#7a7a7a")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_WIDTH = 5.6
"""Inches."""

_STYLE = {
    "svg.fonttype": "none",  # text stays text
    "font.size": 10.5,
    "text.parse_math": False,  # a dollar in a name is a dollar
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.8,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}


def label_efficiency(tables: TableSet, metric: str) -> str:
    """Mean over seeds against the number of labelled cases, a line per method with a band of one sd.

    Args:
        tables: with curves.
        metric: one of its metrics.
    Returns:
        SVG.
    """
    counts = sorted({count for curve in tables.curves for count, _ in curve.points})
    with drawing(f"label_efficiency {tables.experiment} {metric}", 3.9) as (figure, axes, result):
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
        figure.tight_layout()
    return result[0]


def differences(tables: TableSet, metric: str) -> str:
    """Each case's difference to the baseline: a dot per case, a box over its quartiles, a row per setting.

    Args:
        tables: with a baseline.
        metric: one of its metrics.
    Returns:
        SVG.
    """
    rows = [row for row in tables.rows if row.cells[MEAN, metric].differences]
    with drawing(f"differences {tables.experiment} {metric}", 1.25 + 0.5 * len(rows)) as (figure, axes, result):
        axes.axvline(0, color=INK, linewidth=1)
        for i, row in enumerate(rows):
            values = np.array(list(row.cells[MEAN, metric].differences.values())) * scale(metric)
            colour = COLOURS[i % len(COLOURS)]
            axes.scatter(values, i + jitter(len(values)), s=9, color=colour, alpha=0.5, linewidths=0)
            # Whiskers to the 5th and 95th percentile: the dots show what lies beyond.
            box = axes.boxplot(
                values, positions=[i], orientation="horizontal", widths=0.34, whis=(5, 95), showfliers=False
            )
            for part in (*box["boxes"], *box["whiskers"], *box["caps"], *box["medians"]):
                part.set(color=INK, linewidth=1.1)
            for part in box["medians"]:
                part.set(linewidth=2)
        axes.set_yticks(range(len(rows)), labels=[wrapped(row.setting) for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x")
        unit = "points" if scale(metric) != 1 else tables.units
        name = metric_name(metric, tables.units, arrow=False).rpartition(" ")[0]
        better = "right" if metric_name(metric, "").endswith("↑") else "left"
        axes.set_xlabel(f"{name} minus that of {wrapped(str(tables.baseline), 40)}\n{unit} a case; {better} is better")
        figure.tight_layout()
    return result[0]


def for_page(svg: str, description: str) -> str:
    """The plot as part of an HTML page: no file of its own, its colours are the page's variables.

    Args:
        svg: what this module drew.
        description: plain words for readers who do not see it; already escaped.
    """
    inner = svg[svg.index("<svg") :]
    inner = re.sub(r"<metadata>.*?</metadata>", "", inner, flags=re.DOTALL)
    inner = re.sub(r' xmlns(:\w+)?="[^"]*"', "", inner)
    # Several plots share the page: names that nothing refers to would stand there twice.
    inner = re.sub(r' id="[A-Za-z.]+\d*[A-Za-z]*_\d+"', "", inner)
    inner = inner.replace(INK, "var(--ink)").replace(FAINT, "var(--faint)")
    for i, colour in enumerate(COLOURS):
        inner = inner.replace(colour, f"var(--series-{i})")
    return inner.replace("<svg ", f'<svg role="img" aria-label="{description}" ', 1)


@contextmanager
def drawing(name: str, height: float, width: float = _WIDTH) -> Iterator[tuple["Figure", "Axes", list[str]]]:
    """A figure to draw into; its SVG stands in the list when the block ends. No setting of the user shows.

    Args:
        name: different for every drawing of a page.
        height, width: inches; what is narrower has larger letters where a page gives both the same room.
    """
    import matplotlib
    from matplotlib import style
    from matplotlib.figure import Figure

    result: list[str] = []
    # The salt makes the ids of clips and markers a function of the plot instead of chance.
    with style.context("default"), matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the reader's font may have it
        figure = Figure(figsize=(width, height))
        yield figure, figure.add_subplot(), result
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
        # Trailing blanks and the version of the library are no part of the picture.
        result.append("\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n")


def jitter(count: int) -> np.ndarray:
    """Vertical offsets that keep dots apart, by the golden ratio instead of chance."""
    return (np.arange(count) * (math.sqrt(5) - 1) / 2 % 1 - 0.5) * 0.5


def wrapped(name: str, width: int = 28) -> str:
    """A long name on several lines, broken after a comma or a dot if there is one."""
    lines, rest = [], name
    while len(rest) > width:
        cut = max(rest.rfind(mark, 0, width) for mark in ", .=_")
        cut = cut + 1 if cut > width // 3 else width
        lines.append(rest[:cut].rstrip())
        rest = rest[cut:].lstrip()
    return "\n".join([*lines, rest])
