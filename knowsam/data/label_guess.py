"""Which classes a user's masks hold, from the values in them alone. Whatever is assumed is said."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from knowsam.data.survey import Value, show_value
from knowsam.errors import DataError

_MOST_CLASSES = 20
_MIXED = [0, 1, 255]
_RARE = 0.05  # of the masks; a value that is rarer may be a slip of the hand


@dataclass(frozen=True)
class LabelGuess:
    """What the masks seem to mean.

    Attributes:
        labels: class id -> raw value(s), as ``data.labels``; None: the values are class ids.
        threshold: as ``data.label_threshold``; None if there is a table or the values are ids.
        num_classes: K, background included.
        reason: one sentence for the user.
    """

    labels: dict[int, Any] | None
    threshold: float | None
    num_classes: int
    reason: str


def guess_labels(masks: Mapping[str, Mapping[Value, int]], num_classes: int | None = None) -> LabelGuess:
    """Work out the label table.

    Args:
        masks: id -> raw value -> pixels.
        num_classes: K, if it is known: rare values that would make more of them are then taken for mistakes.
    Raises:
        DataError: no mask, no foreground, or values that have no obvious meaning.
    """
    if not masks:
        raise DataError("there is no mask that can be used", hint="Training needs some; --masks says where.")
    coloured = any(isinstance(value, tuple) for values in masks.values() for value in values)
    if coloured:  # a mask whose channels agree was read as numbers: grey v stands for (v, v, v)
        masks = {i: {_colour(v): n for v, n in values.items()} for i, values in masks.items()}
    pixels: Counter[Value] = Counter()
    seen: Counter[Value] = Counter()
    for values in masks.values():
        pixels.update(values)
        seen.update(values.keys())
    found = sorted(pixels)
    few = max(1, int(_RARE * len(masks)))
    common = [v for v in found if seen[v] > few]
    odd = sum(any(v not in common for v in values) for values in masks.values())
    note = ""
    if not coloured and not _plain(found, masks) and odd <= few and len(common) > 1:
        if _plain(common, masks) or len(common) == num_classes:
            rare = ", ".join(show_value(v) for v in found if v not in common)
            found, note = common, f"; {odd} of {len(masks)} masks also hold {rare}, taken for a mistake and not used"
        elif odd:
            note = "".join(_rare(v, masks) for v in found if v not in common)
            note += " (a mistake? --classes or --labels that leave it out do not use such masks)"
    if len(found) < 2:
        raise DataError(
            f"every mask holds the value {show_value(found[0])} only",
            hint="Are these the masks? Else give --masks.",
        )
    if coloured:
        return _colours(found, pixels, note)
    if found == list(range(len(found))):
        return LabelGuess(None, None, len(found), f"masks hold the class ids 0 to {len(found) - 1}{note}")
    if found == [0, 255]:
        return LabelGuess({0: 0, 1: 255}, None, 2, f"masks hold 0 and 255{note}")
    if found == _MIXED and _plain(found, masks):
        reason = "some masks hold 0 and 1, the others 0 and 255, none all three: 1 and 255 are taken for one class"
        return LabelGuess({0: 0, 1: [1, 255]}, None, 2, reason + note)
    largest = max(v for v in found if isinstance(v, int))  # as all are, without colours
    ends = sum(n for v, n in pixels.items() if isinstance(v, int) and (v <= 24 or v >= 231)) / pixels.total()
    if len(found) > 4 and 231 <= largest <= 255 and ends > 0.9:
        reason = (
            f"masks hold {len(found)} values, nearly all close to 0 or 255: two classes with soft edges, as in JPEG "
            "files; above 127 is class 1"
        )
        return LabelGuess(None, 127, 2, reason)
    if len(found) > _MOST_CLASSES:
        raise DataError(
            f"the masks hold {len(found)} values: {', '.join(map(str, found[:20]))}, ...; that is no obvious set of "
            "classes",
            hint="Say which value is which class with --labels, as in --labels '{0: 0, 1: [100, 150]}'.",
        )
    order = _background_first(found, 0, pixels)
    shown = ", ".join(str(v) for v in found)
    reason = f"masks hold {shown}: one class each, {order[0]} is background{note}"
    return LabelGuess(dict(enumerate(order)), None, len(order), reason)


def _colours(found: list[Value], pixels: Counter[Value], note: str) -> LabelGuess:
    if len(found) > _MOST_CLASSES:
        raise DataError(
            f"the masks hold {len(found)} colours, such as {', '.join(show_value(v) for v in found[:6])}; that is no "
            "obvious set of classes",
            hint="Colours that blend come from JPEG: save masks without loss. Else give --labels, as in "
            "--labels '{0: [[0, 0, 0]], 1: [[255, 0, 0]]}'.",
        )
    order = _background_first(found, (0, 0, 0), pixels)
    labels = {n: [list(_colour(value))] for n, value in enumerate(order)}
    shown = ", ".join(show_value(v) for v in order)
    return LabelGuess(labels, None, len(order), f"masks are coloured, background first: {shown}{note}")


def _rare(value: Value, masks: Mapping[str, Mapping[Value, int]]) -> str:
    """Where a value stands that may be a slip of the hand."""
    holders = {i: values[value] for i, values in masks.items() if value in values}
    some = ", ".join(f"{i}: {pixels} pixels" for i, pixels in list(holders.items())[:3])
    return f"; {show_value(value)} stands in {len(holders)} of {len(masks)} masks only ({some})"


def _background_first(found: list[Value], usual: Value, pixels: Counter[Value]) -> list[Value]:
    background = usual if usual in found else max(found, key=lambda v: pixels[v])
    return [background, *(v for v in found if v != background)]


def _colour(value: Value) -> tuple[int, int, int]:
    return value if isinstance(value, tuple) else (value, value, value)


def _plain(found: list[Value], masks: Mapping[str, Mapping[Value, int]]) -> bool:
    """Values whose meaning is beyond doubt: 0 and 255; 0, 1, 2, ...; or 0 and 1 here, 0 and 255 there."""
    if found == _MIXED:
        return not any({1, 255} <= set(values) for values in masks.values())
    return len(found) > 1 and (found == [0, 255] or found == list(range(len(found))))
