"""NIfTI-1 and NIfTI-2 in one file, by nibabel."""

import gzip
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from knowsam.errors import DataError
from knowsam.io.kind import Kind, labels_of, suffix
from knowsam.io.opening import fits, medical, opened
from knowsam.io.stored import Header, PredictionKind, Reading, Stored, StoredMask, bits_range
from knowsam.io.volume_grid import VolumeGrid

_MM = {"meter": 1e3, "mm": 1.0, "micron": 1e-3}
_GEOMETRY = "qform_code quatern_b quatern_c quatern_d qoffset_x qoffset_y qoffset_z sform_code srow_x srow_y srow_z"
_MAX_EXTENSIONS = 1 << 24


class Nifti(Kind):
    """Two or three axes, or three and channels as a fourth or fifth; colours; in canonical orientation.

    Values are those that the header's scaling gives, as float32 (float64 of types beyond 16 bits); without a scaling in
    the file's own type. A file of two axes is a picture.
    """

    name: ClassVar[str] = "NIfTI"
    extensions: ClassVar[tuple[str, ...]] = (".nii", ".nii.gz")

    def sniff(self, head: bytes) -> bool:
        """Whether plain or inside gzip the magic of a single file is there."""
        if head.startswith(b"\x1f\x8b"):
            try:
                head = zlib.decompressobj(31).decompress(head, 352)
            except zlib.error:
                return False
        return head[344:347] == b"n+1" or head[4:7] == b"n+2"

    def header(self, path: Path, reading: Reading) -> Header:
        """Shape and spacing as they will be turned."""
        with _opened(path, reading) as volume:
            return Header(volume.channels, volume.grid.canonical_shape, volume.dtype, volume.grid.spacing)

    def read(self, path: Path, reading: Reading) -> Stored:
        """(C, D, H, W), or (C, H, W) of a file with two axes."""
        with _opened(path, reading) as volume:
            return Stored(volume.values(), volume.grid.spacing, volume.full_range, volume.notes)

    def read_mask(self, path: Path, reading: Reading) -> StoredMask:
        """(D, H, W) or (H, W), or colours."""
        with _opened(path, reading) as volume:
            array, notes = volume.values(), volume.notes
            if volume.scaled and array.dtype.kind == "f":  # 255 * 0.0039215689 is not quite 1
                whole = np.rint(array)
                away = float(np.abs(array - whole).max(initial=0))
                if 0 < away < 1e-3:
                    array, notes = whole, (*notes, f"scaled label values rounded, by {away:.1g} at most")
        return StoredMask(labels_of(array, str(path)), None, notes)

    def grid(self, path: Path, reading: Reading) -> VolumeGrid | None:
        """By the header's affine; None if it names no directions."""
        with _opened(path, reading) as volume:
            return volume.grid if volume.grid.directed else None

    def extension(self, path: Path, kind: PredictionKind) -> str:
        """As the file's own for masks, else compressed."""
        own = suffix(path.name)
        return own if kind == "masks" and own.lower() in self.extensions else ".nii.gz"

    def encode(
        self, path: Path, kind: PredictionKind, values: np.ndarray, classes: Sequence[str], reading: Reading
    ) -> bytes:
        """Unsigned integers for masks, float32 for the rest; axes, affine, units and codes are the image's."""
        with _opened(path, reading) as volume:
            image, grid = volume.image, volume.grid
        header = type(image.header)()
        for key in (*_GEOMETRY.split(), "xyzt_units"):
            header[key] = image.header[key]
        header["pixdim"][:4] = image.header["pixdim"][:4]
        shape = image.shape if len(image.shape) <= 3 or set(image.shape[3:]) == {1} else image.shape[:3]
        return nifti_bytes(type(image), header, grid, kind, values, shape, self.extension(path, kind))


def nifti_bytes(
    maker: Any,
    header: Any,
    grid: VolumeGrid,
    kind: PredictionKind,
    values: np.ndarray,
    shape: tuple[int, ...],
    ending: str,
) -> bytes:
    """A NIfTI file of a prediction.

    Args:
        maker: nibabel's class.
        header: one with the geometry and nothing else.
        grid: of the image.
        kind, values: see ``knowsam.io.encode``.
        shape: of a mask; probabilities have three axes and K as a fourth.
        ending: extension; compressed if it ends with ``.gz``.
    """
    if kind == "probabilities":
        array = np.stack([grid.stored(v) for v in values], axis=-1)  # (i, j, k, K)
    else:
        array = grid.stored(values).reshape(shape)
    array = array if kind == "masks" else array.astype(np.float32, copy=False)
    header.set_data_dtype(array.dtype)
    data: bytes = maker(array, None, header).to_bytes()  # given no affine, it keeps the header's and its codes
    return gzip.compress(data, compresslevel=6, mtime=0) if ending.lower().endswith(".gz") else data


class _Volume(NamedTuple):
    """What the header says; ``values`` decodes."""

    image: Any
    stream: Any
    grid: VolumeGrid
    channels: int
    dtype: np.dtype[np.generic]
    scaled: bool
    full_range: tuple[float, float] | None
    notes: tuple[str, ...]

    def values(self) -> np.ndarray:
        """(C, *S), canonical, of memory of its own."""
        raw = np.asarray(self.image.dataobj.get_unscaled())
        if raw.dtype.fields:
            raw = np.stack([raw[name] for name in "RGB"], axis=-1)
        raw = raw.reshape(*self.grid.shape, self.channels)
        first = self.grid.canonical(raw[..., 0])
        array = np.empty((self.channels, *first.shape), self.dtype)
        for n, into in enumerate(array):
            canonical = self.grid.canonical(raw[..., n])
            for some in range(len(into)) if self.scaled else ():  # bit by bit, for memory's sake
                into[some] = canonical[some].astype(np.float64) * self.image.dataobj.slope + self.image.dataobj.inter
            if not self.scaled:
                into[...] = canonical
        # to the end of what is packed: there is its checksum
        self.stream.read(1 << 16)
        return array


@contextmanager
def _opened(path: Path, reading: Reading) -> Iterator[_Volume]:
    nibabel = medical("nibabel")
    with opened(path, "a NIfTI volume") as file:
        packed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        stream: Any = gzip.GzipFile(fileobj=file) if packed else file
        start = stream.read(540)
        two = 540 in (int.from_bytes(start[:4], "little"), int.from_bytes(start[:4], "big"))
        maker = nibabel.Nifti2Image if two else nibabel.Nifti1Image
        # nibabel reads all that lies before the voxels, however much that is said to be
        before = maker.header_class(start[: maker.header_class.sizeof_hdr])["vox_offset"]
        if before > _MAX_EXTENSIONS:
            raise DataError(f"{path}: {int(before):,} bytes are said to lie before the voxels")
        stream.seek(0)
        image = maker.from_file_map(maker.make_file_map({"image": stream, "header": stream}), mmap=False)
        yield _described(path, image, stream, reading)


def _described(path: Path, image: Any, stream: Any, reading: Reading) -> _Volume:
    """All that the header says, or why the file is refused."""
    shape, stored = tuple(int(n) for n in image.shape), image.get_data_dtype()
    notes: list[str] = []
    if not 2 <= len(shape) <= 5 or (len(shape) == 5 and 1 not in shape[3:]):
        raise DataError(
            f"{path}: has axes {shape}; needed are two or three in space, and channels as a fourth",
            hint="split a series into one file per volume",
        )
    ijk = (shape[0], shape[1], shape[2] if len(shape) > 2 else 1)
    channels = int(np.prod(shape[3:], dtype=object))
    if stored.fields:
        if channels != 1 or not {"R", "G", "B"} <= set(stored.fields):
            raise DataError(f"{path}: voxels of type {stored}; needed are numbers or one colour")
        channels = 3
        notes += ["alpha dropped"] if "A" in stored.fields else []
    elif stored.kind not in "uif":
        raise DataError(f"{path}: voxels of type {stored}; needed are numbers")
    fits(path, ijk if len(shape) > 2 else shape, channels)
    if len(shape) > 3 and channels > 1 and not stored.fields:
        notes.append(f"{channels} volumes read as channels")

    slope, inter = image.dataobj.slope, image.dataobj.inter
    scaled = (slope, inter) != (1.0, 0.0)
    dtype = np.dtype(np.uint8) if stored.fields else stored.newbyteorder("=")
    if scaled:
        wide = stored.itemsize > 2 and not (stored.kind == "f" and stored.itemsize == 4)
        dtype = np.dtype(np.float64 if wide else np.float32)
        notes.append(f"values times {slope:g} plus {inter:g}, as the header says")
    affine = np.array(image.affine, float)
    affine[:3] *= _MM.get(image.header.get_xyzt_units()[0], 1.0)
    grid = VolumeGrid(ijk, affine, reading.slice_axis, flat=len(shape) == 2)
    if not grid.directed:
        notes.append("the header names no directions: axes left as stored")
    elif image.header["sform_code"] == image.header["qform_code"] == 0:
        notes.append("the header names no directions: taken as LAS, as nibabel does")
    elif grid.axes != "RAS":
        notes.append(f"axes {grid.axes} turned to RAS+")
    return _Volume(image, stream, grid, channels, dtype, scaled, None if scaled else bits_range(dtype), tuple(notes))
