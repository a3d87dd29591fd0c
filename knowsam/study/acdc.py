"""ACDC's download as the field uses it: slices to train on and volumes to measure on, as SSL4MIS has them.

Two frames of each of the first 100 patients have masks: end diastole, which becomes ``frame01``, and end systole,
``frame02``, as ``Info.cfg`` tells them (of patient090 the order of time is the other way round). Intensities are scaled
from the volume's smallest to its largest value to 0..1; slices are numbered from 1.
"""

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from knowsam import config
from knowsam.data.layout import show_tree
from knowsam.data.make_splits import make_folder
from knowsam.data.splits import inspect_splits
from knowsam.data.volume_files import Volume, h5_bytes, read_nifti
from knowsam.errors import DataError
from knowsam.files import write_bytes
from knowsam.study.experiment import portable_lists
from knowsam.study.published import Request, Result, fitting_lists, missing_cases, write_plain_experiment

_FILE = re.compile(r"(patient\d{3})_frame(\d{2})(_gt)?\.nii(\.gz)?\Z")
_LABELLED = "labelled_7cases"


@dataclass
class _Patient:
    images: dict[int, Path] = field(default_factory=dict)
    masks: dict[int, Path] = field(default_factory=dict)
    phases: dict[str, int] = field(default_factory=dict)


def prepare_acdc(request: Request) -> Result:
    """Lists and an experiment of the download; see the module.

    Args:
        request: where everything is and goes.
    Raises:
        DataError: not this download, or incomplete.
    """
    patients = _patients(request.folder)
    if not patients:
        raise DataError(
            f"{request.folder} is not the download: no patientNNN_frameNN.nii.gz. There are:\n"
            f"{show_tree(request.folder)}"
        )
    shipped = config.REPOSITORY / "data_splits" / "acdc"
    splits = inspect_splits(shipped, _LABELLED)[0]
    slices: dict[str, list[int]] = {}
    for case_id in splits.train:
        volume, _, number = case_id.partition("_slice_")
        slices.setdefault(volume, []).append(int(number))
    wanted = [*slices, *splits.val, *splits.test]
    names = {i: [f"{i}_slice_{k}" for k in slices[i]] if i in slices else [i] for i in sorted(wanted)}
    lacks = {i: lack for i in names if (lack := _lack(patients.get(i.partition("_")[0]), i))}
    warnings = missing_cases(list(dict.fromkeys(lacks.values())), "parts of the download", request)
    gone = {name for case_id in lacks for name in names[case_id]}
    root = request.data
    there = [i for i in names if i not in lacks]
    absent: list[str] = []
    for n, case_id in enumerate(there):
        made = _convert(patients[case_id.partition("_")[0]], case_id, root, slices.get(case_id))
        absent += [name for name, exists in zip(names[case_id], made, strict=True) if not exists]
        if request.progress:
            request.progress(n + 1, len(there))
    warnings += missing_cases(absent, "slices of the published lists", request)
    gone.update(absent)
    lists = fitting_lists(request, shipped, gone, _LABELLED)
    data: dict[str, Any] = {"source": {"name": "h5_slices", "root": str(root.absolute())}, "labelled": _LABELLED}
    if lists != shipped:
        data["splits"] = portable_lists(lists)
    write_plain_experiment(request, base="acdc.yaml", data=data)
    notes = [f"{len(there)} volumes of {len(patients)} patients are in {root / 'data'}"]
    notes.append("frame01 is end diastole and frame02 end systole, by Info.cfg; slices are numbered from 1")
    if further := sorted(set(patients) - {case_id.partition("_")[0] for case_id in wanted}):
        notes.append(
            f"{len(further)} further patients are in none of the published lists: {', '.join(further[:3])}, ..."
        )
    return Result(request.experiment, lists, notes, warnings)


def _patients(folder: Path) -> dict[str, _Patient]:
    found: dict[str, _Patient] = {}
    for parent, folders, files in os.walk(folder):
        folders.sort()
        for name in files:
            match = _FILE.match(name)
            if match:
                patient = found.setdefault(match.group(1), _Patient())
                where = patient.masks if match.group(3) else patient.images
                where[int(match.group(2))] = Path(parent, name)
            elif name == "Info.cfg" and re.fullmatch(r"patient\d{3}", Path(parent).name):
                found.setdefault(Path(parent).name, _Patient()).phases |= _phases(Path(parent, name))
    return dict(sorted(found.items()))


def _phases(path: Path) -> dict[str, int]:
    text = path.read_text(encoding="utf-8", errors="replace")
    return {key: int(number) for key, number in re.findall(r"(?m)^\s*(ED|ES)\s*:\s*(\d+)\s*$", text)}


def _frame(patient: _Patient, case_id: str) -> int | None:
    return patient.phases.get("ED" if case_id.endswith("frame01") else "ES")


def _lack(patient: _Patient | None, case_id: str) -> str:
    """What of a volume is not there; empty if nothing."""
    name = case_id.partition("_")[0]
    if patient is None:
        return name
    frame = _frame(patient, case_id)
    if frame is None:
        return f"{name}/Info.cfg with ED and ES"
    for files, end in ((patient.images, ""), (patient.masks, "_gt")):
        if frame not in files:
            return f"{name}_frame{frame:02d}{end}.nii.gz"
    return ""


def _convert(patient: _Patient, case_id: str, root: Path, slices: list[int] | None) -> list[bool]:
    """Write a volume, or slices of it; what is there already stays. Whether each of them exists in the volume."""
    files = [root / "data" / f"{case_id}.h5"]
    if slices is not None:
        files = [root / "data" / "slices" / f"{case_id}_slice_{k}.h5" for k in slices]
    if all(file.is_file() for file in files):
        return [True] * len(files)
    frame = _frame(patient, case_id)
    assert frame is not None  # as _lack has seen
    image, mask = read_nifti(patient.images[frame]), read_nifti(patient.masks[frame])
    if image.array.shape != mask.array.shape:
        raise DataError(f"{case_id}: the mask is {mask.array.shape}, the image {image.array.shape} (D, H, W)")
    if strange := sorted(set(np.unique(mask.array).tolist()) - {0, 1, 2, 3}):
        raise DataError(f"{patient.masks[frame]}: holds {strange[:5]}; ACDC's masks hold 0 to 3")
    values = image.array.astype(np.float64)
    low, high = float(values.min()), float(values.max())
    scaled = Volume(((values - low) / ((high - low) or 1.0)).astype(np.float32), image.spacing)
    labels = mask.array.astype(np.uint8)
    if slices is None:
        _write(files[0], scaled.array, labels, scaled.spacing)
        return [True]
    there = [k <= len(labels) for k in slices]
    for k, file, exists in zip(slices, files, there, strict=True):
        if exists:
            _write(file, scaled.array[k - 1], labels[k - 1], scaled.spacing[1:])
    return there


def _write(path: Path, image: np.ndarray, label: np.ndarray, spacing: tuple[float, ...]) -> None:
    make_folder(path.parent)
    write_bytes(path, h5_bytes(image, label, spacing))
