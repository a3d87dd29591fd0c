"""One DICOM file: opening it, its values in native units, and how they are meant to be seen; by pydicom."""

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from knowsam.errors import DataError
from knowsam.io.opening import MAX_VOXELS, fits, medical, opened

_PIXELS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
_DEFLATED = "1.2.840.10008.1.2.1.99"


class Frame(NamedTuple):
    """A picture: values (C, H, W), and the rest as in ``Stored``."""

    values: np.ndarray
    full_range: tuple[float, float] | None
    display: np.ndarray | None
    notes: tuple[str, ...]


@contextmanager
def dataset_of(path: Path, *, pixels: bool = True) -> Iterator[Any]:
    """A file with a picture or several in it, its size proven harmless and its compression known.

    Args:
        path: the file.
        pixels: False: the tags before the pixels are enough.
    Raises:
        DataError: no picture, too large, damaged, or compressed by what no installed decoder reads.
    """
    with opened(path, "a DICOM image") as file:
        check_deflated(path)
        dataset = parsed(file, pixels)
        where = str(path)
        if "Rows" not in dataset or (pixels and not any(name in dataset for name in _PIXELS)):
            if "SOPClassUID" not in dataset:
                raise ValueError("no pixels, and nothing that says what it is")
            kind = getattr(dataset.SOPClassUID, "name", "")
            raise DataError(f"{where}: not a DICOM image that can be read: it holds no pixels ({kind})")
        size = (int(dataset.Rows), int(dataset.Columns))
        frames = frames_of(dataset)
        fits(path, size if frames == 1 else (frames, *size), int(dataset.get("SamplesPerPixel", 1)))
        if pixels:
            _check_decoder(path, dataset)
        yield dataset


def parsed(file: BinaryIO, pixels: bool) -> Any:
    """A data set, whether or not the file begins as it should."""
    pydicom = medical("pydicom")
    try:
        return pydicom.dcmread(file, stop_before_pixels=not pixels)
    except pydicom.errors.InvalidDicomError:  # old files begin without preamble
        file.seek(0)
        dataset = pydicom.dcmread(file, stop_before_pixels=not pixels, force=True)
        if "TransferSyntaxUID" not in dataset.file_meta:
            implicit, little = dataset.original_encoding
            uid = pydicom.uid
            explicit = uid.ExplicitVRLittleEndian if little else uid.ExplicitVRBigEndian
            dataset.file_meta.TransferSyntaxUID = uid.ImplicitVRLittleEndian if implicit else explicit
        return dataset


def check_deflated(path: Path) -> None:
    """Refuse a file that inflates without end: pydicom inflates all of it before a tag can be read."""
    pydicom = medical("pydicom")
    try:
        meta = pydicom.filereader.read_file_meta_info(path)
    except Exception:  # no preamble, or damaged: dcmread will say so
        return
    if meta.get("TransferSyntaxUID") != _DEFLATED:
        return
    with open(path, "rb") as file:
        file.seek(144 + int(meta.FileMetaInformationGroupLength))
        inflate, total, rest = zlib.decompressobj(-15), 0, file.read(1 << 20)
        while rest:
            total += len(inflate.decompress(rest, 1 << 24))
            rest = inflate.unconsumed_tail or file.read(1 << 20)
            if total > MAX_VOXELS:
                raise DataError(f"{path}: inflates to more than {MAX_VOXELS:,} bytes; this is refused")


def _check_decoder(path: Path, dataset: Any) -> None:
    syntax = dataset.file_meta.get("TransferSyntaxUID") if hasattr(dataset, "file_meta") else None
    if syntax is None or not syntax.is_compressed or syntax == _DEFLATED:
        return
    try:
        able = medical("pydicom").pixels.get_decoder(syntax).is_available
    except NotImplementedError:
        able = False
    if not able:
        raise DataError(
            f"{path}: compressed by {syntax.name}, which no installed decoder reads",
            hint="pip install 'pylibjpeg[all]' or python-gdcm, or save it uncompressed",
        )


def frames_of(tags: Any) -> int:
    """How many pictures the file holds."""
    return int(tags.get("NumberOfFrames") or 1)


def channels_of(tags: Any) -> int:
    """1, or 3 of colour and of palettes."""
    return 3 if tags.get("SamplesPerPixel", 1) == 3 or tags.get("PhotometricInterpretation") == "PALETTE COLOR" else 1


def _number(value: Any) -> float | None:
    """A DICOM number, or the first of several."""
    return None if value is None or np.size(value) == 0 else float(np.ravel(value)[0])


def _scaling(tags: Any) -> tuple[float, float]:
    slope, intercept = _number(tags.get("RescaleSlope")), _number(tags.get("RescaleIntercept"))
    return (1.0, 0.0) if slope is None or intercept is None else (slope, intercept)


def _value_range(tags: Any) -> tuple[float, float]:
    """Smallest and largest value that the bits can hold, after the modality LUT or rescaling."""
    if tags.get("ModalityLUTSequence"):
        return 0.0, float(2 ** int(tags.ModalityLUTSequence[0].LUTDescriptor[2]) - 1)
    bits, signed = int(tags.BitsStored), int(tags.get("PixelRepresentation", 0))
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    slope, intercept = _scaling(tags)
    ends = sorted((low * slope + intercept, high * slope + intercept))
    return ends[0], ends[1]


def value_type(tags: Any) -> np.dtype[np.generic]:
    """The stored type where nothing is scaled, integers where the scaling keeps them whole, else float32."""
    allocated = max(8, int(tags.BitsAllocated))
    if tags.get("PhotometricInterpretation") == "PALETTE COLOR":
        return np.dtype(np.uint8 if int(tags.RedPaletteColorLookupTableDescriptor[2]) <= 8 else np.uint16)
    if "FloatPixelData" in tags or "DoubleFloatPixelData" in tags:
        return np.dtype(f"f{allocated // 8}")
    if tags.get("ModalityLUTSequence"):
        return np.dtype(np.uint8 if _value_range(tags)[1] < 256 else np.uint16)
    if _scaling(tags) == (1.0, 0.0):
        return np.dtype(f"{'i' if tags.get('PixelRepresentation', 0) else 'u'}{allocated // 8}")
    if all(number.is_integer() for number in _scaling(tags)):
        low, high = _value_range(tags)
        for dtype in (np.int16, np.int32):
            if np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max:
                return np.dtype(dtype)
    return np.dtype(np.float32)


def frame_of(tags: Any, array: np.ndarray) -> Frame:
    """Values of one picture, and how they are meant to be seen.

    Args:
        tags: of the picture.
        array: as pydicom decodes it: colours as RGB, palettes as indices.
    """
    pixels = medical("pydicom").pixels
    notes = ["overlay planes left out"] if any(0x6000 <= e.tag.group <= 0x60FF for e in tags) else []
    if tags.get("PhotometricInterpretation") == "PALETTE COLOR":
        array = pixels.apply_color_lut(array, tags)[..., :3]
    if array.ndim == 3:
        top = float(np.iinfo(array.dtype).max)
        if tags.PhotometricInterpretation != "PALETTE COLOR":
            top = float(2 ** int(tags.BitsStored) - 1)
        return Frame(np.ascontiguousarray(np.moveaxis(array, -1, 0)), (0.0, top), None, tuple(notes))

    dtype, (low, high) = value_type(tags), _value_range(tags)
    if tags.get("ModalityLUTSequence") and tags.ModalityLUTSequence[0].LUTDescriptor[2] > 8:
        tags.ModalityLUTSequence[0].LUTDescriptor[2] = 16  # of 10 or 12 bits, too, which pydicom does not know
    values = pixels.apply_rescale(array, tags)
    window, linear, said = _window(tags)
    notes += said
    display = None
    if not linear:
        display = _display(values, tags)[None]
    elif window is None and dtype.kind == "u":
        window = (low, high)
    values = values.astype(dtype)
    inverse = tags.get("PhotometricInterpretation") == "MONOCHROME1"
    if inverse and any(name in tags for name in _PIXELS[1:]):
        notes.append("MONOCHROME1 of floats not turned round: they have no white")
    elif inverse:
        notes.append("MONOCHROME1 turned round")
        values = (low + high - values).astype(dtype)
        window = None if window is None else (low + high - window[1], low + high - window[0])
        display = None if display is None else 1 - display
    return Frame(np.ascontiguousarray(values)[None], window, display, tuple(notes))


def _display(values: np.ndarray, dataset: Any) -> np.ndarray:
    """Values seen through the VOI LUT Sequence or the SIGMOID window, 0..1 of the range that either can give."""
    black, white = _value_range(dataset)
    if dataset.get("VOILUTSequence"):
        item = dataset.VOILUTSequence[0]
        entries, first, bits = item.LUTDescriptor
        entries = entries or 65536
        black, white = 0.0, float(2 ** int(bits) - 1)
        if item["LUTData"].VR == "OW" and len(item.LUTData) < 2 * entries:  # a byte an entry
            item.LUTData = np.frombuffer(item.LUTData, np.uint8).astype("<u2").tobytes()
        # pydicom counts places in the table by the type of its entries: of 8 bits it would know 256 places
        item.LUTDescriptor[2] = 16
        values = np.clip(np.rint(values), first, first + entries - 1).astype(np.int32)
    seen = medical("pydicom").pixels.apply_voi_lut(values, dataset)
    if dataset.get("VOILUTSequence"):  # frames may share the table
        dataset.VOILUTSequence[0].LUTDescriptor[2] = bits
    display: np.ndarray = np.clip((seen - black) / (white - black), 0, 1).astype(np.float32)
    return display


def _window(tags: Any) -> tuple[tuple[float, float] | None, bool, list[str]]:
    """Black and white of the first window, whether two numbers can say it, and notes."""
    if tags.get("VOILUTSequence"):
        return None, False, ["seen through the VOI LUT Sequence"]
    centre, width = _number(tags.get("WindowCenter")), _number(tags.get("WindowWidth"))
    if centre is None or width is None:
        return None, True, []
    function = str(tags.get("VOILUTFunction") or "LINEAR").upper()
    several = np.size(tags.WindowCenter)
    notes = [f"{several} windows, of which the first is used"] if several > 1 else []
    if width <= 0 or (function == "LINEAR" and width < 1) or function not in ("LINEAR", "LINEAR_EXACT", "SIGMOID"):
        return None, True, [f"window left out: width {width:g}, function {function}"]
    if function == "SIGMOID":
        return None, False, [*notes, "seen through a SIGMOID window"]
    if function == "LINEAR":  # PS3.3 C.11.2.1.2.1
        centre, width = centre - 0.5, max(width - 1, 1e-6)
    return (centre - width / 2, centre + width / 2), True, notes


def pixel_spacing(tags: Any) -> tuple[tuple[float, ...] | None, tuple[str, ...]]:
    """mm between rows and between columns, or None; and notes."""
    for name, note in (("PixelSpacing", ()), ("ImagerPixelSpacing", ("spacing is that of the detector",))):
        sizes = tags.get(name)
        if sizes and len(sizes) == 2 and all(float(s) > 0 for s in sizes):
            return tuple(float(s) for s in sizes), note
    return None, ()
