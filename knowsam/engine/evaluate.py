"""Score whatever answers with logits, on the cases of a split. Knows nothing of training.

``evaluate`` serves the evaluate command, on either split; ``validate`` is the training loop's and has no word for the
test split, so a checkpoint cannot be chosen on it by mistake.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from knowsam.data.source import Source
from knowsam.engine.scores import MEAN, Evaluation
from knowsam.errors import DataError
from knowsam.inference.postprocess import Spec, apply, candidates
from knowsam.inference.predict import Inferer, PredictFn, predict_cases
from knowsam.metrics.segmentation import EMPTY_MODES, IGNORE_ID, METRIC_NAMES, NSD_TOLERANCE, ClassMetrics, case_metrics

Spacing = Literal["source"] | Sequence[float] | None
Labels = NDArray[np.uint8]


@dataclass
class Ignored:
    """Counts the pixels of which nothing is known."""

    cases: int = 0
    pixels: int = 0
    total: int = 0

    def add(self, mask: NDArray[np.uint8], num_classes: int) -> None:
        """Count those of one mask of ``num_classes`` classes."""
        found = int((mask == IGNORE_ID).sum()) if num_classes <= IGNORE_ID else 0
        self.cases += found > 0
        self.pixels += found
        self.total += mask.size

    def record(self) -> dict[str, float] | None:
        """``Evaluation.ignored``."""
        return {"cases": self.cases, "share": self.pixels / self.total} if self.cases else None


def evaluate(
    method_predict: PredictFn,
    source: Source,
    split: str,
    *,
    outputs: Sequence[str] | None = None,
    image_size: int,
    batch_size: int,
    device: torch.device | str,
    class_names: Sequence[str] | None = None,
    spacing: Spacing = "source",
    nsd_tolerance: float = NSD_TOLERANCE,
    distances: bool = True,
    empty: str = "exclude",
    autocast: torch.dtype | None = None,
    fit: str = "squash",
    inferer: Inferer | None = None,
    read_ahead: int = 4,
    progress: Callable[[int, int], None] | None = None,
    cases: Sequence[str] | None = None,
    postprocess: Mapping[str, Spec] | None = None,
) -> Evaluation:
    """Predict every case of a split at native resolution and score it. The training loop calls ``validate`` instead.

    Args:
        method_predict: (B, 3, S, S) in 0..1 -> logits (B, K, h, w) by output name; eval mode and no_grad are set here.
        source: the data set; images and masks of ``split`` are read, nothing else.
        split: ``"val"`` or ``"test"``.
        outputs: names to score, the deployed one first; all that ``method_predict`` gives if None.
        image_size: S, side of the square the network sees, in pixels.
        batch_size: images or slices at a time, >= 1.
        device: where the network lives.
        class_names: of the K - 1 foreground classes; ``class 1`` and so on if None.
        spacing: ``"source"`` measures in mm when the source knows the spacing of every case, in pixels when of none;
            one tuple in mm for all cases; or None for pixels.
        nsd_tolerance: >= 0, in mm or pixels as the distances are.
        distances: False leaves HD95, ASD and NSD out, which is quick.
        empty: whether cases where target and prediction both lack a class ``"include"`` or ``"exclude"`` in its means.
        autocast: bfloat16 or float16 for the network; None computes in its own precision.
        fit, inferer: how the network sees a case, as for ``predict_case``.
        read_ahead: cases that a background thread reads while the network works.
        progress: called as ``progress(done, total)`` after each case.
        cases: ids to score instead of a split's, which ``split`` then only names.
        postprocess: output -> what is done to its label maps before they are scored; others stay as they are.
    Raises:
        DataError: the split is empty, a mask does not fit its image or the classes, only some cases have a spacing.
        ValueError: another split, an output that does not exist, logits of another K, class names that do not fit.
        NumericError: logits that are not finite.
    """
    if cases is None and split not in ("val", "test"):
        raise ValueError(f"split is {split!r}; allowed: 'val', 'test'")
    if empty not in EMPTY_MODES:
        raise ValueError(f"empty is {empty!r}; allowed: {', '.join(map(repr, EMPTY_MODES))}")
    case_ids = list(source.eval_ids(split) if cases is None else cases)
    _refuse_empty(case_ids, split)
    predictions = predict_cases(
        method_predict,
        source,
        case_ids,
        image_size=image_size,
        batch_size=batch_size,
        device=device,
        num_classes=source.num_classes,
        outputs=outputs,
        autocast=autocast,
        fit=fit,
        inferer=inferer,
        read_ahead=read_ahead,
    )
    # Closed at once when something below raises: the module must be back in training mode, and the reader gone.
    with contextlib.closing(predictions):
        return score(
            predictions,
            source,
            case_ids,
            split,
            class_names=class_names,
            spacing=spacing,
            nsd_tolerance=nsd_tolerance,
            distances=distances,
            empty=empty,
            postprocess=postprocess,
            progress=progress,
        )


def score(
    predictions: Iterable[tuple[str, Mapping[str, Labels]]],
    source: Source,
    case_ids: Sequence[str],
    split: str,
    *,
    class_names: Sequence[str] | None = None,
    spacing: Spacing = "source",
    nsd_tolerance: float = NSD_TOLERANCE,
    distances: bool = True,
    empty: str = "exclude",
    postprocess: Mapping[str, Spec] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Score label maps, wherever they come from, against the masks of a data set.

    Args:
        predictions: (case id, class ids (H, W) or (D, H, W) by output name), each of ``case_ids`` once, in order.
        source: the data set; the masks of the cases are read, and no image.
        case_ids: of ``source``.
        split: ``"val"`` or ``"test"``, by which the scores are called.
        class_names, spacing, nsd_tolerance, distances, empty, postprocess, progress: as for ``evaluate``.
    Raises:
        DataError: no case, a mask does not fit its prediction or the classes, only some cases have a spacing, or every
            pixel of a mask is ignored.
        ValueError: class names that do not fit, or ``empty`` is neither.
    """
    if empty not in EMPTY_MODES:
        raise ValueError(f"empty is {empty!r}; allowed: {', '.join(map(repr, EMPTY_MODES))}")
    names = _class_names(class_names, source.num_classes)
    _refuse_empty(case_ids, split)
    spacings, unit = _spacings(source, case_ids, spacing if distances else None)
    specs = {name: spec for name, spec in (postprocess or {}).items() if spec is not None}
    rows: list[dict[str, Any]] = []
    found: tuple[str, ...] = ()
    ignored = Ignored()
    for done, (case_id, labels) in enumerate(predictions, start=1):
        found = found or tuple(labels)
        mask = source.mask(case_id)
        ignored.add(mask, source.num_classes)
        for output, prediction in labels.items():
            with _unfit(case_id, output):
                if output in specs:
                    prediction = apply(prediction, specs[output], _known_spacing(source, case_id, spacing))
                records = case_metrics(
                    prediction,
                    mask,
                    num_classes=source.num_classes,
                    spacing=spacings[case_id],
                    nsd_tolerance=nsd_tolerance,
                    distances=distances,
                )
            rows += _rows(case_id, output, names, records)
        if progress is not None:
            progress(done, len(case_ids))
    return Evaluation(rows, split, found, names, unit, float(nsd_tolerance), empty, distances, ignored=ignored.record())


@contextlib.contextmanager
def _unfit(case_id: str, output: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise DataError(f"case {case_id!r}, output {output!r} cannot be scored: {error}") from error


def _rows(case_id: str, output: str, names: Sequence[str], records: Iterable[ClassMetrics]) -> list[dict[str, Any]]:
    """Rows of ``Evaluation``, one a class."""
    return [
        {"case": case_id, "output": output, "class": names[record.class_id - 1]}
        | {metric: getattr(record, metric) for metric in METRIC_NAMES}
        | {"status": record.status}
        for record in records
    ]


def choose_postprocess(
    method_predict: PredictFn,
    source: Source,
    *,
    image_size: int,
    batch_size: int,
    device: torch.device | str,
    outputs: Sequence[str] | None = None,
    autocast: torch.dtype | None = None,
    fit: str = "squash",
    inferer: Inferer | None = None,
    read_ahead: int = 4,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, dict[str, Any]]:
    """Try ``postprocess.candidates`` on the validation split, each output on its own. There is no argument for another.

    Args:
        As for ``evaluate``.
    Returns:
        Output -> ``spec`` (the one with the highest mean Dice; the earliest of equal ones), ``dice`` (its mean Dice),
        ``tried`` (every ``spec`` with its ``dice``). ``dice`` is None where the split shows no structure at all.
    Raises:
        As ``evaluate``.
    """
    case_ids = source.eval_ids("val")
    _refuse_empty(case_ids, "val")
    tried = candidates(source.num_classes)
    rows: list[list[dict[str, Any]]] = [[] for _ in tried]
    names = _class_names(None, source.num_classes)
    found: tuple[str, ...] = ()
    predictions = predict_cases(
        method_predict,
        source,
        case_ids,
        image_size=image_size,
        batch_size=batch_size,
        device=device,
        num_classes=source.num_classes,
        outputs=outputs,
        autocast=autocast,
        fit=fit,
        inferer=inferer,
        read_ahead=read_ahead,
    )
    with contextlib.closing(predictions):
        for done, (case_id, labels) in enumerate(predictions, start=1):
            found = found or tuple(labels)
            mask, known = source.mask(case_id), source.spacing(case_id)
            for output, prediction in labels.items():
                for spec, into in zip(tried, rows, strict=True):
                    with _unfit(case_id, output):
                        treated = apply(prediction, spec, known)
                        records = case_metrics(treated, mask, num_classes=source.num_classes, distances=False)
                    into += _rows(case_id, output, names, records)
            if progress is not None:
                progress(done, len(case_ids))
    results = [Evaluation(some, "val", found, names, "px", distances=False).summary() for some in rows]
    choice = {}
    for output in found:
        dice = [result[output][MEAN]["dice"]["mean"] for result in results]
        best = max(range(len(tried)), key=lambda i: -1.0 if dice[i] is None else dice[i])
        choice[output] = {
            "spec": tried[best],
            "dice": dice[best],
            "tried": [{"spec": spec, "dice": value} for spec, value in zip(tried, dice, strict=True)],
        }
    return choice


def validate(
    method_predict: PredictFn,
    source: Source,
    *,
    outputs: Sequence[str] | None = None,
    image_size: int,
    batch_size: int,
    device: torch.device | str,
    class_names: Sequence[str] | None = None,
    autocast: torch.dtype | None = None,
    fit: str = "squash",
    inferer: Inferer | None = None,
    read_ahead: int = 4,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Dice and IoU on the validation split: what training may look at. There is no argument for another split.

    Args:
        As for ``evaluate``.
    Raises:
        DataError: as ``evaluate``, and when no validation mask holds any foreground, so that no Dice could choose.
    """
    result = evaluate(
        method_predict,
        source,
        "val",
        outputs=outputs,
        image_size=image_size,
        batch_size=batch_size,
        device=device,
        class_names=class_names,
        distances=False,
        autocast=autocast,
        fit=fit,
        inferer=inferer,
        read_ahead=read_ahead,
        progress=progress,
    )
    if not any(row["status"] in ("ok", "missed") for row in result.rows):
        raise DataError(
            f"none of the {len(result.cases)} validation masks holds any foreground",
            hint="Add validation cases that show the structure; a checkpoint cannot be chosen on empty ones.",
        )
    return result


def _refuse_empty(case_ids: Sequence[str], split: str) -> None:
    if not case_ids:
        raise DataError(f"split {split!r} holds no case", hint="Name its cases in the split list, or make a split.")


def _known_spacing(source: Source, case_id: str, spacing: Spacing) -> Sequence[float] | None:
    """mm per axis, by which sizes are measured also where distances are in pixels."""
    return source.spacing(case_id) if spacing is None or isinstance(spacing, str) else spacing


def _class_names(given: Sequence[str] | None, num_classes: int) -> tuple[str, ...]:
    if given is None:
        return tuple(f"class {i}" for i in range(1, num_classes))
    names = tuple(given)
    if len(names) != num_classes - 1 or len(set(names)) != len(names) or MEAN in names:
        raise ValueError(
            f"class_names is {list(names)}; allowed: {num_classes - 1} different names of the foreground classes, "
            f"none of them {MEAN!r}"
        )
    return names


def _spacings(
    source: Source, case_ids: Sequence[str], spacing: Spacing
) -> tuple[dict[str, tuple[float, ...] | None], str]:
    """mm per axis of every case, or None of every case; and the unit."""
    if spacing is None:
        return dict.fromkeys(case_ids), "px"
    if not isinstance(spacing, str):
        return dict.fromkeys(case_ids, tuple(float(s) for s in spacing)), "mm"
    if spacing != "source":
        raise ValueError(f"spacing is {spacing!r}; allowed: 'source', numbers in mm, or None for pixels")
    known = {case_id: source.spacing(case_id) for case_id in case_ids}
    without = [case_id for case_id, value in known.items() if value is None]
    if without and len(without) < len(case_ids):
        # A mean over millimetres and pixels is neither.
        raise DataError(
            f"{len(without)} of {len(case_ids)} cases have no spacing, {without[0]!r} for one",
            hint="Add the spacing to these cases, or measure all of them in pixels with spacing None.",
        )
    return known, "px" if without else "mm"
