"""Batch t is a pure function of (seed, rank, t), whoever asks and in whatever order."""

import pickle
import random
from collections import Counter

import numpy as np
import pytest
import torch

from knowsam.data.batch import Ids
from knowsam.data.builtin import BuiltIn
from knowsam.data.cache import build_cache
from knowsam.data.levels import to_unit
from knowsam.data.seeds import derive_seed
from knowsam.data.streams import FirstBatch, TwoStreams, stream_indices
from knowsam.errors import DataError

SIDE = 32


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    source = BuiltIn("labelled_30pct", num_classes=3, train=20, val=1, test=1, size=SIDE)
    folder = tmp_path_factory.mktemp("cache")
    labelled = source.labelled_ids()
    unlabelled = [i for i in source.train_ids() if i not in labelled]
    assert (len(labelled), len(unlabelled)) == (6, 14)
    return (
        build_cache(source, labelled, image_size=SIDE, masks=True, folder=folder),
        build_cache(source, unlabelled, image_size=SIDE, masks=False, folder=folder),
    )


def streams(caches, size=2, seed=3, **where):
    return TwoStreams(*caches, labelled_batch=size, unlabelled_batch=size + 1, seed=seed, **where)


def same(a, b):
    return all(torch.equal(x, y) if torch.is_tensor(x) else x == y for x, y in zip(a, b, strict=True))


def test_derive_seed():
    parts = [(0,), (1,), (0, 0), (0, 1), (1, 0), ("0", "x"), (12, 3), (1, 23), ("a", "b"), ("ab",), (-1,), (2**70,)]
    seeds = [derive_seed(*p) for p in parts]
    assert seeds == [derive_seed(*p) for p in parts]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= s < 2**63 for s in seeds)


@pytest.mark.parametrize("count", [1, 2, 7, 20])
def test_every_pass_visits_each_case_once(count):
    indices = stream_indices(count, seed=0, stream="labelled", start=0, length=5 * count)
    passes = [tuple(indices[i : i + count]) for i in range(0, 5 * count, count)]
    assert all(sorted(p) == list(range(count)) for p in passes)
    if count > 6:
        assert len(set(passes)) == 5  # reshuffled


def test_any_position_is_computed_directly():
    whole = stream_indices(7, seed=5, stream="labelled", start=0, length=100)
    for start in (0, 3, 6, 7, 41, 93):
        assert stream_indices(7, seed=5, stream="labelled", start=start, length=7) == whole[start : start + 7]
    far = stream_indices(7, seed=5, stream="labelled", start=7 * 10**9, length=7)
    assert sorted(far) == list(range(7))


def test_seed_and_stream_matter():
    def sequence(**change):
        return stream_indices(20, **({"seed": 0, "stream": "labelled", "start": 0, "length": 20} | change))

    assert sequence() == sequence()
    assert (
        len(
            {
                tuple(sequence()),
                tuple(sequence(seed=1)),
                tuple(sequence(stream="unlabelled")),
                tuple(sequence(start=20)),
            }
        )
        == 4
    )


def test_batch_is_a_pure_function_of_t(caches):
    first = streams(caches)
    batches = [first[t] for t in range(12)]
    order = list(range(12))
    random.Random(0).shuffle(order)
    other = streams(caches)
    for t in order:  # in any order, from another object, with global random states moved
        torch.manual_seed(t)
        np.random.seed(t)
        assert same(other[t], batches[t])
    assert not all(same(a, b) for a, b in zip(batches, (streams(caches, seed=4)[t] for t in range(12)), strict=True))
    assert not all(
        same(a, b) for a, b in zip(batches, (streams(caches, rank=1, world_size=2)[t] for t in range(12)), strict=True)
    )


def test_batches_hold_the_cases_of_their_indices(caches):
    data = streams(caches)
    for t in range(4):
        batch = data[t]
        rows = data.indices("labelled", t)
        assert batch.labelled.dtype == batch.mask.dtype == batch.unlabelled.dtype == torch.uint8
        assert batch.labelled.shape == (2, 3, SIDE, SIDE) and batch.mask.shape == (2, SIDE, SIDE)
        assert batch.unlabelled.shape == (3, 3, SIDE, SIDE)
        assert np.array_equal(batch.labelled.numpy(), caches[0].images[rows])
        assert np.array_equal(batch.mask.numpy(), caches[0].masks[rows])
        assert np.array_equal(batch.unlabelled.numpy(), caches[1].images[data.indices("unlabelled", t)])


def test_ids_are_those_of_the_rows(caches):
    data = streams(caches, second_labelled=True)
    for t in range(4):
        ids = data[t].ids
        for stream, cache in (("labelled", caches[0]), ("unlabelled", caches[1]), ("second", caches[0])):
            assert (
                getattr(ids, stream) == tuple(cache.ids[row] for row in data.indices(stream, t)) == data.ids(stream, t)
            )
        assert (len(ids.labelled), len(ids.unlabelled), len(ids.second)) == (2, 3, 2)


def test_a_second_labelled_batch_is_drawn_apart_and_changes_nothing_else(caches):
    plain, data = streams(caches), streams(caches, second_labelled=True)
    for t in range(6):
        batch = data[t]
        rows = data.indices("second", t)
        assert np.array_equal(batch.second.numpy(), caches[0].images[rows])
        assert np.array_equal(batch.second_mask.numpy(), caches[0].masks[rows])
        assert same(batch[:3], plain[t][:3]) and batch.ids[:2] == plain[t].ids[:2]
        assert plain[t].second.shape == (0, 3, SIDE, SIDE) and plain[t].ids.second == ()
    drawn, again = ([row for t in range(6) for row in data.indices(s, t)] for s in ("labelled", "second"))
    assert drawn != again and Counter(drawn) == Counter(again), "whole passes over the same cases, in another order"


def test_the_first_batch_again_and_again(caches):
    data = FirstBatch(*caches, labelled_batch=2, unlabelled_batch=3, seed=3)
    assert all(same(data[t], streams(caches)[0]) for t in (0, 1, 7))


def test_a_batch_is_a_copy(caches):
    data = streams(caches)
    before = data[0].labelled.clone()
    data[0].labelled.zero_()
    assert torch.equal(data[0].labelled, before)


@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_the_global_sequence_does_not_depend_on_the_number_of_processes(caches, world_size):
    """Two ranks with L = 2 see together what one rank with L = 4 sees."""
    alone = TwoStreams(*caches, labelled_batch=6, unlabelled_batch=12, seed=1)
    sizes = {"labelled_batch": 6 // world_size, "unlabelled_batch": 12 // world_size}
    ranks = [TwoStreams(*caches, **sizes, seed=1, rank=r, world_size=world_size) for r in range(world_size)]
    for t in range(9):
        for stream in ("labelled", "unlabelled"):
            together = [i for rank in ranks for i in rank.indices(stream, t)]
            assert together == alone.indices(stream, t)


def test_ranks_do_not_overlap_within_a_pass(caches):
    ranks = [streams(caches, size=1, rank=r, world_size=2) for r in range(2)]
    seen = Counter(i for t in range(3) for rank in ranks for i in rank.indices("labelled", t))
    assert seen == Counter(range(6))


def test_deep_images_among_those_of_8_bits_make_batches_of_one_type(caches, tmp_path, monkeypatch):
    source = BuiltIn("labelled_30pct", num_classes=3, train=20, val=1, test=1, size=SIDE)
    shallow = BuiltIn.image
    deep = set(caches[1].ids[::2])
    monkeypatch.setattr(
        BuiltIn, "image", lambda s, i: shallow(s, i).astype(np.uint16) * 257 if i in deep else shallow(s, i)
    )
    mixed = build_cache(source, caches[1].ids, image_size=SIDE, masks=False, folder=tmp_path)
    types = set()
    for t in range(12):
        batch = streams((caches[0], mixed), size=1)[t]
        types.add(batch.unlabelled.dtype)
        assert batch.labelled.dtype == batch.unlabelled.dtype == batch.second.dtype
        plain = streams(caches, size=1)[t]
        for part in ("labelled", "unlabelled"):
            torch.testing.assert_close(to_unit(getattr(batch, part)), to_unit(getattr(plain, part)))
    assert types == {torch.uint8, torch.int32}


def test_loader_is_the_same_for_any_number_of_workers(caches):
    data = streams(caches)
    expected = [data[t] for t in range(3, 8)]
    for workers in (0, 2):
        state, numpy_state, python_state = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
        loaded = list(data.loader(3, 8, workers=workers))
        assert len(loaded) == 5
        assert all(same(a, b) for a, b in zip(loaded, expected, strict=True))
        assert torch.equal(state, torch.get_rng_state()), (
            "the loader moved the global random state: dropout would shift"
        )
        assert np.array_equal(numpy_state, np.random.get_state()[1])
        assert python_state == random.getstate()


def test_ids_stay_tuples_on_their_way_to_a_device(caches):
    data = streams(caches)
    (loaded,) = data.loader(2, 3)
    pinned = loaded._replace(ids=Ids(*map(list, loaded.ids)))  # what torch's pinning makes of them
    for batch in (loaded, loaded.to(torch.device("cpu")), pinned.to(torch.device("cpu"))):
        assert isinstance(batch.ids, Ids) and batch.ids == data[2].ids


def test_loader_of_no_batches(caches):
    assert list(streams(caches).loader(5, 5)) == []


def test_no_unlabelled_images(caches):
    data = TwoStreams(caches[0], None, labelled_batch=2, unlabelled_batch=0, seed=0)
    assert data.indices("unlabelled", 3) == []
    assert data[3].unlabelled.shape == (0, 3, SIDE, SIDE)
    assert data[3].unlabelled.dtype == torch.uint8


def test_a_batch_larger_than_the_list_repeats_whole_passes(caches):
    data = TwoStreams(caches[0], None, labelled_batch=15, unlabelled_batch=0, seed=0)
    counts = Counter(data.indices("labelled", 0))
    assert set(counts) == set(range(6)) and set(counts.values()) == {2, 3}
    assert data[0].labelled.shape[0] == 15


def test_pickles(caches):
    data = streams(caches)
    assert same(pickle.loads(pickle.dumps(data))[2], data[2])


def test_refusals(caches):
    class Empty:
        ids = ()

    with pytest.raises(DataError, match="the labelled list is empty"):
        TwoStreams(Empty(), caches[1], labelled_batch=1, unlabelled_batch=1, seed=0)
    for nothing in (None, Empty()):
        with pytest.raises(DataError, match="unlabelled_batch is 2 but no training case is unlabelled") as caught:
            TwoStreams(caches[0], nothing, labelled_batch=1, unlabelled_batch=2, seed=0)
        assert "data.unlabelled_batch=0" in caught.value.hint
