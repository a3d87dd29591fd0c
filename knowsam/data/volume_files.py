"""Volumes of public downloads: NIfTI, NRRD and HDF5 to arrays with their spacing."""

import io
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from knowsam.errors import DataError, NotFoundError
from knowsam.io.opening import medical


@dataclass(frozen=True)
class Volume:
    """What a file holds.

    Attributes:
        array: (D, H, W): slices, rows, columns, as stored.
        spacing: mm along D, H, W.
        affine: (4, 4) from (W, H, D) indices to mm, right, anterior and superior being positive; None: unknown.
    """

    array: np.ndarray
    spacing: tuple[float, ...]
    affine: np.ndarray | None = None


def read_nifti(path: Path) -> Volume:
    """A NIfTI volume in the order in which it is stored.

    Args:
        path: .nii or .nii.gz.
    Raises:
        DataError: damaged, or no volume of three axes.
        ConfigError: nibabel is not installed.
    """
    nibabel = medical("nibabel")
    try:
        file = nibabel.load(path)
        array = np.asarray(file.dataobj)
    except FileNotFoundError:
        raise NotFoundError(f"{path} does not exist") from None
    except Exception as error:  # a broken file makes nibabel raise nearly any class
        raise DataError(f"{path}: truncated or damaged ({error})") from error
    if array.ndim != 3:
        raise DataError(f"{path}: holds an array of shape {array.shape}; needed is a volume of three axes")
    spacing = tuple(float(v) for v in file.header.get_zooms()[:3])
    return Volume(array.T, spacing[::-1], np.asarray(file.affine))


def read_nrrd(path: Path) -> Volume:
    """An NRRD volume in the order in which it is stored.

    Args:
        path: .nrrd.
    Raises:
        DataError: damaged, or no volume of three axes.
        ConfigError: pynrrd is not installed.
    """
    nrrd = medical("nrrd")
    try:
        array, header = nrrd.read(str(path))
    except FileNotFoundError:
        raise NotFoundError(f"{path} does not exist") from None
    except Exception as error:  # as above
        raise DataError(f"{path}: truncated or damaged ({error})") from error
    if array.ndim != 3:
        raise DataError(f"{path}: holds an array of shape {array.shape}; needed is a volume of three axes")
    affine = np.eye(4)
    directions = header.get("space directions")
    if directions is not None and np.isfinite(np.asarray(directions, float)).all():
        affine[:3, :3] = np.asarray(directions, float).T
        affine[:3, 3] = np.asarray(header.get("space origin", np.zeros(3)), float)
    elif "spacings" in header:
        affine[:3, :3] = np.diag(np.asarray(header["spacings"], float))
    if str(header.get("space", "")).lower() in ("left-posterior-superior", "lps"):
        affine[:2] *= -1
    spacing = tuple(float(v) for v in np.linalg.norm(affine[:3, :3], axis=0))
    return Volume(array.T, spacing[::-1], affine)


def read_h5(path: Path, key: str, spacing: float) -> Volume:
    """A dataset of an HDF5 file with the axes (W, H, D).

    Args:
        path: the file.
        key: of the dataset.
        spacing: mm, which the file does not say.
    Raises:
        DataError: damaged, or no such volume.
    """
    try:
        with h5py.File(path, "r", locking="best-effort") as file:
            dataset = file.get(key)
            if not isinstance(dataset, h5py.Dataset) or dataset.ndim != 3 or dataset.is_virtual or dataset.external:
                raise DataError(f"{path}: there is no volume {key!r} of three axes; the file holds {', '.join(file)}")
            array = dataset[()]
    except FileNotFoundError:
        raise NotFoundError(f"{path} does not exist") from None
    except (OSError, RuntimeError, KeyError, ValueError) as error:
        raise DataError(f"{path}: truncated or damaged ({error})") from error
    return Volume(array.T, (spacing,) * 3, np.diag([spacing, spacing, spacing, 1.0]))


def nifti_bytes(volume: Volume) -> bytes:
    """The content of a NIfTI file (not compressed).

    Args:
        volume: with its affine; one without stands at the origin, axis by axis.
    """
    nibabel = medical("nibabel")
    affine = volume.affine if volume.affine is not None else np.diag([*volume.spacing[::-1], 1.0])
    content: bytes = nibabel.Nifti1Image(np.ascontiguousarray(volume.array.T), affine).to_bytes()
    return content


def h5_bytes(image: np.ndarray, label: np.ndarray, spacing: tuple[float, ...]) -> bytes:
    """The content of an HDF5 file as ``H5Slices`` reads it.

    Args:
        image: (H, W) or (D, H, W).
        label: the same.
        spacing: mm along each axis; an attribute of the image.
    """
    content = io.BytesIO()
    with h5py.File(content, "w") as file:
        file.create_dataset("image", data=image, compression="gzip").attrs["spacing"] = spacing
        file.create_dataset("label", data=label, compression="gzip")
    return content.getvalue()
