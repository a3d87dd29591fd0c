"""The inputs on which reading once went wrong, each with the right value."""

import gzip
import io

import numpy as np
import pytest
import tifffile
from io_files import CASES
from PIL import Image, ImageOps

from knowsam.errors import DataError
from knowsam.io import PaletteWatch, Reading, encode, header, read_image, read_mask, scan

nibabel = pytest.importorskip("nibabel")
pydicom = pytest.importorskip("pydicom")
pytestmark = pytest.mark.skipif(not CASES.is_dir(), reason=f"needs the made-up inputs, {CASES}")
SETS = CASES / "sets"


def plain(name):
    """The control: the mask of a case, and its image, plainly written."""
    image = np.asarray(Image.open(SETS / "plain" / "images" / f"case{name}.png"))
    return image, np.asarray(Image.open(SETS / "plain" / "masks" / f"case{name}.png"))


@pytest.mark.parametrize("kind", ["palette_mixed", "palette_white_first"])
def test_palettes(kind):
    watch = PaletteWatch()
    for path in sorted((SETS / kind / "masks").iterdir()):
        mask = read_mask(path)
        assert (mask.array == plain(path.stem[-2:])[1]).all(), path
        watch.check(path, mask)


def test_bmp_of_two_entries():
    for path in sorted((SETS / "bmp2" / "masks").iterdir()):
        assert (read_mask(path).array == plain(path.stem[-2:])[1]).all(), path


def test_gif_masks():
    found = scan(SETS / "gif_masks" / "masks")
    assert len(found.files) == 20 and not found.passed_over
    for case, [path] in found.files.items():
        assert (read_mask(path).array == plain(case[:2])[1]).all(), path


@pytest.mark.parametrize("kind", ["exif_180", "exif_rot90"])
def test_exif(kind):
    """Image and mask lie on one grid, and the prediction lies on the image in viewers and by its stored grid."""
    for path in sorted((SETS / kind / "images").iterdir()):
        stored, mask = read_image(path), read_mask(SETS / kind / "masks" / f"{path.stem}.png")
        assert stored.array.shape[1:] == mask.array.shape == header(path).shape
        assert any("orientation tag" in note and "applied" in note for note in stored.notes)
        upright = ImageOps.exif_transpose(Image.open(path))
        assert (stored.array == np.moveaxis(np.asarray(upright), -1, 0)).all()
        content = encode(path, "masks", mask.array, ["0", "1"])[1]
        picture = Image.open(io.BytesIO(content))
        assert picture.size == Image.open(path).size
        assert (np.asarray(ImageOps.exif_transpose(picture)) == mask.array).all()
        left = read_image(path, Reading(orientation="stored"))
        assert (left.array == np.moveaxis(np.asarray(Image.open(path)), -1, 0)).all()
        assert any("not applied" in note for note in left.notes)


@pytest.mark.parametrize("name", ["planar", "planar_deflate", "contig"])
def test_planar_tiff(name):
    stored = read_image(CASES / "planar16" / f"{name}.tif")
    eight = np.asarray(Image.open(CASES / "planar16" / "eight_bit.png"))
    assert stored.array.dtype == np.uint16 and stored.full_range == (0, 65535)
    assert (stored.array == np.moveaxis(eight, -1, 0).astype(np.uint16) * 257).all()


def test_white_is_zero():
    folder = CASES / "planar16"
    for bits in (8, 16):
        black, white = (read_image(folder / f"{c}{bits}.tif") for c in ("black", "white"))
        assert (black.array == white.array).all()
        assert (black.array[0] == tifffile.imread(folder / f"black{bits}.tif")).all()


def test_float64():
    for path in sorted((SETS / "float64" / "images").iterdir()):
        stored = read_image(path)
        assert stored.array.dtype == np.float64 and stored.full_range is None
        assert (stored.array[0] == tifffile.imread(path)).all()


def test_nifti_in_capitals():
    for name in ("UPPER.NII.GZ", "ras.nii.gz"):
        path = CASES / "nii" / name
        labels = (read_image(path).array[0] > 400).astype(np.uint8)
        ending, content = encode(path, "masks", labels, ["0", "1"])
        assert name.endswith(ending)
        wanted = np.asarray(nibabel.load(CASES / "nii" / "ras.nii.gz").dataobj) > 400
        assert (np.asarray(nibabel.Nifti1Image.from_bytes(gzip.decompress(content)).dataobj) == wanted).all()


def test_voi_lut():
    path = CASES / "dicom" / "voilut_inverting.dcm"
    stored, data = read_image(path), pydicom.dcmread(path)
    table = np.frombuffer(data.VOILUTSequence[0].LUTData, "<u2")
    assert len(table) == 4096 and table[0] == 255 and table[-1] == 0
    np.testing.assert_allclose(stored.display[0] * 255, table[data.pixel_array], atol=1e-4)
    assert (stored.array[0] == data.pixel_array).all() and stored.full_range is None


def test_dicom_names():
    found = scan(CASES / "dcmnames")
    assert sorted(found.files) == ["IM000001", "a", "b", "c"] and not found.passed_over
    for [path] in found.files.values():
        stored = read_image(path)
        assert stored.array.dtype == np.int16 and stored.full_range == (-160, 239)
        assert (stored.array[0] == pydicom.dcmread(path).pixel_array).all()


def test_h5_of_another_order_and_other_names():
    path = CASES / "h5odd" / "mri_norm2.h5"
    assert any("set data.reading.slice_axis to 0" in note for note in read_image(path).notes)
    reading = Reading(slice_axis=0)
    assert read_image(path, reading).array.shape == (1, 6, 30, 28)
    assert read_mask(path, reading).array.shape == (6, 30, 28)
    assert read_image(CASES / "h5odd" / "ct_int16.h5").full_range is None
    with pytest.raises(DataError, match="the file holds img, seg"):
        read_image(CASES / "h5odd" / "other_key.h5")
    assert read_image(CASES / "h5odd" / "other_key.h5", Reading(image_key="img")).array.shape == (1, 30, 28, 6)


@pytest.mark.parametrize("kind", ["ignore255", "instances_60", "plain"])
def test_values_are_left_to_the_label_table(kind):
    for path in sorted((SETS / kind / "masks").iterdir()):
        assert (read_mask(path).array == np.asarray(Image.open(path))).all()
