import io

import numpy as np
import pytest
from PIL import Image

from knowsam.data.builtin import render
from knowsam.data.looks import Units, look, near_pairs, pixels_sha256, same_pixels


def picture(seed, size=64):
    return render(np.random.default_rng(seed), size, 2)[0]


def through_jpeg(image, quality=80):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


def pairs(images):
    return [(i, j) for i, j, _ in near_pairs([look(image) for image in images])]


def test_pixels_decide_what_is_equal():
    one = picture(0)
    other = one.copy()
    other[5, 5, 0] ^= 1
    looks = [look(image) for image in (one, other, one.copy(), picture(1))]
    assert same_pixels(looks) == [[0, 2]]
    assert pixels_sha256(one) != pixels_sha256(one.reshape(32, 128, 3))  # the shape counts
    assert look(one.transpose(1, 0, 2)).pixels != look(one).pixels


def test_one_colour_resembles_nothing():
    black, white = np.zeros((40, 40, 3), np.uint8), np.full((40, 40, 3), 255, np.uint8)
    looks = [look(image) for image in (black, black, white)]
    assert same_pixels(looks) == [] and list(near_pairs(looks)) == []


@pytest.mark.parametrize(
    "change",
    [
        through_jpeg,
        lambda image: np.asarray(Image.fromarray(image).resize((61, 50))),
        lambda image: np.clip(image * 0.8 + 10, 0, 255).astype(np.uint8),
        lambda image: np.repeat(np.asarray(Image.fromarray(image).convert("L"))[..., None], 3, axis=2),
    ],
    ids=["jpeg", "size", "light", "grey"],
)
def test_changed_copies_are_found(change):
    images = [picture(seed) for seed in range(8)]
    assert pairs([*images, change(images[3])]) == [(3, 8)]


def test_no_false_alarm_among_different_pictures():
    assert pairs([picture(seed) for seed in range(60)]) == []


def test_equal_pictures_are_no_near_duplicates():
    assert pairs([picture(0), picture(0)]) == []


def test_pairs_are_found_across_chunks(monkeypatch):
    images = [picture(seed, 32) for seed in range(12)]
    images += [through_jpeg(images[0], 95), through_jpeg(images[11], 95)]
    expected = pairs(images)
    monkeypatch.setattr("knowsam.data.looks._CHUNK", 3)
    assert sorted(pairs(images)) == sorted(expected) == [(0, 12), (11, 13)]


def test_units():
    units = Units("fedcba")
    for tie in ("ab", "dc", "fd", "cf"):
        units.tie(*tie)
    assert units.sets() == [["a", "b"], ["c", "d", "f"], ["e"]]
