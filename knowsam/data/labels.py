"""Raw mask values (0/255, palette indices, colours) to class ids, by a declared table."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from knowsam.errors import ConfigError, DataError

IGNORE_ID = 255
"""Class id of pixels where nothing is known: they take no part in losses, metrics and prompts. ``losses.IGNORE``."""

_MOST = 65535  # the highest raw value that a table may hold


def valid_pixels(mask: NDArray[np.integer[Any]]) -> NDArray[np.bool_]:
    """Where a class is known.

    Args:
        mask: class ids (*S).
    Returns:
        bool (*S), False where the id is ``IGNORE_ID``.
    """
    known: NDArray[np.bool_] = np.asarray(mask) != IGNORE_ID
    return known


class LabelTable:
    """Which raw mask values mean which class. A value that is not in the table is refused, never guessed.

    Args:
        declaration: ``{class_id: raw}`` where ``raw`` is a number, a list of numbers, or a list of ``[r, g, b]``
            colours: ``{0: 0, 1: 255}``, ``{0: [0, 4], 1: [1, 2]}``, ``{0: [[0, 0, 0]], 1: [[255, 0, 0]]}``. A flat list
            is always a list of numbers. None: the raw values are class ids already.
        num_classes: K, background included; 2..255.
        threshold: for binary masks stored as JPEG or with soft edges, instead of ``declaration``: a raw value above
            it is class 1, any other is class 0. 0 makes numbered objects one class.
        ignore: raw value or values of pixels where nothing is known, written as in ``declaration``: ``255``,
            ``[254, 255]``, ``[[224, 224, 192]]``. They become ``IGNORE_ID``.
    Raises:
        ConfigError: the classes are not exactly 0..K-1, a value belongs to two classes or is ignored as well, numbers
            are mixed with colours, or ``threshold`` comes with a declaration or with K != 2.

    Example:
        >>> LabelTable({0: 0, 1: 255}, num_classes=2).apply(np.array([[0, 255]], np.uint8))
        array([[0, 1]], dtype=uint8)
        >>> LabelTable(None, num_classes=2, ignore=255).apply(np.array([[0, 1, 255]], np.uint8))
        array([[  0,   1, 255]], dtype=uint8)
    """

    def __init__(
        self,
        declaration: Mapping[Any, Any] | None = None,
        num_classes: int = 2,
        *,
        threshold: float | None = None,
        ignore: Any = None,
    ) -> None:
        if not 2 <= num_classes <= 255:
            raise ConfigError(f"num_classes is {num_classes}; allowed is 2..255, background included")
        self.num_classes = num_classes
        self.threshold = threshold
        self._class_of: dict[int, int] | None = None  # raw number, or colour packed as 0xRRGGBB
        self._colours = False
        if threshold is not None:
            if declaration is not None:
                raise ConfigError("labels: a table and a threshold exclude each other; remove one of them")
            if num_classes != 2:
                raise ConfigError(f"labels: a threshold makes 2 classes, but num_classes is {num_classes}")
        elif declaration is not None:
            self._class_of, self._colours = _parse(declaration, num_classes)
        self._ignored = _parse_ignored(ignore, self._colours)
        self._check_ignored()
        if self._class_of is not None and not self._colours:
            self._numbers = np.full(_MOST + 1, -1, np.int16)
            self._numbers[list(self._class_of)] = list(self._class_of.values())
            self._numbers[list(self._ignored)] = IGNORE_ID

    def _check_ignored(self) -> None:
        for code in self._ignored:
            if self._class_of is not None and code in self._class_of:
                raise ConfigError(
                    f"ignore: raw value {self._name(code)} is class {self._class_of[code]} in the label table",
                    hint="Take it out of the table, or leave ignore out.",
                )
            if self._class_of is None and self.threshold is None and code < self.num_classes:
                raise ConfigError(
                    f"ignore: raw value {code} is a class: without a label table the raw values are class ids, here "
                    f"0..{self.num_classes - 1}",
                    hint="Ignore another value, or declare a label table.",
                )

    def __repr__(self) -> str:
        """Equal for tables that map alike, so that it can be part of a cache key."""
        ignored = f", ignore={sorted(self._ignored)}" if self._ignored else ""
        if self.threshold is not None:
            return f"LabelTable(threshold={self.threshold}, num_classes={self.num_classes}{ignored})"
        pairs = None if self._class_of is None else sorted(self._class_of.items())
        return f"LabelTable({pairs}, colours={self._colours}, num_classes={self.num_classes}{ignored})"

    @property
    def ignored(self) -> list[int] | list[tuple[int, int, int]]:
        """Raw values (or colours) of pixels where nothing is known, ascending; empty if none is declared."""
        codes = sorted(self._ignored)
        return [_colour_of(code) for code in codes] if self._colours else codes

    def raw_values(self) -> list[int] | list[tuple[int, int, int]]:
        """What each class is written as, by class id: the first raw value (or colour) that was declared for it.

        0 and 255 where a threshold divides, the ids themselves where nothing is declared.
        """
        if self.threshold is not None:
            return [0, 255]
        if self._class_of is None:
            return list(range(self.num_classes))
        first: dict[int, int] = {}
        for code, class_id in self._class_of.items():
            first.setdefault(class_id, code)
        codes = [first[k] for k in range(self.num_classes)]
        return [_colour_of(code) for code in codes] if self._colours else codes

    def apply(self, raw: np.ndarray, where: str = "mask") -> NDArray[np.uint8]:
        """Class ids of a mask.

        Args:
            raw: unsigned whole numbers (..., H, W); or uint8 (H, W, 3) or (D, H, W, 3), last axis colour, if the table
                has colours.
            where: file name for the messages.
        Returns:
            uint8 (..., H, W), values 0..K-1, or ``IGNORE_ID`` where the raw value is an ignored one.
        Raises:
            DataError: values that are not in the table (which, how many pixels, what is allowed), or colours where
                the table has numbers.
        """
        if _is_coloured(raw) and not self._colours:
            raise DataError(
                f"{where}: the mask is a colour picture, but the label table has plain numbers",
                hint="declare the colours, as in labels: {0: [[0, 0, 0]], 1: [[255, 0, 0]]}",
            )
        if self._colours and self._class_of is not None:
            return self._apply_colours(raw, self._class_of, where)
        if self._class_of is not None:
            beyond = raw > _MOST
            ids = self._numbers[np.where(beyond, 0, raw)]
            strange = (ids < 0) | beyond
            if strange.any():
                self._refuse(raw, strange, where)
            return ids.astype(np.uint8)
        unknown = np.isin(raw, sorted(self._ignored)) if self._ignored else np.zeros(raw.shape, bool)
        if self.threshold is not None:
            classes = (raw > self.threshold).astype(np.uint8)
        else:
            strange = (raw >= self.num_classes) & ~unknown
            if strange.any():
                self._refuse(raw, strange, where)
            classes = raw.astype(np.uint8)
        classes[unknown] = IGNORE_ID
        return classes

    def _apply_colours(self, raw: np.ndarray, class_of: Mapping[int, int], where: str) -> NDArray[np.uint8]:
        wide = raw.astype(np.int64)
        # a mask whose channels agree arrives as (H, W): grey v stands for the colour (v, v, v)
        codes = wide[..., 0] << 16 | wide[..., 1] << 8 | wide[..., 2] if _is_coloured(raw) else wide * 0x010101
        present, position = np.unique(codes, return_inverse=True)
        known = {**class_of, **dict.fromkeys(self._ignored, IGNORE_ID)}
        ids = np.array([known.get(int(code), -1) for code in present], np.int16)[position].reshape(codes.shape)
        if (ids < 0).any():
            self._refuse(codes, ids < 0, where)
        return ids.astype(np.uint8)

    def _refuse(self, values: np.ndarray, bad: np.ndarray, where: str) -> None:
        found, counts = np.unique(values[bad], return_counts=True)
        shown = ", ".join(
            f"{self._name(int(v))} ({n} pixels)" for v, n in zip(found[:8], counts[:8].tolist(), strict=True)
        )
        more = f" and {len(found) - 8} more values" if len(found) > 8 else ""
        if self._class_of is None:
            allowed = f"0..{self.num_classes - 1}, because no label table is declared"
        else:
            allowed = ", ".join(f"{self._name(v)} (class {c})" for v, c in sorted(self._class_of.items())[:20])
        if self._ignored:
            allowed += "; ignored are " + ", ".join(self._name(v) for v in sorted(self._ignored))
        hint = "add the values to the label table, or to ignore where nothing is known there, or correct the mask"
        if len(found) > 3 or str(where).lower().endswith((".jpg", ".jpeg")):
            hint = "this looks like a mask saved as JPEG or with soft (anti-aliased) edges: save it without loss"
            if self.num_classes == 2:
                hint += ", or declare threshold: 127 instead of a label table (above it is class 1)"
        elif self._class_of is None and self.num_classes == 2 and found.tolist() == [255]:
            hint = "declare labels: {0: 0, 1: 255}"
        raise DataError(f"{where}: mask values {shown}{more} have no class; allowed are {allowed}", hint=hint)

    def _name(self, value: int) -> str:
        return str(list(_colour_of(value))) if self._colours else str(value)


def _is_coloured(raw: np.ndarray) -> bool:
    """Whether ``read_mask`` gave colours. A stack of slices (D, H, 3) would look alike, but 3 pixels are no mask."""
    return raw.ndim in (3, 4) and raw.shape[-1] == 3


def _colour_of(code: int) -> tuple[int, int, int]:
    return code >> 16, code >> 8 & 255, code & 255


def _parse_ignored(ignore: Any, colours: bool) -> frozenset[int]:
    """Raw numbers, or colours as 0xRRGGBB where the table has colours."""
    values = [] if ignore is None else list(ignore) if _is_list(ignore) else [ignore]
    if any(_is_list(value) != colours for value in values):
        if colours:
            raise ConfigError(
                f"ignore: {ignore!r} is a number, but the label table has colours",
                hint="A colour is written as a list within the list: ignore: [[224, 224, 192]].",
            )
        raise ConfigError(
            f"ignore: {ignore!r} is a colour, but the raw values of the classes are numbers",
            hint="Declare the classes' colours too, as in labels: {0: [[0, 0, 0]], 1: [[255, 0, 0]]}.",
        )
    return frozenset(_colour_code(v, "ignore") if colours else _number(v, _MOST, "ignore") for v in values)


def _parse(declaration: Mapping[Any, Any], num_classes: int) -> tuple[dict[int, int], bool]:
    """``{raw: class}`` and whether the raw values are colours."""
    by_class: dict[int, list[Any]] = {}
    for key, raw in declaration.items():
        try:
            class_id = int(key)  # YAML and dotted overrides may bring text
        except (TypeError, ValueError):
            raise ConfigError(f"labels: class {key!r} is not a number") from None
        if class_id in by_class:
            raise ConfigError(f"labels: class {class_id} is declared twice")
        by_class[class_id] = list(raw) if _is_list(raw) else [raw]
    if sorted(by_class) != list(range(num_classes)):
        raise ConfigError(
            f"labels: classes {sorted(by_class)} are declared; needed are 0..{num_classes - 1}, each once"
        )

    kinds = {_is_list(raw) for values in by_class.values() for raw in values}
    if len(kinds) > 1:
        raise ConfigError("labels: numbers and [r, g, b] colours are mixed; use one of them")
    class_of: dict[int, int] = {}
    for class_id, values in by_class.items():
        if not values:
            raise ConfigError(f"labels: class {class_id} has no raw value")
        for raw in values:
            code = _colour_code(raw) if _is_list(raw) else _number(raw, _MOST)
            if code in class_of:
                raise ConfigError(
                    f"labels: raw value {raw} is declared twice (classes {class_of[code]} and {class_id})",
                    hint="a colour is written as a list within the list: {1: [[255, 0, 0]]}",
                )
            class_of[code] = class_id
    return class_of, kinds == {True}


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _colour_code(colour: Sequence[Any], key: str = "labels") -> int:
    if len(colour) != 3:
        raise ConfigError(f"{key}: {list(colour)} is not a colour; write [r, g, b], each 0..255")
    red, green, blue = (_number(part, 255, key) for part in colour)
    return red << 16 | green << 8 | blue


def _number(value: Any, maximum: int, key: str = "labels") -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= maximum:
        raise ConfigError(f"{key}: raw value {value!r} is not a whole number in 0..{maximum}")
    return value
