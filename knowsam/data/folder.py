"""A folder of pictures and a folder of masks."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from knowsam.data.cache import file_sha256
from knowsam.data.labels import LabelTable
from knowsam.data.layout import Folders, case_files, further_masks, merge_masks, share_a_folder, without_suffix
from knowsam.data.readers import INTENSITIES, read_image, read_mask, stored_size
from knowsam.data.splits import Splits, check_against
from knowsam.errors import ConfigError, DataError, Fault, NotFoundError


class ImageFolder:
    """``Source`` over ``root/images/<id>.*`` and ``root/masks/<id>.*``.

    An id is the file's path below its folder without extension; image and mask may differ in extension. Files that no
    split list names are passed over. Nothing is opened while building this; masks of unlabelled training cases are
    never opened at all and need not exist.

    Args:
        root: the dataset's folder.
        splits: which cases there are, and whose masks may be read.
        num_classes: K, background included.
        image_dir: folder of the images inside ``root``; or several, see ``layout.Folders``.
        mask_dir: folder of the masks inside ``root``; may be the same one; or several.
        mask_suffix: what a mask's name has after the id, such as ``"_segmentation"``.
        image_suffix: what an image's name has after the id, such as ``"_0000"``.
        label_table: raw mask values -> class ids; None: they are class ids already.
        intensity: see ``readers.to_uint8``.
        spacing: (y, x) in mm, the same for every case; None when unknown.
        merge_masks: numbered masks of one image (``a_mask.png``, ``a_mask_1.png``) are parts of one mask. Without it,
            images that have several are refused.
    Raises:
        NotFoundError: ``root`` or one of its folders is not there.
        DataError: listed cases without image, labelled/val/test cases without mask, two files of one id.
        ConfigError: settings that do not fit together.
    """

    def __init__(
        self,
        *,
        root: str | Path,
        splits: Splits,
        num_classes: int,
        image_dir: str | Mapping[str, str] = "images",
        mask_dir: str | Mapping[str, str] = "masks",
        mask_suffix: str = "",
        image_suffix: str = "",
        label_table: LabelTable | None = None,
        intensity: str = "dtype",
        spacing: tuple[float, float] | None = None,
        merge_masks: bool = False,
    ):
        self.root = Path(root)
        self.splits = splits
        self.num_classes = num_classes
        self.label_table = fitting_table(label_table, num_classes)
        self.intensity = fitting_intensity(intensity)
        self._spacing = fitting_spacing(spacing, axes="yx")
        self.cache_settings = (intensity, repr(self.label_table))

        self.image_dir: Folders = image_dir
        self.mask_dir: Folders = mask_dir
        self.image_suffix, self.mask_suffix = image_suffix, mask_suffix

        if share_a_folder(image_dir, mask_dir) and mask_suffix == image_suffix:
            raise ConfigError(
                f"image_dir and mask_dir are both {image_dir!r} and the suffixes are equal; "
                "then mask_suffix must tell masks apart"
            )
        if not self.root.is_dir():
            raise NotFoundError(f"data folder {self.root} does not exist", hint="set the dataset's root")
        found = without_suffix(case_files(self.root, image_dir), image_suffix)
        listed = [*splits.train, *splits.val, *splits.test]
        check_against(splits, found, where=self._shown(image_dir))
        self._images = single_files(found, listed, what="image")

        needed = sorted(splits.readable_masks)
        masks = case_files(self.root, mask_dir) if needed else {}
        together = share_a_folder(image_dir, mask_dir)  # then the scan for images found the masks, too
        parts = further_masks(masks, set(self._images) if together else set(found), mask_suffix)
        found = without_suffix(masks, mask_suffix)
        if missing := [i for i in needed if i not in found and i not in parts]:
            folder = self._shown(mask_dir)
            raise DataError(
                f"{len(missing)} of {len(needed)} labelled, val and test cases have no mask in {folder}: "
                + ", ".join(missing[:10])
                + (", ..." if len(missing) > 10 else ""),
                hint="unlabelled training cases need none; is the right labelled_*.txt chosen?",
                faults=[Fault("missing mask", f"{i}: no mask {i + mask_suffix}.* in {folder}", (i,)) for i in missing],
            )
        whole = single_files(found, [i for i in needed if i in found], what="mask")
        self._masks = {i: [*([whole[i]] if i in whole else []), *parts.get(i, [])] for i in needed}
        if not merge_masks:
            _refuse_several(self._masks)

    def train_ids(self) -> list[str]:
        """Every training case, sorted, labelled or not."""
        return list(self.splits.train)

    def labelled_ids(self) -> list[str]:
        """The training cases whose masks may be read, sorted."""
        return list(self.splits.labelled)

    def eval_ids(self, split: str) -> list[str]:
        """Cases of ``"val"`` or ``"test"``, sorted."""
        return self.splits.of(split)

    def image(self, case_id: str) -> NDArray[np.uint8]:
        """uint8 (H, W, 3)."""
        return read_image(self.image_path(case_id), self.intensity)

    def mask(self, case_id: str) -> NDArray[np.uint8]:
        """uint8 class ids (H, W), on the image's grid.

        Raises:
            DataError: an unlabelled training case, a value without a class, or another size than the image.
        """
        self.splits.require_readable_mask(case_id)
        parts = [fitting_mask(self._images[case_id], m, self.label_table, case_id) for m in self._masks[case_id]]
        try:
            return merge_masks(parts) if len(parts) > 1 else parts[0]
        except DataError as error:
            raise DataError(f"{case_id}: {error}", hint=error.hint) from error

    def spacing(self, case_id: str) -> tuple[float, ...] | None:
        """(y, x) in mm, or None when unknown."""
        return self._spacing

    def fingerprint(self, case_id: str) -> str:
        """sha256 of the image file."""
        return file_sha256(self.image_path(case_id))

    def mask_fingerprint(self, case_id: str) -> str:
        """sha256 of the mask file; of several, of all their sums.

        Raises:
            DataError: an unlabelled training case.
        """
        sums = [file_sha256(path) for path in self.mask_paths(case_id)]
        return sums[0] if len(sums) == 1 else hashlib.sha256(" ".join(sums).encode()).hexdigest()

    def mask_paths(self, case_id: str) -> list[Path]:
        """The mask's files; several where they are merged.

        Raises:
            DataError: an unlabelled training case.
        """
        self.splits.require_readable_mask(case_id)
        return list(self._masks[case_id])

    def _shown(self, folders: Folders) -> str:
        return str(self.root / folders) if isinstance(folders, str) else f"{self.root} ({', '.join(folders.values())})"

    def image_path(self, case_id: str) -> Path:
        """The image's file.

        Raises:
            DataError: an id that no list holds.
        """
        if case_id not in self._images:
            raise DataError(f"{case_id}: in none of the split lists of {self.splits.folder}")
        return self._images[case_id]


def _refuse_several(masks: Mapping[str, list[Path]]) -> None:
    """Refuse images with several masks: to take one of them would lose the others in silence."""
    several = {i: " and ".join(map(str, files)) for i, files in masks.items() if len(files) > 1}
    if several:
        raise DataError(
            f"{len(several)} of {len(masks)} masks are several files for one image, of which none may be preferred:\n"
            + "\n".join(list(several.values())[:10])
            + (f"\n... and {len(several) - 10} more" if len(several) > 10 else ""),
            hint="If they are parts of one mask, data.source.merge_masks=true merges them; if they are of several "
            "readers, choose one by data.source.mask_suffix.",
            faults=[Fault("several masks", f"{i}: {files}", (i,)) for i, files in several.items()],
        )


def single_files(found: dict[str, list[Path]], ids: list[str], *, what: str = "image") -> dict[str, Path]:
    """The one file of each id.

    Args:
        what: ``"image"`` or ``"mask"``, for the faults.
    Raises:
        DataError: ids with several files, such as ``a.png`` beside ``a.jpg``.
    """
    several = {i: " and ".join(map(str, found[i])) for i in ids if len(found[i]) > 1}
    if several:
        raise DataError(
            f"{len(several)} ids have more than one file, of which none may be preferred:\n"
            + "\n".join(list(several.values())[:10]),
            faults=[Fault(f"several {what}s", f"{i}: {files}", (i,)) for i, files in several.items()],
        )
    return {i: found[i][0] for i in ids}


def fitting_mask(image: Path, mask: Path, table: LabelTable, case_id: str) -> NDArray[np.uint8]:
    """Class ids of a mask file, proven to fit its image file.

    Args:
        image, mask: the two files.
        table: raw mask values -> class ids.
        case_id: for the messages.
    Returns:
        uint8 (H, W).
    Raises:
        DataError: a value without a class, another size than the image, or both; unreadable files.
    """
    raw = read_mask(mask)
    size, hint = stored_size(image), ""
    faults: list[Fault] = []
    if raw.shape[:2] != size:
        text = (
            f"{case_id}: the mask is {raw.shape[0]} x {raw.shape[1]}, the image {size[0]} x {size[1]} "
            f"(height x width): {mask}"
        )
        hint = "make the mask fit its image; nothing is resized silently"
        faults.append(Fault("mask of another size", text, (case_id,)))
    try:
        ids = table.apply(raw, where=str(mask))
    except DataError as error:
        hint = hint or error.hint
        faults.append(Fault("mask value without a class", str(error), (case_id,)))
    if faults:
        raise DataError("\n".join(fault.text for fault in faults), hint=hint, faults=faults)
    return ids


def fitting_table(label_table: LabelTable | None, num_classes: int) -> LabelTable:
    """The table, or the one that leaves ids as they are.

    Args:
        label_table: as declared; None: masks hold class ids.
        num_classes: K of the dataset.
    Raises:
        ConfigError: made for another number of classes.
    """
    table = LabelTable(None, num_classes) if label_table is None else label_table
    if table.num_classes != num_classes:
        raise ConfigError(f"the label table has {table.num_classes} classes, the dataset {num_classes}")
    return table


def fitting_intensity(intensity: str) -> str:
    """``intensity`` itself.

    Raises:
        ConfigError: not one of ``INTENSITIES``; said when the dataset is built rather than at its first image.
    """
    if intensity not in INTENSITIES:
        raise ConfigError(f"intensity {intensity!r} is unknown; allowed are {', '.join(INTENSITIES)}")
    return intensity


def fitting_spacing(spacing: Sequence[float] | None, *, axes: str) -> tuple[float, ...] | None:
    """``spacing`` as a tuple of floats in mm, or None.

    Args:
        spacing: mm along each axis; None: unknown.
        axes: one letter an axis, such as ``zyx``.
    Raises:
        ConfigError: not one positive number per letter of ``axes``.
    """
    if spacing is None:
        return None
    try:
        numbers = tuple(float(v) for v in spacing)
    except (TypeError, ValueError):
        numbers = ()
    if len(numbers) != len(axes) or not all(0 < v < float("inf") for v in numbers):
        raise ConfigError(f"spacing is {spacing!r}; needed is ({', '.join(axes)}), each above 0, in mm")
    return numbers
