"""What of a folder is read, and how what is not is named."""

import os
import socket

import h5py
import numpy as np
import pytest
from PIL import Image

from knowsam.errors import ConfigError, DataError, NotFoundError
from knowsam.io import KINDS, Reading, encode, extensions, fingerprint, header, kind_of, read_image, read_mask, scan


def touch(path, content=b"x"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def test_ids_are_paths_without_extension(tmp_path):
    odd = ["émile", "e\u0301mile", "a b", "-x", "it's", "case.01", "image_image", "😀"]
    for name in (
        "b.PNG",
        "a.jpg",
        "a.png",
        "sub/a.JPG",
        "sub/deep/v.nii.gz",
        "V.NII.GZ",
        "x.h5",
        "y.hdf5",
        "z.npz",
        "t.tiff",
        "g.gif",
    ):
        touch(tmp_path / name)
    for name in odd:
        touch(tmp_path / f"{name}.png")
    found = scan(tmp_path)
    assert list(found.files) == sorted(["b", "a", "sub/a", "sub/deep/v", "V", "x", "y", "z", "t", "g", *odd])
    assert found.files["a"] == [tmp_path / "a.jpg", tmp_path / "a.png"]
    assert found.passed_over == {} and found.notes == ()


def test_what_is_passed_over_is_named_and_counted(tmp_path):
    touch(tmp_path / "real" / "a.png")
    for name in (
        "a.txt",
        "b.TXT",
        "c.gz",
        "d.nrrd",
        ".a.png",
        "Thumbs.db",
        "__MACOSX/._a.png",
        ".git/x.png",
        "README",
        "many.1",
    ):
        touch(tmp_path / name)
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "linked.png").symlink_to(tmp_path / "real" / "a.png")
    found = scan(tmp_path)
    assert list(found.files) == ["linked", "real/a"]
    names = {reason: [p.name for p in paths] for reason, paths in found.passed_over.items()}
    assert names == {
        ".gz": ["c.gz"],
        ".nrrd": ["d.nrrd"],
        ".txt": ["a.txt", "b.TXT"],
        "hidden or of the system": [".a.png", ".git", "Thumbs.db", "__MACOSX"],
        "link to a folder": ["loop"],
        "no extension, and of no known content": ["README", "many.1"],
        "not a regular file": ["gone.png", "pipe.png"],
    }
    assert "2 passed over, .txt: a.txt, b.TXT" in found.notes
    assert "4 passed over, hidden or of the system: .a.png, .git, Thumbs.db, ..." in found.notes


def test_files_without_extension_are_known_by_content(tmp_path):
    Image.new("L", (4, 4)).save(tmp_path / "scan1", format="PNG")
    with h5py.File(tmp_path / "h", "w") as file:
        file["image"] = np.zeros((4, 4))
    assert list(scan(tmp_path).files) == ["h", "scan1"]
    assert read_image(tmp_path / "h").array.shape == (1, 4, 4)
    assert encode(tmp_path / "h", "masks", np.zeros((4, 4), np.uint8), ["a"])[0] == ".h5"


@pytest.mark.parametrize("option", [{"slice_axis": 3}, {"orientation": "exif"}, {"palette": "grey"}])
def test_options_are_checked(option):
    [(name, value)] = option.items()
    with pytest.raises(ConfigError, match=rf"reading\.{name} is {value!r}; allowed are"):
        Reading(**option)


def test_no_extension_belongs_to_two_kinds():
    assert len(set(extensions())) == len(extensions()) == sum(len(kind.extensions) for kind in KINDS)


def test_no_folder(tmp_path):
    touch(tmp_path / "file")
    for name in ("nowhere", "file"):
        with pytest.raises(NotFoundError, match=name):
            scan(tmp_path / name)


# ---------------------------------------------------------------- whatever is no file of a known kind

EVERY = [extension[1:] for extension in extensions()]
CALLS = {
    "read_image": read_image,
    "read_mask": read_mask,
    "header": header,
    "encode": lambda p: encode(p, "masks", np.zeros((2, 2), np.uint8), ["a"]),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html>404</html>", "HTML"),
        (b"hello", "can be read"),
        (bytes(2000), "can be read"),
        (b"\xff" * 2000, "can be read"),
    ],
)
def test_rubbish_is_named_whatever_it_is_called(tmp_path, content, message, call):
    for extension in EVERY:
        path = tmp_path / f"case7.{extension}"
        path.write_bytes(content)
        with pytest.raises(DataError) as caught:
            CALLS[call](path)
        assert f"case7.{extension}" in str(caught.value)
        assert message in str(caught.value), str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("call", CALLS)
def test_the_beginning_of_a_format_and_rubbish(tmp_path, call):
    """Each magic, followed by bytes that mean nothing."""
    random = np.random.default_rng(0)
    starts = [b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"BM", b"GIF89a", b"RIFF\x10\0\0\0WEBP", b"II*\0", b"MM\0+"]
    starts += [b"\x1f\x8b\x08\0", b"\x89HDF\r\n\x1a\n", bytes(128) + b"DICM", b"PK\x03\x04" + bytes(26) + b"a.npy"]
    for n, start in enumerate(starts):
        for _ in range(10):
            path = tmp_path / f"{n}.png"
            path.write_bytes(start + random.bytes(600))
            with pytest.raises(DataError, match=rf"{n}\.png"):
                CALLS[call](path)


def test_what_is_no_regular_file_is_never_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")  # opening it would wait for ever
    (tmp_path / "zero.tif").symlink_to("/dev/zero")
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(tmp_path / "s.nii"))
    for name in ("pipe.png", "zero.tif", "s.nii"):
        for call in (*CALLS.values(), kind_of, fingerprint):
            with pytest.raises(DataError, match="not a regular file"):
                call(tmp_path / name)
    server.close()


def test_unknown_kinds_are_told_what_is_known(tmp_path):
    touch(tmp_path / "notes.txt")
    with pytest.raises(DataError, match=r"notes\.txt is of no known kind; known are .*\.nii\.gz"):
        read_image(tmp_path / "notes.txt")


def test_unreadable(tmp_path):
    touch(tmp_path / "a.png")
    (tmp_path / "a.png").chmod(0)
    if os.access(tmp_path / "a.png", os.R_OK):
        pytest.skip("this user may read everything")
    with pytest.raises(DataError, match=r"a\.png: cannot be read \(Permission denied\)"):
        read_image(tmp_path / "a.png")
