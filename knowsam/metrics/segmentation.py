"""How good one label map is: overlap, error rates and surface distances per class, never NaN.

**The rule for empty masks** (the only place where it is declared; ``METRIC_RULES`` names it):

==============  ======  ==========  =================  =========================  ==============================
status          target  prediction  Dice, IoU, NSD,    HD95, ASD                  part of a mean over cases
                                    precision, recall
==============  ======  ==========  =================  =========================  ==============================
ok              some    some        as measured        as measured                yes
missed          some    none        0                  the diagonal of the image  yes
false_positive  none    some        0                  the diagonal of the image  yes
empty_both      none    none        1                  0                          no, only counted (the default)
==============  ======  ==========  =================  =========================  ==============================

The diagonal, ``sqrt(sum((size_i * spacing_i)^2))``, exceeds every distance that two masks in the image can have, so a
model that predicts nothing never looks better than one that predicts badly. Absent and not predicted is right but
free: counting it as a perfect score would lift the mean of a rare class with every image that lacks it.
``empty="include"`` counts it nevertheless, for comparison with tables that do.

The precision of a missed structure and the recall of a false one are 0 / 0; they are 0 here, so that every metric has a
number for the same cases, and none rises by an error. Recall is the sensitivity of pixels. Specificity, the share of
the pixels of other classes that were not called this one, is always as measured, and 1 where there are no such pixels.

**Ignored pixels**, whose target is ``IGNORE_ID``, are left out of every metric and of the status: a case is as if it
had the other pixels alone. Distances: an ignored pixel belongs to neither edge, and its side of a mask is none either,
because nobody knows whether the structure ends there; a pixel is on an edge when a *known* face neighbour (or the
outside of the image) is not in the mask. Where this leaves one of two masks without any edge (a structure that only
touches ignored pixels), the border to the ignored pixels counts as edge in both.

**Edges.** A pixel of a mask belongs to its edge when one of its face neighbours (4 in 2-D, 6 in 3-D) is not in the
mask; what lies outside the image is not in the mask. Distances are Euclidean, from pixel centre to pixel centre, each
edge pixel of one mask to the nearest edge pixel of the other, both ways:

* HD95: the larger of the two directed 95th percentiles (linear interpolation), not the percentile of the pooled list;
* ASD: the mean of the pooled list (average *symmetric* surface distance);
* NSD: the fraction of the pooled list that is at most the tolerance.

Edges and distances come from MONAI; the reductions stand here because MONAI's give NaN for an empty mask, and its
``aggregate()`` drops NaN silently, which makes a failing model look better (MONAI#9095).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

METRIC_RULES = "knowsam-1"
"""Name of the rules above, stored with results; change it whenever a number could change.

Metrics that were added since, and ignored pixels, which masks could not have before, changed no number of older
results.
"""

IGNORE_ID = 255
"""Value of target pixels of which nothing is known."""

NSD_TOLERANCE = 2.0
"""Default tolerance of NSD, in mm where the spacing is known, else in pixels."""

PIXEL_METRICS = ("precision", "recall", "specificity")
OVERLAP_METRICS = ("dice", "iou", *PIXEL_METRICS)
DISTANCE_METRICS = ("hd95", "asd", "nsd")
MAIN_METRICS = ("dice", "iou", *DISTANCE_METRICS)
"""What the first table shows; the others have one of their own."""
METRIC_NAMES = (*MAIN_METRICS, *PIXEL_METRICS)

Status = Literal["ok", "empty_both", "missed", "false_positive"]
STATUSES: tuple[Status, ...] = ("ok", "empty_both", "missed", "false_positive")

EMPTY_MODES = ("exclude", "include")


@dataclass(frozen=True)
class ClassMetrics:
    """One class of one case.

    Attributes:
        class_id: 1 .. K - 1.
        status: which row of the table of empty masks applies.
        dice, iou, precision, recall, specificity: 0 .. 1.
        hd95, asd: mm or pixels; None when distances were not asked for.
        nsd: 0 .. 1; None when distances were not asked for.
    """

    class_id: int
    status: Status
    dice: float
    iou: float
    precision: float
    recall: float
    specificity: float
    hd95: float | None = None
    asd: float | None = None
    nsd: float | None = None


def counts_in_mean(status: Status, empty: str = "exclude") -> bool:
    """Whether a case of this status is part of the mean over cases; all are, save ``empty_both`` by default.

    Args:
        status: of one case and class.
        empty: ``"exclude"`` or ``"include"`` the cases where target and prediction both lack the class.
    Raises:
        ValueError: ``empty`` is neither.
    """
    if empty not in EMPTY_MODES:
        raise ValueError(f"empty is {empty!r}; allowed: {', '.join(map(repr, EMPTY_MODES))}")
    return empty == "include" or status != "empty_both"


def case_metrics(
    prediction: np.ndarray,
    target: np.ndarray,
    *,
    num_classes: int,
    spacing: Sequence[float] | None = None,
    nsd_tolerance: float = NSD_TOLERANCE,
    distances: bool = True,
    ignore_id: int | None = IGNORE_ID,
) -> list[ClassMetrics]:
    """Score one label map against the truth, each foreground class on its own. No value is ever NaN.

    Args:
        prediction: integer class ids (H, W) or (D, H, W).
        target: the same shape; pixels of ``ignore_id`` are left out.
        num_classes: K >= 2, background (0) included.
        spacing: size of a pixel along each axis in mm; None measures in pixels.
        nsd_tolerance: >= 0, in mm or pixels as the distances are.
        distances: False leaves HD95, ASD and NSD out (None) and does not import MONAI.
        ignore_id: of target pixels of which nothing is known; None: there are none. A class id of K classes is a class.
    Returns:
        K - 1 records, class 1 first.
    Raises:
        ValueError: shapes differ, not integers, class ids outside 0 .. K - 1, every pixel ignored, bad spacing,
            tolerance or K.
    Source:
        arXiv:2206.01653 (Metrics Reloaded: HD95, ASSD, NSD), arXiv:1809.04430 (NSD).
    """
    prediction, target = np.asarray(prediction), np.asarray(target)
    if num_classes < 2:
        raise ValueError(f"num_classes is {num_classes}; at least 2 are needed, background included")
    if prediction.shape != target.shape:
        raise ValueError(f"prediction is {prediction.shape} but target is {target.shape}; score at native resolution")
    if target.ndim not in (2, 3) or target.size == 0:
        raise ValueError(f"masks are {target.shape}; allowed: (H, W) or (D, H, W), not empty")
    if spacing is not None:
        spacing = tuple(float(s) for s in spacing)
        if len(spacing) != target.ndim or not all(math.isfinite(s) and s > 0 for s in spacing):
            raise ValueError(
                f"spacing is {spacing}; {target.ndim} positive numbers are needed for masks {target.shape}"
            )
    if not (math.isfinite(nsd_tolerance) and nsd_tolerance >= 0):
        raise ValueError(f"nsd_tolerance is {nsd_tolerance}; it must be finite and at least 0")
    ignored = _ignored(target, num_classes, ignore_id)
    for name, labels in (("prediction", prediction), ("target", target)):
        if labels.dtype != bool and not np.issubdtype(labels.dtype, np.integer):
            raise ValueError(f"{name} is {labels.dtype}; class ids must be integers")
        known = labels if ignored is None or labels is prediction else labels[~ignored]
        if known.size == 0:
            raise ValueError(f"every pixel of the target is {ignore_id} (ignored), so there is nothing to score")
        low, high = int(known.min()), int(known.max())
        if low < 0 or high >= num_classes:
            also = "" if ignored is None else f", and {ignore_id} in the target"
            raise ValueError(f"{name} holds class ids {low} to {high}; allowed: 0 to {num_classes - 1}{also}")

    # One pass gives every class: joint[t, p] counts the pixels of class t that were called p. Slice by slice, as
    # bincount widens to 8 bytes a pixel.
    joint = np.zeros((num_classes, num_classes), dtype=np.int64)
    for z in range(len(target)) if target.ndim == 3 else [...]:
        t, p = target[z], prediction[z]
        if ignored is not None:
            t, p = t[~ignored[z]], p[~ignored[z]]
        pairs = t.astype(np.intp) * num_classes + p.astype(np.intp)
        joint += np.bincount(pairs.ravel(), minlength=num_classes**2).reshape(num_classes, num_classes)
    pixels = int(joint.sum())
    diagonal = math.hypot(*(n * s for n, s in zip(target.shape, spacing or (1.0,) * target.ndim, strict=True)))

    records = []
    for class_id in range(1, num_classes):
        both = int(joint[class_id, class_id])
        in_target, in_prediction = int(joint[class_id].sum()), int(joint[:, class_id].sum())
        status = _status(in_target, in_prediction)
        if status == "ok":
            dice = 2 * both / (in_target + in_prediction)
            iou = both / (in_target + in_prediction - both)
            precision, recall = both / in_prediction, both / in_target
            surface = (
                _surface_metrics(prediction == class_id, target == class_id, ignored, spacing, nsd_tolerance)
                if distances
                else (None, None, None)
            )
        else:
            dice = iou = precision = recall = 1.0 if status == "empty_both" else 0.0
            far = 0.0 if status == "empty_both" else diagonal
            surface = (far, far, dice) if distances else (None, None, None)
        others = pixels - in_target
        specificity = (others - (in_prediction - both)) / others if others else 1.0
        records.append(ClassMetrics(class_id, status, dice, iou, precision, recall, specificity, *surface))
    return records


def _ignored(target: np.ndarray, num_classes: int, ignore_id: int | None) -> np.ndarray | None:
    """Where nothing is known, bool of the target's shape; None where everything is."""
    if ignore_id is None or ignore_id < num_classes:
        return None
    found: np.ndarray = target == ignore_id
    return found if found.any() else None


def _status(in_target: int, in_prediction: int) -> Status:
    if in_target and in_prediction:
        return "ok"
    if in_target:
        return "missed"
    return "false_positive" if in_prediction else "empty_both"


def _surface_metrics(
    prediction: np.ndarray,
    target: np.ndarray,
    ignored: np.ndarray | None,
    spacing: tuple[float, ...] | None,
    nsd_tolerance: float,
) -> tuple[float, float, float]:
    """HD95, ASD and NSD of two bool masks, neither of them empty where pixels are known."""
    # MONAI takes seconds to import; whoever asks for Dice alone should not wait for it.
    from monai.metrics.utils import get_mask_edges, get_surface_distance

    if ignored is not None:
        prediction, target = prediction & ~ignored, target & ~ignored
    # Nothing outside the box is foreground and the outside of an image counts as background, so edges stay the same.
    box = _bounding_box(prediction | target, margin=1)
    prediction, target = prediction[box], target[box]
    # `spacing` stays away from the edges: given there it would switch to MONAI's other, subvoxel definition.
    edge_prediction, edge_target = get_mask_edges(prediction, target, crop=False)
    if ignored is not None:
        # Ignored pixels taken as part of the mask: what is then an edge has a known neighbour that is not.
        unknown = ignored[box]
        known_edges = get_mask_edges(prediction | unknown, target | unknown, crop=False)
        inner_prediction, inner_target = (edge & ~unknown for edge in known_edges)
        if inner_prediction.any() and inner_target.any():
            edge_prediction, edge_target = inner_prediction, inner_target
    forth = np.asarray(get_surface_distance(edge_prediction, edge_target, spacing=spacing), np.float64)
    back = np.asarray(get_surface_distance(edge_target, edge_prediction, spacing=spacing), np.float64)
    pooled = np.concatenate([forth, back])
    hd95 = max(np.percentile(forth, 95), np.percentile(back, 95))
    # MONAI gives float32, where 3 * 0.1 mm is a little more than a tolerance of 0.3 mm.
    nsd = np.mean(pooled <= nsd_tolerance * (1 + 1e-6))
    return float(hd95), float(pooled.mean()), float(nsd)


def _bounding_box(mask: np.ndarray, margin: int) -> tuple[slice, ...]:
    """The smallest box around a non-empty mask, ``margin`` pixels wider where the image allows."""
    box = []
    for axis, size in enumerate(mask.shape):
        hits = np.flatnonzero(mask.any(axis=tuple(a for a in range(mask.ndim) if a != axis)))
        box.append(slice(max(int(hits[0]) - margin, 0), min(int(hits[-1]) + 1 + margin, size)))
    return tuple(box)
