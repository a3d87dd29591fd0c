"""DICOM: files as pydicom's own functions show them, and folders of slices as the volume that was cut into them."""

import itertools
import zlib

import numpy as np
import pytest

from knowsam.errors import DataError
from knowsam.io import Reading, encode, extension, header, read_image, read_mask, same_place, scan

pydicom = pytest.importorskip("pydicom")
nibabel = pytest.importorskip("nibabel")

from pydicom.data import get_testdata_file  # noqa: E402
from pydicom.dataset import Dataset, FileMetaDataset  # noqa: E402
from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid  # noqa: E402

RNG = np.random.default_rng(0)
PLAIN = Reading()
CLASSES = ["background", "a", "b"]


def dicom(path, array, *, photometric="MONOCHROME2", bits=None, syntax=ExplicitVRLittleEndian, **tags):
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = syntax
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = SecondaryCaptureImageStorage
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = generate_uid()
    data.PatientName = "DOE^JANE"
    data.Rows, data.Columns = array.shape[:2]
    data.SamplesPerPixel = 3 if array.ndim == 3 else 1
    if array.ndim == 3:
        data.PlanarConfiguration = 0
    data.PhotometricInterpretation = photometric
    data.BitsAllocated = 8 * array.dtype.itemsize
    data.BitsStored = bits or data.BitsAllocated
    data.HighBit = data.BitsStored - 1
    data.PixelRepresentation = int(array.dtype.kind == "i")
    data.PixelData = array.tobytes() + b"\0" * (array.nbytes % 2)
    for name, value in tags.items():
        setattr(data, name, value)
    data.save_as(path, enforce_file_format=True)
    return path


def same_header(path, reading=PLAIN):
    stored, said = read_image(path, reading), header(path, reading)
    assert (said.channels, *said.shape) == stored.array.shape
    assert said.dtype == stored.array.dtype and said.spacing == stored.spacing
    return stored


def lut(values, bits, first=0):
    item = Dataset()
    item.LUTDescriptor = [len(values), first, bits]
    item.LUTData = np.asarray(values, "<u2").tobytes()
    item["LUTData"].VR = "OW"
    return [item]


CT = {"RescaleIntercept": "-1024", "RescaleSlope": "1"}

# ---------------------------------------------------------------- values


@pytest.mark.parametrize(
    ("dtype", "bits"), [("u1", 8), ("u2", 10), ("u2", 12), ("u2", 16), ("i2", 12), ("i2", 16), ("u4", 32)]
)
@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_depths(tmp_path, dtype, bits, photometric):
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1)) if dtype[0] == "i" else (0, 2**bits)
    values = RNG.integers(low, high, (5, 7)).astype(dtype)
    stored = same_header(dicom(tmp_path / "a.dcm", values, bits=bits, photometric=photometric))
    wanted = values if photometric == "MONOCHROME2" else (low + high - 1 - values.astype(np.int64))
    assert stored.array.dtype == dtype and (stored.array[0] == wanted).all()
    assert stored.full_range == ((0, 2.0**bits - 1) if dtype[0] == "u" else None)
    assert ("MONOCHROME1 turned round" in stored.notes) == (photometric == "MONOCHROME1")


def test_unused_bits_are_not_values(tmp_path):
    values = RNG.integers(0, 4096, (5, 7)).astype(np.uint16)
    stored = same_header(dicom(tmp_path / "a.dcm", values | 0xA000, bits=12))
    assert (stored.array[0] == values).all()


@pytest.mark.parametrize(
    ("slope", "intercept", "dtype"),
    [("1", "-1024", "i2"), ("1", "0", "u2"), ("2", "0", "i4"), ("0.5", "3", "f4"), ("100000", "0", "f4")],
)
def test_rescaling_gives_native_units(tmp_path, slope, intercept, dtype):
    values = RNG.integers(0, 65536 if slope != "1" or intercept == "0" else 4096, (5, 7)).astype(np.uint16)
    bits = 12 if slope == "1" and intercept != "0" else 16
    path = dicom(tmp_path / "a.dcm", values, bits=bits, RescaleSlope=slope, RescaleIntercept=intercept)
    stored = same_header(path)
    wanted = pydicom.pixels.apply_rescale(values, pydicom.dcmread(path))
    assert stored.array.dtype == dtype
    np.testing.assert_array_equal(stored.array[0], wanted.astype(dtype))
    assert stored.full_range == ((0, 65535) if dtype == "u2" else None)


def test_modality_lut(tmp_path):
    values = RNG.integers(0, 16, (5, 7), np.uint8)
    table = RNG.integers(0, 4096, 16)
    item = lut(table, 12)
    item[0].ModalityLUTType = "OD"
    stored = same_header(dicom(tmp_path / "a.dcm", values, bits=4, ModalityLUTSequence=item))
    assert (stored.array[0] == table[values]).all() and stored.full_range == (0, 4095)


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", None])
@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_a_linear_window_is_the_full_range(tmp_path, function, photometric):
    values = np.arange(0, 4096, 7, dtype=np.uint16)[:580].reshape(20, 29)
    more = {} if function is None else {"VOILUTFunction": function}
    more |= {"WindowCenter": ["40", "500"], "WindowWidth": ["80", "9"]}
    path = dicom(tmp_path / "a.dcm", values, bits=12, photometric=photometric, **CT, **more)
    stored = same_header(path)
    low, high = stored.full_range
    seen = np.clip((stored.array[0] - low) / (high - low), 0, 1)
    data = pydicom.dcmread(path)
    shown = pydicom.pixels.apply_voi_lut(pydicom.pixels.apply_rescale(values, data), data)
    shown = (shown + 1024) / 4095
    np.testing.assert_allclose(seen, shown if photometric == "MONOCHROME2" else 1 - shown, atol=1e-9)
    assert "2 windows, of which the first is used" in stored.notes and stored.display is None


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("way", ["table", "sigmoid"])
def test_what_two_numbers_cannot_say_is_display(tmp_path, way, photometric):
    values = RNG.integers(0, 4096, (20, 30)).astype(np.uint16)
    if way == "table":
        table = np.arange(4096)[::-1] ** 2 >> 16
        tags = {"VOILUTSequence": lut(table, 8), "WindowCenter": "9", "WindowWidth": "9"}
    else:
        tags = {"VOILUTFunction": "SIGMOID", "WindowCenter": "100", "WindowWidth": "300", **CT}
    path = dicom(tmp_path / "a.dcm", values, bits=12, photometric=photometric, **tags)
    stored = same_header(path)
    if way == "table":  # by hand: pydicom 3.0 knows 256 places of a table with entries of 8 bits
        shown = table[values] / 255
    else:
        data = pydicom.dcmread(path)
        shown = (pydicom.pixels.apply_voi_lut(pydicom.pixels.apply_rescale(values, data), data) + 1024) / 4095
    assert stored.display.dtype == np.float32 and stored.display.shape == stored.array.shape
    wanted = shown if photometric == "MONOCHROME2" else 1 - shown
    np.testing.assert_allclose(stored.display[0], wanted, atol=1e-6)
    assert stored.full_range is None and any("seen through" in note for note in stored.notes)


@pytest.mark.parametrize("bits", [8, 12, 16])
@pytest.mark.parametrize("first", [0, 100])
def test_tables_of_every_depth(tmp_path, bits, first):
    """What lies before or behind the table has its first or last entry."""
    table = np.random.default_rng(bits).integers(0, 2**bits, 300)
    values = RNG.integers(0, 600, (20, 30)).astype(np.uint16)
    path = dicom(tmp_path / "a.dcm", values, bits=12, VOILUTSequence=lut(table, bits, first))
    wanted = table[np.clip(values.astype(int) - first, 0, 299)] / (2**bits - 1)
    np.testing.assert_allclose(read_image(path).display[0], wanted, atol=1e-6)
    if bits == 8:  # some write a byte an entry
        item = lut(table, bits, first)
        item[0].LUTData = table.astype(np.uint8).tobytes()
        path = dicom(tmp_path / "b.dcm", values, bits=12, VOILUTSequence=item)
        np.testing.assert_allclose(read_image(path).display[0], wanted, atol=1e-6)


def test_a_senseless_window_is_left_out_and_said(tmp_path):
    values = RNG.integers(0, 4096, (5, 7)).astype(np.uint16)
    stored = same_header(dicom(tmp_path / "a.dcm", values, bits=12, WindowCenter="5", WindowWidth="0"))
    assert stored.full_range == (0, 4095) and any("window left out" in note for note in stored.notes)


def test_colours(tmp_path):
    colour = RNG.integers(0, 256, (4, 6, 3), np.uint8)
    stored = same_header(dicom(tmp_path / "a.dcm", colour, photometric="RGB"))
    assert (stored.array == np.moveaxis(colour, -1, 0)).all() and stored.full_range == (0, 255)
    stored = same_header(
        dicom(tmp_path / "a.dcm", colour.transpose(2, 0, 1).reshape(4, 6, 3), photometric="RGB", PlanarConfiguration=1)
    )
    assert (stored.array == colour.transpose(2, 0, 1).reshape(3, 4, 6)).all()
    indices = RNG.integers(0, 16, (4, 6), np.uint8)
    table, tags = RNG.integers(0, 256, (16, 3)), {}
    for n, name in enumerate(("Red", "Green", "Blue")):
        tags[f"{name}PaletteColorLookupTableDescriptor"] = [16, 0, 16]
        tags[f"{name}PaletteColorLookupTableData"] = (table[:, n] * 257).astype("<u2").tobytes()
    stored = same_header(dicom(tmp_path / "a.dcm", indices, photometric="PALETTE COLOR", **tags))
    assert (stored.array == np.moveaxis(table[indices] * 257, -1, 0)).all() and stored.full_range == (0, 65535)


def test_spacing(tmp_path):
    values = np.zeros((5, 7), np.uint8)
    assert same_header(dicom(tmp_path / "a.dcm", values)).spacing is None
    assert same_header(dicom(tmp_path / "a.dcm", values, PixelSpacing=["0.5", "0.7"])).spacing == (0.5, 0.7)
    stored = same_header(dicom(tmp_path / "a.dcm", values, ImagerPixelSpacing=["0.2", "0.1"]))
    assert stored.spacing == (0.2, 0.1) and "spacing is that of the detector" in stored.notes


def test_masks_and_predictions(tmp_path):
    labels = RNG.integers(0, 3, (5, 7), np.uint8)
    path = dicom(tmp_path / "a.dcm", labels, WindowCenter="1", WindowWidth="2")
    assert (read_mask(path).array == labels).all()
    ending, content = encode(path, "masks", labels, CLASSES)
    assert ending == ".png" and b"JANE" not in content
    (tmp_path / "m.png").write_bytes(content)
    assert (read_mask(tmp_path / "m.png").array == labels).all()
    assert extension(path, "probabilities") == ".npz"


# ---------------------------------------------------------------- names, codecs, damage


@pytest.mark.parametrize("name", ["a.DCM", "b.dicom", "c.IMA", "IM000001", "IM.0001", "1.2.840.10008.7"])
def test_names(tmp_path, name):
    values = RNG.integers(0, 256, (5, 7), np.uint8)
    assert (same_header(dicom(tmp_path / name, values)).array[0] == values).all()
    [(case, [path])] = scan(tmp_path).files.items()
    assert path.name == name and case == (name[0] if name[1] == "." and name[0].isalpha() else name)


def test_without_preamble(tmp_path):
    values = RNG.integers(0, 256, (5, 7), np.uint8)
    data = pydicom.dcmread(dicom(tmp_path / "a.dcm", values))
    del data.file_meta
    data.preamble = None
    data.save_as(tmp_path / "b.dcm", implicit_vr=True, little_endian=True, enforce_file_format=False)
    assert (tmp_path / "b.dcm").read_bytes()[128:132] != b"DICM"
    assert (same_header(tmp_path / "b.dcm").array[0] == values).all()


@pytest.mark.parametrize(
    "name", ["MR_small_RLE.dcm", "MR_small_bigendian.dcm", "MR_small_implicit.dcm", "MR_small_jp2klossless.dcm"]
)
def test_compressed_files_of_pydicom(name):
    plain = pydicom.dcmread(get_testdata_file("MR_small.dcm"))
    stored = same_header(get_testdata_file(name))
    assert (stored.array[0] == plain.pixel_array).all() and stored.spacing == tuple(map(float, plain.PixelSpacing))


def test_an_absent_decoder_is_named(tmp_path, monkeypatch):
    from pydicom.pixels.decoders import JPEGLosslessSV1Decoder
    from pydicom.uid import JPEGLosslessSV1

    monkeypatch.setattr(JPEGLosslessSV1Decoder, "_available", {})
    path = dicom(tmp_path / "a.dcm", np.zeros((4, 4), np.uint8))
    data = pydicom.dcmread(path)
    data.PixelData = pydicom.encaps.encapsulate([b"\xff\xd8\xff\xd9"])
    data["PixelData"].VR = "OB"
    data.file_meta.TransferSyntaxUID = JPEGLosslessSV1
    data.save_as(path)
    with pytest.raises(
        DataError, match=r"a\.dcm: compressed by JPEG Lossless.*, which no installed decoder reads"
    ) as caught:
        read_image(path)
    assert "pip install" in caught.value.hint
    assert header(path).shape == (4, 4)
    data.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.102"  # a film
    data.save_as(path)
    with pytest.raises(DataError, match="compressed by MPEG-4"):
        read_image(path)


def test_what_is_refused(tmp_path):
    values = RNG.integers(-1000, 3000, (5, 7)).astype(np.int16)
    with pytest.raises(DataError, match="holds 2 frames"):
        read_image(dicom(tmp_path / "b.dcm", values, NumberOfFrames=2))
    content = dicom(tmp_path / "a.dcm", values).read_bytes()
    for cut in (0, 50, 200, len(content) - 10):
        (tmp_path / "cut.dcm").write_bytes(content[:cut])
        with pytest.raises(DataError, match=r"cut\.dcm"):
            read_image(tmp_path / "cut.dcm")
    (tmp_path / "x.dcm").write_bytes(b"no dicom at all")
    for read in (read_image, read_mask, header):
        with pytest.raises(DataError, match="not a DICOM image"):
            read(tmp_path / "x.dcm")
    plan = pydicom.dcmread(tmp_path / "a.dcm")
    for name in ("PixelData", "Rows"):
        delattr(plan, name)
    plan.SOPClassUID = "1.2.840.10008.5.1.4.1.1.481.3"
    plan.save_as(tmp_path / "plan.dcm")
    with pytest.raises(DataError, match=r"plan\.dcm: .*no pixels \(RT Structure Set"):
        read_image(tmp_path / "plan.dcm")


def test_bombs(tmp_path):
    path = dicom(tmp_path / "a.dcm", np.zeros((4, 4), np.uint8))
    data = pydicom.dcmread(path)
    data.Rows = data.Columns = 60_000
    data.save_as(path)
    for read in (read_image, header):
        with pytest.raises(DataError, match=r"a\.dcm: 60000 x 60000 pixels"):
            read(path)


def test_a_deflated_bomb_is_not_inflated(tmp_path, monkeypatch):
    monkeypatch.setattr("knowsam.io.dicom_file.MAX_VOXELS", 1 << 24)
    values = RNG.integers(0, 256, (5, 7), np.uint8)
    path = dicom(tmp_path / "a.dcm", values, syntax="1.2.840.10008.1.2.1.99")
    assert (same_header(path).array[0] == values).all()
    content = path.read_bytes()
    length = 144 + int(pydicom.dcmread(path).file_meta.FileMetaInformationGroupLength)
    squeeze = zlib.compressobj(9, zlib.DEFLATED, -15)
    bomb = squeeze.compress(bytes(1 << 25)) + squeeze.flush()
    path.write_bytes(content[:length] + bomb)
    for read in (read_image, header):
        with pytest.raises(DataError, match=r"a\.dcm: inflates to more"):
            read(path)


# ---------------------------------------------------------------- series

VOLUME = RNG.integers(0, 4096, (6, 5, 7)).astype(np.uint16)  # slices, rows, columns
AXIAL = np.array([[1.0, 0, 0], [0, 1, 0]])
PLANES = {
    "axial": AXIAL,
    "coronal": np.array([[1.0, 0, 0], [0, 0, -1]]),
    "sagittal": np.array([[0.0, 1, 0], [0, 0, -1]]),
    "feet first": np.array([[-1.0, 0, 0], [0, 1, 0]]),
    "oblique": np.array([[0.96, 0.28, 0], [-0.28, 0.96, 0]]),
}


def series(folder, volume=VOLUME, directions=AXIAL, gap=2.5, step=1, positions=None, extension="", skip=(), **tags):
    """Slices of a volume along the normal, in files whose names are in no order."""
    folder.mkdir(parents=True, exist_ok=True)
    normal = np.cross(*directions) * step
    uid = tags.pop("SeriesInstanceUID", generate_uid())
    names = np.random.default_rng(1).permutation(len(volume))
    for n, plane in enumerate(volume):
        if n not in skip:
            place = np.array([-30.0, -40, 50]) + normal * (gap * n) if positions is None else positions[n]
            dicom(
                folder / f"IM{names[n]:04}{extension}",
                plane,
                bits=12,
                SeriesInstanceUID=uid,
                InstanceNumber=int(names[n]),
                PixelSpacing=["0.5", "0.8"],
                ImagePositionPatient=[f"{x:.6f}" for x in place],
                ImageOrientationPatient=[f"{x:g}" for x in directions.ravel()],
                **CT | tags,
            )
    return folder


def where(slice_file, row, column):
    """mm in LPS of a pixel, by the formula of PS3.3 C.7.6.2.1.1."""
    data = pydicom.dcmread(slice_file)
    x, y = np.array(data.ImageOrientationPatient, float).reshape(2, 3)
    height, width = map(float, data.PixelSpacing)
    return np.array(data.ImagePositionPatient, float) + x * width * column + y * height * row


@pytest.mark.parametrize(("plane", "step"), list(itertools.product(PLANES, [1, -1])))
def test_a_folder_of_slices_is_a_volume(tmp_path, plane, step):
    folder = series(tmp_path / "scan", directions=PLANES[plane], step=step)
    stored = same_header(folder)
    assert stored.array.dtype == np.int16 and stored.array.shape[0] == 1
    assert sorted(stored.spacing) == pytest.approx([0.5, 0.8, 2.5])
    assert "6 slices of one series, sorted by position" in stored.notes

    labels = (stored.array[0] > 1000).astype(np.uint8)
    ending, content = encode(folder, "masks", labels, CLASSES)
    assert ending == extension(folder, "masks") == extension(folder, "probabilities") == ".nii.gz"
    assert b"JANE" not in content
    (tmp_path / "m.nii.gz").write_bytes(content)
    assert (read_mask(tmp_path / "m.nii.gz").array == labels).all()
    mask = nibabel.load(tmp_path / "m.nii.gz")
    assert mask.header["sform_code"] == mask.header["qform_code"] == 1
    to_voxel = np.linalg.inv(mask.affine)
    for file in folder.iterdir():  # each pixel of each file lies where its label lies
        pixels = pydicom.dcmread(file).pixel_array
        for row, column in ((0, 0), (4, 0), (0, 6), (3, 2)):
            mm = where(file, row, column) * [-1, -1, 1]  # to RAS
            voxel = to_voxel @ [*mm, 1]
            np.testing.assert_allclose(voxel, np.rint(voxel), atol=1e-3)
            assert mask.dataobj[tuple(np.rint(voxel[:3]).astype(int))] == (int(pixels[row, column]) - 1024 > 1000)


@pytest.mark.parametrize("plane", ["axial", "coronal", "sagittal", "feet first"])
def test_a_series_and_its_nifti_are_one_volume(tmp_path, plane):
    folder = series(tmp_path / "scan", directions=PLANES[plane])
    for axis in (0, 1, 2):
        reading = Reading(slice_axis=axis)
        stored = same_header(folder, reading)
        (tmp_path / "v.nii.gz").write_bytes(
            encode(folder, "uncertainty", stored.array[0].astype(np.float32), CLASSES, reading)[1]
        )
        again = read_image(tmp_path / "v.nii.gz", reading)
        assert (again.array == stored.array).all() and again.spacing == pytest.approx(stored.spacing)


def test_a_series_is_seen_through_one_window(tmp_path):
    series(tmp_path / "a", WindowCenter="40", WindowWidth="400")
    assert same_header(tmp_path / "a").full_range == (-160, 239)
    uid = generate_uid()
    series(tmp_path / "b", skip=(5,), WindowCenter="40", WindowWidth="400", SeriesInstanceUID=uid)
    series(tmp_path / "b", skip=range(5), WindowCenter="50", WindowWidth="400", SeriesInstanceUID=uid)
    stored = same_header(tmp_path / "b")
    assert stored.full_range == (-160, 239)
    assert any("2 windows in one series" in note for note in stored.notes)
    series(tmp_path / "c", VOILUTSequence=lut(np.arange(4096)[::-1] >> 4, 8), RescaleIntercept="0")
    stored = read_image(tmp_path / "c")
    np.testing.assert_allclose(stored.display, ((4095 - stored.array.astype(int)) // 16) / 255, atol=1e-6)


def test_slices_with_scales_of_their_own(tmp_path):
    uid = generate_uid()
    series(tmp_path / "a", skip=range(3), RescaleSlope="2", RescaleIntercept="0", SeriesInstanceUID=uid)
    series(tmp_path / "a", skip=(3, 4, 5), RescaleSlope="0.5", RescaleIntercept="0", SeriesInstanceUID=uid)
    stored = same_header(tmp_path / "a")
    wanted = np.concatenate([VOLUME[:3] * 0.5, VOLUME[3:] * 2.0])[:, ::-1, ::-1]  # to the front, and to the right
    assert stored.array.dtype == np.float32 and (stored.array[0] == wanted).all()


def test_tilted_slices(tmp_path):
    positions = [np.array([0, 1.0 * n, 2.5 * n]) for n in range(6)]
    folder = series(tmp_path / "a", positions=positions)
    stored = same_header(folder)
    assert any("tilted" in note for note in stored.notes)
    mask = nibabel.Nifti1Image.from_bytes(
        zlib.decompress(encode(folder, "masks", stored.array[0].astype(np.uint16), CLASSES)[1], 31)
    )
    file = next(f for f in folder.iterdir() if list(pydicom.dcmread(f).ImagePositionPatient) == positions[4].tolist())
    voxel = np.linalg.inv(mask.affine) @ [*(where(file, 3, 2) * [-1, -1, 1]), 1]
    np.testing.assert_allclose(voxel[:3], [2, 3, 4], atol=1e-4)


def frames(path, plane="axial", window=None, order=None, photometric="MONOCHROME2"):
    """All slices of the volume as frames of one file, as newer scanners write them."""
    directions = PLANES[plane]
    data = pydicom.dcmread(dicom(path, VOLUME[0], bits=12, photometric=photometric))
    order = range(len(VOLUME)) if order is None else order
    data.NumberOfFrames = len(order)
    data.PixelData = VOLUME[list(order)].tobytes()

    def item(**tags):
        found = Dataset()
        for name, value in tags.items():
            setattr(found, name, value)
        return [found]

    shared = {"PixelMeasuresSequence": item(PixelSpacing=["0.5", "0.8"])}
    shared["PlaneOrientationSequence"] = item(ImageOrientationPatient=[f"{x:g}" for x in directions.ravel()])
    shared["PixelValueTransformationSequence"] = item(**CT)
    if isinstance(window, list):
        shared["FrameVOILUTSequence"] = item(VOILUTSequence=window)
    elif window:
        shared["FrameVOILUTSequence"] = item(WindowCenter=window[0], WindowWidth=window[1])
    data.SharedFunctionalGroupsSequence = item(**shared)
    data.PerFrameFunctionalGroupsSequence = []
    for n in order:
        place = np.array([-30.0, -40, 50]) + np.cross(*directions) * 2.5 * n
        place = item(ImagePositionPatient=[f"{x:.6f}" for x in place])
        data.PerFrameFunctionalGroupsSequence += item(PlanePositionSequence=place)
    data.save_as(path)
    return path


@pytest.mark.parametrize("plane", PLANES)
@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_frames_are_the_volume_that_slices_are(tmp_path, plane, photometric):
    window = {"WindowCenter": "40", "WindowWidth": "400"}
    one = same_header(series(tmp_path / "a", directions=PLANES[plane], photometric=photometric, **window))
    path = frames(tmp_path / "a.dcm", plane, ("40", "400"), (3, 1, 0, 5, 2, 4), photometric)
    other = same_header(path)
    assert (one.array == other.array).all() and one.array.dtype == other.array.dtype
    assert one.spacing == pytest.approx(other.spacing) and one.full_range == other.full_range is not None
    labels = (other.array[0] > 0).astype(np.uint8)
    masks = [encode(p, "masks", labels, CLASSES) for p in (path, tmp_path / "a")]
    assert [ending for ending, _ in masks] == [".nii.gz"] * 2 and extension(path, "masks") == ".nii.gz"
    first, second = (nibabel.Nifti1Image.from_bytes(zlib.decompress(content, 31)) for _, content in masks)
    np.testing.assert_allclose(first.affine, second.affine, atol=1e-5)
    assert (np.asarray(first.dataobj) == np.asarray(second.dataobj)).all()
    assert same_place(path, tmp_path / "a") == ()


def test_frames_share_a_table(tmp_path):
    stored = same_header(frames(tmp_path / "a.dcm", window=lut(np.arange(4096)[::-1] >> 4, 8)))
    values = stored.array.astype(int)  # HU: what lies below the table has its first entry
    np.testing.assert_allclose(stored.display, ((4095 - np.clip(values, 0, 4095)) // 16) / 255, atol=1e-6)


def test_a_film_is_refused(tmp_path):
    data = pydicom.dcmread(dicom(tmp_path / "a.dcm", VOLUME[0]))
    data.NumberOfFrames, data.PixelData = len(VOLUME), VOLUME.tobytes()
    data.save_as(tmp_path / "a.dcm")
    for call in (read_image, header, lambda p: encode(p, "masks", VOLUME[0], CLASSES)):
        with pytest.raises(DataError, match=r"a\.dcm: holds 6 frames"):
            call(tmp_path / "a.dcm")


def test_a_missing_frame_is_named(tmp_path):
    with pytest.raises(DataError, match="frame 3 and frame 4 are 5 mm: is one missing"):
        read_image(frames(tmp_path / "a.dcm", order=(0, 1, 2, 4, 5)))


def two_series(folder):
    series(folder)
    series(folder, extension=".dcm")


def shuffled_size(folder):
    uid = generate_uid()
    series(folder, skip=(5,), SeriesInstanceUID=uid)
    series(folder, volume=np.zeros((6, 9, 9), np.uint16), skip=range(5), SeriesInstanceUID=uid)


def overview(folder):
    uid = generate_uid()
    series(folder, skip=(5,), SeriesInstanceUID=uid)
    series(folder, directions=PLANES["sagittal"], skip=range(5), SeriesInstanceUID=uid)


def broken_slice(folder):
    series(folder)
    file = sorted(folder.iterdir())[2]
    file.write_bytes(file.read_bytes()[:300])


REFUSED = {
    "two series": (two_series, "12 DICOM files with 2 series"),
    "one place twice": (
        lambda f: series(f, positions=[np.array([0, 0, 2.0 * (n % 5)]) for n in range(6)]),
        "lie at one place",
    ),
    "one missing": (lambda f: series(f, skip=(3,)), "is one missing"),
    "other size": (shuffled_size, "differ in Rows"),
    "an overview": (overview, "differ in ImageOrientationPatient"),
    "a broken one": (broken_slice, "damaged, or without a place"),
    "one without a place": (lambda f: dicom(series(f) / "x", np.zeros((4, 4), np.uint8)), "x beside the slices"),
    "no positions": (lambda f: [f.mkdir(), dicom(f / "a", np.zeros((4, 4), np.uint8))], "1 DICOM files with 0 series"),
    "nothing": (lambda f: f.mkdir(), "0 DICOM files"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_folder_that_is_no_volume_is_refused(tmp_path, name):
    make, message = REFUSED[name]
    make(tmp_path / "scan")
    for read in (read_image, read_mask):
        with pytest.raises(DataError, match=message) as caught:
            read(tmp_path / "scan")
        assert "scan" in str(caught.value)


def test_what_is_beside_a_series_is_said(tmp_path):
    folder = series(tmp_path / "scan")
    dicom(folder / "scout", np.zeros((9, 9), np.uint8), SeriesInstanceUID=generate_uid())
    (folder / "DICOMDIR").touch()
    (folder / "notes.txt").touch()
    assert "1 DICOM files that are not of the series left out" in read_image(folder).notes
    assert same_header(folder).array.shape[1] == 6


def test_series_in_a_tree(tmp_path, monkeypatch):
    series(tmp_path / "p1" / "ct")
    series(tmp_path / "p2" / "ct", extension=".dcm")
    two_series(tmp_path / "p3")
    dicom(tmp_path / "p2" / "ct" / "scout.dcm", np.zeros((9, 9), np.uint8))
    (tmp_path / "xrays").mkdir()
    for name in ("a.dcm", "b.dcm"):
        dicom(tmp_path / "xrays" / name, np.zeros((9, 9), np.uint8))
    found = scan(tmp_path)
    ct = {"p1/ct": [tmp_path / "p1" / "ct"], "p2/ct": [tmp_path / "p2" / "ct"]}
    assert found.files == ct | {f"xrays/{n}": [tmp_path / "xrays" / f"{n}.dcm"] for n in "ab"}
    assert found.passed_over["several DICOM series in one folder"] == [tmp_path / "p3"]
    assert found.passed_over["beside a DICOM series"] == [tmp_path / "p2" / "ct" / "scout.dcm"]
    assert len(scan(tmp_path / "p2", series=False).files) == 7
    assert list(scan(tmp_path / "p1" / "ct").files) == ["ct"]
    monkeypatch.chdir(tmp_path / "p1" / "ct")
    assert list(scan(".").files) == ["ct"] and read_image(".").array.shape[1] == 6
