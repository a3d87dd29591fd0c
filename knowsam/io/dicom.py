"""DICOM files, and folders that hold the slices of one series."""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from knowsam.io import raster
from knowsam.io.dicom_file import channels_of, dataset_of, frame_of, pixel_spacing, value_type
from knowsam.io.dicom_series import EXTENSIONS, Series, frames_in, read_series, series_in
from knowsam.io.kind import Kind, labels_of
from knowsam.io.nifti import nifti_bytes
from knowsam.io.opening import medical
from knowsam.io.stored import DEFAULT, Header, PredictionKind, Reading, Stored, StoredMask
from knowsam.io.volume_grid import VolumeGrid


class Dicom(Kind):
    """A file of one frame is a picture; a folder of slices, or a file of frames that say where they lie, is a volume.

    - values are those after the modality LUT or rescaling: HU of a CT;
    - ``full_range`` is the first linear window that the file names (LINEAR or LINEAR_EXACT), else 0 to the largest
      number of BitsStored where values are neither signed nor scaled;
    - a VOI LUT Sequence, which goes before windows, or a SIGMOID window gives ``display``;
    - MONOCHROME1 (small is white) is turned round within the range of its bits; palette colours become RGB.
    """

    name: ClassVar[str] = "DICOM"
    extensions: ClassVar[tuple[str, ...]] = EXTENSIONS

    def sniff(self, head: bytes) -> bool:
        """The prefix behind the preamble."""
        return head[128:132] == b"DICM"

    def header(self, path: Path, reading: Reading) -> Header:
        """From the tags, of every slice of a series."""
        if series := _volume(path, reading):
            return Header(1, series.grid.canonical_shape, series.dtype, series.grid.spacing)
        with dataset_of(path, pixels=False) as tags:
            shape = (int(tags.Rows), int(tags.Columns))
            return Header(channels_of(tags), shape, value_type(tags), pixel_spacing(tags)[0])

    def read(self, path: Path, reading: Reading) -> Stored:
        """(C, H, W), or (1, D, H, W) of a volume."""
        if series := _volume(path, reading):
            return read_series(series)
        with dataset_of(path) as dataset:
            frame = frame_of(dataset, medical("pydicom").pixels.pixel_array(dataset))
            spacing, notes = pixel_spacing(dataset)
        return Stored(frame.values, spacing, frame.full_range, (*frame.notes, *notes), frame.display)

    def read_mask(self, path: Path, reading: Reading) -> StoredMask:
        """(H, W) or (D, H, W) of the values, windows left aside; or colours."""
        stored = self.read(path, reading)
        return StoredMask(labels_of(stored.array, str(path)), None, stored.notes)

    def grid(self, path: Path, reading: Reading) -> VolumeGrid | None:
        """Of a volume."""
        series = _volume(path, reading)
        return series.grid if series else None

    def extension(self, path: Path, kind: PredictionKind) -> str:
        """As of a picture; of a volume ``.nii.gz``."""
        return ".nii.gz" if path.is_dir() or frames_in(path, DEFAULT) else raster.extension(kind)

    def encode(
        self, path: Path, kind: PredictionKind, values: np.ndarray, classes: Sequence[str], reading: Reading
    ) -> bytes:
        """As of a picture; of a volume NIfTI in scanner coordinates, axes as the slices are stored."""
        grid = self.grid(path, reading)
        if grid is None:
            return raster.encode(kind, values, classes, tag=1, turned=False)
        nibabel = medical("nibabel")
        header = nibabel.Nifti1Header()
        header.set_data_shape(grid.shape)
        header.set_sform(grid.affine, code=1)
        header.set_qform(grid.affine, code=1)
        header.set_xyzt_units("mm")
        return nifti_bytes(nibabel.Nifti1Image, header, grid, kind, values, grid.shape, ".nii.gz")


def _volume(path: Path, reading: Reading) -> Series | None:
    return series_in(path, reading) if path.is_dir() else frames_in(path, reading)
