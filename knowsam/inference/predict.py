"""Images in, label maps out, at native resolution. The same code serves validation, evaluation and prediction."""

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from knowsam.data.source import Source
from knowsam.errors import DataError, NumericError

PredictFn = Callable[[Tensor], dict[str, Tensor]]
"""(B, 3, S, S) in 0..1 -> logits (B, K, h, w) by output name; ``method.predict`` is one."""

Resize = Callable[[np.ndarray, int], np.ndarray]
"""uint8 (H, W, 3), S -> uint8 (S, S, 3)."""


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
    resize: Resize | None = None,
) -> dict[str, np.ndarray]:
    """Segment one image, or one volume slice by slice.

    Args:
        predict_fn: ``method.predict`` or anything like it; a module behind it is in eval mode meanwhile.
        image: uint8 (H, W, 3), or (D, H, W, 3) for a volume.
        image_size: S, side of the square the network sees, in pixels.
        batch_size: slices at a time, >= 1.
        device: where the network lives.
        num_classes: K that the logits must have; any if None.
        outputs: names to keep, in this order; all that ``predict_fn`` gives if None.
        autocast: bfloat16 or float16 for the network; None computes in the network's own precision.
        resize: how images come to S x S; the training reader's ``resize_image`` if None.
    Returns:
        uint8 class ids (H, W) or (D, H, W) by output name.
    Raises:
        DataError: the image is not uint8 (H, W, 3) or (D, H, W, 3).
        ValueError: an output that ``predict_fn`` does not give, logits of a wrong shape, batch_size < 1.
        NumericError: logits that are not finite.
    """
    [(_, labels)] = _predict(
        predict_fn,
        [("image", lambda: image)],
        image_size=image_size,
        batch_size=batch_size,
        device=device,
        num_classes=num_classes,
        outputs=outputs,
        autocast=autocast,
        resize=resize,
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
    resize: Resize | None = None,
    read_ahead: int = 4,
) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """Segment cases of a data set, in the order given; images and slices of neighbouring cases share a batch.

    Args:
        source: gives the images; masks are never asked for.
        case_ids: of ``source``.
        read_ahead: cases that a background thread reads and resizes while the network works; 0 reads in turn.
            The order of the cases and the batches do not depend on it.
        predict_fn, image_size, batch_size, device, num_classes, outputs, autocast, resize: as for ``predict_case``.
    Yields:
        (case id, uint8 class ids (H, W) or (D, H, W) by output name).
    Raises:
        As ``predict_case``, when the case in question is reached.
    """
    return _predict(
        predict_fn,
        ((case_id, lambda case_id=case_id: source.image(case_id)) for case_id in case_ids),
        image_size=image_size,
        batch_size=batch_size,
        device=device,
        num_classes=num_classes,
        outputs=outputs,
        autocast=autocast,
        resize=resize,
        read_ahead=read_ahead,
    )


@dataclass
class _Case:
    """One case on its way: the network's inputs, then the answers that have come back."""

    case_id: str
    volume: bool
    size: tuple[int, int]  # native H, W
    slices: list[np.ndarray]  # uint8 (S, S, 3) each
    labels: dict[str, list[np.ndarray]] = field(default_factory=dict)  # uint8 (H, W) each
    answered: int = 0


def _predict(
    predict_fn: PredictFn,
    named_images: Iterable[tuple[str, Callable[[], np.ndarray]]],
    *,
    image_size: int,
    batch_size: int,
    device: torch.device | str,
    num_classes: int | None,
    outputs: Sequence[str] | None,
    autocast: torch.dtype | None,
    resize: Resize | None,
    read_ahead: int,
) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; at least 1 is needed")
    if resize is None:
        # Training's own function: a network should see at test time what it was trained on.
        from knowsam.data.readers import resize_image as resize

    device = torch.device(device)
    waiting: deque[_Case] = deque()  # read, in order, not yet answered in full
    batch: list[tuple[_Case, np.ndarray]] = []

    def flush() -> None:
        answer = _forward(predict_fn, [image for _, image in batch], device, num_classes, autocast, outputs)
        for row, (case, _) in enumerate(batch):
            for name, logits in answer.items():
                case.labels.setdefault(name, []).append(_native_labels(logits[row], case, name))
            case.answered += 1
        batch.clear()

    def finished() -> Iterator[tuple[str, dict[str, np.ndarray]]]:
        while waiting and waiting[0].answered == len(waiting[0].slices):
            case = waiting.popleft()
            yield (
                case.case_id,
                {name: np.stack(maps) if case.volume else maps[0] for name, maps in case.labels.items()},
            )

    with _eval_mode(predict_fn), contextlib.closing(_read(named_images, image_size, resize, read_ahead)) as cases:
        for case in cases:
            waiting.append(case)
            for image in case.slices:
                batch.append((case, image))
                if len(batch) == batch_size:
                    flush()
            yield from finished()
        if batch:
            flush()
        yield from finished()


def _read(
    named_images: Iterable[tuple[str, Callable[[], np.ndarray]]], image_size: int, resize: Resize, read_ahead: int
) -> Iterator[_Case]:
    """Cases in order, ``read_ahead`` of them prepared by one background thread."""
    if read_ahead < 1:
        for case_id, get in named_images:
            yield _prepare(case_id, get, image_size, resize)
        return
    # One thread only: decoding then follows the order of the cases, and h5py is not asked from two places at once.
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="knowsam-read")
    try:
        pending = deque()
        for case_id, get in named_images:
            pending.append(pool.submit(_prepare, case_id, get, image_size, resize))
            if len(pending) > read_ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _prepare(case_id: str, get: Callable[[], np.ndarray], image_size: int, resize: Resize) -> _Case:
    image = np.asarray(get())
    if image.dtype != np.uint8 or image.ndim not in (3, 4) or image.shape[-1] != 3 or image.size == 0:
        raise DataError(
            f"image {case_id!r} is {image.dtype} {image.shape}; allowed: uint8 (H, W, 3) or (D, H, W, 3)",
            hint="Read it through a source of knowsam.data, which converts to uint8 RGB.",
        )
    volume = image.ndim == 4
    slices = [resize(one, image_size) for one in (image if volume else image[None])]
    return _Case(case_id, volume, (image.shape[-3], image.shape[-2]), slices)


def _forward(
    predict_fn: PredictFn,
    images: list[np.ndarray],
    device: torch.device,
    num_classes: int | None,
    autocast: torch.dtype | None,
    outputs: Sequence[str] | None,
) -> dict[str, Tensor]:
    stacked = torch.from_numpy(np.stack(images)).to(device)  # (B, S, S, 3)
    x = stacked.permute(0, 3, 1, 2).contiguous().float() / 255  # (B, 3, S, S)
    with torch.no_grad(), torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
        answer = predict_fn(x)
    if outputs is not None:
        missing = [name for name in outputs if name not in answer]
        if missing:
            raise ValueError(f"no output {', '.join(map(repr, missing))}; allowed: {', '.join(map(repr, answer))}")
        answer = {name: answer[name] for name in outputs}
    for name, logits in answer.items():
        few, many = (2, 256) if num_classes is None else (num_classes, num_classes)
        if logits.ndim != 4 or logits.shape[0] != len(images) or not few <= logits.shape[1] <= many:
            raise ValueError(
                f"output {name!r} has shape {tuple(logits.shape)}; allowed: ({len(images)}, K, h, w), "
                f"K {few if few == many else f'from {few} to {many}'} with the background"
            )
    return answer


def _native_labels(logits: Tensor, case: _Case, name: str) -> np.ndarray:
    """(K, h, w) -> uint8 (H, W): logits are enlarged before the argmax, as labels enlarged after it have steps."""
    logits = logits.float()  # autocast leaves bfloat16, whose 8 bits would tie neighbouring classes
    # argmax takes NaN for the largest number: a broken network would give a label map that looks like any other.
    if not bool(torch.isfinite(logits).all()):
        raise NumericError(
            f"output {name!r} of case {case.case_id!r} has logits that are not finite",
            hint="Predict without autocast, or look for a training that diverged.",
        )
    if tuple(logits.shape[-2:]) != case.size:
        logits = F.interpolate(logits[None], size=case.size, mode="bilinear", align_corners=False)[0]  # (K, H, W)
    return logits.argmax(dim=0).to(torch.uint8).cpu().numpy()


@contextlib.contextmanager
def _eval_mode(predict_fn: PredictFn) -> Iterator[None]:
    """Put the module behind ``predict_fn`` into eval mode, and every part of it back as it was."""
    owner = predict_fn if isinstance(predict_fn, nn.Module) else getattr(predict_fn, "__self__", None)
    # Part by part: `train()` on the whole would also wake a teacher that the method keeps in eval mode.
    modes = [(part, part.training) for part in owner.modules()] if isinstance(owner, nn.Module) else []
    for part, _ in modes:
        part.training = False
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
