"""Files to arrays and back: one room for training, checking and prediction.

Reading never guesses in silence: what was left out, turned or taken for something is in ``notes``; what cannot be read
right is refused by one error that names the file. Writing gives a prediction in the orientation, geometry and kind of
file of its image, and nothing of a patient: no DICOM tags, no EXIF but the orientation, no free text of a NIfTI header.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np

from knowsam.errors import DataError
from knowsam.io.arrays import H5, Arrays, Npz, in_order
from knowsam.io.dicom import Dicom
from knowsam.io.dicom_series import dicom_files
from knowsam.io.kind import Kind, raw_labels, suffix
from knowsam.io.nifti import Nifti
from knowsam.io.opening import MAX_PIXELS, MAX_VOXELS, opened, pixels_up_to
from knowsam.io.palettes import PaletteWatch
from knowsam.io.picture import Picture
from knowsam.io.scan import Scan, scan_folder
from knowsam.io.stored import DEFAULT, Header, PredictionKind, Reading, Stored, StoredMask
from knowsam.io.tiff import Tiff
from knowsam.io.volume_grid import VolumeGrid

__all__ = [
    "ARRAYS",
    "KINDS",
    "MAX_PIXELS",
    "MAX_VOXELS",
    "PICTURES",
    "Header",
    "Kind",
    "PaletteWatch",
    "PredictionKind",
    "Reading",
    "Scan",
    "Stored",
    "StoredMask",
    "array_names",
    "encode",
    "extension",
    "extensions",
    "fingerprint",
    "header",
    "in_order",
    "kind_of",
    "raw_labels",
    "read_image",
    "read_mask",
    "same_place",
    "scan",
    "scan_folder",
    "suffix",
]

PICTURES: tuple[str, ...] = (*Picture.extensions, *Tiff.extensions)
"""Extensions of pictures, in small letters, with the dot."""
ARRAYS: tuple[str, ...] = (*H5.extensions, *Npz.extensions)
"""Extensions of files that may hold an image and its mask under two names."""

KINDS: tuple[Kind, ...] = (Dicom(), Picture(), Tiff(), Nifti(), H5(), Npz())
"""Every kind of file. DICOM goes first: what stands before its own mark may be that of a TIFF."""


def extensions() -> tuple[str, ...]:
    """Of all kinds, in small letters, with the dot."""
    return tuple(ending for kind in KINDS for ending in kind.extensions)


def kind_of(path: str | Path) -> Kind:
    """The kind of a file by its content, or, where that says nothing, by its extension; of a folder: DICOM.

    Raises:
        NotFoundError: no such file.
        DataError: of no known kind, or not a regular file.
    """
    return _kind_of(Path(path))[0]


def read_image(path: str | Path, reading: Reading = DEFAULT) -> Stored:
    """An image or a volume; of a folder, its DICOM series.

    Args:
        path: the file, or the folder of slices.
        reading: options.
    Raises:
        NotFoundError: no such file.
        DataError: damaged, of no known kind, too large, or ambiguous; says which.
        ConfigError: a library that this kind needs is not installed.
    """
    kind, notes = _kind_of(Path(path))
    with pixels_up_to(reading.max_pixels):
        stored = kind.read(Path(path), reading)
    array, top = stored.array, (stored.full_range or (0, 0))[1]
    if array.dtype.kind == "u" and top > 255 and 8 * (reach := int(array.max())) <= top:
        notes = (*notes, f"values reach {reach} of {top:g}: fewer bits than the format has?")
    return replace(stored, notes=(*notes, *stored.notes))


def read_mask(path: str | Path, reading: Reading = DEFAULT) -> StoredMask:
    """Raw values of a mask on the grid that ``read_image`` gives of its image.

    Args, Raises:
        as ``read_image``; also DataError for values that are no labels: fractions, negative or above 65535, and for
        palettes that leave open whether index or colour counts.
    """
    kind, notes = _kind_of(Path(path))
    with pixels_up_to(reading.max_pixels):
        mask = kind.read_mask(Path(path), reading)
    return replace(mask, notes=(*notes, *mask.notes))


def array_names(path: str | Path) -> list[str]:
    """Names of the arrays of an h5 or npz file; none of any other file, which holds one array without a name.

    Raises:
        NotFoundError, DataError: not there, damaged, or of no known kind.
    """
    kind = kind_of(path)
    return kind.names(Path(path)) if isinstance(kind, Arrays) else []


def header(path: str | Path, reading: Reading = DEFAULT) -> Header:
    """Size, type and spacing that ``read_image`` will give, from the header alone; same refusals for size."""
    with pixels_up_to(reading.max_pixels):
        return kind_of(path).header(Path(path), reading)


def extension(path: str | Path, kind: PredictionKind) -> str:
    """What the name of a prediction ends with.

    Args:
        path: the image.
        kind: what the prediction is.
    """
    return kind_of(path).extension(Path(path), kind)


def encode(
    path: str | Path, kind: PredictionKind, values: np.ndarray, classes: Sequence[str], reading: Reading = DEFAULT
) -> tuple[str, bytes]:
    """A prediction as a file in the image's own orientation, geometry and kind.

    Pictures give PNG with the image's orientation tag, probabilities npz. NIfTI, h5, npz and stacks of TIFF stay what
    they are; a DICOM series gives NIfTI.

    Args:
        path: the image.
        kind: what ``values`` are.
        values: on the grid that ``read_image`` gave with this ``reading``: label values (*S), unsigned integers; of a
            picture also colours (H, W, 3), uint8; probabilities (K, *S); uncertainty in 0..1 (*S).
        classes: K names.
        reading: the options with which the image was read.
    Returns:
        What ``extension`` gives, and the file's content.
    Raises:
        as ``read_image``; ValueError for values of another shape than the image.
    """
    path = Path(path)
    found = kind_of(path)
    shape = header(path, reading).shape
    given = values.shape[1:] if kind == "probabilities" else values.shape[: len(shape)]
    if given != shape:
        raise ValueError(f"values of {given} for an image of {shape}: {path}")
    if kind == "masks" and values.dtype.itemsize > 2:
        if values.max(initial=0) > 65535:
            raise DataError(f"{path}: label values up to {values.max()} do not fit a mask; at most 65535 do")
        values = values.astype(np.uint16)
    with pixels_up_to(reading.max_pixels):
        return found.extension(path, kind), found.encode(path, kind, values, classes, reading)


def same_place(image: str | Path, mask: str | Path, reading: Reading = DEFAULT) -> tuple[str, ...]:
    """Whether a volume's mask lies where the volume lies, by both headers; pictures, h5 and npz do not say.

    Each of the two is turned to RAS+ by its own header. A mask that was saved without its image's header would then
    come out mirrored against it, at the same size.

    Args:
        image, mask: the files.
        reading: options.
    Returns:
        Notes: where only spacing or origin differ, which do not move one array against the other.
    Raises:
        DataError: the two headers turn their arrays differently, to different places.
    """
    first, second = (kind_of(path).grid(Path(path), reading) for path in (image, mask))
    if first is None or second is None or first.canonical_shape != second.canonical_shape:
        return ()
    corners = np.array([[x, y, z, 1] for x in (0, 1) for y in (0, 1) for z in (0, 1)]) * [*_xyz(first), 1]
    away = float(np.abs((first.canonical_affine - second.canonical_affine) @ corners.T).max())
    if away <= 0.1 * max(first.spacing or (1.0,)):
        return ()
    if first.axes == second.axes:
        return (f"{mask}: by its header up to {away:.3g} mm away from its image; taken voxel by voxel",)
    raise DataError(
        f"{mask}: axes {second.axes} by its header, its image {image} has {first.axes}, and they lie up to {away:.3g} "
        "mm apart: one of the headers is wrong",
        hint="where the two fit voxel by voxel, save the mask with the header of its image",
    )


def scan(folder: str | Path, *, series: bool = True) -> Scan:
    """Files of known kinds in a folder and its subfolders, by case.

    By extension; without one (or with a number for one) by content. Nothing else is opened, but DICOM headers where
    several such files share a folder: slices of one series are one case, their folder. Several series in one folder are
    passed over, named: which one is meant cannot be known.

    Args:
        folder: where to look.
        series: False: DICOM slices are pictures, each a case.
    Raises:
        NotFoundError: no such folder.
    """
    return scan_folder(folder, frozenset(extensions()), _known_by_content, series=series)


def fingerprint(path: str | Path, part: Literal["image", "mask"] = "image", reading: Reading = DEFAULT) -> str:
    """sha256 of what is read: of h5 and npz the one array and not the file, which holds the other, too.

    Args:
        path: the file, or the folder of slices.
        part: whose array, where one file holds both.
        reading: options; names of the arrays.
    """
    path, digest = Path(path), hashlib.sha256()
    kind = kind_of(path)
    if isinstance(kind, Arrays):
        with kind.array(path, reading.image_key if part == "image" else reading.mask_key) as found:
            values = np.ascontiguousarray(found.read())
        digest.update(f"{values.dtype.str}{values.shape}".encode() + values.tobytes())
        return digest.hexdigest()
    for file in dicom_files(path) if path.is_dir() else [path]:
        with opened(file, "a file") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _kind_of(path: Path) -> tuple[Kind, tuple[str, ...]]:
    ending = suffix(path.name).lower()
    named = next((kind for kind in KINDS if ending in kind.extensions), None)
    if path.is_dir():
        return next(kind for kind in KINDS if isinstance(kind, Dicom)), ()
    with opened(path, "a file") as file:
        head = file.read(1024)
    found = next((kind for kind in KINDS if kind.sniff(head)), None)
    if found is None and named is None:
        raise DataError(f"{path} is of no known kind; known are {', '.join(extensions())}")
    if found is None or found is named or named is None:
        return found or named, ()  # type: ignore[return-value]
    return found, (f"named {ending}, but is {found.name}",)


def _xyz(grid: VolumeGrid) -> tuple[int, ...]:
    """Largest canonical indices."""
    return tuple(int(n) - 1 for n in replace(grid, slice_axis=2, flat=False).canonical_shape[::-1])


def _known_by_content(path: Path) -> bool:
    with opened(path, "a file") as file:
        head = file.read(1024)
    return any(kind.sniff(head) for kind in KINDS)
