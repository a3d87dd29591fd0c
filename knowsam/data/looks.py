"""Which pictures are the same, or nearly so, whatever their files are called and however they are encoded."""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

_SIDE = 32
_FREQUENCIES = 8
_DCT = np.cos(np.pi * np.outer(np.arange(_FREQUENCIES), 2 * np.arange(_SIDE) + 1) / (2 * _SIDE))  # (8, 32)
_CHUNK = 1024

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
        image: uint8 (H, W, 3).
    """
    image = np.ascontiguousarray(image)
    grey = Image.fromarray(image).convert("L").resize((_SIDE, _SIDE), Image.Resampling.BOX)
    thumbnail = np.asarray(grey)
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
    the hundred. Turned, mirrored, cropped or clearly shifted copies are not found. Time grows with the square of the
    number: about two seconds for 10,000 pictures.

    Args:
        max_bits: most bits of 64 in which two hashes may differ.
        min_correlation: least correlation of the 32 x 32 thumbnails, -1..1.
    Yields:
        (i, j, correlation), i < j.
    """
    if len(looks) < 2:
        return
    bits = np.array([item.bits for item in looks], np.uint64)
    thumbs = np.stack([item.thumbnail for item in looks]).reshape(len(looks), -1)  # (N, 1024) uint8
    flat = thumbs.std(axis=1) < _FLAT
    for start in range(0, len(looks), _CHUNK):
        rows = np.arange(start, min(start + _CHUNK, len(looks)))
        near = np.bitwise_count(bits[rows, None] ^ bits[None, start:]) <= max_bits
        near &= ~flat[rows, None] & ~flat[None, start:]
        first, second = np.nonzero(np.triu(near, k=1))
        for piece in range(0, len(first), 16 * _CHUNK):  # candidates may be many: slices of a scan all look alike
            i, j = start + first[piece : piece + 16 * _CHUNK], start + second[piece : piece + 16 * _CHUNK]
            a, b = _standardised(thumbs[i]), _standardised(thumbs[j])
            correlation = (a * b).mean(axis=1)
            for n in np.flatnonzero(correlation >= min_correlation):
                one, other = int(i[n]), int(j[n])
                if not looks[one].pixels or looks[one].pixels != looks[other].pixels:
                    yield one, other, float(correlation[n])


def _standardised(thumbnails: np.ndarray) -> np.ndarray:
    values = thumbnails.astype(np.float32)
    values -= values.mean(axis=1, keepdims=True)
    return values / values.std(axis=1, keepdims=True)


class Units:
    """Cases that must stay together: a union of sets that grows as ties are found.

    Args:
        items: ids of all cases; each begins alone.
    """

    def __init__(self, items: Iterable[str]) -> None:
        self._parent = {item: item for item in items}

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
