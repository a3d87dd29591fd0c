"""What reading gives, and the options of reading."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from knowsam.errors import ConfigError
from knowsam.io.opening import MAX_PIXELS

PredictionKind = Literal["masks", "probabilities", "uncertainty"]
"""What a file is made of by ``encode``."""


@dataclass(frozen=True)
class Reading:
    """Options of reading: one object for training, checking and prediction.

    Attributes:
        orientation: the EXIF or TIFF orientation tag. ``"apply"``: image and mask, each by its own tag, are turned as
            viewers show them; ``"stored"``: both stay on the grid they were stored on.
        slice_axis: the axis along which the slices of a volume lie, of x, y, z = 0, 1, 2; it becomes D. NIfTI and DICOM
            say where x, y and z are; h5 and npz hold (z, y, x).
        image_key, mask_key: names of the arrays in h5 and npz files.
        palette: masks with a palette. ``"index"``: the stored number counts; ``"colour"``: its colour, or grey level;
            ``"auto"``: see ``palettes.read_palette``.
        max_pixels: of a picture; larger ones are refused from their header.
    Raises:
        ConfigError: another value of ``orientation``, ``slice_axis`` or ``palette``; ``max_pixels`` below 1.
    """

    orientation: Literal["apply", "stored"] = "apply"
    slice_axis: int = 2
    image_key: str = "image"
    mask_key: str = "label"
    palette: Literal["auto", "index", "colour"] = "auto"
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        allowed = {"orientation": ("apply", "stored"), "slice_axis": (0, 1, 2), "palette": ("auto", "index", "colour")}
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ConfigError(
                    f"reading.{name} is {getattr(self, name)!r}; allowed are {', '.join(map(str, values))}"
                )
        if not isinstance(self.max_pixels, int) or self.max_pixels < 1:
            raise ConfigError(f"reading.max_pixels is {self.max_pixels!r}; allowed are whole numbers from 1")


DEFAULT = Reading()


@dataclass(frozen=True)
class Header:
    """What a file says of its image before anything is decoded; the same as ``Stored`` will have.

    Attributes:
        channels: C.
        shape: (H, W) or (D, H, W).
        dtype: of the array.
        spacing: mm along each axis of ``shape``; None: the file does not say.
    """

    channels: int
    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]
    spacing: tuple[float, ...] | None


@dataclass(frozen=True)
class Stored:
    """An image or volume as its file, or its folder of DICOM slices, holds it.

    Attributes:
        array: (C, H, W) or (C, D, H, W), native type: DICOM and NIfTI in the units that their scaling gives (HU of a
            CT). Volumes are turned to RAS+: x runs to the right, y to the front, z to the top of the patient.
        spacing: mm along each axis behind C; None: the file does not say.
        full_range: the values that are black and white, where the format says so: of unsigned numbers the range of
            their bits, of DICOM the linear window that the file names. None for floats, signed and scaled numbers.
        notes: what was left out, turned or guessed.
        display: float32, 0 (black) to 1 (white), the shape of ``array``: a DICOM image seen through its VOI LUT, or its
            SIGMOID window, neither of which two numbers can say (``full_range`` is None then). None for all else.
    """

    array: np.ndarray
    spacing: tuple[float, ...] | None
    full_range: tuple[float, float] | None
    notes: tuple[str, ...] = ()
    display: np.ndarray | None = None


@dataclass(frozen=True)
class StoredMask:
    """A mask's raw values, before any label table, on the grid of its image.

    Attributes:
        array: label values (H, W) or (D, H, W), uint8 or uint16; or colours (*S, 3), uint8.
        palette: index -> (r, g, b) of the entries that occur, for a file with a palette; else None.
        notes: what was left out, turned or guessed.
        by: whether ``array`` holds a palette's indices or its colours; ``"value"`` where there is no palette.
    """

    array: np.ndarray
    palette: dict[int, tuple[int, int, int]] | None = None
    notes: tuple[str, ...] = ()
    by: Literal["value", "index", "colour"] = "value"


def bits_range(dtype: np.dtype[np.generic]) -> tuple[float, float] | None:
    """Black and white of a type: 0 to the largest unsigned number, or None for all other types."""
    if dtype.kind == "b":
        return 0.0, 1.0
    return (0.0, float(2 ** (8 * dtype.itemsize) - 1)) if dtype.kind == "u" else None
