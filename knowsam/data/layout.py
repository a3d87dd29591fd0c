"""How a user's folders name images and masks: found by looking at the names, without opening a file."""

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from knowsam.data.folder import without_suffix
from knowsam.data.readers import EXTENSIONS, scan_folder
from knowsam.errors import DataError, NotFoundError

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
_IMAGE_SUFFIXES = ("_image", "_img", "-image", "-img", "_0000")
_MASK_WORDS = r"(mask|masks|seg|segmentation|label|labels|labelid|labelids|gt|groundtruth|ground_truth|annotation|anno)"
_NUMBER = r"[ _-]?\d+\Z"
_UNREAD_KINDS = {".gif", ".webp", ".jp2", ".dcm", ".nii", ".gz", ".npy", ".npz", ".mha", ".mhd", ".nrrd", ".h5"}
_MASK_SUFFIX = re.compile(rf"(?i)[ _.-]+{_MASK_WORDS}\Z")


@dataclass(frozen=True)
class Layout:
    """Where images and masks lie, and what their names have after the id.

    Attributes:
        images: folder of the images.
        masks: folder of the masks; None: there are none.
        image_suffix, mask_suffix: as ``ImageFolder`` has them.
    """

    images: Path
    masks: Path | None
    image_suffix: str = ""
    mask_suffix: str = ""

    def image_files(self) -> dict[str, list[Path]]:
        """Files of the images by id; without the masks, where both lie in one folder."""
        found = _pictures(self.images, self.masks)
        if self.masks == self.images and self.mask_suffix:
            masks = re.compile(rf"{re.escape(self.mask_suffix)}({_NUMBER}|\Z)")
            found = {i: files for i, files in found.items() if not masks.search(i)}
        return without_suffix(found, self.image_suffix)

    def mask_files(self) -> dict[str, list[Path]]:
        """Files of the masks by id, also of ids that have no image."""
        if self.masks is None:
            return {}
        return without_suffix(scan_folder(self.masks, EXTENSIONS), self.mask_suffix)

    def further_masks(self) -> dict[str, list[Path]]:
        """Numbered masks, such as ``x_mask_1.png`` beside ``x_mask.png``, by id: parts of one mask."""
        if self.masks is None or not self.mask_suffix:
            return {}
        numbered = re.compile(rf"(.+){re.escape(self.mask_suffix)}{_NUMBER}")
        found: dict[str, list[Path]] = {}
        for name, files in scan_folder(self.masks, EXTENSIONS).items():
            if match := numbered.match(name):
                found.setdefault(match.group(1), []).extend(files)
        return found

    def other_files(self) -> Counter[str]:
        """Files of kinds that are not read, such as ``.gif``: how many of each."""
        paths: set[Path] = set()
        for folder in (self.images, self.masks or self.images):
            for parent, folders, files in os.walk(folder.absolute()):
                folders[:] = [name for name in folders if not name.startswith(".")]
                paths |= {Path(parent, name) for name in files if not name.startswith(".")}
        return Counter(path.suffix.lower() for path in paths if path.suffix.lower() in _UNREAD_KINDS)

    def root(self) -> Path:
        """The innermost folder that holds both, absolute."""
        folders = [str(folder.absolute()) for folder in (self.images, self.masks) if folder is not None]
        return Path(os.path.commonpath(folders))


def find_layout(
    images: str | Path,
    masks: str | Path | None = None,
    *,
    image_suffix: str | None = None,
    mask_suffix: str | None = None,
) -> Layout:
    """Look at the names in a user's folders.

    Args:
        images: folder of the images, or one that holds a folder of images and a folder of masks.
        masks: folder of the masks; None: looked for inside ``images``, beside it, and among the images themselves.
        image_suffix, mask_suffix: None: worked out from the names.
    Raises:
        NotFoundError: no such folder, or no picture in it.
        DataError: there are masks, but no name fits an image's.
    """
    images = Path(images)
    if not images.is_dir():
        raise NotFoundError(f"the folder of images {images} does not exist", hint="Give an existing one with --images.")
    if masks is not None and not Path(masks).is_dir():
        raise NotFoundError(f"the folder of masks {masks} does not exist", hint="Give an existing one with --masks.")
    inner = _named(images, IMAGE_FOLDERS)
    if inner is not None and (masks is not None or _named(images, MASK_FOLDERS) is not None):
        masks = masks or _named(images, MASK_FOLDERS)
        images = inner
    elif masks is None:
        masks = _named(images, MASK_FOLDERS) or _named(images.parent, MASK_FOLDERS)
        masks = None if masks == images else masks
    masks = Path(masks) if masks is not None else None
    ids = set(_pictures(images, masks))
    if not ids:
        raise NotFoundError(f"no picture in {images}", hint=f"Read are {', '.join(EXTENSIONS)}.")
    if masks is None or masks.resolve() == images.resolve():
        return _one_folder(images, ids, image_suffix, mask_suffix)
    names = set(scan_folder(masks, EXTENSIONS))
    best = _best(ids, names, image_suffix, mask_suffix)
    if best is None:
        raise DataError(
            f"no mask fits an image: images are called {_some(ids)}; masks {_some(names) or 'do not exist'}",
            hint="A mask is called like its image, or like it plus an ending (--mask-suffix, --image-suffix); "
            f"extensions may differ ({', '.join(EXTENSIONS)}).",
        )
    return Layout(images, masks, *best)


def _pictures(images: Path, masks: Path | None) -> dict[str, list[Path]]:
    """Pictures below ``images``, without those in a folder of masks that lies inside it."""
    found = scan_folder(images, EXTENSIONS)
    if masks is None or masks == images or not masks.absolute().is_relative_to(images.absolute()):
        return found
    inside = masks.absolute().relative_to(images.absolute()).as_posix() + "/"
    return {i: files for i, files in found.items() if not i.startswith(inside)}


def _one_folder(images: Path, ids: set[str], image_suffix: str | None, mask_suffix: str | None) -> Layout:
    endings = Counter(match.group(0) for i in ids if (match := _MASK_SUFFIX.search(i)))
    suffixes = [mask_suffix] if mask_suffix else [suffix for suffix, _ in endings.most_common()]
    found = []
    for suffix in suffixes:
        names = {i for i in ids if i.endswith(suffix)}
        best = _best(ids - names, names, image_suffix, suffix)
        if best is not None:
            found.append((_matches(ids - names, names, *best), best))
    if found:
        return Layout(images, images, *max(found)[1])
    if mask_suffix:
        raise DataError(f"no name in {images} ends in {mask_suffix!r} and is an image's otherwise: {_some(ids)}")
    return Layout(images, None, image_suffix or "")


def _best(ids: set[str], names: set[str], image_suffix: str | None, mask_suffix: str | None) -> tuple[str, str] | None:
    """The pair of suffixes by which most masks find their image; plain names win a tie."""
    found = []
    options = [image_suffix] if image_suffix is not None else ["", *_IMAGE_SUFFIXES]
    if image_suffix is None:
        options += [ending for ending, _ in Counter(_remainders(ids, names)).most_common(3)]
    for image_end in dict.fromkeys(options):
        stems = {i.removesuffix(image_end) for i in ids if i.endswith(image_end)}
        ends = (
            [mask_suffix] if mask_suffix is not None else ["", *dict(Counter(_remainders(names, stems)).most_common(3))]
        )
        for mask_end in ends:
            count = _matches(ids, names, image_end, mask_end)
            found.append((count, -len(image_end) - len(mask_end), image_end, mask_end))
    count, _, image_end, mask_end = max(found)
    return (image_end, mask_end) if count else None


def _matches(ids: set[str], names: set[str], image_end: str, mask_end: str) -> int:
    stems = {i.removesuffix(image_end) for i in ids if i.endswith(image_end)}
    return sum(name.removesuffix(mask_end) in stems for name in names if name.endswith(mask_end))


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


def _named(folder: Path, names: tuple[str, ...]) -> Path | None:
    wanted = [name.casefold() for name in names]
    there = {path.name.casefold(): path for path in sorted(folder.iterdir()) if path.is_dir()}
    return next((there[name] for name in wanted if name in there), None)


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
