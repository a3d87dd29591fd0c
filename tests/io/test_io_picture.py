"""PNG, JPEG, BMP, GIF and WEBP: every depth, colour, palette and orientation against what was written."""

import io
import itertools

import numpy as np
import pytest
from io_files import bmp, exif_chunk, packed, png, shown
from PIL import Image, ImageOps

from knowsam.errors import DataError, NotFoundError
from knowsam.io import Reading, encode, extension, header, kind_of, read_image, read_mask

RNG = np.random.default_rng(0)
PLAIN = Reading()
H, W = 5, 7
STORED = Reading(orientation="stored")
LABELS = RNG.integers(0, 3, (H, W), np.uint8)
COLOURS = np.array([[10, 20, 30], [200, 0, 0], [0, 200, 7]], np.uint8)


def same_header(path, reading=PLAIN):
    stored, said = read_image(path, reading), header(path, reading)
    assert (said.channels, *said.shape) == stored.array.shape
    assert said.dtype == stored.array.dtype and said.spacing == stored.spacing
    return stored


# ---------------------------------------------------------------- PNG


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_grey_png_keeps_its_numbers(tmp_path, depth):
    top = 2**depth - 1
    values = RNG.integers(0, top + 1, (H, W))
    values[0, :2] = 0, top
    (tmp_path / "a.png").write_bytes(png(values, depth, 0))
    stored = same_header(tmp_path / "a.png")
    assert (stored.array[0] == values).all() and stored.full_range == (0, top)
    mask = read_mask(tmp_path / "a.png")
    assert (mask.array == values).all() and mask.palette is None and mask.by == "value"


@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize(("colour_type", "samples"), [(2, 3), (4, 2), (6, 4)])
def test_colour_and_alpha_png_keep_their_depth(tmp_path, depth, colour_type, samples):
    values = RNG.integers(0, 2**depth, (H, W, samples))
    (tmp_path / "a.png").write_bytes(png(values, depth, colour_type))
    stored = same_header(tmp_path / "a.png")
    wanted = values[..., :1] if samples == 2 else values[..., :3]
    assert (stored.array == np.moveaxis(wanted, -1, 0)).all() and stored.full_range == (0, 2**depth - 1)
    assert ("alpha dropped" in stored.notes) == (samples in (2, 4))
    if samples == 2:
        assert (read_mask(tmp_path / "a.png").array == values[..., 0]).all()
    elif depth == 8:
        assert (read_mask(tmp_path / "a.png").array == values[..., :3]).all()
    else:
        with pytest.raises(DataError, match="16 bits per colour"):
            read_mask(tmp_path / "a.png")


def test_channels_that_agree_are_one_mask(tmp_path):
    for depth, top in ((8, 255), (16, 60_000)):
        values = np.repeat(RNG.integers(0, top, (H, W, 1)), 3, axis=2)
        (tmp_path / "a.png").write_bytes(png(values, depth, 2))
        assert (read_mask(tmp_path / "a.png").array == values[..., 0]).all()


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_png_palettes(tmp_path, depth):
    table = RNG.integers(1, 256, (2**depth, 3), np.uint8)
    table[0] = 0
    indices = RNG.integers(0, 2**depth, (H, W))
    (tmp_path / "a.png").write_bytes(png(indices, depth, 3, table))
    assert (same_header(tmp_path / "a.png").array == np.moveaxis(table[indices], -1, 0)).all()
    mask = read_mask(tmp_path / "a.png")
    assert (mask.array == indices).all() and mask.by == "index"
    assert mask.palette == {int(i): tuple(table[i].tolist()) for i in np.unique(indices)}
    coloured = read_mask(tmp_path / "a.png", Reading(palette="colour"))
    assert (coloured.array == table[indices]).all() and coloured.by == "colour"


@pytest.mark.parametrize("extension", ["png", "jpg", "webp"])
@pytest.mark.parametrize("tag", range(1, 9))
def test_orientation(tmp_path, tag, extension):
    """Image and mask, each by its own tag; the prediction lies right in viewers, and in tools that turn nothing."""
    path = tmp_path / f"a.{extension}"
    grey = np.zeros((16, 24), np.uint8)
    grey[:8, :8], grey[8:, 16:] = 255, 128
    exif = Image.Exif()
    exif[274] = tag
    Image.fromarray(grey).save(path, exif=exif, **({"lossless": True} if extension == "webp" else {}))
    with Image.open(path) as picture:
        viewed = np.asarray(ImageOps.exif_transpose(picture).convert("L")).astype(int)

    for reading, wanted in ((Reading(), viewed), (STORED, grey.astype(int))):
        stored = same_header(path, reading)
        np.testing.assert_allclose(stored.array[0].astype(int), wanted, atol=3)
        np.testing.assert_allclose(read_mask(path, reading).array.astype(int), wanted, atol=3)
        assert any("orientation tag" in note for note in stored.notes) == (tag != 1)

        labels = (wanted > 60).astype(np.uint8) + (wanted > 200)
        ending, content = encode(path, "masks", labels, ["0", "1", "2"], reading)
        (tmp_path / f"m{ending}").write_bytes(content)
        with Image.open(io.BytesIO(content)) as picture:
            assert (np.asarray(picture) == (grey > 60).astype(np.uint8) + (grey > 200)).all()
            assert (np.asarray(ImageOps.exif_transpose(picture)) == shown(np.asarray(picture), tag)).all()
        assert (read_mask(tmp_path / f"m{ending}", reading).array == labels).all()
        p = np.stack([wanted / 255, 1 - wanted / 255]).astype(np.float32)
        with np.load(io.BytesIO(encode(path, "probabilities", p, ["a", "b"], reading)[1])) as archive:
            np.testing.assert_allclose(archive["probabilities"][0] * 255, grey, atol=3)
            assert int(archive.get("orientation", 1)) == tag


def test_orientation_behind_the_pixels(tmp_path):
    values = RNG.integers(0, 256, (H, W))
    (tmp_path / "a.png").write_bytes(png(values, 8, 0, after=exif_chunk(6)))
    stored = same_header(tmp_path / "a.png")
    assert (stored.array[0] == shown(values, 6)).all()
    (tmp_path / "b.png").write_bytes(png(values, 8, 0, before=exif_chunk(77)))  # no such tag
    assert (same_header(tmp_path / "b.png").array[0] == values).all()


# ---------------------------------------------------------------- BMP

TWO = {"black first": [[0, 0, 0], [255, 255, 255]], "white first": [[255, 255, 255], [0, 0, 0]]}


@pytest.mark.parametrize(("bits", "order", "old"), list(itertools.product([1, 4, 8], TWO, [False, True])))
def test_two_entries_at_every_depth(tmp_path, bits, order, old):
    indices = RNG.integers(0, 2, (H, W))
    (tmp_path / "a.bmp").write_bytes(bmp(indices, bits, TWO[order], old=old))
    level = np.array(TWO[order])[:, 0][indices]
    assert (read_mask(tmp_path / "a.bmp").array == level).all()
    assert (same_header(tmp_path / "a.bmp").array == level).all()
    assert (read_mask(tmp_path / "a.bmp", Reading(palette="index")).array == indices).all()


@pytest.mark.parametrize(("bits", "coloured"), list(itertools.product([1, 4, 8], [False, True])))
def test_bmp_palettes(tmp_path, bits, coloured):
    n = 2**bits
    table = np.repeat(np.arange(n, dtype=np.uint8)[:, None], 3, axis=1)  # index and grey level are one
    if coloured:
        table[1:, 1] = 255 - table[1:, 1]
    indices = RNG.integers(0, n, (H, W))
    (tmp_path / "a.bmp").write_bytes(bmp(indices, bits, table))
    assert (read_mask(tmp_path / "a.bmp").array == indices).all()
    wanted = np.moveaxis(table[indices], -1, 0)
    assert (same_header(tmp_path / "a.bmp").array == (wanted if coloured else wanted[:1])).all()


def test_bmp_of_true_colour(tmp_path):
    colour = RNG.integers(0, 256, (H, W, 3), np.uint8)
    Image.fromarray(colour).save(tmp_path / "a.bmp")
    assert (same_header(tmp_path / "a.bmp").array == np.moveaxis(colour, -1, 0)).all()


# ---------------------------------------------------------------- the rest


def test_gif_masks(tmp_path):
    grey = (LABELS > 0).astype(np.uint8) * 255
    Image.fromarray(grey).save(tmp_path / "a.gif")
    assert (read_mask(tmp_path / "a.gif").array == grey).all()
    picture = Image.frombytes("P", (W, H), LABELS.tobytes())
    picture.putpalette(COLOURS.tobytes())
    picture.save(tmp_path / "b.gif", optimize=False)
    assert (read_mask(tmp_path / "b.gif").array == LABELS).all()
    assert (same_header(tmp_path / "b.gif").array == np.moveaxis(COLOURS[LABELS], -1, 0)).all()


@pytest.mark.parametrize("extension", ["gif", "png", "webp"])
def test_several_frames_are_refused(tmp_path, extension):
    frames = [Image.fromarray(RNG.integers(0, 256, (8, 8), np.uint8)) for _ in range(3)]
    frames[0].save(tmp_path / f"a.{extension}", save_all=True, append_images=frames[1:])
    for read in (read_image, read_mask, header):
        with pytest.raises(DataError, match="holds 3 frames"):
            read(tmp_path / f"a.{extension}")


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_jpeg_modes(tmp_path, mode):
    Image.new("RGB", (16, 8), (120, 120, 120)).convert(mode).save(tmp_path / "a.jpg")
    stored = same_header(tmp_path / "a.jpg")
    assert stored.array.shape == (1 if mode == "L" else 3, 8, 16)
    assert abs(stored.array.astype(int) - 120).max() <= 2
    assert "JPEG may have changed label values" in read_mask(tmp_path / "a.jpg").notes


def test_a_jpeg_with_a_preview_is_its_first_picture(tmp_path):
    first, preview = (Image.new("RGB", (16, 8), (v, v, v)) for v in (120, 7))
    first.save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[preview])
    assert abs(read_image(tmp_path / "a.jpg").array.astype(int) - 120).max() <= 2


def test_few_values_in_many_bits_are_said(tmp_path):
    (tmp_path / "a.png").write_bytes(png(RNG.integers(0, 4096, (H, W)), 16, 0))
    assert any("fewer bits" in note for note in read_image(tmp_path / "a.png").notes)
    (tmp_path / "b.png").write_bytes(png([[0, 60_000]], 16, 0))
    assert not read_image(tmp_path / "b.png").notes


def test_the_content_decides_and_is_said(tmp_path):
    Image.new("L", (4, 4)).save(tmp_path / "a.png", format="TIFF")
    assert read_image(tmp_path / "a.png").notes[0] == "named .png, but is TIFF"
    Image.new("L", (4, 4)).save(tmp_path / "noname", format="PNG")
    assert kind_of(tmp_path / "noname").name == "picture" and header(tmp_path / "noname").shape == (4, 4)


def test_predictions_of_a_picture(tmp_path):
    Image.new("RGB", (6, 4)).save(tmp_path / "a.jpg")
    path, classes = tmp_path / "a.jpg", ["background", "a", "b"]
    assert [extension(path, k) for k in ("masks", "uncertainty", "probabilities")] == [".png", ".png", ".npz"]
    colours = RNG.integers(0, 256, (4, 6, 3), np.uint8)
    for values in (LABELS[:4, :6], RNG.integers(0, 60_000, (4, 6)).astype(np.uint16), colours):
        ending, content = encode(path, "masks", values, classes)
        assert ending == ".png" and (np.asarray(Image.open(io.BytesIO(content))) == values).all()
        assert not Image.open(io.BytesIO(content)).getexif()
    half = np.asarray(Image.open(io.BytesIO(encode(path, "uncertainty", np.full((4, 6), 0.5), classes)[1])))
    assert half.dtype == np.uint8 and (half == 128).all()
    p = RNG.random((3, 4, 6), np.float32)
    with np.load(io.BytesIO(encode(path, "probabilities", p, classes)[1]), allow_pickle=False) as archive:
        assert (archive["probabilities"] == p).all() and archive["classes"].tolist() == classes
        assert archive.files == ["probabilities", "classes"]
    with pytest.raises(ValueError, match=r"\(6, 4\) for an image of \(4, 6\)"):
        encode(path, "masks", np.zeros((6, 4), np.uint8), classes)
    with pytest.raises(DataError, match="70000"):
        encode(path, "masks", np.full((4, 6), 70_000, np.uint32), classes)


@pytest.mark.parametrize("ending", ["png", "jpg", "bmp", "gif", "webp"])
def test_truncation_is_found(tmp_path, ending):
    whole = tmp_path / f"whole.{ending}"
    Image.fromarray(RNG.integers(0, 256, (64, 64, 3), np.uint8)).save(whole)
    content, cut = whole.read_bytes(), tmp_path / f"cut.{ending}"
    for part in np.linspace(1, len(content) * 0.97, 25).astype(int):
        cut.write_bytes(content[:part])
        for read in (read_image, read_mask):
            with pytest.raises(DataError, match="cut"):
                read(cut)


def test_truncated_deep_colour_is_found(tmp_path):
    content = png(RNG.integers(0, 65536, (64, 64, 3)), 16, 2)
    for part in np.linspace(1, len(content) * 0.97, 25).astype(int):
        (tmp_path / "cut.png").write_bytes(content[:part])
        with pytest.raises(DataError, match="cut"):
            read_image(tmp_path / "cut.png")


@pytest.mark.filterwarnings("ignore:Image size")
@pytest.mark.parametrize("side", [8100, 10_000, 60_000])  # below Pillow's warning, above it, above its error
def test_bombs_are_refused_from_the_header(tmp_path, side):
    content = png(packed(np.zeros((1, 1)), 1), 1, 0)
    size = side.to_bytes(4, "big") * 2
    (tmp_path / "bomb.png").write_bytes(content[:16] + size + content[24:])
    for read in (read_image, read_mask, header):
        with pytest.raises(DataError, match=r"bomb\.png"):
            read(tmp_path / "bomb.png")


def test_absent_file(tmp_path):
    for read in (read_image, read_mask, header, kind_of):
        with pytest.raises(NotFoundError, match=r"none\.png does not exist"):
            read(tmp_path / "none.png")
