"""Decoded cases, each decoded once whatever list names it, and shared by runs, ranks and workers through memory maps.

A *row* is one decoded image or mask. Its key covers everything that decides about its values, so that label lists,
experiments and seeds share rows. Rows lie back to back in *shards*, each with the checksum of every row; a *list* says
where the rows of an ordered list of cases lie. Shards and lists are written once and never changed.
"""

import errno
import hashlib
import json
import os
import shutil
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from knowsam import io
from knowsam.data.intensity import same_levels
from knowsam.data.sizing import Fit
from knowsam.data.source import Source
from knowsam.errors import DataError, NotFoundError, StorageError
from knowsam.io import Reading

if sys.platform != "win32":
    import fcntl

FORMAT_VERSION = 2
_CHUNK = 64
_MEMO_FILE = "fingerprints.json"
_RACY_SECONDS = 2.0
_VERIFY_AT_ONCE = 2**30  # bytes of a list that are looked through when it is opened; of more, each row when it is met
_PLACE = np.dtype(
    [("shard", "<u4"), ("offset", "<u8"), ("crc", "<u4"), ("deep", "?"), ("ndim", "u1"), ("shape", "<u4", (4,))]
)


class Rows:
    """The images, or the masks, of a list: ``rows[3]`` is one, ``rows[[3, 5]]`` a stack, ``rows.view(3)`` its map."""

    def __init__(self, folder: Path, shards: Sequence[str], places: np.ndarray, ids: Sequence[str]):
        self._folder, self._shards, self._places, self._ids = folder, shards, places, ids
        self._maps: dict[int, np.memmap[Any, Any]] = {}
        self._verified = np.zeros(len(places), bool)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, rows: Any) -> np.ndarray:
        if isinstance(rows, int | np.integer):
            return self.view(int(rows))
        chosen = range(len(self))[rows] if isinstance(rows, slice) else rows
        arrays = [self.view(int(row)) for row in chosen]
        if not arrays:
            first = self.view(0)
            return np.zeros((0, *first.shape), first.dtype)
        return np.stack(same_levels(arrays))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, ...) of rows that are all of one shape."""
        return (len(self), *self.view(0).shape)

    @property
    def nbytes(self) -> int:
        """Of all rows together."""
        places = self._places
        sides = np.where(np.arange(4) < places["ndim"][:, None], places["shape"], 1)  # (N, 4)
        return int((sides.prod(1, dtype=np.int64) * (1 + places["deep"])).sum())

    def view(self, row: int) -> np.ndarray:
        """One row, read-only and not copied; proven whole the first time.

        Raises:
            StorageError: it is damaged; it is forgotten, so that the next start decodes it anew.
        """
        place = self._places[row]
        shard = int(place["shard"])
        try:
            if shard not in self._maps:
                self._maps[shard] = np.memmap(self._folder / f"{self._shards[shard]}.rows", np.uint8, "r")
            (offset, length), data = self._extent(place), self._maps[shard]
            flat = data[offset : offset + length]
            whole = len(flat) == length and (self._verified[row] or zlib.crc32(flat.data) == place["crc"])
        except (OSError, ValueError):
            whole = False
        if not whole:
            forget_shard(self._folder / self._shards[shard])
            raise StorageError(
                f"the decoded cache in {self._folder} is damaged: {self._ids[row]} is not what was written",
                hint="It was discarded. Give the same command again: the case is decoded anew.",
            )
        self._verified[row] = True
        shape = tuple(int(n) for n in place["shape"][: place["ndim"]])
        # Not a memmap any more: stacking thousands of those costs more than the copy.
        return np.asarray(flat).view(np.uint16 if place["deep"] else np.uint8).reshape(shape)

    def verify(self) -> bool:
        """Whether all rows are whole."""
        try:
            for row in range(len(self)):
                self.view(row)
        except StorageError:
            return False
        return True

    @staticmethod
    def _extent(place: np.void) -> tuple[int, int]:
        count = int(np.prod(place["shape"][: place["ndim"]], dtype=np.int64))
        return int(place["offset"]), count * (2 if place["deep"] else 1)


class DecodedCache:
    """One finished list, opened read-only.

    Pickles as its path, so that a worker process maps the files instead of receiving a copy of them.

    Attributes:
        ids: case ids, in order.
        images: levels, uint8 or uint16 (C, *S) each.
        masks: uint8 (*S) class ids each, 255 where nothing is known; None if the list has none.
        shards: names of the shards that hold its rows.
        folder: the list's own folder; its name changes with everything that decides about the rows.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        about = json.loads((self.folder / "list.json").read_text(encoding="utf-8"))
        self.ids: list[str] = about["ids"]
        self.shards: list[str] = about["shards"]
        open_rows = partial(Rows, self.folder.parent, about["shards"], ids=self.ids)
        self.images: Rows = open_rows(places=self._places("images"))
        self.masks: Rows | None = open_rows(places=self._places("masks")) if about["masks"] else None

    def __len__(self) -> int:
        return len(self.ids)

    def __reduce__(self) -> tuple[type["DecodedCache"], tuple[Path]]:
        return DecodedCache, (self.folder,)

    def _places(self, what: str) -> np.ndarray:
        places: np.ndarray = np.load(self.folder / f"{what}.npy", mmap_mode="r")
        if places.dtype != _PLACE or len(places) != len(self.ids):
            raise ValueError(f"{self.folder / what}.npy does not fit its list")
        return places


def default_folder() -> Path:
    """``$KNOWSAM_CACHE``, else ``~/.cache/knowsam``; never beside the data, which may be read-only or shared."""
    return Path(os.environ.get("KNOWSAM_CACHE") or Path.home() / ".cache" / "knowsam")


def build_cache(
    source: Source,
    case_ids: Sequence[str],
    *,
    image_size: int | None,
    masks: bool,
    fit: str = "squash",
    folder: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> DecodedCache:
    """Open the list of these cases; decode those that no list has had yet.

    The key of a row covers its content, ``image_size``, ``fit``, the source's ``cache_settings`` (if it has that
    attribute) and the format version. Several processes may ask at once: one decodes, the others wait.

    Args:
        source: any ``Source``.
        case_ids: in the order wanted.
        image_size: S, pixels, of 2-D cases; None keeps every case at its own size, volumes too.
        masks: also decode the masks. False touches no mask, nor its fingerprint.
        fit: how images come to S x S, see ``sizing.Fit``.
        folder: where everything lives; ``default_folder()`` if None.
        progress: called as (cases done, cases in all) while decoding, from the calling thread.
    Raises:
        DataError: no cases, a case that is not 2-D where a size is asked for, a mask of another size than its image,
            or what the source raises.
        StorageError: the disk is full or the folder cannot be written.
    """
    ids = list(case_ids)
    if not ids:
        raise DataError("no cases to cache; the list of ids is empty")
    folder = Path(folder) if folder is not None else default_folder()
    settings = f"{FORMAT_VERSION}|{image_size}|{fit}|{getattr(source, 'cache_settings', None)!r}"
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        _memo.load(folder)
        image_keys = _row_keys(f"image|{settings}", pool.map(source.fingerprint, ids))
        mask_keys = _row_keys(f"mask|{settings}", pool.map(source.mask_fingerprint, ids)) if masks else None
        _memo.save(folder)
        entry = folder / _digest([ids, image_keys, mask_keys])
        if (ready := _open(entry)) is not None:  # before any lock: a finished cache may lie on a read-only disk
            return ready
        with _storage(folder):
            folder.mkdir(parents=True, exist_ok=True)
        # One lock for all lists of this data set, as they share rows.
        key = _digest([settings, type(source).__name__, str(getattr(source, "root", ""))])
        with _locked(folder / f"{key}.lock", wait=True) as alone:
            if (ready := _open(entry)) is not None:
                return ready
            with _storage(folder):
                shutil.rmtree(entry, ignore_errors=True)  # finished once, damaged since
                _remove_leftovers(folder, key if alone else None)
            decode = _Decode(source, image_size, Fit(image_size, fit) if image_size else None)
            of_masks: Sequence[str | None] = mask_keys if mask_keys is not None else [None] * len(ids)
            wanted = [decode.job(i, k, m) for i, k, m in zip(ids, image_keys, of_masks, strict=True)]
            known = _known_rows(folder, {k for job in wanted for k in job.keys})
            missing = [job for job in wanted if not known.keys() >= set(job.keys)]
            done = len(wanted) - len(missing)
            if missing:
                told = progress and _after(progress, done, len(wanted))
                # Whole volumes are large, so few of them wait at a time.
                _write_shard(folder, key, missing, known, pool, told, _CHUNK if image_size else 2)
            _write_list(folder, entry, ids, image_keys, mask_keys, known)
    return DecodedCache(entry)


def _after(progress: Callable[[int, int], None], done: int, total: int) -> Callable[[int], None]:
    return lambda more: progress(done + more, total)


@dataclass(frozen=True)
class Place:
    """Where a row lies."""

    shard: str
    offset: int
    crc: int
    deep: bool
    shape: tuple[int, ...]


@dataclass(frozen=True)
class _Job:
    """A case to decode, and the keys of the rows that it gives."""

    case_id: str
    keys: tuple[str, ...]
    run: Callable[[], list[np.ndarray]]


@dataclass(frozen=True)
class _Decode:
    source: Source
    image_size: int | None
    fit: Fit | None

    def job(self, case_id: str, image_key: str, mask_key: str | None) -> _Job:
        keys = (image_key,) if mask_key is None else (image_key, mask_key)
        return _Job(case_id, keys, partial(self._rows, case_id, masks=mask_key is not None))

    def _rows(self, case_id: str, *, masks: bool) -> list[np.ndarray]:
        image = self.source.image(case_id)  # (*S, C)
        if image.dtype not in (np.uint8, np.uint16) or (image.ndim != 3 if self.fit else image.ndim not in (3, 4)):
            wanted = "a 2-D case, levels (H, W, C)" if self.fit else "levels (H, W, C) or (D, H, W, C)"
            raise DataError(f"{case_id}: {image.dtype} {image.shape} cannot be cached; needed is {wanted}")
        rows = [np.moveaxis(self.fit.image(image) if self.fit else image, -1, 0)]
        if masks:
            mask = self.source.mask(case_id)  # (*S)
            if mask.shape != image.shape[:-1]:
                raise DataError(
                    f"{case_id}: the mask is {mask.shape}, the image {image.shape[:-1]}"
                    f" ({'height, width' if mask.ndim == 2 else 'slices, rows, columns'})"
                )
            rows.append(self.fit.mask(mask) if self.fit else mask)
        return [np.ascontiguousarray(row) for row in rows]


def cases_fingerprint(source: Source, case_ids: Sequence[str], *, folder: str | Path | None = None) -> str:
    """Changes with the ids, with any of their images and with any of their masks; nothing is decoded.

    Args:
        source: any ``Source``; may read the masks of these cases.
        folder: where earlier fingerprints are kept; ``default_folder()`` if None.
    Raises:
        NotFoundError, DataError: a file is gone or cannot be read.
    """
    load_memo(folder)
    ids = list(case_ids)
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        content = [
            ids,
            list(pool.map(source.fingerprint, ids)),
            list(pool.map(source.mask_fingerprint, ids)),
            repr(getattr(source, "cache_settings", None)),
        ]
    save_memo(folder)
    return _digest(content)


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


def content_sha256(path: Path, part: Literal["image", "mask"], reading: Reading) -> str:
    """sha256 of what is read of a file, or of the slices in a folder; remembered as of ``file_sha256``.

    Args:
        path: the file or folder.
        part: whose array, where one file holds both: an image's hash does not change with its mask.
        reading: names of the arrays.
    Raises:
        NotFoundError, DataError: not there, or not such a file.
    """
    if path.is_dir():  # a folder's time stamp says nothing of the files in it
        return io.fingerprint(path, part, reading)
    if path.suffix.lower() not in io.ARRAYS:
        return file_sha256(path)
    key = reading.image_key if part == "image" else reading.mask_key
    return remembered(path, f"{part}:{key}", lambda: io.fingerprint(path, part, reading))


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


def lists(folder: Path) -> list[DecodedCache]:
    """Every list of a cache that can be opened, the last opened first."""
    found = []
    for entry in folder.iterdir():
        with suppress(OSError, ValueError, KeyError, TypeError):
            if (entry / "list.json").is_file() and not entry.name.startswith("."):
                found.append(DecodedCache(entry))
    return sorted(found, key=lambda item: -item.folder.stat().st_mtime)


def shards(folder: Path) -> list[Path]:
    """The records of all shards of a cache."""
    return sorted(folder.glob("shard-*.json"))


def verify_shard(file: Path) -> bool:
    """Whether a shard is whole; else it is forgotten."""
    if (rows := read_shard(file)) and _whole(file, rows):
        return True
    forget_shard(file.with_suffix(""))
    return False


def prune(folder: Path, days: float | None) -> int:
    """Remove lists, and the shards that no list names any more.

    Args:
        folder: the cache.
        days: lists that were not opened for so long go; None: all of them.
    Returns:
        Bytes that are free again.
    Raises:
        StorageError: the folder cannot be written.
    """
    freed = 0
    with _storage(folder):
        for found in lists(folder):
            if days is None or time.time() - found.folder.stat().st_mtime > days * 86400:
                shutil.rmtree(found.folder)
        named = {name for found in lists(folder) for name in found.shards}
        for file in folder.glob("shard-*.rows"):
            # A shard without a record is one that was forgotten, or that is being written in this moment.
            young = time.time() - file.stat().st_mtime < 3600
            if file.stem not in named and (file.with_suffix(".json").exists() or not young):
                freed += file.stat().st_size
                file.with_suffix(".json").unlink(missing_ok=True)
                file.unlink()
    return freed


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]


def _row_keys(settings: str, fingerprints: Iterable[str]) -> list[str]:
    return [hashlib.sha256(f"{settings}|{fingerprint}".encode()).hexdigest()[:32] for fingerprint in fingerprints]


def _open(entry: Path) -> DecodedCache | None:
    """A list that is there, and whole as far as can be told at once."""
    try:
        found = DecodedCache(entry)
        parts = [part for part in (found.images, found.masks) if part is not None]
        if sum(part.nbytes for part in parts) <= _VERIFY_AT_ONCE and not all(part.verify() for part in parts):
            return None
        if not all((entry.parent / f"{name}.json").exists() for name in found.shards):
            return None
        with suppress(OSError):  # when it was last used, for whoever prunes
            os.utime(entry)
        return found
    except (OSError, ValueError, KeyError, TypeError):  # absent, or cut short
        return None


def forget_shard(shard: Path) -> None:
    """Take a shard out of the cache: its rows are decoded anew where they are asked for. ``shard``: without suffix."""
    with suppress(OSError):
        shard.with_suffix(".json").unlink()


def read_shard(file: Path) -> dict[str, Place]:
    """The rows of a shard, by key; none where its record is damaged."""
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        size = file.with_suffix(".rows").stat().st_size
        if record["version"] != FORMAT_VERSION or record["bytes"] != size:
            return {}
        return {
            key: Place(file.stem, o, crc, deep, tuple(shape)) for key, (o, crc, deep, shape) in record["rows"].items()
        }
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _known_rows(folder: Path, wanted: set[str]) -> dict[str, Place]:
    """Those of the wanted rows that are there and whole."""
    known: dict[str, Place] = {}
    for file in sorted(folder.glob("shard-*.json")):
        found = {key: place for key, place in read_shard(file).items() if key in wanted and key not in known}
        if not found:
            continue
        if _whole(file, found):
            known |= found
        else:
            forget_shard(file.with_suffix(""))
    return known


def _whole(file: Path, rows: Mapping[str, Place]) -> bool:
    """Whether rows of a shard are what was written."""
    try:
        data = np.memmap(file.with_suffix(".rows"), np.uint8, "r")
    except (OSError, ValueError):
        return False
    lengths = {key: int(np.prod(p.shape, dtype=np.int64)) * (2 if p.deep else 1) for key, p in rows.items()}
    return all(zlib.crc32(data[p.offset : p.offset + lengths[key]].data) == p.crc for key, p in rows.items())


def _write_shard(
    folder: Path,
    lock_key: str,
    jobs: Sequence[_Job],
    known: dict[str, Place],
    pool: ThreadPoolExecutor,
    progress: Callable[[int], None] | None,
    at_once: int,
) -> None:
    """Decode the jobs into a new shard, and add its rows to ``known``; ``at_once`` of them wait to be written.

    Rows are written, not assigned to a memory map: on a full disk a write fails with an error, a map with a signal.
    """
    with _storage(folder):
        handle, name = tempfile.mkstemp(prefix=f".building-{lock_key}-", suffix=".rows", dir=folder)
        os.close(handle)
    temporary = Path(name)
    rows: dict[str, list[Any]] = {}
    offset = 0
    file: BinaryIO | None = None
    try:
        with _storage(folder):
            file = _start(temporary)
        for start in range(0, len(jobs), at_once):  # in chunks: rows that wait to be written stay few
            chunk = jobs[start : start + at_once]
            decoded = list(pool.map(lambda job: job.run(), chunk))
            if start == 0:
                _refuse_if_full(folder, decoded[0], len(jobs))
            for job, arrays in zip(chunk, decoded, strict=True):
                for key, array in zip(job.keys, arrays, strict=True):
                    if key in rows or key in known:
                        continue
                    with _storage(folder):
                        file.write(array.data)
                    rows[key] = [offset, zlib.crc32(array.data), array.dtype == np.uint16, array.shape]
                    padding = -array.nbytes % 64
                    with _storage(folder):
                        file.write(bytes(padding))
                    offset += array.nbytes + padding
            if progress:
                progress(min(start + at_once, len(jobs)))
        with _storage(folder):
            file.flush()
            os.fsync(file.fileno())  # else a power cut could leave the final name on empty pages
            file.close()
            stem = f"shard-{hashlib.sha256(''.join(rows).encode()).hexdigest()[:16]}-{os.getpid()}-{time.time_ns():x}"
            temporary.chmod(0o644)  # mkstemp is private, a cache may be shared
            os.rename(temporary, folder / f"{stem}.rows")
            record = {"version": FORMAT_VERSION, "bytes": offset, "rows": rows}
            _write_whole(folder / f"{stem}.json", json.dumps(record).encode())
    finally:
        if file is not None:
            with suppress(OSError):  # closing flushes, and the disk may be full: that was reported already
                file.close()
        temporary.unlink(missing_ok=True)
    known |= read_shard(folder / f"{stem}.json")


def _refuse_if_full(folder: Path, first: Sequence[np.ndarray], count: int) -> None:
    needed = count * sum(array.nbytes for array in first)
    with _storage(folder):
        free = shutil.disk_usage(folder).free
    if needed > free:
        raise StorageError(
            f"the decoded cache needs about {needed / 1e9:.2f} GB, but {folder} has {free / 1e9:.2f} GB free",
            hint="free some space (knowsam cache prune), or set KNOWSAM_CACHE to a folder on another disk",
        )


def _write_list(
    folder: Path,
    entry: Path,
    ids: Sequence[str],
    image_keys: Sequence[str],
    mask_keys: Sequence[str] | None,
    known: dict[str, Place],
) -> None:
    keys = [*image_keys, *(mask_keys or ())]
    shards = sorted({known[key].shard for key in keys})
    number = {name: n for n, name in enumerate(shards)}

    def places(of: Sequence[str]) -> np.ndarray:
        table = np.zeros(len(of), _PLACE)
        for row, key in enumerate(of):
            place = known[key]
            shape = (*place.shape, 0, 0, 0, 0)[:4]
            table[row] = (number[place.shard], place.offset, place.crc, place.deep, len(place.shape), shape)
        return table

    with _storage(folder):
        temporary = Path(tempfile.mkdtemp(prefix=f".building-{entry.name}-", dir=folder))
        try:
            np.save(temporary / "images.npy", places(image_keys))
            if mask_keys is not None:
                np.save(temporary / "masks.npy", places(mask_keys))
            about = {"version": FORMAT_VERSION, "ids": list(ids), "shards": shards, "masks": mask_keys is not None}
            _write_whole(temporary / "list.json", json.dumps(about).encode())
            temporary.chmod(0o755)  # mkdtemp is private, a cache may be shared
            try:
                os.rename(temporary, entry)
            except OSError:
                if _open(entry) is None:  # else somebody without the lock was first
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _write_whole(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _start(path: Path) -> BinaryIO:
    return open(path, "wb")


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
    """What builders that died have left: nobody holds the lock of their key any more."""
    for leftover in folder.glob(".building-*"):
        key = leftover.name.split("-")[1]
        dead = key == own_key
        if not dead and own_key is not None:
            with _locked(folder / f"{key}.lock", wait=False) as dead:
                pass
        if dead:
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink(missing_ok=True)


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
