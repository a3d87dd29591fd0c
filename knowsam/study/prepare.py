"""Public data sets as their official downloads come: found by their layout, made into lists and an experiment."""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from knowsam import config
from knowsam.data.layout import find_layout, show_tree
from knowsam.data.splits import load_splits
from knowsam.errors import DataError, NotFoundError
from knowsam.study.acdc import prepare_acdc
from knowsam.study.archive import MARKS, is_archive, unpack
from knowsam.study.atrium import prepare_la
from knowsam.study.experiment import Recipe, experiment_places, write_experiment
from knowsam.study.published import Request, Result, write_plain_experiment
from knowsam.study.read import Study, StudyOptions, read_study

_DEEPEST = 5


@dataclass(frozen=True)
class Dataset:
    """A public data set.

    Attributes:
        title: for people.
        wants: what the official download consists of.
        where: where it is to be had; nothing is fetched from there.
        make: makes lists and experiment of a folder that holds the download.
    """

    title: str
    wants: str
    where: str
    make: Callable[[Request], Result]


def prepare(
    name: str,
    source: Path,
    out: Path,
    *,
    recipe: Recipe = "small",
    seed: int = 0,
    allow_missing: bool = False,
    force: bool = False,
    command: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> Result:
    """From a download to lists and an experiment.

    Archives are unpacked below ``out/data/NAME`` once; a folder is used where it lies. What an earlier call that was
    cut off has done is not done again.

    Args:
        name: a key of ``DATASETS``.
        source: the archive, or a folder that holds its files or several archives.
        out: gets ``data/``, ``data_splits/`` and ``experiments/``.
        recipe: what the experiment inherits.
        seed: of lists that are drawn.
        allow_missing: go on without cases that published lists name.
        force: replace an experiment and other lists.
        command: the command line that would do the same again.
        progress: called as (done, in all).
    Raises:
        NotFoundError: ``source`` is not there.
        DataError: it is not the download, or lacks what is needed; the message names what.
        ExistsError: the experiment is there already.
        StorageError: a write failed.
    """
    dataset = DATASETS[name]
    experiment, lists = experiment_places(out, name, force=force)
    if not source.exists():
        raise NotFoundError(f"{source} does not exist", hint=f"{dataset.title}: {dataset.where}. {dataset.wants}")
    data = out / "data" / name
    notes: list[str] = []
    folder = _unpacked(source, data, notes, progress)
    request = Request(name, folder, data, experiment, lists, recipe, seed, allow_missing, force, command, progress)
    try:
        result = dataset.make(request)
    except (DataError, NotFoundError) as error:
        raise type(error)(
            str(error), hint=error.hint or f"The download is {dataset.wants} ({dataset.where})"
        ) from error
    result.notes[:0] = notes
    return result


def _unpacked(source: Path, data: Path, notes: list[str], progress: Callable[[int, int], None] | None) -> Path:
    """The folder that holds the files: the one given, or where its archives were unpacked."""
    if source.is_dir():
        there = sorted(
            path for path in source.iterdir() if path.suffix.lower() not in _NO_ARCHIVES and is_archive(path)
        )
        if not there:
            return source
    else:
        there = [source]
    for archive in there:
        done = unpack(archive, data, progress=progress)
        text = f"{archive.name}: {done.files} files in {data}"
        text += f", {done.fresh} of them just unpacked" if done.fresh else ", unpacked before"
        if done.passed_over:
            text += "; passed over: " + ", ".join(f"{n} {kind}" for kind, n in done.passed_over.most_common(4))
        notes.append(text)
    return data


_NO_ARCHIVES = {".png", ".jpg", ".jpeg", ".nii", ".h5", ".nrrd", ".txt", ".csv", ".json"}


def find_below(folder: Path, fits: Callable[[Path, set[str]], bool]) -> Path | None:
    """The first folder, outermost first, whose subfolders fit.

    Args:
        folder: where to look.
        fits: called with a folder and the names of its subfolders, in small letters.
    """
    for place, names in _folders(folder):
        if fits(place, {name.casefold() for name in names}):
            return place
    return None


def _folders(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    level = [folder]
    for _ in range(_DEEPEST):
        below = []
        for place in level:
            names = sorted(
                entry.name
                for entry in os.scandir(place)
                if entry.is_dir() and not entry.name.startswith(".") and entry.name not in (MARKS, "__MACOSX")
            )
            yield place, names
            below += [place / name for name in names]
        level = below


def _kvasir(request: Request) -> Result:
    top = find_below(request.folder, lambda _, names: {"images", "masks"} <= names)
    if top is None:
        raise _no_layout(request, "Kvasir-SEG has images/ and masks/")
    if (shipped := _shipped_lists(request, top)) is not None:
        return shipped
    return _pictures(request, top, ["background", "polyp"], {"images": 1000})


def _isic2018(request: Request) -> Result:
    top = find_below(
        request.folder,
        lambda _, names: any("training_input" in n for n in names) and any("training_groundtruth" in n for n in names),
    )
    if top is None:
        wanted = ["Training_Input", "Training_GroundTruth"]
        there = {part.name for part, _ in _folders(request.folder)}
        lacking = [name for name in wanted if not any(name.casefold() in n.casefold() for n in there)]
        raise _no_layout(request, f"missing: {' and '.join(f'ISIC2018_Task1..._{name}' for name in lacking)}")
    result = _pictures(
        request,
        top,
        ["background", "lesion"],
        {"train": 2594, "val": 100, "test": 1000},
    )
    names = " ".join(entry.name.casefold() for entry in top.iterdir() if entry.is_dir())
    for split in ("Validation", "Test"):
        for part in ("Input", "GroundTruth"):
            if f"{split}_{part}".casefold() not in names:
                result.warnings.append(f"missing: ISIC2018_Task1..._{split}_{part}; no list of it could be kept")
    return result


def _busi(request: Request) -> Result:
    top = find_below(request.folder, lambda _, names: {"benign", "malignant"} <= names)
    if top is None:
        raise _no_layout(request, "BUSI has benign/, malignant/ and normal/")
    result = _pictures(request, top, ["background", "tumour"], {"images": 780}, several="merge")
    if not (top / "normal").is_dir():
        result.warnings.append("missing: normal/, images without a tumour")
    return result


def _pictures(
    request: Request, top: Path, classes: list[str], expected: dict[str, int], several: str | None = None
) -> Result:
    """Lists and an experiment for pictures that can be used where they lie."""
    options = StudyOptions(
        images=top,
        classes=classes,
        several_masks="merge" if several == "merge" else None,
        labelled=None,
        seed=request.seed,
    )
    study = read_study(options, request.progress)
    write_experiment(
        study,
        request.experiment,
        request.lists,
        command=request.command,
        recipe=request.recipe,
        force=request.force,
    )
    warnings = [*study.warnings, *_unexpected(study, expected)]
    return Result(request.experiment, request.lists, list(study.notes), warnings, study)


def _unexpected(study: Study, expected: dict[str, int]) -> list[str]:
    """Numbers of images that are not as published."""
    there = Counter(study.layout.split(case.id) or "images" for case in study.survey.cases)
    there["images"] = len(study.survey.cases)
    return [
        f"{there[name]} images{'' if name == 'images' else ' of ' + name} can be used; published are {number}"
        for name, number in expected.items()
        if there[name] != number and (name == "images" or name in there)
    ]


def _shipped_lists(request: Request, top: Path) -> Result | None:
    """An experiment on the lists that come with this package, where all their cases are there by name."""
    folder = config.REPOSITORY / "data_splits" / "kvasir_seg"
    if not folder.is_dir():
        return None
    splits = load_splits(folder)
    images = find_layout(top).image_files()
    if not all(i in images for i in (*splits.train, *splits.val, *splits.test)):
        return None
    source = {"name": "image_folder", "root": str(top.absolute())}
    write_plain_experiment(request, base="kvasir.yaml", data={"source": source, "labelled": "labelled_10pct"})
    note = "all cases of the lists that come with knowsam are there: data_splits/kvasir_seg is used"
    return Result(request.experiment, folder, [note], [])


def _no_layout(request: Request, text: str) -> DataError:
    return DataError(f"{request.folder} is not the download: {text}. There are:\n{show_tree(request.folder)}")


DATASETS: dict[str, Dataset] = {
    "kvasir": Dataset(
        "Kvasir-SEG, polyps in colonoscopy",
        "kvasir-seg.zip, which holds Kvasir-SEG/images and Kvasir-SEG/masks",
        "datasets.simula.no/kvasir-seg",
        _kvasir,
    ),
    "isic2018": Dataset(
        "ISIC 2018 task 1, skin lesions in dermoscopy",
        "the zip files ISIC2018_Task1-2_Training_Input, ISIC2018_Task1_Training_GroundTruth and the same of Validation "
        "and Test, in one folder",
        "challenge.isic-archive.com, data, 2018",
        _isic2018,
    ),
    "acdc": Dataset(
        "ACDC, cine MRI of the heart",
        "ACDC.zip, which holds training/patient001 and so on, each with Info.cfg, patient001_frame01.nii.gz and "
        "patient001_frame01_gt.nii.gz",
        "humanheart-project.creatis.insa-lyon.fr",
        prepare_acdc,
    ),
    "busi": Dataset(
        "BUSI, breast ultrasound",
        "Dataset_BUSI.zip, which holds Dataset_BUSI_with_GT/benign, malignant and normal",
        "scholar.cu.edu.eg, A. Fahmy, or Kaggle",
        _busi,
    ),
    "la": Dataset(
        "LA, the left atrium in late gadolinium-enhanced MRI (2018 atrial segmentation challenge)",
        "a folder of cases with lgemri.nrrd and laendo.nrrd each, or of mri_norm2.h5 as UA-MT has them",
        "atriaseg2018.cardiacatlas.org, or github.com/yulequan/UA-MT",
        prepare_la,
    ),
}
"""Name on the command line -> data set."""
