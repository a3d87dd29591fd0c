"""PNG, JPEG, BMP, GIF and WEBP, by Pillow."""

import struct
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, ClassVar

import imagecodecs
import numpy as np
from PIL import Image, ImageFile, ImagePalette, UnidentifiedImageError

from knowsam.errors import DataError
from knowsam.io import orientation, palettes, raster
from knowsam.io.kind import Kind, labels_of, raw_labels
from knowsam.io.opening import fits, most_pixels, opened
from knowsam.io.stored import Header, PredictionKind, Reading, Stored, StoredMask

_pillow_limit = threading.Lock()
_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP")
_MAGIC = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"BM", b"GIF8")
_EXIF_CHUNKS = (b"eXIf", b"tEXt", b"zTXt", b"iTXt")


class Picture(Kind):
    """One picture a file.

    - 1-, 2-, 4-bit grey keeps its numbers (0..1, 0..3, 0..15), 16 bits stay 16, in colour too;
    - an image with a palette has its colours, one channel where all are grey; for a mask see ``palettes``;
    - alpha is dropped, never composited: a mask drawn on the plain image still fits it;
    - CMYK becomes RGB; profiles, gamma and dots per inch are not looked at.
    """

    name: ClassVar[str] = "picture"
    extensions: ClassVar[tuple[str, ...]] = (".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".gif", ".webp")

    def sniff(self, head: bytes) -> bool:
        """Whether it is one of the five."""
        return head.startswith(_MAGIC) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")

    def header(self, path: Path, reading: Reading) -> Header:
        """Size as it will be turned."""
        with _opened(path) as (picture, file):
            width, height = picture.size
            turned = reading.orientation == "apply" and orientation.swaps(_tag(picture, file, decoded=False))
            channels, top = _layout(picture)
            shape = (width, height) if turned else (height, width)
            return Header(channels, shape, np.dtype(np.uint16 if top > 255 else np.uint8), None)

    def read(self, path: Path, reading: Reading) -> Stored:
        """(C, H, W) uint8 or uint16; C is 1 or 3."""
        with _opened(path) as (picture, file):
            channels, top = _layout(picture)
            table = _table(picture)
            values, notes = _values(picture, file)
            if picture.mode == "P":
                values = palettes.filled(table, values)[values]
            array = np.moveaxis(values, -1, 0)[:channels] if values.ndim == 3 else values[None]
            array, turned = orientation.turned(array, _tag(picture, file), reading)
        return Stored(array, None, (0.0, float(top)), (*notes, *turned))

    def read_mask(self, path: Path, reading: Reading) -> StoredMask:
        """(H, W), or colours (H, W, 3)."""
        with _opened(path) as (picture, file):
            table = _table(picture)
            values, notes = _values(picture, file)
            tag = _tag(picture, file)
            if picture.mode == "P":
                mask = palettes.read_palette(values, table, reading.palette, path)
            elif values.ndim == 3:
                mask = StoredMask(labels_of(np.moveaxis(values, -1, 0), str(path)))
            else:
                mask = StoredMask(raw_labels(values, str(path)))
            if picture.format in ("JPEG", "WEBP"):
                notes = (*notes, f"{picture.format} may have changed label values")
        array, turned = orientation.turned(mask.array, tag, reading, axes=(0, 1))
        return StoredMask(array, mask.palette, (*notes, *mask.notes, *turned), mask.by)

    def extension(self, path: Path, kind: PredictionKind) -> str:
        """``.npz`` for probabilities, else ``.png``."""
        return raster.extension(kind)

    def encode(
        self, path: Path, kind: PredictionKind, values: np.ndarray, classes: Sequence[str], reading: Reading
    ) -> bytes:
        """See ``raster.encode``."""
        with _opened(path) as (picture, file):
            tag = _tag(picture, file, decoded=False)
        return raster.encode(kind, values, classes, tag, turned=reading.orientation == "apply")


@contextmanager
def _opened(path: Path) -> Iterator[tuple[ImageFile.ImageFile, BinaryIO]]:
    """The picture, not yet decoded, and its file."""
    with opened(path, "a picture") as file:
        try:
            picture = _open(file)
        except UnidentifiedImageError:
            raise ValueError(f"of no known format: {', '.join(_FORMATS)}") from None
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise DataError(f"{path}: more pixels than are read ({error})") from error
        with picture:
            fits(path, picture.size[::-1])
            # the second picture of a JPEG is the camera's preview
            frames = getattr(picture, "n_frames", 1) if picture.format in ("PNG", "GIF", "WEBP") else 1
            if frames > 1:
                raise DataError(
                    f"{path}: holds {frames} frames; one picture per file is read", hint="save each as a file"
                )
            if picture.format == "BMP" and picture.mode in ("1", "L"):
                _undo_grey_bmp(picture, file)
            yield picture, file


def _open(file: BinaryIO) -> ImageFile.ImageFile:
    """Not decoded. Pillow's own limit, one for the whole process, gives way where more pixels are allowed here."""
    if most_pixels() <= (Image.MAX_IMAGE_PIXELS or most_pixels()):
        return Image.open(file, formats=_FORMATS)
    with _pillow_limit:
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(file, formats=_FORMATS)
        finally:
            Image.MAX_IMAGE_PIXELS = before


def _undo_grey_bmp(picture: ImageFile.ImageFile, file: BinaryIO) -> None:
    """Pillow takes a BMP with a grey palette for grey of 1 or 8 bits, whatever its depth, and misreads its rows."""
    file.seek(14)
    head = file.read(16)
    bits = struct.unpack_from("<H", head, 10 if head[0] == 12 else 14)[0]
    grey = np.repeat(np.array([0, 255] if picture.mode == "1" else range(256), np.uint8), 3)
    picture.palette = ImagePalette.raw("RGB", grey.tobytes())
    picture._mode = "P"
    picture.tile = [t._replace(args=({1: "P;1", 4: "P;4"}.get(bits, "P"), *(t.args or ())[1:])) for t in picture.tile]


def _rawmode(picture: ImageFile.ImageFile) -> str:
    args = picture.tile[0].args if picture.tile else None
    return args if isinstance(args, str) else str(args[0]) if args else ""


def _layout(picture: ImageFile.ImageFile) -> tuple[int, int]:
    """Channels, and the value that is white; of an undecoded picture."""
    raw, mode = _rawmode(picture), picture.mode
    top = {"1": 1}.get(mode) or next((n for r, n in (("L;2", 3), ("L;4", 15)) if raw.startswith(r)), 255)
    if mode.startswith("I") or ";16B" in raw:
        top = 65535
    if mode == "P":
        table = _table(picture)
        return (1 if (table == table[:, :1]).all() else 3), top
    grey = mode in ("1", "L", "LA", "I") or mode.startswith("I;") or raw == "LA;16B"
    return (1 if grey else 3), top


def _table(picture: Image.Image) -> np.ndarray:
    """The palette as the file has it, uint8 (n, 3); to be asked before decoding, which fills it up."""
    palette = picture.palette
    if palette is None or not palette.palette:
        return np.zeros((1, 3), np.uint8)
    raw = palette.rawmode or palette.mode
    table = np.frombuffer(bytes(palette.palette), np.uint8)
    table = table[: len(table) // len(raw) * len(raw)].reshape(-1, len(raw))
    return table[:, [raw.index(c) for c in "RGB"]]


def _values(picture: ImageFile.ImageFile, file: BinaryIO) -> tuple[np.ndarray, tuple[str, ...]]:
    """Stored numbers (H, W), indices (H, W), or colours (H, W, 3); without alpha."""
    raw, mode = _rawmode(picture), picture.mode
    notes = ("alpha dropped",) if mode in ("LA", "RGBA", "PA") or "transparency" in picture.info else ()
    if mode == "CMYK":
        notes = (*notes, "CMYK turned to RGB")
    if ";16B" in raw and not mode.startswith("I"):  # Pillow would keep the upper bytes only
        picture.load()  # what is truncated or damaged is said by Pillow
        file.seek(0)
        array = np.asarray(imagecodecs.png_decode(file.read()))
        return (array[..., 0] if raw == "LA;16B" else array[..., :3]), notes
    if mode.startswith("I"):
        return np.asarray(picture).astype(np.uint16), notes
    if mode in ("1", "L", "P"):
        array = np.asarray(picture).astype(np.uint8)
        # Pillow stretches 0..3 and 0..15 to 0..255
        return (array // 85 if raw.startswith("L;2") else array // 17 if raw.startswith("L;4") else array), notes
    if mode == "LA":
        return np.asarray(picture.getchannel(0)), notes
    return np.asarray(picture.convert("RGB")), notes


def _tag(picture: ImageFile.ImageFile, file: BinaryIO, decoded: bool = True) -> int:
    """The orientation tag. To look for one behind a PNG's pixels Pillow decodes all of it."""
    if picture.format == "PNG" and not decoded and "exif" not in picture.info and not _says_more_later(file):
        return 1
    return orientation.valid(picture.getexif().get(orientation.TAG))


def _says_more_later(file: BinaryIO) -> bool:
    """Whether any chunk of a PNG may hold an orientation."""
    file.seek(8)
    while len(head := file.read(8)) == 8:
        if head[4:] in _EXIF_CHUNKS:
            return True
        file.seek(struct.unpack(">I", head[:4])[0] + 4, 1)
    return False
