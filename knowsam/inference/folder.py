"""Many files in, a folder of predictions out: the tree of the input below ``masks/``, ``probabilities/`` and so on."""

import contextlib
import functools
import io
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from knowsam import io as io_room
from knowsam.data.intensity import Preparation, as_picture
from knowsam.errors import ConfigError, DataError, KnowsamError, NotFoundError, NumericError
from knowsam.files import storage_error, write_bytes
from knowsam.inference.files import InputFile, OutputKind
from knowsam.inference.overlay import draw_outlines, draw_sheet
from knowsam.inference.postprocess import Spec, apply
from knowsam.inference.predict import PredictFn, Segmentation, segment
from knowsam.io import PredictionKind

OF_ONE_FILE = (DataError, NotFoundError, NumericError)
"""What may be wrong with one file and is no reason to give up the others; a full disk is."""

LabelValues = Sequence[int] | Sequence[tuple[int, int, int]]


@dataclass(frozen=True)
class Wanted:
    """What is written of each file.

    Attributes:
        classes: K names, background first.
        values: what class k is written as, a number in 0..65535 or a colour; class ids if None.
        probabilities, uncertainty, overlays: what is written beside the masks.
    """

    classes: Sequence[str]
    values: LabelValues | None = None
    probabilities: bool = False
    uncertainty: bool = False
    overlays: bool = False

    def targets(self, file: InputFile, out: Path) -> dict[OutputKind, Path]:
        """The files that are made of ``file``, by kind; the mask comes last."""
        extensions: dict[OutputKind, str] = {"overlays": ".png"} if self.overlays else {}
        kinds: tuple[PredictionKind, ...] = ("probabilities", "uncertainty", "masks")
        extensions |= {kind: file.extension(kind) for kind in kinds if kind == "masks" or getattr(self, kind)}
        return {kind: out / kind / f"{file.stem}{extension}" for kind, extension in extensions.items()}


@dataclass
class Outcome:
    """What became of the files.

    Attributes:
        done: written by this call.
        skipped: were there already.
        failed: with what was wrong.
        left: not reached, as somebody asked to stop.
    """

    done: int = 0
    skipped: int = 0
    failed: list[tuple[InputFile, KnowsamError]] = field(default_factory=list)
    left: int = 0


def predict_files(
    predict_fn: PredictFn,
    files: Sequence[InputFile],
    out: str | Path,
    wanted: Wanted,
    *,
    preparation: Preparation,
    postprocess: Spec = None,
    overwrite: bool = False,
    workers: int = 2,
    progress: Callable[[int, int], None] | None = None,
    stop: Callable[[], bool] = lambda: False,
    **settings: Any,
) -> Outcome:
    """Segment files and write the predictions; reading, network and writing overlap.

    A file whose predictions are all there is passed over, so that the same call goes on where another one stopped.
    Each of them is written all or nothing, the mask last.

    Args:
        predict_fn: gives one output, (B, C, S, S) in 0..1 -> {name: logits (B, K, h, w)}.
        files: from ``find_inputs``.
        out: folder; made if it is not there.
        wanted: what to write.
        preparation: from stored values to what the network sees, as in training.
        postprocess: what is done to label maps, see ``inference.postprocess``; None: nothing.
        overwrite: predict also what is there already.
        workers: threads that read, and as many that write.
        progress: called with (files dealt with, files to deal with).
        stop: asked before each file is read; True ends the work after those that have begun.
        settings: ``image_size``, ``batch_size``, ``device`` and so on, as for ``predict_case``.
    Returns:
        How many files were done, and which failed and why.
    Raises:
        StorageError: a prediction cannot be written.
        ConfigError: label values that a kind of file cannot hold; nothing was predicted.
    """
    out = Path(out)
    outcome = Outcome()
    planned: list[tuple[InputFile, dict[OutputKind, Path]]] = []
    for file in files:
        try:
            planned.append((file, wanted.targets(file, out)))  # once: it opens the file, whose content tells its kind
        except OF_ONE_FILE as unreadable:
            outcome.failed.append((file, unreadable))
    coloured = wanted.values is not None and any(isinstance(value, tuple) for value in wanted.values)
    other = [file for file, targets in planned if targets["masks"].suffix != ".png"]
    if coloured and other:
        raise ConfigError(
            f"{other[0].path}: the label values are colours, which only a mask in PNG can hold",
            hint="Leave --original-labels out, and the masks hold class ids.",
        )
    todo: dict[str, InputFile] = {}
    sharing = Counter(target for _, targets in planned for target in targets.values())
    for file, targets in planned:
        shared = next((target for target in targets.values() if sharing[target] > 1), None)
        if shared is not None:
            outcome.failed.append((file, DataError(f"{file.path}: another file's prediction would be {shared}, too")))
        elif not overwrite and all(target.exists() for target in targets.values()):
            outcome.skipped += 1
        else:
            todo[file.name] = file

    begun = 0

    def named_images() -> Iterator[tuple[str, Callable[[], np.ndarray]]]:
        nonlocal begun
        for name, file in todo.items():
            if stop():
                return
            begun += 1
            yield name, functools.partial(_levels, file, preparation)

    def then(name: str, image: np.ndarray | None, by_output: dict[str, Segmentation]) -> None:
        [segmentation] = by_output.values()
        if postprocess is not None:
            file = todo[name]
            known = io_room.header(file.path, file.reading).spacing
            segmentation.labels = apply(segmentation.labels, postprocess, known)
        write_prediction(todo[name], image, segmentation, out, wanted)

    # Enough pictures to fill the next batch, but volumes are large.
    ahead = 2 if other else workers + settings["batch_size"]
    results = segment(
        predict_fn,
        named_images(),
        num_classes=len(wanted.classes),
        probabilities=wanted.probabilities,
        uncertainty=wanted.uncertainty,
        then=then,
        keep_images=wanted.overlays,
        read_ahead=ahead,
        readers=workers,
        finish_behind=ahead,
        finishers=workers,
        tolerate=OF_ONE_FILE,
        **settings,
    )
    with contextlib.closing(results):
        for done, (name, error) in enumerate(results, start=1):
            if error is None:
                outcome.done += 1
            else:
                outcome.failed.append((todo[name], error))
            if progress is not None:
                progress(done, len(todo))
    outcome.left = len(todo) - begun
    return outcome


def _levels(file: InputFile, preparation: Preparation) -> np.ndarray:
    return preparation(file.read(), str(file.path))


def write_prediction(
    file: InputFile, image: np.ndarray | None, segmentation: Segmentation, out: Path, wanted: Wanted
) -> None:
    """Write what was predicted of one file below ``out``, the mask last: where there is a mask, all is there.

    Args:
        file: of which this is the prediction.
        image: levels (H, W, C) or (D, H, W, C), as they were prepared; needed for overlays.
        segmentation: labels (H, W) or (D, H, W), with the probabilities and the uncertainty that are wanted.
        out: folder of all predictions.
        wanted: what to write.
    Raises:
        StorageError: the disk is full or a write failed.
        ValueError: overlays are wanted, but there is no image.
    """
    labels = segmentation.labels
    for kind, target in wanted.targets(file, out).items():
        if kind == "overlays":
            if image is None:
                raise ValueError("overlays are drawn on the image, which is None; keep it, or leave overlays out")
            content = _png((draw_sheet if labels.ndim == 3 else draw_outlines)(as_picture(image), labels))
        else:
            values = to_values(labels, wanted.values) if kind == "masks" else getattr(segmentation, kind)
            content = file.encode(kind, values, wanted.classes)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise storage_error(target, error) from error
        write_bytes(target, content)


def to_values(labels: np.ndarray, values: LabelValues | None) -> np.ndarray:
    """Class ids -> what the classes are written as.

    Args:
        labels: uint8 class ids, any shape.
        values: by class id, numbers or colours; None leaves the ids.
    Returns:
        uint8, or uint16 if a value is above 255; shaped as ``labels``, colours with a last axis of 3.
    """
    if values is None:
        return labels
    table = np.array(values)
    return table.astype(np.uint16 if table.max() > 255 else np.uint8)[labels]


def _png(picture: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, format="PNG")
    return file.getvalue()
