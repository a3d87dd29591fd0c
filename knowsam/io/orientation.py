"""The orientation tag of EXIF and TIFF: how a viewer turns what is stored."""

import numpy as np

from knowsam.io.stored import Reading

TAG = 274

# Quarter turns against the clock, after a mirror from left to right or not, that show the stored picture upright.
_TURNS = {1: (0, False), 2: (0, True), 3: (2, False), 4: (2, True), 5: (1, True), 6: (3, False), 7: (3, True)}
_TURNS[8] = (1, False)


def valid(tag: object) -> int:
    """A tag as a number in 1..8; anything else counts as 1, as viewers have it."""
    return tag if isinstance(tag, int) and tag in _TURNS else 1


def swaps(tag: int) -> bool:
    """Whether height and width change places."""
    return tag >= 5


def upright(array: np.ndarray, tag: int, axes: tuple[int, int] = (-2, -1)) -> np.ndarray:
    """From the stored grid to the shown one.

    Args:
        array: any shape.
        tag: 1..8.
        axes: rows and columns.
    """
    turns, mirrored = _TURNS[tag]
    return np.rot90(np.flip(array, axes[1]) if mirrored else array, turns, axes)


def stored(array: np.ndarray, tag: int, axes: tuple[int, int] = (-2, -1)) -> np.ndarray:
    """From the shown grid to the stored one: what ``upright`` turns back."""
    turns, mirrored = _TURNS[tag]
    array = np.rot90(array, -turns, axes)
    return np.flip(array, axes[1]) if mirrored else array


def turned(
    array: np.ndarray, tag: int, reading: Reading, axes: tuple[int, int] = (-2, -1)
) -> tuple[np.ndarray, tuple[str, ...]]:
    """The stored array on the grid that ``reading`` wants, and the notes on it."""
    if tag == 1:
        return np.ascontiguousarray(array), ()
    if reading.orientation == "stored":
        return np.ascontiguousarray(array), (f"orientation tag {tag} not applied",)
    return np.ascontiguousarray(upright(array, tag, axes)), (f"orientation tag {tag} applied",)
