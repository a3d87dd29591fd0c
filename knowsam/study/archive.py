"""Archives as downloads come: unpacked once, resumable, and never outside of their folder."""

import json
import lzma
import os
import re
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Any

from knowsam.data.make_splits import make_folder
from knowsam.errors import DataError, NotFoundError, StorageError
from knowsam.files import storage_error, write_text

WANTED = (
    *(".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff"),
    *(".nii", ".nii.gz", ".nrrd", ".h5", ".cfg", ".csv", ".txt", ".list", ".json"),
)
"""Extensions of files that are unpacked; others are passed over."""

MARKS = ".unpacked"
"""Folder of the notes that say which archives are unpacked already."""

MOST_BYTES = 400 * 1024**3
_MOST_RATIO = 200  # unpacked to packed, of archives above ``_SMALL``
_SMALL = 1024**3


@dataclass
class Unpacked:
    """What became of an archive.

    Attributes:
        files: how many its folder has of it.
        fresh: how many of these were written just now.
        passed_over: extension -> files of it that were not unpacked.
    """

    files: int = 0
    fresh: int = 0
    passed_over: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class _Member:
    name: str
    size: int
    open: Callable[[], IO[bytes]]


def is_archive(path: Path) -> bool:
    """Whether a file is a zip or tar archive, by its content."""
    if not path.is_file():
        return False
    with suppress(OSError):
        return zipfile.is_zipfile(path) or tarfile.is_tarfile(path)
    return False


def unpack(archive: Path, folder: Path, *, progress: Callable[[int, int], None] | None = None) -> Unpacked:
    """Put an archive's files of wanted kinds below a folder. What is there already, whole, is left as it is.

    Args:
        archive: zip, or tar in any compression.
        folder: for the files; made if it is not there.
        progress: called as (bytes done, bytes in all).
    Raises:
        NotFoundError: no such archive.
        DataError: no archive, damaged or encrypted; a name that leads outside, a link, two files of one name; or more
            bytes than such an archive can honestly hold.
        StorageError: the disk is full or a write failed.
    """
    if not archive.is_file():
        raise NotFoundError(f"the archive {archive} does not exist")
    status = archive.stat()
    mark = folder / MARKS / f"{archive.name}.json"
    identity = {"size": status.st_size, "mtime_ns": status.st_mtime_ns}
    done = _read_mark(mark)
    if done is not None and {key: done.get(key) for key in identity} == identity:
        return Unpacked(int(done.get("files", 0)), 0, Counter(done.get("passed_over", {})))
    make_folder(mark.parent)
    found = Unpacked()
    with _readable(archive):
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as opened:
                _write(_zip_members(opened, archive), folder, archive, found, progress)
        elif tarfile.is_tarfile(archive):
            with tarfile.open(archive) as opened_tar:
                _write(_tar_members(opened_tar, archive), folder, archive, found, progress)
        else:
            raise DataError(f"{archive}: neither a zip nor a tar archive", hint="Give the download, or its folder.")
    if not found.files:
        raise DataError(f"{archive}: holds no file of a kind that is wanted ({', '.join(WANTED)})")
    write_text(mark, json.dumps({**identity, "files": found.files, "passed_over": dict(found.passed_over)}) + "\n")
    return found


def _read_mark(mark: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(mark.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _zip_members(opened: zipfile.ZipFile, archive: Path) -> list[_Member]:
    members = []
    for info in opened.infolist():
        if info.is_dir():
            continue
        if stat.S_ISLNK(info.external_attr >> 16):
            raise DataError(f"{archive}: {info.filename!r} is a link, which is refused")
        if info.flag_bits & 1:
            raise DataError(f"{archive}: {info.filename!r} is encrypted", hint="Unpack it yourself; give the folder.")
        members.append(_Member(info.filename, info.file_size, lambda info=info: opened.open(info)))  # type: ignore[misc]
    return members


def _tar_members(opened: tarfile.TarFile, archive: Path) -> list[_Member]:
    members, total = [], 0
    for info in opened:
        if info.isdir():
            continue
        if not info.isreg() or info.issparse():
            raise DataError(f"{archive}: {info.name!r} is a link or a special file, which is refused")
        members.append(_Member(info.name, info.size, lambda info=info: _file_of(opened, info)))  # type: ignore[misc]
        total += info.size
        _check_size(total, archive)  # before reading on
    return members


def _file_of(opened: tarfile.TarFile, info: tarfile.TarInfo) -> IO[bytes]:
    file = opened.extractfile(info)
    assert file is not None  # a regular file, as was seen
    return file


def _write(
    members: list[_Member],
    folder: Path,
    archive: Path,
    found: Unpacked,
    progress: Callable[[int, int], None] | None,
) -> None:
    wanted: dict[Path, _Member] = {}
    for member in members:
        parts = _safe_parts(member.name, archive)
        if not parts or parts[0] == "__MACOSX" or parts[-1].startswith("."):
            continue
        extension = _extension(parts[-1])
        if extension not in WANTED:
            found.passed_over[extension or "without extension"] += 1
            continue
        target = folder.joinpath(*parts)
        if target in wanted:
            raise DataError(f"{archive}: two files are called {member.name!r}")
        wanted[target] = member
    _check_size(sum(member.size for member in wanted.values()), archive)
    missing = {t: m for t, m in wanted.items() if not (t.is_file() and t.stat().st_size == m.size)}
    need = sum(member.size for member in missing.values())
    if need > (free := shutil.disk_usage(folder).free):
        raise StorageError(f"{folder}: {need:,} bytes are needed, {free:,} are free", hint="Free some space; --out.")
    written = 0
    for target, member in missing.items():
        _copy(member, target)
        written += member.size
        if progress:
            progress(written, need)
    found.files, found.fresh = len(wanted), len(missing)


def _check_size(total: int, archive: Path) -> None:
    packed = archive.stat().st_size
    if total > MOST_BYTES or (total > _SMALL and total > _MOST_RATIO * packed):
        raise DataError(
            f"{archive}: {packed:,} bytes would become {total:,} or more; no archive of pictures is like that",
            hint="If this one is, unpack it yourself and give the folder.",
        )


def _copy(member: _Member, target: Path) -> None:
    """One file, whole or not at all; a file of another size is what a killed process left of it."""
    make_folder(target.parent)
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        with member.open() as source, open(temporary, "wb") as file:
            shutil.copyfileobj(source, file, 1 << 20)
        os.replace(temporary, target)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None:
            raise storage_error(target, error, member.size) from error
        raise


def _safe_parts(name: str, archive: Path) -> tuple[str, ...]:
    plain = name.replace("\\", "/")
    path = PurePosixPath(plain)
    if path.is_absolute() or ".." in path.parts or re.match(r"[A-Za-z]:", plain) or "\0" in plain:
        raise DataError(f"{archive}: {name!r} leads outside of the folder that it is unpacked in; refused")
    return path.parts


def _extension(name: str) -> str:
    lower = name.lower()
    return ".nii.gz" if lower.endswith(".nii.gz") else os.path.splitext(lower)[1]


@contextmanager
def _readable(archive: Path) -> Iterator[None]:
    try:
        yield
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, NotImplementedError) as error:
        raise DataError(
            f"{archive}: truncated or damaged ({error})", hint="Download it again; what is unpacked is kept."
        ) from error
    except OSError as error:  # a broken compressed stream; writing has its own error
        raise DataError(f"{archive}: cannot be read ({error})", hint="Download it again.") from error
