"""What is done to label maps afterwards: components by size, holes, and what may be asked for."""

import numpy as np
import pytest

from knowsam.errors import ConfigError, DataError
from knowsam.inference.postprocess import (
    STEPS,
    apply,
    blocks,
    candidates,
    check,
    describe,
    has_choice,
    resolve,
    stored_choice,
)


def drawn(text):
    return np.array([[int(c) for c in line] for line in text.split()], np.uint8)


MAP = drawn(
    """
    0110000002
    0110020002
    0000020000
    1000000000
    """
)


def same(got, text):
    assert (got == drawn(text)).all(), "\n" + "\n".join("".join(map(str, row)) for row in got)


def test_largest_of_each_class():
    # Class 2 has two components of two pixels: the one that comes first stays.
    same(apply(MAP, {"name": "largest"}), "0110000002 0110000002 0000000000 0000000000")


def test_largest_of_the_whole_foreground():
    both = drawn("1100000 1120000 0000022 1000022")
    same(apply(both, {"name": "largest", "scope": "all"}), "1100000 1120000 0000000 0000000")


def test_corners_touch():
    same(apply(drawn("1000 0100 0000 0001"), {"name": "largest"}), "1000 0100 0000 0000")


@pytest.mark.parametrize(
    ("size", "unit", "spacing", "expected"),
    [
        (2, "px", None, "0110000002 0110020002 0000020000 0000000000"),
        (3, "px", None, "0110000000 0110000000 0000000000 0000000000"),
        (3, "mm", (2.0, 0.75), "0110000002 0110020002 0000020000 0000000000"),  # 1.5 mm^2 a pixel
        (3.1, "mm", (2.0, 0.75), "0110000000 0110000000 0000000000 0000000000"),
        (0.5, "share", None, "0110000002 0110020002 0000020000 0000000000"),
        (1, "share", None, "0110000002 0110020002 0000020000 0000000000"),
    ],
)
def test_small_objects(size, unit, spacing, expected):
    before = MAP.copy()
    same(apply(MAP, {"name": "remove_small", "size": size, "unit": unit}, spacing), expected)
    assert (before == MAP).all(), "what was given stays as it is"


def test_mm_of_volumes_are_cubic():
    volume = np.zeros((3, 4, 4), np.uint8)
    volume[0, 0, :2], volume[2, 3, 3] = 1, 1
    spec = {"name": "remove_small", "size": 10, "unit": "mm"}
    assert apply(volume, spec, (5.0, 1.0, 1.0)).sum() == 2  # 10 mm^3 stay, 5 go
    assert apply(volume, spec, (4.9, 1.0, 1.0)).sum() == 0
    with pytest.raises(DataError, match="the spacing of this case is not known"):
        apply(volume, spec)


def test_holes_take_the_class_around_them():
    rings = drawn(
        """
        011111000
        010001000
        011111220
        000002020
        330002220
        303000000
        330000000
        """
    )
    same(
        apply(rings, {"name": "fill_holes"}),
        "011111000 011111000 011111220 000002220 330002220 333000000 330000000",
    )


def test_a_structure_inside_another_is_no_hole():
    nested = drawn("11111 12221 12021 12221 11111")
    same(apply(nested, {"name": "fill_holes"}), "11111 12221 12221 12221 11111")


def test_an_open_hole_of_a_volume_is_none():
    volume = np.ones((3, 5, 5), np.uint8)
    volume[:, 2, 2] = 0  # a tube through all slices
    assert (apply(volume, {"name": "fill_holes"}) == volume).all()
    volume[[0, 2], 2, 2] = 1
    assert apply(volume, {"name": "fill_holes"}).all()


def test_steps_follow_each_other():
    ring = drawn("1110000 1010100 1110000")
    steps = [{"name": "largest"}, {"name": "fill_holes"}]
    same(apply(ring, steps), "1110000 1110000 1110000")
    assert describe(steps) == "largest component of each class, then holes filled"


@pytest.mark.parametrize("shape", [(9, 11), (4, 6, 7)])
@pytest.mark.parametrize("num_classes", [2, 4])
def test_every_candidate_keeps_type_and_classes_and_is_settled_after_once(shape, num_classes):
    rng = np.random.default_rng(0)
    labels = (rng.random(shape) < 0.4).astype(np.uint8) * rng.integers(1, num_classes, shape).astype(np.uint8)
    for spec in candidates(num_classes):
        once = apply(labels, spec)
        assert once.dtype == np.uint8 and once.shape == shape and set(np.unique(once)) <= set(range(num_classes))
        holes = any(block["name"] == "fill_holes" for block in blocks(spec))
        assert holes or ((once == labels) | (once == 0)).all(), "nothing grows"
        assert holes or (apply(once, spec) == once).all()
        assert not apply(np.zeros(shape, np.uint8), spec).any()


def test_candidates_begin_with_nothing_and_fit_any_data():
    for num_classes in (2, 3):
        tried = candidates(num_classes)
        assert tried[0] is None and len({describe(spec) for spec in tried}) == len(tried)
        assert all(block.get("unit", "share") == "share" for spec in tried for block in blocks(spec))
    assert len(candidates(3)) > len(candidates(2))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "bigest"}, "no step 'bigest'; there are largest, remove_small, fill_holes"),
        ({"name": "larges"}, "did you mean 'largest'"),
        ({}, "no step None"),
        ("largest", r"allowed: null, auto, \{name: \.\.\.\}, or a list"),
        ([{"name": "largest"}, 3], "allowed: null, auto"),
        ({"name": "largest", "size": 3}, "largest has no option 'size'; options: scope"),
        ({"name": "fill_holes", "size": 3}, "options: none"),
        ({"name": "remove_small"}, "remove_small needs 'size'"),
        ({"name": "remove_small", "size": 0}, "size is 0; allowed: a number above 0"),
        ({"name": "remove_small", "size": "big"}, "size is 'big'"),
        ({"name": "remove_small", "size": 2, "unit": "share"}, "above 0, at most 1"),
        ({"name": "remove_small", "size": 2, "unit": "cm"}, "unit is 'cm'; allowed: px, mm, share"),
        ({"name": "largest", "scope": "both"}, "scope is 'both'; allowed: class, all"),
    ],
)
def test_refusals(spec, message):
    with pytest.raises(ConfigError, match=message):
        check(spec)


def test_what_may_be_asked_for():
    for spec in (
        None,
        "auto",
        [],
        *({"name": name, **({"size": 3} if name == "remove_small" else {})} for name in STEPS),
    ):
        check(spec)


def test_a_choice_belongs_to_its_weights_and_output():
    record = {"checkpoint": {"file": "best.pt", "step": 40}, "outputs": {"fusion": {"spec": {"name": "largest"}}}}
    best = {"file": "best.pt", "step": 40, "outputs": ["fusion", "unet"]}
    assert stored_choice(record, "fusion", best) == {"name": "largest"}
    assert resolve("auto", record, "fusion", best) == {"name": "largest"}
    assert resolve(None, record, "fusion", best) is None
    assert resolve({"name": "fill_holes"}, {}, "fusion", None) == {"name": "fill_holes"}
    for output, checkpoint in (("unet", best), ("fusion", best | {"step": 60}), ("fusion", best | {"file": "last.pt"})):
        assert not has_choice(record, output, checkpoint)
        with pytest.raises(ConfigError, match="nothing was chosen yet"):
            stored_choice(record, output, checkpoint)
    assert not has_choice({}, "fusion", best)
