"""Decoded and resized pictures, built once per content and shared by runs, ranks and workers through memory maps."""

import errno
import hashlib
import json
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from knowsam.data.readers import resize_image, resize_mask
from knowsam.data.source import Source
from knowsam.errors import DataError, NotFoundError, StorageError

if sys.platform != "win32":
    import fcntl

FORMAT_VERSION = 1
_CHUNK = 64
_MEMO_FILE = "fingerprints.json"
_RACY_SECONDS = 2.0


class DecodedCache:
    """One finished cache entry, opened read-only.

    Pickles as its path, so that a worker process maps the files instead of receiving a copy of them.

    Attributes:
        ids: case ids, in the order of the first axis.
        images: uint8 memmap (N, 3, S, S).
        masks: uint8 memmap (N, S, S) of class ids, or None.
        folder: the entry's own folder.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.ids: list[str] = json.loads((self.folder / "ids.json").read_text(encoding="utf-8"))
        self.images: NDArray[np.uint8] = np.load(self.folder / "images.npy", mmap_mode="r")
        has_masks = (self.folder / "masks.npy").exists()
        self.masks: NDArray[np.uint8] | None = np.load(self.folder / "masks.npy", mmap_mode="r") if has_masks else None

    def __len__(self) -> int:
        return len(self.ids)

    def __reduce__(self) -> tuple[type["DecodedCache"], tuple[Path]]:
        return DecodedCache, (self.folder,)


def default_folder() -> Path:
    """``$KNOWSAM_CACHE``, else ``~/.cache/knowsam``; never beside the data, which may be read-only or shared."""
    return Path(os.environ.get("KNOWSAM_CACHE") or Path.home() / ".cache" / "knowsam")


def build_cache(
    source: Source,
    case_ids: Sequence[str],
    *,
    image_size: int,
    masks: bool,
    folder: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> DecodedCache:
    """Open the cache of these cases; decode it first if no process has yet.

    The key covers ids, contents, ``image_size``, the source's ``cache_settings`` (if it has that attribute) and the
    format version. Several processes may ask at once: one builds, the others wait.

    Args:
        source: any ``Source``; only 2-D cases.
        case_ids: in the order wanted.
        image_size: S, pixels.
        masks: also decode the masks. False touches no mask, nor its fingerprint.
        folder: where entries live; ``default_folder()`` if None.
        progress: called as (cases done, cases in all) while decoding, from the calling thread.
    Raises:
        DataError: no cases, a case that is not 2-D, a mask of another size than its image, or what the source raises.
        StorageError: the disk is full or the folder cannot be written.
    """
    ids = list(case_ids)
    if not ids:
        raise DataError("no cases to cache; the list of ids is empty")
    folder = Path(folder) if folder is not None else default_folder()
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        _memo.load(folder)
        key = _key(source, ids, image_size, masks, pool)
        _memo.save(folder)
        entry = folder / key
        if (ready := _open(entry)) is not None:  # before any lock: a finished cache may lie on a read-only disk
            return ready
        with _storage(folder):
            folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / f"{key}.lock", wait=True) as alone:
            if (ready := _open(entry)) is not None:
                return ready
            with _storage(folder):
                if entry.exists():  # finished once, damaged since
                    shutil.rmtree(entry)
                _remove_leftovers(folder, key if alone else None)
                temporary = Path(tempfile.mkdtemp(prefix=f".building-{key}-", dir=folder))
            try:
                _decode(source, ids, image_size, masks, temporary, pool, progress)
                with _storage(folder):
                    try:
                        temporary.chmod(0o755)  # mkdtemp is private, a cache may be shared
                        os.rename(temporary, entry)
                    except OSError:
                        if _open(entry) is None:  # else somebody without the lock was first
                            raise
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    return DecodedCache(entry)


def cases_fingerprint(source: Source, case_ids: Sequence[str], *, folder: str | Path | None = None) -> str:
    """Changes with the ids, with any of their images and with any of their masks; nothing is decoded.

    Args:
        source: any ``Source``; may read the masks of these cases.
        folder: where earlier fingerprints are kept; ``default_folder()`` if None.
    Raises:
        NotFoundError, DataError: a file is gone or cannot be read.
    """
    load_memo(folder)
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        key = _key(source, list(case_ids), 0, True, pool)
    save_memo(folder)
    return key


def file_sha256(path: str | Path) -> str:
    """Content hash of a file; remembered by (absolute path, size, mtime), so that restarts need no second read.

    Raises:
        NotFoundError: no such file.
        DataError: it cannot be read.
    """

    def compute() -> str:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    return remembered(path, "file", compute)


def known(path: str | Path, what: str) -> str | None:
    """What ``remembered`` would give without computing, or None; ``load_memo`` brings what earlier processes found.

    Args:
        path: the file.
        what: the kind of fingerprint, as given to ``remembered``.
    """
    try:
        return _memo.entries.get(_memo_key(path, what, os.stat(path)))
    except OSError:
        return None


def load_memo(folder: str | Path | None = None) -> None:
    """Take over the fingerprints that earlier processes left in a cache folder; ``default_folder()`` if None."""
    _memo.load(Path(folder) if folder is not None else default_folder())


def save_memo(folder: str | Path | None = None) -> None:
    """Leave new fingerprints in a cache folder; a disk that cannot be written costs later time, nothing else."""
    _memo.save(Path(folder) if folder is not None else default_folder())


def remembered(path: str | Path, what: str, compute: Callable[[], str]) -> str:
    """``compute()``, or its earlier result for the same ``what`` of the same unchanged file.

    Args:
        path: the file that the result depends on, and nothing else.
        what: which result of the file it is.
        compute: called where it is not known yet, or the file has changed.
    Raises:
        NotFoundError, DataError: as ``file_sha256``.
    """
    try:
        stat = os.stat(path)
        key = _memo_key(path, what, stat)
        earlier = _memo.entries.get(key)
        if earlier is not None:
            return earlier
        found = compute()
    except FileNotFoundError:
        raise NotFoundError(f"{path} does not exist") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    # a file written just now could change again within one tick of the clock that stamps it
    if time.time() - stat.st_mtime > _RACY_SECONDS:
        _memo.add(key, found)
    return found


def _memo_key(path: str | Path, what: str, stat: os.stat_result) -> str:
    return f"{what}|{stat.st_size}|{stat.st_mtime_ns}|{os.path.abspath(path)}"


class _Memo:
    """Fingerprints of this process, merged with the memo file of each cache folder it uses."""

    def __init__(self) -> None:
        self.entries: dict[str, str] = {}
        self._unsaved = False
        self._lock = threading.Lock()

    def add(self, key: str, fingerprint: str) -> None:
        with self._lock:
            self.entries[key] = fingerprint
            self._unsaved = True

    def load(self, folder: Path) -> None:
        with suppress(OSError, ValueError):  # a lost memo costs time, nothing else
            stored = json.loads((folder / _MEMO_FILE).read_text(encoding="utf-8"))
            if isinstance(stored, dict):
                with self._lock:
                    self.entries = {**stored, **self.entries}

    def save(self, folder: Path) -> None:
        if not self._unsaved:
            return
        self.load(folder)  # keep what another process added meanwhile
        with self._lock, suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix=".fingerprints-", dir=folder)
            try:
                with open(handle, "w", encoding="utf-8") as file:
                    json.dump(self.entries, file)
                os.replace(name, folder / _MEMO_FILE)
                self._unsaved = False
            except OSError:
                os.unlink(name)


_memo = _Memo()


def _key(source: Source, ids: list[str], image_size: int, masks: bool, pool: ThreadPoolExecutor) -> str:
    content = {
        "version": FORMAT_VERSION,
        "ids": ids,
        "images": list(pool.map(source.fingerprint, ids)),
        "masks": list(pool.map(source.mask_fingerprint, ids)) if masks else None,
        "image_size": image_size,
        "settings": repr(getattr(source, "cache_settings", None)),
    }
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]


def _open(entry: Path) -> DecodedCache | None:
    try:
        return DecodedCache(entry)
    except (OSError, ValueError):  # absent, or cut short: then the map is longer than the file
        return None


def _decode(
    source: Source,
    ids: list[str],
    size: int,
    masks: bool,
    target: Path,
    pool: ThreadPoolExecutor,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Write ``images.npy``, ``masks.npy`` and ``ids.json``.

    Rows are written, not assigned to a memory map: on a full disk a write fails with an error, a map with a signal.
    """
    needed = len(ids) * size * size * (4 if masks else 3)
    with _storage(target):
        free = shutil.disk_usage(target).free
    if needed > free:
        raise StorageError(
            f"the decoded cache needs {needed / 1e9:.2f} GB, but {target.parent} has {free / 1e9:.2f} GB free",
            hint="free some space, or set KNOWSAM_CACHE to a folder on another disk",
        )

    def row(case_id: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8] | None]:
        image = source.image(case_id)  # (H, W, 3)
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise DataError(
                f"{case_id}: {image.dtype} {image.shape} cannot be cached; needed is a 2-D case, uint8 (H, W, 3)"
            )
        small = np.moveaxis(resize_image(image, size), 2, 0)  # (3, S, S)
        if not masks:
            return small, None
        mask = source.mask(case_id)  # (H, W)
        if mask.shape != image.shape[:2]:
            raise DataError(f"{case_id}: the mask is {mask.shape}, the image {image.shape[:2]} (height, width)")
        return small, resize_mask(mask, size)

    with _storage(target):
        images_file = _start(target / "images.npy", (len(ids), 3, size, size))
        masks_file = _start(target / "masks.npy", (len(ids), size, size)) if masks else None
    try:
        for start in range(0, len(ids), _CHUNK):  # in chunks: rows that wait to be written stay few
            rows = list(pool.map(row, ids[start : start + _CHUNK]))
            with _storage(target):
                for image, mask in rows:
                    images_file.write(np.ascontiguousarray(image).tobytes())
                    if masks_file:
                        masks_file.write(np.ascontiguousarray(mask).tobytes())
            if progress:
                progress(min(start + _CHUNK, len(ids)), len(ids))
        with _storage(target):
            for file in (images_file, masks_file):
                if file:
                    file.flush()
                    os.fsync(file.fileno())  # else a power cut could leave the final name on empty pages
            (target / "ids.json").write_text(json.dumps(ids), encoding="utf-8")
    finally:
        for file in (images_file, masks_file):
            if file:
                with suppress(OSError):  # closing flushes, and the disk may be full: that was reported already
                    file.close()


def _start(path: Path, shape: tuple[int, ...]) -> BinaryIO:
    file = open(path, "wb")  # noqa: SIM115 - the caller closes it after the last row
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return file


@contextmanager
def _locked(path: Path, *, wait: bool) -> Iterator[bool]:
    """Hold an flock; the system frees it when the holder dies. False: no lock (taken, or the disk knows none)."""
    with _storage(path.parent):
        file = open(path, "a")  # noqa: SIM115 - closed below, whichever way the lock goes
    with file:
        held = False
        if sys.platform != "win32":  # without locks builders race, and the first rename wins
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
                held = True
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.EACCES, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                    raise StorageError(f"{path} cannot be locked: {error.strerror}") from error
        yield held


def _remove_leftovers(folder: Path, own_key: str | None) -> None:
    """Folders of builders that died: nobody holds the lock of their key any more."""
    for leftover in folder.glob(".building-*"):
        key = leftover.name.split("-")[1]
        if key == own_key:
            shutil.rmtree(leftover, ignore_errors=True)
        elif own_key is not None:
            with _locked(folder / f"{key}.lock", wait=False) as dead:
                if dead:
                    shutil.rmtree(leftover, ignore_errors=True)


@contextmanager
def _storage(folder: Path) -> Iterator[None]:
    """Around writes only, so that an unreadable picture is not taken for a full disk."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise StorageError(
            f"the decoded cache in {folder} cannot be written: {'the disk is full' if full else error.strerror}",
            hint="free some space, or set KNOWSAM_CACHE to a folder on another disk",
        ) from error
