"""Masks that another tool wrote, found by the ids of the cases."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from knowsam import io
from knowsam.errors import DataError

ARRAYS = (".nii", ".nii.gz", ".h5", ".hdf5", ".npz", ".npy")
"""Extensions of arrays, beside those of pictures."""


@dataclass(frozen=True)
class Found:
    """The masks of a folder.

    Attributes:
        paths: case id -> its file.
        missing: ids without a file.
        strangers: files that belong to no case, by their name below the folder.
    """

    paths: dict[str, Path]
    missing: list[str] = field(default_factory=list)
    strangers: list[str] = field(default_factory=list)


def find_masks(folder: str | Path, case_ids: Sequence[str], *, suffix: str = "") -> Found:
    """The file of each case: its path below the folder without extension is the id, or the id's last part.

    Args:
        folder: with its subfolders.
        case_ids: to look for.
        suffix: what names have after the id, such as ``_pred``.
    Raises:
        NotFoundError: no such folder.
        DataError: two files of one case, or two cases whose last parts are alike and that only these could tell apart.
    """
    folder = Path(folder)
    endings = frozenset([*io.PICTURES, *ARRAYS])
    by_name: dict[str, list[Path]] = {}
    for files in io.scan_folder(folder, endings, lambda path: False, series=False).files.values():
        for file in files:
            name = file.relative_to(folder).as_posix()
            extension = next((e for e in ARRAYS if name.lower().endswith(e)), file.suffix)
            stem = name[: -len(extension)]
            if suffix and not stem.endswith(suffix):
                continue
            by_name.setdefault(stem.removesuffix(suffix) if suffix else stem, []).append(file)
    by_last: dict[str, list[str]] = {}
    for case in case_ids:
        by_last.setdefault(case.rpartition("/")[2], []).append(case)
    paths: dict[str, Path] = {}
    missing = []
    used: set[Path] = set()
    for case in case_ids:
        files = by_name.get(case) or []
        short = case.rpartition("/")[2]
        if not files and short in by_name:
            if len(by_last[short]) > 1:
                raise DataError(
                    f"{by_name[short][0]} may be the mask of {' or of '.join(by_last[short])}",
                    hint="Put the masks into folders as in the ids.",
                )
            files = by_name[short]
        if len(files) > 1:
            raise DataError(f"case {case} has {len(files)} masks: {', '.join(map(str, files))}", hint="Leave one.")
        if files:
            paths[case] = files[0]
            used.add(files[0])
        else:
            missing.append(case)
    every = sorted(file for files in by_name.values() for file in files)
    return Found(paths, missing, [file.relative_to(folder).as_posix() for file in every if file not in used])


def read_raw(path: Path, reading: io.Reading = io.DEFAULT) -> np.ndarray:
    """Values of a mask as they are stored, on the grid that ``reading`` gives of its image.

    Args:
        path: any file that ``knowsam.io`` reads, or npy. Of h5 and npz, the array ``reading.mask_key``, or ``label``,
            or ``mask``, or the only one.
        reading: by which rules.
    Returns:
        Unsigned integers (H, W) or (D, H, W), of a picture also colours (H, W, 3).
    Raises:
        NotFoundError, DataError: not there, damaged, or no mask.
    """
    if path.suffix.lower() == ".npy":
        try:
            array = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"{path}: not an npy file that can be read ({error})") from error
        return io.raw_labels(io.in_order(array, reading), str(path))
    names = io.array_names(path)
    if names:
        key = next((key for key in (reading.mask_key, "label", "mask") if key in names), None) or _only(names, path)
        reading = replace(reading, mask_key=key)
    return io.read_mask(path, reading).array


def _only(names: list[str], path: Path) -> str:
    if len(names) != 1:
        raise DataError(f"{path}: holds {', '.join(names)}; one array, or one called label, is needed")
    return names[0]
