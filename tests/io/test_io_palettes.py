"""Palettes: when the index counts, when the colour, when nobody can tell, and whether files agree."""

from pathlib import Path

import numpy as np
import pytest

from knowsam.errors import DataError
from knowsam.io import PaletteWatch
from knowsam.io.palettes import read_palette

INDICES = np.array([[0, 1, 2], [1, 1, 0]], np.uint8)
BINARY = INDICES % 2
GREYS = {"black": 0, "white": 255, "mid": 128}
RED, GREEN = (200, 0, 0), (0, 200, 0)


def grey(*levels):
    return np.repeat(np.array(levels, np.uint8)[:, None], 3, axis=1)


def table(*colours):
    return np.array(colours, np.uint8)


def read(indices, palette, rule="auto", where="a.png"):
    return read_palette(indices, palette, rule, Path(where))


@pytest.mark.parametrize(
    ("palette", "indices", "wanted", "by"),
    [
        (grey(0, 255), BINARY, BINARY * 255, "colour"),
        (grey(255, 0), BINARY, 255 - BINARY * 255, "colour"),
        (grey(0, 255, *[0] * 254), BINARY, BINARY * 255, "colour"),  # filled up
        (grey(255, 0, *[0] * 254), BINARY, 255 - BINARY * 255, "colour"),
        (grey(0, 128), BINARY, BINARY * 128, "colour"),
        (grey(*range(256)), INDICES, INDICES, "index"),
        (grey(0, 85, 170, 255), INDICES, INDICES, "index"),
        (grey(255, 128, 0), INDICES, np.array([255, 128, 0])[INDICES], "colour"),
        (grey(0, 255, 128), INDICES, np.array([0, 255, 128])[INDICES], "colour"),
        (grey(0), INDICES * 0, INDICES * 0, "colour"),
        (table((0, 0, 0), RED, GREEN), INDICES, INDICES, "index"),
        (table((10, 20, 30), RED, GREEN), INDICES, INDICES, "index"),  # nearly black
        (table((0, 0, 0), (255, 255, 255), RED), BINARY, BINARY, "index"),  # whether or not red occurs
    ],
)
def test_auto(palette, indices, wanted, by):
    mask = read(indices, palette)
    assert (mask.array == wanted).all() and mask.by == by
    assert mask.palette == {int(i): tuple(palette[i].tolist()) for i in np.unique(indices)}
    assert bool(mask.notes) == (by == "colour")


def test_options():
    coloured = table(RED, (0, 0, 0), GREEN)
    assert (read(INDICES, coloured, "index").array == INDICES).all()
    assert (read(INDICES, coloured, "colour").array == coloured[INDICES]).all()
    assert (read(BINARY, grey(0, 255), "index").array == BINARY).all()
    assert (read(INDICES, grey(0, 85, 170), "colour").array == INDICES * 85).all()
    assert (read(INDICES, table((0, 0, 0), RED), "colour").array == table((0, 0, 0), RED, (0, 0, 0))[INDICES]).all()


def test_what_nobody_can_tell_is_refused_with_both_readings():
    with pytest.raises(DataError) as caught:
        read(INDICES, table(GREEN, RED, (0, 0, 0)), where="some/m1.png")
    assert "some/m1.png: a coloured palette whose entry 0 is rgb(0, 200, 0), not black" in str(caught.value)
    assert "index 0 = rgb(0, 200, 0) (2 pixels), index 1 = rgb(200, 0, 0) (3 pixels)" in str(caught.value)
    assert "data.reading.palette" in caught.value.hint


def test_files_that_agree():
    watch = PaletteWatch()
    for where, palette in (("a", grey(0, 255)), ("b", grey(255, 0))):  # the colour counts in both
        watch.check(Path(where), read(BINARY, palette))
    watch = PaletteWatch()
    watch.check(Path("a"), read(INDICES, table((0, 0, 0), RED, GREEN)))
    watch.check(Path("b"), read(BINARY, table((0, 0, 0), RED, GREEN, (1, 2, 200))))
    watch.check(Path("c"), read(BINARY * 0, grey(0, 255)))  # black all over
    watch.check(Path("d"), read(BINARY, np.zeros((2, 3), np.uint8), "index"))


@pytest.mark.parametrize(
    ("first", "second", "told"),
    [
        (table((0, 0, 0), RED, GREEN), table((0, 0, 0), GREEN, RED), ["index 1", "rgb(200, 0, 0)", "rgb(0, 200, 0)"]),
        (table((0, 0, 0), RED, GREEN), grey(0, 128, 255), ["index 1", "rgb(200, 0, 0)", "rgb(128, 128, 128)"]),
        (table((0, 0, 0), RED, GREEN), grey(0, 255, 128), ["by index", "by grey level"]),
        (grey(255, 128, 0), grey(0, 128, 255), ["by index", "by grey level"]),
    ],
)
def test_files_that_do_not_agree(first, second, told):
    masks = [("one/a.png", read(INDICES, first)), ("two/b.png", read(INDICES, second))]
    for order in (masks, masks[::-1]):
        watch = PaletteWatch()
        watch.check(Path(order[0][0]), order[0][1])
        with pytest.raises(DataError) as caught:
            watch.check(Path(order[1][0]), order[1][1])
        assert all(text in str(caught.value) for text in ("one/a.png", "two/b.png", *told))
        assert "data.reading.palette" in caught.value.hint
    decided = PaletteWatch("index")
    for where, mask in masks:
        decided.check(Path(where), mask)
