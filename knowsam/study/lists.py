"""The lists of a study, counted for people and written down; further draws and folds of them."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import knowsam
from knowsam.data.looks import tied_within
from knowsam.data.make_splits import (
    ALL_MASKS,
    SUMMARY_FILE,
    Amount,
    Drawn,
    Trait,
    draw_folds,
    draw_labels,
    duplicates_table,
    list_files,
    lists_hash,
    make_folder,
    other_lists,
    tie_groups,
    tie_units,
    write_draws,
    write_lists,
)
from knowsam.data.splits import (
    DUPLICATES_FILE,
    GROUPS_FILE,
    Splits,
    check_against,
    group_finder,
    load_splits,
    read_groups,
)
from knowsam.data.survey import class_pixels
from knowsam.errors import ConfigError, DataError, ExistsError
from knowsam.files import write_text
from knowsam.study.classes import class_shares
from knowsam.study.read import Study

EVALUATED = ("val", "test")


@dataclass
class Cases:
    """What draws know of cases.

    Attributes:
        units: cases that stay together, each sorted.
        masked: ids whose masks can be used.
        traits: id -> what the mask shows, of those in ``masked``; None: unknown.
        groups: id -> patient; None: unknown.
        ties: ids of equal or nearly equal pictures, two or more each.
        notes, warnings: for people.
    """

    units: list[list[str]]
    masked: list[str]
    traits: dict[str, Trait] | None = None
    groups: Mapping[str, str] | None = None
    ties: list[Sequence[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def cases_of_study(study: Study, ids: Iterable[str] | None = None, groups: Mapping[str, str] | None = None) -> Cases:
    """Cases of a folder that was read.

    Args:
        study: as ``read_study`` gives it.
        ids: which cases; None: all.
        groups: id -> patient, where the study does not know them.
    """
    wanted = {case.id for case in study.survey.cases} if ids is None else set(ids)
    groups = study.groups if study.groups is not None else groups
    found = [case for case in study.survey.cases if case.id in wanted]
    looks = {case.id: case.look for case in found}
    units, same, near = tie_units(looks, groups, near=study.options.near_duplicates)
    traits = {}
    for case in found:
        if case.values is not None:
            pixels = class_pixels(case.values, study.classes.table)[0]  # (K,)
            there = frozenset(k for k in range(1, len(pixels)) if pixels[k])
            traits[case.id] = Trait(there, float(pixels[1:].sum() / max(pixels.sum(), 1)))
    cases = Cases(units, list(traits), traits, groups, [*same, *(pair[:2] for pair in near)], list(study.notes))
    if groups is None:
        cases.warnings.append("patients are unknown: give --group-regex or --groups if names or a table tell them")
    return cases


def cases_of_lists(splits: Splits, groups: Mapping[str, str] | None) -> Cases:
    """Training cases as far as the lists alone tell of them: all have a mask, or those of ``labelled_max``.

    Args:
        splits: of a folder.
        groups: id -> patient; None: unknown.
    """
    masked = list(splits.train)
    cases = Cases(tie_groups(splits.train, groups).sets(), masked, None, groups)
    if (splits.folder / f"{ALL_MASKS}.txt").is_file():
        cases.masked = list(load_splits(splits.folder, ALL_MASKS).labelled)
    else:
        cases.notes.append(f"every training case is taken to have a mask: there is no {ALL_MASKS}.txt")
    cases.warnings.append("without --images draws are not stratified, and near duplicates are not kept together")
    if groups is None:
        cases.warnings.append("patients are unknown: give --group-regex or --groups if names or a table tell them")
    return cases


def groups_of_lists(folder: Path, ids: Iterable[str], group_regex: str | None) -> dict[str, str] | None:
    """Patient of each case of lists, by the expression or the ``groups.csv`` beside them; None: unknown.

    Args:
        folder: of the lists.
        ids: whose patients.
        group_regex: the part of an id that is the patient; None: look for the table.
    Raises:
        DataError: a case without a patient.
    """
    if group_regex is not None:
        found = {i: group_finder(group_regex)(i) for i in ids}
    elif (folder / GROUPS_FILE).is_file():
        table = read_groups(folder / GROUPS_FILE)
        found = {i: table.get(i) for i in ids}
    else:
        return None
    groups = {i: group for i, group in found.items() if group is not None}
    if missing := [i for i in found if i not in groups]:
        shown = ", ".join(missing[:10]) + (", ..." if len(missing) > 10 else "")
        raise DataError(f"{len(missing)} of {len(found)} cases of {folder} have no group: {shown}")
    return groups


def amounts_there(folder: Path, train: int, groups: Mapping[str, str] | None) -> list[Amount]:
    """Sizes of the label lists of a folder, as far as a list's name says truly how much it holds.

    Args:
        folder: of the lists.
        train: number of training cases.
        groups: id -> patient; None: unknown.
    """
    amounts = []
    for path in sorted(folder.glob("labelled_*.txt")):
        try:
            amount = Amount.parse(path.stem.removeprefix("labelled_"))
        except ConfigError:
            continue
        ids = load_splits(folder, path.stem).labelled
        if amount.unit == "groups":
            true = groups is not None and len({groups[i] for i in ids}) == amount.number
        else:
            target = train * amount.number / 100 if amount.unit == "pct" else amount.number
            true = abs(len(ids) - target) <= max(1, 0.25 * target)
        if true:
            amounts.append(amount)
    return amounts


def write_label_draws(
    cases: Cases,
    splits: Splits,
    label_seeds: Sequence[int],
    labelled: Sequence[Amount],
    *,
    command: str,
    force: bool = False,
) -> tuple[Drawn, list[str]]:
    """Draw label lists anew for each seed and write them beside the lists, of which none is touched.

    Args:
        cases: the training cases.
        splits: of the folder.
        label_seeds: of the draws.
        labelled: sizes of the lists.
        command: the command line that would do the same again.
        force: replace draws of these names.
    Returns:
        The draws, and the names of the files that were written.
    Raises:
        DataError: too few cases for what was asked.
        ExistsError, StorageError: as ``write_draws``.
    """
    drawn = draw_labels(
        cases.units,
        cases.masked,
        train=len(splits.train),
        labelled=labelled,
        label_seeds=label_seeds,
        traits=cases.traits,
    )
    files = list_files(drawn)
    how = "" if cases.traits is not None else " Not stratified: the images were not read."
    section = [
        f"Drawn by knowsam {knowsam.__version__} with",
        "",
        f"    {command}",
        "",
        f"from the {len(splits.train)} cases of `train.txt`; train, val and test are as they were.{how}",
        "",
        *(f"- Warning: {warning}" for warning in [*cases.warnings, *drawn.warnings]),
        *(f"- `{name}`: {len(text.splitlines())} cases, `{_sha256(text)}`" for name, text in files.items()),
    ]
    return drawn, write_draws(splits.folder, files, "\n".join(section) + "\n", force=force)


def write_folds(
    cases: Cases,
    out: Path,
    folds: int,
    *,
    val: float,
    labelled: Sequence[Amount] | None,
    default: Sequence[Amount],
    seed: int,
    test: Sequence[str] | None,
    command: str,
    table: bool,
    force: bool = False,
) -> tuple[list[Drawn], bool]:
    """Write the folders ``fold0``, ``fold1``, ..., each with all lists of one drawing.

    Args:
        cases: all that take part; with a fixed test list, without its cases.
        out: gets the folders.
        folds: how many.
        val: per cent of the cases with a mask, if folds are test lists.
        labelled: sizes of the label lists; None: ``default``, as far as there are masks enough.
        default: see there.
        seed: of all draws.
        test: test list of every fold; then folds are val lists.
        command: the command line that would do the same again.
        table: write the patients down, for names do not tell them.
        force: replace other lists.
    Returns:
        The drawings; and whether anything was written.
    Raises:
        ConfigError, DataError: as ``draw_folds``.
        ExistsError: other folds are there and ``force`` is not given, or more of them.
        StorageError: the folder cannot be written.
    """
    drawings = draw_folds(
        cases.units,
        cases.masked,
        folds,
        val=val,
        labelled=default if labelled is None else labelled,
        seed=seed,
        traits=cases.traits,
        test=test,
        skip_impossible=labelled is None,
    )
    contents = []
    for drawn in drawings:
        part_of = {i: name for name in EVALUATED for i in drawn.lists.get(name, ())}
        contents.append(list_files(drawn, cases.groups if table else None, tied_within(cases.ties, part_of)))
    there = {path.name for path in out.glob("fold[0-9]*")} - {f"fold{n}" for n in range(folds)}
    different = [n for n, files in enumerate(contents) if other_lists(out / f"fold{n}", files)]
    if there or (different and not force):
        what = ", ".join(sorted(there | {f"fold{n}" for n in different}))
        raise ExistsError(
            f"{out} holds folds of another drawing: {what}",
            hint="Runs made with them could not be repeated. Choose another folder"
            + (", or remove these." if there else ", or replace them with --force."),
        )
    written = False
    for number, (drawn, files) in enumerate(zip(drawings, contents, strict=True)):
        what = "val" if test is not None else "test"
        title = f"# Split lists, fold {number} of {folds}: the {what} list is the fold"
        text = _fold_summary(title, drawn, cases, files, command)
        written |= write_lists(out / f"fold{number}", files, text, force=force)
    if written:
        make_folder(out)
        lines = ["# Folds", "", f"Drawn by knowsam {knowsam.__version__} with", "", f"    {command}", ""]
        lines += [f"- `fold{n}`: `{lists_hash(files)}`" for n, files in enumerate(contents)]
        write_text(out / SUMMARY_FILE, "\n".join(lines) + "\n")
    return drawings, written


def _fold_summary(title: str, drawn: Drawn, cases: Cases, files: Mapping[str, str], command: str) -> str:
    lines = [title, "", f"    {command}", ""]
    lines += [f"- {name}: {len(ids)} cases" for name, ids in drawn.lists.items()]
    lines += [f"- Warning: {warning}" for warning in [*cases.warnings, *drawn.warnings]]
    return "\n".join([*lines, "", f"sha256 of all lists: `{lists_hash(files)}`"]) + "\n"


def write_duplicates(study: Study, splits: Splits, *, force: bool = False) -> dict[str, list[list[str]]]:
    """Write ``near_duplicates.csv`` beside lists that exist: what of val and test shows the same thing.

    Args:
        study: the images, read.
        splits: the lists.
        force: replace another table.
    Returns:
        list name -> sets of cases; empty: there are none, and nothing is written.
    Raises:
        DataError: a listed case that was not read.
        ExistsError, StorageError: as ``write_draws``.
    """
    ids = {name: splits.of(name) for name in EVALUATED}
    read = [case.id for case in study.survey.cases]
    check_against(splits, read, checked=EVALUATED, where=str(study.layout.images))
    part_of = {i: name for name, those in ids.items() for i in those}
    found = tied_within(cases_of_study(study, part_of).ties, part_of)
    if found:
        text = duplicates_table(found)
        write_draws(splits.folder, {DUPLICATES_FILE: text}, f"- `{DUPLICATES_FILE}`: `{_sha256(text)}`\n", force=force)
    return found


def list_table(study: Study) -> tuple[list[str], list[list[str]]]:
    """Column names and rows of the table of lists: cases, patients where they are known, each class's share in %."""
    columns = ["list", "cases", *(["groups"] if study.groups else []), *(f"{name} %" for name in study.classes.names)]
    rows = []
    for name, ids in study.drawn.lists.items():
        row = [name, str(len(ids))]
        if study.groups:
            row.append(str(len({study.groups[i] for i in ids})))
        if name == "train":  # most of its masks are never used; their shares would say what training does not know
            row += ["-"] * len(study.classes.names)
        else:
            row += [f"{100 * share:.2f}" for share in class_shares(study.survey, ids, study.classes.table)]
        rows.append(row)
    return columns, rows


def study_files(study: Study) -> dict[str, str]:
    """File name -> text of every list; with ``groups.csv`` where a table named the patients.

    Where pictures of val or test show the same thing, ``near_duplicates.csv`` names them.
    """
    part_of = {i: name for name in EVALUATED for i in study.drawn.lists.get(name, ())}
    duplicates = tied_within(cases_of_study(study, part_of).ties, part_of)
    return list_files(study.drawn, study.groups if study.options.groups else None, duplicates)


def write_study_lists(study: Study, folder: str | Path, *, command: str, force: bool = False) -> bool:
    """Write the lists and the summary that says how they were made.

    Args:
        study: read and drawn.
        folder: for the lists; made if it is not there.
        command: the command line that would do the same again.
        force: replace other lists.
    Returns:
        False if exactly these lists were there already; then nothing is written.
    Raises:
        ExistsError: other lists are there and ``force`` is not given.
        StorageError: the folder cannot be written.
    """
    files = study_files(study)
    return write_lists(folder, files, summary(study, files, command), force=force)


def summary(study: Study, files: Mapping[str, str], command: str) -> str:
    """The text of ``summary.md``.

    Args:
        study: read and drawn.
        files: file name -> text of every list.
        command: the command line that would do the same again.
    """
    columns, rows = list_table(study)
    lines = [
        "# Split lists",
        "",
        f"Drawn by knowsam {knowsam.__version__} with",
        "",
        f"    {command}",
        "",
        "Ids only, sorted, one a line. `train.txt` holds every training case; the `labelled_*.txt` lists, each inside",
        "every larger one, name those whose masks may be used. Do not edit them after the first training.",
        "",
        "| " + " | ".join(columns) + " |",
        "|---" * len(columns) + "|",
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
        *(f"- {note}" for note in study.notes),
        *(f"- Warning: {warning}" for warning in study.warnings),
        "",
        f"sha256 of all lists: `{lists_hash(files)}`",
        "",
        *(f"- `{name}`: `{_sha256(text)}`" for name, text in sorted(files.items())),
    ]
    return "\n".join(lines) + "\n"


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
