"""Patches of volumes, and of pictures too large to see whole: where they lie, and reading nothing else.

Shapes *S are (H, W) or (D, H, W). Where a patch lies is a pure function of the seed and of its place in the
stream, whichever process holds it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from knowsam.data.labels import IGNORE_ID
from knowsam.data.seeds import derive_seed
from knowsam.errors import ConfigError

PER_CLASS = 1000
"""Voxels that an index keeps of a class: 12 kB, and centres that lie as those of all voxels do."""


class Stored(Protocol):
    """Anything that is cut by slices, and reads no more than that: an array, a memory map, a data set of an h5 file."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole."""

    def __getitem__(self, place: tuple[slice, ...], /) -> np.ndarray:
        """A part."""


def patch_generator(seed: int, stream: str, position: int) -> np.random.Generator:
    """What one patch is drawn with.

    Args:
        seed: of the run.
        stream: ``labelled``, ``unlabelled`` or ``second``.
        position: of the patch in the stream, counted over all processes and batches.
    """
    return np.random.Generator(np.random.Philox(derive_seed(seed, "crop", stream, position)))


def patch_start(
    shape: Sequence[int],
    patch: Sequence[int],
    rng: np.random.Generator,
    foreground: NDArray[np.integer] | None = None,
    oversample: float = 0.0,
) -> tuple[int, ...]:
    """First voxel of a patch.

    Either anywhere that the patch fits, or, with probability ``oversample``, around a voxel of the foreground: in its
    middle, or as near to it as the volume's border allows. Along an axis that is shorter than the patch it begins
    before the volume, by half of what is missing. How many numbers are drawn depends on none of these.

    Args:
        shape: *S of the volume.
        patch: of the patch.
        rng: see :func:`patch_generator`.
        foreground: whole numbers (n, dims), voxels of which one is chosen evenly; None, as for every unlabelled case,
            or n = 0: anywhere.
        oversample: share of patches around a voxel of the foreground, 0..1.
    Returns:
        One number an axis; below 0 where the volume is smaller than the patch.
    Raises:
        ConfigError: patch and volume differ in the number of axes.
    """
    if len(shape) != len(patch):
        raise ConfigError(
            f"data.patch_size is {list(patch)}, {len(patch)} numbers, but images are {' x '.join(map(str, shape))}",
            hint="Give a side for every axis: [D, H, W] for volumes, [H, W] for pictures.",
        )
    chance, which, *places = rng.random(2 + len(shape))
    room = [side - length for side, length in zip(shape, patch, strict=True)]
    if foreground is not None and len(foreground) and chance < oversample:
        voxel = foreground[int(which * len(foreground))]
        wanted = [int(place) - length // 2 for place, length in zip(voxel, patch, strict=True)]
    else:
        wanted = [int(place * (free + 1)) for place, free in zip(places, room, strict=True)]
    return tuple(
        min(max(place, 0), free) if free >= 0 else -(-free // 2) for place, free in zip(wanted, room, strict=True)
    )


def read_patch(volume: Stored, start: Sequence[int], patch: Sequence[int], fill: int = 0) -> np.ndarray:
    """The patch that begins at ``start``, and nothing else of the volume.

    Args:
        volume: (C, *S) or (*S).
        start: of :func:`patch_start`.
        patch: its size.
        fill: what lies outside of the volume. For images 0, black, as the sliding window of prediction has it; for
            masks ``IGNORE_ID``, so that nothing is learned there.
    Returns:
        A new array, (C, *patch) or (*patch), of the volume's type.
    """
    before = len(volume.shape) - len(patch)
    sides = volume.shape[before:]
    inside = [(max(a, 0), min(a + length, side)) for a, length, side in zip(start, patch, sides, strict=True)]
    # Whole along the channels, with a number, as not everything that is cut by slices takes an Ellipsis.
    whole = tuple(slice(0, side) for side in volume.shape[:before])
    found = np.asarray(volume[(*whole, *(slice(low, high) for low, high in inside))])
    if found.shape[before:] == tuple(patch):
        return np.array(found, order="C")
    filled = np.full((*volume.shape[:before], *patch), fill, found.dtype)
    places = [slice(low - a, high - a) for (low, high), a in zip(inside, start, strict=True)]
    filled[(*whole, *places)] = found
    return filled


@dataclass(frozen=True)
class ForegroundIndex:
    """Some voxels of every class of a labelled case, to centre patches on: small, and made once.

    Attributes:
        classes: (m,) class ids that the case holds, without background and ``IGNORE_ID``, ascending.
        counts: (m,) voxels of each in the case.
        voxels: int32 (n, dims), at most ``limit`` of each class, drawn evenly, class after class.
        starts: (m + 1,) where each class begins and the last one ends in ``voxels``.
    """

    classes: NDArray[np.uint8]
    counts: NDArray[np.int64]
    voxels: NDArray[np.int32]
    starts: NDArray[np.int64] = field(repr=False)

    @classmethod
    def of(cls, mask: Stored, limit: int = PER_CLASS) -> "ForegroundIndex":
        """Look at a mask, one slice at a time.

        Args:
            mask: uint8 class ids (*S), for example a memory map.
            limit: voxels to keep of a class, >= 1.
        Returns:
            The same for the same mask.
        """
        depth = mask.shape[0]
        rest = tuple(slice(0, side) for side in mask.shape[1:])
        counts = np.stack([np.bincount(np.ravel(mask[(slice(d, d + 1), *rest)]), minlength=256) for d in range(depth)])
        counts[:, [0, IGNORE_ID]] = 0
        ends = counts.cumsum(axis=0)  # (D, 256), voxels of each class up to the end of each slice
        classes: list[int] = np.flatnonzero(ends[-1]).tolist()
        rng = np.random.default_rng(0)
        # Which of a class's voxels, in the order of memory: drawn without looking at them.
        drawn = {k: np.sort(rng.choice(ends[-1, k], min(limit, ends[-1, k]), replace=False)) for k in classes}
        found: dict[int, list[np.ndarray]] = {k: [] for k in classes}
        for d in np.flatnonzero(counts.any(axis=1)):
            plane = np.asarray(mask[(slice(d, d + 1), *rest)])
            for k in np.flatnonzero(counts[d]).tolist():
                first = ends[d, k] - counts[d, k]
                here = drawn[k][(drawn[k] >= first) & (drawn[k] < ends[d, k])] - first
                if len(here):
                    places = np.unravel_index(np.flatnonzero(plane == k)[here], plane.shape)
                    found[k].append(np.stack([places[0] + d, *places[1:]], axis=1).astype(np.int32))
        voxels = [np.concatenate(found[k]) for k in classes] or [np.zeros((0, len(mask.shape)), np.int32)]
        starts = np.cumsum([0, *(len(drawn[k]) for k in classes)])
        return cls(np.array(classes, np.uint8), ends[-1, classes], np.concatenate(voxels), starts)

    def pick(self, rng: np.random.Generator) -> NDArray[np.int32]:
        """The voxels (n, dims) of one of the case's classes, each as likely, so that small ones are seen as often.

        None of a case without foreground: n = 0. Draws one number in any case.
        """
        which = rng.random()
        if not len(self.classes):
            return self.voxels
        first = int(which * len(self.classes))
        return self.voxels[self.starts[first] : self.starts[first + 1]]


def draw_patch(
    image: Stored,
    mask: Stored | None,
    patch: Sequence[int],
    rng: np.random.Generator,
    index: ForegroundIndex | None = None,
    oversample: float = 0.0,
) -> tuple[np.ndarray, np.ndarray | None]:
    """One patch of a case: :func:`patch_start` and :func:`read_patch` of image and mask.

    Args:
        image: (C, *S).
        mask: (*S); None of an unlabelled case.
        patch: size.
        rng: see :func:`patch_generator`.
        index: of the mask; None looks for no foreground.
        oversample: share of patches around the foreground.
    Returns:
        (C, *patch) with 0 and (*patch) with ``IGNORE_ID`` outside of the volume.
    Raises:
        ConfigError: patch and volume differ in the number of axes.
    """
    foreground = None if index is None or mask is None else index.pick(rng)
    start = patch_start(image.shape[1:], patch, rng, foreground, oversample)
    return read_patch(image, start, patch), None if mask is None else read_patch(mask, start, patch, IGNORE_ID)
