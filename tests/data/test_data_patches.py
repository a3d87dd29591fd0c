"""Where patches lie, what is read for them, and what the index of the foreground keeps."""

import numpy as np
import pytest

from knowsam.data.labels import IGNORE_ID
from knowsam.data.patches import (
    ForegroundIndex,
    draw_patch,
    patch_generator,
    patch_start,
    read_patch,
)
from knowsam.errors import ConfigError


def generator(position=0):
    return patch_generator(7, "labelled", position)


def starts(shape, patch, count=400, foreground=None, oversample=0.0):
    return np.array([patch_start(shape, patch, generator(n), foreground, oversample) for n in range(count)])


def case(shape=(20, 30, 25)):
    """A volume whose voxels are their own numbers, and a mask with a large, a small and an unknown class."""
    image = np.arange(2 * np.prod(shape), dtype=np.uint16).reshape(2, *shape)
    mask = np.zeros(shape, np.uint8)
    mask[2:9, 5:20, 5:20] = 1
    mask[15, 28, 22:24] = 3
    mask[0] = IGNORE_ID
    return image, mask


class Recorder:
    """A volume on disk: remembers what is asked of it, and cannot be read whole by accident."""

    def __init__(self, array):
        self.array, self.shape, self.asked = array, array.shape, []

    def __getitem__(self, place):
        self.asked.append(place)
        return self.array[place]


# ---------------------------------------------------------------- where


def test_place_is_a_function_of_seed_stream_and_position():
    def at(seed=1, stream="labelled", position=0):
        return patch_start((99,) * 3, (9,) * 3, patch_generator(seed, stream, position))

    others = [at(seed=2), at(stream="unlabelled"), at(stream="second"), at(position=1), at(position=2)]
    assert at() == at() and len({at(), *others}) == 6


@pytest.mark.parametrize("shape, patch", [((20, 30, 25), (8, 16, 9)), ((40, 17), (16, 16))])
def test_every_place_that_fits_is_as_likely(shape, patch):
    found = starts(shape, patch, count=1500)
    for axis, (side, length) in enumerate(zip(shape, patch, strict=True)):
        seen = np.bincount(found[:, axis], minlength=side - length + 1)
        assert len(seen) == side - length + 1 and seen.min() > 0
        expected = len(found) / len(seen)
        assert ((seen - expected) ** 2 / expected).sum() < 3 * len(seen)  # chi square, far out


def test_a_volume_smaller_than_the_patch_lies_in_its_middle():
    assert {tuple(start) for start in starts((5, 30, 8), (8, 30, 8))} == {(-1, 0, 0)}
    image, mask = np.full((1, 5, 4), 9, np.uint8), np.ones((5, 4), np.uint8)
    found, labels = draw_patch(image, mask, (8, 6), generator())
    assert found.shape == (1, 8, 6) and (found[:, 1:6, 1:5] == 9).all() and found.sum() == image.sum()
    assert labels.shape == (8, 6) and (labels[1:6, 1:5] == 1).all() and (labels == IGNORE_ID).sum() == 48 - 20


def test_foreground_is_in_the_middle_as_far_as_the_border_allows():
    voxels = np.array([[0, 15, 24], [10, 14, 12]], np.int32)
    found = starts((20, 30, 25), (8, 16, 9), foreground=voxels, oversample=1.0)
    assert {tuple(start) for start in found} == {(0, 7, 16), (6, 6, 8)}
    small = starts((5, 30), (8, 16), foreground=voxels[1:, :2], oversample=1.0)
    assert {tuple(start) for start in small} == {(-1, 6)}


@pytest.mark.parametrize("oversample", [0.0, 0.3, 1.0])
def test_oversampling_is_a_share_and_leaves_the_others_alone(oversample):
    voxel = np.array([[3, 3, 3]])
    plain, some = (starts((60,) * 3, (6,) * 3, foreground=f, oversample=oversample) for f in (None, voxel))
    centred = (some == 0).all(1)
    assert centred.mean() == pytest.approx(oversample, abs=0.08)
    assert np.array_equal(plain[~centred], some[~centred])
    nothing = starts((60,) * 3, (6,) * 3, foreground=voxel[:0], oversample=oversample)
    assert np.array_equal(plain, nothing)


def test_another_number_of_axes_is_refused():
    with pytest.raises(ConfigError, match=r"data\.patch_size is \[16, 16\], 2 numbers, but images are 9 x 20 x 20"):
        patch_start((9, 20, 20), (16, 16), generator())


# ---------------------------------------------------------------- reading


def test_a_patch_is_what_lies_there():
    image, mask = case()
    assert np.array_equal(read_patch(image, (3, 4, 5), (6, 7, 8)), image[:, 3:9, 4:11, 5:13])
    outside = read_patch(mask, (-2, 0, 20), (6, 30, 10), IGNORE_ID)
    assert np.array_equal(outside[2:, :, :5], mask[:4, :, 20:])
    assert (outside[:2] == IGNORE_ID).all() and (outside[:, :, 5:] == IGNORE_ID).all()


def test_nothing_but_the_patch_is_read():
    image, mask = case()
    stored, labels = Recorder(image), Recorder(mask)
    found, found_labels = draw_patch(stored, labels, (4, 5, 6), generator())
    assert found.shape == (2, 4, 5, 6) and found_labels.shape == (4, 5, 6)
    for asked, size in ((stored.asked, (2, 4, 5, 6)), (labels.asked, (4, 5, 6))):
        assert len(asked) == 1 and tuple(part.stop - part.start for part in asked[0]) == size


def test_a_patch_of_a_memory_map_is_an_array_of_its_own(tmp_path):
    image, _ = case()
    np.save(tmp_path / "v.npy", image)
    stored = np.load(tmp_path / "v.npy", mmap_mode="r")
    found = read_patch(stored, (0, 0, 0), image.shape[1:])
    assert type(found) is np.ndarray and found.flags.writeable and found.flags.c_contiguous and found.base is None
    assert np.array_equal(found, image)


def test_image_and_mask_are_cut_alike():
    _, mask = case()
    for row in range(20):
        index = ForegroundIndex.of(mask)
        found, labels = draw_patch(mask[None], mask, (8, 40, 9), generator(row), index, 0.5)
        assert np.array_equal(found[0, :, 5:35], labels[:, 5:35]) and (labels[:, :5] == IGNORE_ID).all()


def test_unlabelled_cases_have_no_mask_and_no_foreground():
    image, mask = case()
    index = ForegroundIndex.of(mask)
    for row in range(10):
        found, labels = draw_patch(image, None, (4, 5, 6), generator(row), index, 1.0)
        assert labels is None
        assert np.array_equal(found, draw_patch(image, None, (4, 5, 6), generator(row))[0])


# ---------------------------------------------------------------- index


def test_index_keeps_voxels_of_every_class():
    _, mask = case()
    index = ForegroundIndex.of(mask, limit=100)
    assert index.classes.tolist() == [1, 3] and index.counts.tolist() == [7 * 15 * 15, 2]
    assert index.starts.tolist() == [0, 100, 102] and index.voxels.dtype == np.int32
    ids = mask[tuple(index.voxels.T)]
    assert (ids[:100] == 1).all() and (ids[100:] == 3).all()
    assert len(np.unique(index.voxels, axis=0)) == 102
    again = ForegroundIndex.of(mask, limit=100)
    assert np.array_equal(index.voxels, again.voxels)


def test_index_keeps_all_of_a_class_below_its_limit_and_an_even_choice_above():
    mask = np.zeros((50, 40), np.uint8)
    mask[5:45] = 2
    whole = ForegroundIndex.of(mask, limit=10_000)
    assert np.array_equal(whole.voxels, np.argwhere(mask == 2))
    some = ForegroundIndex.of(mask, limit=400).voxels
    assert len(some) == 400
    np.testing.assert_allclose(some.mean(0), np.argwhere(mask == 2).mean(0), atol=2.5)
    np.testing.assert_allclose(some.std(0), np.argwhere(mask == 2).std(0), rtol=0.1)


def test_small_classes_are_picked_as_often():
    _, mask = case()
    index = ForegroundIndex.of(mask)
    picked = [len(index.pick(generator(row))) for row in range(400)]
    assert set(picked) == {1000, 2}
    assert 0.4 < np.mean(np.array(picked) == 2) < 0.6


@pytest.mark.parametrize("value", [0, IGNORE_ID])
def test_a_mask_without_foreground_has_an_empty_index(value):
    index = ForegroundIndex.of(np.full((6, 5, 4), value, np.uint8))
    assert index.classes.size == index.counts.size == 0 and index.pick(generator()).shape == (0, 3)
    image = np.zeros((1, 6, 5, 4), np.uint8)
    assert draw_patch(image, image[0], (2, 2, 2), generator(), index, 1.0)[0].shape == (1, 2, 2, 2)


def test_index_looks_at_one_slice_at_a_time():
    _, mask = case()
    stored = Recorder(mask)
    index = ForegroundIndex.of(stored)
    assert np.array_equal(index.voxels, ForegroundIndex.of(mask).voxels)
    assert all(place[0].stop - place[0].start == 1 for place in stored.asked)
    assert len(stored.asked) <= 2 * len(mask)
