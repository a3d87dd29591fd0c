"""Which classes a user's masks hold, from the values in them alone. Whatever is assumed is said."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from knowsam.data.survey import Value, show_value
from knowsam.errors import DataError

_MOST_CLASSES = 20
_MIXED = [0, 1, 255]
_RARE = 0.05  # of the masks; a value that is rarer may be a slip of the hand
_UNKNOWN = (*range(250, 256), 65535)  # what is written where nothing is known: at the end of 8 or 16 bits
_VOID = (224, 224, 192)  # the colour of the same in PASCAL VOC and its many followers
_NUMBERED = 8  # ids from which on numbered objects are recognised by their values alone


@dataclass(frozen=True)
class LabelGuess:
    """What the masks seem to mean.

    Attributes:
        labels: class id -> raw value(s), as ``data.labels``; None: the values are class ids.
        threshold: as ``data.label_threshold``; None if there is a table or the values are ids.
        num_classes: K, background included.
        reason: one sentence for the user.
        ignore: raw value or values of pixels where nothing is known, as ``data.ignore``; None if there seem to be none.
    """

    labels: dict[int, Any] | None
    threshold: float | None
    num_classes: int
    reason: str
    ignore: Any = None


def guess_labels(
    masks: Mapping[str, Mapping[Value, int]],
    num_classes: int | None = None,
    objects: Mapping[str, Mapping[int, int]] | None = None,
) -> LabelGuess:
    """Work out the label table.

    Args:
        masks: id -> raw value -> pixels.
        num_classes: K, if it is known: rare values that would make more of them are then taken for mistakes, and what
            may be read in two ways (a value that is a class or ignored, ids of classes or of objects) is decided by it.
        objects: id -> raw value -> connected parts, as :func:`connected_parts` counts them. With them a few numbered
            objects are told from classes; without, only many.
    Raises:
        DataError: no mask, no foreground, or values that have no obvious meaning: the hint names the choices.
    """
    if not masks:
        raise DataError("there is no mask that can be used", hint="Training needs some; --masks says where.")
    coloured = any(isinstance(value, tuple) for values in masks.values() for value in values)
    if coloured:  # a mask whose channels agree was read as numbers: grey v stands for (v, v, v)
        masks = {i: {_colour(v): n for v, n in values.items()} for i, values in masks.items()}
    if unknown := _unknown(masks, num_classes, coloured):
        rest = {i: {v: n for v, n in values.items() if v not in unknown} for i, values in masks.items()}
        guess = _guess({i: values for i, values in rest.items() if values}, num_classes, objects, coloured)
        shown = " and ".join(show_value(v) for v in unknown)
        many = sum(any(v in values for v in unknown) for values in masks.values())
        reason = (
            f"{guess.reason}; {shown} (in {many} of {len(masks)} masks) {'is' if len(unknown) == 1 else 'are'} taken "
            "for pixels where nothing is known and ignored; --classes with one more name makes it a class"
        )
        raw = [list(v) if isinstance(v, tuple) else v for v in unknown]
        return replace(guess, reason=reason, ignore=raw[0] if len(raw) == 1 and not coloured else raw)
    return _guess(masks, num_classes, objects, coloured)


def connected_parts(raw: NDArray[np.integer[Any]]) -> dict[int, int]:
    """How many connected parts each value above 0 has; corners connect.

    Args:
        raw: mask (*S) of whole numbers.
    """
    ids, compact = np.unique(raw, return_inverse=True)
    compact = compact.reshape(raw.shape)
    everywhere = ndimage.generate_binary_structure(raw.ndim, raw.ndim)
    found = {}
    # find_objects leaves the first value out, which is 0 unless the mask has no background.
    places = ndimage.find_objects(compact + 1)
    for number, (value, place) in enumerate(zip(ids.tolist(), places, strict=True)):
        if value:
            found[value] = int(ndimage.label(compact[place] == number, everywhere)[1])
    return found


def _guess(
    masks: Mapping[str, Mapping[Value, int]],
    num_classes: int | None,
    objects: Mapping[str, Mapping[int, int]] | None,
    coloured: bool,
) -> LabelGuess:
    """As :func:`guess_labels`, when what is ignored has been taken out and colours have been made of greys."""
    pixels: Counter[Value] = Counter()
    seen: Counter[Value] = Counter()
    for values in masks.values():
        pixels.update(values)
        seen.update(values.keys())
    found = sorted(pixels)
    few = max(1, int(_RARE * len(masks)))
    common = [v for v in found if seen[v] > few]
    if not coloured and len(found) != num_classes and _numbered(masks, objects):
        return _objects(masks, num_classes)
    odd = sum(any(v not in common for v in values) for values in masks.values())
    note = ""
    if not coloured and not _plain(found, masks) and odd <= few and len(common) > 1:
        if len(common) == num_classes or (_plain(common, masks) and len(found) != num_classes):
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
    if _soft_edges(found, pixels):
        reason = (
            f"masks hold {len(found)} values, nearly all close to 0 or 255: two classes with soft edges, as in JPEG "
            "files; above 127 is class 1"
        )
        return LabelGuess(None, 127, 2, reason)
    if len(found) > _MOST_CLASSES:
        if all(seen[v] == 1 for v in found if v != 0) and len(masks) > 1:
            return _objects(masks, num_classes)  # numbered through all masks: no id comes twice
        raise DataError(
            f"the masks hold {len(found)} values: {', '.join(map(str, found[:20]))}, ...; that is no obvious set of "
            "classes",
            hint="Say which value is which class with --labels, as in --labels '{0: 0, 1: [100, 150]}'.",
        )
    order = _background_first(found, 0, pixels)
    shown = ", ".join(str(v) for v in found)
    reason = f"masks hold {shown}: one class each, {order[0]} is background{note}"
    return LabelGuess(dict(enumerate(order)), None, len(order), reason)


def _unknown(masks: Mapping[str, Mapping[Value, int]], num_classes: int | None, coloured: bool) -> list[Value]:
    """Values that seem to mean that nothing is known: 255, or one like it, beside the ids 0, 1, ... in one mask.

    Raises:
        DataError: it may as well be a class; the hint names the choices.
    """
    seen = Counter(value for values in masks.values() for value in values)
    if coloured:
        return [_VOID] if _VOID in seen and len(seen) > 2 and len(seen) != num_classes else []
    few = max(1, int(_RARE * len(masks)))
    last = [v for v in sorted(seen) if v in _UNKNOWN]
    ids = [v for v in sorted(seen) if v not in last and seen[v] > few]
    many = len(ids)
    if not last or many < 2 or ids != list(range(many)) or last not in ([last[-1]], [254, 255]):
        return []
    holders = [values for values in masks.values() if any(v in values for v in last)]
    together = [values for values in holders if any(v in values for v in ids[1:])]
    if not together and many == 2:
        return []  # 0 and 1 here, 0 and 255 there: two ways to write the same
    if num_classes == many:
        return last
    if num_classes == many + len(last) or many > _MOST_CLASSES:
        return []
    pixels: Counter[Value] = Counter()
    for values in masks.values():
        pixels.update(values)
    unknown, foreground = sum(pixels[v] for v in last), sum(pixels[v] for v in ids[1:])
    if len(last) == 2:
        return last if unknown < foreground and not _soft_edges(sorted(pixels), pixels) else []
    if 2 * len(together) >= len(holders) and unknown <= 20 * foreground:
        return last
    value, highest = show_value(last[0]), ids[-1]
    raise DataError(
        f"{value} stands beside the ids 0 to {highest} in {len(together)} masks and without them in "
        f"{len(holders) - len(together)}, {unknown} pixels against {foreground}: it may be a class, or pixels where "
        "nothing is known",
        hint=f"Say which: --classes with {many} names ignores {value}, with {many + 1} names it is the last class; "
        "--labels says it value by value.",
    )


def _numbered(masks: Mapping[str, Mapping[Value, int]], objects: Mapping[str, Mapping[int, int]] | None) -> bool:
    """Whether ids seem to number a mask's objects: 1 to as many as it holds, other ones in every mask.

    Classes look otherwise: their ids recur, and a mask that lacks one has a gap. Few ids have few gaps, so that up to
    7 of them must be one connected part each, too.
    """
    ids = {i: sorted(v for v in values if isinstance(v, int) and v) for i, values in masks.items()}
    ids = {i: values for i, values in ids.items() if values}
    highest = {i: values[-1] for i, values in ids.items()}
    gapless = sum(len(values) >= 0.9 * highest[i] for i, values in ids.items())
    if len(set(highest.values())) < 3 or gapless < 0.95 * len(ids):
        return False
    if max(highest.values()) >= _NUMBERED:
        return True
    if objects is None:
        return False
    parts = [objects[i].get(v, 0) for i, values in ids.items() if i in objects for v in values]
    return bool(parts) and sum(count == 1 for count in parts) >= 0.98 * len(parts)


def _objects(masks: Mapping[str, Mapping[Value, int]], num_classes: int | None) -> LabelGuess:
    """Numbered objects: one class of them all where two classes are known to be meant; else it is asked."""
    counts = [sum(1 for v in values if v != 0) for values in masks.values()]
    highest = max(v for values in masks.values() for v in values if isinstance(v, int))
    several = len({v for values in masks.values() for v in values})
    found = (
        f"masks number their objects: ids up to {highest}, {min(counts)} to {max(counts)} of them a mask, not the same "
        "in all"
    )
    if num_classes == 2:
        reason = f"{found}; two classes are named, so every object is class 1 (above 0)"
        return LabelGuess(None, 0, 2, reason)
    raise DataError(
        f"the {found}: these seem to be instances, not {several} classes",
        hint="Say what is to be learned: --classes background,object makes every object one class "
        f"(label_threshold: 0); --classes with {several} names, or --labels, if each id is a class.",
    )


def _soft_edges(found: list[Value], pixels: Counter[Value]) -> bool:
    """Whether two classes were saved with loss: many values, nearly all pixels close to 0 or 255."""
    largest = max(v for v in found if isinstance(v, int))  # as all are, without colours
    ends = sum(n for v, n in pixels.items() if isinstance(v, int) and (v <= 24 or v >= 231)) / pixels.total()
    return len(found) > 4 and 231 <= largest <= 255 and ends > 0.9


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
