"""Files in their own geometry: what is found, read and encoded."""

import io

import h5py
import numpy as np
import pytest
from PIL import Image

from knowsam.errors import ConfigError, DataError, NotFoundError
from knowsam.inference.files import find_inputs
from knowsam.io import Reading

CLASSES = ["background", "a", "b"]
RNG = np.random.default_rng(0)


def touch(path, content=b"x"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def only(path, **rules):
    [file] = find_inputs(path, Reading(**rules))
    return file


# ---------------------------------------------------------------- finding


def test_a_folder_is_searched_in_its_tree(tmp_path):
    for name in ("b.png", "sub/a.JPG", "sub/deep/v.nii.gz", "v.nii", "x.h5", "d.dcm", ".hidden.png", "notes.txt"):
        touch(tmp_path / name)
    touch(tmp_path / "archive.tar.gz")
    touch(tmp_path / "out" / "masks" / "b.png")
    found = find_inputs(tmp_path, Reading(), beside=tmp_path / "out")
    assert {file.name for file in found} == {"b.png", "d.dcm", "sub/a.JPG", "sub/deep/v.nii.gz", "v.nii", "x.h5"}
    assert [file.name for file in found] == sorted(file.name for file in found)
    assert {file.stem for file in found} == {"b", "d", "sub/a", "sub/deep/v", "v", "x"}


def test_answers_beside_the_files_themselves(tmp_path):
    """-o the folder that is predicted: its own files are still found."""
    touch(tmp_path / "a.png")
    assert [file.name for file in find_inputs(tmp_path, Reading(), beside=tmp_path)] == ["a.png"]


def test_nothing_to_find(tmp_path):
    touch(tmp_path / "notes.txt")
    with pytest.raises(NotFoundError, match="does not exist"):
        find_inputs(tmp_path / "nowhere", Reading())
    with pytest.raises(DataError, match=r"holds nothing to segment; known are .*\.png"):
        find_inputs(tmp_path, Reading())
    with pytest.raises(DataError, match=r"of no known kind; .*\.nii\.gz"):
        find_inputs(tmp_path / "notes.txt", Reading())


# ---------------------------------------------------------------- pictures


@pytest.mark.parametrize("shape", [(5, 7, 3), (5, 7)])
def test_pictures_are_read_as_in_training(tmp_path, shape):
    array = RNG.integers(0, 256, shape, np.uint8)
    Image.fromarray(array).save(tmp_path / "a.png")
    case = only(tmp_path / "a.png").read()
    assert (case.image == (np.moveaxis(array, -1, 0) if array.ndim == 3 else array[None])).all()
    assert case.full_range == (0, 255)


def test_answers_of_a_picture(tmp_path):
    Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(tmp_path / "a.png")
    file = only(tmp_path / "a.png")
    for values in (RNG.integers(0, 3, (4, 6), np.uint8), RNG.integers(0, 60000, (4, 6)).astype(np.uint16)):
        again = np.asarray(Image.open(io.BytesIO(file.encode("masks", values, CLASSES))))
        assert (again == values).all()
    half = np.asarray(Image.open(io.BytesIO(file.encode("uncertainty", np.full((4, 6), 0.5, np.float32), CLASSES))))
    assert half.dtype == np.uint8 and (half == 128).all()
    p = RNG.random((3, 4, 6), np.float32)
    with np.load(io.BytesIO(file.encode("probabilities", p, CLASSES)), allow_pickle=False) as archive:
        assert (archive["probabilities"] == p).all() and archive["classes"].tolist() == CLASSES


# ---------------------------------------------------------------- HDF5


@pytest.mark.parametrize("shape", [(5, 7), (3, 5, 7)])
def test_h5(tmp_path, shape):
    values = RNG.random(shape)
    with h5py.File(tmp_path / "v.h5", "w") as h5:
        h5["scan"] = values
    file = only(tmp_path / "v.h5", image_key="scan")
    assert (file.read().image == values[None]).all()
    labels = RNG.integers(0, 3, shape, np.uint8)
    with h5py.File(io.BytesIO(file.encode("masks", labels, CLASSES))) as h5:
        assert (h5["label"][()] == labels).all()
    p = RNG.random((3, *shape), np.float32)
    with h5py.File(io.BytesIO(file.encode("probabilities", p, CLASSES))) as h5:
        assert (h5["probabilities"][()] == p).all() and list(h5["probabilities"].attrs["classes"]) == CLASSES
    with pytest.raises(DataError, match="there is no dataset 'image'; the file holds scan"):
        only(tmp_path / "v.h5").read()


@pytest.mark.parametrize(("name", "module"), [("v.nii", "nibabel"), ("d.dcm", "pydicom")])
def test_without_the_extra(tmp_path, monkeypatch, name, module):
    import sys

    touch(tmp_path / name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=f"needs {module}") as caught:
        only(tmp_path / name).read()
    assert "knowsam[medical]" in caught.value.hint
