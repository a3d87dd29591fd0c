import numpy as np
import pytest

from knowsam import losses, metrics
from knowsam.data.labels import IGNORE_ID, LabelTable, valid_pixels
from knowsam.errors import ConfigError, DataError


@pytest.mark.parametrize(
    ("declaration", "raw", "expected"),
    [
        ({0: 0, 1: 255}, [[0, 255]], [[0, 1]]),
        ({"0": [0], "1": [1, 2], "2": 300}, [[2, 1], [300, 0]], [[1, 1], [2, 0]]),
        ({0: [[0, 0, 0]], 1: [[255, 0, 0], [0, 255, 0]]}, [[[255, 0, 0], [0, 255, 0], [0, 0, 0]]], [[1, 1, 0]]),
        ({0: [[0, 0, 0]], 1: [[255, 255, 255]]}, [[0, 255, 0]], [[0, 1, 0]]),  # channels agreed: read as grey
        (None, [[0, 1], [2, 1]], [[0, 1], [2, 1]]),
    ],
)
def test_apply(declaration, raw, expected):
    classes = 3 if declaration is None else len(declaration)
    raw = np.array(raw, np.uint16 if np.max(raw) > 255 else np.uint8)
    ids = LabelTable(declaration, classes).apply(raw)
    assert ids.dtype == np.uint8
    np.testing.assert_array_equal(ids, expected)


@pytest.mark.parametrize(
    ("declaration", "threshold", "values"),
    [
        ({0: 0, 1: 255}, None, [0, 255]),
        ({"2": 300, "0": [4, 0], "1": [2, 1]}, None, [4, 2, 300]),  # the first that is declared
        ({1: [[255, 0, 9], [1, 1, 1]], 0: [[0, 0, 0]]}, None, [(0, 0, 0), (255, 0, 9)]),
        (None, 127, [0, 255]),
        (None, None, [0, 1]),
    ],
)
def test_raw_values_are_classes_again(declaration, threshold, values):
    table = LabelTable(declaration, len(values), threshold=threshold)
    assert table.raw_values() == values
    raw = np.array([values], np.uint8 if isinstance(values[0], tuple) else np.uint16)
    assert table.apply(raw).tolist() == [list(range(len(values)))]


def test_volumes_and_threshold():
    volume = np.array([0, 255] * 8, np.uint8).reshape(2, 2, 4)
    np.testing.assert_array_equal(LabelTable({0: 0, 1: 255}, 2).apply(volume), volume // 255)
    soft = np.array([[0, 3, 127, 128, 254]], np.uint8)
    assert LabelTable(None, 2, threshold=127).apply(soft).tolist() == [[0, 0, 0, 1, 1]]


@pytest.mark.parametrize(
    ("table", "raw", "message", "hint"),
    [
        (LabelTable({0: 0, 1: 255}, 2), [[0, 7, 7]], r"7 \(2 pixels\).*allowed are 0 \(class 0\), 255", "table"),
        (LabelTable({0: 0, 1: 255}, 2), [[0, 1, 2, 253, 254]], r"254 \(1 pixels\)", "threshold: 127"),
        (LabelTable({0: 0, 1: 1, 2: 2}, 3), [[3, 4, 5, 6]], r"6 \(1 pixels\)", "JPEG"),
        (LabelTable(None, 4), [[0, 4]], r"4 \(1 pixels\).*allowed are 0\.\.3", "table"),
        (LabelTable(None, 2), [[0, 255]], "255", "{0: 0, 1: 255}"),
        (LabelTable({0: 0, 1: 255}, 2), [[[1, 2, 3]]], "colour picture", "[[255, 0, 0]]"),
        (LabelTable({0: [[0, 0, 0]], 1: [[9, 0, 0]]}, 2), [[[9, 0, 1]]], r"\[9, 0, 1\] \(1 pixels\)", "table"),
    ],
)
def test_apply_refuses(table, raw, message, hint):
    with pytest.raises(DataError, match=message) as caught:
        table.apply(np.array(raw, np.uint8), where="case_7.png")
    assert "case_7.png" in str(caught.value)
    assert hint in caught.value.hint


def test_many_values_are_shortened_and_jpeg_is_suspected():
    table = LabelTable({0: 0, 1: 255}, 2)
    with pytest.raises(DataError, match="and 246 more values"):
        table.apply(np.arange(256, dtype=np.uint8).reshape(16, 16))
    with pytest.raises(DataError) as caught:
        table.apply(np.array([[1]], np.uint8), where="mask.jpg")
    assert "JPEG" in caught.value.hint


@pytest.mark.parametrize(
    ("declaration", "options", "message"),
    [
        ({0: 0}, {}, r"classes \[0\] are declared; needed are 0..1"),
        ({0: 0, 2: 1}, {}, "needed are 0..1"),
        ({0: 0, "x": 1}, {}, "'x' is not a number"),
        ({0: 0, "0": 1}, {}, "class 0 is declared twice"),
        ({0: 0, 1: 0}, {}, "raw value 0 is declared twice"),
        ({0: [0, 0, 0], 1: [255, 0, 0]}, {}, "declared twice"),
        ({0: 0, 1: [[1, 1, 1]]}, {}, "mixed"),
        ({0: 0, 1: []}, {}, "no raw value"),
        ({0: [[0, 0]], 1: [[1, 1, 1]]}, {}, "not a colour"),
        ({0: 0, 1: -1}, {}, "0..65535"),
        ({0: 0, 1: "red"}, {}, "'red'"),
        ({0: 0, 1: True}, {}, "True"),
        ({0: [[0, 0, 0]], 1: [[256, 0, 0]]}, {}, "0..255"),
        ({0: 0, 1: 1}, {"threshold": 127}, "exclude each other"),
        (None, {"threshold": 127, "num_classes": 3}, "num_classes is 3"),
        (None, {"num_classes": 1}, "2..255"),
    ],
)
def test_declaration_refused(declaration, options, message):
    with pytest.raises(ConfigError, match=message):
        LabelTable(declaration, **{"num_classes": 2, **options})


def test_repr_tells_tables_apart():
    assert repr(LabelTable({0: 0, 1: [255, 3]}, 2)) == repr(LabelTable({1: [3, 255], 0: [0]}, 2))
    tables = [
        LabelTable({0: 0, 1: 255}, 2),
        LabelTable({0: 255, 1: 0}, 2),
        LabelTable(None, 2),
        LabelTable(None, 3),
        LabelTable(None, 2, threshold=1),
    ]
    assert len({repr(t) for t in tables}) == 5


def test_one_ignore_label_in_the_whole_package():
    assert IGNORE_ID == losses.IGNORE == metrics.IGNORE_ID == 255


@pytest.mark.parametrize(
    ("declaration", "classes", "options", "raw", "expected"),
    [
        (None, 2, {"ignore": 255}, [[0, 1, 255]], [[0, 1, 255]]),
        (None, 2, {"ignore": [254, 255]}, [[254, 1, 255]], [[255, 1, 255]]),
        (None, 3, {"ignore": 65535}, [[0, 2, 65535]], [[0, 2, 255]]),
        ({0: 0, 1: 255}, 2, {"ignore": 128}, [[0, 128, 255]], [[0, 255, 1]]),
        ({0: 0, 1: [1, 2]}, 2, {"ignore": [7, 300]}, [[7, 2, 300]], [[255, 1, 255]]),
        (None, 2, {"threshold": 127, "ignore": 128}, [[0, 127, 128, 129]], [[0, 0, 255, 1]]),
        (None, 2, {"threshold": 0}, [[0, 1, 2, 300]], [[0, 1, 1, 1]]),  # numbered objects, one class
        (None, 2, {"threshold": 0, "ignore": 255}, [[0, 3, 255]], [[0, 1, 255]]),
        (
            {0: [[0, 0, 0]], 1: [[255, 0, 0]]},
            2,
            {"ignore": [[224, 224, 192]]},
            [[[255, 0, 0], [224, 224, 192], [0, 0, 0]]],
            [[1, 255, 0]],
        ),
        ({0: [[0, 0, 0]], 1: [[9, 0, 0]]}, 2, {"ignore": [[128, 128, 128]]}, [[0, 128]], [[0, 255]]),  # read as grey
    ],
)
def test_ignored_values_become_the_ignore_label(declaration, classes, options, raw, expected):
    raw = np.array(raw, np.uint16 if np.max(raw) > 255 else np.uint8)
    table = LabelTable(declaration, classes, **options)
    ids = table.apply(raw)
    assert ids.dtype == np.uint8
    np.testing.assert_array_equal(ids, expected)
    np.testing.assert_array_equal(valid_pixels(ids), np.array(expected) != 255)
    wide, ids = (np.concatenate([x] * 4, axis=1) for x in (raw, ids))  # (H, 3) would be taken for colours
    np.testing.assert_array_equal(table.apply(np.stack([wide, wide])), np.stack([ids, ids]))  # colours (D, H, W, 3) too
    assert len(table.raw_values()) == classes, "what is ignored is no class to be written"
    ignored = options.get("ignore", [])
    assert table.ignored == [tuple(v) if isinstance(v, list) else v for v in (np.atleast_1d(ignored).tolist())]


def test_every_pixel_counts_where_nothing_is_ignored():
    ids = LabelTable({0: 0, 1: 255}, 2).apply(np.array([[0, 255]], np.uint8))
    assert valid_pixels(ids).all() and LabelTable(None, 2).ignored == []


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.int64])
def test_any_whole_numbers(dtype):
    table = LabelTable({0: 0, 1: 7}, 2, ignore=255)
    assert table.apply(np.array([[0, 7, 255]], dtype)).tolist() == [[0, 1, 255]]
    if dtype(0).itemsize > 2:
        with pytest.raises(DataError, match=r"70000 \(1 pixels\)"):
            table.apply(np.array([[0, 70000]], dtype))


@pytest.mark.parametrize(
    ("declaration", "options", "message"),
    [
        ({0: 0, 1: 255}, {"ignore": 255}, "raw value 255 is class 1 in the label table"),
        (None, {"ignore": 1}, "raw value 1 is a class"),
        (None, {"ignore": [[1, 2, 3]]}, "the raw values of the classes are numbers"),
        ({0: 0, 1: 1}, {"ignore": [[1, 2, 3]]}, "the raw values of the classes are numbers"),
        ({0: [[0, 0, 0]], 1: [[1, 1, 1]]}, {"ignore": 255}, "the label table has colours"),
        ({0: [[0, 0, 0]], 1: [[1, 1, 1]]}, {"ignore": [9, 9, 9]}, "the label table has colours"),
        ({0: [[0, 0, 0]], 1: [[1, 1, 1]]}, {"ignore": [[9, 9]]}, "ignore: .* is not a colour"),
        (None, {"ignore": "white"}, "ignore: raw value 'white'"),
        (None, {"ignore": -1}, "0..65535"),
    ],
)
def test_ignored_values_refused(declaration, options, message):
    with pytest.raises(ConfigError, match=message):
        LabelTable(declaration, 2, **options)


def test_a_strange_value_is_told_with_what_is_ignored():
    with pytest.raises(
        DataError, match=r"7 \(1 pixels\) have no class; allowed are .*; ignored are 200, 255"
    ) as caught:
        LabelTable({0: 0, 1: 1}, 2, ignore=[255, 200]).apply(np.array([[0, 7]], np.uint8))
    assert "or to ignore" in caught.value.hint


def test_ignored_values_are_part_of_the_cache_key():
    tables = [LabelTable({0: 0, 1: 1}, 2, ignore=value) for value in (None, 255, [254, 255])]
    assert len({repr(t) for t in tables}) == 3
    assert repr(LabelTable(None, 2, ignore=[255, 254])) == repr(LabelTable(None, 2, ignore=[254, 255]))
