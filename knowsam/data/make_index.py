"""Building an index of a dataset's files: looked for once, read once, and not again where nothing has changed."""

import hashlib
import json
import os
import sys
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from knowsam.data.cache import default_folder
from knowsam.data.index import ALIGN, FORMAT, MAGIC, NOTHING, Index, Kind, packed
from knowsam.data.splits import unlistable
from knowsam.errors import DataError, KnowsamError, NotFoundError, StorageError
from knowsam.files import storage_error, write_atomically
from knowsam.io import PICTURES

if sys.platform != "win32":
    import fcntl

_AT_ONCE = 512  # files that are read before the notes of them go to the disk
_SHOWN = 20
_NOTE = np.dtype([("key", "S16"), ("digest", "u1", 32), ("low", "<i4"), ("high", "<i4")])


@dataclass(frozen=True)
class Place:
    """A folder of a dataset, and which of its files are meant.

    Attributes:
        folder: inside the dataset's folder; empty: that one itself. Folders inside it count too, but for other places.
        extensions: in small letters, with the dot.
        suffix: what a name has after the id, such as ``_mask``.
        masks: it holds masks; else images.
    """

    folder: str
    extensions: tuple[str, ...]
    suffix: str = ""
    masks: bool = False


@dataclass(frozen=True)
class Wanted:
    """What the index is to hold beside names, sizes and dates.

    Attributes:
        digests: sha256 of every file; every file is read.
        mask_range: mask file -> smallest and largest raw value; None: masks are not read.
        group, domain: id -> patient, id -> domain; None: unknown.
        group_rule: how ``group`` was made, in words that are compared: ``regex ^(p\\d+)``.
    """

    digests: bool = False
    mask_range: Callable[[Path], tuple[int, int]] | None = None
    group: Callable[[str], str | None] | None = None
    domain: Callable[[str], str | None] | None = None
    group_rule: str = ""


@dataclass
class Report:
    """What building an index came upon.

    Attributes:
        cases: images.
        masks: those of them that have a mask.
        orphans: masks without an image.
        read: files whose content was read now.
        known: files whose content was known from before.
        notes: what was passed over or could not be read, for people.
    """

    cases: int = 0
    masks: int = 0
    orphans: int = 0
    read: int = 0
    known: int = 0
    notes: list[str] = field(default_factory=list)


def index_place(root: str | Path, places: Sequence[Place]) -> Path:
    """Where the index of a folder is kept if nobody says: in the cache folder, one file a folder and arrangement."""
    root = Path(root).absolute()
    text = json.dumps([str(root), [(p.folder, p.suffix, p.masks, p.extensions) for p in places]])
    return default_folder() / "index" / f"{root.name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.index"


def image_folder_places(
    image_dir: str = "images", mask_dir: str = "masks", image_suffix: str = "", mask_suffix: str = ""
) -> list[Place]:
    """The places of ``ImageFolder``; arguments as there."""
    return [Place(image_dir, PICTURES, image_suffix), Place(mask_dir, PICTURES, mask_suffix, masks=True)]


def h5_places(slice_dir: str = "data/slices", volume_dir: str = "data") -> list[Place]:
    """The places of ``H5Slices``, whose files hold image and mask; arguments as there."""
    return [Place(folder, (".h5", ".hdf5")) for folder in (slice_dir, volume_dir)]


def find_index(root: str | Path, places: Sequence[Place]) -> Index | None:
    """The index of a folder from where it is kept if nobody says; None if there is none.

    Raises:
        DataError: it is damaged.
    """
    try:
        return Index(index_place(root, places))
    except NotFoundError:
        return None


def earlier_index(path: Path) -> Index | None:
    """The index of a file; None where there is none, or none that can be used: then everything is read."""
    try:
        return Index(path)
    except (NotFoundError, DataError):
        return None


def make_index(
    path: str | Path,
    root: str | Path,
    places: Sequence[Place],
    wanted: Wanted | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Look through a folder and write its index, all or nothing.

    What an earlier index of the same file name, or an attempt that was broken off, knows of unchanged files (name,
    size, date) is not read again.

    Args:
        path: the index file; what is there is replaced.
        root: the dataset's folder.
        places: where its images and masks lie.
        wanted: what to read of the files; None: nothing.
        progress: called as (files read, files to read), where files are read.
    Raises:
        NotFoundError: ``root`` or the folder of a place is not there, or no image in them.
        StorageError: the disk is full, or another process is building the same index.
    """
    path, root, wanted = Path(path), Path(root).absolute(), wanted or Wanted()
    report = Report()
    found = _scan(root, places, report)
    if not found.ids:
        looked = ", ".join(str(root / p.folder) for p in places if not p.masks)
        raise NotFoundError(f"no image in {looked}", hint="Are the folder and its image_dir right?")
    order = np.array(sorted(range(len(found.ids)), key=found.ids.__getitem__), np.int64)
    ids = [found.ids[n] for n in order]
    columns: dict[str, np.ndarray] = {
        name: np.frombuffer(values, values.typecode)[order].astype(dtype)
        for name, (values, dtype) in found.columns.items()
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(path.parent, error) from error
    notes_file = path.with_name(path.name + ".part")
    with _alone(notes_file) as journal:
        contents = _Contents(journal, earlier_index(path), found.kinds)
        _read_files(root, ids, columns, wanted, contents, report, progress)
        _name_groups(ids, columns, wanted, report)
        header: dict[str, Any] = {
            "root": str(root),
            "kinds": [[kind.before, kind.after] for kind in found.kinds],
            "several": found.several,
            "made": time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime()),
            "group_rule": wanted.group_rule,
        }
        folders = sorted(found.folders)
        columns["folder_mtime"] = np.array([found.folders[name] for name in folders], np.int64)
        texts = {"id": ids, "folder": folders, "group": columns.pop("group_names").tolist()}
        header["domains"] = columns.pop("domain_names").tolist()
        write_index(path, header, columns, texts)
    with suppress(OSError):
        notes_file.unlink()
    report.cases, report.masks = len(ids), int((columns["mask_kind"] != NOTHING).sum())
    return report


def write_index(
    path: Path, header: Mapping[str, Any], columns: Mapping[str, np.ndarray], texts: Mapping[str, Sequence[str]]
) -> None:
    """Write the file that ``Index`` reads, all or nothing.

    Args:
        path: the index file; its folder is there.
        header: plain values; ``root``, ``kinds``, ``domains``, ``several``, ``group_rule``.
        columns: name -> one value or row a case.
        texts: ``id`` (sorted), ``group``, ``folder``.
    Raises:
        StorageError: it cannot be written.
    """
    arrays: dict[str, np.ndarray] = dict(columns)
    for name, strings in texts.items():
        arrays[f"{name}_text"], arrays[f"{name}_ends"] = packed(strings)
    ids_sha256 = hashlib.sha256(arrays["id_text"].data).hexdigest()
    # The header says where each array begins, which depends on its own length: blanks at its end make room.
    sizes = {name: values.nbytes for name, values in arrays.items()}
    head = {"format": FORMAT, "bytes": 0, "ids_sha256": ids_sha256, **header}
    room = len(json.dumps(head)) + sum(len(name) + 120 for name in arrays) + 64
    start = _aligned(len(MAGIC) + 8 + room)
    length = start - len(MAGIC) - 8
    places: dict[str, Any] = {}
    for name, values in arrays.items():
        places[name] = [values.dtype.newbyteorder("<").str, list(values.shape), start]
        start = _aligned(start + sizes[name])
    head |= {"arrays": places, "bytes": start}
    text = json.dumps(head).encode().ljust(length)

    def write(file: BinaryIO) -> None:
        file.write(MAGIC + length.to_bytes(8, "little") + text)
        for name, values in arrays.items():
            file.write(b"\0" * (places[name][2] - file.tell()))
            file.write(np.ascontiguousarray(values.astype(values.dtype.newbyteorder("<"), copy=False)).data)
        file.write(b"\0" * (start - file.tell()))

    write_atomically(path, write, need=start)


def _aligned(place: int) -> int:
    return -(-place // ALIGN) * ALIGN


# ---------------------------------------------------------------- looking


@dataclass
class _Found:
    ids: list[str]
    kinds: list[Kind]
    columns: "dict[str, tuple[array[int], str]]"
    folders: dict[str, int]
    several: dict[str, list[str]]


def _scan(root: Path, places: Sequence[Place], report: Report) -> _Found:
    """Images and their masks. Nothing is opened; links to folders are not followed, so a loop cannot trap the scan."""
    if not root.is_dir():
        raise NotFoundError(f"data folder {root} does not exist", hint="Give the dataset's folder.")
    row_of: dict[str, int] = {}
    numbers: dict[Kind, int] = {}
    kinds: list[Kind] = []
    names = {"image_kind": "u2", "image_size": "i8", "image_mtime": "i8"}
    names |= {name.replace("image", "mask"): kind for name, kind in names.items()}
    values = {name: array("q") for name in names}
    several_files = array("q")
    folders: dict[str, int] = {}
    several: dict[str, list[str]] = {}
    passed: Counter[str] = Counter()
    examples: dict[str, list[str]] = {}
    own = {Path(place.folder).as_posix() for place in places}

    def pass_over(reason: str, name: str) -> None:
        passed[reason] += 1
        if passed[reason] <= 3:
            examples.setdefault(reason, []).append(name)

    for place in sorted(places, key=lambda p: p.masks):  # images first: a mask belongs to one
        what = "mask" if place.masks else "image"
        for case_id, kind, stat in _files(root, place, own, folders, pass_over):
            if kind not in numbers:
                numbers[kind] = len(kinds)
                kinds.append(kind)
            row = row_of.get(case_id)
            if row is None and place.masks:
                report.orphans += 1
                continue
            if row is None:
                if reason := unlistable(case_id) or _no_text(case_id):
                    pass_over(f"the name {reason}", repr(kind.path(case_id)))
                    continue
                row = row_of[case_id] = len(row_of)
                several_files.append(0)
                for name in names:
                    values[name].append(NOTHING if name.endswith("kind") else 0)
            if values[f"{what}_kind"][row] != NOTHING:
                first = kinds[values[f"{what}_kind"][row]].path(case_id)
                several.setdefault(case_id, [first]).append(kind.path(case_id))
                several_files[row] = 1
                continue
            values[f"{what}_kind"][row] = numbers[kind]
            values[f"{what}_size"][row], values[f"{what}_mtime"][row] = stat.st_size, stat.st_mtime_ns
    for reason, count in passed.most_common():
        report.notes.append(f"passed over: {count} x {reason}, such as {', '.join(examples[reason])}")
    if report.orphans:
        report.notes.append(f"passed over: {report.orphans} masks without an image")
    if several:
        shown = "; ".join(" and ".join(files) for files in list(several.values())[:3])
        report.notes.append(f"{len(several)} ids have several files, and cannot be used until one is left: {shown}")
    columns = {name: (values[name], dtype) for name, dtype in names.items()}
    columns["several"] = (several_files, "u1")
    return _Found(list(row_of), kinds, columns, folders, several)


def _no_text(name: str) -> str | None:
    try:
        name.encode()
    except UnicodeEncodeError:
        return "is not UTF-8, which lists are"
    return None


def _files(
    root: Path,
    place: Place,
    own: Iterable[str],
    folders: dict[str, int],
    pass_over: Callable[[str, str], None],
) -> Iterator[tuple[str, Kind, os.stat_result]]:
    """(id, kind, stat) of every file of a place, in no order."""
    top = Path(place.folder).as_posix()
    top = "" if top == "." else top
    if not (root / top).is_dir():
        raise NotFoundError(f"data folder {root / top} does not exist", hint="Are the root and its folders right?")
    others = {folder for folder in own if folder not in (top, ".")}
    before = f"{top}/" if top else ""
    kinds: dict[str, Kind] = {}
    extensions = sorted(place.extensions, key=len, reverse=True)  # .nii.gz before .gz
    waiting = [top]
    while waiting:
        folder = waiting.pop()
        folders[folder] = os.stat(root / folder).st_mtime_ns
        with os.scandir(root / folder) as entries:
            for entry in entries:
                name = entry.name
                inside = f"{folder}/{name}" if folder else name
                if name.startswith(".") or name == "__MACOSX":
                    continue
                if entry.is_dir(follow_symlinks=False):
                    if inside not in others:
                        waiting.append(inside)
                    continue
                size = next((len(e) for e in extensions if name.lower().endswith(e)), 0)
                if not size:
                    pass_over(f"{os.path.splitext(name)[1] or 'no extension'} is not read", inside)
                    continue
                stem, extension = name[:-size], name[-size:]
                if not stem.endswith(place.suffix) or stem == place.suffix:
                    if not place.masks:
                        pass_over(f"a name that does not end in {place.suffix}", inside)
                    continue
                after = place.suffix + extension
                kind = kinds.setdefault(after, Kind(before, after))
                try:
                    yield inside[len(before) : len(inside) - len(after)], kind, entry.stat()
                except OSError:  # a link that leads nowhere
                    pass_over("a link that leads nowhere", inside)


# ---------------------------------------------------------------- reading


class _Contents:
    """What is known of the contents of files: from the index that is there, and from an attempt that was broken off."""

    def __init__(self, journal: BinaryIO, earlier: Index | None, kinds: Sequence[Kind]) -> None:
        self.journal, self.earlier, self.kinds = journal, earlier, kinds
        journal.seek(0)
        stored = journal.read()
        whole = len(stored) - len(stored) % _NOTE.itemsize  # the last note may have been cut short
        notes = np.frombuffer(stored[:whole], _NOTE)
        self.notes = {note["key"].ljust(16, b"\0"): note for note in notes}
        journal.seek(whole)
        journal.truncate()

    @staticmethod
    def key(name: str, size: int, mtime: int, what: str) -> bytes:
        return hashlib.blake2b(f"{what}|{size}|{mtime}|{name}".encode(), digest_size=16).digest()

    def add(self, found: Sequence[tuple[bytes, bytes, tuple[int, int]]]) -> None:
        """Write down what was read, so that it survives whatever comes."""
        notes = np.zeros(len(found), _NOTE)
        for note, (key, digest, (low, high)) in zip(notes, found, strict=True):
            note["key"], note["digest"], note["low"], note["high"] = key, np.frombuffer(digest, np.uint8), low, high
        try:
            self.journal.write(notes.tobytes())
            self.journal.flush()
        except OSError as error:
            raise storage_error(Path(self.journal.name), error) from error


def _read_files(
    root: Path,
    ids: Sequence[str],
    columns: dict[str, np.ndarray],
    wanted: Wanted,
    contents: _Contents,
    report: Report,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Fill in digests and ranges of masks."""
    if wanted.digests:
        columns["image_digest"] = np.zeros((len(ids), 32), np.uint8)
        columns["mask_digest"] = np.zeros((len(ids), 32), np.uint8)
    if wanted.mask_range is not None:
        columns["mask_low"] = np.full(len(ids), -1, np.int32)
        columns["mask_high"] = np.full(len(ids), -1, np.int32)
    jobs: list[tuple[str, int]] = []
    for what in ("image", "mask"):
        ranged = what == "mask" and wanted.mask_range is not None
        if not wanted.digests and not ranged:
            continue
        there = np.flatnonzero(columns[f"{what}_kind"] != NOTHING)
        known = _take_over(what, there, ids, columns, wanted, contents)
        report.known += int(known.sum())
        jobs += [(what, int(row)) for row in there[~known]]

    def read(job: tuple[str, int]) -> tuple[bytes, bytes, tuple[int, int]] | str:
        what, row = job
        name = contents.kinds[columns[f"{what}_kind"][row]].path(ids[row])
        size, mtime = int(columns[f"{what}_size"][row]), int(columns[f"{what}_mtime"][row])
        key = contents.key(name, size, mtime, what + _what_is_read(wanted, what))
        try:
            digest = b"\0" * 32
            if wanted.digests:
                with open(root / name, "rb") as file:
                    digest = hashlib.file_digest(file, "sha256").digest()
            low, high = (-1, -1)
            if what == "mask" and wanted.mask_range is not None:
                low, high = wanted.mask_range(root / name)
            return key, digest, (low, high)
        except (KnowsamError, OSError) as error:
            return f"{name}: {error}"

    broken: list[str] = []
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        for start in range(0, len(jobs), _AT_ONCE):
            piece = jobs[start : start + _AT_ONCE]
            notes = []
            for (what, row), result in zip(piece, pool.map(read, piece), strict=True):
                if isinstance(result, str):
                    broken.append(result)
                    continue
                notes.append(result)
                _fill(columns, what, row, result[1], result[2])
            contents.add(notes)
            if progress:
                progress(min(start + _AT_ONCE, len(jobs)), len(jobs))
    report.read = len(jobs) - len(broken)
    report.notes += [f"cannot be read, and is in the index all the same: {text}" for text in broken[:_SHOWN]]
    if len(broken) > _SHOWN:
        report.notes.append(f"... and {len(broken) - _SHOWN} more that cannot be read")
    if wanted.digests:
        columns["content"] = _same(columns["image_digest"])


def _what_is_read(wanted: Wanted, what: str) -> str:
    return f"{wanted.digests:d}{what == 'mask' and wanted.mask_range is not None:d}"


def _fill(columns: dict[str, np.ndarray], what: str, row: int, digest: bytes, ends: tuple[int, int]) -> None:
    if f"{what}_digest" in columns:
        columns[f"{what}_digest"][row] = np.frombuffer(digest, np.uint8)
    if what == "mask" and "mask_low" in columns:
        columns["mask_low"][row], columns["mask_high"][row] = ends


def _take_over(
    what: str,
    there: np.ndarray,
    ids: Sequence[str],
    columns: dict[str, np.ndarray],
    wanted: Wanted,
    contents: _Contents,
) -> np.ndarray:
    """bool, one for each row of ``there``: whether its content is known from before, and now filled in."""
    known = np.zeros(len(there), bool)
    old = contents.earlier
    needed = [f"{what}_digest"] if wanted.digests else []
    needed += ["mask_low", "mask_high"] if what == "mask" and wanted.mask_range is not None else []
    if old is not None and all(map(old.has, needed)):
        before = old.rows([ids[row] for row in there])
        have = before >= 0
        for column in (f"{what}_size", f"{what}_mtime"):
            have[have] &= columns[column][there[have]] == old.column(column)[before[have]]
        renamed = [(kind.before, kind.after) for kind in contents.kinds]
        for n in np.flatnonzero(have):
            kind = int(old.column(f"{what}_kind")[before[n]])
            same = kind != NOTHING and renamed[columns[f"{what}_kind"][there[n]]] == (
                old.kinds[kind].before,
                old.kinds[kind].after,
            )
            read = old.column(f"{what}_digest")[before[n]].any() if wanted.digests else True
            read = read and (old.column("mask_low")[before[n]] >= 0 if "mask_low" in needed else True)
            have[n] = same and read
        for column in needed:
            columns[column][there[have]] = old.column(column)[before[have]]
        known |= have
    if contents.notes:
        for n in np.flatnonzero(~known):
            row = int(there[n])
            name = contents.kinds[columns[f"{what}_kind"][row]].path(ids[row])
            size, mtime = int(columns[f"{what}_size"][row]), int(columns[f"{what}_mtime"][row])
            note = contents.notes.get(contents.key(name, size, mtime, what + _what_is_read(wanted, what)))
            if note is not None:
                _fill(columns, what, row, note["digest"].tobytes(), (int(note["low"]), int(note["high"])))
                known[n] = True
    return known


def _same(digests: np.ndarray) -> np.ndarray:
    """uint32 (N,): the same number for rows of equal bytes; 0 for those that are alone, or were not read."""
    whole = np.ascontiguousarray(digests).view("S32").ravel()  # zeros at the end are cut, and nothing begins with them
    different, inverse, counts = np.unique(whole, return_inverse=True, return_counts=True)
    several = (counts > 1) & (different != b"")
    numbers = np.where(several, np.cumsum(several), 0)
    return numbers[inverse].astype(np.uint32)


def _name_groups(ids: Sequence[str], columns: dict[str, np.ndarray], wanted: Wanted, report: Report) -> None:
    """Columns of group and domain: 0 for unknown, else one more than the place among the sorted names."""
    for what, rule, dtype in (("group", wanted.group, np.uint32), ("domain", wanted.domain, np.uint32)):
        names = [rule(case_id) for case_id in ids] if rule is not None else []
        ordered = sorted({name for name in names if name is not None})
        for name in ordered:
            if "\n" in name:
                raise DataError(f"the {what} {name!r} holds a line break")
        code = {name: n for n, name in enumerate(ordered, start=1)}
        columns[what] = np.fromiter((code.get(name or "", 0) for name in names), dtype, len(names))
        if rule is None:
            columns[what] = np.zeros(len(ids), dtype)
        elif missing := int((columns[what] == 0).sum()):
            example = ids[int(np.flatnonzero(columns[what] == 0)[0])]
            report.notes.append(f"{missing} of {len(ids)} cases have no {what}, such as {example}")
        columns[f"{what}_names"] = np.array(ordered, object)


@contextmanager
def _alone(path: Path) -> Iterator[BinaryIO]:
    """The file of notes, open for reading and appending, by one process at a time."""
    try:
        file = open(path, "a+b")  # noqa: SIM115 - closed below
    except OSError as error:
        raise storage_error(path, error) from error
    with file:
        if sys.platform != "win32":
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise StorageError(
                    f"another process is building {path.with_suffix('')}", hint="Wait for it; the index is shared."
                ) from None
            except OSError:
                pass  # a disk without locks
        yield file
