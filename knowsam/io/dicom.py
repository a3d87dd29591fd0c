"""DICOM files, and folders that hold the slices of one series, by pydicom."""

import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, NamedTuple

import numpy as np

from knowsam.errors import DataError
from knowsam.io import raster
from knowsam.io.kind import Kind, labels_of, suffix
from knowsam.io.nifti import nifti_bytes
from knowsam.io.opening import MAX_VOXELS, fits, medical, opened
from knowsam.io.stored import Header, PredictionKind, Reading, Stored, StoredMask
from knowsam.io.volume_grid import VolumeGrid

_PIXELS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
DIRECTORY = "DICOMDIR"
_DEFLATED = "1.2.840.10008.1.2.1.99"


class Dicom(Kind):
    """A file of one frame is a picture; a folder of slices is a volume, sorted by where they lie in the patient.

    - values are those after the modality LUT or rescaling: HU of a CT;
    - ``full_range`` is the first linear window that the file names (LINEAR or LINEAR_EXACT), else 0 to the largest
      number of BitsStored where values are neither signed nor scaled;
    - a VOI LUT Sequence, which goes before windows, or a SIGMOID window gives ``display``;
    - MONOCHROME1 (small is white) is turned round within the range of its bits; palette colours become RGB.
    """

    name: ClassVar[str] = "DICOM"
    extensions: ClassVar[tuple[str, ...]] = (".dcm", ".dicom", ".ima")

    def sniff(self, head: bytes) -> bool:
        """The prefix behind the preamble."""
        return head[128:132] == b"DICM"

    def header(self, path: Path, reading: Reading) -> Header:
        """From the tags, of every slice of a series."""
        if path.is_dir():
            series = _series(path, reading)
            dtype = np.result_type(*(_value_type(s.tags) for s in series.slices))
            return Header(1, series.grid.canonical_shape, dtype, series.grid.spacing)
        with _dataset(path, pixels=False) as tags:
            shape = (int(tags.Rows), int(tags.Columns))
            return Header(_channels(tags), shape, _value_type(tags), _pixel_spacing(tags)[0])

    def read(self, path: Path, reading: Reading) -> Stored:
        """(C, H, W) of a file, (1, D, H, W) of a folder."""
        if path.is_dir():
            return _read_series(path, reading)
        with _dataset(path) as dataset:
            frame = _frame(dataset)
            spacing, notes = _pixel_spacing(dataset)
        return Stored(frame.values, spacing, frame.full_range, (*frame.notes, *notes), frame.display)

    def read_mask(self, path: Path, reading: Reading) -> StoredMask:
        """(H, W) or (D, H, W) of the values, windows left aside; or colours."""
        stored = self.read(path, reading)
        return StoredMask(labels_of(stored.array, str(path)), None, stored.notes)

    def grid(self, path: Path, reading: Reading) -> VolumeGrid | None:
        """Of a folder of slices."""
        return _series(path, reading).grid if path.is_dir() else None

    def extension(self, path: Path, kind: PredictionKind) -> str:
        """As of a picture; of a folder ``.nii.gz``."""
        return ".nii.gz" if path.is_dir() else raster.extension(kind)

    def encode(
        self, path: Path, kind: PredictionKind, values: np.ndarray, classes: Sequence[str], reading: Reading
    ) -> bytes:
        """As of a picture; of a folder a NIfTI volume in scanner coordinates, axes as the slices are stored."""
        if not path.is_dir():
            return raster.encode(kind, values, classes, tag=1, turned=False)
        nibabel = medical("nibabel")
        grid = _series(path, reading).grid
        header = nibabel.Nifti1Header()
        header.set_data_shape(grid.shape)
        header.set_sform(grid.affine, code=1)
        header.set_qform(grid.affine, code=1)
        header.set_xyzt_units("mm")
        return nifti_bytes(nibabel.Nifti1Image, header, grid, kind, values, grid.shape, ".nii.gz")


class Slice(NamedTuple):
    """One file of a series: where it is, and its tags without pixels."""

    path: Path
    tags: Any


class _Series(NamedTuple):
    slices: list[Slice]
    grid: VolumeGrid
    notes: tuple[str, ...]


class _Frame(NamedTuple):
    values: np.ndarray
    full_range: tuple[float, float] | None
    display: np.ndarray | None
    notes: tuple[str, ...]


# ---------------------------------------------------------------- one file


@contextmanager
def _dataset(path: Path, *, pixels: bool = True) -> Iterator[Any]:
    """A file with a picture of one frame in it, its size proven harmless."""
    with opened(path, "a DICOM image") as file:
        _check_deflated(path)
        dataset = _parsed(file, pixels)
        where = str(path)
        if "Rows" not in dataset or (pixels and not any(name in dataset for name in _PIXELS)):
            if "SOPClassUID" not in dataset:
                raise ValueError("no pixels, and nothing that says what it is")
            kind = getattr(dataset.SOPClassUID, "name", "")
            raise DataError(f"{where}: not a DICOM image that can be read: it holds no pixels ({kind})")
        frames = int(dataset.get("NumberOfFrames") or 1)
        if frames != 1:
            raise DataError(
                f"{where}: holds {frames} frames; one frame per file is read",
                hint="save it as single frames, or as NIfTI",
            )
        fits(path, (int(dataset.Rows), int(dataset.Columns)), int(dataset.get("SamplesPerPixel", 1)))
        if pixels:
            _check_decoder(path, dataset)
        yield dataset


def _parsed(file: BinaryIO, pixels: bool) -> Any:
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


def _check_deflated(path: Path) -> None:
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


def _channels(tags: Any) -> int:
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


def _value_type(tags: Any) -> np.dtype[np.generic]:
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


def _frame(dataset: Any) -> _Frame:
    """Values (C, H, W) in native units, and how they are meant to be seen."""
    pixels = medical("pydicom").pixels
    notes = ["overlay planes left out"] if any(0x6000 <= e.tag.group <= 0x60FF for e in dataset) else []
    array = pixels.pixel_array(dataset)  # colours come as RGB, palettes as indices
    if dataset.get("PhotometricInterpretation") == "PALETTE COLOR":
        array = pixels.apply_color_lut(array, dataset)[..., :3]
    if array.ndim == 3:
        top = float(np.iinfo(array.dtype).max)
        if dataset.PhotometricInterpretation != "PALETTE COLOR":
            top = float(2 ** int(dataset.BitsStored) - 1)
        return _Frame(np.ascontiguousarray(np.moveaxis(array, -1, 0)), (0.0, top), None, tuple(notes))

    dtype, (low, high) = _value_type(dataset), _value_range(dataset)
    if dataset.get("ModalityLUTSequence") and dataset.ModalityLUTSequence[0].LUTDescriptor[2] > 8:
        dataset.ModalityLUTSequence[0].LUTDescriptor[2] = 16  # of 10 or 12 bits, too, which pydicom does not know
    values = pixels.apply_rescale(array, dataset)
    window, linear, said = _window(dataset)
    notes += said
    display = None
    if not linear:
        display = _display(values, dataset)[None]
    elif window is None and dtype.kind == "u":
        window = (low, high)
    values = values.astype(dtype)
    if dataset.get("PhotometricInterpretation") == "MONOCHROME1" and dtype.kind in "ui":
        notes.append("MONOCHROME1 turned round")
        values = (low + high - values).astype(dtype)
        window = None if window is None else (low + high - window[1], low + high - window[0])
        display = None if display is None else 1 - display
    return _Frame(np.ascontiguousarray(values)[None], window, display, tuple(notes))


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


def _pixel_spacing(tags: Any) -> tuple[tuple[float, ...] | None, tuple[str, ...]]:
    for name, note in (("PixelSpacing", ()), ("ImagerPixelSpacing", ("spacing is that of the detector",))):
        sizes = tags.get(name)
        if sizes and len(sizes) == 2 and all(float(s) > 0 for s in sizes):
            return tuple(float(s) for s in sizes), note
    return None, ()


# ---------------------------------------------------------------- a folder of slices


def series_of(paths: Sequence[Path], *, strict: bool = True) -> tuple[dict[str, list[Slice]], list[Path]]:
    """Slices by series: two files or more of one SeriesInstanceUID that say where in the patient they lie.

    Args:
        paths: DICOM files, or what is named so.
        strict: a damaged file is an error; else it belongs to no series.
    Returns:
        The series, and the paths that belong to none, such as single pictures and files without pixels.
    """
    found: dict[str, list[Slice]] = {}
    for path in paths:
        try:
            with opened(path, "a DICOM image") as file:
                _check_deflated(path)
                tags = _parsed(file, pixels=False)
        except DataError:
            if strict:
                raise
            continue
        if all(name in tags for name in ("Rows", "ImagePositionPatient", "ImageOrientationPatient")):
            found.setdefault(str(tags.get("SeriesInstanceUID", "")), []).append(Slice(path, tags))
    series = {uid: slices for uid, slices in found.items() if len(slices) > 1}
    taken = {s.path for slices in series.values() for s in slices}
    return series, [path for path in paths if path not in taken]


def dicom_files(folder: Path) -> list[Path]:
    """Files of a folder, not of those below, that by name or content are DICOM; sorted."""
    found = []
    for path in sorted(folder.iterdir()):
        if path.is_file() and not path.name.startswith(".") and path.name != DIRECTORY:
            ending = suffix(path.name).lower()
            if ending in Dicom.extensions or (not ending and _begins_as_dicom(path)):
                found.append(path)
    return found


def _series_uid(path: Path) -> str | None:
    with opened(path, "a DICOM file") as file:
        uid = _parsed(file, pixels=False).get("SeriesInstanceUID")
    return None if uid is None else str(uid)


def _begins_as_dicom(path: Path) -> bool:
    with opened(path, "a file") as file:
        return file.read(132)[128:] == b"DICM"


def _series(folder: Path, reading: Reading) -> _Series:
    """The one series of a folder, in order.

    Raises:
        DataError: none, or several; slices of unlike size, spacing or direction; two at one place; some missing.
    """
    files = dicom_files(folder)
    series, others = series_of(files)
    if len(series) != 1:
        numbers = ", ".join(f"{len(s)} slices of series {s[0].tags.get('SeriesNumber', '?')}" for s in series.values())
        raise DataError(
            f"{folder}: {len(files)} DICOM files with {len(series)} series{' (' + numbers + ')' if numbers else ''}; "
            "needed is one, whose slices say where in the patient they lie",
            hint="put each series into a folder of its own" if series else "give the files one by one, as pictures",
        )
    [slices] = series.values()
    own = slices[0].tags.get("SeriesInstanceUID")
    if astray := [path.name for path in others if _series_uid(path) in (None, own)]:
        raise DataError(
            f"{folder}: {', '.join(astray[:5])} beside the slices of a series: damaged, or without a place in the "
            "patient",
            hint="replace the file, or take it away if it does not belong to the volume",
        )
    notes = [f"{len(others)} DICOM files that are not of the series left out"] if others else []
    first = slices[0].tags
    direction = np.array(first.ImageOrientationPatient, float)
    for name in ("Rows", "Columns", "PixelSpacing", "ImageOrientationPatient"):
        values = [np.ravel(np.array(s.tags.get(name, 0), float)) for s in slices]
        unlike = [s.path.name for s, v in zip(slices, values, strict=True) if not np.allclose(v, values[0], atol=1e-3)]
        if unlike:
            raise DataError(
                f"{folder}: slices of one series differ in {name}: {slices[0].path.name} against "
                + ", ".join(unlike[:5]),
                hint="take out what does not belong to the volume, such as an overview picture",
            )
    if any(_channels(s.tags) != 1 for s in slices):
        raise DataError(f"{folder}: slices in colour are not read as a volume")
    row, column = direction[:3], direction[3:]
    normal = np.cross(row, column)
    at = {s.path: np.array(s.tags.ImagePositionPatient, float) for s in slices}
    slices.sort(key=lambda s: float(at[s.path] @ normal))
    along = np.array([at[s.path] @ normal for s in slices])
    gaps = np.diff(along)
    usual = float(np.median(gaps))
    if gaps.min() < 1e-3:
        n = int(np.argmin(gaps))
        raise DataError(
            f"{folder}: two slices lie at one place, {slices[n].path.name} and {slices[n + 1].path.name}",
            hint="put each phase or moment into a folder of its own",
        )
    if gaps.max() > 1.5 * usual or gaps.min() < usual / 1.5:
        n = int(np.argmax(np.abs(gaps - usual)))
        raise DataError(
            f"{folder}: slices are {usual:g} mm apart, but {slices[n].path.name} and {slices[n + 1].path.name} are "
            f"{gaps[n]:g} mm: is one missing?",
            hint="complete the series, or convert it to NIfTI by a tool that resamples it",
        )
    if np.ptp(gaps) > 0.02 * usual:
        notes.append(f"slices are {gaps.min():g} to {gaps.max():g} mm apart; taken as even")
    rows, columns = int(first.Rows), int(first.Columns)
    fits(folder, (len(slices), rows, columns))
    step = (at[slices[-1].path] - at[slices[0].path]) / (len(slices) - 1)
    if np.linalg.norm(step - normal * (step @ normal)) > 0.01 * np.linalg.norm(step):
        notes.append("the slices are tilted against their stack; the affine says how")
    spacing, said = _pixel_spacing(first)
    height, width = spacing or (1.0, 1.0)
    notes += said if spacing else ["the slices name no pixel spacing; taken as 1 mm"]
    affine = np.eye(4)
    affine[:3] = np.stack([row * width, column * height, step, at[slices[0].path]], axis=1)
    affine[:2] *= -1  # from left, posterior, superior to right, anterior, superior
    return _Series(slices, VolumeGrid((columns, rows, len(slices)), affine, reading.slice_axis), tuple(notes))


def _read_series(folder: Path, reading: Reading) -> Stored:
    series = _series(folder, reading)
    dtype = np.result_type(*(_value_type(s.tags) for s in series.slices))
    volume = np.empty(series.grid.shape[::-1], dtype)  # (slices, rows, columns)
    display: np.ndarray | None = None
    ranges: Counter[tuple[float, float] | None] = Counter()
    notes: Counter[str] = Counter()
    for n, (path, _) in enumerate(series.slices):
        with _dataset(path) as dataset:
            frame = _frame(dataset)
        volume[n] = frame.values[0]
        ranges[frame.full_range] += 1
        notes.update(frame.notes)
        if frame.display is not None:
            display = np.zeros(volume.shape, np.float32) if display is None else display
            display[n] = frame.display[0]
    [(full_range, count)] = ranges.most_common(1)
    said = [text if n == len(volume) else f"{text} ({n} of {len(volume)} slices)" for text, n in notes.items()]
    if count < len(volume):
        said.append(f"{len(ranges)} windows in one series, of which the most frequent is used for all slices")
    if display is not None and full_range is not None:
        display = None
        said.append("VOI LUTs of single slices left out")
    said.append(f"{len(volume)} slices of one series, sorted by position")

    def canonical(values: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(series.grid.canonical(values.transpose(2, 1, 0)))[None]

    return Stored(
        canonical(volume),
        series.grid.spacing,
        full_range,
        (*series.notes, *said),
        None if display is None else canonical(display),
    )
