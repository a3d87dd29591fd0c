import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from knowsam.data import looks as module
from knowsam.data.builtin import render
from knowsam.data.looks import Units, look, near_hashes, near_pairs, pixels_sha256, same_pixels, tied_within


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


def hashes(count, seed, flips):
    """Random hashes, a third of them written over by others with 0..``flips`` bits flipped."""
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 2**64, count, dtype=np.uint64)
    for _ in range(count // 3):
        mask = np.bitwise_xor.reduce(np.uint64(1) << rng.integers(0, 64, rng.integers(1, flips + 2), dtype=np.uint64))
        bits[rng.integers(count)] = bits[rng.integers(count)] ^ mask
    return bits


def joined(found):
    return [pair for first, second in found for pair in zip(first.tolist(), second.tolist(), strict=True)]


def reference(bits, max_bits):
    """Two loops, and bits counted one by one."""
    values = bits.tolist()
    return [
        (i, j)
        for i in range(len(values))
        for j in range(i + 1, len(values))
        if bin(values[i] ^ values[j]).count("1") <= max_bits
    ]


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6), max_bits=st.integers(0, 11), count=st.integers(2, 80))
def test_bands_find_what_all_pairs_find(seed, max_bits, count):
    bits = hashes(count, seed, flips=max_bits + 2)
    expected = reference(bits, max_bits)
    assert joined(near_hashes(bits, max_bits, banded=True)) == expected
    assert joined(near_hashes(bits, max_bits, banded=False)) == expected


@pytest.mark.parametrize("count", [6000, 2**17 + 50])  # four bands, and three
def test_bands_miss_nothing_whichever_bits_are_flipped(count, monkeypatch):
    monkeypatch.setattr(module, "_BAND_ROWS", 2**18)
    rng = np.random.default_rng(count)
    bits = rng.integers(0, 2**64, count, dtype=np.uint64)
    planted = []
    for n in range(200):
        # eight bits: spread evenly, in a row from anywhere, or at random
        places = [np.arange(8) * 8 + n % 8, (n + np.arange(8)) % 64, rng.permutation(64)[:8]][n % 3]
        bits[2 * n + 1] = bits[2 * n] ^ np.bitwise_or.reduce(np.uint64(1) << places.astype(np.uint64))
        planted.append((2 * n, 2 * n + 1))
    found = joined(near_hashes(bits))
    assert set(planted) <= set(found) and len(set(found)) == len(found) and found == sorted(found)


def test_bands_compare_few_of_all_pairs(monkeypatch):
    compared = []
    partners = module._Buckets.partners

    def counted(*arguments):
        found = partners(*arguments)
        compared.append(len(found[0]))
        return found

    monkeypatch.setattr(module._Buckets, "partners", counted)
    count = 10_000
    list(near_hashes(np.random.default_rng(0).integers(0, 2**64, count, dtype=np.uint64)))
    assert 0 < sum(compared) < 0.02 * count * (count - 1) / 2


def test_pictures_are_found_by_bands_as_by_all_pairs(monkeypatch):
    images = [picture(seed) for seed in range(40)]
    images += [through_jpeg(image, 70 + n) for n, image in enumerate(images[::2])]
    items = [look(image) for image in images]
    expected = list(near_pairs(items))
    monkeypatch.setattr(module, "_ALL_PAIRS", 0)
    assert list(near_pairs(items)) == expected and len(expected) >= 20


def test_too_many_bits_for_bands_are_compared_all_with_all(monkeypatch):
    monkeypatch.setattr(module, "_ALL_PAIRS", 0)
    monkeypatch.setattr(module._Buckets, "partners", lambda *_: pytest.fail("millions of probes a picture"))
    bits = hashes(60, 0, flips=30)
    assert joined(near_hashes(bits, 30)) == reference(bits, 30)


def test_ties_inside_a_split():
    part_of = {"a": "test", "b": "test", "c": "test", "d": "train", "v": "val", "w": "val"}
    ties = [("a", "b"), ("b", "c"), ("c", "d"), ("d", "elsewhere"), ("w", "v", "d")]
    assert tied_within(ties, part_of) == {"test": [["a", "b", "c"]], "val": [["v", "w"]]}
    assert tied_within([("c", "d")], part_of) == {}
