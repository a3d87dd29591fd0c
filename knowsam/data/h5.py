"""The SSL4MIS layout: HDF5 slices for training, HDF5 volumes for evaluation."""

from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from knowsam import io
from knowsam.data.cache import content_sha256
from knowsam.data.case import Case
from knowsam.data.folder import fitting_axes, fitting_mask, fitting_spacing, fitting_table, single_files
from knowsam.data.labels import LabelTable
from knowsam.data.source import CaseSource
from knowsam.data.splits import Splits, check_against
from knowsam.errors import ConfigError, DataError, NotFoundError
from knowsam.io import Reading


class H5Slices(CaseSource):
    """``Source`` over ``root/data/slices/<case>_slice_<n>.h5`` (train) and ``root/data/<case>.h5`` (val, test).

    A slice file holds the datasets ``image`` (H, W) and ``label`` (H, W), a volume file (D, H, W) each. A slice knows
    nothing of its volume, so an intensity rule with statistics of a whole volume is refused: a network would meet other
    greys in evaluation than it saw in training. Files are opened for each read and closed again, so nothing is shared
    with worker processes.

    Args:
        root: the dataset's folder.
        splits: train ids name slices, val and test ids name volumes.
        num_classes: K, background included.
        slice_dir, volume_dir: folders inside ``root``.
        image_key, mask_key: names of the two datasets.
        label_table: raw label values -> class ids; None: they are class ids already.
        spacing: (z, y, x) in mm, the same for every case; None when unknown (the format does not say).
        reading: by which rules files are read; its keys are ``image_key`` and ``mask_key``.
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
        spacing: tuple[float, float, float] | None = None,
        reading: Reading | None = None,
    ):
        self.root = Path(root)
        self.splits = splits
        self.num_classes = num_classes
        # Slices are cut already, so volumes are read as they lie: (D, H, W).
        self.reading = replace(reading or Reading(), image_key=image_key, mask_key=mask_key)
        self.label_table = fitting_table(label_table, num_classes)
        self._spacing = fitting_spacing(spacing, axes="zyx")

        if not self.root.is_dir():
            raise NotFoundError(f"data folder {self.root} does not exist", hint="set the dataset's root")
        self._files: dict[str, Path] = {}
        for folder, names in ((slice_dir, ("train",)), (volume_dir, ("val", "test"))):
            listed = [i for name in names for i in getattr(splits, name)]
            if listed:
                found = io.scan(self.root / folder).files
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

    def case(self, case_id: str) -> Case:
        """The slice, or the volume, as stored. The label dataset is not touched.

        Raises:
            ConfigError: a slice, and an intensity rule that wants its whole volume.
            NotFoundError, DataError: a file that cannot be read, or of other axes.
        """
        is_slice = case_id in self.splits.train_set
        rule = self.preparation.intensity
        if is_slice and rule.scope == "case" and not rule.pointwise:
            raise ConfigError(
                f"data.intensity {rule.about()} wants whole volumes, but {case_id} is a slice",
                hint="Use scope: slice or scope: dataset, or intensity as_is where the files hold scaled values.",
            )
        path = self.image_path(case_id)
        stored = io.read_image(path, self.reading)
        fitting_axes(stored.array.shape[1:], 2 if is_slice or stored.array.ndim == 3 else 3, path)
        return Case(stored.array, self._spacing_of(stored.array.ndim - 1), stored.full_range)

    def mask(self, case_id: str) -> NDArray[np.uint8]:
        """uint8 class ids (H, W) of a slice, (D, H, W) of a volume.

        Raises:
            DataError: an unlabelled training slice, a value without a class, or another shape than the image.
        """
        self.splits.require_readable_mask(case_id)
        path = self.image_path(case_id)
        shape = io.header(path, self.reading).shape
        return fitting_mask(io.read_mask(path, self.reading).array, shape, self.label_table, case_id, path)

    @property
    def cache_settings(self) -> tuple[object, ...]:
        """What decides about decoded images and masks beside the files."""
        return (*super().cache_settings, repr(self.label_table), repr(self.reading))

    def where(self, case_id: str) -> str:
        """The case in messages: its file."""
        return str(self.image_path(case_id))

    def spacing(self, case_id: str) -> tuple[float, ...] | None:
        """(z, y, x) in mm of a volume, (y, x) of a slice; None when unknown."""
        if self._spacing is None:
            return None
        return self._spacing_of(len(io.header(self.image_path(case_id), self.reading).shape))

    def _spacing_of(self, axes: int) -> tuple[float, ...] | None:
        return None if self._spacing is None else self._spacing[-axes:]

    def fingerprint(self, case_id: str) -> str:
        """sha256 of the image dataset, not of the file: that would change with the label."""
        return content_sha256(self.image_path(case_id), "image", self.reading)

    def mask_fingerprint(self, case_id: str) -> str:
        """sha256 of the label dataset.

        Raises:
            DataError: an unlabelled training slice.
        """
        self.splits.require_readable_mask(case_id)
        return content_sha256(self.image_path(case_id), "mask", self.reading)

    def image_path(self, case_id: str) -> Path:
        """The file that holds the case.

        Raises:
            DataError: an id that no list holds.
        """
        if case_id not in self._files:
            raise DataError(f"{case_id}: in none of the split lists of {self.splits.folder}")
        return self._files[case_id]
