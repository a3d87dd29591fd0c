"""Several data sets as one: ids, domains, weights, classes that only some label, and what is refused."""

import collections

import numpy as np
import pytest

from knowsam.data.augment import Augmenter
from knowsam.data.builtin import BuiltIn
from knowsam.data.cache import build_cache
from knowsam.data.intensity import MinMax, Preparation
from knowsam.data.several import Several
from knowsam.data.source import Source
from knowsam.data.streams import TwoStreams, weighted_indices
from knowsam.errors import ConfigError, DataError


def parts(**sizes):
    sizes = sizes or {"clinic": 10, "ward": 4}
    return {
        name: BuiltIn("labelled_50pct", train=count, val=2, test=3, size=32, seed=n, num_classes=3)
        for n, (name, count) in enumerate(sizes.items())
    }


def test_cases_are_those_of_the_parts():
    own = parts()
    both = Several(own)
    assert isinstance(both, Source) and both.num_classes == 3
    assert len(both.train_ids()) == 14 and both.labelled_ids()[-1] == "ward/train_0001"
    assert both.eval_ids("test") == [f"{name}/test_000{n}" for name in own for n in range(3)]
    np.testing.assert_array_equal(both.image("ward/test_0001"), own["ward"].image("test_0001"))
    np.testing.assert_array_equal(both.mask("clinic/val_0001"), own["clinic"].mask("val_0001"))
    assert both.domain("ward/test_0001") == both.case("ward/test_0001").domain == "ward"
    assert both.fingerprint("clinic/val_0000") != both.fingerprint("ward/val_0000")
    with pytest.raises(DataError, match="unlabelled"):
        both.mask("clinic/train_0009")
    for wrong in ("ward", "mine/test_0001", "test_0001"):
        with pytest.raises(DataError, match="none of the data sets clinic, ward"):
            both.image(wrong)


def test_all_parts_are_prepared_alike():
    both = Several(parts())
    before = both.cache_settings
    both.preparation = Preparation(MinMax(scope="case"))
    assert both.cache_settings != before
    assert both.image("ward/test_0000").dtype == np.uint16 == both.image("clinic/test_0000").dtype


def test_partial_labels():
    both = Several(parts(), valid_classes={"ward": [2]})
    assert both.valid_classes("clinic/val_0000") is None
    assert both.valid_classes("ward/val_0000").tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"weights": {"ward": 1.0}}, "clinic has no weight"),
        ({"weights": {"ward": 1.0, "clinic": 0}}, "clinic.weight is 0"),
        ({"valid_classes": {"ward": [3]}}, "allowed are ids of foreground classes, 1 to 2"),
    ],
)
def test_settings_without_sense(options, says):
    with pytest.raises(ConfigError, match=says):
        Several(parts(), **options)


def test_weights_are_shares_and_every_case_is_seen_as_often():
    groups = {"a": list(range(10)), "b": [10, 11]}
    draw = {"seed": 3, "stream": "x"}
    found = weighted_indices(groups, {"a": 1, "b": 3}, start=0, length=240, **draw)
    counts = collections.Counter(found)
    assert sum(counts[row] for row in groups["b"]) == 180
    assert {counts[row] for row in groups["a"]} == {6} and {counts[row] for row in groups["b"]} == {90}
    assert weighted_indices(groups, {"a": 1, "b": 3}, start=100, length=40, **draw) == found[100:140]
    assert weighted_indices(groups, {"a": 1, "b": 3}, start=0, length=240, seed=4, stream="x") != found


@pytest.mark.parametrize("world", [1, 2])
def test_streams_keep_the_shares_whoever_holds_them(tmp_path, world):
    both = Several(parts(clinic=20, ward=4))
    labelled, unlabelled = both.labelled_ids(), [i for i in both.train_ids() if i not in both.labelled_ids()]
    caches = [
        build_cache(both, ids, image_size=16, masks=masks, folder=tmp_path)
        for ids, masks in ((labelled, True), (unlabelled, False))
    ]
    options = {"labelled_batch": 4 // world, "unlabelled_batch": 4 // world, "seed": 0, "world_size": world}
    streams = [TwoStreams(*caches, rank=rank, weights={"clinic": 1, "ward": 1}, **options) for rank in range(world)]
    seen = [i.partition("/")[0] for t in range(12) for stream in streams for i in stream[t].ids.unlabelled]
    assert collections.Counter(seen) == {"clinic": 24, "ward": 24}
    whole = [i for t in range(12) for stream in streams for i in stream[t].ids.labelled]
    alone = TwoStreams(
        *caches, weights={"clinic": 1, "ward": 1}, labelled_batch=4, unlabelled_batch=4, seed=0, world_size=1
    )
    assert whole == [i for t in range(12) for i in alone[t].ids.labelled]


def test_which_classes_a_batch_s_masks_tell_apart(tmp_path):
    both = Several(parts(clinic=8, ward=8), valid_classes={"ward": [2]})
    cache = build_cache(both, both.labelled_ids(), image_size=16, masks=True, folder=tmp_path)
    streams = TwoStreams(cache, None, labelled_batch=8, unlabelled_batch=0, seed=0, valid_classes=both.partial)
    batch = Augmenter()(streams[0], seed=0)
    for case_id, told in zip(batch.ids.labelled, batch.valid_classes.tolist(), strict=True):
        assert told == ([True, False, True] if case_id.startswith("ward/") else [True] * 3)
    assert TwoStreams(cache, None, labelled_batch=2, unlabelled_batch=0, seed=0)[0].valid_classes is None
