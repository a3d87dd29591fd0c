"""HDF5 and npz: both of one face, read and refused alike."""

import io
import zipfile

import h5py
import numpy as np
import pytest

from knowsam.errors import DataError, NotFoundError
from knowsam.io import Reading, encode, fingerprint, header, read_image, read_mask

RNG = np.random.default_rng(0)
PLAIN = Reading()
CLASSES = ["background", "a", "b"]


def write(path, **arrays):
    if path.suffix == ".npz":
        np.savez_compressed(path, **arrays)
    else:
        with h5py.File(path, "w") as file:
            for name, values in arrays.items():
                file[name] = values
    return path


def written(ending, content):
    if ending == ".npz":
        return dict(np.load(io.BytesIO(content), allow_pickle=False))
    with h5py.File(io.BytesIO(content)) as file:
        return {name: file[name][()] for name in file} | dict(file[next(iter(file))].attrs)


@pytest.fixture(params=[".h5", ".hdf5", ".npz"])
def ending(request):
    return request.param


def same_header(path, reading=PLAIN):
    stored, said = read_image(path, reading), header(path, reading)
    assert (said.channels, *said.shape) == stored.array.shape
    assert said.dtype == stored.array.dtype and said.spacing is stored.spacing is None
    return stored


@pytest.mark.parametrize("dtype", ["u1", ">u2", "u4", "i2", "i8", "f2", "f4", ">f8", "?"])
@pytest.mark.parametrize("shape", [(5, 7), (6, 5, 7), (2, 6, 5, 7)])
def test_every_type_and_rank(tmp_path, ending, dtype, shape):
    values = (RNG.integers(0, 2, shape) if dtype == "?" else RNG.integers(0, 100, shape)).astype(dtype)
    stored = same_header(write(tmp_path / f"a{ending}", image=values))
    assert stored.array.dtype.isnative and (stored.array == (values if values.ndim == 4 else values[None])).all()
    top = {"u1": 255.0, ">u2": 65535.0, "u4": 2.0**32 - 1, "?": 1.0}.get(dtype)
    assert stored.full_range == (None if top is None else (0, top))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_slices_along_the_axis_that_is_asked_for(tmp_path, ending, axis):
    zyx = RNG.random((4, 5, 6)).astype(np.float32)
    labels = RNG.integers(0, 3, (4, 5, 6), np.uint8)
    path, reading = write(tmp_path / f"a{ending}", image=zyx, label=labels), Reading(slice_axis=axis)
    slices = np.moveaxis(zyx, 2 - axis, 0)
    assert (same_header(path, reading).array[0] == slices).all()
    mask = read_mask(path, reading).array
    assert (mask == np.moveaxis(labels, 2 - axis, 0)).all()
    found = written(*encode(path, "masks", mask, CLASSES, reading))
    assert (found["label"] == labels).all()
    p = RNG.random((3, *slices.shape)).astype(np.float32)
    found = written(*encode(path, "probabilities", p, CLASSES, reading))
    assert (found["probabilities"] == np.moveaxis(p, 1, 3 - axis)).all()
    assert list(found["classes"]) == CLASSES
    found = written(*encode(path, "uncertainty", p[0], CLASSES, reading))
    assert (found["uncertainty"] == np.moveaxis(p[0], 0, 2 - axis)).all()


def test_an_odd_order_is_said(tmp_path, ending):
    path = write(tmp_path / f"a{ending}", image=np.zeros((30, 28, 6)))
    [note] = read_image(path).notes
    assert "set data.reading.slice_axis to 0" in note
    assert read_image(path, Reading(slice_axis=0)).array.shape == (1, 6, 30, 28)
    assert not read_image(path, Reading(slice_axis=0)).notes


def test_other_names(tmp_path, ending):
    path = write(tmp_path / f"a{ending}", img=np.zeros((4, 5)), seg=np.ones((4, 5), np.int64))
    with pytest.raises(DataError, match=r"no dataset 'image'; the file holds img, seg") as caught:
        read_image(path)
    assert "data.reading.image_key" in caught.value.hint
    reading = Reading(image_key="img", mask_key="seg")
    assert read_mask(path, reading).array.sum() == 20
    assert (written(*encode(path, "masks", np.ones((4, 5), np.uint8), CLASSES, reading))["seg"] == 1).all()


def test_fingerprints_follow_their_array(tmp_path, ending):
    arrays = {"image": RNG.random((4, 5)), "label": np.zeros((4, 5), np.uint8)}
    path = write(tmp_path / f"a{ending}", **arrays)
    image, mask = fingerprint(path), fingerprint(path, "mask")
    write(path, **arrays | {"label": np.ones((4, 5), np.uint8)})
    assert fingerprint(path) == image and fingerprint(path, "mask") != mask
    write(path, image=RNG.random((4, 5)))
    assert fingerprint(path) != image


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros(5), r"shape \(5,\); needed is \(H, W\)"),
        (np.zeros((1, 2, 3, 4, 5)), "needed is"),
        (np.zeros((0, 5)), "empty"),
        (np.array([[b"x"]]), "needed are numbers"),
        (np.zeros((2, 3), complex), "needed are numbers"),
        (np.zeros((9, 8, 7, 3)), "channels come first"),
    ],
)
def test_what_is_refused(tmp_path, ending, values, message):
    path = write(tmp_path / f"a{ending}", image=values)
    for read in (read_image, header):
        with pytest.raises(DataError, match=message) as caught:
            read(path)
        assert path.name in str(caught.value)


def test_bad_labels(tmp_path, ending):
    for values, message in ((np.full((4, 5), 0.5), "whole numbers"), (np.full((4, 5), -1), "such as -1")):
        with pytest.raises(DataError, match=message):
            read_mask(write(tmp_path / f"a{ending}", label=values))
    assert read_mask(write(tmp_path / f"a{ending}", label=np.ones((4, 5)))).array.dtype == np.uint16
    assert read_mask(write(tmp_path / f"a{ending}", label=np.ones((4, 5), bool))).array.max() == 1


def test_damaged_files(tmp_path, ending):
    path = write(tmp_path / f"a{ending}", image=RNG.random((40, 50)))
    content = path.read_bytes()
    for broken in (b"", b"<html>", *(content[:n] for n in (4, 20, 300, len(content) // 2, len(content) - 1))):
        path.write_bytes(broken)
        with pytest.raises(DataError, match=path.name):
            read_image(path)
    path.unlink()
    with pytest.raises(NotFoundError):
        read_image(path)


# ---------------------------------------------------------------- hostile


def external_link(path):
    write(path.with_name("other.h5"), image=np.zeros((4, 5), np.float32))
    with h5py.File(path, "w") as file:
        file["image"] = h5py.ExternalLink("other.h5", "/image")


def soft_link(path):
    with h5py.File(path, "w") as file:
        file["real"] = np.zeros((4, 5), np.float32)
        file["image"] = h5py.SoftLink("/real")


def virtual(path):
    layout = h5py.VirtualLayout((4, 5), "f4")
    layout[:] = h5py.VirtualSource("other.h5", "image", (4, 5))
    with h5py.File(path, "w") as file:
        file.create_virtual_dataset("image", layout)


def external_storage(path):
    with h5py.File(path, "w") as file:
        file.create_dataset("image", (4, 5), "f4", external=[(str(path.with_name("raw.bin")), 0, 80)])


def group(path):
    with h5py.File(path, "w") as file:
        file.create_group("image")


def bomb(path):
    with h5py.File(path, "w") as file:
        file.create_dataset("image", (100_000, 100_000), "f4", chunks=(1000, 1000))


def big_volume(path):
    with h5py.File(path, "w") as file:
        file.create_dataset("image", (3000, 1000, 1000), "f4", chunks=(10, 100, 100))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (external_link, "link to another place"),
        (soft_link, "link to another place"),
        (virtual, "other files"),
        (external_storage, "other files"),
        (group, "is a group"),
        (bomb, "at most 64,000,000"),
        (big_volume, "too large"),
    ],
)
def test_hostile_h5(tmp_path, spoil, message):
    spoil(tmp_path / "a.h5")
    for read in (read_image, header, fingerprint):
        if read is not fingerprint or spoil not in (bomb, big_volume):
            with pytest.raises(DataError, match=message):
                read(tmp_path / "a.h5")


def npy(header_text):
    text = header_text.encode() + b" " * (-(len(header_text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\1\0" + len(text).to_bytes(2, "little") + text


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ("{'descr': '<f4', 'fortran_order': False, 'shape': (100000, 100000)}", "at most 64,000,000"),
        ("{'descr': '|O', 'fortran_order': False, 'shape': (2, 2)}", "needed are numbers"),
        ("{'descr': '<f4', 'fortran_order': False, 'shape': (__import__('os'), 2)}", "can be read"),
    ],
)
def test_hostile_npz(tmp_path, head, message):
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("image.npy", npy(head) + bytes(1 << 20))
    for read in (read_image, header):
        with pytest.raises(DataError, match=message):
            read(tmp_path / "a.npz")
