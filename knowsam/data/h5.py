"""The SSL4MIS layout: HDF5 slices for training, HDF5 volumes for evaluation."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np
from numpy.typing import NDArray

from knowsam.data.cache import remembered
from knowsam.data.folder import fitting_intensity, fitting_spacing, fitting_table, single_files
from knowsam.data.labels import LabelTable
from knowsam.data.readers import MAX_PIXELS, MAX_VOXELS, grey_slices, raw_labels, scan_folder
from knowsam.data.splits import Splits, check_against
from knowsam.errors import DataError, NotFoundError

EXTENSIONS = (".h5", ".hdf5")


class H5Slices:
    """``Source`` over ``root/data/slices/<case>_slice_<n>.h5`` (train) and ``root/data/<case>.h5`` (val, test).

    A slice file holds the datasets ``image`` (H, W) and ``label`` (H, W), a volume file (D, H, W) each. Intensities are
    brought to 0..255 slice by slice, in volumes too: a network meets in evaluation what it saw in training. Files are
    opened for each read and closed again, so nothing is shared with worker processes.

    Args:
        root: the dataset's folder.
        splits: train ids name slices, val and test ids name volumes.
        num_classes: K, background included.
        slice_dir, volume_dir: folders inside ``root``.
        image_key, mask_key: names of the two datasets.
        label_table: raw label values -> class ids; None: they are class ids already.
        intensity: see ``readers.to_uint8``; ``"dtype"`` wants floats in 0..1.
        spacing: (z, y, x) in mm, the same for every case; None when unknown (the format does not say).
    Raises:
        NotFoundError: ``root`` or one of its folders is not there.
        DataError: listed cases that are not there, or two files of one id.
        ConfigError: settings that do not fit together.
    """

    def __init__(
        self,
        *,
        root: str | Path,
        splits: Splits,
        num_classes: int,
        slice_dir: str = "data/slices",
        volume_dir: str = "data",
        image_key: str = "image",
        mask_key: str = "label",
        label_table: LabelTable | None = None,
        intensity: str = "dtype",
        spacing: tuple[float, float, float] | None = None,
    ):
        self.root = Path(root)
        self.splits = splits
        self.num_classes = num_classes
        self.image_key, self.mask_key = image_key, mask_key
        self.label_table = fitting_table(label_table, num_classes)
        self.intensity = fitting_intensity(intensity)
        self._spacing = fitting_spacing(spacing, axes="zyx")
        self.cache_settings = (intensity, image_key, mask_key, repr(self.label_table))

        if not self.root.is_dir():
            raise NotFoundError(f"data folder {self.root} does not exist", hint="set the dataset's root")
        self._files: dict[str, Path] = {}
        for folder, names in ((slice_dir, ("train",)), (volume_dir, ("val", "test"))):
            listed = [i for name in names for i in getattr(splits, name)]
            if listed:
                found = scan_folder(self.root / folder, EXTENSIONS)
                check_against(splits, found, checked=names, where=str(self.root / folder))
                self._files |= single_files(found, listed)

    def train_ids(self) -> list[str]:
        """Every training slice, sorted, labelled or not."""
        return list(self.splits.train)

    def labelled_ids(self) -> list[str]:
        """The training slices whose masks may be read, sorted."""
        return list(self.splits.labelled)

    def eval_ids(self, split: str) -> list[str]:
        """Volumes of ``"val"`` or ``"test"``, sorted."""
        return self.splits.of(split)

    def image(self, case_id: str) -> NDArray[np.uint8]:
        """uint8 (H, W, 3) of a slice, (D, H, W, 3) of a volume. The label dataset is not touched."""
        return read_h5_image(self.image_path(case_id), self.image_key, self.intensity, ranks=self._ranks(case_id))

    def mask(self, case_id: str) -> NDArray[np.uint8]:
        """uint8 class ids (H, W) of a slice, (D, H, W) of a volume.

        Raises:
            DataError: an unlabelled training slice, a value without a class, or another shape than the image.
        """
        self.splits.require_readable_mask(case_id)
        path = self.image_path(case_id)
        with _dataset(path, self.image_key, self._ranks(case_id)) as dataset:
            shape = dataset.shape
        with _dataset(path, self.mask_key, self._ranks(case_id)) as dataset:
            raw = dataset[()]
        if raw.shape != shape:
            raise DataError(f"{path}: {self.mask_key!r} is {raw.shape}, {self.image_key!r} is {shape}")
        return self.label_table.apply(raw_labels(raw, where=str(path)), where=str(path))

    def spacing(self, case_id: str) -> tuple[float, ...] | None:
        """(z, y, x) in mm of a volume, (y, x) of a slice; None when unknown."""
        if self._spacing is None:
            return None
        with _dataset(self.image_path(case_id), self.image_key, self._ranks(case_id)) as dataset:
            return self._spacing[-dataset.ndim :]

    def fingerprint(self, case_id: str) -> str:
        """sha256 of the image dataset, not of the file: that would change with the label."""
        return self._dataset_sha256(case_id, self.image_key)

    def mask_fingerprint(self, case_id: str) -> str:
        """sha256 of the label dataset.

        Raises:
            DataError: an unlabelled training slice.
        """
        self.splits.require_readable_mask(case_id)
        return self._dataset_sha256(case_id, self.mask_key)

    def image_path(self, case_id: str) -> Path:
        """The file that holds the case.

        Raises:
            DataError: an id that no list holds.
        """
        if case_id not in self._files:
            raise DataError(f"{case_id}: in none of the split lists of {self.splits.folder}")
        return self._files[case_id]

    def _ranks(self, case_id: str) -> tuple[int, ...]:
        return (2,) if case_id in self.splits.train_set else (2, 3)

    def _dataset_sha256(self, case_id: str, key: str) -> str:
        path = self.image_path(case_id)

        def compute() -> str:
            with _dataset(path, key, self._ranks(case_id)) as dataset:
                values = np.ascontiguousarray(dataset[()])
            return hashlib.sha256(f"{values.dtype.str}{values.shape}".encode() + values.tobytes()).hexdigest()

        return remembered(path, f"h5:{key}", compute)


def read_h5_image(path: Path, key: str, intensity: str, *, ranks: tuple[int, ...] = (2, 3)) -> NDArray[np.uint8]:
    """A dataset of grey values as an image or a volume, each slice brought to 0..255 by itself.

    Args:
        path: the file.
        key: the dataset inside it, (H, W) or (D, H, W).
        intensity: see ``readers.to_uint8``.
        ranks: numbers of axes that are allowed.
    Returns:
        uint8 (H, W, 3) or (D, H, W, 3).
    Raises:
        NotFoundError: no such file.
        DataError: no such dataset, damaged, of another shape, or values that do not fit ``intensity``.
    """
    with _dataset(path, key, ranks) as dataset:
        values = dataset[()]
    return grey_slices(values, intensity, where=str(path))


@contextmanager
def _dataset(path: Path, key: str, ranks: tuple[int, ...]) -> Iterator[h5py.Dataset]:
    """An array of a file, proven harmless before it is read; whatever goes wrong becomes an error naming both."""
    try:
        # best-effort: a read-only or network disk may know no locks
        with h5py.File(path, "r", locking="best-effort") as file:
            _check_link(file, key, path)
            dataset = file[key]
            if not isinstance(dataset, h5py.Dataset):
                raise DataError(f"{path}: {key!r} is a group; needed is a dataset")
            if dataset.is_virtual or dataset.external:
                raise DataError(f"{path}: dataset {key!r} takes its values from other files; this is refused")
            if dataset.ndim not in ranks:
                wanted = " or ".join("(H, W)" if r == 2 else "(D, H, W)" for r in ranks)
                raise DataError(f"{path}: dataset {key!r} has shape {dataset.shape}; needed is {wanted}")
            if dataset.dtype.kind not in "buif":
                raise DataError(f"{path}: dataset {key!r} is of type {dataset.dtype}; needed are numbers")
            if 0 in dataset.shape:
                raise DataError(f"{path}: dataset {key!r} is empty, shape {dataset.shape}")
            if dataset.shape[-1] * dataset.shape[-2] > MAX_PIXELS or dataset.size > MAX_VOXELS:
                raise DataError(f"{path}: dataset {key!r} has shape {dataset.shape}; too large to be a medical volume")
            yield dataset
    except FileNotFoundError:
        raise NotFoundError(f"{path} does not exist") from None
    except (OSError, RuntimeError, KeyError, ValueError) as error:  # h5py raises each of these on a broken file
        raise DataError(f"{path}: dataset {key!r} cannot be read, truncated or damaged ({error})") from error


def _check_link(file: h5py.File, key: str, path: Path) -> None:
    """Refuse links: an external one would open any file the user can read."""
    link = file.get(key, getlink=True)
    if link is None:
        there = ", ".join(sorted(file)) or "nothing"
        raise DataError(f"{path}: there is no dataset {key!r}; the file holds {there}")
    if not isinstance(link, h5py.HardLink):
        raise DataError(f"{path}: {key!r} is a link to another place; this is refused")
