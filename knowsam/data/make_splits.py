"""Drawing split lists: seeded, by patient, near duplicates on one side, label lists inside each other."""

import csv
import hashlib
import io
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from knowsam.data.looks import Look, Units, near_pairs, same_pixels
from knowsam.data.splits import DUPLICATES_FILE, GROUPS_FILE
from knowsam.errors import ConfigError, DataError, ExistsError
from knowsam.files import storage_error, write_text

ALL_MASKS = "labelled_max"
LEFT_OUT_FILE, SUMMARY_FILE, DRAWS_FILE = "left_out.txt", "summary.md", "summary_draws.md"
_AREAS = 3  # small, middle, large foreground
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


class Trait(NamedTuple):
    """What a mask shows, as far as draws are balanced by it.

    Attributes:
        classes: ids of the classes in it, background not among them.
        area: share of the pixels that are no background, 0..1.
    """

    classes: frozenset[int]
    area: float


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


def tie_groups(ids: Iterable[str], group_of: Mapping[str, str] | None = None) -> Units:
    """Cases that must stay on one side of a split for the sake of their patients; more can be tied.

    Args:
        ids: of all cases.
        group_of: id -> patient; None: every case is its own.
    """
    ids = sorted(ids)
    units = Units(ids)
    first_of: dict[str, str] = {}
    for case_id in ids:
        if group_of is not None:
            units.tie(case_id, first_of.setdefault(group_of[case_id], case_id))
    return units


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
    units = tie_groups(ids, group_of)
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


def draw_labels(
    units: Sequence[Sequence[str]],
    masked: Collection[str],
    *,
    train: int,
    labelled: Sequence[Amount],
    label_seeds: Iterable[int],
    traits: Mapping[str, Trait] | None = None,
) -> Drawn:
    """Draw the label lists again, for each seed anew, over training cases that stay what they are.

    A draw of a seed depends on nothing but the seed and the units: more seeds, or other sizes, leave it as it is.

    Args:
        units: training cases that stay together, each sorted.
        masked: ids whose masks can be used.
        train: training cases in all, of which sizes in per cent are taken.
        labelled: sizes; within one draw each list lies inside every larger one.
        label_seeds: of the draws.
        traits: id -> what its mask shows; every list then holds classes and sizes of foreground in about the
            proportions of the training cases. None: not stratified.
    Returns:
        lists ``labelled_10pct_draw3`` and so on.
    Raises:
        DataError: too few masked units for what was asked.
    """
    masked = frozenset(masked)
    units = [unit for unit in units if any(i in masked for i in unit)]
    stratum_of = _strata(units, masked, traits)
    drawn = Drawn({})
    for seed in label_seeds:
        once = Drawn({})
        _label(once, _spread_out(units, stratum_of, f"{seed}:labelled:draw"), masked, labelled, train, False)
        del once.lists[ALL_MASKS]
        drawn.lists |= {f"{name}_draw{seed}": ids for name, ids in once.lists.items()}
        drawn.warnings += [f"draw {seed}: {warning}" for warning in once.warnings]
    return drawn


def draw_folds(
    units: Sequence[Sequence[str]],
    masked: Collection[str],
    folds: int,
    *,
    val: float = 10.0,
    labelled: Sequence[Amount] = (),
    seed: int = 0,
    traits: Mapping[str, Trait] | None = None,
    test: Sequence[str] | None = None,
    skip_impossible: bool = False,
) -> list[Drawn]:
    """Divide the cases into folds; each fold is the test list of one drawing, and the others are its rest.

    Args:
        units: cases that stay together, each sorted; without those of a fixed test list.
        masked: ids whose masks can be used; all others are unlabelled training cases of every fold but those that
            hold out a case of their unit.
        folds: how many, at least 2.
        val: per cent of the masked cases, drawn from the rest of each fold.
        labelled, seed, skip_impossible: as for ``draw``.
        traits: id -> what its mask shows; folds then hold classes and sizes of foreground in like numbers.
        test: the test list of every fold; a fold is then the val list, and ``val`` has no meaning.
    Returns:
        The lists of each fold.
    Raises:
        ConfigError: fewer than 2 folds, or a percentage that leaves nothing to train on.
        DataError: fewer units than folds.
    """
    masked = frozenset(masked)
    held = [unit for unit in units if any(i in masked for i in unit)]
    if folds < 2:
        raise ConfigError(f"folds is {folds}; needed are 2 or more")
    if val < 0 or val + 100 / folds >= 100:
        raise ConfigError(f"val is {val:g} % and a fold {100 / folds:g} %; together they must leave some for training")
    if len(held) < folds + (test is None and val > 0):
        raise DataError(
            f"{folds} folds of {len(held)} sets of cases with a mask; a set (patient, near duplicates) is not divided",
            hint="Ask for fewer folds, or have more patients labelled.",
        )
    drawings = []
    for number, fold in enumerate(_balanced(held, masked, folds, traits, f"{seed}:folds")):
        drawn = Drawn({})
        inside = {unit[0] for unit in fold}
        rest = [unit for unit in held if unit[0] not in inside]
        out = list(fold)
        if test is not None:
            drawn.lists |= {"val": _masked_ids(fold, masked), "test": sorted(test)}
        else:
            drawn.lists["test"] = _masked_ids(fold, masked)
            if val:
                order = _spread_out(rest, _strata(rest, masked, traits), f"{seed}:val:fold{number}")
                target = max(1, round(len(_masked_ids(held, masked)) * val / 100))
                chosen, rest = _take(order, lambda unit: sum(i in masked for i in unit), target, leave=1)
                drawn.lists["val"] = _masked_ids(chosen, masked)
                out += chosen
        drawn.left_out = sorted(i for unit in out for i in unit if i not in masked)
        gone = {i for unit in out for i in unit}
        train = sorted(i for unit in units for i in unit if i not in gone)
        order = _spread_out(rest, _strata(rest, masked, traits), f"{seed}:labelled:fold{number}")
        _label(drawn, order, masked, labelled, len(train), skip_impossible)
        drawn.lists = {"train": train, **drawn.lists}
        drawings.append(drawn)
    return drawings


def _masked_ids(units: Iterable[Sequence[str]], masked: frozenset[str]) -> list[str]:
    return sorted(i for unit in units for i in unit if i in masked)


def _strata(
    units: Sequence[Sequence[str]], masked: frozenset[str], traits: Mapping[str, Trait] | None
) -> dict[str, str]:
    """First id of a unit -> what it is like: its classes, and which third its foreground belongs to."""
    if traits is None:
        return {unit[0]: "" for unit in units}
    shown = [[traits[i] for i in unit if i in masked] for unit in units]
    areas = np.array([np.mean([trait.area for trait in those]) for those in shown])
    thirds = _thirds(areas)
    classes = [sorted(frozenset().union(*(trait.classes for trait in those))) for those in shown]
    return {unit[0]: f"{found} {third}" for unit, found, third in zip(units, classes, thirds, strict=True)}


def _thirds(areas: np.ndarray) -> list[int]:
    """0 without foreground, else 1..3; equal areas get equal numbers."""
    some = np.sort(areas[areas > 0])
    edges = [some[len(some) * n // _AREAS] for n in range(1, _AREAS)] if len(some) >= 2 * _AREAS else []
    thirds: list[int] = np.where(areas > 0, 1 + np.searchsorted(edges, areas, side="right"), 0).tolist()
    return thirds


def _spread_out(units: Sequence[Sequence[str]], stratum_of: Mapping[str, str], salt: str) -> list[Sequence[str]]:
    """An order whose every beginning holds the strata in about their proportions, a chance one for each salt.

    Each stratum is shuffled and laid out at even steps from a random start, so that a small one is in a small list
    as often as its size says, and not always or never.
    """
    members: dict[str, list[Sequence[str]]] = defaultdict(list)
    for unit in _shuffled(units, salt):
        members[stratum_of[unit[0]]].append(unit)
    placed = []
    for stratum, those in members.items():
        start = int(hashlib.sha256(f"{salt}:{stratum}".encode()).hexdigest()[:13], 16) / 16**13  # 0..1
        placed += [((n + start) / len(those), unit[0], unit) for n, unit in enumerate(those)]
    return [unit for _, _, unit in sorted(placed, key=lambda item: item[:2])]


def _balanced(
    units: Sequence[Sequence[str]],
    masked: frozenset[str],
    folds: int,
    traits: Mapping[str, Trait] | None,
    salt: str,
) -> list[list[Sequence[str]]]:
    """Share the units out: like numbers of cases, of each class, and of each size of foreground in every fold.

    Greedy: the unit that weighs most goes where it adds least to the squares of all counts, each relative to its sum.
    """
    order = _shuffled(units, salt)
    ids = [[i for i in unit if i in masked] for unit in order]
    counts = np.array([[len(those)] for those in ids], float)
    if traits is not None:
        classes = sorted(frozenset().union(*(traits[i].classes for those in ids for i in those)))
        flat = [i for those in ids for i in those]
        third_of = dict(zip(flat, _thirds(np.array([traits[i].area for i in flat])), strict=True))
        more = [
            [sum(k in traits[i].classes for i in those) for k in classes]
            + [sum(third_of[i] == third for i in those) for third in range(_AREAS + 1)]
            for those in ids
        ]
        counts = np.hstack([counts, np.array(more, float)])
    sums = counts.sum(axis=0)
    counts = counts[:, sums > 0] / sums[sums > 0]  # (U, traits), each column sums to 1
    filled = np.zeros((folds, counts.shape[1]))
    shared: list[list[Sequence[str]]] = [[] for _ in range(folds)]
    for n in np.argsort(-(counts**2).sum(axis=1), kind="stable"):
        empty = [k for k in range(folds) if not shared[k]]
        fold = empty[0] if empty else int(np.argmin(filled @ counts[n]))
        filled[fold] += counts[n]
        shared[fold].append(order[n])
    return shared


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


def list_files(
    drawn: Drawn,
    groups: Mapping[str, str] | None = None,
    duplicates: Mapping[str, Sequence[Sequence[str]]] | None = None,
) -> dict[str, str]:
    """File name -> text of every list.

    Args:
        drawn: the lists.
        groups: id -> patient, where names do not say it; written as ``groups.csv``, which the checks read.
        duplicates: list name -> sets of its cases that show the same thing; written as ``near_duplicates.csv``.
    """
    files = {f"{name}.txt": _lines(ids) for name, ids in drawn.lists.items()}
    if drawn.left_out:
        head = "# no mask, and a case of the same group or a near duplicate is in val or test\n"
        files[LEFT_OUT_FILE] = head + _lines(drawn.left_out)
    if groups is not None:
        files[GROUPS_FILE] = _table(groups)
    if duplicates:
        files[DUPLICATES_FILE] = duplicates_table(duplicates)
    return files


def duplicates_table(duplicates: Mapping[str, Sequence[Sequence[str]]]) -> str:
    """The text of ``near_duplicates.csv``: each case of a set, and the first of the set as its group.

    Args:
        duplicates: list name -> sets of its cases that show the same thing.
    """
    return _table({i: ids[0] for sets in duplicates.values() for ids in sets for i in ids})


def _lines(ids: Iterable[str]) -> str:
    return "".join(f"{i}\n" for i in ids)


def _table(groups: Mapping[str, str]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([("id", "group"), *sorted(groups.items())])
    return text.getvalue()


def lists_hash(files: Mapping[str, str]) -> str:
    """sha256 over names and contents of the lists, for a paper or a colleague."""
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(f"{name}\n{files[name]}".encode())
    return digest.hexdigest()


def write_lists(folder: str | Path, files: Mapping[str, str], summary: str, *, force: bool = False) -> bool:
    """Write the lists and ``summary.md``. Lists that are there already are replaced only by ``force``.

    Label draws beside lists that stay what they are stay too; with other lists they go.

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
    other = other_lists(folder, files)
    if not other and all((folder / name).is_file() for name in files):
        return False
    if other and not force:
        raise ExistsError(
            f"{folder} holds other lists already: {', '.join(other)}",
            hint="Runs made with them could not be repeated. Choose another folder, or replace them with --force.",
        )
    make_folder(folder)
    for name in other:  # a label list of another drawing would not lie inside these
        (folder / name).unlink()
    for name, text in files.items():
        write_text(folder / name, text)
    write_text(folder / SUMMARY_FILE, summary)
    return True


def other_lists(folder: Path, files: Mapping[str, str]) -> list[str]:
    """Names of the lists in a folder that these files would replace or not fit to, sorted; empty: none.

    Args:
        folder: of lists; need not exist.
        files: name -> text.
    """
    names = (*_LISTS, GROUPS_FILE, LEFT_OUT_FILE, DUPLICATES_FILE)
    there = {path.name: path for name in names for path in folder.glob(name)}
    draws = {name for name in there if re.fullmatch(r"labelled_.+_draw\d+\.txt", name) and name not in files}
    differ = {n for n in set(there) - draws if n not in files or there[n].read_bytes() != files[n].encode()}
    kept = set(there) - draws - {DUPLICATES_FILE}
    if not differ and (not kept or kept == set(files) - {DUPLICATES_FILE}):
        return []  # what is missing is written beside them
    return sorted(there)


def write_draws(folder: str | Path, files: Mapping[str, str], section: str, *, force: bool = False) -> list[str]:
    """Write further lists beside those of a folder, which stay untouched, and a section of ``summary_draws.md``.

    Args:
        folder: of the lists.
        files: name -> text.
        section: how they were made; added to what the summary says of earlier ones.
        force: replace files of these names.
    Returns:
        Names of the files that were written; those that were there already, and equal, are not among them.
    Raises:
        ExistsError: a file of one of the names is there, another one, and ``force`` is not given.
        StorageError: the folder cannot be written.
    """
    folder = Path(folder)
    there = {name for name in files if (folder / name).is_file()}
    same = {name for name in there if (folder / name).read_bytes() == files[name].encode()}
    if there - same and not force:
        raise ExistsError(
            f"{folder} holds other lists already: {', '.join(sorted(there - same))}",
            hint="Runs made with them could not be repeated. Choose other label seeds, or replace them with --force.",
        )
    new = [name for name in files if name not in same]
    for name in new:
        write_text(folder / name, files[name])
    if new:
        summary = folder / DRAWS_FILE
        earlier = summary.read_text(encoding="utf-8") if summary.is_file() else "# Further lists\n"
        write_text(summary, f"{earlier}\n{section}")
    return new


def make_folder(folder: Path) -> None:
    """Make a folder with its parents.

    Raises:
        StorageError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(folder, error) from error
