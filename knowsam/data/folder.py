"""A folder of images and a folder of masks: pictures, or volumes."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from knowsam import io
from knowsam.data.cache import content_sha256
from knowsam.data.case import Case
from knowsam.data.index import IdList, Index
from knowsam.data.labels import LabelTable
from knowsam.data.layout import Folders, case_files, further_masks, merge_masks, share_a_folder, without_suffix
from knowsam.data.make_index import find_index, image_folder_places
from knowsam.data.source import CaseSource
from knowsam.data.splits import Splits, check_against
from knowsam.errors import ConfigError, DataError, Fault, NotFoundError
from knowsam.io import Reading


class ImageFolder(CaseSource):
    """``Source`` over ``root/images/<id>.*`` and ``root/masks/<id>.*``.

    An id is the file's path below its folder without extension; image and mask may differ in extension. Files that no
    split list names are passed over. Nothing is opened while building this; masks of unlabelled training cases are
    never opened at all and need not exist.

    Args:
        root: the dataset's folder.
        splits: which cases there are, and whose masks may be read.
        num_classes: K, background included.
        image_dir: folder of the images inside ``root``; or several, see ``layout.Folders``.
        mask_dir: folder of the masks inside ``root``; may be the same one; or several. None: each image's own file
            holds its mask, as h5 and npz files can.
        mask_suffix: what a mask's name has after the id, such as ``"_segmentation"``.
        image_suffix: what an image's name has after the id, such as ``"_0000"``.
        label_table: raw mask values -> class ids; None: they are class ids already.
        spacing: mm along each axis, the same for every case; None: as each file says, where it does.
        merge_masks: numbered masks of one image (``a_mask.png``, ``a_mask_1.png``) are parts of one mask. Without it,
            images that have several are refused.
        index: of the files, made once by ``knowsam index``; then no folder is looked through, and the lists of
            ``splits`` must have been read over it.
        reading: by which rules files are read.
        spatial_dims: 2 where networks see pictures, 3 where they see volumes; another file is refused.
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
        mask_dir: str | Mapping[str, str] | None = "masks",
        mask_suffix: str = "",
        image_suffix: str = "",
        label_table: LabelTable | None = None,
        spacing: tuple[float, ...] | None = None,
        merge_masks: bool = False,
        index: Index | None = None,
        reading: Reading | None = None,
        spatial_dims: int = 2,
    ):
        self.root = Path(root)
        self.splits = splits
        self.num_classes = num_classes
        self.label_table = fitting_table(label_table, num_classes)
        self.reading = reading or Reading()
        self.spatial_dims = spatial_dims
        self._spacing = fitting_spacing(spacing, axes="zyx"[-spatial_dims:])
        self._palettes = io.PaletteWatch(self.reading.palette)

        self.image_dir: Folders = image_dir
        self.mask_dir: Folders | None = mask_dir
        self.image_suffix, self.mask_suffix = image_suffix, mask_suffix
        together = mask_dir is not None and share_a_folder(image_dir, mask_dir)
        if together and mask_suffix == image_suffix:
            raise ConfigError(
                f"image_dir and mask_dir are both {image_dir!r} and the suffixes are equal; "
                "then mask_suffix must tell masks apart"
            )
        if not self.root.is_dir():
            raise NotFoundError(f"data folder {self.root} does not exist", hint="set the dataset's root")
        self.index = index
        self._images: Mapping[str, Path]
        self._masks: Mapping[str, list[Path]]
        if index is not None:
            self._images, self._masks = _by_index(index, splits, self._shown(image_dir))
            return
        found = without_suffix(case_files(self.root, image_dir, _scan), image_suffix)
        listed = [*splits.train, *splits.val, *splits.test]
        check_against(splits, found, where=self._shown(image_dir))
        self._images = single_files(found, listed, what="image")

        needed = sorted(splits.readable_masks)
        if mask_dir is None:
            self._masks = {i: [self._images[i]] for i in needed}
            return
        masks = case_files(self.root, mask_dir, _scan) if needed else {}
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

    @staticmethod
    def index_of(root: str, options: Mapping[str, Any]) -> Index | None:
        """The index of these folders, if there is one and the options are such that it serves.

        Args:
            root: the dataset's folder.
            options: as of the constructor.
        """
        named = {
            key: options[key] for key in ("image_dir", "mask_dir", "image_suffix", "mask_suffix") if key in options
        }
        if options.get("merge_masks") or not all(isinstance(value, str) for value in named.values()):
            return None
        return find_index(root, image_folder_places(**named))

    def train_ids(self) -> list[str]:
        """Every training case, sorted, labelled or not."""
        return list(self.splits.train)

    def labelled_ids(self) -> list[str]:
        """The training cases whose masks may be read, sorted."""
        return list(self.splits.labelled)

    def eval_ids(self, split: str) -> list[str]:
        """Cases of ``"val"`` or ``"test"``, sorted."""
        return self.splits.of(split)

    def case(self, case_id: str) -> Case:
        """The case as stored.

        Raises:
            NotFoundError, DataError: a file that cannot be read, or a volume where pictures are wanted, or the reverse.
        """
        path = self.image_path(case_id)
        stored = io.read_image(path, self.reading)
        fitting_axes(stored.array.shape[1:], self.spatial_dims, path)
        return Case(stored.array, self._spacing or stored.spacing, stored.full_range, stored.display)

    def mask(self, case_id: str) -> NDArray[np.uint8]:
        """uint8 class ids (*S), on the image's grid.

        Raises:
            DataError: an unlabelled training case, a value without a class, or another size than the image.
        """
        self.splits.require_readable_mask(case_id)
        shape = io.header(self.image_path(case_id), self.reading).shape
        parts = []
        for path in self._masks[case_id]:
            raw = io.read_mask(path, self.reading)
            self._palettes.check(path, raw)
            if self.spatial_dims == 3 and path != self.image_path(case_id):
                io.same_place(self.image_path(case_id), path, self.reading)
            parts.append(fitting_mask(raw.array, shape, self.label_table, case_id, path))
        try:
            return merge_masks(parts) if len(parts) > 1 else parts[0]
        except DataError as error:
            raise DataError(f"{case_id}: {error}", hint=error.hint) from error

    @property
    def cache_settings(self) -> tuple[object, ...]:
        """What decides about decoded images and masks beside the files."""
        return (*super().cache_settings, repr(self.label_table), repr(self.reading), self.spatial_dims)

    def where(self, case_id: str) -> str:
        """The case in messages: its file."""
        return str(self.image_path(case_id))

    def spacing(self, case_id: str) -> tuple[float, ...] | None:
        """mm along each axis, or None when unknown."""
        return self._spacing or io.header(self.image_path(case_id), self.reading).spacing

    def fingerprint(self, case_id: str) -> str:
        """sha256 of what is read of the image's file, or of all slices of its series."""
        return content_sha256(self.image_path(case_id), "image", self.reading)

    def mask_fingerprint(self, case_id: str) -> str:
        """sha256 of what is read of the mask's file; of several, of all their sums.

        Raises:
            DataError: an unlabelled training case.
        """
        sums = [content_sha256(path, "mask", self.reading) for path in self.mask_paths(case_id)]
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


class _Single(Mapping[str, list[Path]]):
    """The one file of each id, as a list of one."""

    def __init__(self, files: Mapping[str, Path]):
        self._files = files

    def __getitem__(self, case_id: str) -> list[Path]:
        return [self._files[case_id]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def _by_index(index: Index, splits: Splits, where: str) -> tuple[Mapping[str, Path], Mapping[str, list[Path]]]:
    """Images and masks as an index has them, checked as those of folders are.

    Raises:
        DataError: listed cases without image or, where it may be read, mask; two files of one id; an index that is old.
    """
    if changed := index.stale():
        raise DataError(
            f"the index of {where} is older than the files: {changed[0]}",
            hint="Make it anew: the same knowsam index command reads only what has changed.",
        )
    check_against(splits, index, where=where)
    lists = [splits.train, splits.val, splits.test]
    assert all(isinstance(ids, IdList) or not ids for ids in lists), "lists are read over the index"
    if faults := [fault for ids in lists if isinstance(ids, IdList) for fault in index.several_files(ids)]:
        raise DataError("\n".join(fault.text for fault in faults[:10]), faults=faults)
    masked = [ids for ids in (splits.labelled, splits.val, splits.test) if isinstance(ids, IdList)]
    if missing := [case_id for ids in masked for case_id in index.without_mask(ids)]:
        raise DataError(
            f"{len(missing)} labelled, val and test cases have no mask: {', '.join(missing[:10])}",
            hint="unlabelled training cases need none; is the right labelled_*.txt chosen?",
            faults=[Fault("missing mask", f"{i}: no mask", (i,)) for i in missing],
        )
    return index.images, _Single(index.masks)


def _scan(folder: Path) -> dict[str, list[Path]]:
    return io.scan(folder).files


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


def fitting_axes(shape: tuple[int, ...], spatial_dims: int, path: Path) -> None:
    """Raise DataError unless a file's image is a picture where pictures are wanted, a volume where volumes are."""
    if len(shape) == spatial_dims:
        return
    size = " x ".join(map(str, shape))
    if spatial_dims == 2:
        raise DataError(
            f"{path} is a volume of {size}; this experiment trains on pictures",
            hint="Set data.patch_size=[D, H, W] and 3-D networks, or write its slices as pictures.",
        )
    raise DataError(
        f"{path} is a picture of {size}; this experiment trains on volumes (data.patch_size has three numbers)",
        hint="Give volumes, or a patch_size of two numbers.",
    )


def fitting_mask(
    raw: np.ndarray, shape: tuple[int, ...], table: LabelTable, case_id: str, path: Path
) -> NDArray[np.uint8]:
    """Class ids of raw mask values, proven to fit their image.

    Args:
        raw: (*S) numbers, or colours (*S, 3).
        shape: S of the image.
        table: raw mask values -> class ids.
        case_id, path: for the messages.
    Returns:
        uint8 (*S).
    Raises:
        DataError: a value without a class, another size than the image, or both.
    """
    hint, faults = "", list[Fault]()
    if raw.shape[: len(shape)] != shape or raw.ndim - len(shape) not in (0, 1):
        own, its = (" x ".join(map(str, s)) for s in (raw.shape[: len(shape)], shape))
        axes = "height x width" if len(shape) == 2 else "slices x rows x columns"
        text = f"{case_id}: the mask is {own}, the image {its} ({axes}): {path}"
        hint = "make the mask fit its image; nothing is resized silently"
        faults.append(Fault("mask of another size", text, (case_id,)))
    try:
        ids = table.apply(raw, where=str(path))
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
