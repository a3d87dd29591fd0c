"""Masks with a palette: whether the stored number counts or its colour, and whether the files of a set agree."""

from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from knowsam.errors import DataError, Fault
from knowsam.io.kind import labels_of
from knowsam.io.stored import StoredMask

Rule = Literal["auto", "index", "colour"]
Colour = tuple[int, int, int]
PALETTES = "palettes of masks"
"""Kind of fault of masks whose palettes do not agree."""
DARK = 32
"""A colour whose channels all are at most this counts as black: the background."""


def read_palette(indices: np.ndarray, table: NDArray[np.uint8], rule: Rule, where: Path) -> StoredMask:
    """A mask's values from indices and palette.

    ``"auto"`` looks at the whole palette, not at what of it occurs, so that all files with one palette are read alike:

    - all grey, two levels (black and white, in either order), or in another order than the indices: the grey level;
    - all grey, three or more levels that grow with the index: the index;
    - coloured, and entry 0 is black: the index;
    - coloured, and entry 0 is not black: refused, for nobody can tell which is meant.

    Args:
        indices: unsigned integers (*S).
        table: uint8 (n, 3); an index beyond it is black.
        rule: see ``Reading.palette``.
        where: file name for the messages.
    Raises:
        DataError: ambiguous; shows both readings.
    """
    table = filled(table, indices)
    numbers, counts = np.unique(indices, return_counts=True)
    used: dict[int, Colour] = {int(i): (int(table[i][0]), int(table[i][1]), int(table[i][2])) for i in numbers}
    by = _by_itself(table, int(numbers[-1])) if rule == "auto" else rule
    if by is None:
        rows = [f"index {i} = rgb{colour} ({n} pixels)" for (i, colour), n in zip(used.items(), counts, strict=True)]
        raise DataError(
            f"{where}: a coloured palette whose entry 0 is rgb{tuple(table[0].tolist())}, not black: does the index or "
            f"the colour count? Here {', '.join(rows[:8])}{', ...' if len(rows) > 8 else ''}",
            hint="set data.reading.palette to index (the number is the label) or colour (give labels for the colours)",
        )
    if by == "index":
        return StoredMask(indices, used, (), "index")
    if (table == table[:, :1]).all():
        return StoredMask(table[:, 0][indices], used, ("palette read by grey level",), "colour")
    colours = labels_of(np.moveaxis(table[indices], -1, 0), str(where))
    return StoredMask(colours, used, ("palette read by colour",), "colour")


def filled(table: NDArray[np.uint8], indices: np.ndarray) -> NDArray[np.uint8]:
    """The palette with black entries for indices beyond it."""
    return np.pad(table, ((0, max(0, int(indices.max(initial=0)) + 1 - len(table))), (0, 0)))


def _by_itself(table: NDArray[np.uint8], top: int) -> Literal["index", "colour"] | None:
    if (table != table[:, :1]).any():
        return "index" if table[0].max() <= DARK else None
    levels = np.trim_zeros(table[:, 0].astype(int), "b")  # black entries behind the last other one fill up
    counted = len(levels) > 2 and top < len(levels) and (np.diff(levels) > 0).all()
    return "index" if counted else "colour"


class PaletteWatch:
    """Whether the palettes of a set of masks mean the same; one object sees them all.

    Args:
        rule: ``Reading.palette``; unless it is ``"auto"`` the user has decided, and nothing is compared.
    """

    def __init__(self, rule: Rule = "auto") -> None:
        self.rule = rule
        self._colours: dict[int, tuple[Colour, Path]] = {}
        self._first: dict[str, Path] = {}

    def check(self, path: Path, mask: StoredMask) -> None:
        """Compare one more mask with those before it.

        Raises:
            DataError: an index that is of another colour in another file, or files of which some are read by index
                and some by colour. Masks that are black all over agree with all.
        """
        if self.rule != "auto" or mask.palette is None or all(max(c) <= DARK for c in mask.palette.values()):
            return
        hint = "set data.reading.palette to colour where colours tell the classes, or to index where the numbers do"
        self._first.setdefault(mask.by, path)
        if len(self._first) > 1:
            text = (
                f"masks with palettes do not agree: {self._first['index']} would be read by index, "
                f"{self._first['colour']} by grey level"
            )
            raise DataError(text, hint=hint, faults=[Fault(PALETTES, text)])
        if mask.by == "index":
            for index, colour in mask.palette.items():
                seen, other = self._colours.setdefault(index, (colour, path))
                if seen != colour:
                    text = (
                        f"masks with palettes do not agree: index {index} is rgb{seen} in {other}, but rgb{colour} "
                        f"in {path}"
                    )
                    raise DataError(text, hint=hint, faults=[Fault(PALETTES, text)])
