"""Archives are unpacked once, resumable, and never outside of their folder."""

import io
import json
import stat
import tarfile
import zipfile

import pytest

from knowsam.errors import DataError, NotFoundError, StorageError
from knowsam.study import archive
from knowsam.study.archive import is_archive, unpack

FILES = {"set/images/a.png": b"first picture", "set/masks/a.png": b"its mask", "set/Info.cfg": b"ED: 1"}


def zipped(path, files):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as opened:
        for name, content in files.items():
            opened.writestr(name, content)
    return path


def tarred(path, files):
    with tarfile.open(path, "w:gz") as opened:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            opened.addfile(info, io.BytesIO(content))
    return path


def there(folder):
    files = [p for p in folder.rglob("*") if p.is_file() and archive.MARKS not in p.parts]
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


@pytest.mark.parametrize("make", [zipped, tarred])
def test_files_of_wanted_kinds(tmp_path, make):
    others = {"set/readme.pdf": b"x", "__MACOSX/set/._a.png": b"x", "set/.hidden.png": b"x", "set/LICENCE": b"x"}
    path = make(tmp_path / "download", FILES | others)
    assert is_archive(path) and not is_archive(tmp_path) and not is_archive(tmp_path / "none")
    seen = []
    found = unpack(path, tmp_path / "out", progress=lambda done, total: seen.append((done, total)))
    assert there(tmp_path / "out") == FILES and (found.files, found.fresh) == (3, 3)
    assert found.passed_over == {".pdf": 1, "without extension": 1} and seen[-1] == (26, 26)


@pytest.mark.parametrize("make", [zipped, tarred])
def test_nothing_is_unpacked_twice(tmp_path, make, monkeypatch):
    path, out = make(tmp_path / "download", FILES), tmp_path / "out"
    unpack(path, out)
    before = {p: p.stat().st_mtime_ns for p in (out / "set").rglob("*") if p.is_file()}
    (mark,) = (out / archive.MARKS).iterdir()
    assert json.loads(mark.read_text())["files"] == 3
    with monkeypatch.context() as patch:
        patch.setattr(archive, "_write", lambda *_: pytest.fail("opened again"))
        assert (unpack(path, out).files, unpack(path, out).fresh) == (3, 0)
    mark.unlink()  # as if the first call had been killed at its end
    (out / "set" / "images" / "a.png").write_bytes(b"fir")  # and in the middle of a file
    assert unpack(path, out).fresh == 1 and there(out) == FILES
    assert [p.parent.name for p in before if before[p] != p.stat().st_mtime_ns] == ["images"]
    make(path, FILES | {"set/images/b.png": b"another download"})
    assert unpack(path, out).fresh == 1 and len(there(out)) == 4


@pytest.mark.parametrize("name", ["../a.png", "x/../../a.png", "/a.png", "..\\a.png", "C:\\a.png", "C:/a.png"])
@pytest.mark.parametrize("make", [zipped, tarred])
def test_names_that_lead_outside_are_refused(tmp_path, make, name):
    path = make(tmp_path / "evil", FILES | {name: b"x"})
    with pytest.raises(DataError, match="leads outside"):
        unpack(path, tmp_path / "deep" / "out")
    assert not list(tmp_path.rglob("*.png"))


def test_links_are_refused(tmp_path):
    with tarfile.open(tmp_path / "evil.tar", "w") as opened:
        info = tarfile.TarInfo("set/a.png")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        opened.addfile(info)
    info = zipfile.ZipInfo("set/a.png")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as opened:
        opened.writestr(info, "/etc/passwd")
    for name in ("evil.tar", "evil.zip"):
        with pytest.raises(DataError, match="is a link"):
            unpack(tmp_path / name, tmp_path / "out")
    assert there(tmp_path / "out") == {}


@pytest.mark.parametrize("make", [zipped, tarred])
def test_bombs_are_refused_before_they_are_unpacked(tmp_path, make, monkeypatch):
    monkeypatch.setattr(archive, "_SMALL", 1000)
    path = make(tmp_path / "bomb", {"set/a.png": bytes(10**6)})
    with pytest.raises(DataError, match="would become 1,000,000"):
        unpack(path, tmp_path / "out")
    assert there(tmp_path / "out") == {}
    monkeypatch.setattr(archive, "_SMALL", 10**7)
    assert unpack(path, tmp_path / "out").fresh == 1


def test_what_cannot_be_unpacked(tmp_path, monkeypatch):
    with pytest.raises(NotFoundError, match=r"none\.zip"):
        unpack(tmp_path / "none.zip", tmp_path / "out")
    (tmp_path / "page.zip").write_bytes(b"<html>not found</html>")
    with pytest.raises(DataError, match="neither a zip nor a tar"):
        unpack(tmp_path / "page.zip", tmp_path / "out")
    with pytest.raises(DataError, match="no file of a kind that is wanted"):
        unpack(zipped(tmp_path / "text.zip", {"a.doc": b"x"}), tmp_path / "out")
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(tmp_path / "twice.zip", "w") as opened:
        opened.writestr("a.png", b"1")
        opened.writestr("a.png", b"2")
    with pytest.raises(DataError, match="two files are called"):
        unpack(tmp_path / "twice.zip", tmp_path / "out")
    path = zipped(tmp_path / "broken.zip", {"a.png": bytes(range(256)) * 40})
    data = bytearray(path.read_bytes())
    data[60] ^= 255
    path.write_bytes(data)
    with pytest.raises(DataError, match="damaged"):
        unpack(path, tmp_path / "out")
    path = tarred(tmp_path / "short.tar.gz", {"a.png": bytes(range(256)) * 40})
    path.write_bytes(path.read_bytes()[:-80])
    with pytest.raises(DataError, match=r"damaged|neither"):
        unpack(path, tmp_path / "out")
    assert there(tmp_path / "out") == {}
    monkeypatch.setattr(archive.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 5}))
    with pytest.raises(StorageError, match="26 bytes are needed, 5 are free"):
        unpack(zipped(tmp_path / "good.zip", FILES), tmp_path / "out")


def test_encrypted_files_are_named(tmp_path):
    path = zipped(tmp_path / "secret.zip", {"a.png": b"x"})
    data = bytearray(path.read_bytes())
    data[6] |= 1  # the flag of the file's own head
    data[data.index(b"PK\x01\x02") + 8] |= 1  # and in the directory
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"'a\.png' is encrypted"):
        unpack(path, tmp_path / "out")
