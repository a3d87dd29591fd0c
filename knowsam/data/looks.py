"""Which pictures are the same, or nearly so, whatever their files are called and however they are encoded."""

import hashlib
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import combinations, pairwise
from typing import NamedTuple

import numpy as np
from PIL import Image

from knowsam.data.intensity import as_picture

_SIDE = 32
_FREQUENCIES = 8
_DCT = np.cos(np.pi * np.outer(np.arange(_FREQUENCIES), 2 * np.arange(_SIDE) + 1) / (2 * _SIDE))  # (8, 32)
_CHUNK = 1024
_BAND_ROWS = 4096  # rows whose candidates are in memory at a time
_ALL_PAIRS = 4096  # up to so many pictures comparing all pairs is the quicker way
_MOST_PROBES = 5000

MAX_BITS = 8
MIN_CORRELATION = 0.98
_FLAT = 2.0  # grey levels; below this spread a thumbnail is noise, and noise resembles nothing


class Look(NamedTuple):
    """What is kept of a decoded picture in order to compare it with others.

    Attributes:
        pixels: sha256 of shape and values; the same for a renamed or losslessly re-encoded copy. Empty for a picture
            of one single colour, which says nothing about where it comes from.
        bits: 64-bit perceptual hash: which low frequencies lie above their median.
        thumbnail: uint8 (32, 32), grey.
    """

    pixels: str
    bits: int
    thumbnail: np.ndarray


def look(image: np.ndarray) -> Look:
    """The look of one picture.

    Args:
        image: levels (H, W, C), uint8 or uint16. They are compared in 8 bits, so that a copy is found at any depth.
    """
    if image.dtype != np.uint8:
        image = np.rint(image.astype(np.float32) / 257).astype(np.uint8)
    image = np.ascontiguousarray(image)
    grey = Image.fromarray(np.ascontiguousarray(as_picture(image))).convert("L")
    thumbnail = np.asarray(grey.resize((_SIDE, _SIDE), Image.Resampling.BOX))
    low = (_DCT @ thumbnail.astype(np.float64) @ _DCT.T).ravel()[1:]  # without the mean, which is light alone
    bits = int.from_bytes(np.packbits(low > np.median(low)).tobytes(), "big")
    return Look("" if (image == image[:1, :1]).all() else pixels_sha256(image), bits, thumbnail)


def pixels_sha256(image: np.ndarray) -> str:
    """sha256 of a picture's shape and values."""
    digest = hashlib.sha256(str(image.shape).encode())
    digest.update(np.ascontiguousarray(image).data)
    return digest.hexdigest()


def same_pixels(looks: Sequence[Look]) -> list[list[int]]:
    """Positions of pictures whose pixels are equal, a list per set of two or more."""
    places: dict[str, list[int]] = defaultdict(list)
    for n, item in enumerate(looks):
        if item.pixels:
            places[item.pixels].append(n)
    return [found for found in places.values() if len(found) > 1]


def near_pairs(
    looks: Sequence[Look], *, max_bits: int = MAX_BITS, min_correlation: float = MIN_CORRELATION
) -> Iterator[tuple[int, int, float]]:
    """Pairs that look nearly alike but are not equal: re-compressed, rescaled, relit, or hardly moved.

    The perceptual hash finds candidates, the correlation of the thumbnails decides: either alone gives false alarms by
    the hundred. Turned, mirrored, cropped or clearly shifted copies are not found. Candidates come from bands of the
    hash, which finds the same pairs as comparing all with all, and asks of each picture only for those of its bands.

    Args:
        max_bits: most bits of 64 in which two hashes may differ.
        min_correlation: least correlation of the 32 x 32 thumbnails, -1..1.
    Yields:
        (i, j, correlation), i < j, ascending.
    """
    if len(looks) < 2:
        return
    thumbs = np.stack([item.thumbnail for item in looks]).reshape(len(looks), -1)  # (N, 1024) uint8
    structured = np.flatnonzero(thumbs.std(axis=1) >= _FLAT)
    bits = np.array([item.bits for item in looks], np.uint64)[structured]
    for first, second in near_hashes(bits, max_bits):
        for piece in range(0, len(first), 16 * _CHUNK):  # candidates may be many: slices of a scan all look alike
            i, j = structured[first[piece : piece + 16 * _CHUNK]], structured[second[piece : piece + 16 * _CHUNK]]
            a, b = _standardised(thumbs[i]), _standardised(thumbs[j])
            correlation = (a * b).mean(axis=1)
            for n in np.flatnonzero(correlation >= min_correlation):
                one, other = int(i[n]), int(j[n])
                if not looks[one].pixels or looks[one].pixels != looks[other].pixels:
                    yield one, other, float(correlation[n])


def near_hashes(
    bits: np.ndarray, max_bits: int = MAX_BITS, *, banded: bool | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Every pair of hashes that differ in few bits.

    Of ``b`` bands that share out the 64 bits, one differs in at most ``max_bits // b`` bits: only hashes that are so
    near in one band are compared, found in a table of each band's values. Nothing is missed.

    Args:
        bits: uint64 (N,).
        max_bits: most bits in which the two may differ.
        banded: use the bands, or compare all with all; None: what is quicker.
    Yields:
        positions i and j, each int64 (M,), i < j, ascending by i, then j; the pairs of some rows i at a time.
    """
    bands = _bands(4 if len(bits) < 2**17 else 3)
    near = max_bits // len(bands)  # if every band differed in more, all together would differ in more than max_bits
    if banded is None:
        probes = sum(math.comb(width, k) for _, width in bands for k in range(near + 1))
        banded = len(bits) > _ALL_PAIRS and probes <= _MOST_PROBES
    if not banded:
        for start in range(0, len(bits), _CHUNK):
            rows = bits[start : start + _CHUNK, None]
            first, second = np.nonzero(np.triu(np.bitwise_count(rows ^ bits[None, start:]) <= max_bits, k=1))
            yield start + first, start + second
        return
    tables = [_Buckets((bits >> np.uint64(low)) & np.uint64(2**width - 1), width) for low, width in bands]
    for start in range(0, len(bits), _BAND_ROWS):
        rows = np.arange(start, min(start + _BAND_ROWS, len(bits)))
        found: list[tuple[np.ndarray, np.ndarray]] = []
        for number, table in enumerate(tables):
            for flip in _flips(bands[number][1], near):
                i, j = table.partners(rows, flip)
                keep = np.bitwise_count(bits[i] ^ bits[j]) <= max_bits
                i, j = i[keep], j[keep]
                for earlier in range(number):  # a pair that several bands find is taken from the first of them
                    flips = np.bitwise_count(tables[earlier].keys[i] ^ tables[earlier].keys[j])
                    i, j = i[flips > near], j[flips > near]
                found.append((i, j))
        first, second = (np.concatenate(side) for side in zip(*found, strict=True))
        order = np.lexsort((second, first))
        yield first[order], second[order]


def _bands(count: int) -> list[tuple[int, int]]:
    """(lowest bit, width) of each band; together all 64 bits."""
    edges = [round(64 * n / count) for n in range(count + 1)]
    return [(low, high - low) for low, high in pairwise(edges)]


def _flips(width: int, most: int) -> list[int]:
    """Every number of ``width`` bits in which at most ``most`` are set."""
    return [sum(1 << n for n in places) for k in range(most + 1) for places in combinations(range(width), k)]


class _Buckets:
    """Rows by the value of one band."""

    def __init__(self, keys: np.ndarray, width: int) -> None:
        self.keys = keys.astype(np.int64)
        self.rows = np.argsort(self.keys, kind="stable")
        self.starts = np.searchsorted(self.keys[self.rows], np.arange(2**width + 1))

    def partners(self, rows: np.ndarray, flip: int) -> tuple[np.ndarray, np.ndarray]:
        """Pairs (i, j), j > i, of these rows and all whose band is theirs with the bits of ``flip`` flipped."""
        wanted = self.keys[rows] ^ flip
        counts = self.starts[wanted + 1] - self.starts[wanted]
        i = np.repeat(rows, counts)
        inside = np.arange(len(i)) - np.repeat(np.cumsum(counts) - counts, counts)
        j = self.rows[np.repeat(self.starts[wanted], counts) + inside]
        later = j > i
        return i[later], j[later]


def _standardised(thumbnails: np.ndarray) -> np.ndarray:
    values = thumbnails.astype(np.float32)
    values -= values.mean(axis=1, keepdims=True)
    return values / values.std(axis=1, keepdims=True)


def tied_within(ties: Iterable[Sequence[str]], part_of: Mapping[str, str]) -> dict[str, list[list[str]]]:
    """Sets of pictures of one part that show the same: each such set is one observation, not several.

    Args:
        ties: ids of equal or nearly equal pictures; two or more each.
        part_of: id -> ``"test"`` and so on; ids of no part are passed over.
    Returns:
        part -> sets of two or more ids, each sorted.
    """
    units: dict[str, Units] = {}
    for ids in ties:
        for part in {part_of[i] for i in ids if i in part_of}:
            inside = [i for i in ids if part_of.get(i) == part]
            known = units.setdefault(part, Units(()))
            for other in inside:
                known.add(other)
                known.tie(inside[0], other)
    found = {part: [ids for ids in known.sets() if len(ids) > 1] for part, known in units.items()}
    return {part: sets for part, sets in sorted(found.items()) if sets}


class Units:
    """Cases that must stay together: a union of sets that grows as ties are found.

    Args:
        items: ids of all cases; each begins alone.
    """

    def __init__(self, items: Iterable[str]) -> None:
        self._parent = {item: item for item in items}

    def add(self, item: str) -> None:
        """One more; nothing happens where it is there already."""
        self._parent.setdefault(item, item)

    def tie(self, first: str, second: str) -> None:
        """Keep these two, and all that is tied to them, together."""
        first, second = self._root(first), self._root(second)
        if first != second:
            self._parent[max(first, second)] = min(first, second)

    def sets(self) -> list[list[str]]:
        """All sets, sorted inside and among each other."""
        members: dict[str, list[str]] = defaultdict(list)
        for item in sorted(self._parent):
            members[self._root(item)].append(item)
        return sorted(members.values())

    def _root(self, item: str) -> str:
        while (parent := self._parent[item]) != item:
            self._parent[item] = item = self._parent[parent]
        return item
