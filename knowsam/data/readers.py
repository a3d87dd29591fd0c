"""Image and mask files to arrays, by declared rules instead of whatever the decoder happens to do.

Rules for every file, image or mask:
    - alpha is dropped, never composited: a mask drawn on the plain image still fits it;
    - EXIF/TIFF orientation is applied to neither image nor mask: both stay on the grid they were stored on;
    - one picture per file; more than ``MAX_PIXELS`` pixels are refused from the header, before anything is decoded.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike, NDArray
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from knowsam.errors import ConfigError, DataError, KnowsamError, NotFoundError

EXTENSIONS = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
INTENSITIES = ("dtype", "minmax", "percentile")
MAX_PIXELS = 64_000_000
MAX_VOXELS = 2_000_000_000

_FORMATS = ("PNG", "JPEG", "BMP", "TIFF")
_JUNK_NAMES = {"thumbs.db", "desktop.ini"}
# Pillow turns TIFF files (and only those) upright while loading; by orientation tag, these undo it.
_UNDO_ORIENTATION = {
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: np.swapaxes(a, 0, 1),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: np.swapaxes(a[::-1, ::-1], 0, 1),
    8: lambda a: np.rot90(a, -1),
}


def read_image(path: str | Path, intensity: str = "dtype") -> NDArray[np.uint8]:
    """Read a PNG, JPEG, BMP or TIFF picture.

    1, 8, 16 bit and float; grey, RGB, palette, CMYK, with or without alpha. Colour of 16 bits per channel is read
    through its upper 8 bits.

    Args:
        path: the file.
        intensity: how values become 0..255, see ``to_uint8``. 8-bit files come back untouched under ``"dtype"``.
    Returns:
        uint8 (H, W, 3); grey is repeated.
    Raises:
        NotFoundError: no such file.
        DataError: not a picture of these formats, truncated, too large, several pages, or values that do not fit
            ``intensity``.
    """
    with _opened(path) as (picture, orientation):
        array = _image_array(picture)
        array = _undo(array, orientation)
    array = to_uint8(array, intensity, where=str(path))
    if array.ndim == 2:
        array = np.repeat(array[:, :, None], 3, axis=2)
    return array  # (H, W, 3)


def read_mask(path: str | Path) -> np.ndarray:
    """Read a mask's raw values, before any label table.

    Palette files give their *indices*, 1-, 2- and 4-bit grey files their stored numbers (0..1, 0..3, 0..15). Colour
    files whose channels agree everywhere give one channel.

    Returns:
        uint8 or uint16 (H, W); or uint8 (H, W, 3) where the mask really is coloured.
    Raises:
        NotFoundError: no such file.
        DataError: as ``read_image``; also fractions, values outside 0..65535, and colour of 16 bits per channel.
    """
    with _opened(path) as (picture, orientation):
        rawmode = _rawmode(picture)
        mode = picture.mode
        if ";16" in rawmode and not mode.startswith("I"):
            # Pillow keeps the upper byte only, which would turn the labels 0, 1, 2 into 0, 0, 0.
            raise DataError(
                f"{path}: a mask with 16 bits per colour channel is not read",
                hint="save it with 8 bits per channel, or as one 16-bit grey channel",
            )
        if mode in ("P", "PA", "LA"):
            array = np.asarray(picture.getchannel(0) if mode != "P" else picture)
        elif mode in ("1", "L", "I", "F") or mode.startswith("I;16"):
            array = np.asarray(picture)
        else:
            array = np.asarray(_to_rgb(picture))
            if (array == array[:, :, :1]).all():
                array = array[:, :, 0]
        if rawmode.startswith("L;2"):  # Pillow stretches 0..3 and 0..15 to 0..255
            array = array // 85
        elif rawmode.startswith("L;4"):
            array = array // 17
        return np.ascontiguousarray(_undo(raw_labels(array, where=str(path)), orientation))


def stored_size(path: str | Path) -> tuple[int, int]:
    """(height, width) as stored, from the header alone; same refusals as ``read_image``."""
    with _opened(path) as (picture, orientation):
        width, height = picture.size
        if picture.format == "TIFF" and orientation in (5, 6, 7, 8):  # Pillow already speaks of the turned picture
            width, height = height, width
        return height, width


def is_deep(path: str | Path) -> bool:
    """Whether a picture stores more than 8 bits a value, from the header alone; same refusals as ``read_image``."""
    with _opened(path) as (picture, _):
        return picture.mode.startswith(("I", "F")) or ";16" in _rawmode(picture)


def raw_labels(array: np.ndarray, where: str) -> np.ndarray:
    """Raw mask values as uint8 or uint16, same shape; nothing is rounded.

    Args:
        array: values as stored, any shape and type.
        where: file name for the message.
    Raises:
        DataError: a value that is not a whole number in 0..65535.
    """
    if array.dtype in (np.uint8, np.uint16):
        return array.astype(array.dtype.newbyteorder("="), copy=False)
    if array.dtype == bool:
        return array.astype(np.uint8)
    if array.dtype.kind not in "iuf":
        raise DataError(f"{where}: a mask of type {array.dtype} is not read; allowed are whole numbers in 0..65535")
    bad = ~((array >= 0) & (array <= 65535))
    if array.dtype.kind == "f":
        bad |= array != np.floor(array)
    if bad.any():
        some = ", ".join(str(v) for v in np.unique(array[bad])[:5])
        raise DataError(f"{where}: {int(bad.sum())} mask pixels are not whole numbers in 0..65535, such as {some}")
    return array.astype(np.uint16)


def to_uint8(array: np.ndarray, intensity: str = "dtype", *, where: str = "image") -> NDArray[np.uint8]:
    """Bring intensities of any type to 0..255.

    Args:
        array: bool, integer or float, any shape; channels share one range, so that colours keep their hue.
        intensity: ``"dtype"``: 0..maximum of the unsigned integer type, or 0..1 for floats. ``"minmax"``: smallest to
            largest value of this array. ``"percentile"``: 0.5th to 99.5th percentile of this array, the rest clipped.
        where: file name for the messages.
    Returns:
        uint8, same shape; the array itself if it is uint8 and ``intensity`` is ``"dtype"``. A constant array becomes 0
        under ``"minmax"`` and ``"percentile"``.
    Raises:
        ConfigError: unknown ``intensity``.
        DataError: NaN or infinity, an unfit type, or values that ``"dtype"`` has no rule for.
    """
    if intensity not in INTENSITIES:
        raise ConfigError(f"intensity {intensity!r} is unknown; allowed are {', '.join(INTENSITIES)}")
    if array.dtype.kind not in "buif":
        raise DataError(f"{where}: pixels of type {array.dtype} are not read")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise DataError(f"{where}: {int((~np.isfinite(array)).sum())} pixels are NaN or infinite")
    if intensity == "dtype":
        return _full_range(array, where)
    if array.size == 0:
        return array.astype(np.uint8)
    precise: DTypeLike = np.float64 if array.dtype.itemsize > 2 else np.float32
    values = array.astype(precise)
    low, high = float(values.min()), float(values.max())
    if intensity == "percentile":
        inner_low, inner_high = np.percentile(values, (0.5, 99.5))
        if inner_high > inner_low:  # a nearly constant image has only its extremes to stretch
            low, high = float(inner_low), float(inner_high)
    if high <= low:
        return np.zeros(array.shape, np.uint8)
    return np.rint(np.clip((values - low) / (high - low), 0, 1) * 255).astype(np.uint8)


def grey_slices(values: np.ndarray, intensity: str = "dtype", *, where: str = "image") -> NDArray[np.uint8]:
    """Grey values as RGB, each slice of a volume brought to 0..255 by itself: a network learns from slices.

    Args:
        values: numbers (H, W) or (D, H, W).
        intensity, where: as for ``to_uint8``.
    Returns:
        uint8 (H, W, 3) or (D, H, W, 3), grey repeated.
    Raises:
        DataError: as ``to_uint8``; names the slice.
    """
    if values.ndim == 2:
        grey = to_uint8(values, intensity, where=where)
    else:
        grey = np.stack([to_uint8(v, intensity, where=f"{where} slice {n}") for n, v in enumerate(values)])
    return np.repeat(grey[..., None], 3, axis=-1)


def resize_image(image: NDArray[np.uint8], size: int | tuple[int, int]) -> NDArray[np.uint8]:
    """uint8 (H, W, 3) -> (S, S, 3), bilinear, low-pass filtered when it shrinks; the array itself if already that size.

    Args:
        size: S, or (height, width).
    """
    height, width = (size, size) if isinstance(size, int) else size
    if image.shape[:2] == (height, width):
        return image
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


def resize_mask(mask: NDArray[np.uint8], size: int | tuple[int, int]) -> NDArray[np.uint8]:
    """uint8 (H, W) -> (S, S), nearest neighbour at pixel centres; the array itself if already that size.

    Args:
        size: S, or (height, width).
    """
    height, width = (size, size) if isinstance(size, int) else size
    if mask.shape == (height, width):
        return mask
    return np.asarray(Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST))


def scan_folder(folder: str | Path, extensions: tuple[str, ...]) -> dict[str, list[Path]]:
    """Files under ``folder`` by id: the path inside it with ``/`` and without extension, sorted.

    Hidden files, ``Thumbs.db``, ``__MACOSX`` and other extensions are passed over. Nothing is opened. Links to folders
    are not followed below ``folder``, so a loop of links cannot trap the scan.

    Args:
        folder: where to look; its subfolders too.
        extensions: in small letters, with the dot.
    Raises:
        NotFoundError: no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise NotFoundError(f"data folder {folder} does not exist", hint="check the dataset's root and folder names")
    found: dict[str, list[Path]] = {}
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f != "__MACOSX")
        for name in sorted(files):
            stem, extension = os.path.splitext(name)
            if extension.lower() not in extensions or name.startswith(".") or name.lower() in _JUNK_NAMES:
                continue
            case_id = (Path(parent) / stem).relative_to(folder).as_posix()
            found.setdefault(case_id, []).append(Path(parent) / name)
    return dict(sorted(found.items()))


@contextmanager
def _opened(path: str | Path) -> Iterator[tuple[ImageFile.ImageFile, int]]:
    """The undecoded picture and its orientation tag; whatever goes wrong inside becomes an error naming the file."""
    try:
        # by file, not by name: by name Pillow maps raw TIFF data, and garbles it where the orientation tag turns it
        with open(path, "rb") as file, Image.open(file, formats=_FORMATS) as picture:
            width, height = picture.size
            if width * height > MAX_PIXELS:
                raise DataError(
                    f"{path}: {width} x {height} pixels; at most {MAX_PIXELS:,} are read",
                    hint="cut the picture into tiles, or check that the file is what it claims to be",
                )
            pages = getattr(picture, "n_frames", 1) if picture.format in ("TIFF", "PNG") else 1
            if pages > 1:
                raise DataError(f"{path}: holds {pages} pages; one picture per file is read")
            tags = picture.tag_v2 if isinstance(picture, TiffImageFile) else {}
            yield picture, int(tags.get(ExifTags.Base.Orientation, 1))
    except (KnowsamError, MemoryError):
        raise
    except FileNotFoundError:
        raise NotFoundError(f"{path} does not exist") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"{path}: more than the {MAX_PIXELS:,} pixels that are read ({error})") from error
    except Exception as error:  # a broken file makes Pillow raise nearly any class: OSError, SyntaxError, struct.error
        raise DataError(f"{path}: {_what_is_wrong(path, error)}") from error


def _what_is_wrong(path: str | Path, error: Exception) -> str:
    try:
        with open(path, "rb") as file:
            head = file.read(512)
    except OSError as unreadable:
        return f"cannot be read ({unreadable.strerror})"
    if not head:
        return "the file is empty (0 bytes)"
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "the file is a web page (HTML), not a picture; the download probably failed"
    if isinstance(error, UnidentifiedImageError):
        return f"not a picture of a known format ({', '.join(_FORMATS)}), or damaged"
    return f"truncated or damaged ({error})"


def _rawmode(picture: ImageFile.ImageFile) -> str:
    args = picture.tile[0].args if picture.tile else None
    return args if isinstance(args, str) else str(args[0]) if args else ""


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode == "RGBa":  # Pillow has no direct way from premultiplied alpha
        picture = picture.convert("RGBA")
    return picture.convert("RGB")


def _image_array(picture: Image.Image) -> np.ndarray:
    """(H, W) or (H, W, 3), in the type whose full range is the picture's."""
    mode = picture.mode
    if mode.startswith("I;16") or (mode == "I" and picture.format == "PNG"):
        return np.asarray(picture).astype(np.uint16)
    if mode in ("1", "L", "I", "F"):
        return np.asarray(picture)
    if mode == "LA":
        return np.asarray(picture.getchannel(0))
    return np.asarray(_to_rgb(picture))


def _undo(array: np.ndarray, orientation: int) -> np.ndarray:
    undo = _UNDO_ORIENTATION.get(orientation)
    return array if undo is None else np.ascontiguousarray(undo(array))


def _full_range(array: np.ndarray, where: str) -> NDArray[np.uint8]:
    if array.dtype == np.uint8:
        return array
    if array.dtype == bool:
        return array.astype(np.uint8) * 255
    choose = "choose intensity 'minmax' or 'percentile' for this dataset"
    if array.dtype.kind == "i":
        raise DataError(f"{where}: pixels of type {array.dtype}; signed numbers have no black and white", hint=choose)
    if array.dtype.kind == "f":
        low, high = (float(array.min()), float(array.max())) if array.size else (0.0, 0.0)
        if low < -1e-6 or high > 1 + 1e-6:  # a resampled 0..1 image overshoots by rounding only
            raise DataError(
                f"{where}: float pixels run from {low:g} to {high:g}; intensity 'dtype' allows 0..1", hint=choose
            )
        return np.rint(np.clip(array, 0, 1) * 255).astype(np.uint8)
    return np.rint(array / np.float64(np.iinfo(array.dtype).max) * 255).astype(np.uint8)
