"""Images in, label maps out, at native resolution. The same code serves validation, evaluation and prediction."""

import contextlib
import functools
import inspect
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from knowsam.data.intensity import same_levels
from knowsam.data.levels import as_tensor, to_unit
from knowsam.data.sizing import Fit
from knowsam.data.source import Source
from knowsam.errors import DataError, NumericError
from knowsam.inference.inferers import Inferer
from knowsam.losses.entropy import entropy_map

_T = TypeVar("_T")

PredictFn = Callable[[Tensor], dict[str, Tensor]]
"""(B, C, *S) in 0..1 -> logits (B, K, *s) by output name; ``method.predict`` is one."""

NamedImages = Iterable[tuple[str, Callable[[], np.ndarray]]]
"""Case ids, and what reads each image: levels, uint8 or uint16, (H, W, C), or (D, H, W, C) for a volume."""

IN_MEMORY = 2**30
"""Bytes of an image up to which it goes to the network's device as a whole, where an inferer cuts it up."""

FLIPS = ((), (-1,), (-2,), (-2, -1))
"""Axes of the views that :func:`with_flips` averages: none, horizontal, vertical, both."""


@dataclass
class Segmentation:
    """What a network says of one case, at native size.

    Attributes:
        labels: uint8 class ids (H, W), or (D, H, W) for a volume.
        probabilities: float32 (K, H, W) or (K, D, H, W), sum 1 over classes; None unless asked for.
        uncertainty: float32, shaped as ``labels``, entropy divided by log K, 0..1; None unless asked for.
    """

    labels: NDArray[np.uint8]
    probabilities: NDArray[np.float32] | None = None
    uncertainty: NDArray[np.float32] | None = None


Then = Callable[[str, np.ndarray | None, dict[str, Segmentation]], Any]
"""Case id, the image as read (if kept), segmentations by output name -> what ``segment`` shall yield for the case."""


def predict_case(
    predict_fn: PredictFn,
    image: np.ndarray,
    *,
    image_size: int,
    batch_size: int,
    device: torch.device | str,
    num_classes: int | None = None,
    outputs: Sequence[str] | None = None,
    autocast: torch.dtype | None = None,
    fit: str = "squash",
    inferer: Inferer | None = None,
) -> dict[str, NDArray[np.uint8]]:
    """Segment one image, or one volume slice by slice.

    Args:
        predict_fn: ``method.predict`` or anything like it; a module behind it is in eval mode meanwhile.
        image: levels, uint8 or uint16, (H, W, C), or (D, H, W, C) for a volume.
        image_size: S, side of the square the network sees, in pixels.
        batch_size: slices at a time, >= 1.
        device: where the network lives.
        num_classes: K that the logits must have; any if None.
        outputs: names to keep, in this order; all that ``predict_fn`` gives if None.
        autocast: bfloat16 or float16 for the network; None computes in the network's own precision.
        fit: how images come to S x S, as in training; see ``sizing.Fit``.
        inferer: sees every case whole, in the place of squares of ``image_size``: tiles, or patches of volumes.
    Returns:
        uint8 class ids (H, W) or (D, H, W) by output name.
    Raises:
        DataError: the image is not of levels (H, W, C) or (D, H, W, C).
        ValueError: an output that ``predict_fn`` does not give, logits of a wrong shape, batch_size < 1.
        NumericError: logits that are not finite.
    """
    [(_, labels)] = segment(
        predict_fn,
        [("image", lambda: image)],
        image_size=image_size,
        batch_size=batch_size,
        device=device,
        num_classes=num_classes,
        outputs=outputs,
        autocast=autocast,
        fit=fit,
        inferer=inferer,
        read_ahead=0,
    )
    return labels


def predict_cases(
    predict_fn: PredictFn,
    source: Source,
    case_ids: Iterable[str],
    *,
    image_size: int,
    batch_size: int,
    device: torch.device | str,
    num_classes: int | None = None,
    outputs: Sequence[str] | None = None,
    autocast: torch.dtype | None = None,
    fit: str = "squash",
    inferer: Inferer | None = None,
    read_ahead: int = 4,
) -> Generator[tuple[str, dict[str, NDArray[np.uint8]]], None, None]:
    """Segment cases of a data set, in the order given; images and slices of neighbouring cases share a batch.

    Args:
        source: gives the images; masks are never asked for.
        case_ids: of ``source``.
        read_ahead: cases that a background thread reads and resizes while the network works; 0 reads in turn.
            The order of the cases and the batches do not depend on it.
        predict_fn, image_size, batch_size, device, num_classes, outputs, autocast, fit, inferer: as for
            ``predict_case``.
    Yields:
        (case id, uint8 class ids (H, W) or (D, H, W) by output name).
    Raises:
        As ``predict_case``, when the case in question is reached.
    """
    return segment(
        predict_fn,
        ((case_id, functools.partial(source.image, case_id)) for case_id in case_ids),
        image_size=image_size,
        batch_size=batch_size,
        device=device,
        num_classes=num_classes,
        outputs=outputs,
        autocast=autocast,
        fit=fit,
        inferer=inferer,
        read_ahead=read_ahead,
    )


def with_flips(predict_fn: PredictFn) -> PredictFn:
    """Average the probabilities of the image and of its three mirror images (horizontal, vertical, both).

    Args:
        predict_fn: what gives the logits of one view.
    Returns:
        A function like it, whose logits are the logarithm of the mean probabilities; four times the work.
    """

    # Its module must still be found, to be put into eval mode; but a module's attributes are not a function's.
    @functools.wraps(predict_fn, updated=())
    def averaged(images: Tensor) -> dict[str, Tensor]:
        views: dict[str, list[Tensor]] = {}
        for axes in FLIPS:
            for name, logits in predict_fn(images.flip(axes)).items():
                views.setdefault(name, []).append(logits.float().log_softmax(1).flip(axes))
        # Of logarithms, so that a probability too small for float32 does not become minus infinity.
        return {name: torch.stack(logs).logsumexp(0) - np.log(len(FLIPS)) for name, logs in views.items()}

    return averaged


def labels_only(
    case_id: str, image: np.ndarray | None, by_output: dict[str, Segmentation]
) -> dict[str, NDArray[np.uint8]]:
    """The label maps by output name: what ``segment`` yields by default."""
    return {name: segmentation.labels for name, segmentation in by_output.items()}


@dataclass
class _Case:
    """One case on its way: the network's inputs, then what comes back."""

    case_id: str
    volume: bool
    size: tuple[int, ...]  # native H, W; of a case that is seen whole, D, H, W
    slices: list[np.ndarray]  # levels (S, S, C) each, or the whole case
    image: np.ndarray | None  # as read
    segmented: list[Future[dict[str, Segmentation]]] = field(default_factory=list)  # one a slice, by output name
    result: Future[Any] | None = None  # of the whole case, once all its slices have been through the network


def segment(
    predict_fn: PredictFn,
    named_images: NamedImages,
    *,
    image_size: int,
    batch_size: int,
    device: torch.device | str,
    num_classes: int | None = None,
    outputs: Sequence[str] | None = None,
    autocast: torch.dtype | None = None,
    fit: str = "squash",
    inferer: Inferer | None = None,
    probabilities: bool = False,
    uncertainty: bool = False,
    then: Then = labels_only,
    keep_images: bool = False,
    read_ahead: int = 4,
    readers: int = 1,
    finish_behind: int = 0,
    finishers: int = 1,
    tolerate: tuple[type[Exception], ...] = (),
) -> Generator[tuple[str, Any], None, None]:
    """Read, predict and finish cases, in order. Reading and finishing may go on beside the network, in threads.

    Neither threads nor batches change a result. How much is in memory at a time is bounded: ``read_ahead`` cases
    before the network, ``finish_behind`` cases and two batches of logits after it.

    Args:
        named_images: case ids and what reads them; asked for one by one, as cases are needed.
        probabilities, uncertainty: what a ``Segmentation`` shall hold beside the labels.
        then: makes of a finished case what is yielded, for example by writing files.
        keep_images: whether ``then`` is given the images; they are forgotten once resized, if not.
        read_ahead: cases that are read and resized beside the network; 0 reads in turn.
        readers: threads that read; more than one only where images may be read from several threads at once.
        finish_behind: cases that may wait to be finished (brought to native size, given to ``then``) beside the
            network; 0 finishes in turn.
        finishers: threads that finish.
        tolerate: errors of a single case (reading it, its logits, ``then``) that are yielded in the place of its
            result rather than raised.
        predict_fn, image_size, batch_size, device, num_classes, outputs, autocast, fit, inferer: as for
            ``predict_case``.
    Yields:
        (case id, what ``then`` gave; or an error of ``tolerate``).
    Raises:
        As ``predict_case``, when the case in question is reached.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; at least 1 is needed")
    device = torch.device(device)
    waiting: deque[tuple[str, _Case | Exception]] = deque()  # in order; a case, or why there is none
    batch: list[tuple[_Case, np.ndarray]] = []
    rows: deque[Future[dict[str, Segmentation]]] = deque()  # slices whose logits are still held
    fitting = Fit(image_size, fit)
    finish_slice = functools.partial(
        _finish_slice, fitting=fitting, probabilities=probabilities, uncertainty=uncertainty
    )
    prepare = functools.partial(_prepare, fitting=fitting if inferer is None else None, keep_image=keep_images)

    def whole(case: _Case) -> None:
        """A case that the inferer takes as a whole: what it says of each part is kept, not the part's logits."""
        assert inferer is not None
        with torch.no_grad(), torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            found = _in_parts(
                predict_fn,
                inferer,
                case,
                device,
                num_classes,
                outputs=outputs,
                probabilities=probabilities,
                uncertainty=uncertainty,
            )
        case.segmented.append(_done(found))
        case.result = pool.submit(_finish_case, case, then)

    def flush() -> None:
        predicted = _forward(predict_fn, [image for _, image in batch], device, num_classes, autocast, outputs)
        for row, (case, _) in enumerate(batch):
            logits = {name: of_batch[row] for name, of_batch in predicted.items()}
            case.segmented.append(pool.submit(finish_slice, logits, case.case_id, case.size))
            rows.append(case.segmented[-1])
            if len(case.segmented) == len(case.slices):
                # Its slices are before it in the queue, so waiting for them inside the pool cannot lock it up.
                case.result = pool.submit(_finish_case, case, then)
        batch.clear()
        while len(rows) > 2 * batch_size:
            wait([rows.popleft()])

    def finished(behind: int) -> Iterator[tuple[str, Any]]:
        """Cases at the head that are done, and whoever must be waited for so that at most ``behind`` are not."""
        while waiting:
            case_id, case = waiting[0]
            if isinstance(case, _Case):
                through = sum(isinstance(c, _Case) and c.result is not None for _, c in waiting)
                if case.result is None or (not case.result.done() and through <= behind):
                    return
                outcome = _outcome(case.result, tolerate)
            else:
                outcome = case
            waiting.popleft()
            yield case_id, outcome

    with (
        _eval_mode(predict_fn),
        _executor(finishers if finish_behind else 0, "finish") as pool,
        contextlib.closing(_read(named_images, prepare, read_ahead, readers, tolerate)) as cases,
    ):
        for case_id, case in cases:
            waiting.append((case_id, case))
            if isinstance(case, _Case) and inferer is not None:
                whole(case)
            elif isinstance(case, _Case):
                for image in case.slices:
                    batch.append((case, image))
                    if len(batch) == batch_size:
                        flush()
            yield from finished(finish_behind)
        if batch:
            flush()
        yield from finished(0)


def _read(
    named_images: NamedImages,
    prepare: Callable[[str, Callable[[], np.ndarray]], _Case],
    read_ahead: int,
    readers: int,
    tolerate: tuple[type[Exception], ...],
) -> Generator[tuple[str, _Case | Exception], None, None]:
    """Cases in order, ``read_ahead`` of them prepared beside. One reader follows the order of the cases in decoding."""
    with _executor(readers if read_ahead else 0, "read") as pool:
        pending: deque[tuple[str, Future[_Case]]] = deque()
        for case_id, get in named_images:
            pending.append((case_id, pool.submit(prepare, case_id, get)))
            if len(pending) > read_ahead:
                case_id, future = pending.popleft()
                case = _outcome(future, tolerate)
                yield case_id, case
        while pending:
            case_id, future = pending.popleft()
            case = _outcome(future, tolerate)
            yield case_id, case


def _outcome(future: Future[_T], tolerate: tuple[type[Exception], ...]) -> _T | Exception:
    try:
        return future.result()
    except tolerate as error:
        return error


def _prepare(case_id: str, get: Callable[[], np.ndarray], *, fitting: Fit | None, keep_image: bool) -> _Case:
    image = np.asarray(get())
    if image.dtype not in (np.uint8, np.uint16) or image.ndim not in (3, 4) or image.size == 0:
        raise DataError(
            f"image {case_id!r} is {image.dtype} {image.shape}; allowed: levels, uint8 or uint16, (H, W, C) or "
            "(D, H, W, C)",
            hint="Read it through a source of knowsam.data, which makes levels of any type.",
        )
    kept = image if keep_image else None
    if fitting is None:
        return _Case(case_id, False, image.shape[:-1], [image], kept)
    volume = image.ndim == 4
    slices = [fitting.image(one) for one in (image if volume else image[None])]
    return _Case(case_id, volume, image.shape[-3:-1], slices, kept)


def _forward(
    predict_fn: PredictFn,
    images: list[np.ndarray],
    device: torch.device,
    num_classes: int | None,
    autocast: torch.dtype | None,
    outputs: Sequence[str] | None,
) -> dict[str, Tensor]:
    levels = as_tensor(np.stack(same_levels(images))).to(device)
    x = to_unit(levels.movedim(-1, 1).contiguous())  # (B, C, S, S)
    with torch.no_grad(), torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
        predicted = _chosen(predict_fn(x), outputs)
    for name, logits in predicted.items():
        few, many = _classes(num_classes)
        if logits.ndim != 4 or logits.shape[0] != len(images) or not few <= logits.shape[1] <= many:
            raise ValueError(
                f"output {name!r} has shape {tuple(logits.shape)}; allowed: ({len(images)}, K, h, w), "
                f"K {few if few == many else f'from {few} to {many}'} with the background"
            )
    return predicted


def _classes(num_classes: int | None) -> tuple[int, int]:
    return (2, 256) if num_classes is None else (num_classes, num_classes)


def _chosen(predicted: dict[str, Tensor], outputs: Sequence[str] | None) -> dict[str, Tensor]:
    if outputs is None:
        return predicted
    missing = [name for name in outputs if name not in predicted]
    if missing:
        raise ValueError(f"no output {', '.join(map(repr, missing))}; allowed: {', '.join(map(repr, predicted))}")
    return {name: predicted[name] for name in outputs}


def _in_parts(
    predict_fn: PredictFn,
    inferer: Inferer,
    case: _Case,
    device: torch.device,
    num_classes: int | None,
    *,
    outputs: Sequence[str] | None,
    probabilities: bool,
    uncertainty: bool,
) -> dict[str, Segmentation]:
    """What an inferer says of a whole case (*S), gathered part by part."""
    [levels] = case.slices
    image = as_tensor(np.moveaxis(levels, -1, 0).copy())
    if levels.nbytes < IN_MEMORY:
        image = image.to(device)
    found: dict[str, Segmentation] = {}
    for place, by_output in inferer.parts(predict_fn, image):
        for name, raw in _chosen(by_output, outputs).items():
            logits = raw.float()
            _refuse_not_finite(logits, name, case.case_id)
            few, many = _classes(num_classes)
            if not few <= len(logits) <= many:
                raise ValueError(
                    f"output {name!r} has shape {tuple(logits.shape)}; allowed: (K, ...), "
                    f"K {few if few == many else f'from {few} to {many}'} with the background"
                )
            if name not in found:
                found[name] = Segmentation(
                    np.zeros(case.size, np.uint8),
                    np.zeros((len(logits), *case.size), np.float32) if probabilities else None,
                    np.zeros(case.size, np.float32) if uncertainty else None,
                )
            whole = found[name]
            whole.labels[place] = logits.argmax(dim=0).to(torch.uint8).cpu().numpy()
            if whole.probabilities is not None:
                whole.probabilities[(slice(None), *place)] = logits.softmax(0).cpu().numpy()
            if whole.uncertainty is not None:
                whole.uncertainty[place] = entropy_map(logits[None])[0].clamp(0, 1).cpu().numpy()
    return found


def _refuse_not_finite(logits: Tensor, name: str, case_id: str) -> None:
    """argmax takes NaN for the largest number: a broken network would give a label map that looks like any other."""
    if not bool(torch.isfinite(logits).all()):
        raise NumericError(
            f"output {name!r} of case {case_id!r} has logits that are not finite",
            hint="Predict without autocast, or look for a training that diverged.",
        )


def _done(value: _T) -> "Future[_T]":
    future: Future[_T] = Future()
    future.set_result(value)
    return future


def _finish_slice(
    by_output: dict[str, Tensor],
    case_id: str,
    size: tuple[int, int],
    *,
    fitting: Fit,
    probabilities: bool,
    uncertainty: bool,
) -> dict[str, Segmentation]:
    """Logits (K, h, w) by output -> what they say at native size (H, W)."""
    found = {}
    for name, raw in by_output.items():
        logits = raw.float()  # autocast leaves bfloat16, whose 8 bits would tie neighbouring classes
        _refuse_not_finite(logits, name, case_id)
        logits = fitting.back(logits, *size)  # (K, H, W)
        found[name] = Segmentation(
            logits.argmax(dim=0).to(torch.uint8).cpu().numpy(),
            logits.softmax(0).cpu().numpy() if probabilities else None,
            entropy_map(logits[None])[0].clamp(0, 1).cpu().numpy() if uncertainty else None,
        )
    return found


def _finish_case(case: _Case, then: Then) -> Any:
    slices = [segmented.result() for segmented in case.segmented]
    case.segmented.clear()
    by_output = {name: _stack([s[name] for s in slices]) for name in slices[0]} if case.volume else slices[0]
    return then(case.case_id, case.image, by_output)


def _stack(slices: list[Segmentation]) -> Segmentation:
    def along(axis: int, arrays: list[np.ndarray | None]) -> np.ndarray | None:
        present = [array for array in arrays if array is not None]  # all slices have it, or none
        return np.stack(present, axis) if present else None

    return Segmentation(
        np.stack([s.labels for s in slices]),
        along(1, [s.probabilities for s in slices]),
        along(0, [s.uncertainty for s in slices]),
    )


class _InTurn(Executor):
    """An executor without threads: what is submitted is done at once."""

    def submit(self, fn: Callable[..., _T], /, *args: Any, **kwargs: Any) -> Future[_T]:
        """A future that is done."""
        future: Future[_T] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


@contextlib.contextmanager
def _executor(threads: int, name: str) -> Iterator[Executor]:
    """That many threads, or none; what they have not begun when the work is broken off is dropped."""
    pool = ThreadPoolExecutor(threads, thread_name_prefix=f"knowsam-{name}") if threads else _InTurn()
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def _eval_mode(predict_fn: PredictFn) -> Iterator[None]:
    """Put the module behind ``predict_fn`` into eval mode, and every part of it back as it was."""
    inner = inspect.unwrap(predict_fn)
    owner = inner if isinstance(inner, nn.Module) else getattr(inner, "__self__", None)
    # Part by part: `train()` on the whole would also wake a teacher that the method keeps in eval mode.
    modes = [(part, part.training) for part in owner.modules()] if isinstance(owner, nn.Module) else []
    for part, _ in modes:
        part.training = False
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
