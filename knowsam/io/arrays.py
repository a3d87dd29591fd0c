"""HDF5 and npz: arrays by name, in the order (D, H, W)."""

import io
import zipfile
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, ClassVar, NamedTuple

import h5py
import numpy as np

from knowsam.errors import DataError
from knowsam.io import raster
from knowsam.io.kind import Kind, labels_of, suffix
from knowsam.io.opening import fits, opened
from knowsam.io.stored import Header, PredictionKind, Reading, Stored, StoredMask, bits_range


class Arrays(Kind):
    """An image under ``Reading.image_key`` and its mask under ``Reading.mask_key``, of one file or of two.

    (H, W), (D, H, W) = (z, y, x), or (C, D, H, W). Another ``Reading.slice_axis`` takes slices along y or x. These
    files say neither spacing nor orientation.
    """

    @abstractmethod
    def names(self, path: Path) -> list[str]:
        """Of all arrays, sorted."""

    @abstractmethod
    def array(self, path: Path, key: str) -> "Any":
        """Context of the array of a name: ``.shape``, ``.dtype`` and ``.read()``; proven harmless before."""

    def header(self, path: Path, reading: Reading) -> Header:
        """From the array's own header."""
        with self._image(path, reading) as (found, _):
            shape = (1, *found.shape)[-4:] if len(found.shape) < 4 else found.shape
            slices = _order(shape[1:], reading)
            return Header(shape[0], tuple(shape[1:][i] for i in slices), found.dtype.newbyteorder("="), None)

    def read(self, path: Path, reading: Reading) -> Stored:
        """(C, H, W) or (C, D, H, W), native type."""
        with self._image(path, reading) as (found, notes):
            array = found.read()
        array = array if array.ndim == 4 else array[None]
        array = array.transpose(0, *(1 + i for i in _order(array.shape[1:], reading)))
        array = np.ascontiguousarray(array, array.dtype.newbyteorder("="))
        return Stored(array, None, bits_range(array.dtype), notes)

    def read_mask(self, path: Path, reading: Reading) -> StoredMask:
        """(H, W) or (D, H, W)."""
        with self.array(path, reading.mask_key) as found:
            _check(path, reading.mask_key, found, (2, 3))
            array = found.read()
        return StoredMask(np.ascontiguousarray(labels_of(in_order(array, reading)[None], str(path))))

    def extension(self, path: Path, kind: PredictionKind) -> str:
        """As the file's own."""
        return suffix(path.name) or self.extensions[0]

    def encode(
        self, path: Path, kind: PredictionKind, values: np.ndarray, classes: Sequence[str], reading: Reading
    ) -> bytes:
        """A file with one array in the file's order of axes, (K, *S) for probabilities: ``Reading.mask_key``,
        ``probabilities`` or ``uncertainty``."""
        spatial = values.ndim - (kind == "probabilities")
        back = np.argsort(_order((0,) * spatial, reading))
        values = values.transpose((0, *(1 + back)) if kind == "probabilities" else back)
        return self.pack(reading.mask_key if kind == "masks" else kind, values, classes)

    @abstractmethod
    def pack(self, key: str, values: np.ndarray, classes: Sequence[str]) -> bytes:
        """A file with one array; probabilities come with the names of their classes."""

    @contextmanager
    def _image(self, path: Path, reading: Reading) -> Iterator[tuple["_Array", tuple[str, ...]]]:
        with self.array(path, reading.image_key) as found:
            _check(path, reading.image_key, found, (2, 3, 4))
            notes: list[str] = []
            shape = found.shape
            if len(shape) == 4:
                notes.append(f"{shape[0]} arrays read as channels: axes (C, D, H, W)")
                if shape[-1] <= 4 < shape[0]:
                    raise DataError(
                        f"{path}: {reading.image_key!r} has shape {shape}; channels come first, (C, D, H, W)",
                        hint="move the last axis to the front",
                    )
            elif len(shape) == 3:
                depth = _order(shape, reading)[0]
                if shape[depth] > 2 * min(shape):
                    shortest = int(np.argmin(shape))
                    notes.append(
                        f"slices are taken along axis {depth} of {shape}, and axis {shortest} is the shortest; if "
                        f"slices lie along that one, set data.reading.slice_axis to {2 - shortest}"
                    )
            yield found, tuple(notes)


class H5(Arrays):
    """HDF5, by h5py."""

    name: ClassVar[str] = "HDF5"
    extensions: ClassVar[tuple[str, ...]] = (".h5", ".hdf5")

    def sniff(self, head: bytes) -> bool:
        """The signature at the beginning."""
        return head.startswith(b"\x89HDF\r\n\x1a\n")

    def names(self, path: Path) -> list[str]:
        """What lies at the top of the file, groups and links among it."""
        with self._file(path) as file:
            return sorted(file)

    @contextmanager
    def _file(self, path: Path) -> Iterator[h5py.File]:
        # by name and without locks where there are none: a read-only or network disk may know no locks
        with opened(path, "an HDF5 file"), h5py.File(path, "r", locking="best-effort") as file:
            yield file

    @contextmanager
    def array(self, path: Path, key: str) -> Iterator["_Array"]:
        """A dataset that is in this file itself."""
        with self._file(path) as file:
            link = file.get(key, getlink=True)
            if link is None:
                raise _absent(path, key, sorted(file))
            if not isinstance(link, h5py.HardLink):  # an external one would open any file the user can read
                raise DataError(f"{path}: {key!r} is a link to another place; this is refused")
            dataset = file[key]
            if not isinstance(dataset, h5py.Dataset):
                raise DataError(f"{path}: {key!r} is a group; needed is a dataset")
            if dataset.is_virtual or dataset.external:
                raise DataError(f"{path}: dataset {key!r} takes its values from other files; this is refused")
            yield _Array(dataset.shape or (), dataset.dtype, dataset)

    def pack(self, key: str, values: np.ndarray, classes: Sequence[str]) -> bytes:
        """Compressed; ``classes`` is an attribute."""
        file = io.BytesIO()
        with h5py.File(file, "w") as h5:
            dataset = h5.create_dataset(key, data=values, compression="gzip")
            if key == "probabilities":
                dataset.attrs["classes"] = list(classes)
        return file.getvalue()


class Npz(Arrays):
    """npz, by numpy; nothing is unpickled."""

    name: ClassVar[str] = "npz"
    extensions: ClassVar[tuple[str, ...]] = (".npz",)

    def sniff(self, head: bytes) -> bool:
        """A zip whose first file is an array."""
        return head.startswith(b"PK\x03\x04") and b".npy" in head[30:300]

    def names(self, path: Path) -> list[str]:
        """Of the archive's members."""
        with self._archive(path) as archive:
            return _members(archive)

    @contextmanager
    def _archive(self, path: Path) -> Iterator[zipfile.ZipFile]:
        with opened(path, "an npz file") as file, zipfile.ZipFile(file) as archive:
            yield archive

    @contextmanager
    def array(self, path: Path, key: str) -> Iterator["_Array"]:
        """A member of the archive, its header read."""
        with self._archive(path) as archive:
            if f"{key}.npy" not in archive.namelist():
                raise _absent(path, key, _members(archive))
            with archive.open(f"{key}.npy") as member:
                version = np.lib.format.read_magic(member)
                old = version == (1, 0)
                read = np.lib.format.read_array_header_1_0 if old else np.lib.format.read_array_header_2_0
                shape, _, dtype = read(member)
            with archive.open(f"{key}.npy") as member:
                yield _Array(shape, dtype, member)

    def pack(self, key: str, values: np.ndarray, classes: Sequence[str]) -> bytes:
        """Compressed; ``classes`` is an array beside."""
        more = {"classes": np.array(list(classes))} if key == "probabilities" else {}
        return raster.npz({key: values, **more})


class _Array(NamedTuple):
    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]
    source: "h5py.Dataset | IO[bytes]"

    def read(self) -> np.ndarray:
        if isinstance(self.source, h5py.Dataset):
            return np.asarray(self.source[()])
        return np.asarray(np.lib.format.read_array(self.source, allow_pickle=False))


def _members(archive: zipfile.ZipFile) -> list[str]:
    return sorted(name.removesuffix(".npy") for name in archive.namelist())


def _absent(path: Path, key: str, there: list[str]) -> DataError:
    return DataError(
        f"{path}: there is no dataset {key!r}; the file holds {', '.join(there[:20]) or 'nothing'}",
        hint="name them in data.reading.image_key and data.reading.mask_key",
    )


def _check(path: Path, key: str, found: _Array, ranks: tuple[int, ...]) -> None:
    shape = found.shape
    if len(shape) not in ranks:
        wanted = " or ".join({2: "(H, W)", 3: "(D, H, W)", 4: "(C, D, H, W)"}[r] for r in ranks)
        raise DataError(f"{path}: dataset {key!r} has shape {shape}; needed is {wanted}")
    if found.dtype.kind not in "buif":
        raise DataError(f"{path}: dataset {key!r} is of type {found.dtype}; needed are numbers")
    fits(path, shape[-3:], shape[0] if len(shape) == 4 else 1)


def in_order(array: np.ndarray, reading: Reading) -> np.ndarray:
    """An array (H, W), or (z, y, x), with its slices along ``reading.slice_axis`` first; no copy."""
    return array.transpose(_order(array.shape, reading))


def _order(shape: tuple[int, ...], reading: Reading) -> tuple[int, ...]:
    """Which stored axis (z, y, x) comes where in (D, H, W)."""
    if len(shape) != 3:
        return tuple(range(len(shape)))
    depth = 2 - reading.slice_axis
    return (depth, *(i for i in range(3) if i != depth))
