"""Predictions of pictures: PNG for masks and uncertainty, npz for probabilities."""

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from knowsam.io import orientation
from knowsam.io.stored import PredictionKind


def extension(kind: PredictionKind) -> str:
    """``.npz`` for probabilities, else ``.png``."""
    return ".npz" if kind == "probabilities" else ".png"


def encode(kind: PredictionKind, values: np.ndarray, classes: Sequence[str], tag: int, turned: bool) -> bytes:
    """A PNG on the stored grid, with the image's orientation tag, so that it lies right in viewers that turn both and
    in tools that turn neither; or an npz with ``probabilities``, ``classes`` and, if it is not 1, ``orientation``.

    Args:
        kind: what ``values`` are.
        values: label values or uncertainty (H, W), colours (H, W, 3), probabilities (K, H, W).
        classes: K names.
        tag: orientation of the image, 1..8.
        turned: whether ``values`` lie on the shown grid.
    """
    axes = (-2, -1) if kind == "probabilities" else (0, 1)
    if turned:
        values = orientation.stored(values, tag, axes)
    if kind == "probabilities":
        more = {} if tag == 1 else {"orientation": np.array(tag)}
        return npz({"probabilities": values, "classes": np.array(list(classes)), **more})
    if kind == "uncertainty":
        values = np.rint(values * 255).astype(np.uint8)
    file = io.BytesIO()
    exif = Image.Exif()
    if tag != 1:
        exif[orientation.TAG] = tag
    Image.fromarray(np.ascontiguousarray(values)).save(file, format="PNG", exif=exif)
    return file.getvalue()


def npz(arrays: dict[str, np.ndarray]) -> bytes:
    """A compressed npz file."""
    file = io.BytesIO()
    np.savez_compressed(file, allow_pickle=False, **arrays)
    return file.getvalue()
