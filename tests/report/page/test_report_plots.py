"""Curves that are thinned, have gaps or span decades; distributions of nothing."""

import math

from knowsam.report.page.history import Series
from knowsam.report.page.plots import POINTS, Line, curve_plot, distribution_plot, thinned


def test_thinning_keeps_means_and_gaps():
    steps = list(range(1, 2 * POINTS + 1))
    short, every = thinned(Series(steps, [float(step) for step in steps]))
    assert every == 2 and short.steps[:2] == [2, 4] and short.values[:2] == [1.5, 3.5] and len(short.steps) == POINTS
    values = [math.nan, math.nan, math.nan, 1.0, *[2.0] * (2 * POINTS - 4)]
    short, _ = thinned(Series(steps, values))
    assert math.isnan(short.values[0]) and short.values[1] == 1.0
    assert thinned(Series([1], [1.0]))[1] == 1


def test_a_curve_with_gaps_and_nothing_else():
    lines = [Line("a", Series([1, 2, 3], [1.0, math.nan, 2.0]), 0), Line("b", Series([1], [math.nan]), 1)]
    svg = curve_plot("x", lines, "y")
    assert ">b<" not in svg and svg.count("<use ") >= 2, "lonely values are dots"


def test_many_decades_are_logarithmic_with_plain_numbers():
    svg = curve_plot("x", [Line("a", Series([1, 2, 3], [1e-1, 1e-3, 1e-6]), 0)], "y", log=True)
    assert ">0.001<" in svg.replace("\n", "") and "mathdefault" not in svg
    svg = curve_plot("x", [Line("a", Series([1, 2, 3], [1.0, 0.0, 1e-6]), 0)], "y", log=True)
    assert ">0.5<" in svg.replace("\n", "") or ">0.6<" in svg.replace("\n", "")


def test_a_class_without_a_counted_case_is_said():
    svg = distribution_plot("x", {"one": {"a": [0.5, 0.6]}, "two": {"a": []}}, "dice", "px", {"a": 0})
    assert "no case counts" in svg and "two" in svg
