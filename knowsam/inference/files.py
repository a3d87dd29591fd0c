"""Files to segment: what is found, how it is read, and what a prediction in the file's own geometry looks like.

Pictures are read as training reads them (``data.readers``). The prediction of a picture is a PNG of the stored size, of
an HDF5 file an HDF5 file, of a NIfTI volume a NIfTI volume with the same affine. Nothing of a patient is copied into a
prediction: DICOM tags, EXIF and NIfTI extensions stay behind.
"""

import gzip
import importlib
import io
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from knowsam.data.h5 import EXTENSIONS as H5_EXTENSIONS
from knowsam.data.h5 import read_h5_image
from knowsam.data.readers import EXTENSIONS, MAX_PIXELS, MAX_VOXELS, grey_slices, read_image, scan_folder, to_uint8
from knowsam.errors import ConfigError, DataError, NotFoundError

Kind = Literal["masks", "probabilities", "uncertainty"]
"""What a file is made of by ``InputFile.encode``."""

OutputKind = Literal["masks", "probabilities", "uncertainty", "overlays"]
OUTPUT_KINDS: tuple[OutputKind, ...] = ("masks", "probabilities", "uncertainty", "overlays")
"""All that may be written of a file; each kind has a folder of its name."""


@dataclass(frozen=True)
class Rules:
    """How files are read.

    Attributes:
        intensity: see ``readers.to_uint8``; of a volume slice by slice.
        h5_key: dataset of an HDF5 file that is the image.
        slice_axis: of a NIfTI array, the axis along which its slices are taken: 0, 1 or 2.
    """

    intensity: str = "dtype"
    h5_key: str = "image"
    slice_axis: int = 2


class InputFile(ABC):
    """One file to segment.

    Args:
        path: where it is.
        name: its path below the folder that was given, with ``/``; names the case.
        rules: how to read it.
    Attributes:
        stem: ``name`` without extension; predictions are called so.
    """

    extensions: ClassVar[tuple[str, ...]]

    def __init__(self, path: Path, name: str, rules: Rules) -> None:
        self.path = path
        self.name = name
        self.rules = rules
        self.stem = name[: -len(_extension(name))]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r})"

    @abstractmethod
    def read(self) -> NDArray[np.uint8]:
        """uint8 (H, W, 3), or (D, H, W, 3) for a volume.

        Raises:
            NotFoundError: it is not there any more.
            DataError: damaged, not what its extension says, or values that do not fit the rules.
        """

    @abstractmethod
    def extension(self, kind: Kind) -> str:
        """What the name of a prediction ends with."""

    @abstractmethod
    def encode(self, kind: Kind, values: np.ndarray, classes: Sequence[str]) -> bytes:
        """Content of a prediction's file.

        Args:
            kind: what ``values`` are.
            values: label values (H, W) or (D, H, W) of unsigned integers, for pictures also colours (H, W, 3);
                probabilities (K, ...); uncertainty in 0..1, (...).
            classes: K names.
        """


class Picture(InputFile):
    """PNG, JPEG, BMP or TIFF; predictions are PNGs, probabilities an npz with ``probabilities`` and ``classes``."""

    extensions: ClassVar[tuple[str, ...]] = EXTENSIONS

    def read(self) -> NDArray[np.uint8]:
        """uint8 (H, W, 3)."""
        return read_image(self.path, self.rules.intensity)

    def extension(self, kind: Kind) -> str:
        """``.npz`` for probabilities, else ``.png``."""
        return ".npz" if kind == "probabilities" else ".png"

    def encode(self, kind: Kind, values: np.ndarray, classes: Sequence[str]) -> bytes:
        """A PNG: label values; uncertainty 0..1 as 0..255. Or an npz."""
        file = io.BytesIO()
        if kind == "probabilities":
            np.savez_compressed(file, probabilities=values, classes=np.array(list(classes)))
        else:
            array = np.rint(values * 255).astype(np.uint8) if kind == "uncertainty" else values
            Image.fromarray(array).save(file, format="PNG")
        return file.getvalue()


class Dicom(Picture):
    """A DICOM file of one frame; predictions as for pictures.

    Grey values are shown through the file's own window if it names one and ``intensity`` is ``"dtype"``.
    """

    extensions: ClassVar[tuple[str, ...]] = (".dcm",)

    def read(self) -> NDArray[np.uint8]:
        """uint8 (H, W, 3)."""
        pydicom = _medical("pydicom")
        with _readable(self.path, "DICOM image"), open(self.path, "rb") as file:
            return self._pixels(pydicom, pydicom.dcmread(file))

    def _pixels(self, pydicom: Any, dataset: Any) -> NDArray[np.uint8]:
        where, frames = str(self.path), int(dataset.get("NumberOfFrames") or 1)
        if frames != 1:
            raise DataError(f"{where}: holds {frames} frames; one frame per file is read")
        if int(dataset.Rows) * int(dataset.Columns) > MAX_PIXELS:
            raise DataError(f"{where}: {dataset.Columns} x {dataset.Rows} pixels; at most {MAX_PIXELS:,} are read")
        array = pydicom.pixels.pixel_array(dataset)  # colours come as RGB, palettes as indices
        if dataset.get("PhotometricInterpretation") == "PALETTE COLOR":
            array = pydicom.pixels.apply_color_lut(array, dataset)
        if array.ndim == 3:
            return to_uint8(array, self.rules.intensity, where=where)
        values = pydicom.pixels.apply_modality_lut(array, dataset)
        centre, width = (_first(dataset.get(key)) for key in ("WindowCenter", "WindowWidth"))
        if self.rules.intensity == "dtype" and centre is not None and width is not None and width >= 1:
            # PS3.3 C.11.2.1.2.1, the linear window
            values = np.clip((values - (centre - 0.5)) / max(width - 1, 1e-6) + 0.5, 0, 1)
        elif self.rules.intensity == "dtype" and array.dtype.kind == "u" and values.dtype == array.dtype:
            values = values / float(2 ** int(dataset.BitsStored) - 1)  # 12 bits are stored in 16
        grey = grey_slices(values, self.rules.intensity, where=where)
        return 255 - grey if dataset.get("PhotometricInterpretation") == "MONOCHROME1" else grey


class H5File(InputFile):
    """An HDF5 file with an image dataset (H, W) or (D, H, W).

    Predictions are HDF5 files with one dataset: ``label``, ``probabilities`` or ``uncertainty``.
    """

    extensions = H5_EXTENSIONS

    def read(self) -> NDArray[np.uint8]:
        """uint8 (H, W, 3) or (D, H, W, 3)."""
        return read_h5_image(self.path, self.rules.h5_key, self.rules.intensity)

    def extension(self, kind: Kind) -> str:
        """As the file's own."""
        return _extension(self.name)

    def encode(self, kind: Kind, values: np.ndarray, classes: Sequence[str]) -> bytes:
        """An HDF5 file with one compressed dataset; probabilities name their classes in the attribute ``classes``."""
        import h5py

        file = io.BytesIO()
        with h5py.File(file, "w") as h5:
            dataset = h5.create_dataset("label" if kind == "masks" else kind, data=values, compression="gzip")
            if kind == "probabilities":
                dataset.attrs["classes"] = list(classes)
        return file.getvalue()


class Nifti(InputFile):
    """A NIfTI image of two or three axes.

    Predictions are NIfTI with the same affine, probabilities with a fourth axis.
    """

    extensions = (".nii", ".nii.gz")

    def read(self) -> NDArray[np.uint8]:
        """uint8 (D, H, W, 3), slices along ``slice_axis``. Rows run along the array's last axis but that one."""
        nibabel = _medical("nibabel")
        with _readable(self.path, "NIfTI volume"):
            values = np.asanyarray(self._open(nibabel).dataobj)
        return grey_slices(self._to_slices(values), self.rules.intensity, where=str(self.path))

    def extension(self, kind: Kind) -> str:
        """As the file's own for masks, else compressed."""
        return _extension(self.name) if kind == "masks" else ".nii.gz"

    def encode(self, kind: Kind, values: np.ndarray, classes: Sequence[str]) -> bytes:
        """Integers for masks, float32 for the rest; axes, affine, units and codes are the image's."""
        nibabel = _medical("nibabel")
        with _readable(self.path, "NIfTI volume"):
            original = self._open(nibabel)
        shape = original.shape
        if kind == "probabilities":
            spatial = (*shape, 1, 1)[:3]
            array = np.stack([self._from_slices(v, spatial) for v in values], axis=-1)  # (x, y, z, K)
        else:
            array = self._from_slices(values, shape)
        header = original.header.copy()
        header.extensions.clear()
        for name in {"descrip", "aux_file", "db_name"} & set(header.keys()):  # free text; NIfTI-2 has no db_name
            header[name] = b""
        header.set_data_dtype(array.dtype)
        header["cal_min"] = header["cal_max"] = 0  # the image's display range
        data = type(original)(array, None, header).to_bytes()  # given no affine, it keeps the header's and its codes
        return gzip.compress(data, compresslevel=6, mtime=0) if self.extension(kind) == ".nii.gz" else data

    def _open(self, nibabel: Any) -> Any:
        """The image with its header checked, its values not yet read."""
        volume = nibabel.load(self.path)
        if not isinstance(volume, nibabel.Nifti1Image):
            raise DataError(f"{self.path}: not a NIfTI volume but {type(volume).__name__}")
        shape, dtype = volume.shape, volume.get_data_dtype()
        if not (2 <= len(shape) <= 3 or (len(shape) == 4 and shape[3] == 1)) or 0 in shape:
            raise DataError(
                f"{self.path}: has axes {shape}; needed are two or three spatial ones",
                hint="Split a series into one file per volume.",
            )
        if dtype.kind not in "buif":
            raise DataError(f"{self.path}: voxels of type {dtype}; needed are numbers")
        if np.prod(shape, dtype=np.int64) > MAX_VOXELS:
            raise DataError(f"{self.path}: has {shape} voxels; at most {MAX_VOXELS:,} are read")
        return volume

    def _to_slices(self, values: np.ndarray) -> np.ndarray:
        """(x, y[, z[, 1]]) -> (D, H, W)."""
        zyx = values.reshape((*values.shape, 1, 1)[:3]).transpose(2, 1, 0)
        return np.moveaxis(zyx, 2 - self.rules.slice_axis, 0)

    def _from_slices(self, slices: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """(D, H, W) -> (x, y[, z[, 1]])."""
        return np.moveaxis(slices, 0, 2 - self.rules.slice_axis).transpose(2, 1, 0).reshape(shape)


FILE_KINDS: tuple[type[InputFile], ...] = (Picture, H5File, Nifti, Dicom)
"""Every kind of file; the extension of a name decides."""


def find_inputs(path: str | Path, rules: Rules, *, beside: str | Path | None = None) -> list[InputFile]:
    """The file, or all files of known kinds in a folder and its subfolders, sorted by name.

    Args:
        path: file or folder. In folders, hidden files and other extensions are passed over.
        rules: how to read them.
        beside: the folder that the predictions go to; what is in it is left out, or, where it holds the files
            themselves, its folders of predictions.
    Raises:
        NotFoundError: no such file or folder.
        DataError: a file of an unknown kind, or a folder without one of a known kind.
    """
    path = Path(path)
    known = [extension for kind in FILE_KINDS for extension in kind.extensions]
    allowed = f"known are {', '.join(known)}"
    if path.is_file():
        found = _input(path, path.name, rules)
        if found is None:
            raise DataError(f"{path} is of no known kind; {allowed}")
        return [found]
    if not path.is_dir():
        raise NotFoundError(f"{path} does not exist", hint="Give a picture, a volume, or a folder that holds some.")
    last = tuple(dict.fromkeys("." + extension.rpartition(".")[2] for extension in known))
    files = [file for group in scan_folder(path, last).values() for file in group]
    for out in [] if beside is None else _output_folders(Path(beside).resolve(), path.resolve()):
        files = [file for file in files if not file.resolve().is_relative_to(out)]
    known_files = (_input(file, file.relative_to(path).as_posix(), rules) for file in files)
    inputs = sorted((item for item in known_files if item is not None), key=lambda item: item.name)
    if not inputs:
        raise DataError(f"{path} holds nothing to segment; {allowed}")
    return inputs


def _output_folders(out: Path, files: Path) -> list[Path]:
    """Folders that hold predictions, not files to segment."""
    return [out / kind for kind in OUTPUT_KINDS] if files.is_relative_to(out) else [out]


def _input(path: Path, name: str, rules: Rules) -> InputFile | None:
    extension = _extension(name).lower()
    kind = next((kind for kind in FILE_KINDS if extension in kind.extensions), None)
    return None if kind is None else kind(path, name, rules)


def _extension(name: str) -> str:
    """``.png`` or ``.nii.gz``, as it is written."""
    return name[-7:] if name.lower().endswith(".nii.gz") else Path(name).suffix


def _medical(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        raise ConfigError(
            f"this kind of file needs {module}, which is not installed", hint="pip install 'knowsam[medical]'"
        ) from None


@contextmanager
def _readable(path: Path, what: str) -> Iterator[None]:
    """Around another library's reading: a broken file makes it raise nearly any class."""
    try:
        yield
    except FileNotFoundError:
        raise NotFoundError(f"{path} does not exist") from None
    except (DataError, MemoryError):
        raise
    except Exception as error:
        raise DataError(f"{path}: not a {what} that can be read ({_line(error)})") from error


def _first(value: Any) -> float | None:
    """A DICOM number, or the first of several."""
    return None if value is None or np.size(value) == 0 else float(np.ravel(value)[0])


def _line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
