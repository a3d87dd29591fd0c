"""Files written byte by byte, or by the library that is nobody's reader here; and where the made-up cases lie."""

import os
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
CASES = Path(os.environ.get("KNOWSAM_CASES") or ROOT.parent / "shared" / "cases")

# What a viewer does by tag, as Pillow names it.
TURNS = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def shown(array, tag):
    """A plane (H, W) as viewers show it; each kind of number by way of its place."""
    places = Image.fromarray(np.arange(array.size, dtype=np.int32).reshape(array.shape))
    turned = places if TURNS[tag] is None else places.transpose(TURNS[tag])
    return array.reshape(-1)[np.asarray(turned)]


def packed(values, depth):
    """Rows of numbers of 1, 2, 4, 8 or 16 bits, the first in the high bits: (H, bytes)."""
    values = np.asarray(values)
    rows = values.reshape(len(values), -1)
    if depth == 16:
        return rows.astype(">u2").view(np.uint8)
    bits = np.unpackbits(rows.astype(np.uint8)[..., None], axis=-1)[..., 8 - depth :]
    return np.packbits(bits.reshape(len(rows), -1), axis=1)


def png(values, depth, colour_type, palette=None, before=b"", after=b""):
    """A PNG of (H, W) or (H, W, samples). ``before`` and ``after``: chunks around the pixels."""
    height, width = np.shape(values)[:2]
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    rows = b"".join(b"\0" + row.tobytes() for row in packed(values, depth))
    body = chunk(b"IHDR", header)
    if palette is not None:
        body += chunk(b"PLTE", bytes(np.asarray(palette, np.uint8)))
    return b"\x89PNG\r\n\x1a\n" + body + before + chunk(b"IDAT", zlib.compress(rows)) + after + chunk(b"IEND", b"")


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def exif_chunk(tag):
    exif = Image.Exif()
    exif[274] = tag
    return chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))


def bmp(indices, bits, palette, *, old=False, count=None):
    """A BMP with a palette, rows from the bottom; ``old``: with the short header of OS/2."""
    height, width = np.shape(indices)
    rows = packed(np.asarray(indices)[::-1], bits)
    rows = np.pad(rows, ((0, 0), (0, -rows.shape[1] % 4)))
    bgr = np.asarray(palette, np.uint8)[:, ::-1]
    if old:
        bgr = np.pad(bgr, ((0, 2**bits - len(bgr)), (0, 0)))
        header = struct.pack("<IHHHH", 12, width, height, 1, bits)
    else:
        bgr = np.pad(bgr, ((0, 0), (0, 1)))
        count = len(palette) if count is None else count
        header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, 0, rows.size, 0, 0, count, 0)
    start = 14 + len(header) + bgr.size
    return struct.pack("<2sIHHI", b"BM", start + rows.size, 0, 0, start) + header + bgr.tobytes() + rows.tobytes()
