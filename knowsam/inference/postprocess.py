"""What is done to a predicted label map afterwards: largest component, small objects removed, holes filled.

A *spec* says what, as it stands in ``evaluate.postprocess``: ``{name: fill_holes}``, or a list of such blocks, which
are applied in turn, or None for nothing. Components touch by faces, edges or corners (8 neighbours in 2-D, 26 in 3-D).
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from knowsam.errors import ConfigError, DataError
from knowsam.text import did_you_mean

AUTO = "auto"
"""In the place of a spec: the one of ``candidates`` that is best on the validation split."""

CHOICE_FILE = "postprocess.json"
"""In a run's folder: what ``auto`` chose for each of its outputs."""

Labels = NDArray[np.uint8]
Spacing = Sequence[float] | None
Block = Mapping[str, Any]
Spec = Block | Sequence[Block] | None

_SCOPES = ("class", "all")
_UNITS = ("px", "mm", "share")


def largest(labels: Labels, spacing: Spacing, *, scope: str = "class") -> Labels:
    """Keep the largest component; of equal ones that which comes first in the array.

    Args:
        labels: class ids (H, W) or (D, H, W).
        spacing: of no effect.
        scope: ``class``: of each class on its own; ``all``: of the foreground as a whole, whatever its classes.
    """
    if scope not in _SCOPES:
        raise ConfigError(f"postprocess largest: scope is {scope!r}; allowed: {', '.join(_SCOPES)}")
    result = labels.copy()
    for mask in _parts(labels, scope):
        parts, sizes = _components(mask)
        if len(sizes) > 1:
            result[(parts > 0) & (parts != 1 + int(np.argmax(sizes)))] = 0
    return result


def remove_small(labels: Labels, spacing: Spacing, *, size: float, unit: str = "px") -> Labels:
    """Make every component of a class background that is smaller than ``size``.

    Args:
        labels: class ids (H, W) or (D, H, W).
        spacing: mm along each axis; needed for ``mm`` alone.
        size: > 0; of ``unit``.
        unit: ``px``: pixels or voxels; ``mm``: mm^2 of an image, mm^3 of a volume; ``share``: of the largest component
            of the class in the same image or volume, 0..1.
    Raises:
        ConfigError: a size or a unit that is none.
        DataError: ``mm``, and the spacing is unknown.
    """
    if unit not in _UNITS:
        raise ConfigError(f"postprocess remove_small: unit is {unit!r}; allowed: {', '.join(_UNITS)}")
    good = isinstance(size, int | float) and not isinstance(size, bool) and 0 < size < math.inf
    if not good or (unit == "share" and size > 1):
        allowed = "above 0, at most 1" if unit == "share" else "above 0"
        raise ConfigError(f"postprocess remove_small: size is {size!r}; allowed: a number {allowed}")
    least = float(size)
    if unit == "mm":
        if spacing is None:
            raise DataError(
                "postprocess remove_small is in mm, but the spacing of this case is not known",
                hint="Say the size in pixels: {name: remove_small, size: ..., unit: px}.",
            )
        least /= math.prod(float(s) for s in spacing)
    result = labels.copy()
    for mask in _parts(labels, "class"):
        parts, sizes = _components(mask)
        if len(sizes):
            small = sizes < (least * sizes.max() if unit == "share" else least * (1 - 1e-9))
            result[np.concatenate([[False], small])[parts]] = 0
    return result


def fill_holes(labels: Labels, spacing: Spacing) -> Labels:
    """Fill background that the foreground encloses, with the class of which it touches most pixels.

    Args:
        labels: class ids (H, W) or (D, H, W); what reaches the border of the image is no hole.
        spacing: of no effect.
    """
    from scipy import ndimage

    holes = ndimage.binary_fill_holes(labels > 0) & (labels == 0)
    parts, count = ndimage.label(holes)
    result = labels.copy()
    for number, box in enumerate(ndimage.find_objects(parts, max_label=count), start=1):
        wide = tuple(slice(max(s.start - 1, 0), s.stop + 1) for s in box)
        hole = parts[wide] == number
        around = labels[wide][ndimage.binary_dilation(hole) & ~hole]
        result[wide][hole] = int(np.bincount(around[around > 0]).argmax())
    return result


STEPS: dict[str, Callable[..., Labels]] = {
    "largest": largest,
    "remove_small": remove_small,
    "fill_holes": fill_holes,
}
"""Name -> what does it: (labels, spacing, options of the block) -> labels."""


def apply(labels: Labels, spec: Spec, spacing: Spacing = None) -> Labels:
    """Apply a spec to one label map; the map that was given stays as it is.

    Args:
        labels: class ids (H, W) or (D, H, W) at native size.
        spec: what to do; None returns ``labels`` itself.
        spacing: mm along each axis of ``labels``; None when unknown.
    Returns:
        Class ids of the same shape and type.
    Raises:
        ConfigError: not a spec.
        DataError: a size in mm where the spacing is unknown.
    """
    for block in blocks(spec):
        options = {key: value for key, value in block.items() if key != "name"}
        labels = STEPS[block["name"]](labels, spacing, **options)
    return labels


def blocks(spec: Any) -> list[Block]:
    """The blocks of a spec, checked.

    Raises:
        ConfigError: an unknown name or option, with what is allowed.
    """
    if spec is None:
        return []
    given = [spec] if isinstance(spec, Mapping) else spec
    if isinstance(given, str) or not isinstance(given, Sequence) or not all(isinstance(b, Mapping) for b in given):
        raise ConfigError(
            f"evaluate.postprocess is {spec!r}; allowed: null, {AUTO}, {{name: ...}}, or a list of such blocks",
            hint=f"Names: {', '.join(STEPS)}.",
        )
    for block in given:
        name = block.get("name")
        if name not in STEPS:
            meant = did_you_mean(str(name), list(STEPS))
            raise ConfigError(f"evaluate.postprocess: no step {name!r}; there are {', '.join(STEPS)}{meant}")
        parameters = inspect.signature(STEPS[name]).parameters.values()
        options = {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY}
        wrong = [key for key in block if key != "name" and key not in options]
        missing = [key for key, p in options.items() if p.default is p.empty and key not in block]
        if wrong or missing:
            what = f"has no option {wrong[0]!r}" if wrong else f"needs {missing[0]!r}"
            raise ConfigError(f"evaluate.postprocess: {name} {what}; options: {', '.join(options) or 'none'}")
        STEPS[name](np.zeros((1, 1), np.uint8), (1.0, 1.0), **{k: v for k, v in block.items() if k != "name"})
    return list(given)


def check(spec: Any) -> None:
    """Refuse what may not stand in ``evaluate.postprocess``.

    Raises:
        ConfigError: see ``blocks``; ``auto`` is allowed.
    """
    if spec != AUTO:
        blocks(spec)


def describe(spec: Spec) -> str:
    """A spec in words: ``largest component of each class, then holes filled``; ``none`` for None."""
    words = []
    for block in blocks(spec):
        if block["name"] == "largest":
            whole = block.get("scope", "class") == "all"
            words.append("largest component of " + ("the whole foreground" if whole else "each class"))
        elif block["name"] == "remove_small":
            unit, size = block.get("unit", "px"), block["size"]
            share = f"{100 * size:g} % of the largest of their class" if unit == "share" else f"{size:g} {unit}"
            words.append(f"components below {share} removed" + ("" if unit != "mm" else " (mm^2 or mm^3)"))
        else:
            words.append("holes filled")
    return ", then ".join(words) or "none"


def candidates(num_classes: int) -> list[Spec]:
    """What ``auto`` tries, the simplest first; of equally good ones the first is taken.

    Nothing; holes filled; components below 5 % and below 20 % of the largest of their class removed; the largest
    component of each class; with several classes also the largest of the whole foreground; and each of these with holes
    filled afterwards. No size in pixels or mm is among them, so the set suits any data.

    Args:
        num_classes: K, background included.
    """
    alone: list[Block] = [{"name": "remove_small", "size": size, "unit": "share"} for size in (0.05, 0.2)]
    alone += [{"name": "largest", "scope": scope} for scope in (_SCOPES if num_classes > 2 else _SCOPES[:1])]
    holes: Block = {"name": "fill_holes"}
    return [None, holes, *alone, *([block, holes] for block in alone)]


def resolve(asked: Any, record: Mapping[str, Any], output: str, checkpoint: Mapping[str, Any] | None) -> Spec:
    """The spec that an output of a run is to be treated with, in evaluation, prediction and export alike.

    Args:
        asked: ``evaluate.postprocess``: a spec, or ``auto``.
        record, output, checkpoint: as of ``stored_choice``.
    Raises:
        ConfigError: not a spec; ``auto``, and nothing was chosen for this output and these weights yet.
    """
    if asked == AUTO:
        return stored_choice(record, output, checkpoint)
    blocks(asked)
    spec: Spec = asked
    return spec


def stored_choice(record: Mapping[str, Any], output: str, checkpoint: Mapping[str, Any] | None) -> Spec:
    """What ``auto`` chose for an output of a run.

    Args:
        record: content of the run's ``CHOICE_FILE``; empty when there is none.
        output: whose predictions are to be processed.
        checkpoint: ``LoadedRun.origin()`` of the weights that are used.
    Raises:
        ConfigError: nothing was chosen for this output and these weights yet.
    """
    if not has_choice(record, output, checkpoint):
        raise ConfigError(
            f"evaluate.postprocess is {AUTO}, and for output {output!r} of these weights nothing was chosen yet",
            hint="Choose it on the validation split: knowsam evaluate RUN. Or name one in evaluate.postprocess.",
        )
    spec: Spec = record["outputs"][output]["spec"]
    blocks(spec)
    return spec


def has_choice(record: Mapping[str, Any], output: str, checkpoint: Mapping[str, Any] | None) -> bool:
    """Whether ``stored_choice`` has an answer; arguments as there."""
    return record.get("checkpoint") == weights_of(checkpoint) and output in (record.get("outputs") or {})


def weights_of(checkpoint: Mapping[str, Any] | None) -> dict[str, Any]:
    """What tells the weights of a run from its others: file and step."""
    return {key: (checkpoint or {}).get(key) for key in ("file", "step")}


def _parts(labels: Labels, scope: str) -> list[NDArray[np.bool_]]:
    """The masks whose components are looked at: each class that is there, or the foreground."""
    if scope == "all":
        return [labels > 0]
    return [labels == class_id for class_id in np.unique(labels) if class_id]


def _components(mask: NDArray[np.bool_]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Number of the component of each pixel (0: none), and the pixels of components 1, 2, ..."""
    from scipy import ndimage

    parts, count = ndimage.label(mask, structure=np.ones((3,) * mask.ndim, bool))
    return parts, np.bincount(parts.ravel(), minlength=count + 1)[1:]
