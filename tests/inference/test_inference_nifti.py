"""NIfTI volumes come back in their own geometry."""

import gzip

import numpy as np
import pytest

from knowsam.errors import DataError, NotFoundError
from knowsam.inference.files import Rules, find_inputs

CLASSES = ["background", "a", "b"]
RNG = np.random.default_rng(0)
nibabel = pytest.importorskip("nibabel")
AFFINE = np.array([[-1.2, 0.1, 0, 30], [0.1, 1.2, 0.2, -20], [0, -0.2, 9, 5], [0, 0, 0, 1]])


def nifti(path, values, *, kind=nibabel.Nifti1Image, private=b"JANE DOE"):
    image = kind(values, AFFINE)
    image.header.set_xyzt_units("mm", "sec")
    image.set_sform(AFFINE, 1)
    image.set_qform(AFFINE, 2)
    image.header["descrip"] = private
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", private))
    image.header["cal_max"] = 900
    nibabel.save(image, path)
    return path


@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("name", ["v.nii", "v.nii.gz"])
def test_nifti_comes_back_in_its_own_geometry(tmp_path, name, axis, kind):
    values = RNG.integers(-50, 900, (6, 5, 4)).astype(np.int16)
    file = only(nifti(tmp_path / name, values, kind=kind), intensity="minmax", slice_axis=axis)
    volume = file.read()
    rest = [n for n in (2, 1, 0) if n != axis]  # rows along the later axis
    assert volume.shape == (values.shape[axis], *(values.shape[n] for n in rest), 3)
    one = np.moveaxis(values, axis, 0)[1].T.astype(np.float32)
    assert (volume[1, ..., 0] == np.rint((one - one.min()) / (one.max() - one.min()) * 255)).all()

    (tmp_path / "out").mkdir()
    raw = np.moveaxis(values, axis, 0).transpose(0, 2, 1)  # slices as the network sees them
    wanted = (values > 400).astype(np.uint8)
    before = nibabel.load(file.path)
    p = RNG.random((3, *raw.shape), np.float32)
    answers = {"masks": ((raw > 400).astype(np.uint8), np.uint8), "uncertainty": (p[0], np.float32)}
    for answer, (array, dtype) in (answers | {"probabilities": (p, np.float32)}).items():
        path = tmp_path / "out" / f"a{file.extension(answer)}"
        assert path.name.endswith(name[1:] if answer == "masks" else ".nii.gz")
        content = file.encode(answer, array, CLASSES)
        path.write_bytes(content)
        after = nibabel.load(path)
        assert type(after) is kind and after.get_data_dtype() == dtype
        assert after.shape == ((6, 5, 4, 3) if answer == "probabilities" else (6, 5, 4))
        assert np.array_equal(after.affine, before.affine)
        for key in ("sform_code", "qform_code", "xyzt_units"):
            assert after.header[key] == before.header[key]
        assert after.header.get_zooms()[:3] == before.header.get_zooms()
        assert b"JANE" not in (gzip.decompress(content) if path.name.endswith("gz") else content)
        if answer == "masks":
            assert (np.asanyarray(after.dataobj) == wanted).all()
        if answer == "probabilities":
            back = np.moveaxis(np.asanyarray(after.dataobj)[..., 1], axis, 0).transpose(0, 2, 1)
            assert (back == p[1]).all()


@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 1), (6, 5, 4, 1)])
def test_nifti_of_other_axes(tmp_path, shape):
    values = RNG.integers(0, 256, shape).astype(np.uint8)
    file = only(nifti(tmp_path / "v.nii", values))
    volume = file.read()
    assert volume.shape == (values.size // 30, 5, 6, 3)
    (tmp_path / "m.nii").write_bytes(file.encode("masks", volume[..., 0], CLASSES))
    again = nibabel.load(tmp_path / "m.nii")
    assert again.shape == shape and (np.asanyarray(again.dataobj) == values).all()
    (tmp_path / "p.nii.gz").write_bytes(file.encode("probabilities", np.stack([volume[..., 0]] * 3), CLASSES))
    assert nibabel.load(tmp_path / "p.nii.gz").shape == (*(*shape, 1, 1)[:3], 3)


def test_a_scaled_nifti_is_read_by_its_scale(tmp_path):
    image = nibabel.Nifti1Image(np.linspace(0, 1, 60, dtype=np.float32).reshape(5, 4, 3), AFFINE)
    image.header.set_data_dtype(np.int16)  # written with a slope
    nibabel.save(image, tmp_path / "v.nii")
    assert only(tmp_path / "v.nii").read()[2, 3, 4, 0] == 255


def test_what_nifti_is_refused(tmp_path):
    signed = nifti(tmp_path / "a.nii.gz", RNG.integers(-50, 900, (6, 5, 4)).astype(np.int16))
    with pytest.raises(DataError, match="slice 0: pixels of type int16") as caught:
        only(signed).read()
    assert "minmax" in caught.value.hint
    with pytest.raises(DataError, match=r"has axes \(3, 4, 5, 2\)"):
        only(nifti(tmp_path / "b.nii", np.zeros((3, 4, 5, 2), np.uint8))).read()
    with pytest.raises(DataError, match="complex64; needed are numbers"):
        only(nifti(tmp_path / "c.nii", np.zeros((3, 4, 5), np.complex64))).read()
    for cut in (0, 3, 100, 340, len(signed.read_bytes()) - 9):
        (tmp_path / "cut.nii.gz").write_bytes(signed.read_bytes()[:cut])
        with pytest.raises(DataError, match="not a NIfTI volume"):
            only(tmp_path / "cut.nii.gz", intensity="minmax").read()
    file = only(signed)
    signed.unlink()
    with pytest.raises(NotFoundError):
        file.read()
    with pytest.raises(NotFoundError):
        file.encode("masks", np.zeros((4, 5, 6), np.uint8), CLASSES)


def only(path, **rules):
    [file] = find_inputs(path, Rules(**rules))
    return file
