"""NIfTI: one volume stored in every orientation gives one array, and each prediction lies where its image lies."""

import gzip
import itertools
import re

import numpy as np
import pytest

from knowsam.errors import DataError, NotFoundError
from knowsam.io import Reading, encode, extension, header, read_image, read_mask, same_place

nibabel = pytest.importorskip("nibabel")

RNG = np.random.default_rng(0)
PLAIN = Reading()
CLASSES = ["background", "a", "b"]
SHAPE = (6, 5, 4)  # x, y, z
MM = (0.7, 0.9, 5.0)
AFFINE = np.array([[0.7, 0, 0, -20], [0, 0.9, 0, 7], [0, 0, 5.0, 100], [0, 0, 0, 1]])
CODES = ["".join(c) for axes in itertools.permutations(("RL", "AP", "SI")) for c in itertools.product(*axes)]


def stored_as(codes, volume, affine=AFFINE):
    """A volume with axes (x, y, z) in RAS and its affine, with the axes that ``codes`` name, by plain arithmetic."""
    order = [next(i for i, pair in enumerate(("RL", "AP", "SI")) if letter in pair) for letter in codes]
    mirrored = [letter in "LPI" for letter in codes]
    array = volume.transpose(*order, *range(3, volume.ndim))
    place = np.zeros((4, 4))  # stored index -> RAS index
    place[3, 3] = 1
    for k, (axis, mirror) in enumerate(zip(order, mirrored, strict=True)):
        place[axis, k] = -1 if mirror else 1
        place[axis, 3] = volume.shape[axis] - 1 if mirror else 0
        array = np.flip(array, k) if mirror else array
    return array, affine @ place


def save(path, values, affine=AFFINE, kind=nibabel.Nifti1Image, name="DOE^JANE", **fields):
    image = kind(values, affine)
    private = name.encode()
    image.header["descrip"] = private
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", private))
    image.header["cal_max"] = 900
    for key, value in fields.items():
        image.header[key] = value
    nibabel.save(image, path)
    return path


def same_header(path, reading=PLAIN):
    stored, said = read_image(path, reading), header(path, reading)
    assert (said.channels, *said.shape) == stored.array.shape
    assert said.dtype == stored.array.dtype and said.spacing == stored.spacing
    return stored


@pytest.mark.parametrize("codes", CODES)
def test_every_orientation_is_one_volume(tmp_path, codes):
    volume = RNG.integers(-1000, 3000, SHAPE).astype(np.int16)
    array, affine = stored_as(codes, volume)
    assert "".join(nibabel.aff2axcodes(affine)) == codes
    path = save(tmp_path / "v.nii.gz", array, affine)
    for axis in (0, 1, 2):
        reading = Reading(slice_axis=axis)
        stored = same_header(path, reading)
        wanted = np.moveaxis(volume.transpose(2, 1, 0), 2 - axis, 0)
        assert stored.array.dtype == np.int16 and (stored.array == wanted).all() and stored.full_range is None
        mm = [MM[axis], *(MM[a] for a in (2, 1, 0) if a != axis)]
        assert stored.spacing == pytest.approx(mm)
        assert any(f"axes {codes} turned" in note for note in stored.notes) == (codes != "RAS")

        before, labels = nibabel.load(path), (wanted > 400).astype(np.uint8)
        p = RNG.random((3, *wanted.shape), np.float32)
        for kind, values in (("masks", labels), ("uncertainty", p[0]), ("probabilities", p)):
            ending, content = encode(path, kind, values, CLASSES, reading)
            out = tmp_path / f"out{ending}"
            out.write_bytes(content)
            after = nibabel.load(out)
            assert np.array_equal(after.affine, before.affine)
            assert after.shape == before.shape + ((3,) if kind == "probabilities" else ())
            if kind == "masks":
                assert (np.asanyarray(after.dataobj) == (array > 400)).all()
                assert (read_mask(out, reading).array == labels).all()
            if kind == "probabilities":
                assert (same_header(out, reading).array == p).all()


@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
@pytest.mark.parametrize("name", ["v.nii", "v.nii.gz", "V.NII", "V.NII.GZ"])
def test_a_prediction_has_the_images_kind_and_nothing_of_the_patient(tmp_path, name, kind):
    path = save(tmp_path / name, RNG.integers(-50, 900, SHAPE).astype(np.int16), kind=kind)
    before = nibabel.load(path)
    shape = same_header(path).array.shape[1:]
    for answer, dtype in (("masks", np.uint8), ("masks", np.uint16), ("uncertainty", np.float32)):
        values = RNG.integers(0, 2, shape).astype(dtype)
        ending, content = encode(path, answer, values, CLASSES)
        assert ending == extension(path, answer) == (name[1:] if answer == "masks" else ".nii.gz")
        assert (content[:2] == b"\x1f\x8b") == ending.lower().endswith(".gz")
        raw = gzip.decompress(content) if ending.lower().endswith(".gz") else content
        assert b"JANE" not in raw
        after = kind.from_bytes(raw)
        assert after.get_data_dtype() == dtype and np.array_equal(after.affine, before.affine)
        for key in ("sform_code", "qform_code", "xyzt_units"):
            assert after.header[key] == before.header[key]
        assert after.header.get_zooms() == before.header.get_zooms()
        assert encode(path, answer, values, CLASSES)[1] == content  # no clock in it


@pytest.mark.parametrize("dtype", ["u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f4", "f8"])
@pytest.mark.parametrize("order", "<>")
def test_every_type(tmp_path, dtype, order):
    values = RNG.normal(size=SHAPE).astype(dtype)
    if dtype[0] != "f":
        info = np.iinfo(dtype)
        values = RNG.integers(info.min, info.max, SHAPE, dtype, endpoint=True)
    header_of = nibabel.Nifti1Header(endianness=order)
    header_of.set_data_dtype(np.dtype(dtype).newbyteorder(order))
    nibabel.save(nibabel.Nifti1Image(values, AFFINE, header_of), tmp_path / "v.nii")
    stored = same_header(tmp_path / "v.nii")
    assert stored.array.dtype == dtype and (stored.array[0] == values.transpose(2, 1, 0)).all()
    assert stored.full_range == ((0, float(np.iinfo(dtype).max)) if dtype[0] == "u" else None)
    labels = (values > 1).astype(np.uint8).transpose(2, 1, 0)
    content = encode(tmp_path / "v.nii", "masks", labels, CLASSES)[1]
    assert (np.asarray(nibabel.Nifti1Image.from_bytes(content).dataobj) == (values > 1)).all()


def scaled(path, values, slope, inter):
    image = nibabel.Nifti1Image(values, AFFINE)
    image.header.set_slope_inter(slope, inter)
    nibabel.save(image, path)
    content = bytearray(path.read_bytes())  # nibabel would divide the values
    content[112:120] = np.array([slope, inter], "<f4").tobytes()
    path.write_bytes(content)


def test_scaling(tmp_path):
    values = RNG.integers(0, 4096, SHAPE).astype(np.int16)
    scaled(tmp_path / "v.nii", values, 1.0, -1024.0)
    stored = same_header(tmp_path / "v.nii")
    assert stored.array.dtype == np.float32 and (stored.array[0] == values.transpose(2, 1, 0) - 1024.0).all()
    assert stored.full_range is None and any("plus -1024" in note for note in stored.notes)
    scaled(tmp_path / "v.nii", values.astype(np.int32), 0.5, 3.0)
    assert (same_header(tmp_path / "v.nii").array[0] == values.transpose(2, 1, 0) * 0.5 + 3).all()
    scaled(tmp_path / "m.nii", (values % 3 * 100).astype(np.int32), 0.01, 0.0)  # 0.01 is no binary number
    mask = read_mask(tmp_path / "m.nii")
    assert (mask.array == values.transpose(2, 1, 0) % 3).all() and any("rounded" in note for note in mask.notes)
    scaled(tmp_path / "m.nii", np.full(SHAPE, 5, np.uint8), 0.5, 0.0)
    with pytest.raises(DataError, match=r"such as 2\.5"):
        read_mask(tmp_path / "m.nii")


@pytest.mark.parametrize("codes", ["RAS", "LPS", "ASR", "IRP"])
def test_channels(tmp_path, codes):
    volume = RNG.normal(size=(*SHAPE, 3)).astype(np.float32)
    array, affine = stored_as(codes, volume)
    for name, stored_array in (("four", array), ("five", array[:, :, :, None])):
        path = save(tmp_path / f"{name}.nii.gz", stored_array, affine)
        stored = same_header(path)
        assert (stored.array == volume.transpose(3, 2, 1, 0)).all() and "3 volumes read as channels" in stored.notes
        ending, content = encode(path, "masks", RNG.integers(0, 2, (4, 5, 6), np.uint8), CLASSES)
        (tmp_path / f"m{ending}").write_bytes(content)
        assert nibabel.load(tmp_path / f"m{ending}").shape == array.shape[:3]
    with pytest.raises(DataError, match="colours of type float32"):
        read_mask(path)


@pytest.mark.parametrize(
    ("codes", "flat"), [("RAS", "zyx"), ("LPS", "zyx"), ("PSR", "xzy"), ("RSA", "yzx"), ("SAL", "xyz")]
)
def test_two_axes_are_a_picture(tmp_path, codes, flat):
    """Whatever plane it lies in, rows run along the later of x, y, z."""
    depth = "xyz".index(flat[0])
    shape = [6, 5, 4]
    shape[depth] = 1
    volume = RNG.integers(0, 256, shape).astype(np.uint8)
    array, affine = stored_as(codes, volume)
    assert array.shape[2] == 1
    picture = np.moveaxis(volume.transpose(2, 1, 0), 2 - depth, 0)[0]
    path = save(tmp_path / "v.nii", array[..., 0], affine)
    stored = same_header(path)
    assert (stored.array[0] == picture).all()
    assert stored.spacing == pytest.approx([MM["xyz".index(a)] for a in "zyx" if a != flat[0]])
    (tmp_path / "m.nii").write_bytes(encode(path, "masks", picture % 3, CLASSES)[1])
    again = nibabel.load(tmp_path / "m.nii")
    assert again.shape == array.shape[:2] and (np.asarray(again.dataobj) == array[..., 0] % 3).all()
    p = np.stack([picture] * 3)
    (tmp_path / "p.nii.gz").write_bytes(encode(path, "probabilities", p, CLASSES)[1])
    assert nibabel.load(tmp_path / "p.nii.gz").shape == (*array.shape, 3)


@pytest.mark.parametrize("shape", [(6, 5, 1), (6, 5, 4, 1)])
def test_axes_of_one(tmp_path, shape):
    values = RNG.integers(0, 256, shape).astype(np.uint8)
    path = save(tmp_path / "v.nii", values)
    stored = same_header(path)
    assert stored.array.shape == (1, values.size // 30, 5, 6)
    content = encode(path, "masks", stored.array[0], CLASSES)[1]
    again = nibabel.Nifti1Image.from_bytes(content)
    assert again.shape == shape and (np.asarray(again.dataobj) == values).all()


def test_colours(tmp_path):
    rgb = RNG.integers(0, 256, (*SHAPE, 3), np.uint8)
    values = np.ascontiguousarray(rgb).view([("R", "u1"), ("G", "u1"), ("B", "u1")])[..., 0]
    nibabel.save(nibabel.Nifti1Image(values, AFFINE), tmp_path / "v.nii.gz")
    stored = same_header(tmp_path / "v.nii.gz")
    assert (stored.array == rgb.transpose(3, 2, 1, 0)).all() and stored.full_range == (0, 255)
    assert (read_mask(tmp_path / "v.nii.gz").array == rgb.transpose(2, 1, 0, 3)).all()


@pytest.mark.parametrize("codes", ["RAS", "LPS", "SAR", "AIL"])
def test_a_mask_lies_where_its_image_lies(tmp_path, codes):
    volume = RNG.integers(0, 3, (5, 5, 5)).astype(np.int16)
    image = save(tmp_path / "v.nii.gz", *stored_as(codes, volume))
    assert same_place(image, save(tmp_path / "ras.nii", volume)) == ()
    assert same_place(image, image) == ()
    if codes != "RAS":  # saved from the bare array
        bare = save(tmp_path / "bare.nii", stored_as(codes, volume)[0], np.eye(4))
        with pytest.raises(DataError, match=rf"bare\.nii: axes RAS by its header, its image .*v\.nii\.gz has {codes}"):
            same_place(image, bare)
    moved = AFFINE.copy()
    moved[0, 3] += 40
    [note] = same_place(image, save(tmp_path / "moved.nii", *stored_as(codes, volume, moved)))
    assert "up to 40 mm away" in note
    np.savez(tmp_path / "x.npz", label=volume)
    assert same_place(image, tmp_path / "x.npz") == ()


def undirected(path):
    content = bytearray(path.read_bytes())
    content[252:256] = bytes(4)  # qform_code, sform_code
    path.write_bytes(content)


def test_units_and_absent_directions(tmp_path):
    values = np.zeros(SHAPE, np.uint8)
    path = save(tmp_path / "v.nii", values, xyzt_units=3)  # micrometres
    assert same_header(path).spacing == pytest.approx((0.005, 0.0009, 0.0007))
    undirected(path)
    assert any("names no directions: taken as LAS" in note for note in same_header(path).notes)
    path = save(tmp_path / "v.nii", values)
    content = bytearray(path.read_bytes())
    content[296:312] = bytes(16)  # the second row of the sform
    path.write_bytes(content)
    stored = same_header(path)
    assert stored.spacing is None and any("left as stored" in note for note in stored.notes)
    assert encode(path, "masks", stored.array[0], CLASSES)[0] == ".nii"


def test_an_oblique_volume_goes_to_the_nearest_axes(tmp_path):
    angle = np.deg2rad(25)
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag([-0.7, 0.9, 5])
    volume = RNG.integers(0, 99, SHAPE).astype(np.int16)
    path = save(tmp_path / "v.nii", volume, affine)
    wanted = np.asarray(nibabel.as_closest_canonical(nibabel.load(path)).dataobj)
    assert (same_header(path).array[0] == wanted.transpose(2, 1, 0)).all()
    assert same_header(path).spacing == pytest.approx((5, 0.9, 0.7))


def test_what_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"has axes \(3, 4, 5, 2, 2\)"):
        read_image(save(tmp_path / "b.nii", np.zeros((3, 4, 5, 2, 2), np.uint8)))
    with pytest.raises(DataError, match="complex64; needed are numbers"):
        read_image(save(tmp_path / "c.nii", np.zeros((3, 4, 5), np.complex64)))
    path = save(tmp_path / "a.nii.gz", RNG.integers(-50, 900, (20, 20, 20)).astype(np.int16))
    content = path.read_bytes()
    for cut in (0, 3, 100, 340, len(content) // 2, len(content) - 9, len(content) - 1):
        (tmp_path / "cut.nii.gz").write_bytes(content[:cut])
        with pytest.raises(DataError, match=r"cut\.nii\.gz"):
            read_image(tmp_path / "cut.nii.gz")
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 4
    (tmp_path / "flip.nii.gz").write_bytes(flipped)
    with pytest.raises(DataError, match=r"flip\.nii\.gz"):
        read_image(tmp_path / "flip.nii.gz")
    plain = gzip.decompress(content)
    for cut in (3, 100, 340, 352, len(plain) - 1):
        (tmp_path / "cut.nii").write_bytes(plain[:cut])
        with pytest.raises(DataError, match="not a NIfTI volume that can be read"):
            read_image(tmp_path / "cut.nii")
    path.unlink()
    for call in (read_image, read_mask, header, lambda p: encode(p, "masks", np.zeros(1), CLASSES)):
        with pytest.raises(NotFoundError):
            call(path)


@pytest.mark.parametrize("claim", [{"dim": [3, 30_000, 30_000, 30_000, 1, 1, 1, 1]}, {"vox_offset": 1e9}])
def test_a_gzip_bomb_is_refused_by_its_header(tmp_path, claim):
    head = nibabel.Nifti1Image(np.zeros((4, 4, 4), np.uint8), AFFINE).header.copy()
    head["vox_offset"], head["magic"] = 352, b"n+1"
    for key, value in claim.items():
        head[key] = value
    with gzip.open(tmp_path / "bomb.nii.gz", "wb") as file:
        file.write(head.binaryblock + b"\1\0\0\0" + b"\x7f\xff\xff\xf0" + bytes(1 << 22))
    for call in (read_image, header):
        with pytest.raises(
            DataError, match=re.compile(r"bomb\.nii\.gz: .*(at most 2,000,000,000|1,000,000,000 bytes)")
        ):
            call(tmp_path / "bomb.nii.gz")
