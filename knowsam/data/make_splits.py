"""Drawing split lists: seeded, by patient, near duplicates on one side, label lists inside each other."""

import csv
import hashlib
import io
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from knowsam.data.looks import Look, Units, near_pairs, same_pixels
from knowsam.data.splits import GROUPS_FILE
from knowsam.errors import ConfigError, DataError, ExistsError
from knowsam.files import storage_error, write_text

ALL_MASKS = "labelled_max"
LEFT_OUT_FILE, SUMMARY_FILE = "left_out.txt", "summary.md"
_LISTS = ("train.txt", "val.txt", "test.txt", "labelled_*.txt")


class Amount(NamedTuple):
    """How many training cases get a label: ``5`` (per cent), ``8cases`` or ``3groups``."""

    number: float
    unit: str

    @classmethod
    def parse(cls, text: str) -> "Amount":
        """Raises ConfigError for another form, or a number that is not above 0 (per cent: at most 100)."""
        match = re.fullmatch(r"(\d+(?:\.\d+)?)(%|pct|cases?|groups?)?", text)
        unit = {"c": "cases", "g": "groups"}.get(((match and match.group(2)) or "%")[0], "pct")
        number = float(match.group(1)) if match else 0.0
        if number <= 0 or (number > 100 if unit == "pct" else number != int(number)):
            raise ConfigError(f"labelled amount {text!r}; allowed are per cent such as 5, or 8cases, or 3groups")
        return cls(number, unit)

    @property
    def list_name(self) -> str:
        """``labelled_5pct`` and so on."""
        return f"labelled_{self.number:g}{self.unit}"


@dataclass
class Drawn:
    """Lists of ids, and what the drawing had to decide.

    Attributes:
        lists: ``train``, ``val``, ``test``, ``labelled_...`` -> sorted ids; empty ones are absent.
        left_out: ids without a mask whose group or near duplicate went to val or test.
        warnings: what the user should know.
    """

    lists: dict[str, list[str]]
    left_out: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def tie_units(
    looks: Mapping[str, Look], group_of: Mapping[str, str] | None = None, *, near: bool = True
) -> tuple[list[list[str]], list[list[str]], list[tuple[str, str, float]]]:
    """Cases that must stay on one side of a split.

    Args:
        looks: id -> look.
        group_of: id -> patient; None: every case is its own.
        near: also tie near duplicates.
    Returns:
        units, sorted lists of ids; sets of ids with equal pixels; near duplicates (id, id, correlation).
    """
    ids = sorted(looks)
    units = Units(ids)
    first_of: dict[str, str] = {}
    for case_id in ids:
        if group_of is not None:
            units.tie(case_id, first_of.setdefault(group_of[case_id], case_id))
    ordered = [looks[i] for i in ids]
    same = [[ids[n] for n in found] for found in same_pixels(ordered)]
    pairs = [(ids[i], ids[j], c) for i, j, c in near_pairs(ordered)] if near else []
    for found in same:
        for other in found[1:]:
            units.tie(found[0], other)
    for one, other, _ in pairs:
        units.tie(one, other)
    return units.sets(), same, pairs


def draw(
    units: Sequence[Sequence[str]],
    masked: Collection[str],
    *,
    val: float = 10.0,
    test: float = 20.0,
    labelled: Sequence[Amount] = (),
    seed: int = 0,
    skip_impossible: bool = False,
) -> Drawn:
    """Draw test, then val, then the label lists; what remains is train.

    Each choice has its own order of the units, made by hashing the seed and the unit's first id: another percentage,
    one more list or a new image move as few cases as possible, and neither the order of the folder nor the version
    of Python matters.

    Args:
        units: cases that stay together, each sorted.
        masked: ids whose masks can be used; all others are unlabelled training cases.
        val, test: per cent of the masked cases; 0: no such list.
        labelled: sizes of the label lists; per cent of the training cases. A list lies inside every larger one, and
            holds whole units, so its size may differ a little. ``labelled_max`` (all that have masks) is always made.
        seed: of all orders.
        skip_impossible: leave out label lists for which there are not enough masks, rather than refuse.
    Raises:
        ConfigError: percentages that leave nothing to train on.
        DataError: too few masked units for what was asked.
    """
    if val < 0 or test < 0 or val + test >= 100:
        raise ConfigError(f"val is {val:g} % and test {test:g} %; both must be at least 0 and leave some for training")
    masked = frozenset(masked)

    def size(unit: Sequence[str]) -> int:
        return sum(i in masked for i in unit)

    total = sum(map(size, units))
    rest = [unit for unit in units if size(unit)]
    needed = 1 + (val > 0) + (test > 0)
    if len(rest) < needed:
        raise DataError(
            f"{total} images have a mask that can be used, in {len(rest)} sets that must stay together (patients, near "
            f"duplicates); needed are {needed}: one each for train{', val' if val else ''}{', test' if test else ''}",
            hint="Have more images labelled, or make do without a test list with --test 0.",
        )
    drawn = Drawn({})
    for name, percent, still in (("test", test, 1 + (val > 0)), ("val", val, 1)):
        if percent:
            target = max(1, round(total * percent / 100))
            chosen, rest = _take(_shuffled(rest, f"{seed}:{name}"), size, target, leave=still)
            drawn.lists[name] = sorted(i for unit in chosen for i in unit if i in masked)
            drawn.left_out += [i for unit in chosen for i in unit if i not in masked]
            count = len(drawn.lists[name])
            if abs(count - target) > max(1, 0.25 * target):
                drawn.warnings.append(f"{name} has {count} cases instead of {target}: groups are not divided")
    gone = {*drawn.left_out, *drawn.lists.get("val", ()), *drawn.lists.get("test", ())}
    train = sorted(i for unit in units for i in unit if i not in gone)
    drawn.left_out.sort()
    _label(drawn, _shuffled(rest, f"{seed}:labelled"), masked, labelled, len(train), skip_impossible)
    order = ["train", "val", "test"]
    drawn.lists["train"] = train
    drawn.lists = {name: drawn.lists[name] for name in [*order, *drawn.lists] if name in drawn.lists}
    return drawn


def _label(
    drawn: Drawn,
    order: list[Sequence[str]],
    masked: frozenset[str],
    amounts: Sequence[Amount],
    train: int,
    skip: bool,
) -> None:
    """Add the label lists: prefixes of one order."""
    ids = [[i for i in unit if i in masked] for unit in order]
    ends = [0]
    for unit in ids:
        ends.append(ends[-1] + len(unit))
    for amount in sorted(amounts, key=lambda a: (a.unit, a.number)):
        target = max(1, round(train * amount.number / 100)) if amount.unit == "pct" else int(amount.number)
        most, what = (len(ids), "groups") if amount.unit == "groups" else (ends[-1], "cases")
        if target > most and skip:
            continue
        if target > most:
            raise DataError(
                f"{amount.list_name} needs {target} {what}, but of {train} training cases only {ends[-1]} "
                f"(in {len(ids)} groups) have a mask that can be used",
                hint=f"Ask for at most {100 * ends[-1] / train:.3g} per cent, or use {ALL_MASKS}.",
            )
        if amount.unit == "groups":
            units = target
        else:
            units = min(range(1, len(ends)), key=lambda n: (abs(ends[n] - target), n))
        drawn.lists[amount.list_name] = sorted(i for unit in ids[:units] for i in unit)
        if amount.unit != "groups" and abs(ends[units] - target) > max(1, 0.25 * target):
            drawn.warnings.append(
                f"{amount.list_name} has {ends[units]} cases instead of {target}: groups are not divided"
            )
    drawn.lists[ALL_MASKS] = sorted(i for unit in ids for i in unit)


def _take(
    order: list[Sequence[str]], size: Callable[[Sequence[str]], int], target: int, *, leave: int
) -> tuple[list[Sequence[str]], list[Sequence[str]]]:
    """Units from the front whose sizes sum to about ``target``; one that would overshoot by more than it helps is
    passed over. At least one is taken, at least ``leave`` are left.
    """
    taken: list[Sequence[str]] = []
    rest: list[Sequence[str]] = []
    count = 0
    for n, unit in enumerate(order):
        fits = size(unit) < 2 * (target - count)
        if fits and len(rest) + len(order) - n - 1 >= leave:
            taken.append(unit)
            count += size(unit)
        else:
            rest.append(unit)
    if not taken:
        smallest = min(rest, key=size)
        rest.remove(smallest)
        taken.append(smallest)
    return taken, rest


def _shuffled(units: Sequence[Sequence[str]], salt: str) -> list[Sequence[str]]:
    return sorted(units, key=lambda unit: hashlib.sha256(f"{salt}:{unit[0]}".encode()).hexdigest())


def list_files(drawn: Drawn, groups: Mapping[str, str] | None = None) -> dict[str, str]:
    """File name -> text of every list.

    Args:
        groups: id -> patient, where names do not say it; written as ``groups.csv``, which the checks read.
    """
    files = {f"{name}.txt": "".join(f"{i}\n" for i in ids) for name, ids in drawn.lists.items()}
    if drawn.left_out:
        head = "# no mask, and a case of the same group or a near duplicate is in val or test\n"
        files[LEFT_OUT_FILE] = head + "".join(f"{i}\n" for i in drawn.left_out)
    if groups is not None:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([("id", "group"), *sorted(groups.items())])
        files[GROUPS_FILE] = text.getvalue()
    return files


def lists_hash(files: Mapping[str, str]) -> str:
    """sha256 over names and contents of the lists, for a paper or a colleague."""
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(f"{name}\n{files[name]}".encode())
    return digest.hexdigest()


def write_lists(folder: str | Path, files: Mapping[str, str], summary: str, *, force: bool = False) -> bool:
    """Write the lists and ``summary.md``. Lists that are there already are replaced only by ``force``.

    Args:
        folder: for the lists; made if it is not there.
        files: name -> text, from ``list_files``.
        summary: text of ``summary.md``.
        force: replace other lists.
    Returns:
        False if exactly these lists were there already; then nothing is written.
    Raises:
        ExistsError: other lists are there and ``force`` is not given.
        StorageError: the folder cannot be written.
    """
    folder = Path(folder)
    names = (*_LISTS, GROUPS_FILE, LEFT_OUT_FILE)
    there = {path.name: path for name in names for path in sorted(folder.glob(name))}
    if there and {n: p.read_bytes() for n, p in there.items()} == {n: t.encode() for n, t in files.items()}:
        return False
    if there and not force:
        raise ExistsError(
            f"{folder} holds other lists already: {', '.join(sorted(there))}",
            hint="Runs made with them could not be repeated. Choose another folder, or replace them with --force.",
        )
    make_folder(folder)
    for name in sorted(set(there) - set(files)):  # a label list of another drawing would not lie inside these
        there[name].unlink()
    for name, text in files.items():
        write_text(folder / name, text)
    write_text(folder / SUMMARY_FILE, summary)
    return True


def make_folder(folder: Path) -> None:
    """Make a folder with its parents.

    Raises:
        StorageError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(folder, error) from error
