"""An index of a dataset's files: one binary file, mapped into memory, that says what there is without looking again.

``make_index`` builds it, once; a training then opens it in the time that reading its header takes. Loader workers map
the same pages: an index pickles as its path.

The file: a magic line, the header's length, the header as JSON, then arrays that begin at multiples of 64 bytes. Rows
are cases, sorted by id. Texts are UTF-8, one after the other, each closed by a newline, which no id may hold.
"""

import hashlib
import json
import mmap
import operator
import os
import tempfile
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any, overload

import numpy as np

from knowsam.errors import DataError, Fault, NotFoundError

MAGIC = b"knowsam index\n"
FORMAT = 1
ALIGN = 64
NOTHING = 0xFFFF
"""The kind of a file that is not there."""

_PIECE = 65536  # ids that are decoded at a time
_SEARCHES = 128  # so many rows of a table are read in the time of one search
_LOOKED_AT = 256  # folders and files whose dates say whether an index is stale


@dataclass(frozen=True)
class Kind:
    """How an id becomes a path: what stands before it and after it, such as ``images/`` and ``_0000.png``."""

    before: str
    after: str

    def path(self, case_id: str) -> str:
        """Below the dataset's folder, with ``/``."""
        return f"{self.before}{case_id}{self.after}"


class Texts(Sequence[str]):
    """Many texts in one array of bytes; sorted ones can be looked up.

    Args:
        text: uint8, each text closed by a newline.
        ends: int64 (N,), where each closes, its newline included.
    """

    def __init__(self, text: np.ndarray, ends: np.ndarray) -> None:
        self._text, self._ends = text, ends

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, place: int) -> str: ...

    @overload
    def __getitem__(self, place: slice) -> list[str]: ...

    def __getitem__(self, place: int | slice) -> str | list[str]:
        if isinstance(place, slice):
            start, stop, step = place.indices(len(self))
            if step == 1:
                return self._piece(start, max(start, stop))
            return [self[n] for n in range(start, stop, step)]
        if not -len(self) <= place < len(self):
            raise IndexError(place)
        return self.raw(place % len(self)).decode()

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), _PIECE):
            yield from self._piece(start, min(start + _PIECE, len(self)))

    def raw(self, place: int) -> bytes:
        """One text as UTF-8 without its newline."""
        start = int(self._ends[place - 1]) if place else 0
        return self._text[start : int(self._ends[place]) - 1].tobytes()

    def find(self, text: str) -> int | None:
        """Place of a text among sorted ones; None if it is not there."""
        try:
            wanted = text.encode()
        except UnicodeEncodeError:  # a name on the disk that is no text at all
            return None
        low = bisect_left(range(len(self)), wanted, key=self.raw)
        return low if low < len(self) and self.raw(low) == wanted else None

    def _piece(self, start: int, stop: int) -> list[str]:
        if start >= stop:
            return []
        begin = int(self._ends[start - 1]) if start else 0
        return self._text[begin : int(self._ends[stop - 1]) - 1].tobytes().decode().split("\n")


def packed(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """The two arrays of ``Texts``: uint8 bytes, int64 ends.

    Args:
        texts: none of them holds a newline.
    """
    if not texts:
        return np.zeros(0, np.uint8), np.zeros(0, np.int64)
    text = np.frombuffer(("\n".join(texts) + "\n").encode(), np.uint8)
    return text, np.flatnonzero(text == ord("\n")).astype(np.int64) + 1


class Index:
    """What lies in a dataset's folder, from its index file; nothing of the folder itself is touched.

    Pickles as its path: a worker process maps the file instead of receiving a copy.

    Args:
        path: the index file.
    Raises:
        NotFoundError: no such file.
        DataError: no index, one of another version, or a damaged one.
    Attributes:
        path: the index file.
        root: the dataset's folder, absolute.
        header: what was written of how it was made.
        ids: every case, sorted.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.header, arrays = _open(self.path)
        self.root = Path(self.header["root"])
        self.kinds = [Kind(*kind) for kind in self.header["kinds"]]
        self.domains: list[str] = self.header["domains"]
        self._arrays = arrays
        self.ids = Texts(arrays["id_text"], arrays["id_ends"])
        self.groups = Texts(arrays["group_text"], arrays["group_ends"])
        self.folders = Texts(arrays["folder_text"], arrays["folder_ends"])

    @classmethod
    def open(cls, path: str | Path) -> "Index":
        """The same as calling the class."""
        return cls(path)

    def __reduce__(self) -> tuple[type["Index"], tuple[Path]]:
        return Index, (self.path,)

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        return f"Index({self.path}: {len(self)} cases of {self.root})"

    def __contains__(self, case_id: object) -> bool:
        return isinstance(case_id, str) and self.ids.find(case_id) is not None

    def __iter__(self) -> Iterator[str]:
        return iter(self.ids)

    def column(self, name: str) -> np.ndarray:
        """One column, mapped: ``image_size``, ``image_mtime``, ``group`` and so on, (N, ...).

        Raises:
            KeyError: the index was built without it.
        """
        return self._arrays[name]

    def has(self, name: str) -> bool:
        """Whether the index was built with this column."""
        return name in self._arrays

    def row(self, case_id: str) -> int:
        """Row of a case.

        Raises:
            DataError: it is not in the index.
        """
        row = self.ids.find(case_id)
        if row is None:
            raise DataError(
                f"{case_id} is not in the index {self.path} of {self.root}",
                hint="If files have come since it was built, run `knowsam index` again: only what is new is read.",
            )
        return row

    def rows(self, ids: Sequence[str]) -> np.ndarray:
        """int64 rows of many cases; -1 for those that are not there."""
        if isinstance(ids, IdList) and ids.table.path == self.path:
            return ids.rows.astype(np.int64)
        if _SEARCHES * len(ids) < len(self):
            found = (self.ids.find(case_id) for case_id in ids)
            return np.fromiter((-1 if row is None else row for row in found), np.int64, len(ids))
        return _places(ids, list(self.ids))

    def file(self, case_id: str) -> Path:
        """The image's file.

        Raises:
            DataError: not in the index, or several files of that id.
        """
        row = self.row(case_id)
        if self._arrays["several"][row]:
            raise DataError(self._several([row])[0].text)
        return self.root / self.kinds[self._arrays["image_kind"][row]].path(case_id)

    def mask_file(self, case_id: str) -> Path:
        """The mask's file. Asks no firewall: whoever opens it has to.

        Raises:
            DataError: not in the index, no mask, or several files of that id.
        """
        row = self.row(case_id)
        if self._arrays["several"][row]:
            raise DataError(self._several([row])[0].text)
        kind = int(self._arrays["mask_kind"][row])
        if kind == NOTHING:
            raise DataError(f"{case_id}: the index {self.path} has no mask of it")
        return self.root / self.kinds[kind].path(case_id)

    def files(self, ids: Iterable[str]) -> list[Path]:
        """The images' files, in the order of the ids. Raises DataError as ``file``."""
        return [self.file(case_id) for case_id in ids]

    @property
    def images(self) -> Mapping[str, Path]:
        """Id -> file of the image; looks like a dictionary and holds none."""
        return _Files(self, "image")

    @property
    def masks(self) -> Mapping[str, Path]:
        """Id -> file of the mask, of the cases that have one."""
        return _Files(self, "mask")

    def group(self, case_id: str) -> str | None:
        """Patient of a case; None where the index knows none."""
        code = int(self._arrays["group"][self.row(case_id)])
        return self.groups[code - 1] if code else None

    def domain(self, case_id: str) -> str | None:
        """Domain of a case; None where the index knows none."""
        code = int(self._arrays["domain"][self.row(case_id)])
        return self.domains[code - 1] if code else None

    def digest(self, case_id: str, what: str = "image") -> str | None:
        """sha256 of the image's or the mask's file as it was when the index was built; None: it was not read.

        Args:
            case_id: of one case.
            what: ``"image"`` or ``"mask"``.
        """
        name = f"{what}_digest"
        value = self._arrays[name][self.row(case_id)].tobytes() if name in self._arrays else b""
        return value.hex() if any(value) else None

    def mask_range(self, case_id: str) -> tuple[int, int] | None:
        """Smallest and largest raw value of the mask; None: it was not read."""
        if "mask_low" not in self._arrays:
            return None
        row = self.row(case_id)
        low, high = int(self._arrays["mask_low"][row]), int(self._arrays["mask_high"][row])
        return None if low < 0 else (low, high)

    def changed(self, case_id: str) -> bool:
        """Whether a case's files are no longer those that the index saw, by size and date; two calls to the system."""
        row = self.row(case_id)
        for what in ("image", "mask"):
            kind = int(self._arrays[f"{what}_kind"][row])
            if kind == NOTHING:
                continue
            try:
                stat = os.stat(self.root / self.kinds[kind].path(case_id))
            except OSError:
                return True
            seen = int(self._arrays[f"{what}_size"][row]), int(self._arrays[f"{what}_mtime"][row])
            if seen != (stat.st_size, stat.st_mtime_ns):
                return True
        return False

    def stale(self, most: int | None = _LOOKED_AT) -> list[str]:
        """What has changed in the folder since the index was built, one line each; empty: nothing was found.

        A folder's date changes when a file comes, goes or is renamed; a file's own when it is written over.

        Args:
            most: so many folders and so many files are looked at, spread evenly; None: all of them.
        """
        if not self.root.is_dir():
            return [f"{self.root} is not there"]
        found = []
        for n in _spread(len(self.folders), most):
            name = self.folders[n]
            try:
                date = os.stat(self.root / name).st_mtime_ns
            except OSError:
                found.append(f"folder {name or '.'} is gone")
                continue
            if date != int(self._arrays["folder_mtime"][n]):
                found.append(f"folder {name or '.'}: files have come or gone since")
        for row in _spread(len(self), most):
            case_id = self.ids[row]
            if self.changed(case_id):
                found.append(f"{case_id}: written over or gone since")
        return found

    def without_mask(self, ids: "IdList") -> list[str]:
        """Those of the cases that have no mask's file."""
        rows = ids.rows[self._arrays["mask_kind"][ids.rows] == NOTHING]
        return [self.ids[row] for row in rows]

    def several_files(self, ids: "IdList") -> list[Fault]:
        """A fault for each of the cases that has several files of its name, of which none may be preferred."""
        return self._several(ids.rows[self._arrays["several"][ids.rows] > 0])

    def _several(self, rows: Iterable[int]) -> list[Fault]:
        named = self.header["several"]
        ids = [self.ids[row] for row in rows]
        return [Fault("several images", f"{i}: {' and '.join(named.get(i, ['several files']))}", (i,)) for i in ids]

    def same_content(self, lists: Mapping[str, "IdList"]) -> list[tuple[str, ...]]:
        """Images that are in two lists under several names, byte by byte the same; needs digests.

        Args:
            lists: name -> cases.
        Returns:
            Sets of ids, each in two lists or more.
        """
        if "content" not in self._arrays:
            return []
        content = self._arrays["content"]  # 0: no other image has the same bytes
        places: dict[int, list[tuple[str, int]]] = {}
        for name, ids in lists.items():
            codes = content[ids.rows]
            for n in np.flatnonzero(codes):
                places.setdefault(int(codes[n]), []).append((name, int(ids.rows[n])))
        sets = [those for _, those in sorted(places.items()) if len({name for name, _ in those}) > 1]
        return [tuple(self.ids[row] for _, row in those) for those in sets]

    def lists(
        self, contents: Mapping[str, bytes], parse: Callable[[bytes], Sequence[str]]
    ) -> "dict[str, IdList] | None":
        """The cases that list files name; their rows are kept beside the index, for the next time.

        Args:
            contents: name -> content of a list file.
            parse: content -> ids, none where the list is not in order; called where the list is new.
        Returns:
            name -> cases; None: a list is not in order, names a case that is not there, or one twice.
        """
        kept = self.path.with_name(self.path.name + ".lists")
        found: dict[str, IdList] = {}
        new: dict[str, Sequence[str]] = {}
        files: dict[str, Path] = {}
        for name, content in contents.items():
            key = hashlib.sha256(content + self.header["ids_sha256"].encode()).hexdigest()[:32]
            files[name] = kept / f"{key}.npy"
            try:
                found[name] = IdList(self, np.load(files[name], mmap_mode="r"))
            except (OSError, ValueError):  # not there, or cut short
                new[name] = parse(content)
                if not new[name]:
                    return None
        if new:
            starts = np.cumsum([0, *map(len, new.values())])
            every = self.rows([case_id for ids in new.values() for case_id in ids])
            for name, start, stop in zip(new, starts, starts[1:], strict=False):
                rows = np.sort(every[start:stop])
                if rows[0] < 0 or (rows[1:] == rows[:-1]).any():
                    return None
                found[name] = IdList(self, _kept(files[name], rows.astype(np.uint32)))
        return found


class IdList(Sequence[str]):
    """Cases of an index as row numbers: four bytes each. Looks like a sorted tuple of ids.

    Args:
        table: where the ids are.
        rows: uint32 (M,), ascending.
    """

    def __init__(self, table: Index, rows: np.ndarray) -> None:
        self.table, self.rows = table, rows

    def __reduce__(self) -> tuple[Any, ...]:
        # a mapped array would be pickled with all that it maps
        if isinstance(self.rows, np.memmap) and isinstance(self.rows.base, mmap.mmap) and self.rows.filename:
            return _mapped_list, (self.table, str(self.rows.filename))
        return IdList, (self.table, np.asarray(self.rows))

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, place: int) -> str: ...

    @overload
    def __getitem__(self, place: slice) -> "IdList": ...

    def __getitem__(self, place: int | slice) -> "str | IdList":
        if isinstance(place, slice):
            start, stop, step = place.indices(len(self))
            if step < 1:
                raise ValueError("a list of cases is sorted and is not turned round")
            return IdList(self.table, np.array(self.rows[start:stop:step]))
        return self.table.ids[int(self.rows[place])]

    def __iter__(self) -> Iterator[str]:
        ids = self.table.ids
        for start in range(0, len(self), _PIECE):
            rows = self.rows[start : start + _PIECE]
            first, last = int(rows[0]), int(rows[-1])
            if last - first < 4 * len(rows):
                texts = ids[first : last + 1]
                yield from texts if last - first + 1 == len(rows) else (texts[row - first] for row in rows.tolist())
            else:
                yield from (ids[row] for row in rows.tolist())

    def __contains__(self, case_id: object) -> bool:
        row = self.table.ids.find(case_id) if isinstance(case_id, str) else None
        if row is None:
            return False
        place = int(np.searchsorted(self.rows, np.uint32(row)))
        return place < len(self.rows) and int(self.rows[place]) == row

    def __eq__(self, other: object) -> bool:
        if isinstance(other, IdList) and other.table.path == self.table.path:
            return bool(np.array_equal(self.rows, other.rows))
        if isinstance(other, list | tuple | IdList):
            return len(other) == len(self) and all(a == b for a, b in zip(self, other, strict=True))
        return NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"IdList({len(self)} of {self.table!r})"

    def without(self, other: Collection[str]) -> "IdList":
        """The cases that ``other``, of the same index, lacks."""
        mark = self.marks()
        mark[other.rows if isinstance(other, IdList) else self.table.rows(list(other))] = False
        return IdList(self.table, np.flatnonzero(mark).astype(np.uint32))

    def union(self, *others: "IdList") -> "IdList":
        """The cases of any of them, of the same index."""
        mark = self.marks()
        for other in others:
            mark[other.rows] = True
        return IdList(self.table, np.flatnonzero(mark).astype(np.uint32))

    def marks(self) -> np.ndarray:
        """bool (N,): which cases of the index are in this list."""
        mark = np.zeros(len(self.table), bool)
        mark[self.rows] = True
        return mark


class _Files(Mapping[str, Path]):
    def __init__(self, index: Index, what: str) -> None:
        self._index, self._what = index, what

    def __getitem__(self, case_id: str) -> Path:
        if case_id not in self:
            raise KeyError(case_id)
        return self._index.file(case_id) if self._what == "image" else self._index.mask_file(case_id)

    def __contains__(self, case_id: object) -> bool:
        row = self._index.ids.find(case_id) if isinstance(case_id, str) else None
        return row is not None and int(self._index.column(f"{self._what}_kind")[row]) != NOTHING

    def __iter__(self) -> Iterator[str]:
        kinds = self._index.column(f"{self._what}_kind")
        return (case_id for n, case_id in enumerate(self._index.ids) if kinds[n] != NOTHING)

    def __len__(self) -> int:
        return int((self._index.column(f"{self._what}_kind") != NOTHING).sum())


def _kept(path: Path, rows: np.ndarray) -> np.ndarray:
    """The rows, written to a file and mapped from it; as they are where it cannot be written."""
    with suppress(OSError, ValueError):  # costs time again at the next start, nothing else
        path.parent.mkdir(exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=".list-", dir=path.parent)
        with open(handle, "wb") as file:
            np.save(file, rows)
        os.chmod(name, 0o644)  # mkstemp is private, an index may be shared
        os.replace(name, path)
        return np.load(path, mmap_mode="r")
    return rows


def _mapped_list(table: Index, file: str) -> IdList:
    return IdList(table, np.load(file, mmap_mode="r"))


def _places(wanted: Sequence[str], names: Sequence[str]) -> np.ndarray:
    """Place of each wanted name among the names, int64; -1 for those that are not there.

    Sorted hashes take a third of the time and a fifth of the memory of a dictionary of millions of names.
    """
    hashes = np.fromiter(map(hash, names), np.int64, len(names))
    asked = np.fromiter(map(hash, wanted), np.int64, len(wanted))
    order, asking = np.argsort(hashes), np.argsort(asked)
    near = np.minimum(np.searchsorted(hashes[order], asked[asking]), len(names) - 1)
    places = np.empty(len(wanted), np.int64)
    places[asking] = order[near]
    places[hashes[places] != asked] = -1
    there = np.flatnonzero(places >= 0).tolist()
    if all(map(operator.eq, map(wanted.__getitem__, there), map(names.__getitem__, places[there].tolist()))):
        return places
    place_of = dict(zip(names, range(len(names)), strict=True))  # two names have one hash
    return np.fromiter(map(place_of.get, wanted, repeat(-1)), np.int64, len(wanted))


def _spread(count: int, most: int | None) -> list[int]:
    """Up to ``most`` of 0..count-1, evenly spread, the last among them."""
    if most is None or count <= most:
        return list(range(count))
    return np.unique(np.linspace(0, count - 1, most).astype(np.int64)).tolist()


def _open(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    again = "Build it again: knowsam index."
    try:
        with open(path, "rb") as file:
            head = file.read(len(MAGIC) + 8)
            if head[: len(MAGIC)] != MAGIC:
                raise DataError(f"{path} is no index of knowsam", hint=again)
            length = int.from_bytes(head[len(MAGIC) :], "little")
            size = os.fstat(file.fileno()).st_size
            text = file.read(length) if length <= size else b""
            try:
                header = json.loads(text)
                if header["format"] != FORMAT:
                    raise DataError(f"{path} is an index of format {header['format']}, read is {FORMAT}", hint=again)
                if header["bytes"] != size:
                    raise ValueError(f"{size} bytes instead of {header['bytes']}")
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(f"{path} is damaged or cut short ({error})", hint=again) from error
    except FileNotFoundError:
        raise NotFoundError(f"there is no index {path}", hint="Build it: knowsam index FOLDER.") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    whole = np.memmap(path, np.uint8, "r")
    arrays = {}
    for name, (dtype, shape, start) in header["arrays"].items():
        count = int(np.prod(shape)) * np.dtype(dtype).itemsize
        arrays[name] = np.asarray(whole[start : start + count]).view(dtype).reshape(shape)
    return header, arrays
