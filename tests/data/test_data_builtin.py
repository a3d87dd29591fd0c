"""The generated dataset: deterministic, behind the label firewall, for every K."""

import hashlib
import pickle
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest

from knowsam.data.builtin import BuiltIn
from knowsam.data.source import Source
from knowsam.errors import DataError

SMALL = {"train": 20, "val": 3, "test": 4, "size": 48}


def cases(source):
    return [*source.labelled_ids(), *source.eval_ids("val"), *source.eval_ids("test")]


@pytest.mark.parametrize("num_classes", [2, 3, 4])
def test_images_and_masks(num_classes):
    source = BuiltIn("all", num_classes=num_classes, **SMALL)
    assert isinstance(source, Source)
    assert source.num_classes == num_classes
    seen = set()
    for case in cases(source):
        image, mask = source.image(case), source.mask(case)
        assert image.shape == (48, 48, 3) and image.dtype == np.uint8
        assert mask.shape == (48, 48) and mask.dtype == np.uint8
        assert image.std() > 3
        assert source.spacing(case) is None
        seen |= set(np.unique(mask).tolist())
    assert seen == set(range(num_classes))


def test_lists():
    source = BuiltIn("labelled_25pct", **SMALL)
    assert source.train_ids() == sorted(set(source.train_ids())) and len(source.train_ids()) == 20
    assert source.labelled_ids() == source.train_ids()[:5]
    assert len(source.eval_ids("val")) == 3 and len(source.eval_ids("test")) == 4
    everything = [*source.train_ids(), *source.eval_ids("val"), *source.eval_ids("test")]
    assert len(set(everything)) == 27


@pytest.mark.parametrize("num_classes", [2, 4])
def test_deterministic_and_independent_of_order_and_global_state(num_classes):
    a, b = (BuiltIn("all", num_classes=num_classes, **SMALL) for _ in range(2))
    np.random.seed(1)
    first = {case: (a.image(case).copy(), a.mask(case).copy()) for case in cases(a)}
    np.random.seed(2)
    for case in reversed(cases(b)):
        assert np.array_equal(b.mask(case), first[case][1]) and np.array_equal(b.image(case), first[case][0])


def test_the_same_pictures_in_another_process():
    code = (
        "import hashlib; from knowsam.data.builtin import BuiltIn;"
        "s = BuiltIn('all', train=20, val=3, test=4, size=48);"
        "print(hashlib.sha256(s.image('train_0003').tobytes() + s.mask('train_0003').tobytes()).hexdigest())"
    )
    source = BuiltIn("all", **SMALL)
    here = hashlib.sha256(source.image("train_0003").tobytes() + source.mask("train_0003").tobytes()).hexdigest()
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert there.stdout.strip() == here


def test_cases_and_dataset_seeds_differ():
    source, other = BuiltIn("all", **SMALL), BuiltIn("all", seed=1, **SMALL)
    images = [source.image(case).tobytes() for case in cases(source)]
    assert len(set(images)) == len(images), "a picture is in two splits or twice in one"
    assert not np.array_equal(source.image("val_0000"), other.image("val_0000"))


def test_a_larger_training_list_keeps_the_smaller_ones_pictures():
    small, large = BuiltIn("all", **SMALL), BuiltIn("all", **{**SMALL, "train": 40})
    assert large.train_ids()[:20] == small.train_ids()
    assert np.array_equal(small.image("train_0007"), large.image("train_0007"))


def test_label_sets_are_nested():
    sets = [set(BuiltIn(f"labelled_{p}pct", **SMALL).labelled_ids()) for p in (1, 5, 10, 20, 50, 100)]
    assert [len(s) for s in sets] == [1, 1, 2, 4, 10, 20]
    assert all(a <= b for a, b in pairwise(sets))
    assert sets[-1] == set(BuiltIn("all", **SMALL).labelled_ids())


def test_firewall():
    source = BuiltIn("labelled_10pct", **SMALL)
    assert source.labelled_ids() == ["train_0000", "train_0001"]
    for case in cases(source):
        assert source.mask(case) is not None and source.mask_fingerprint(case)
    for case in source.train_ids()[2:]:
        source.image(case)
        source.fingerprint(case)
        with pytest.raises(DataError, match=f"'{case}' is unlabelled"):
            source.mask(case)
        with pytest.raises(DataError, match=f"'{case}' is unlabelled"):
            source.mask_fingerprint(case)


def test_firewall_also_after_the_picture_was_drawn():
    source = BuiltIn("labelled_10pct", **SMALL)
    source.image("train_0009")  # image and mask are drawn together and remembered
    with pytest.raises(DataError):
        source.mask("train_0009")


def test_fingerprints_tell_pictures_apart():
    marks = {
        BuiltIn("all", **{**SMALL, **change}).fingerprint(case)
        for change in ({}, {"seed": 1}, {"size": 64}, {"num_classes": 3})
        for case in ("train_0000", "train_0001", "val_0000")
    }
    assert len(marks) == 12
    assert BuiltIn("all", **SMALL).fingerprint("train_0000") == BuiltIn("labelled_10pct", **SMALL).fingerprint(
        "train_0000"
    )


def test_pickles():
    source = BuiltIn("labelled_10pct", num_classes=3, **SMALL)
    before = source.image("train_0001").copy()
    again = pickle.loads(pickle.dumps(source))
    assert np.array_equal(again.image("train_0001"), before)
    assert again.labelled_ids() == source.labelled_ids() and repr(again) == repr(source)
    with pytest.raises(DataError):
        again.mask("train_0009")


@pytest.mark.parametrize(
    ("labelled", "change", "says"),
    [
        ("all", {"num_classes": 1}, "at least 2 classes, got 1"),
        ("all", {"train": 0}, "must be >= 1"),
        ("all", {"size": 16}, "size >= 32"),
        ("labelled_0pct", {}, "'labelled_<1..100>pct' and 'all'"),
        ("labelled_101pct", {}, "'labelled_101pct'"),
        ("labelled_tenpct", {}, "allowed are"),
        ("10pct", {}, "allowed are"),
        ("", {}, "allowed are"),
    ],
)
def test_refusals(labelled, change, says):
    with pytest.raises(DataError, match=says):
        BuiltIn(labelled, **{**SMALL, **change})
