"""Which case belongs to train, val or test, and whose mask may be read: sorted id lists, checked for leaks."""

import csv
import hashlib
import operator
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from knowsam.data.index import IdList, Index
from knowsam.data.looks import Units
from knowsam.data.nearest import NearestNames
from knowsam.errors import ConfigError, DataError, Fault, NotFoundError

SPLITS = ("train", "val", "test")
GROUPS_FILE = "groups.csv"
"""Beside the lists where names do not tell the patients: ``id,group``, with this header."""
DUPLICATES_FILE = "near_duplicates.csv"
"""Beside the lists where pictures of one list show the same thing: ``id,group``, those pictures only."""
_SHOWN = 100
_NEAREST = 20  # missing names to which the nearest is given


class _Lines(Mapping[str, int]):
    """Id -> line number of a list in order; counted when somebody asks, which nobody does while all is well."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @cached_property
    def _lines(self) -> dict[str, int]:
        return {case_id: line for line, case_id in enumerate(_plain_list(_content(self._path)), start=1)}

    def __getitem__(self, case_id: str) -> int:
        return self._lines[case_id]

    def __iter__(self) -> Iterator[str]:
        return iter(self._lines)

    def __len__(self) -> int:
        return len(self._lines)


@dataclass(frozen=True)
class Splits:
    """The lists of one split folder. Ids are sorted; ``labelled`` lies inside ``train``.

    The lists are tuples; over an index they are ``IdList``, which hold row numbers and look the same.

    Attributes:
        train: every training case, labelled or not; empty for a test-only folder.
        labelled: the training cases whose masks may be read.
        val, test: evaluation cases; empty where the folder has no such list.
        folder: where the lists came from.
        sha256: file name -> hash of the file's bytes, for the run's record.
        lines: file name -> {id: line number}, for messages.
    """

    train: Sequence[str] = ()
    labelled: Sequence[str] = ()
    val: Sequence[str] = ()
    test: Sequence[str] = ()
    folder: Path = Path()
    sha256: dict[str, str] = field(default_factory=dict)
    lines: Mapping[str, Mapping[str, int]] = field(default_factory=dict, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        # What was worked out for membership tests is worked out again elsewhere rather than sent there.
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def unlabelled(self) -> Sequence[str]:
        """Training cases without a readable mask, sorted."""
        readable = self.readable_masks
        if isinstance(self.train, IdList) and isinstance(readable, IdList):
            return self.train.without(readable)
        return tuple(i for i in self.train if i not in readable)

    @cached_property
    def readable_masks(self) -> Collection[str]:
        """Every id whose mask may be read: labelled, val, test."""
        indexed = [ids for ids in (self.labelled, self.val, self.test) if isinstance(ids, IdList)]
        if len(indexed) == 3:
            return indexed[0].union(*indexed[1:])
        return frozenset(self.labelled) | frozenset(self.val) | frozenset(self.test)

    @cached_property
    def train_set(self) -> Collection[str]:
        """``train`` for membership tests."""
        return self.train if isinstance(self.train, IdList) else frozenset(self.train)

    def of(self, split: str) -> list[str]:
        """Ids of ``"val"`` or ``"test"``.

        Raises:
            ValueError: another name.
        """
        if split not in ("val", "test"):
            raise ValueError(f"split {split!r} is not evaluated; allowed are 'val' and 'test'")
        return list(getattr(self, split))

    def require_readable_mask(self, case_id: str) -> None:
        """The label firewall: every reader of masks asks here before it opens a file.

        Raises:
            DataError: an unlabelled training case, or an id that no list holds.
        """
        if case_id in self.readable_masks:
            return
        if case_id in self.train_set:
            raise DataError(
                f"{case_id}: the mask of an unlabelled training case was asked for; it must not influence the run",
                hint="a case is labelled when the chosen labelled_*.txt names it",
            )
        raise DataError(f"{case_id}: in none of the split lists of {self.folder}")

    def place(self, file_name: str, case_id: str) -> str:
        """``folder/train.txt:12``, where an id was declared."""
        line = self.lines.get(file_name, {}).get(case_id)
        return str(self.folder / file_name) + (f":{line}" if line else "")


def load_splits(
    folder: str | Path,
    labelled: str = "labelled_10pct",
    *,
    group_regex: str | None = None,
    index: Index | None = None,
) -> Splits:
    """Read and check ``train.txt``, ``val.txt``, ``test.txt`` and one ``labelled_*.txt`` of a folder.

    A folder with only ``test.txt`` (or ``val.txt``) is a set for evaluation; ``labelled`` then has no meaning. Where
    ``groups.csv`` (header ``id,group``) lies beside the lists, no group of it may be in two splits either.

    Args:
        folder: where the lists lie.
        labelled: name of the label list, with or without ``.txt``; ``"all"`` means the whole train list.
        group_regex: what of an id names its patient, such as ``^(patient\\d+)``: the first group, or the whole match.
            Two splits must not share one. None: every id is its own group.
        index: of the data's files. The lists are then kept as rows of it, and read as such the next time.
    Raises:
        NotFoundError: no folder, no list in it, or no label list of that name (the message lists those there are).
        DataError: all problems at once, each with file and line: bad, repeated or shared ids, shared groups, ids
            without a group, labelled ids that are not in train, empty lists.
        ConfigError: ``group_regex`` or the name ``labelled`` is malformed.
    """
    splits, faults = inspect_splits(folder, labelled, group_regex=group_regex, index=index)
    _raise_all(faults, f"split lists of {folder}")
    return splits


def inspect_splits(
    folder: str | Path,
    labelled: str = "labelled_10pct",
    *,
    group_regex: str | None = None,
    index: Index | None = None,
) -> tuple[Splits, list[Fault]]:
    """As ``load_splits``, but what is wrong with the lists is returned, and the lists as far as they can be used.

    A case that stands in several splits is left to the first of train, val, test; a labelled one that is not in train
    is dropped.

    Args:
        folder, labelled, group_regex, index: as for ``load_splits``.
    Raises:
        NotFoundError, ConfigError: as ``load_splits``.
    """
    folder = Path(folder)
    pattern = None if group_regex is None else _compile(group_regex)
    if not folder.is_dir():
        raise NotFoundError(f"split folder {folder} does not exist")
    files = {split: f"{split}.txt" for split in SPLITS if (folder / f"{split}.txt").is_file()}
    if not files:
        raise NotFoundError(f"{folder} has none of train.txt, val.txt, test.txt", hint="see its README for how to make")
    label_file = _label_file(folder, labelled) if "train" in files else None

    contents = {name: _content(folder / name) for name in [*files.values(), *([label_file] if label_file else [])]}
    if (in_order := _in_order(folder, contents, label_file, pattern, index)) is not None:
        return in_order, []

    # Something is wrong, or written by hand: line by line.
    faults: list[Fault] = []
    lines: dict[str, dict[str, int]] = {}
    for name, content in contents.items():
        entries, bad = _parse(folder / name, content)
        faults += bad
        lines[name] = {}
        for line, case_id in entries:
            first = lines[name].setdefault(case_id, line)
            if first != line:
                text = f"{folder / name}:{line}: {case_id} is already in line {first}"
                faults.append(Fault("bad list", text, (case_id,)))
        if not entries and not bad:
            faults.append(Fault("bad list", f"{folder / name}:1: the list is empty; remove the file or fill it"))

    listed = {split: lines[name] for split, name in files.items()}
    faults += _shared_ids(folder, listed)
    if pattern:
        faults += _shared_groups(folder, listed, lambda i: _match(pattern, i), f"by {pattern.pattern!r}")
    if (folder / GROUPS_FILE).is_file():
        groups = read_groups(folder / GROUPS_FILE)
        faults += _shared_groups(folder, listed, groups.get, f"in {GROUPS_FILE}")
    if label_file:
        for case_id, line in lines[label_file].items():
            if case_id not in listed["train"]:
                text = f"{folder / label_file}:{line}: {case_id} is not in train.txt"
                faults.append(Fault("bad list", text, (case_id,)))
    elif (unused := sorted(f.name for f in folder.glob("labelled_*.txt"))) and "train" not in files:
        faults.append(Fault("bad list", f"{folder / unused[0]}:1: there is a label list but no train.txt"))

    train = tuple(sorted(listed.get("train", ())))
    val = tuple(sorted(set(listed.get("val", ())).difference(train)))
    splits = Splits(
        train=train,
        labelled=tuple(sorted(set(lines[label_file]).intersection(train))) if label_file else train,
        val=val,
        test=tuple(sorted(set(listed.get("test", ())).difference(train, val))),
        folder=folder,
        sha256=_hashes(contents),
        lines=lines,
    )
    return splits, faults


def _hashes(contents: Mapping[str, bytes]) -> dict[str, str]:
    return {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}


def _in_order(
    folder: Path,
    contents: Mapping[str, bytes],
    label_file: str | None,
    pattern: re.Pattern[str] | None,
    index: Index | None,
) -> Splits | None:
    """The lists as a whole, without a look at each line; None where anything about them needs one."""
    if "train.txt" not in contents and next(folder.glob("labelled_*.txt"), None) is not None:
        return None
    found: Mapping[str, Sequence[str]] | None
    if index is not None:
        found = index.lists(contents, _plain_list)
    else:
        found = {name: ids for name, content in contents.items() if (ids := _sorted_list(content))}
    if found is None or len(found) < len(contents):
        return None
    lists = [found[f"{split}.txt"] for split in SPLITS if f"{split}.txt" in found]
    train = found.get("train.txt", ())
    labelled = found[label_file] if label_file else train
    if not _disjoint(lists) or (label_file and not _inside(labelled, train)):
        return None
    table = folder / GROUPS_FILE
    if pattern and not _groups_disjoint(lists, regex_rule(pattern.pattern), lambda: partial(_match, pattern), index):
        return None
    if table.is_file() and not _groups_disjoint(lists, table_rule(table), lambda: read_groups(table).get, index):
        return None
    none: Sequence[str] = IdList(index, np.zeros(0, np.uint32)) if index is not None else ()
    return Splits(
        train=train or none,
        labelled=labelled or none,
        val=found.get("val.txt", none),
        test=found.get("test.txt", none),
        folder=folder,
        sha256=_hashes(contents),
        lines={name: _Lines(folder / name) for name in contents},
    )


# What a list of plain ids, one a line, does not hold. Ids with some of it may be right: they are looked at one by one.
_UNUSUAL = (
    *(b"\\", b"..", b"//", b"/.", b":", b"\n\n", b"\n/", b"\n.", b"\n ", b" \n", b"\n#", b"/\n", b"\x7f"),
    b"\xef\xbb\xbf",
)


def _plain_list(content: bytes) -> list[str]:
    """Ids of a list that holds nothing else, in its order; empty where each line must be looked at."""
    if not content.endswith(b"\n") or content[:1] in (b"\n", b" ", b"#", b"/", b"."):
        return []
    values = np.frombuffer(content, np.uint8)
    for start in range(0, len(values), 1 << 24):
        piece = values[start : start + (1 << 24)]
        if np.count_nonzero(piece < 32) != np.count_nonzero(piece == ord("\n")):
            return []
    if any(unusual in content for unusual in _UNUSUAL):
        return []
    try:
        return content[:-1].decode().split("\n")
    except UnicodeDecodeError:
        return []


def _sorted_list(content: bytes) -> tuple[str, ...]:
    """Sorted ids of a list in order; none where it is not, or names one twice."""
    ids = _plain_list(content)
    if not all(map(operator.lt, ids, islice(ids, 1, None))):
        ids.sort()
        if not all(map(operator.lt, ids, islice(ids, 1, None))):
            return ()
    return tuple(ids)


def _disjoint(lists: Sequence[Sequence[str]]) -> bool:
    """Whether no case is in two of the lists."""
    indexed = [ids for ids in lists if isinstance(ids, IdList)]
    if len(indexed) == len(lists):
        return len(indexed[0].union(*indexed[1:])) == sum(map(len, indexed))
    largest = max(lists, key=len)
    seen: set[str] = set()
    for ids in lists:
        if ids is not largest:
            if not seen.isdisjoint(ids):
                return False
            seen.update(ids)
    return seen.isdisjoint(largest)


def _inside(small: Sequence[str], large: Sequence[str]) -> bool:
    if isinstance(small, IdList) and isinstance(large, IdList):
        return bool(large.marks()[small.rows].all())
    return not set(small).difference(large)


def regex_rule(group_regex: str) -> str:
    """How an index says that its groups are what this expression finds."""
    return f"regex {group_regex}"


def table_rule(path: Path) -> str:
    """How an index says that its groups are those of this table, as it is now."""
    return f"table {hashlib.sha256(path.read_bytes()).hexdigest()}"


def _groups_disjoint(
    lists: Sequence[Sequence[str]], rule: str, finder: Callable[[], Callable[[str], str | None]], index: Index | None
) -> bool:
    """Whether every case has a group, and no group is in two lists."""
    indexed = [ids for ids in lists if isinstance(ids, IdList)]
    if index is not None and len(indexed) == len(lists) and index.header.get("group_rule") == rule:
        owner = np.zeros(len(index.groups) + 1, np.uint8)
        for number, ids in enumerate(indexed, start=1):
            codes = index.column("group")[ids.rows]
            if not codes.all() or ((owner[codes] != 0) & (owner[codes] != number)).any():
                return False
            owner[codes] = number
        return True
    find = finder()
    seen: set[str | None] = {None}
    for those in lists:
        groups = set(map(find, those))
        if not seen.isdisjoint(groups):
            return False
        seen |= groups
    return True


def read_groups(path: str | Path, id_column: str = "id", group_column: str = "group") -> dict[str, str]:
    """Group of each id from a CSV file with a header; rows without a group are left out.

    Args:
        path: the CSV file, UTF-8.
        id_column, group_column: names of its columns.
    Raises:
        NotFoundError: no such file.
        DataError: not UTF-8, no such column, or an id with two groups.
    """
    path = Path(path)
    groups: dict[str, str] = {}
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            columns = rows.fieldnames or []
            for column in (id_column, group_column):
                if column not in columns:
                    raise DataError(f"{path}: there is no column {column!r}; the columns are {', '.join(columns)}")
            for row in rows:
                case_id, group = (row[id_column] or "").strip(), (row[group_column] or "").strip()
                if case_id and group and groups.setdefault(case_id, group) != group:
                    raise DataError(f"{path}:{rows.line_num}: {case_id} has the groups {groups[case_id]} and {group}")
    except FileNotFoundError:
        raise NotFoundError(f"{path} does not exist") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: not a CSV file in UTF-8 ({error})") from error
    return groups


def group_of(case_id: str, group_regex: str) -> str | None:
    """What ``group_regex`` finds in an id: its first group, or the whole match; None if nothing.

    Args:
        case_id: of one case.
        group_regex: a regular expression.
    Raises:
        ConfigError: no regular expression.
    """
    return group_finder(group_regex)(case_id)


def group_finder(group_regex: str) -> Callable[[str], str | None]:
    """``group_of`` for many ids.

    Args:
        group_regex: a regular expression.
    Raises:
        ConfigError: no regular expression.
    """
    return partial(_match, _compile(group_regex))


def independent_units(folder: str | Path, ids: Iterable[str], *, group_regex: str | None = None) -> dict[str, str]:
    """What each case is an observation of: its patient, together with all that show nearly the same picture.

    Scores of cases of one unit are not independent; a mean over units, each the mean of its cases, counts it once.

    Args:
        folder: of the lists; its ``groups.csv`` and ``near_duplicates.csv`` are read where they are.
        ids: the cases.
        group_regex: the part of an id that is the patient; None: only the tables tell.
    Returns:
        id -> name of its unit: the first of its cases.
    Raises:
        DataError, ConfigError: a table or an expression that cannot be used.
    """
    folder = Path(folder)
    ids = sorted(ids)
    find = group_finder(group_regex) if group_regex is not None else lambda case_id: None
    patients = read_groups(folder / GROUPS_FILE) if (folder / GROUPS_FILE).is_file() else {}
    alike = read_groups(folder / DUPLICATES_FILE) if (folder / DUPLICATES_FILE).is_file() else {}
    units, first_of = Units(ids), dict[tuple[str, str], str]()
    for case_id in ids:
        for kind, group in (("name", find(case_id)), ("patient", patients.get(case_id)), ("look", alike.get(case_id))):
            if group is not None:
                units.tie(first_of.setdefault((kind, group), case_id), case_id)
    return {case_id: unit[0] for unit in units.sets() for case_id in unit}


def check_against(
    splits: Splits, available_ids: Collection[str], *, checked: tuple[str, ...] = SPLITS, where: str = "the data folder"
) -> None:
    """Refuse lists that name cases which are not there. Files that no list names are fine.

    Args:
        available_ids: ids found in ``where``; an index, or anything else that can be asked for its ids.
        checked: which of train, val, test should be found there.
    Raises:
        DataError: every missing id with file and line, the first 20 with the nearest existing name.
    """
    missing = _absent(splits, available_ids, checked)
    if not missing:
        return
    names = NearestNames(available_ids if isinstance(available_ids, Index) else list(available_ids))
    helped = names.affordable(min(_NEAREST, len(missing)))
    faults = []
    for number, (split, case_id) in enumerate(missing):
        text = f"{splits.place(f'{split}.txt', case_id)}: {case_id!r} is not in {where}"
        if number < helped and (near := names.of(case_id)):
            text += f"; nearest is {near!r}"
        faults.append(Fault("missing image", text, (case_id,)))
    _raise_all(faults, f"{len(missing)} of {sum(len(getattr(splits, s)) for s in checked)} listed cases in {where}")


def _absent(splits: Splits, available_ids: Collection[str], checked: tuple[str, ...]) -> list[tuple[str, str]]:
    """(split, id) of the cases that are not there."""
    if isinstance(available_ids, Index):
        rows = {split: available_ids.rows(getattr(splits, split)) for split in checked}
        return [(s, getattr(splits, s)[int(n)]) for s in checked for n in np.flatnonzero(rows[s] < 0)]
    available = available_ids if isinstance(available_ids, Mapping) else frozenset(available_ids)
    return [(s, i) for s in checked for i in getattr(splits, s) if i not in available]


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise NotFoundError(f"split list {path} does not exist") from None


def _parse(path: Path, content: bytes) -> tuple[list[tuple[int, str]], list[Fault]]:
    """Entries, and faults as ``file:line: text``."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        return [], [Fault("bad list", f"{path}:{line}: not UTF-8 text; save the list as UTF-8")]
    entries, faults = [], []
    # not splitlines(): it also breaks at characters that file names may hold, such as U+2028
    for number, raw in enumerate(re.split("\r\n|\n|\r", text), start=1):
        case_id = raw.strip(" \t")
        if not case_id or case_id.startswith("#"):
            continue
        fault = _id_fault(case_id)
        if fault:
            faults.append(Fault("bad list", f"{path}:{number}: {case_id!r} {fault}"))
        else:
            entries.append((number, case_id))
    return entries, faults


def unlistable(case_id: str) -> str | None:
    """Why a list cannot hold this id, or None."""
    if case_id != case_id.strip(" \t"):
        return "begins or ends with a blank, which lists do not keep"
    if case_id.startswith("#"):
        return "begins with #, which marks a comment in lists"
    return _id_fault(case_id)


def _id_fault(case_id: str) -> str | None:
    if any(ord(c) < 32 or ord(c) == 127 for c in case_id):
        return "holds a NUL or another control character"
    parts = re.split(r"[/\\]", case_id)  # lists written on Windows escape with backslashes
    if case_id[0] in "/\\" or re.match(r"[A-Za-z]:[/\\]", case_id):
        return "is an absolute path; ids are relative to the data folder"
    if ".." in parts:
        return "leaves the data folder (..)"
    if "." in parts or "" in parts:
        return "is not a plain path; write it without '.', '//' or a slash at the end"
    return None


def _label_file(folder: Path, labelled: str) -> str | None:
    """File name of the label list; None for ``"all"``."""
    name = labelled.removesuffix(".txt")
    if name == "all":
        return None
    if not name or Path(name).name != name or "\0" in name or "\\" in name:
        raise ConfigError(f"labelled is {labelled!r}; needed is the plain name of a list in {folder}, or 'all'")
    if not (folder / f"{name}.txt").is_file():
        there = sorted(f.stem for f in folder.glob("labelled_*.txt"))
        raise NotFoundError(f"{folder} has no label list {name!r}; there are {', '.join([*there, 'all'])}")
    return f"{name}.txt"


def _compile(group_regex: str) -> re.Pattern[str]:
    try:
        return re.compile(group_regex)
    except re.error as error:
        raise ConfigError(f"group_regex {group_regex!r} is no regular expression: {error}") from error


def _match(pattern: re.Pattern[str], case_id: str) -> str | None:
    match = pattern.search(case_id)
    if not match:
        return None
    group: str | None = match.group(1) if pattern.groups else match.group(0)
    return group


def _shared_ids(folder: Path, listed: dict[str, dict[str, int]]) -> list[Fault]:
    faults: list[Fault] = []
    owner: dict[str, str] = {}
    for split, ids in listed.items():
        for case_id, line in ids.items():
            if case_id in owner:
                other = owner[case_id]
                text = f"{folder / split}.txt:{line}: {case_id} is also in {other}.txt:{listed[other][case_id]}"
                faults.append(Fault("shared case", text, (case_id,)))
            else:
                owner[case_id] = split
    return faults


def _shared_groups(
    folder: Path, listed: dict[str, dict[str, int]], find: Callable[[str], str | None], by: str
) -> list[Fault]:
    """One fault per group and pair of splits: a whole patient in two splits would repeat itself for every slice."""
    faults: list[Fault] = []
    owner: dict[str, tuple[str, str]] = {}
    reported: set[tuple[str, str]] = set()
    for split, ids in listed.items():
        for case_id, line in ids.items():
            group = find(case_id)
            if group is None:
                text = f"{folder / split}.txt:{line}: {case_id} has no group {by}"
                faults.append(Fault("no group", text, (case_id,)))
                continue
            other, other_id = owner.setdefault(group, (split, case_id))
            if other != split and case_id != other_id and (group, split) not in reported:
                reported.add((group, split))
                text = (
                    f"{folder / split}.txt:{line}: group {group} ({case_id}) is also in "
                    f"{other}.txt:{listed[other][other_id]} ({other_id})"
                )
                faults.append(Fault("shared group", text, (case_id, other_id)))
    return faults


def _raise_all(faults: list[Fault], what: str) -> None:
    if not faults:
        return
    more = f"\n... and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
    count = f"{len(faults)} problem{'s' if len(faults) > 1 else ''}"
    shown = "\n".join(fault.text for fault in faults[:_SHOWN])
    raise DataError(f"{what}: {count}\n{shown}{more}", faults=faults)
