"""DICOM volumes: a folder with the slices of one series, or a file whose frames are slices."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from knowsam.errors import DataError
from knowsam.io.dicom_file import (
    Frame,
    channels_of,
    check_deflated,
    dataset_of,
    frame_of,
    frames_of,
    parsed,
    pixel_spacing,
    value_type,
)
from knowsam.io.kind import suffix
from knowsam.io.opening import fits, medical, opened
from knowsam.io.stored import Reading, Stored
from knowsam.io.volume_grid import VolumeGrid

EXTENSIONS = (".dcm", ".dicom", ".ima")
DIRECTORY = "DICOMDIR"

_PLACE = ("Rows", "ImagePositionPatient", "ImageOrientationPatient")
# Of a file with frames: what it says of all, and what its groups say of one.
_OF_ALL = "Rows Columns BitsAllocated BitsStored HighBit PixelRepresentation SamplesPerPixel PhotometricInterpretation"
_OF_ONE = "PixelSpacing ImageOrientationPatient ImagePositionPatient RescaleSlope RescaleIntercept WindowCenter"
_OF_ONE += " WindowWidth VOILUTFunction VOILUTSequence"


class Slice(NamedTuple):
    """One slice: its file, its tags without pixels, and which frame of the file it is (None: the only one)."""

    path: Path
    tags: Any
    frame: int | None = None

    @property
    def name(self) -> str:
        """For messages."""
        return self.path.name if self.frame is None else f"frame {self.frame + 1}"


class Series(NamedTuple):
    """The slices of one volume in order, where they lie, and notes."""

    slices: list[Slice]
    grid: VolumeGrid
    notes: tuple[str, ...]

    @property
    def dtype(self) -> np.dtype[np.generic]:
        """Of the volume."""
        return np.result_type(*(value_type(s.tags) for s in self.slices))


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
                check_deflated(path)
                tags = parsed(file, pixels=False)
        except DataError:
            if strict:
                raise
            continue
        if all(name in tags for name in _PLACE) and frames_of(tags) == 1:
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
            if ending in EXTENSIONS or (not ending and _begins_as_dicom(path)):
                found.append(path)
    return found


def _series_uid(path: Path) -> str | None:
    with opened(path, "a DICOM file") as file:
        uid = parsed(file, pixels=False).get("SeriesInstanceUID")
    return None if uid is None else str(uid)


def _begins_as_dicom(path: Path) -> bool:
    with opened(path, "a file") as file:
        return file.read(132)[128:] == b"DICM"


def series_in(folder: Path, reading: Reading) -> Series:
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
    return _stacked(folder, slices, notes, reading)


def frames_in(path: Path, reading: Reading) -> Series | None:
    """The slices that a file of several frames holds; None for a file of one.

    Raises:
        DataError: frames that say not where in the patient they lie, such as a film; or as ``series_in``.
    """
    with dataset_of(path, pixels=False) as tags:
        count, groups = frames_of(tags), tags.get("PerFrameFunctionalGroupsSequence") or []
        if count == 1:
            return None
        slices = [Slice(path, _frame_tags(tags, group), n) for n, group in enumerate(groups)]
    if len(slices) != count or not all(name in s.tags for s in slices for name in _PLACE):
        raise DataError(
            f"{path}: holds {count} frames that do not say where in the patient they lie; one frame per file is read",
            hint="save it as single frames, or as NIfTI",
        )
    return _stacked(path, slices, [], reading)


def _frame_tags(tags: Any, group: Any) -> Any:
    """Tags as a file of this frame alone would have them."""
    own = medical("pydicom").Dataset()
    own.file_meta = tags.file_meta
    for name in _OF_ALL.split():
        if name in tags:
            setattr(own, name, tags[name].value)
    for shared in (*(tags.get("SharedFunctionalGroupsSequence") or []), group):
        for sequence in shared:
            for item in sequence.value if sequence.VR == "SQ" and not sequence.tag.is_private else ():
                for name in _OF_ONE.split():
                    if name in item:
                        setattr(own, name, item[name].value)
    return own


def _stacked(where: Path, slices: list[Slice], notes: list[str], reading: Reading) -> Series:
    """Slices in order of their place along their normal, proven to be one volume."""
    first = slices[0].tags
    direction = np.array(first.ImageOrientationPatient, float)
    for name in ("Rows", "Columns", "PixelSpacing", "ImageOrientationPatient"):
        values = [np.ravel(np.array(s.tags.get(name, 0), float)) for s in slices]
        unlike = [s.name for s, v in zip(slices, values, strict=True) if not np.allclose(v, values[0], atol=1e-3)]
        if unlike:
            raise DataError(
                f"{where}: slices of one series differ in {name}: {slices[0].name} against " + ", ".join(unlike[:5]),
                hint="take out what does not belong to the volume, such as an overview picture",
            )
    if any(channels_of(s.tags) != 1 for s in slices):
        raise DataError(f"{where}: slices in colour are not read as a volume")
    row, column = direction[:3], direction[3:]
    normal = np.cross(row, column)
    slices.sort(key=lambda s: float(np.array(s.tags.ImagePositionPatient, float) @ normal))
    at = np.array([s.tags.ImagePositionPatient for s in slices], float)
    gaps = np.diff(at @ normal)
    usual = float(np.median(gaps))
    if gaps.min() < 1e-3:
        n = int(np.argmin(gaps))
        raise DataError(
            f"{where}: two slices lie at one place, {slices[n].name} and {slices[n + 1].name}",
            hint="put each phase or moment into a folder of its own",
        )
    if gaps.max() > 1.5 * usual or gaps.min() < usual / 1.5:
        n = int(np.argmax(np.abs(gaps - usual)))
        raise DataError(
            f"{where}: slices are {usual:g} mm apart, but {slices[n].name} and {slices[n + 1].name} are "
            f"{gaps[n]:g} mm: is one missing?",
            hint="complete the series, or convert it to NIfTI by a tool that resamples it",
        )
    if np.ptp(gaps) > 0.02 * usual:
        notes.append(f"slices are {gaps.min():g} to {gaps.max():g} mm apart; taken as even")
    rows, columns = int(first.Rows), int(first.Columns)
    fits(where, (len(slices), rows, columns))
    step = (at[-1] - at[0]) / (len(slices) - 1)
    if np.linalg.norm(step - normal * (step @ normal)) > 0.01 * np.linalg.norm(step):
        notes.append("the slices are tilted against their stack; the affine says how")
    spacing, said = pixel_spacing(first)
    height, width = spacing or (1.0, 1.0)
    notes += said if spacing else ["the slices name no pixel spacing; taken as 1 mm"]
    affine = np.eye(4)
    affine[:3] = np.stack([row * width, column * height, step, at[0]], axis=1)
    affine[:2] *= -1  # from left, posterior, superior to right, anterior, superior
    return Series(slices, VolumeGrid((columns, rows, len(slices)), affine, reading.slice_axis), tuple(notes))


def _pictures(series: Series) -> Iterator[Frame]:
    pixel_array = medical("pydicom").pixels.pixel_array
    if series.slices[0].frame is not None:
        with dataset_of(series.slices[0].path) as dataset:
            for one in series.slices:
                yield frame_of(one.tags, pixel_array(dataset, index=one.frame))
        return
    for one in series.slices:
        with dataset_of(one.path) as dataset:
            yield frame_of(dataset, pixel_array(dataset))


def read_series(series: Series) -> Stored:
    """(1, D, H, W), seen through one window: 40 HU are one grey in every slice."""
    volume = np.empty(series.grid.shape[::-1], series.dtype)  # (slices, rows, columns)
    display: np.ndarray | None = None
    ranges: Counter[tuple[float, float] | None] = Counter()
    notes: Counter[str] = Counter()
    for n, frame in enumerate(_pictures(series)):
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
