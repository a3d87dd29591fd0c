"""TIFF, by tifffile."""

import io
import logging
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import tifffile
from PIL import Image
from tifffile import COMPRESSION, EXTRASAMPLE, PHOTOMETRIC

from knowsam.errors import DataError
from knowsam.io import orientation, palettes, raster
from knowsam.io.kind import Kind, labels_of, suffix
from knowsam.io.opening import fits, opened
from knowsam.io.stored import Header, PredictionKind, Reading, Stored, StoredMask

_SLICES = "ZIQTR"
_GREY = (PHOTOMETRIC.MINISBLACK, PHOTOMETRIC.MINISWHITE, PHOTOMETRIC.MASK)
_COLOUR = (PHOTOMETRIC.RGB, PHOTOMETRIC.YCBCR, PHOTOMETRIC.SEPARATED)
_JPEGS = (COMPRESSION.JPEG, COMPRESSION.OJPEG)
_ALPHA = (EXTRASAMPLE.ASSOCALPHA, EXTRASAMPLE.UNASSALPHA)
_MM = {"m": 1e3, "cm": 10.0, "mm": 1.0, "um": 1e-3, "micron": 1e-3, "µm": 1e-3, "\\u00b5m": 1e-3, "nm": 1e-6}
_MM |= {"inch": 25.4, "in": 25.4, "pixel": 0.0}


class Tiff(Kind):
    """A picture, or pages of one size as a volume; further sizes of the same picture and previews are passed over.

    - planar or interleaved, in strips or tiles, any compression that imagecodecs decodes, any number of bits;
    - where white is 0 the values are turned round, in images and masks, at every depth of unsigned numbers;
    - alpha and, beside RGB, further samples are dropped; grey with further samples has channels;
    - CMYK and YCbCr of 8 bits become RGB. CIE Lab, raw cameras' and complex values are refused by name;
    - pixel sizes are taken from ImageJ or OME, not from dots per inch, which speak of printers.
    """

    name: ClassVar[str] = "TIFF"
    extensions: ClassVar[tuple[str, ...]] = (".tif", ".tiff")

    def sniff(self, head: bytes) -> bool:
        """TIFF or BigTIFF, of either byte order."""
        return head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")

    def header(self, path: Path, reading: Reading) -> Header:
        """Size as it will be turned."""
        with _opened(path) as tiff:
            swap = reading.orientation == "apply" and orientation.swaps(tiff.tag)
            turn = (lambda s: (*s[:-2], s[-1], s[-2])) if swap else tuple
            dtype = tiff.dtype if tiff.table is None else np.dtype(np.uint8)
            return Header(tiff.channels, turn(tiff.shape), dtype, tiff.spacing and turn(tiff.spacing))

    def read(self, path: Path, reading: Reading) -> Stored:
        """(C, H, W) or (C, D, H, W), native type."""
        with _opened(path) as tiff:
            array, notes = tiff.values(), list(tiff.notes)
            if tiff.table is not None:
                array = np.moveaxis(palettes.filled(tiff.table, array)[array[0]], -1, 0)[: tiff.channels]
            top = None
            if array.dtype.kind == "u":
                top = 255.0 if tiff.table is not None else float(2**tiff.bits - 1)
            array, turned = orientation.turned(array, tiff.tag, reading)
            swap = reading.orientation == "apply" and orientation.swaps(tiff.tag)
            spacing = tiff.spacing
            if spacing and swap:
                spacing = (*spacing[:-2], spacing[-1], spacing[-2])
        return Stored(array, spacing, None if top is None else (0.0, top), (*notes, *turned))

    def read_mask(self, path: Path, reading: Reading) -> StoredMask:
        """(H, W) or (D, H, W), or colours."""
        with _opened(path) as tiff:
            array = tiff.values()
            if tiff.table is not None:
                mask = palettes.read_palette(array[0], tiff.table, reading.palette, path)
            else:
                mask = StoredMask(labels_of(array, str(path)))
            notes, tag = [*tiff.notes, *mask.notes], tiff.tag
            if tiff.lossy:
                notes.append("JPEG compression may have changed label values")
        rows = len(tiff.shape) - 2
        values, turned = orientation.turned(mask.array, tag, reading, (rows, rows + 1))
        return StoredMask(values, mask.palette, (*notes, *turned), mask.by)

    def extension(self, path: Path, kind: PredictionKind) -> str:
        """As of a picture; of a volume the file's own for masks and uncertainty."""
        with _opened(path) as tiff:
            return (
                (suffix(path.name) or ".tif")
                if len(tiff.shape) == 3 and kind != "probabilities"
                else raster.extension(kind)
            )

    def encode(
        self, path: Path, kind: PredictionKind, values: np.ndarray, classes: Sequence[str], reading: Reading
    ) -> bytes:
        """As of a picture; of a volume a stack with the same orientation and pixel sizes, uncertainty as float32."""
        turned = reading.orientation == "apply"
        with _opened(path) as tiff:
            if kind == "probabilities" or len(tiff.shape) == 2:
                return raster.encode(kind, values, classes, tiff.tag, turned)
            stack = orientation.stored(values, tiff.tag, (1, 2)) if turned else values
            dtype = np.float32 if kind == "uncertainty" else np.uint8 if stack.max(initial=0) < 256 else np.uint16
            where: dict[str, Any] = {"metadata": {"axes": "ZYX"}}
            if tiff.spacing is not None:
                z, y, x = tiff.spacing
                where = {"metadata": {"axes": "ZYX", "spacing": z, "unit": "mm"}, "resolution": (1 / x, 1 / y)}
            tags = [] if tiff.tag == 1 else [(orientation.TAG, "H", 1, tiff.tag, True)]
            file = io.BytesIO()
            tifffile.imwrite(file, stack.astype(dtype), imagej=True, compression="zlib", extratags=tags, **where)
            return file.getvalue()


class _Opened(NamedTuple):
    """What the header says; ``values`` decodes."""

    series: tifffile.TiffPageSeries
    page: Any
    order: tuple[int, ...]
    planes: tuple[int, ...]
    channels: int
    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]
    bits: int
    table: np.ndarray | None
    tag: int
    spacing: tuple[float, ...] | None
    notes: tuple[str, ...]

    @property
    def lossy(self) -> bool:
        return self.page.compression in _JPEGS

    def values(self) -> np.ndarray:
        """(C, *S), without alpha; black is the smallest value. With a palette its indices, (1, *S)."""
        array = self.series.asarray().transpose(self.order).reshape(self.planes)
        photometric = self.page.photometric
        if photometric == PHOTOMETRIC.SEPARATED or (photometric == PHOTOMETRIC.YCBCR and not self.lossy):
            mode = "CMYK" if photometric == PHOTOMETRIC.SEPARATED else "YCbCr"
            flat = np.ascontiguousarray(np.moveaxis(array[: len(mode) if mode == "CMYK" else 3], 0, -1))
            rows = flat.reshape(-1, *flat.shape[-2:])
            rgb = np.asarray(Image.frombytes(mode, rows.shape[1::-1], rows.tobytes()).convert("RGB"))
            return np.moveaxis(rgb.reshape(*flat.shape[:-1], 3), -1, 0)
        array = array[: 1 if self.table is not None else self.channels]
        array = array.astype(self.dtype, copy=False)
        if photometric == PHOTOMETRIC.MINISWHITE and self.dtype.kind == "u":
            array = (2**self.bits - 1) - array
        return array.astype(self.dtype, copy=False)


class _Complaints(logging.Handler):
    """What tifffile says of a file goes to its log only; here it is kept, for each thread, and not printed."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.of_thread = threading.local()

    def emit(self, record: logging.LogRecord) -> None:
        self.of_thread.__dict__.setdefault("texts", []).append(record.getMessage())


_COMPLAINTS = _Complaints()
logging.getLogger("tifffile").addHandler(_COMPLAINTS)


@contextmanager
def _opened(path: Path) -> Iterator[_Opened]:
    texts: list[str] = []
    _COMPLAINTS.of_thread.texts = texts
    with opened(path, "a TIFF") as file, tifffile.TiffFile(file, name=path.name) as tiff:
        described = _described(path, tiff)
        if bad := next((text for text in texts if "page offset" in text or "circular" in text), None):
            raise DataError(f"{path}: truncated or damaged: pages are missing ({bad})")
        yield described


def _described(path: Path, tiff: tifffile.TiffFile) -> _Opened:
    """All that the header says, or why the file is refused."""
    notes: list[str] = []
    several = [s for s in tiff.series if not (s.keyframe.is_reduced or s.keyframe.is_mask)] or tiff.series[:1]
    if left := len(tiff.series) - len(several) + sum(len(s.levels) - 1 for s in several):
        notes.append(f"{left} previews or further sizes left out")
    if len(several) != 1:
        sizes = ", ".join("x".join(map(str, s.shape)) for s in several[:5])
        raise DataError(
            f"{path}: holds {len(several)} pictures of unlike size or type ({sizes}); one picture, or pages alike, are "
            "read",
            hint="save each as a file of its own",
        )
    [series] = several
    page: Any = series.keyframe
    photometric = page.photometric
    if photometric not in (*_GREY, *_COLOUR, PHOTOMETRIC.PALETTE):
        name = getattr(photometric, "name", photometric)
        raise DataError(f"{path}: colours of the kind {name} are not read", hint="save it as grey or RGB")
    dtype = np.dtype(np.uint8) if series.dtype == bool else series.dtype
    if dtype is None or dtype.kind not in "uif":
        raise DataError(f"{path}: pixels of type {dtype} are not read")
    bits = page.bitspersample if isinstance(page.bitspersample, int) else max(page.bitspersample)
    if photometric in (PHOTOMETRIC.SEPARATED, PHOTOMETRIC.YCBCR) and dtype != np.uint8:
        raise DataError(f"{path}: {photometric.name} colours of {bits} bits are not read", hint="save it as RGB")

    order, planes, deep = _axes(path, series)
    samples, shape = planes[0], planes[1:]
    fits(path, shape, samples)
    if page.is_tiled and page.tilewidth * page.tilelength > max(4 * shape[-1] * shape[-2], 1 << 24):
        raise DataError(f"{path}: truncated or damaged: tiles of {page.tilewidth} x {page.tilelength} pixels")
    _complete(path, tiff, series, notes)
    _decodable(path, page)

    channels = samples
    if photometric in _COLOUR:
        channels = 3
        if photometric == PHOTOMETRIC.SEPARATED:
            notes.append("CMYK turned to RGB")
        extra = samples - (4 if photometric == PHOTOMETRIC.SEPARATED else 3)
        if extra < 0:
            raise DataError(f"{path}: {photometric.name} with {samples} samples a pixel")
    else:
        extra = min(sum(e in _ALPHA for e in page.extrasamples), samples - 1) if "S" in series.axes else 0
        channels -= extra
    if extra:
        notes.append("alpha dropped")
    table = None
    if photometric == PHOTOMETRIC.PALETTE:
        table = np.asarray(page.colormap).T  # uint16 (n, 3)
        # of 16 bits by the standard; some write 8
        table = (table if table.max(initial=0) < 256 else table >> 8).astype(np.uint8)
        channels = 1 if (table == table[:, :1]).all() else 3
        if dtype.kind != "u":
            raise DataError(f"{path}: a palette with indices of type {dtype}")
    if photometric == PHOTOMETRIC.MINISWHITE and dtype.kind != "u":
        notes.append(f"white-is-0 not applied: {dtype} has no white")
    if deep:
        notes.append(f"{shape[0]} pages read as the slices of a volume")
    if "T" in series.axes and deep:
        notes.append("moments in time read as slices")
    tag = orientation.valid(page.tags.valueof(orientation.TAG))
    spacing = _spacing(tiff, page, len(shape))
    dtype = dtype.newbyteorder("=")
    return _Opened(series, page, order, planes, channels, shape, dtype, bits, table, tag, spacing, tuple(notes))


def _axes(path: Path, series: tifffile.TiffPageSeries) -> tuple[tuple[int, ...], tuple[int, ...], bool]:
    """Order of the series' axes as (channels, slices, rows, columns), the shape then, and whether it has slices."""
    sizes = list(zip(series.axes, series.shape, strict=True))
    place = {
        "Y": [i for i, (a, _) in enumerate(sizes) if a == "Y"],
        "X": [i for i, (a, _) in enumerate(sizes) if a == "X"],
    }
    place["D"] = [i for i, (a, n) in enumerate(sizes) if a in _SLICES and n > 1]
    place["C"] = [i for i, (a, n) in enumerate(sizes) if a in "CS" and n > 1]
    rest = [i for i in range(len(sizes)) if i not in {i for group in place.values() for i in group}]
    known = len(place["Y"]) == len(place["X"]) == 1 and len(place["D"]) <= 1 and len(place["C"]) <= 1
    if not known or any(sizes[i][1] != 1 for i in rest):
        raise DataError(
            f"{path}: has axes {series.axes} of {series.shape}; read are rows and columns (YX), with channels or "
            "samples (C or S), with slices (Z) or pages alike",
            hint="save each volume or picture as a file of its own",
        )
    order = [*rest, *place["C"], *place["D"], *place["Y"], *place["X"]]
    shape = tuple(sizes[i][1] for i in (*place["C"], *place["D"], *place["Y"], *place["X"]))
    return tuple(order), shape if place["C"] else (1, *shape), bool(place["D"])


def _complete(path: Path, tiff: tifffile.TiffFile, series: tifffile.TiffPageSeries, notes: list[str]) -> None:
    """Refuse a truncated file, which tifffile may fill with zeros."""
    size, absent = tiff.filehandle.size, 0
    for page in series.pages:
        if page is None:  # pages alike, one behind another, of which the file describes the first
            continue
        for offset, count in zip(page.dataoffsets, page.databytecounts, strict=False):
            absent += offset == 0 or count == 0
            if offset + count > size:
                raise DataError(
                    f"{path}: truncated or damaged: pixels are said to be at {offset + count:,} of {size:,} bytes"
                )
    if absent:
        notes.append(f"{absent} strips or tiles are not in the file; read as 0")


def _decodable(path: Path, page: Any) -> None:
    if page.compression not in tifffile.TIFF.DECOMPRESSORS:
        raise DataError(
            f"{path}: compressed by {getattr(page.compression, 'name', page.compression)}, which no installed decoder "
            "reads",
            hint="save it uncompressed, or with LZW or Deflate",
        )


def _spacing(tiff: tifffile.TiffFile, page: Any, axes: int) -> tuple[float, ...] | None:
    """mm along the axes, where ImageJ or OME says so."""
    if tiff.is_ome and tiff.ome_metadata:
        found = dict(re.findall(r'\bPhysicalSize([XYZ](?:Unit)?)="([^"]*)"', tiff.ome_metadata.split("<Channel")[0]))
        sizes = [float(found.get(a, 0)) * _MM.get(found.get(f"{a}Unit", "µm"), 0) for a in "ZYX"[-axes:]]
    elif tiff.is_imagej and tiff.imagej_metadata:
        unit = _MM.get(str(tiff.imagej_metadata.get("unit", "")), 0)
        per_unit = [page.tags.valueof(tag) or (0, 1) for tag in ("YResolution", "XResolution")]
        sizes = [unit * float(tiff.imagej_metadata.get("spacing", 0))] if axes == 3 else []
        sizes += [unit * below / above if above else 0.0 for above, below in per_unit]
    else:
        return None
    return tuple(sizes) if all(np.isfinite(s) and s > 0 for s in sizes) else None
