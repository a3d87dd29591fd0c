"""Drawings as SVG text: the same bytes for the same numbers, and colours that a page can replace."""

import io
import math
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.typing import RcKeyType

INK, FAINT = "#1f2328", "#d0d7de"
"""Text and axes; grid lines. No series has these colours, so a page may exchange them for those of a dark theme."""

# Okabe and Ito's palette, which colour-blind readers can tell apart; dark enough for white, light enough for black.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56a4d9", "#8a6fc7", "#7a7a7a")

_WIDTH = 5.6
"""Inches."""

_STYLE: "dict[RcKeyType, Any]" = {
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


@dataclass
class Drawing:
    """A plot in the making.

    Attributes:
        figure, axes: to draw into.
        svg: the plot, once it is finished.
    """

    figure: "Figure"
    axes: "Axes"
    svg: str = ""


@contextmanager
def drawing(name: str, height: float, width: float = _WIDTH) -> Iterator[Drawing]:
    """A figure to draw into; its ``svg`` is there when the block ends. No setting of the user shows.

    Args:
        name: different for every drawing of a page.
        height, width: inches; what is narrower has larger letters where a page gives both the same room.
    """
    import matplotlib
    from matplotlib import style
    from matplotlib.figure import Figure

    # The salt makes the ids of clips and markers a function of the plot instead of chance.
    with style.context("default"), matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the reader's font may have it
        figure = Figure(figsize=(width, height))
        plot = Drawing(figure, figure.add_subplot())
        yield plot
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
        # Trailing blanks and the version of the library are no part of the picture.
        plot.svg = "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n"


def draw_box(axes: "Axes", values: np.ndarray, position: float, *, width: float, median: float) -> None:
    """A lying box over the quartiles. Whiskers to the 5th and 95th percentile: dots show what lies beyond.

    Args:
        axes: to draw into.
        values: at least one.
        position: of its middle, on the vertical axis.
        width: in units of the vertical axis.
        median: width of the line at the median, in points.
    """
    box = axes.boxplot(
        values, positions=[position], orientation="horizontal", widths=width, whis=(5, 95), showfliers=False
    )
    for part in (*box["boxes"], *box["whiskers"], *box["caps"], *box["medians"]):
        part.set(color=INK, linewidth=1.1)
    for part in box["medians"]:
        part.set(linewidth=median)


def jitter(count: int) -> np.ndarray:
    """Vertical offsets that keep dots apart, by the golden ratio instead of chance."""
    return (np.arange(count) * (math.sqrt(5) - 1) / 2 % 1 - 0.5) * 0.5


def wrapped(name: str, width: int = 28) -> str:
    """A long name on several lines of at most ``width`` letters, broken after a comma or a dot if there is one."""
    lines, rest = [], name
    while len(rest) > width:
        cut = max(rest.rfind(mark, 0, width) for mark in ", .=_")
        cut = cut + 1 if cut > width // 3 else width
        lines.append(rest[:cut].rstrip())
        rest = rest[cut:].lstrip()
    return "\n".join([*lines, rest])


def for_page(svg: str, description: str) -> str:
    """The plot as part of an HTML page: no file of its own, its colours are the page's variables.

    Args:
        svg: what ``drawing`` made.
        description: plain words for readers who do not see it.
    """
    inner = svg[svg.index("<svg") :]
    inner = re.sub(r"<metadata>.*?</metadata>", "", inner, flags=re.DOTALL)
    inner = re.sub(r' xmlns(:\w+)?="[^"]*"', "", inner)
    # Several plots share the page: names that nothing refers to would stand there twice.
    inner = re.sub(r' id="[A-Za-z.]+\d*[A-Za-z]*_\d+"', "", inner)
    inner = inner.replace(INK, "var(--ink)").replace(FAINT, "var(--faint)")
    for i, colour in enumerate(COLOURS):
        inner = inner.replace(colour, f"var(--series-{i})")
    return inner.replace("<svg ", f'<svg role="img" aria-label="{escape(description)}" ', 1)
