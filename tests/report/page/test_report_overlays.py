"""Where outlines run, and what is embedded beside them."""

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from knowsam.report.page.overlays import LONGEST, Overlay, outline, telling_slice, to_svg


def area(path):
    """Of the closed lines of a path, by the shoelace formula; holes run the other way and count as minus."""
    total = 0.0
    for piece in path.split("M")[1:]:
        points = [tuple(map(float, point.split())) for point in piece.removesuffix("Z").split("L")]
        pairs = zip(points, points[1:] + points[:1], strict=True)
        total += sum(x1 * y2 - x2 * y1 for (x1, y1), (x2, y2) in pairs) / 2
    return abs(total)


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
    assert svg.count('class="truth') == 2 and 'class="prediction' not in svg and " c0" not in svg


def test_classes_have_their_colours_and_pixels_their_shape():
    truth = np.zeros((20, 20), np.uint8)
    truth[2:6, 2:6], truth[10:14, 10:14] = 1, 2
    svg = to_svg(Overlay(np.zeros((20, 20, 3), np.uint8), truth, truth, "", (3.0, 1.5), {"a": 1.0, "b": 1.0}), "x")
    assert 'class="truth c0"' in svg and 'class="prediction c1"' in svg and 'viewBox="0 0 20 40"' in svg
