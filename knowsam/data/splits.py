"""Which case belongs to train, val or test, and whose mask may be read: sorted id lists, checked for leaks."""

import csv
import difflib
import hashlib
import re
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from knowsam.errors import ConfigError, DataError, Fault, NotFoundError

SPLITS = ("train", "val", "test")
GROUPS_FILE = "groups.csv"
"""Beside the lists where names do not tell the patients: ``id,group``, with this header."""
_SHOWN = 100


@dataclass(frozen=True)
class Splits:
    """The lists of one split folder. Ids are sorted; ``labelled`` lies inside ``train``.

    Attributes:
        train: every training case, labelled or not; empty for a test-only folder.
        labelled: the training cases whose masks may be read.
        val, test: evaluation cases; empty where the folder has no such list.
        folder: where the lists came from.
        sha256: file name -> hash of the file's bytes, for the run's record.
        lines: file name -> {id: line number}, for messages.
    """

    train: tuple[str, ...] = ()
    labelled: tuple[str, ...] = ()
    val: tuple[str, ...] = ()
    test: tuple[str, ...] = ()
    folder: Path = Path()
    sha256: dict[str, str] = field(default_factory=dict)
    lines: dict[str, dict[str, int]] = field(default_factory=dict, repr=False)

    @property
    def unlabelled(self) -> tuple[str, ...]:
        """Training cases without a readable mask, sorted."""
        return tuple(i for i in self.train if i not in self.readable_masks)

    @cached_property
    def readable_masks(self) -> frozenset[str]:
        """Every id whose mask may be read: labelled, val, test."""
        return frozenset(self.labelled) | frozenset(self.val) | frozenset(self.test)

    @cached_property
    def train_set(self) -> frozenset[str]:
        """``train`` for membership tests."""
        return frozenset(self.train)

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


def load_splits(folder: str | Path, labelled: str = "labelled_10pct", *, group_regex: str | None = None) -> Splits:
    """Read and check ``train.txt``, ``val.txt``, ``test.txt`` and one ``labelled_*.txt`` of a folder.

    A folder with only ``test.txt`` (or ``val.txt``) is a set for evaluation; ``labelled`` then has no meaning. Where
    ``groups.csv`` (header ``id,group``) lies beside the lists, no group of it may be in two splits either.

    Args:
        folder: where the lists lie.
        labelled: name of the label list, with or without ``.txt``; ``"all"`` means the whole train list.
        group_regex: what of an id names its patient, such as ``^(patient\\d+)``: the first group, or the whole match.
            Two splits must not share one. None: every id is its own group.
    Raises:
        NotFoundError: no folder, no list in it, or no label list of that name (the message lists those there are).
        DataError: all problems at once, each with file and line: bad, repeated or shared ids, shared groups, ids
            without a group, labelled ids that are not in train, empty lists.
        ConfigError: ``group_regex`` or the name ``labelled`` is malformed.
    """
    splits, faults = inspect_splits(folder, labelled, group_regex=group_regex)
    _raise_all(faults, f"split lists of {folder}")
    return splits


def inspect_splits(
    folder: str | Path, labelled: str = "labelled_10pct", *, group_regex: str | None = None
) -> tuple[Splits, list[Fault]]:
    """As ``load_splits``, but what is wrong with the lists is returned, and the lists as far as they can be used.

    A case that stands in several splits is left to the first of train, val, test; a labelled one that is not in train
    is dropped.

    Args:
        folder, labelled, group_regex: as for ``load_splits``.
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

    faults: list[Fault] = []
    lines: dict[str, dict[str, int]] = {}
    for name in [*files.values(), *([label_file] if label_file else [])]:
        entries, bad = _parse(folder / name)
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
        sha256={name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in lines},
        lines=lines,
    )
    return splits, faults


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
    return _match(_compile(group_regex), case_id)


def check_against(
    splits: Splits, available_ids: Iterable[str], *, checked: tuple[str, ...] = SPLITS, where: str = "the data folder"
) -> None:
    """Refuse lists that name cases which are not there. Files that no list names are fine.

    Args:
        available_ids: ids found in ``where``.
        checked: which of train, val, test should be found there.
    Raises:
        DataError: every missing id with file and line, the first 20 with the nearest existing name.
    """
    available = set(available_ids)
    missing = [(s, i) for s in checked for i in getattr(splits, s) if i not in available]
    if not missing:
        return
    loose = {_loosely(i): i for i in available}
    ordered = sorted(available)
    faults = []
    for number, (split, case_id) in enumerate(missing):
        text = f"{splits.place(f'{split}.txt', case_id)}: {case_id!r} is not in {where}"
        if number < 20:
            near = loose.get(_loosely(case_id)) or next(iter(difflib.get_close_matches(case_id, ordered, n=1)), None)
            text += f"; nearest is {near!r}" if near else ""
        faults.append(Fault("missing image", text, (case_id,)))
    _raise_all(faults, f"{len(missing)} of {sum(len(getattr(splits, s)) for s in checked)} listed cases in {where}")


def _parse(path: Path) -> tuple[list[tuple[int, str]], list[Fault]]:
    """Entries, and faults as ``file:line: text``."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise NotFoundError(f"split list {path} does not exist") from None
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


def _loosely(case_id: str) -> str:
    """Equal for names that differ by case, Unicode form or extension only."""
    plain = unicodedata.normalize("NFC", case_id).casefold()
    return re.sub(r"\.(png|jpe?g|bmp|tiff?|h5)$", "", plain)


def _raise_all(faults: list[Fault], what: str) -> None:
    if not faults:
        return
    more = f"\n... and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
    count = f"{len(faults)} problem{'s' if len(faults) > 1 else ''}"
    shown = "\n".join(fault.text for fault in faults[:_SHOWN])
    raise DataError(f"{what}: {count}\n{shown}{more}", faults=faults)
