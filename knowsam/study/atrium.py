"""The left atrium of the 2018 challenge: the organisers' NRRD files, or UA-MT's HDF5, to NIfTI volumes and lists."""

import gzip
import os
from pathlib import Path

import numpy as np
import yaml

from knowsam import config
from knowsam.data.layout import show_tree
from knowsam.data.make_splits import make_folder
from knowsam.data.splits import inspect_splits
from knowsam.data.volume_files import Volume, nifti_bytes, read_h5, read_nrrd
from knowsam.errors import DataError
from knowsam.files import write_bytes, write_text
from knowsam.study.experiment import base_file, portable_lists, recipe_file, volume_lines
from knowsam.study.published import Request, Result, fitting_lists, missing_cases

SPACING = 0.625
"""mm along every axis, of all scans of the challenge."""

_LABELLED = "labelled_8cases"


def prepare_la(request: Request) -> Result:
    """Volumes, lists and an experiment of the download.

    Args:
        request: where everything is and goes.
    Raises:
        DataError: not this download, or incomplete.
    """
    cases = _cases(request.folder)
    if not cases:
        raise DataError(
            f"{request.folder} is not the download: no folder with lgemri.nrrd and laendo.nrrd, or with mri_norm2.h5. "
            f"There are:\n{show_tree(request.folder)}"
        )
    shipped = config.REPOSITORY / "data_splits" / "la"
    splits = inspect_splits(shipped, _LABELLED)[0]
    wanted = sorted([*splits.train, *splits.val, *splits.test])
    missing = [i for i in wanted if i not in cases]
    warnings = missing_cases(missing, "cases of the published lists", request)
    there = [i for i in wanted if i in cases]
    for n, case_id in enumerate(there):
        _convert(case_id, cases[case_id], request.data)
        if request.progress:
            request.progress(n + 1, len(there))
    lists = fitting_lists(request, shipped, missing, _LABELLED)
    cropped = sum(cases[i].suffix == ".h5" for i in there)
    notes = [f"{len(there)} volumes are in {request.data}, of {SPACING} mm where the files do not say"]
    if cropped:
        notes.append(
            f"{cropped} of them are UA-MT's, cut out around the true mask before anything is learned: results are "
            "those of the field, but not of whole scans"
        )
    if further := sorted(set(cases) - set(wanted)):
        notes.append(f"{len(further)} further cases are in none of the lists: {', '.join(further[:3])}, ...")
    make_folder(request.experiment.parent)
    write_text(request.experiment, experiment_text(request, lists))
    if hasattr(config.Config().data, "patch_size"):
        config.load_config(request.experiment)
    else:
        warnings.append("this version trains on pictures only: the experiment is for one that trains on volumes")
    return Result(request.experiment, lists, notes, warnings)


def experiment_text(request: Request, lists: Path) -> str:
    """The experiment as YAML: patches as the field takes them, z-scored by case.

    Args:
        request: where everything is.
        lists: folder of the lists.
    """
    patch = [80, 112, 112] if request.recipe == "full" else [32, 64, 64]
    source = {"name": "volumes", "root": str(request.data.absolute()), "image_dir": "images", "mask_dir": "labels"}
    data = {
        "source": source,
        "splits": portable_lists(lists),
        "labelled": _LABELLED,
        "classes": ["background", "left atrium"],
    }
    head = {
        "inherits": base_file(request.experiment, recipe_file(request.recipe, volumes=True)),
        "name": request.experiment.stem,
        "data": data,
    }
    lines = [
        f"# {request.experiment.stem}: written by {request.command or 'knowsam prepare la'}",
        yaml.safe_dump(head, sort_keys=False, width=120).rstrip(),
        *volume_lines(patch, {"name": "zscore", "scope": "case"}, request.recipe),
        "  seed: 0",
    ]
    return "\n".join(lines) + "\n"


def _cases(folder: Path) -> dict[str, Path]:
    """Id -> the file of the image; whole scans before UA-MT's."""
    found: dict[str, Path] = {}
    for parent, folders, files in os.walk(folder):
        folders.sort()
        if {"lgemri.nrrd", "laendo.nrrd"} <= set(files):
            found[Path(parent).name] = Path(parent, "lgemri.nrrd")
        elif "mri_norm2.h5" in files:
            found.setdefault(Path(parent).name, Path(parent, "mri_norm2.h5"))
    return found


def _convert(case_id: str, path: Path, root: Path) -> None:
    """Image and mask as NIfTI; what is there already stays."""
    targets = [root / kind / f"{case_id}.nii.gz" for kind in ("images", "labels")]
    if all(target.is_file() for target in targets):
        return
    if path.suffix == ".h5":
        image, mask = (read_h5(path, key, SPACING) for key in ("image", "label"))
    else:
        image, mask = read_nrrd(path), read_nrrd(path.with_name("laendo.nrrd"))
    if image.array.shape != mask.array.shape:
        raise DataError(f"{path}: the mask is {mask.array.shape}, the image {image.array.shape} (D, H, W)")
    if strange := sorted(set(np.unique(mask.array).tolist()) - {0, 1, 255}):
        raise DataError(f"{path.parent}: the mask holds {strange[:5]}; needed are 0 and 1, or 0 and 255")
    atrium = Volume((mask.array > 0).astype(np.uint8), image.spacing, image.affine)
    for target, volume in zip(targets, (image, atrium), strict=True):
        make_folder(target.parent)
        write_bytes(target, gzip.compress(nifti_bytes(volume), compresslevel=6, mtime=0))
