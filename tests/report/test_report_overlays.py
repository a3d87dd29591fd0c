"""Which cases are pictured, and where their outlines run; curves that are thinned."""

import base64
import io
import math
import re

import numpy as np
import pytest
from PIL import Image
from report_runs import write_run

from knowsam.cli.compare import reader
from knowsam.report.overlays import LONGEST, Overlay, choose_cases, outline, telling_slice, to_svg
from knowsam.report.record import Series, read_records
from knowsam.report.run_plots import POINTS, Line, curves, distributions, thinned


def runs(tmp_path, *dice):
    folders = [write_run(tmp_path / f"r{i}", values, seed=i) for i, values in enumerate(dice)]
    return [record.scores for record in read_records(list(map(str, folders)), reader("test"))]


def area(path):
    """Of the closed lines of a path, by the shoelace formula; holes run the other way and count as minus."""
    total = 0.0
    for piece in path.split("M")[1:]:
        points = [tuple(map(float, point.split())) for point in piece.removesuffix("Z").split("L")]
        pairs = zip(points, points[1:] + points[:1], strict=True)
        total += sum(x1 * y2 - x2 * y1 for (x1, y1), (x2, y2) in pairs) / 2
    return abs(total)


def test_best_median_worst(tmp_path):
    (run,) = runs(tmp_path, {f"c{i}": i / 10 for i in range(1, 10)})
    picks = [(pick.why, pick.case) for pick in choose_cases([run], ["fusion"], 2)]
    expected = [("best", "c9"), ("best", "c8"), ("median", "c6"), ("median", "c5"), ("worst", "c1"), ("worst", "c2")]
    assert picks == expected
    assert choose_cases([run], ["fusion"], 0) == []
    assert len(choose_cases([run], ["fusion"], 50)) == 9, "each case once"


def test_several_runs_share_their_cases(tmp_path):
    a, b = runs(tmp_path, {"x": 0.9, "y": 0.5, "z": 0.1, "w": 0.9}, {"x": 0.8, "y": 0.5, "z": 0.2, "w": 0.3})
    picks = [(pick.why, pick.case) for pick in choose_cases([a, b], ["fusion", "fusion"], 1)]
    # Means: x 0.85, w 0.6, y 0.5, z 0.15; spreads: w 0.6.
    assert picks == [("best", "x"), ("median", "w"), ("worst", "z")]
    picks = choose_cases([a, b], ["fusion", "fusion"], 1)
    assert len({pick.case for pick in picks}) == len(picks)


def test_a_case_that_counts_for_one_run_only_is_not_chosen(tmp_path):
    a, b = runs(tmp_path, {"x": 0.9, "y": 0.5}, {"x": None, "y": 0.5})
    assert [pick.case for pick in choose_cases([a, b], ["fusion", "fusion"], 2)] == ["y"]


@pytest.mark.parametrize("ratio", [1.0, 2.5])
def test_an_outline_encloses_its_mask(ratio):
    mask = np.zeros((30, 40), bool)
    mask[5:15, 10:30] = True
    assert area(outline(mask, ratio)) == pytest.approx((200 - 4 / 8) * ratio, rel=0.002)
    numbers = [float(x) for x in re.findall(r"[\d.]+", outline(mask))]
    assert (min(numbers[::2]), max(numbers[::2])) == (10, 30) and (min(numbers[1::2]), max(numbers[1::2])) == (5, 15)


def test_outlines_at_the_border_with_holes_and_of_nothing():
    assert outline(np.zeros((8, 8), bool)) == ""
    full = np.ones((8, 9), bool)
    assert area(outline(full)) == pytest.approx(72 - 4 / 8)
    ring = np.zeros((20, 20), bool)
    ring[2:18, 2:18] = True
    ring[6:14, 6:14] = False
    assert outline(ring).count("M") == 2 and area(outline(ring)) == pytest.approx(256 - 64)
    one = np.zeros((8, 8), bool)
    one[3, 4] = True
    assert outline(one).count("M") == 1 and area(outline(one)) == pytest.approx(1 - 4 / 8)


def test_the_slice_that_shows_most():
    truth, prediction = np.zeros((3, 4, 4), np.uint8), np.zeros((3, 4, 4), np.uint8)
    prediction[0] = 1
    assert telling_slice(truth, prediction) == 0
    truth[2, 0, 0] = 2
    assert telling_slice(truth, prediction) == 2


@pytest.mark.parametrize(("size", "kind"), [((900, 1200), "jpeg"), ((96, 96), "png")])
def test_the_picture_is_small_and_the_outline_is_native(size, kind):
    image = np.full((*size, 3), 90, np.uint8)
    truth = np.zeros(size, np.uint8)
    truth[10:50, 20:80] = 1
    svg = to_svg(Overlay(image, truth, np.zeros_like(truth), "", None, {"x": 0.0}), 'say "this" <so>')
    assert f'viewBox="0 0 {size[1]} {size[0]}"' in svg and "say &quot;this&quot; &lt;so&gt;" in svg
    stored = Image.open(io.BytesIO(base64.b64decode(re.search(rf"data:image/{kind};base64,([^\"]+)", svg)[1])))
    assert max(stored.size) == min(max(size), LONGEST) and stored.getpixel((3, 3)) == (90, 90, 90)
    assert svg.count('class="truth') == 2 and 'class="answer' not in svg and " c0" not in svg


def test_classes_have_their_colours_and_pixels_their_shape():
    truth = np.zeros((20, 20), np.uint8)
    truth[2:6, 2:6], truth[10:14, 10:14] = 1, 2
    svg = to_svg(Overlay(np.zeros((20, 20, 3), np.uint8), truth, truth, "", (3.0, 1.5), {"a": 1.0, "b": 1.0}), "x")
    assert 'class="truth c0"' in svg and 'class="answer c1"' in svg and 'viewBox="0 0 20 40"' in svg


# ---------------------------------------------------------------- curves


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
    svg = curves("x", lines, "y")
    assert ">b<" not in svg and svg.count("<use ") >= 2, "lonely values are dots"


def test_many_decades_are_logarithmic_with_plain_numbers():
    svg = curves("x", [Line("a", Series([1, 2, 3], [1e-1, 1e-3, 1e-6]), 0)], "y", log=True)
    assert ">0.001<" in svg.replace("\n", "") and "mathdefault" not in svg
    svg = curves("x", [Line("a", Series([1, 2, 3], [1.0, 0.0, 1e-6]), 0)], "y", log=True)
    assert ">0.5<" in svg.replace("\n", "") or ">0.6<" in svg.replace("\n", "")


def test_a_class_without_a_counted_case_is_said():
    svg = distributions("x", {"one": {"a": [0.5, 0.6]}, "two": {"a": []}}, "dice", "px", {"a": 0})
    assert "no case counts" in svg and "two" in svg
