"""What the masks of a folder mean: the classes, their names, and how often they occur."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from knowsam.data.label_guess import guess_labels
from knowsam.data.labels import LabelTable
from knowsam.data.survey import Survey, class_pixels
from knowsam.errors import ConfigError, DataError


@dataclass(frozen=True)
class Classes:
    """The classes of a study.

    Attributes:
        names: K names, background first.
        labels: class id -> raw mask value or values, as ``data.labels``; None: masks hold class ids.
        threshold: raw values above it are class 1, as ``data.label_threshold``; None: no threshold.
        ignore: raw value or values of pixels about which nothing is known, as ``data.ignore``; None: there are none.
        table: the same, ready to be applied.
        reason: how this was found out, one sentence for people.
    """

    names: list[str]
    labels: Mapping[Any, Any] | None
    threshold: float | None
    table: LabelTable
    reason: str
    ignore: Any = None


def understand_masks(
    found: Survey,
    names: Sequence[str] | None,
    labels: Mapping[Any, Any] | Literal["binary"] | None,
    ignore: Any = None,
) -> Classes:
    """The classes, as they were given or as the values in the masks suggest them.

    Args:
        found: the folder's images and masks.
        names: K names, background first; None: made up.
        labels: class id -> raw value or values; ``"binary"``: any value above 0 is class 1; None: guessed.
        ignore: raw value or values of pixels about which nothing is known; None: guessed, where ``labels`` are.
    Raises:
        ConfigError: another number of names than of classes, or labels that are no table.
        DataError: no masks, or values without an obvious meaning.
    """
    guessed: Mapping[Any, Any] | None
    threshold: float | None
    if labels == "binary":
        guessed, threshold, count = None, 0, 2
        reason = "every mask value above 0 is one class, as --labels binary says"
    elif labels is not None:
        guessed, threshold = labels, None
        count, reason = len(labels), "classes as given by --labels"
    else:
        unknown = _values(ignore)
        masks = {case.id: case.values for case in found.cases if case.values is not None}
        masks = {i: {v: n for v, n in values.items() if v not in unknown} for i, values in masks.items()}
        masks = {i: values for i, values in masks.items() if values}
        try:
            objects = {case.id: case.objects for case in found.cases if case.objects is not None}
            guess = guess_labels(masks, len(names) if names else None, objects)
        except DataError as error:
            reasons = [f"\n  {fault.text}" for fault in found.faults]
            more = [f"\n  ... and {len(reasons) - 10} more"] if len(reasons) > 10 else []
            raise DataError("".join([str(error), *reasons[:10], *more]), hint=error.hint) from error
        guessed, threshold, count, reason = guess.labels, guess.threshold, guess.num_classes, guess.reason
        ignore = guess.ignore if ignore is None else ignore
    if names and len(names) != count:
        # More names than values are fine where masks hold class ids: the highest of them then do not occur.
        if len(names) < count or guessed is not None or threshold is not None:
            raise ConfigError(
                f"--classes names {len(names)} classes, but there are {count}: {reason}",
                hint="Name as many, or say with --labels which values belong to which class.",
            )
        count = len(names)
    if not names:
        names = ["background", "foreground"] if count == 2 else ["background", *(f"class_{k}" for k in range(1, count))]
        reason += f"; called {', '.join(names)} for want of --classes"
    table = LabelTable(guessed, count, threshold=threshold, ignore=ignore)
    return Classes(list(names), guessed, threshold, table, reason, ignore)


def _values(ignore: Any) -> set[Any]:
    """Raw values, colours as tuples."""
    several = ignore if isinstance(ignore, list) else [] if ignore is None else [ignore]
    return {tuple(value) if isinstance(value, list) else value for value in several}


def absent_classes(found: Survey, ids: Iterable[str], table: LabelTable) -> list[int]:
    """Classes of which no mask of these cases holds a pixel.

    Args:
        found: the folder's images and masks.
        ids: of the cases.
        table: which raw value is which class.
    Returns:
        Class ids, ascending.
    """
    pixels = _pixels(found, ids, table).sum(axis=0)
    return [k for k in range(table.num_classes) if not pixels[k]]


def class_shares(found: Survey, ids: Iterable[str], table: LabelTable) -> list[float]:
    """Each class's share of all pixels of the masks of these cases, 0..1.

    Args:
        found: the folder's images and masks.
        ids: of the cases.
        table: which raw value is which class.
    Returns:
        K shares.
    """
    pixels = _pixels(found, ids, table).sum(axis=0)
    shares: list[float] = (pixels / max(pixels.sum(), 1)).tolist()
    return shares


def _pixels(found: Survey, ids: Iterable[str], table: LabelTable) -> np.ndarray:
    """int64 (N, K): pixels of each class in every mask of these cases."""
    wanted = set(ids)
    counts = [class_pixels(c.values, table)[0] for c in found.cases if c.id in wanted and c.values is not None]
    return np.array(counts, np.int64).reshape(-1, table.num_classes)
