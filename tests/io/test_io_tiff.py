"""TIFF: every layout x depth x compression x orientation that tifffile writes, pixel by pixel."""

import itertools

import numpy as np
import pytest
import tifffile
from io_files import shown
from PIL import Image

from knowsam.errors import DataError
from knowsam.io import Reading, encode, extension, header, read_image, read_mask

RNG = np.random.default_rng(0)
PLAIN = Reading()
H, W = 19, 24
STORED = Reading(orientation="stored")
DTYPES = ["u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f2", "f4", "f8", "?"]


def values(dtype, *shape):
    if dtype == "?":
        return RNG.integers(0, 2, shape).astype(bool)
    if dtype[0] == "f":
        return RNG.normal(size=shape).astype(dtype)
    info = np.iinfo(dtype)
    return RNG.integers(info.min, info.max, shape, dtype, endpoint=True)


def same_header(path, reading=PLAIN):
    stored, said = read_image(path, reading), header(path, reading)
    assert (said.channels, *said.shape) == stored.array.shape
    assert said.dtype == stored.array.dtype and said.spacing == stored.spacing
    return stored


LAYOUTS = {
    "grey": ((H, W), {"photometric": "minisblack"}),
    "white is 0": ((H, W), {"photometric": "miniswhite"}),
    "interleaved": ((H, W, 3), {"photometric": "rgb"}),
    "planar": ((3, H, W), {"photometric": "rgb", "planarconfig": "separate"}),
    "alpha": ((H, W, 4), {"photometric": "rgb", "extrasamples": ["unassalpha"]}),
    "stack": ((4, H, W), {"photometric": "minisblack", "metadata": None}),
    "colour stack": ((4, H, W, 3), {"photometric": "rgb", "metadata": None}),
}
STORAGES = {
    "plain": {},
    "strips": {"rowsperstrip": 5},
    "tiles": {"tile": (16, 16)},
    "big-endian": {"byteorder": ">"},
    "bigtiff": {"bigtiff": True},
    "deflate": {"compression": "deflate", "rowsperstrip": 7},
    "lzw": {"compression": "lzw", "rowsperstrip": 7},
    "lzw, predictor": {"compression": "lzw", "predictor": True},
    "packbits": {"compression": "packbits"},
    "zstd tiles": {"compression": "zstd", "tile": (16, 16), "byteorder": ">"},
    "lzma": {"compression": "lzma"},
}


@pytest.mark.parametrize(
    ("layout", "dtype"), [(n, d) for n, d in itertools.product(LAYOUTS, DTYPES) if d != "?" or len(LAYOUTS[n][0]) == 2]
)
def test_every_layout_depth_and_storage(tmp_path, layout, dtype):
    shape, how = LAYOUTS[layout]
    tried = 0
    for name, storage in STORAGES.items():
        if "predictor" in storage and dtype[1:] in ("", "8"):
            continue
        if dtype == "?" and {"byteorder", "tile"} & set(storage):
            continue
        array = values(dtype, *shape)
        path = tmp_path / f"{name}.tif"
        tifffile.imwrite(path, array, **how, **storage)
        numbers = array.astype(np.uint8) if dtype == "?" else array
        planes = {"grey": lambda a: a[None], "white is 0": lambda a: a[None], "stack": lambda a: a[None]}
        planes |= {"planar": lambda a: a, "alpha": lambda a: np.moveaxis(a[..., :3], -1, 0)}
        wanted = planes.get(layout, lambda a: np.moveaxis(a, -1, 0))(numbers)
        unsigned = dtype[0] in "u?"
        top = 1 if dtype == "?" else 2 ** (8 * array.itemsize) - 1
        if layout == "white is 0" and unsigned:
            wanted = (top - wanted.astype(object)).astype(numbers.dtype)
        stored = same_header(path)
        assert stored.array.dtype == numbers.dtype, name
        np.testing.assert_array_equal(stored.array, wanted, err_msg=name)
        assert stored.full_range == ((0, float(top)) if unsigned else None)
        assert ("alpha dropped" in stored.notes) == (layout == "alpha")
        assert any("slices of a volume" in note for note in stored.notes) == ("stack" in layout)
        tried += 1
    assert tried >= (7 if dtype == "?" else 10)


@pytest.mark.parametrize("bits", [10, 12, 14])
def test_packed_depths(tmp_path, bits):
    array = RNG.integers(0, 2**bits, (H, W)).astype(np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", array, bitspersample=bits, photometric="miniswhite")
    stored = same_header(tmp_path / "a.tif")
    assert (stored.array[0] == 2**bits - 1 - array).all() and stored.full_range == (0, 2**bits - 1)


@pytest.mark.parametrize("layout", ["grey", "planar", "interleaved", "stack"])
@pytest.mark.parametrize("tag", range(1, 9))
def test_orientation(tmp_path, tag, layout):
    shape, how = LAYOUTS[layout]
    array = RNG.integers(0, 3, shape, np.uint8)
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, array, **how, extratags=[(274, "H", 1, tag, True)])
    planes = np.moveaxis(array, -1, 0) if layout == "interleaved" else array.reshape(-1, H, W)
    turned = np.stack([shown(plane, tag) for plane in planes])
    if layout == "stack":
        planes, turned = planes[None], turned[None]
    for reading, wanted in ((Reading(), turned), (STORED, planes)):
        assert (same_header(path, reading).array == wanted).all()
        mask = read_mask(path, reading).array
        if layout in ("grey", "stack"):
            assert (mask == wanted[0]).all()
            ending, content = encode(path, "masks", mask, ["0", "1", "2"], reading)
            assert ending == extension(path, "masks") == (".tif" if layout == "stack" else ".png")
            (tmp_path / f"m{ending}").write_bytes(content)
            assert (read_mask(tmp_path / f"m{ending}", reading).array == mask).all()
            assert (read_mask(tmp_path / f"m{ending}", STORED).array == planes[0]).all()
        else:
            assert (mask == np.moveaxis(wanted, 0, -1)).all()


def test_masks_of_any_whole_numbers(tmp_path):
    labels = RNG.integers(0, 300, (H, W))
    for dtype in ("u2", ">u2", "u4", "i4", "i8", "f2", "f4", "f8"):
        tifffile.imwrite(tmp_path / "a.tif", labels.astype(dtype), photometric="minisblack")
        mask = read_mask(tmp_path / "a.tif").array
        assert mask.dtype == np.uint16 and (mask == labels).all()
    tifffile.imwrite(tmp_path / "soft.tif", np.array([[0, 0.5], [1, 2]], np.float32))
    with pytest.raises(DataError, match=r"soft\.tif.*whole numbers.*0\.5"):
        read_mask(tmp_path / "soft.tif")
    tifffile.imwrite(tmp_path / "rgb16.tif", values("u2", H, W, 3), photometric="rgb")
    with pytest.raises(DataError, match="16 bits per colour"):
        read_mask(tmp_path / "rgb16.tif")


@pytest.mark.parametrize("scale", [257, 1])  # as the standard has it, and as some write it
def test_palette(tmp_path, scale):
    table = RNG.integers(1, 256, (256, 3), np.uint8)
    table[0] = 0
    indices = values("u1", H, W)
    tifffile.imwrite(
        tmp_path / "a.tif", indices, photometric="palette", colormap=(table.T.astype(np.uint16) * np.uint16(scale))
    )
    assert (same_header(tmp_path / "a.tif").array == np.moveaxis(table[indices], -1, 0)).all()
    mask = read_mask(tmp_path / "a.tif")
    assert (mask.array == indices).all() and mask.by == "index"
    assert mask.palette[int(indices[0, 0])] == tuple(table[indices[0, 0]].tolist())


COLOUR = np.asarray(
    Image.fromarray(RNG.integers(0, 256, (8, 10, 3), np.uint8)).resize((64, 48), Image.Resampling.BICUBIC)
)


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("RGB", {"compression": "tiff_lzw"}),
        ("RGB", {"compression": "jpeg", "quality": 95}),
        ("L", {"compression": "jpeg", "quality": 95}),
        ("YCbCr", {}),
        ("CMYK", {}),
        ("RGBA", {"compression": "tiff_adobe_deflate"}),
        ("LA", {}),
        ("1", {"compression": "group4"}),
        ("1", {"compression": "group3"}),
        ("P", {}),
    ],
)
def test_what_pillow_writes(tmp_path, mode, options):
    picture = Image.fromarray(COLOUR).convert(mode)
    picture.save(tmp_path / "a.tif", **options)
    with Image.open(tmp_path / "a.tif") as again:
        wanted = np.asarray(again.convert("L" if mode in ("1", "L", "LA") else "RGB")).astype(int)
    got = same_header(tmp_path / "a.tif")
    array = got.array.astype(int) * (255 if mode == "1" else 1)
    np.testing.assert_allclose(np.moveaxis(array, 0, -1).squeeze(), wanted, atol=2 if "jpeg" in options.values() else 0)
    if mode == "CMYK":
        assert "CMYK turned to RGB" in got.notes


def test_many_channels(tmp_path):
    array = values("u2", H, W, 5)
    tifffile.imwrite(tmp_path / "a.tif", array, photometric="minisblack", planarconfig="contig")
    assert (same_header(tmp_path / "a.tif").array == np.moveaxis(array, -1, 0)).all()
    with pytest.raises(DataError, match="5 channels"):
        read_mask(tmp_path / "a.tif")


@pytest.mark.parametrize(
    ("program", "axes", "shape", "wanted"),
    [
        *((program, "ZYX", (4, H, W), (0, 1, 2)) for program in ("ome", "imagej")),
        *((program, "CYX", (2, H, W), (0, 1, 2)) for program in ("ome", "imagej")),
        *((program, "ZCYX", (4, 2, H, W), (1, 0, 2, 3)) for program in ("ome", "imagej")),
        *((program, "TYX", (4, H, W), (0, 1, 2)) for program in ("ome", "imagej")),
        ("ome", "CZYX", (2, 4, H, W), (0, 1, 2, 3)),  # ImageJ has an order of its own
    ],
)
def test_axes_that_are_named(tmp_path, program, axes, shape, wanted):
    array = values("u2", *shape)
    sizes = {"PhysicalSizeX": 0.5, "PhysicalSizeY": 0.25, "PhysicalSizeZ": 2.0}
    more = {"resolution": (2, 4), "metadata": {"axes": axes, "spacing": 2.0, "unit": "um"}}
    if program == "ome":
        more = {"ome": True, "metadata": {"axes": axes, **sizes}}
    else:
        more["imagej"] = True
    tifffile.imwrite(tmp_path / "a.tif", array, photometric="minisblack", **more)
    stored = same_header(tmp_path / "a.tif")
    array = array.transpose(wanted)
    assert (stored.array == (array if "C" in axes else array[None])).all()
    mm = (0.002, 0.00025, 0.0005)
    if "T" in axes:
        assert "moments in time read as slices" in stored.notes
    else:
        assert stored.spacing == pytest.approx(mm[-(stored.array.ndim - 1) :])


def test_prediction_of_a_stack_keeps_sizes(tmp_path):
    said = {"axes": "ZYX", "spacing": 3, "unit": "mm"}
    tifffile.imwrite(tmp_path / "a.tiff", values("u1", 4, H, W), imagej=True, resolution=(2, 4), metadata=said)
    labels, classes = RNG.integers(0, 3, (4, H, W), np.uint8), ["a", "b", "c"]
    ending, content = encode(tmp_path / "a.tiff", "masks", labels, classes)
    (tmp_path / "m.tif").write_bytes(content)
    again = same_header(tmp_path / "m.tif")
    assert ending == ".tiff" and (again.array[0] == labels).all() and again.spacing == pytest.approx((3, 0.25, 0.5))
    doubt = RNG.random((4, H, W))
    (tmp_path / "u.tif").write_bytes(encode(tmp_path / "a.tiff", "uncertainty", doubt, classes)[1])
    np.testing.assert_allclose(read_image(tmp_path / "u.tif").array[0], doubt, rtol=1e-6)
    assert extension(tmp_path / "a.tiff", "probabilities") == ".npz"


def test_printers_say_nothing_of_millimetres(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", values("u1", H, W), resolution=(72, 72), resolutionunit="inch")
    assert read_image(tmp_path / "a.tif").spacing is None


def test_previews_are_left_out_and_said(tmp_path):
    full = values("u1", 64, 64)
    with tifffile.TiffWriter(tmp_path / "a.tif") as tiff:
        tiff.write(full, subifds=1)
        tiff.write(full[::2, ::2], subfiletype=1)
    assert (read_image(tmp_path / "a.tif").array[0] == full).all()
    with tifffile.TiffWriter(tmp_path / "b.tif") as tiff:
        tiff.write(full, metadata=None)
        tiff.write(full[::4, ::4], subfiletype=1, metadata=None)
    stored = same_header(tmp_path / "b.tif")
    assert (stored.array[0] == full).all() and "1 previews or further sizes left out" in stored.notes


def several_sizes(path):
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(values("u1", 8, 8), metadata=None)
        tiff.write(values("u1", 9, 8), metadata=None)


def unknown_compression(path):
    tifffile.imwrite(path, values("u1", 8, 8))
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        tiff.pages[0].tags["Compression"].overwrite(32809)  # ThunderScan


REFUSED = {
    "several sizes": (several_sizes, "2 pictures of unlike size or type"),
    "compression": (unknown_compression, "compressed by THUNDERSCAN, which no installed decoder"),
    "complex": (lambda p: tifffile.imwrite(p, values("f4", 8, 8).astype(complex)), "complex"),
    "lab": (lambda p: tifffile.imwrite(p, values("u1", 8, 8, 3), photometric="cielab"), "CIELAB"),
    "two stacks": (
        lambda p: tifffile.imwrite(p, values("u1", 2, 3, 8, 8), metadata={"axes": "TZYX"}, ome=True),
        "axes TZYX",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_named(tmp_path, name):
    write, message = REFUSED[name]
    write(tmp_path / "a.tif")
    for read in (read_image, read_mask, header):
        with pytest.raises(DataError, match=message) as caught:
            read(tmp_path / "a.tif")
        assert "a.tif" in str(caught.value)


@pytest.mark.parametrize("storage", ["plain", "strips", "tiles", "deflate", "lzw", "zstd tiles"])
@pytest.mark.parametrize("layout", ["interleaved", "stack"])
def test_truncation_is_found(tmp_path, layout, storage):
    shape, how = LAYOUTS[layout]
    tifffile.imwrite(tmp_path / "whole.tif", values("u2", *shape), **how, **STORAGES[storage])
    content = (tmp_path / "whole.tif").read_bytes()
    for part in np.linspace(1, len(content) - 1, 40).astype(int):
        (tmp_path / "cut.tif").write_bytes(content[:part])
        try:
            got = read_image(tmp_path / "cut.tif").array
        except DataError as error:
            assert "cut.tif" in str(error)
        else:  # what was cut off lay behind the pixels, or pages that the rest does not speak of
            whole = read_image(tmp_path / "whole.tif").array
            assert got.shape == whole.shape and (got == whole).all(), part


def test_tiles_far_beyond_the_picture_are_refused(tmp_path):
    tifffile.imwrite(tmp_path / "bomb.tif", values("u1", 64, 64), tile=(16, 16), bigtiff=True, compression="lzw")
    with tifffile.TiffFile(tmp_path / "bomb.tif", mode="r+b") as tiff:
        tiff.pages[0].tags["TileWidth"].overwrite(2**30, dtype="Q")
    for read in (read_image, read_mask, header):
        with pytest.raises(DataError, match=r"bomb\.tif: truncated or damaged"):
            read(tmp_path / "bomb.tif")


@pytest.mark.parametrize(("width", "height"), [(8100, 8100), (2**31, 2**31), (0, 5)])
def test_bombs_are_refused_from_the_header(tmp_path, width, height):
    tifffile.imwrite(tmp_path / "bomb.tif", values("u1", 8, 8), bigtiff=True)
    with tifffile.TiffFile(tmp_path / "bomb.tif", mode="r+b") as tiff:
        tiff.pages[0].tags["ImageWidth"].overwrite(width, dtype="Q")
        tiff.pages[0].tags["ImageLength"].overwrite(height, dtype="Q")
    for read in (read_image, read_mask, header):
        with pytest.raises(DataError, match=r"bomb\.tif"):
            read(tmp_path / "bomb.tif")
