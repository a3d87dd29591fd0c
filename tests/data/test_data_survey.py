import numpy as np
import pytest
from PIL import Image

from knowsam.data.label_guess import connected_parts, guess_labels
from knowsam.data.labels import LabelTable
from knowsam.data.layout import find_layout
from knowsam.data.survey import class_pixels, raw_values, suggest_intensity, survey, without_strange_masks
from knowsam.errors import DataError


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
    for name in "abcdef":
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), np.uint8)).save(tmp_path / "images" / f"{name}.png")
        Image.fromarray(rng.integers(0, 2, (20, 24), np.uint8) * 255).save(tmp_path / "masks" / f"{name}.png")
    return tmp_path


def test_a_good_folder(folder):
    (folder / "masks" / "f.png").unlink()
    seen = []
    found = survey(find_layout(folder), progress=lambda done, total: seen.append((done, total)))
    assert [case.id for case in found.cases] == list("abcdef") and found.faults == [] and found.orphans == []
    assert [case.values is not None for case in found.cases] == [True] * 5 + [False]
    assert found.cases[0].values.keys() == {0, 255} and sum(found.cases[0].values.values()) == 480
    assert seen[-1] == (6, 6)


def test_every_broken_file_is_told_and_passed_over(folder):
    images, masks = folder / "images", folder / "masks"
    (images / "a.png").write_bytes((images / "a.png").read_bytes()[:300])
    (masks / "b.png").write_bytes(b"")
    Image.new("L", (20, 24)).save(masks / "c.png")  # width and height swapped
    Image.new("RGB", (4, 4)).save(images / "d.jpg")
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (20, 24, 3), np.uint8)).resize((99, 99)).save(
        masks / "e.png"
    )
    Image.new("L", (9, 9)).save(masks / "g.png")
    Image.new("L", (9, 9)).save(images / "#h.png")
    found = survey(find_layout(folder))
    told = {(fault.kind, fault.cases[0]): fault.text for fault in found.faults}
    assert set(told) == {
        ("image left out", "a"),
        ("mask not used", "b"),
        ("mask not used", "c"),
        ("image left out", "d"),
        ("mask not used", "e"),
        ("image left out", "#h"),
    }
    assert "truncated" in told["image left out", "a"] and "0 bytes" in told["mask not used", "b"]
    assert "24 x 20, the image 20 x 24" in told["mask not used", "c"]
    assert "d.jpg" in told["image left out", "d"] and "d.png" in told["image left out", "d"]
    assert found.orphans == ["g"]
    assert [case.id for case in found.cases if case.values is not None] == ["f"]


def test_numbered_masks_are_not_half_used(folder):
    for name in "abcdef":
        (folder / "masks" / f"{name}.png").rename(folder / "masks" / f"{name}_mask.png")
    Image.new("L", (24, 20)).save(folder / "masks" / "b_mask_1.png")
    found = survey(find_layout(folder))
    (fault,) = found.faults
    assert fault.cases == ("b",) and "--several-masks merge" in fault.text
    assert [case.id for case in found.cases if case.values is not None] == list("acdef")


def test_strange_values_cost_the_mask(folder):
    mask = np.array(Image.open(folder / "masks" / "b.png"))
    mask[0, :3] = 7
    Image.fromarray(mask).save(folder / "masks" / "b.png")
    found = survey(find_layout(folder))
    cases, faults = without_strange_masks(found.cases, LabelTable({0: 0, 1: 255}, 2))
    assert [case.id for case in cases if case.values is None] == ["b"]
    assert [fault.cases for fault in faults] == [("b",)] and "7 (3 pixels)" in faults[0].text


def test_class_pixels():
    table = LabelTable({0: 0, 1: [1, 255]}, 2)
    pixels, strange = class_pixels({0: 5, 1: 2, 255: 3, 9: 4}, table)
    assert pixels.tolist() == [5, 5] and strange == [9]
    colours = LabelTable({0: [[0, 0, 0]], 1: [[255, 0, 0]]}, 2)
    pixels, strange = class_pixels({0: 5, (255, 0, 0): 2, (0, 9, 0): 1}, colours)
    assert pixels.tolist() == [5, 2] and strange == [(0, 9, 0)]


def test_photographs_are_no_masks():
    with pytest.raises(DataError, match="colours; a mask has one for each class"):
        raw_values(np.random.default_rng(0).integers(0, 256, (60, 60, 3), np.uint8), "x.png")


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (np.full((8, 8), 200, np.uint8), "as_is"),
        (np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16), "as_is"),
        (np.linspace(0, 4095, 64).reshape(8, 8).astype(np.uint16), "percentile"),
        (np.linspace(0, 1, 64).reshape(8, 8).astype(np.float32), "as_is"),
        (np.linspace(-1000, 900, 64).reshape(8, 8).astype(np.float32), "percentile"),
    ],
)
def test_intensity(tmp_path, array, expected):
    Image.fromarray(array).save(tmp_path / "x.tif")
    intensity, why = suggest_intensity([tmp_path / "x.tif"])
    assert intensity == expected and bool(why) == (expected != "as_is")


def masks(*values, count=10):
    """``count`` masks with the same values, 100 pixels each."""
    return {f"m{n}": dict.fromkeys(values, 100) for n in range(count)}


R, G, K = (255, 0, 0), (0, 255, 0), (0, 0, 0)


@pytest.mark.parametrize(
    ("found", "labels", "threshold", "classes"),
    [
        (masks(0, 255), {0: 0, 1: 255}, None, 2),
        (masks(0, 1), None, None, 2),
        (masks(0, 1, 2, 3), None, None, 4),
        (masks(0, 85, 170, 255), {0: 0, 1: 85, 2: 170, 3: 255}, None, 4),
        (masks(0, 127), {0: 0, 1: 127}, None, 2),
        (masks(1, 2), {0: 1, 1: 2}, None, 2),
        (masks(0, 1) | {"x": {0: 10, 255: 10}, "y": {0: 10, 255: 10}}, {0: 0, 1: [1, 255]}, None, 2),
        (masks(K, R, G), {0: [list(K)], 1: [list(G)], 2: [list(R)]}, None, 3),
        ({"grey": {0: 10}, **masks(0, R)}, {0: [list(K)], 1: [list(R)]}, None, 2),  # (0, 0, 0) was read as 0
        ({f"m{n}": {v: 1 for v in range(12)} | {0: 900, 255: 90, 250: 5} for n in range(9)}, None, 127, 2),
        ({**masks(0, 255, count=20), "slip": {0: 5, 255: 5, 7: 1}}, {0: 0, 1: 255}, None, 2),
        ({**masks(0, 1, 2, count=40), "slip": {0: 5, 9: 1}}, None, None, 3),
        ({**masks(0, 1, count=20), "rare": {0: 5, 2: 1}}, None, None, 3),  # 0, 1, 2: a rare class, no slip
    ],
)
def test_labels_are_worked_out(found, labels, threshold, classes):
    guess = guess_labels(found)
    assert (guess.labels, guess.threshold, guess.num_classes) == (labels, threshold, classes)
    table = LabelTable(guess.labels, guess.num_classes, threshold=guess.threshold)
    strange = [i for i, values in found.items() if class_pixels(values, table)[1]]
    assert strange == [i for i in found if i == "slip"]
    assert ("mistake" in guess.reason) == ("slip" in found)


def test_a_rare_value_is_named_with_its_mask_and_left_out_where_the_classes_are_known():
    found = {**masks(0, 100, 200, count=40), "slip": {0: 5, 100: 5, 37: 16}}
    guess = guess_labels(found)
    assert guess.labels == {0: 0, 1: 37, 2: 100, 3: 200}
    assert "37 stands in 1 of 41 masks only (slip: 16 pixels)" in guess.reason
    known = guess_labels(found, 3)
    assert known.labels == {0: 0, 1: 100, 2: 200} and "37, taken for a mistake" in known.reason
    assert guess_labels(found, 4) == guess


@pytest.mark.parametrize(
    ("found", "says"),
    [
        ({}, "no mask that can be used"),
        (masks(0), "value 0 only"),
        (masks(*range(0, 120, 4)), "no obvious set of classes"),
        (masks(*((n, 0, 9) for n in range(30))), "30 colours"),
    ],
)
def test_what_has_no_obvious_meaning_is_asked_for(found, says):
    with pytest.raises(DataError, match=says) as caught:
        guess_labels(found)
    assert "--" in caught.value.hint


def parts(folder):
    """b has two masks, the upper and the lower half of its object."""
    for name in "abcdef":
        (folder / "masks" / f"{name}.png").rename(folder / "masks" / f"{name}_mask.png")
    upper, lower = np.zeros((2, 20, 24), np.uint8)
    upper[2:10, 4:20], lower[8:18, 4:20] = 255, 255
    Image.fromarray(upper).save(folder / "masks" / "b_mask.png")
    Image.fromarray(lower).save(folder / "masks" / "b_mask_1.png")
    return find_layout(folder)


def test_several_masks_are_counted_as_one(folder):
    found = survey(parts(folder), merge=True)
    assert found.faults == []
    case = found.cases[1]
    assert len(case.masks) == 2 and case.together == {(0, 0): 224, (0, 255): 128, (255, 0): 96, (255, 255): 32}
    cases, faults = without_strange_masks(found.cases, LabelTable({0: 0, 1: 255}, 2))
    assert faults == [] and cases[1].values == {0: 224, 255: 256}


def test_masks_of_several_classes_at_one_pixel_are_not_used(folder):
    layout = parts(folder)
    lower = np.array(Image.open(folder / "masks" / "b_mask_1.png")) // 255 * 128
    Image.fromarray(lower).save(folder / "masks" / "b_mask_1.png")
    found = survey(layout, merge=True)
    cases, faults = without_strange_masks(found.cases, LabelTable({0: 0, 1: 128, 2: 255}, 3))
    assert [fault.cases for fault in faults] == [("b",)] and "32 pixels have several classes (1, 2)" in faults[0].text
    assert cases[1].values is None and cases[1].masks == ()
    coloured = np.repeat(lower[..., None], 3, axis=2)
    coloured[..., 1] = 0
    Image.fromarray(coloured).save(folder / "masks" / "b_mask_1.png")
    (case,) = [c for c in survey(layout, merge=True).cases if c.id == "b"]
    assert case.together[255, (128, 0, 128)] == 32  # colours stay colours


def test_images_are_turned_and_a_mask_of_the_stored_pixels_is_told_so(folder):
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in "ab":
        image = Image.open(folder / "images" / f"{name}.png")
        image.save(folder / "images" / f"{name}.png", exif=exif)
    Image.new("L", (20, 24)).save(folder / "masks" / "b.png")  # drawn over the picture as it is shown
    found = survey(find_layout(folder))
    (fault,) = found.faults
    assert fault.cases == ("a",) and "the mask is 20 x 24, the image 24 x 20" in fault.text
    assert "as it is stored, before its EXIF orientation 6 is applied" in fault.text
    assert found.cases[1].shape == (24, 20) and found.cases[1].values == {0: 480}


@pytest.mark.parametrize(
    ("found", "num_classes", "labels", "ignore", "classes"),
    [
        (masks(0, 1, 2, 255), None, None, 255, 3),
        (masks(0, 1, 255), None, None, 255, 2),
        (masks(0, 1, 2, 3, 254), None, None, 254, 4),
        (masks(0, 1, 2, 65535), None, None, 65535, 3),
        ({i: {0: 900, 1: 90, 254: 5, 255: 5} for i in "abc"}, None, None, [254, 255], 2),
        ({**masks(0, 1, 2, count=40), "one": {0: 5, 1: 9, 255: 1}}, None, None, 255, 3),  # not a mistake in one mask
        (masks(0, 1, 2, 255), 3, None, 255, 3),
        (masks(0, 1, 2, 255), 4, {0: 0, 1: 1, 2: 2, 3: 255}, None, 4),  # named: a class
        ({"a": {0: 9, 1: 1, 255: 100}, "b": {0: 9, 1: 1}}, 2, None, 255, 2),  # much of it, but the names say so
        ({"a": {0: 9, 1: 5}, "b": {0: 9, 255: 5}}, 2, {0: 0, 1: [1, 255]}, None, 2),  # two ways to write one class
        (masks(0, 2, 255), None, {0: 0, 1: 2, 2: 255}, None, 3),  # 2 is no second id
        (masks(K, R, (224, 224, 192)), None, {0: [list(K)], 1: [list(R)]}, [[224, 224, 192]], 2),
        (masks(K, R, (224, 224, 192)), 3, {0: [list(K)], 1: [list((224, 224, 192))], 2: [list(R)]}, None, 3),
    ],
)
def test_what_is_ignored_is_worked_out(found, num_classes, labels, ignore, classes):
    guess = guess_labels(found, num_classes)
    assert (guess.labels, guess.threshold, guess.ignore, guess.num_classes) == (labels, None, ignore, classes)
    assert ("ignored" in guess.reason) == (ignore is not None)
    LabelTable(guess.labels, guess.num_classes, ignore=guess.ignore)


@pytest.mark.parametrize(
    "found",
    [
        {"a": {0: 9, 1: 1, 255: 500}, **{f"m{n}": {0: 9, 1: 1} for n in range(9)}},  # fifty times the class
        {"a": {0: 9, 1: 5, 255: 5}, "b": {0: 9, 1: 5}, "c": {0: 9, 255: 5}, "d": {0: 9, 255: 5}},  # mostly without 1
    ],
)
def test_what_may_be_a_class_or_ignored_is_asked(found):
    with pytest.raises(DataError, match="it may be a class, or pixels where nothing is known") as caught:
        guess_labels(found)
    assert "--classes with 2 names ignores 255, with 3 names it is the last class" in caught.value.hint
    assert guess_labels(found, 2).ignore == 255
    assert guess_labels(found, 3).labels == {0: 0, 1: 1, 2: 255}


def numbered(*counts):
    """Masks of so many numbered objects each."""
    return {f"m{n}": dict.fromkeys(range(count + 1), 50) for n, count in enumerate(counts)}


@pytest.mark.parametrize(
    "found",
    [
        numbered(60, 39, 54, 25),
        numbered(9, 3, 0, 5),
        {f"m{n}": {0: 500, **{100 * n + k: 20 for k in range(1, 12)}} for n in range(1, 5)},  # no id comes twice
    ],
)
def test_numbered_objects_are_no_classes(found):
    ids = {v for values in found.values() for v in values}
    with pytest.raises(DataError, match=rf"these seem to be instances, not {len(ids)} classes") as caught:
        guess_labels(found)
    assert (
        "--classes background,object" in caught.value.hint and f"--classes with {len(ids)} names" in caught.value.hint
    )
    binary = guess_labels(found, 2)
    assert (binary.labels, binary.threshold, binary.num_classes) == (None, 0, 2) and "objects" in binary.reason
    assert LabelTable(None, 2, threshold=0).apply(np.array([[0, 1, 60]], np.uint8)).tolist() == [[0, 1, 1]]
    if ids == set(range(len(ids))):
        assert guess_labels(found, len(ids)).labels is None  # named one by one: classes


@pytest.mark.parametrize(
    "found",
    [
        masks(*range(14)),  # organs: the same in every volume
        {f"m{n}": dict.fromkeys([0, *range(1 + n, 14)], 50) for n in range(6)},  # slices: from which organs begin
        {f"m{n}": dict.fromkeys({0, 1, 3 + n % 5, 9 + n % 3, 13} | set(range(n)), 50) for n in range(12)},
    ],
)
def test_many_classes_are_not_taken_for_objects(found):
    every = {v for values in found.values() for v in values}
    assert guess_labels(found).num_classes == len(every)


def test_few_numbered_objects_are_told_by_their_parts():
    found = numbered(3, 1, 2, 3, 1)
    one_each = {i: {v: 1 for v in values if v} for i, values in found.items()}
    assert guess_labels(found).num_classes == 4  # kidney, tumour and cyst look alike in numbers alone
    with pytest.raises(DataError, match="instances, not 4 classes"):
        guess_labels(found, objects=one_each)
    assert guess_labels(found, 4, one_each).num_classes == 4
    pair_of_kidneys = {i: {v: 2 for v in parts} for i, parts in one_each.items()}
    assert guess_labels(found, objects=pair_of_kidneys).num_classes == 4


@pytest.mark.parametrize("volume", [False, True])
def test_connected_parts(volume):
    raw = np.zeros((6, 8), np.uint16)
    raw[0, 0] = raw[1, 1] = 3  # corners connect
    raw[4:, :2] = raw[0, 7] = 700
    raw = np.stack([raw, np.zeros_like(raw), raw]) if volume else raw
    assert connected_parts(raw) == ({3: 2, 700: 4} if volume else {3: 1, 700: 2})
    assert connected_parts(np.ones((3, 3), np.uint8)) == {1: 1} and connected_parts(np.zeros((2, 2), np.uint8)) == {}
