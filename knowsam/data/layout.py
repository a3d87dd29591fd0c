"""How a user's folders name images and masks: found by looking at the names, without opening a file."""

import fnmatch
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from knowsam import io
from knowsam.data.labels import IGNORE_ID
from knowsam.errors import DataError, NotFoundError

Folders = str | Mapping[str, str]
"""Where pictures lie below a root: ``images``; ``*/images``, of which each ``*`` is one folder and part of the id; or a
mapping from what ids begin with to such a folder: ``{".": images, "unlabelled": more}``, where ``.`` is nothing."""

IMAGE_FOLDERS = ("images", "image", "imgs", "img", "imagesTr")
MASK_FOLDERS = (
    "masks",
    "mask",
    "labels",
    "label",
    "labelsTr",
    "annotations",
    "segmentations",
    "segmentation",
    "groundtruth",
    "ground_truth",
    "gt",
)
LABELLED_FOLDERS = ("labelled", "labeled", "annotated")
VOLUME_EXTENSIONS = (".nii", ".nii.gz")
UNLABELLED_FOLDERS = ("unlabelled", "unlabeled", "unlabelled_images", "unlabeled_images", "unannotated")
SPLIT_WORDS = {
    "train": ("train", "training", "tr"),
    "val": ("val", "valid", "validation", "va", "dev"),
    "test": ("test", "testing", "ts"),
}
"""Split -> words by which folders call it, in small letters."""

ANY_NAME = "/*"
"""As ``mask_suffix``: whatever masks are called, all in the folder of a case are parts of its mask, as in
``a/images/a.png`` with ``a/masks/1.png``, ``a/masks/2.png``."""

WANTED = (
    "images/a.png with masks/a.png; a.png with a_mask.png; the same below class or patient folders "
    "({class}/images with {class}/masks); train/, val/ and test/ of these; labelled/ of these beside unlabelled/; "
    "imagesTr/ with labelsTr/"
)
"""The arrangements that are understood, for messages."""

_IMAGE_SUFFIXES = ("_image", "_img", "-image", "-img", "_0000")
_IMAGE_WORDS = {"images", "image", "imgs", "img", "input", "inputs", "pictures", "photos", "data"}
_MASK_WORDS = r"(mask|masks|seg|segmentation|label|labels|labelid|labelids|gt|groundtruth|ground_truth|annotation|anno)"
_MASK_FOLDER_WORDS = {*(name.casefold() for name in MASK_FOLDERS), "truth", "seg", "segs", "mask", "annotation"}
_NUMBER = r"[ _-]?\(?\d+\)?\Z"  # of a further mask: a_mask_1, a_mask2, a_mask (3)
_NUMBER_ENDS = set("0123456789)")
_SET_OFF_NUMBER = r"[ _-]\(?\d+\)?\Z"
_UNREAD_KINDS = {".jp2", ".dcm", ".nii", ".gz", ".npy", ".npz", ".mha", ".mhd", ".nrrd", ".h5"}
_UNREAD_KINDS |= {".heic", ".avif", ".jxl", ".svs", ".ppm", ".pgm", ".pbm", ".tga", ".psd", ".mat", ".ima", ".dicom"}
_MASK_SUFFIX = re.compile(rf"(?i)[ _.-]+{_MASK_WORDS}(?={_NUMBER}|\Z)")
_DEEPEST = 4  # levels of folders above one that holds images and masks
_MOST_FOLDERS = 20_000


def pictures_below(folder: Path) -> dict[str, list[Path]]:
    """Pictures by id.

    Args:
        folder: where to look; its subfolders too.
    Raises:
        NotFoundError: no such folder.
    """
    return _named(folder, io.PICTURES)


def _named(folder: Path, extensions: Iterable[str]) -> dict[str, list[Path]]:
    """Files by their names alone; none is opened."""
    return dict(sorted(io.scan_folder(folder, frozenset(extensions), lambda path: False, series=False).files.items()))


def volumes_below(folder: Path) -> dict[str, list[Path]]:
    """NIfTI volumes by id, as ``case_files`` wants them found.

    Args:
        folder: where to look; its subfolders too.
    Raises:
        NotFoundError: no such folder.
    """
    return _named(folder, VOLUME_EXTENSIONS)


Scan = Callable[[Path], dict[str, list[Path]]]
"""Finds the files of one folder by id."""


@dataclass(frozen=True)
class Layout:
    """Where images and masks lie, and what their names have after the id. The folders are looked through once.

    Attributes:
        root: the innermost folder that holds all of them.
        images: folder or folders of the images below it.
        masks: of the masks; None: there are none.
        image_suffix, mask_suffix: as ``ImageFolder`` has them.
        split_of: what ids begin with -> ``train``, ``val`` or ``test``, where the folders are ready-made splits.
        scan: finds the files of a folder: pictures, or volumes.
    """

    root: Path
    images: Folders
    masks: Folders | None
    image_suffix: str = ""
    mask_suffix: str = ""
    split_of: Mapping[str, str] = field(default_factory=dict)
    scan: Scan = pictures_below

    def image_files(self) -> dict[str, list[Path]]:
        """Files of the images by id; without masks that lie among them."""
        found, strays = self._pictures()
        return without_suffix({i: files for i, files in found.items() if i not in strays}, self.image_suffix)

    @cached_property
    def _in_images(self) -> dict[str, list[Path]]:
        return case_files(self.root, self.images, self.scan)

    @cached_property
    def _in_masks(self) -> dict[str, list[Path]]:
        return {} if self.masks is None else case_files(self.root, self.masks, self.scan)

    def masks_among_images(self) -> list[Path]:
        """Files beside the images that are called like a mask of one, although masks have a folder of their own."""
        found, strays = self._pictures()
        return [path for i in sorted(strays) for path in found[i]]

    def _pictures(self) -> tuple[dict[str, list[Path]], set[str]]:
        """Pictures in the folders of images, without those that are in use as masks; and the ids of other masks."""
        found = self._in_images
        if self.masks is not None and not share_a_folder(self.images, self.masks):
            masks = {path for files in self._in_masks.values() for path in files}
            found = {i: files for i, files in found.items() if files[0] not in masks}
        elif self.masks is not None and self.mask_suffix:
            mask = re.compile(rf"{re.escape(self.mask_suffix)}({_NUMBER}|\Z)")
            found = {i: files for i, files in found.items() if not mask.search(i)}
        if self.masks is None:
            return found, set()
        return found, mask_names(found, self.image_suffix)

    def mask_files(self) -> dict[str, list[Path]]:
        """Files of the masks by id, also of ids that have no image; without further masks."""
        if self.masks is None:
            return {}
        found = without_suffix(self._in_masks, self.mask_suffix)
        parts = {path for files in self.further_masks().values() for path in files}
        return {i: files for i, files in found.items() if files[0] not in parts}

    def further_masks(self) -> dict[str, list[Path]]:
        """Numbered masks, such as ``x_mask_1.png`` beside ``x_mask.png``, by id: parts of one mask."""
        if self.masks is None:
            return {}
        return further_masks(self._in_masks, set(self.image_files()), self.mask_suffix)

    def other_files(self) -> Counter[str]:
        """Files of kinds that are not read, such as ``.gif``: how many of each."""
        paths: set[Path] = set()
        for folders in (self.images, self.masks or self.images):
            for _, folder in folders_of(self.root, folders):
                paths |= unread_files(folder)
        return Counter(_extension(path.name) for path in paths)

    def split(self, case_id: str) -> str | None:
        """The ready-made split of a case: ``train``, ``val`` or ``test``; None where there are none."""
        return self.split_of.get(case_id.partition("/")[0])


def case_files(root: Path, folders: Folders, scan: Scan = pictures_below) -> dict[str, list[Path]]:
    """Files by id: what the folder's ``*`` stand for, then the path inside it without extension.

    Args:
        root: the dataset's folder.
        folders: where to look below it.
        scan: finds the files of one folder by id.
    Raises:
        NotFoundError: no such folder.
    """
    found: dict[str, list[Path]] = {}
    for start, folder in folders_of(root, folders):
        for name, files in scan(folder).items():
            found.setdefault(f"{start}/{name}" if start else name, []).extend(files)
    return dict(sorted(found.items()))


def folders_of(root: Path, folders: Folders) -> list[tuple[str, Path]]:
    """What ids begin with, and the folder, for every folder that is meant.

    Args:
        root: the dataset's folder.
        folders: see ``Folders``.
    Raises:
        NotFoundError: a ``*`` for which no folder is there.
    """
    found: list[tuple[str, Path]] = []
    for start, pattern in ({".": folders} if isinstance(folders, str) else folders).items():
        places = [([] if start == "." else [start], Path(root))]
        starred = False
        for part in Path(pattern).parts:
            if "*" not in part:
                places = [(kept, place / part) for kept, place in places]
                continue
            starred = True
            places = [
                ([*kept, name], place / name)
                for kept, place in places
                for name in _subfolders(place)
                if fnmatch.fnmatchcase(name, part)
            ]
        if starred:
            places = [(kept, place) for kept, place in places if place.is_dir()]
            if not places:
                raise NotFoundError(f"no folder {pattern} in {root}", hint="check the dataset's root and folder names")
        found += [("/".join(kept), place) for kept, place in places]
    return found


def share_a_folder(images: Folders, masks: Folders) -> bool:
    """Whether images and masks lie in one folder, so that their names alone tell them apart.

    Args:
        images, masks: see ``Folders``.
    """
    both = [{".": folders} if isinstance(folders, str) else folders for folders in (images, masks)]
    first, second = ({(start, Path(folder)) for start, folder in folders.items()} for folders in both)
    return bool(first & second)


def without_suffix(found: Mapping[str, list[Path]], suffix: str) -> dict[str, list[Path]]:
    """The files whose names end in ``suffix`` before the extension, by id without it.

    Args:
        found: id -> files, as ``io.scan`` gives them.
        suffix: what a name must end in; empty: all are taken.
    """
    if not suffix:
        return dict(found)
    return {i.removesuffix(suffix): files for i, files in found.items() if i.endswith(suffix) and i != suffix}


def further_masks(found: Mapping[str, list[Path]], ids: set[str], suffix: str) -> dict[str, list[Path]]:
    """Numbered masks by the id of their image, in the order of their numbers.

    Args:
        found: name -> files of the folder of masks.
        ids: of the images: ``a_1`` is a mask of its own where there is an image ``a_1``.
        suffix: what a mask's name has after the id, before the number; or ``ANY_NAME``.
    Raises:
        DataError: ``ANY_NAME``, and several images in one folder.
    """
    if suffix == ANY_NAME:
        image_of = {i.rpartition("/")[0]: i for i in ids}
        several = [i for i in ids if image_of[i.rpartition("/")[0]] != i]
        if several:
            raise DataError(
                f"mask_suffix {ANY_NAME!r} gives an image all masks of its folder, but {several[0]} is not alone in "
                "its own"
            )
        together: dict[str, list[Path]] = {}
        for name, files in found.items():
            if (case_id := image_of.get(name.rpartition("/")[0])) is not None:
                together.setdefault(case_id, []).extend(files)
        return together
    parts = _numbered(found, ids, suffix)
    return {i: [path for _, name in sorted(names) for path in found[name]] for i, names in parts.items()}


def _numbered(names: Iterable[str], ids: set[str], suffix: str) -> dict[str, list[tuple[int, str]]]:
    """Id -> (number, name) of every name that is an id's with the suffix and a number behind it."""
    numbered = re.compile(rf"(.+?){re.escape(suffix)}({_NUMBER if suffix else _SET_OFF_NUMBER})")
    parts: dict[str, list[tuple[int, str]]] = {}
    for name in names:
        if name[-1:] not in _NUMBER_ENDS or name in ids:
            continue
        match = numbered.match(name)
        if match and match.group(1) in ids:
            parts.setdefault(match.group(1), []).append((int(re.sub(r"\D", "", match.group(2))), name))
    return parts


def mask_names(names: Iterable[str], image_suffix: str = "") -> set[str]:
    """Those of the names that are another's with a word for masks behind it, such as ``a_mask`` beside ``a``.

    Args:
        names: of pictures.
        image_suffix: what images have after the case.
    """
    there = set(names)
    return {
        name
        for name in there
        if (match := _MASK_SUFFIX.search(name))
        and (name[: match.start()] in there or name[: match.start()] + image_suffix in there)
    }


def merge_masks(arrays: Sequence[NDArray[np.uint8]], ignore: int = IGNORE_ID) -> NDArray[np.uint8]:
    """One mask of several of one image: each pixel has the class that any of them gives it.

    Args:
        arrays: class ids (*S), 0 for background, of one shape.
        ignore: the id that says that nothing is known; it gives way to a class, not to background.
    Returns:
        uint8 class ids (*S).
    Raises:
        DataError: other shapes, or pixels to which two masks give different classes.
    """
    merged = np.array(arrays[0], np.uint8)
    for n, part in enumerate(arrays[1:], start=1):
        if part.shape != merged.shape:
            raise DataError(
                f"mask {n + 1} is {part.shape}, the first {merged.shape}; masks of one image are of one size"
            )
        said = (part != 0) & (part != ignore)
        clash = said & (merged != 0) & (merged != ignore) & (merged != part)
        if clash.any():
            classes = sorted({*merged[clash].tolist(), *part[clash].tolist()})
            raise DataError(
                f"{int(clash.sum())} pixels have several classes ({', '.join(map(str, classes))}) in the masks of one "
                "image; they cannot be merged",
                hint="Merge these by hand, so that each pixel has one class.",
            )
        merged[said | ((part == ignore) & (merged == 0))] = part[said | ((part == ignore) & (merged == 0))]
    return merged


def unread_files(folder: Path) -> set[Path]:
    """Files below a folder that may hold a picture or a volume, of kinds that are not read as pictures."""
    paths: set[Path] = set()
    for parent, folders, files in os.walk(folder.absolute()):
        folders[:] = [name for name in folders if not name.startswith(".") and name != "__MACOSX"]
        paths |= {Path(parent, name) for name in files if not name.startswith(".")}
    return {path for path in paths if path.suffix.lower() in _UNREAD_KINDS - set(io.PICTURES)}


def find_layout(
    images: str | Path,
    masks: str | Path | None = None,
    *,
    unlabelled: str | Path | None = None,
    image_suffix: str | None = None,
    mask_suffix: str | None = None,
    scan: Scan = pictures_below,
) -> Layout:
    """Look at the names in a user's folders.

    Args:
        images: folder of the images, or one that holds images and masks in one of the arrangements of ``WANTED``.
        masks: folder of the masks; None: looked for inside ``images``, beside it, and among the images themselves.
        unlabelled: folder of further images, without masks; None: one of that name inside ``images``, if there is one.
        image_suffix, mask_suffix: None: worked out from the names.
        scan: finds the files of a folder: pictures, or ``volumes_below``.
    Raises:
        NotFoundError: no such folder, or no picture in it.
        DataError: there are masks, but no name fits an image's.
    """
    top = Path(images)
    for folder, what in ((top, "images"), (masks, "masks"), (unlabelled, "unlabelled")):
        if folder is not None and not Path(folder).is_dir():
            noun = "unlabelled images" if what == "unlabelled" else what
            raise NotFoundError(
                f"the folder of {noun} {folder} does not exist", hint=f"Give an existing one with --{what}."
            )
    found = _arranged(top, Path(masks) if masks is not None else None)
    if unlabelled is None and (inner := _by_name(top, UNLABELLED_FOLDERS)) and not _covers(found, inner):
        unlabelled = _by_name(inner, IMAGE_FOLDERS) or inner
    if unlabelled is not None:
        found = _with_unlabelled(found, Path(unlabelled))
    return _fitting(replace(found, scan=scan), image_suffix, mask_suffix)


def show_tree(top: Path, most: int = 12) -> str:
    """What lies in a folder, for messages: each subfolder with its numbers of files by extension.

    Args:
        top: the folder.
        most: so many lines.
    """
    lines = []
    for n, (parent, folders, files) in enumerate(os.walk(top)):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__MACOSX")
        kinds = Counter(_extension(name) for name in files if not name.startswith("."))
        if kinds or not folders:
            some = ", ".join(f"{count} {kind or 'without extension'}" for kind, count in kinds.most_common(4))
            where = Path(parent).relative_to(top).as_posix()
            lines.append(f"  {'' if where == '.' else where + '/'} {some or 'nothing'}".replace("   ", "  "))
        if n > _MOST_FOLDERS:
            break
    return "\n".join(lines[:most] + ([f"  ... and {len(lines) - most} more folders"] if len(lines) > most else []))


def _extension(name: str) -> str:
    lower = name.lower()
    return ".nii.gz" if lower.endswith(".nii.gz") else os.path.splitext(lower)[1]


def _arranged(top: Path, masks: Path | None) -> Layout:
    """Folders of images and masks, suffixes still open; the first arrangement that fits."""
    if masks is not None:
        inner = _by_name(top, IMAGE_FOLDERS)
        return _two_folders(inner or top, masks)
    by_name = _by_split_names(top)
    if by_name is not None:
        return by_name
    inner, beside = _by_name(top, IMAGE_FOLDERS), _by_name(top, MASK_FOLDERS)
    if inner is not None and beside is not None:
        return _two_folders(inner, beside)
    labelled = _by_name(top, LABELLED_FOLDERS)
    if labelled is not None and _by_name(top, UNLABELLED_FOLDERS) is not None:
        return _arranged(labelled, None)
    tree = _tree(top)
    if tree is not None:
        return tree
    beside = beside or _by_name(top.parent, MASK_FOLDERS)
    if beside is not None and beside != top:
        return _two_folders(top, beside)
    return Layout(top.absolute(), ".", ".", split_of=_splits_inside(top))


def _two_folders(images: Path, masks: Path) -> Layout:
    if masks.resolve() == images.resolve():
        return Layout(images.absolute(), ".", ".", split_of=_splits_inside(images))
    root = Path(os.path.commonpath([images.absolute(), masks.absolute()]))
    inside = [folder.absolute().relative_to(root).as_posix() for folder in (images, masks)]
    return Layout(root, inside[0], inside[1], split_of=_splits_inside(images))


def _splits_inside(folder: Path) -> dict[str, str]:
    """Subfolders that are called like splits, training among them: name -> split."""
    return _whole_splits(_subfolders(folder))


def _whole_splits(names: Iterable[str]) -> dict[str, str]:
    """Name -> split, where there are training and something to measure on; unlabelled images belong to training."""
    names = set(names)
    found = {name: split for name in names if (split := _split_word(name))}
    if "train" not in found.values() or len(set(found.values())) < 2:
        return {}
    return found | {name: "train" for name in names if name.casefold() in UNLABELLED_FOLDERS}


def _split_word(name: str) -> str | None:
    return next((split for split, words in SPLIT_WORDS.items() if name.casefold() in words), None)


def _by_split_names(top: Path) -> Layout | None:
    """Folders such as imagesTr, labelsTr, imagesTs, labelsTs, or train_images, train_masks, test_images, ..."""
    images: dict[str, str] = {}
    masks: dict[str, str] = {}
    plain: dict[str, str] = {}
    for name in _subfolders(top):
        words = [
            word.casefold() for word in re.findall(r"Tr\b|Ts\b|Va\b|[A-Za-z][a-z]*|[A-Z]+", re.sub(r"_", " ", name))
        ]
        splits = [split for word in words if (split := _split_word(word))]
        if len(splits) != 1:
            continue
        joined = "".join(words)
        if any(word in _MASK_FOLDER_WORDS for word in words) or "groundtruth" in joined:
            masks.setdefault(splits[0], name)
        elif any(word in _IMAGE_WORDS for word in words):
            images.setdefault(splits[0], name)
        elif len(words) == 1:
            plain.setdefault(splits[0], name)
    for split, name in plain.items():  # train/ beside train_masks/
        if split in masks:
            images.setdefault(split, name)
    if "train" not in images or "train" not in masks:
        return None
    if len(images) == 1:
        return _two_folders(top / images["train"], top / masks["train"])
    order = [split for split in SPLIT_WORDS if split in images]
    return Layout(
        top.absolute(),
        {split: images[split] for split in order},
        {split: masks[split] for split in order if split in masks},
        split_of={split: split for split in order},
    )


def _tree(top: Path) -> Layout | None:
    """Folders that hold a folder of images and one of masks each, below ``top``."""
    pairs: dict[str, tuple[str, str | None]] = {}
    seen = 0

    def look(folder: Path, depth: int) -> None:
        nonlocal seen
        seen += 1
        if seen > _MOST_FOLDERS:
            return
        images, masks = _by_name(folder, IMAGE_FOLDERS), _by_name(folder, MASK_FOLDERS)
        if depth and images is not None:
            pairs[folder.relative_to(top).as_posix()] = (images.name, masks.name if masks else None)
        elif depth < _DEEPEST:
            for name in _subfolders(folder):
                look(folder / name, depth + 1)

    look(top, 0)
    if not any(masks for _, masks in pairs.values()):
        return None
    depths = {start.count("/") + 1 for start in pairs}
    images = {name for name, _ in pairs.values()}
    masks = {name for _, name in pairs.values() if name}
    split_of = _whole_splits(start.partition("/")[0] for start in pairs)
    if len(depths) == len(images) == len(masks) == 1:
        stars = "*/" * depths.pop()
        return Layout(top.absolute(), f"{stars}{images.pop()}", f"{stars}{masks.pop()}", split_of=split_of)
    return Layout(
        top.absolute(),
        {start: f"{start}/{image}" for start, (image, _) in pairs.items()},
        {start: f"{start}/{mask}" for start, (_, mask) in pairs.items() if mask},
        split_of=split_of,
    )


def _covers(found: Layout, inner: Path) -> bool:
    """Whether the images found lie in ``inner`` too, or around it."""
    place = inner.absolute()
    folders = [folder for _, folder in folders_of(found.root, found.images)]
    return any(place.is_relative_to(folder) or folder.is_relative_to(place) for folder in folders)


def _with_unlabelled(found: Layout, unlabelled: Path) -> Layout:
    root = Path(os.path.commonpath([found.root, unlabelled.absolute()]))
    above = found.root.relative_to(root).as_posix()

    def moved(folders: Folders) -> Folders:
        if isinstance(folders, str):
            return Path(above, folders).as_posix()
        return {start: Path(above, folder).as_posix() for start, folder in folders.items()}

    images = moved(found.images)
    more = {"unlabelled": unlabelled.absolute().relative_to(root).as_posix()}
    images = {**({".": images} if isinstance(images, str) else images), **more}
    masks = moved(found.masks) if found.masks is not None else None
    return Layout(root, images, masks, split_of={**found.split_of, "unlabelled": "train"} if found.split_of else {})


def _fitting(found: Layout, image_suffix: str | None, mask_suffix: str | None) -> Layout:
    """The layout with the suffixes by which most masks find their image."""
    top = found.root
    every = case_files(top, found.images, found.scan)
    if found.masks is None or share_a_folder(found.images, found.masks):
        if not every:
            raise _nothing(top)
        return _one_folder(found, set(every), image_suffix, mask_suffix)
    in_masks = case_files(top, found.masks, found.scan)
    mask_paths = {path for files in in_masks.values() for path in files}
    ids = {i for i, files in every.items() if files[0] not in mask_paths}
    if not ids:
        raise _nothing(top)
    best = None
    if mask_suffix != ANY_NAME:
        best = _best(ids, set(in_masks), image_suffix, mask_suffix)
    if best is None and (mask_suffix == ANY_NAME or (mask_suffix is None and _alone(ids, set(in_masks)))):
        best = (image_suffix or "", ANY_NAME)
    if best is None:
        raise _unfitting(found, ids, set(in_masks))
    return replace(found, image_suffix=best[0], mask_suffix=best[1])


def _alone(ids: set[str], names: set[str]) -> bool:
    """Whether every image is alone in a folder of its own, and most masks lie in such a folder."""
    folders = {i.rpartition("/")[0] for i in ids}
    if len(folders) < len(ids) or len(ids) < 2:
        return False
    return sum(name.rpartition("/")[0] in folders for name in names) > len(names) / 2


def _nothing(top: Path) -> NotFoundError:
    return NotFoundError(
        f"no picture in {top}; there are:\n{show_tree(top)}",
        hint=f"Read are {', '.join(io.PICTURES)}, arranged as {WANTED}.",
    )


def _unfitting(found: Layout, ids: set[str], names: set[str]) -> DataError:
    assert found.masks is not None
    unread = Counter(
        _extension(p.name) for _, folder in folders_of(found.root, found.masks) for p in unread_files(folder)
    )
    instead = f"are {', '.join(f'{n} {kind}' for kind, n in unread.most_common(3))}" if unread else "do not exist"
    hint = (
        "A mask is called like its image, or like it plus an ending (--mask-suffix, --image-suffix); "
        f"extensions may differ ({', '.join(io.PICTURES)})."
    )
    if unread and not names:
        hint = f"Masks of this kind are not read here; save them as PNG. Read are {', '.join(io.PICTURES)}."
    return DataError(
        f"no mask fits an image: images are called {_some(ids)}; masks {_some(names) or instead}. "
        f"In {found.root} there are:\n{show_tree(found.root)}",
        hint=hint,
    )


def _one_folder(found: Layout, ids: set[str], image_suffix: str | None, mask_suffix: str | None) -> Layout:
    endings = Counter(match.group(0) for i in ids if (match := _MASK_SUFFIX.search(i)))
    suffixes = [mask_suffix] if mask_suffix else [suffix for suffix, _ in endings.most_common()]
    options = []
    for suffix in suffixes:
        mask = re.compile(rf"{re.escape(suffix)}({_NUMBER}|\Z)")
        names = {i for i in ids if mask.search(i)}
        best = _best(ids - names, names, image_suffix, suffix)
        if best is not None:
            options.append((_matches(ids - names, names, *best), best))
    if options:
        image_end, mask_end = max(options)[1]
        return replace(found, image_suffix=image_end, mask_suffix=mask_end)
    if mask_suffix:
        raise DataError(f"no name in {found.root} ends in {mask_suffix!r} and is an image's otherwise: {_some(ids)}")
    return replace(found, masks=None, image_suffix=image_suffix or "")


def _best(ids: set[str], names: set[str], image_suffix: str | None, mask_suffix: str | None) -> tuple[str, str] | None:
    """The pair of suffixes by which most masks find their image; plain names win a tie."""
    if not ids or not names:
        return None
    found = []
    options = [image_suffix] if image_suffix is not None else ["", *_IMAGE_SUFFIXES]
    if image_suffix is None:
        options += [ending for ending, _ in Counter(_remainders(ids, names)).most_common(3)]
        options += _shared_ending(ids)
    for image_end in dict.fromkeys(options):
        stems = {i.removesuffix(image_end) for i in ids if i.endswith(image_end)}
        ends = ["", *dict(Counter(_remainders(names, stems)).most_common(3)), *_shared_ending(names)]
        ends += [re.sub(_NUMBER, "", end) for end in ends]
        for mask_end in [mask_suffix] if mask_suffix is not None else dict.fromkeys(ends):
            count = _matches(ids, names, image_end, mask_end)
            found.append((count, -len(image_end) - len(mask_end), image_end, mask_end))
    (matched, _), _, image_end, mask_end = max(found)
    return (image_end, mask_end) if matched else None


def _matches(ids: set[str], names: set[str], image_end: str, mask_end: str) -> tuple[int, int]:
    """Masks that find their image, numbered ones too; and those that do without a number."""
    stems = {i.removesuffix(image_end) for i in ids if i.endswith(image_end)}
    plain = sum(name.removesuffix(mask_end) in stems for name in names if name.endswith(mask_end))
    numbered = {name for those in _numbered(names, stems, mask_end).values() for _, name in those}
    both = sum(name.removesuffix(mask_end) in stems for name in numbered if name.endswith(mask_end))
    return plain + len(numbered) - both, plain


def _shared_ending(names: set[str]) -> list[str]:
    """What all names end in, from where it sets itself off, such as ``_training``."""
    if len(names) < 2:
        return []
    first, last = min(name[::-1] for name in names), max(name[::-1] for name in names)
    length = next((n for n, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    ending = first[:length][::-1]
    return [ending[m.start() :] for m in re.finditer(r"[ _.-]", ending)][:1]


def _remainders(longer: Iterable[str], stems: set[str]) -> Iterator[str]:
    """What each name has after the longest stem that it begins with; only endings that set themselves off."""
    for name in longer:
        for end in range(len(name) - 1, 0, -1):
            if name[:end] in stems:
                rest = name[end:]
                # 10 begins with 1, and car with ca: neither is an ending
                if not rest[0].isdigit() and not (rest[0].isalpha() and name[end - 1].isalpha()) and "/" not in rest:
                    yield rest
                break


def _subfolders(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith(".") and e.name != "__MACOSX")
    except OSError:
        return []


def _by_name(folder: Path, names: tuple[str, ...]) -> Path | None:
    wanted = [name.casefold() for name in names]
    there = {name.casefold(): folder / name for name in _subfolders(folder)}
    return next((there[name] for name in wanted if name in there), None)


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
