import struct
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image

from knowsam.data.readers import (
    raw_labels,
    read_image,
    read_mask,
    resize_image,
    resize_mask,
    scan_folder,
    stored_size,
    to_uint8,
)
from knowsam.errors import ConfigError, DataError, NotFoundError

H, W = 3, 4
GREY = np.arange(12, dtype=np.uint8).reshape(H, W) * 20
COLOUR = np.stack([GREY, GREY[::-1], 255 - GREY], axis=-1)
LABELS = np.array([[0, 1, 2, 0], [2, 1, 0, 0], [0, 0, 1, 2]], np.uint8)


def rgb(grey):
    return np.repeat(np.asarray(grey, np.uint8)[..., None], 3, axis=-1)


def palette_picture():
    picture = Image.frombytes("P", (W, H), LABELS.tobytes())
    picture.putpalette([10, 20, 30, 200, 0, 0, 0, 200, 7])
    return picture


def png(path, width, height, depth, colour_type, rows=b""):
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )


PALETTE_RGB = np.array([[10, 20, 30], [200, 0, 0], [0, 200, 7]], np.uint8)[LABELS]
WIDE = GREY.astype(np.uint16) * 257

IMAGES = {
    "grey.png": (lambda p: Image.fromarray(GREY).save(p), rgb(GREY)),
    "rgb.png": (lambda p: Image.fromarray(COLOUR).save(p), COLOUR),
    "rgb.bmp": (lambda p: Image.fromarray(COLOUR).save(p), COLOUR),
    "rgb.tif": (lambda p: Image.fromarray(COLOUR).save(p), COLOUR),
    "lzw.tiff": (lambda p: Image.fromarray(COLOUR).save(p, compression="tiff_lzw"), COLOUR),
    "alpha.png": (lambda p: Image.fromarray(np.dstack([COLOUR, GREY])).save(p), COLOUR),
    "grey_alpha.png": (lambda p: Image.fromarray(np.dstack([GREY, 255 - GREY]), "LA").save(p), rgb(GREY)),
    "bit.png": (lambda p: Image.fromarray(LABELS > 0).save(p), rgb((LABELS > 0) * 255)),
    "bit.tif": (lambda p: Image.fromarray(LABELS > 0).save(p), rgb((LABELS > 0) * 255)),
    "palette.png": (lambda p: palette_picture().save(p), PALETTE_RGB),
    "palette.bmp": (lambda p: palette_picture().save(p), PALETTE_RGB),
    "wide.png": (lambda p: Image.fromarray(WIDE).save(p), rgb(GREY)),
    "wide.tif": (lambda p: tifffile.imwrite(p, WIDE), rgb(GREY)),
    "wide_big_endian.tif": (lambda p: tifffile.imwrite(p, WIDE, byteorder=">"), rgb(GREY)),
    "wide_rgb.tif": (
        lambda p: tifffile.imwrite(p, COLOUR.astype(np.uint16) * 257, photometric="rgb"),
        COLOUR,
    ),
    "float.tif": (lambda p: tifffile.imwrite(p, (GREY / 255).astype(np.float32)), rgb(GREY)),
    "cmyk.tif": (
        lambda p: Image.fromarray(COLOUR).convert("CMYK").save(p),
        np.asarray(Image.fromarray(COLOUR).convert("CMYK").convert("RGB")),
    ),
}


@pytest.mark.parametrize("name", IMAGES)
def test_image_modes(tmp_path, name):
    write, expected = IMAGES[name]
    write(tmp_path / name)
    image = read_image(tmp_path / name)
    assert image.dtype == np.uint8 and image.shape == (H, W, 3)
    np.testing.assert_array_equal(image, expected)
    assert stored_size(tmp_path / name) == (H, W)


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_jpeg_modes(tmp_path, mode):
    Image.new("RGB", (16, 8), (120, 120, 120)).convert(mode).save(tmp_path / "a.jpg")
    image = read_image(tmp_path / "a.jpg")
    assert image.shape == (8, 16, 3)
    assert abs(image.astype(int) - 120).max() <= 2


def test_eight_bit_is_untouched_only_under_dtype(tmp_path):
    low = GREY // 4
    Image.fromarray(low).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), rgb(low))
    assert read_image(tmp_path / "a.png", "minmax").max() == 255


MASKS = {
    "grey.png": (lambda p: Image.fromarray(LABELS).save(p), LABELS),
    "grey.tif": (lambda p: Image.fromarray(LABELS).save(p), LABELS),
    "palette.png": (lambda p: palette_picture().save(p), LABELS),
    "palette.bmp": (lambda p: palette_picture().save(p), LABELS),
    "palette.tif": (lambda p: palette_picture().save(p), LABELS),
    "bit.png": (lambda p: Image.fromarray(LABELS > 0).save(p), LABELS > 0),
    "two_bits.png": (lambda p: png(p, 4, 1, 2, 0, bytes([0, 0b00011011])), [[0, 1, 2, 3]]),
    "four_bits.png": (lambda p: png(p, 2, 1, 4, 0, bytes([0, 0x5C])), [[5, 12]]),
    "wide.png": (lambda p: Image.fromarray(LABELS.astype(np.uint16) * 300).save(p), LABELS.astype(int) * 300),
    "wide_big_endian.tif": (
        lambda p: tifffile.imwrite(p, LABELS.astype(np.uint16) * 300, byteorder=">"),
        LABELS.astype(int) * 300,
    ),
    "int32.tif": (lambda p: tifffile.imwrite(p, LABELS.astype(np.int32)), LABELS),
    "whole_floats.tif": (lambda p: tifffile.imwrite(p, LABELS.astype(np.float32)), LABELS),
    "equal_channels.png": (lambda p: Image.fromarray(rgb(LABELS)).save(p), LABELS),
    "equal_channels_alpha.png": (
        lambda p: Image.fromarray(np.dstack([rgb(LABELS), GREY])).save(p),
        LABELS,
    ),
    "grey_alpha.png": (lambda p: Image.fromarray(np.dstack([LABELS, GREY]), "LA").save(p), LABELS),
    "colours.png": (lambda p: Image.fromarray(COLOUR).save(p), COLOUR),
}


@pytest.mark.parametrize("name", MASKS)
def test_mask_modes(tmp_path, name):
    write, expected = MASKS[name]
    write(tmp_path / name)
    mask = read_mask(tmp_path / name)
    assert mask.dtype in (np.uint8, np.uint16)
    np.testing.assert_array_equal(mask, np.asarray(expected))


def test_mask_refuses_what_it_would_change(tmp_path):
    tifffile.imwrite(tmp_path / "rgb16.tif", rgb(LABELS).astype(np.uint16), photometric="rgb")
    with pytest.raises(DataError, match="16 bits per colour"):
        read_mask(tmp_path / "rgb16.tif")
    tifffile.imwrite(tmp_path / "soft.tif", LABELS.astype(np.float32) / 2)
    with pytest.raises(DataError, match=r"soft\.tif.*whole numbers.*0\.5"):
        read_mask(tmp_path / "soft.tif")
    with pytest.raises(DataError, match="-1"):
        raw_labels(np.array([[-1, 0]]), "x")


@pytest.mark.parametrize("tag", range(1, 9))
@pytest.mark.parametrize("extension", ["tif", "jpg", "png"])
def test_orientation_is_applied_to_neither(tmp_path, tag, extension):
    path = tmp_path / f"a.{extension}"
    grey = np.zeros((16, 24), np.uint8)
    grey[:8, :8], grey[8:, 16:] = 255, 128
    exif = Image.Exif()
    exif[0x0112] = tag
    Image.fromarray(grey).save(path, exif=exif)
    assert read_mask(path).shape == stored_size(path) == (16, 24)
    np.testing.assert_allclose(read_image(path)[..., 0].astype(int), grey, atol=3)
    np.testing.assert_allclose(read_mask(path).astype(int), grey, atol=3)


BROKEN = {
    "empty.png": (b"", "empty"),
    "page.png": (b"<!DOCTYPE html><html>404</html>", "HTML"),
    "text.jpg": (b"hello", "not a picture"),
    "gif.png": (b"GIF89a" + bytes(40), "not a picture"),
}


@pytest.mark.parametrize("read", [read_image, read_mask, stored_size])
@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_named(tmp_path, name, read):
    content, what = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=what) as caught:
        read(tmp_path / name)
    assert name in str(caught.value)


@pytest.mark.parametrize("extension", ["png", "jpg", "tif", "bmp"])
def test_truncation_is_found(tmp_path, extension):
    whole = tmp_path / f"whole.{extension}"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(whole)
    content = whole.read_bytes()
    cut = tmp_path / f"cut.{extension}"
    for part in np.linspace(1, len(content) * 0.97, 25).astype(int):
        cut.write_bytes(content[:part])
        with pytest.raises(DataError, match="cut"):
            read_image(cut)


@pytest.mark.filterwarnings("ignore:Image size")
@pytest.mark.parametrize("side", [8100, 10_000, 60_000])  # below Pillow's warning, above it, above its error
def test_bombs_are_refused_from_the_header(tmp_path, side):
    png(tmp_path / "bomb.png", side, side, 1, 0)
    with pytest.raises(DataError, match=r"bomb\.png.*pixels"):
        read_image(tmp_path / "bomb.png")


def test_several_pages_and_absent_file(tmp_path):
    tifffile.imwrite(tmp_path / "stack.tif", np.zeros((5, 8, 8), np.uint8), photometric="minisblack")
    with pytest.raises(DataError, match="5 pages"):
        read_image(tmp_path / "stack.tif")
    with pytest.raises(NotFoundError, match=r"none\.png"):
        read_image(tmp_path / "none.png")


@pytest.mark.parametrize(
    ("values", "intensity", "expected"),
    [
        (np.array([0, 65535, 32768], np.uint16), "dtype", [0, 255, 128]),
        (np.array([False, True]), "dtype", [0, 255]),
        (np.array([0.0, 0.5, 1.0]), "dtype", [0, 128, 255]),
        (np.array([-100, 0, 100], np.int16), "minmax", [0, 128, 255]),
        (np.array([7, 7], np.int16), "minmax", [0, 0]),
        (np.array([7, 7], np.float32), "percentile", [0, 0]),
        (np.r_[-1e6, np.arange(998), 1e6], "percentile", None),
    ],
)
def test_to_uint8(values, intensity, expected):
    result = to_uint8(values, intensity)
    assert result.dtype == np.uint8
    if expected is None:  # the outliers did not squeeze the rest
        assert result[0] == 0 and result[-1] == 255 and abs(int(result[500]) - 128) < 3
    else:
        np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.array([0.0, 1.5]), "0 to 1.5"),
        (np.array([-0.1, 1.0]), "-0.1 to 1"),
        (np.array([0, 5], np.int16), "int16"),
        (np.array([np.nan, 1.0]), "NaN"),
        (np.array([1j]), "complex"),
    ],
)
def test_to_uint8_refuses(values, message):
    with pytest.raises(DataError, match=message) as caught:
        to_uint8(values, "dtype", where="case_7.tif")
    assert "case_7.tif" in str(caught.value)


def test_unknown_intensity():
    with pytest.raises(ConfigError, match="dtype, minmax, percentile"):
        to_uint8(GREY, "auto")


def test_resize():
    assert resize_image(COLOUR, (H, W)) is COLOUR
    assert resize_mask(LABELS, (H, W)) is LABELS
    board = rgb(np.indices((64, 64)).sum(axis=0) % 2 * 255)
    small = resize_image(board, 16)
    assert small.shape == (16, 16, 3)
    assert small.min() > 100 and small.max() < 155  # averaged: without a filter it would be 0 or 255
    mask = resize_mask(np.kron(LABELS, np.ones((8, 8), np.uint8)), 12)
    assert mask.shape == (12, 12) and set(np.unique(mask)) == {0, 1, 2}
    assert resize_mask(LABELS, (6, 8)).tolist() == np.kron(LABELS, np.ones((2, 2), int)).tolist()


def test_scan_folder(tmp_path):
    for name in ("b.PNG", "a.jpg", "sub/a.png", ".a.png", "Thumbs.db", "__MACOSX/._a.png", ".git/x.png", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    odd = ["émile", "e\u0301mile", "a b", "-x", "it's", "case.01", "image_image", "😀"]
    for name in odd:
        (tmp_path / f"{name}.png").touch()
    found = scan_folder(tmp_path, (".png", ".jpg"))
    assert list(found) == sorted(["b", "a", "sub/a", *odd])
    with pytest.raises(NotFoundError, match="nowhere"):
        scan_folder(tmp_path / "nowhere", (".png",))
