"""``knowsam splits``: a folder of images in, seeded split lists out; draws and folds of lists."""

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING

from knowsam.cli.study import add_folder_arguments

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from knowsam.data.splits import Splits
    from knowsam.study.lists import Cases
    from knowsam.study.read import Study

EPILOG = """examples:
  python tools/make_splits.py --images study/images --masks study/masks --out data_splits/study
  python tools/make_splits.py --images study --labelled 5 10 20 --group-regex '^(patient[0-9]+)' --out data_splits/study
  python tools/make_splits.py --images study --groups patients.csv --group-column patient --out data_splits/study
  python tools/make_splits.py --images study --label-seed 0..4 --out data_splits/study      # the label lists again
  python tools/make_splits.py --images study --folds 5 --out data_splits/study_folds
  python tools/make_splits.py --images study --mark-duplicates --out data_splits/study

The lists depend on the seed and the names alone: another percentage or a new image moves as few cases as possible. No
group is divided, near duplicates stay on one side. More in docs/own_data.md.
exit codes: 0 done, 65 bad data, 66 not found, 73 other lists are there, 74 disk, 78 wrong arguments.
"""

_TEST, _VAL = 20.0, 10.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the lists, such as data_splits/study")
    add_folder_arguments(parser, images_required=False)
    again = parser.add_argument_group("of lists that are there, and folds")
    again.add_argument(
        "--label-seed",
        nargs="+",
        metavar="N",
        help="draw the label lists of --out again, once a seed: 0 1 2 or 0..4; train, val and test stay as they are",
    )
    again.add_argument(
        "--folds", type=int, metavar="N", help="write so many folders of lists, each testing on its fold"
    )
    again.add_argument(
        "--fixed-test", metavar="DIR", help="with --folds: keep the test list of DIR, folds are val lists"
    )
    again.add_argument("--mark-duplicates", action="store_true", help="write near_duplicates.csv beside lists of --out")


def run(args: argparse.Namespace) -> int:
    """Read the folder, draw, write, report."""
    from knowsam.errors import ConfigError

    modes = {"--label-seed": args.label_seed, "--folds": args.folds, "--mark-duplicates": args.mark_duplicates}
    if sum(map(bool, modes.values())) > 1:
        raise ConfigError(f"{' and '.join(name for name, given in modes.items() if given)} exclude each other")
    if args.fixed_test and not args.folds:
        raise ConfigError("--fixed-test goes with --folds; --label-seed keeps the test list anyway")
    if args.label_seed and (args.test != _TEST or args.val != _VAL):
        raise ConfigError("--label-seed draws no test and no val list; leave --test and --val out")
    if args.folds and args.test != _TEST:
        raise ConfigError("--folds tests on each fold in turn, or on --fixed-test; leave --test out")
    if args.fixed_test and args.val != _VAL:
        raise ConfigError("with --fixed-test the folds are the val lists; leave --val out")
    if not args.images and not args.label_seed:
        raise ConfigError("--images is needed", hint="Only --label-seed can do without, from the lists of --out alone.")
    if args.label_seed:
        return _label_draws(args)
    if args.folds:
        return _folds(args)
    if args.mark_duplicates:
        return _mark_duplicates(args)
    return _lists(args)


def _lists(args: argparse.Namespace) -> int:
    from knowsam.cli.study import command, read_folder, show
    from knowsam.data.make_splits import lists_hash
    from knowsam.engine.log import say
    from knowsam.study.lists import study_files, write_study_lists

    study = read_folder(args)
    written = write_study_lists(study, args.out, command=command("splits", args), force=args.force)
    show(study)
    digest = lists_hash(study_files(study))
    say(f"\nlists in {args.out}, sha256 {digest[:12]}; summary.md beside them says how they were made")
    if not written:
        say("exactly these lists were there already: nothing was written")
    return 0


def _label_draws(args: argparse.Namespace) -> int:
    from knowsam.cli.study import command
    from knowsam.data.make_splits import Amount
    from knowsam.data.splits import check_against, load_splits
    from knowsam.engine.log import say
    from knowsam.errors import ConfigError
    from knowsam.study.lists import amounts_there, cases_of_lists, cases_of_study, groups_of_lists, write_label_draws

    seeds = label_seeds(args.label_seed)
    splits = load_splits(args.out, "all", group_regex=args.group_regex)
    if not splits.train:
        raise ConfigError(f"{args.out} has no train.txt to draw from")
    if args.images:
        study = _read(args)
        ids = [case.id for case in study.survey.cases]
        check_against(splits, ids, checked=("train",), where=str(study.layout.images))
        groups = study.groups or groups_of_lists(splits.folder, splits.train, None)
        cases = cases_of_study(study, splits.train, groups)
    else:
        cases = cases_of_lists(splits, _groups(args, splits))
    amounts = [Amount.parse(text) for text in args.labelled or ()]
    amounts = amounts or amounts_there(splits.folder, len(splits.train), cases.groups)
    if not amounts:
        raise ConfigError(
            f"{args.out} has no label list whose name says its size truly", hint="Give sizes: --labelled 10 7groups."
        )
    how = command("splits", args)
    drawn, written = write_label_draws(cases, splits, seeds, amounts, command=how, force=args.force)
    _tell(cases, [("", drawn.lists)], drawn.warnings)
    same = len(drawn.lists) - len(written)
    say(f"\n{len(written)} lists written beside those of {args.out}; {same} were there already, the same")
    name = next(iter(drawn.lists)).rpartition("_draw")[0]
    say(f"next: data.labelled={name}_draw{seeds[0]}, or a sweep over all of them (docs/sweeps.md)")
    return 0


def _folds(args: argparse.Namespace) -> int:
    from knowsam.cli.study import command
    from knowsam.data.make_splits import Amount
    from knowsam.data.splits import check_against, load_splits
    from knowsam.engine.log import say
    from knowsam.study.lists import cases_of_study, write_folds
    from knowsam.study.read import DEFAULT_LABELLED

    study = _read(args)
    ids, test, left_out = [case.id for case in study.survey.cases], None, 0
    if args.fixed_test:
        fixed = load_splits(args.fixed_test, "all", group_regex=args.group_regex)
        check_against(fixed, ids, where=str(study.layout.images))
        test = list(fixed.test)
        listed = {*fixed.train, *fixed.val}
        left_out = len(ids) - len(listed) - len(test)
        ids = [i for i in ids if i in listed]
    cases = cases_of_study(study, ids)
    if left_out:
        cases.warnings.append(f"{left_out} images that no list of {args.fixed_test} names are in no fold")
    drawings, written = write_folds(
        cases,
        Path(args.out),
        args.folds,
        val=0.0 if test is not None else args.val,
        labelled=[Amount.parse(text) for text in args.labelled] if args.labelled else None,
        default=DEFAULT_LABELLED,
        seed=args.seed,
        test=test,
        command=command("splits", args),
        table=bool(args.groups),
        force=args.force,
    )
    warnings = [f"fold {n}: {warning}" for n, drawn in enumerate(drawings) for warning in drawn.warnings]
    _tell(cases, [(f"fold{n}/", drawn.lists) for n, drawn in enumerate(drawings)], warnings)
    say(
        f"\n{args.folds} folds in {args.out}; data.splits={args.out}/fold0 trains on the first (docs/sweeps.md: on all)"
    )
    if not written:
        say("exactly these lists were there already: nothing was written")
    return 0


def _mark_duplicates(args: argparse.Namespace) -> int:
    from knowsam.data.splits import DUPLICATES_FILE, load_splits
    from knowsam.engine.log import say
    from knowsam.study.lists import write_duplicates

    splits = load_splits(args.out, "all")
    found = write_duplicates(_read(args), splits, force=args.force)
    for name, sets in found.items():
        say(f"{name}: {len(sets)} sets of pictures that show the same thing")
        for ids in sets[:20]:
            say(f"  {' ~ '.join(ids)}")
    say(f"written: {Path(args.out) / DUPLICATES_FILE}" if found else "no near duplicates inside val or test")
    return 0


def label_seeds(words: "Sequence[str]") -> list[int]:
    """Seeds of the draws, ascending: ``3``, ``0..4``.

    Raises:
        ConfigError: another form.
    """
    from knowsam.errors import ConfigError

    seeds: set[int] = set()
    for word in words:
        match = re.fullmatch(r"(\d+)(?:\.\.(\d+))?", word)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last or last - first > 999:
            raise ConfigError(f"label seed {word!r}; allowed are whole numbers from 0, or ranges such as 0..4")
        seeds.update(range(first, last + 1))
    return sorted(seeds)


def _read(args: argparse.Namespace) -> "Study":
    """The folder; of the lists that are drawn in reading it, none is used."""
    from dataclasses import replace

    from knowsam.cli.study import study_options
    from knowsam.engine.log import Counter
    from knowsam.study.read import read_study

    with Counter("reading images and masks") as progress:
        return read_study(replace(study_options(args), labelled=None), progress)


def _groups(args: argparse.Namespace, splits: "Splits") -> "Mapping[str, str] | None":
    from knowsam.data.splits import read_groups
    from knowsam.errors import DataError
    from knowsam.study.lists import groups_of_lists

    if not args.groups:
        return groups_of_lists(splits.folder, splits.train, args.group_regex)
    table = read_groups(args.groups, args.id_column, args.group_column)
    if missing := [i for i in splits.train if i not in table]:
        raise DataError(
            f"{len(missing)} of {len(splits.train)} cases have no group in {args.groups}: {missing[0]}, ..."
        )
    return table


def _tell(
    cases: "Cases", lists: "Sequence[tuple[str, Mapping[str, Sequence[str]]]]", warnings: "Sequence[str]"
) -> None:
    """Print what was found and drawn: cases, patients, and of how many cases each class is part."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from knowsam.engine.log import say, warn

    for note in cases.notes:
        say(note)
    for warning in [*cases.warnings, *warnings]:
        warn(warning)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    classes = sorted(frozenset().union(*(trait.classes for trait in (cases.traits or {}).values())))
    columns = [
        "list",
        "cases",
        *(["groups"] if cases.groups is not None else []),
        *(f"with class {k}" for k in classes),
    ]
    columns += ["foreground %"] if cases.traits else []
    for n, name in enumerate(columns):
        table.add_column(name, justify="left" if n == 0 else "right")
    for prefix, those in lists:
        for name, ids in those.items():
            row = [f"{prefix}{name}", str(len(ids))]
            row += [str(len({cases.groups.get(i) for i in ids}))] if cases.groups is not None else []
            if cases.traits:
                shown = [cases.traits[i] for i in ids if i in cases.traits]
                shown = [] if name == "train" else shown  # most of its masks are never used
                row += [str(sum(k in trait.classes for trait in shown)) if shown else "-" for k in classes]
                row += [f"{100 * sum(trait.area for trait in shown) / len(shown):.2f}" if shown else "-"]
            table.add_row(*row)
    Console(width=None if Console().is_terminal else 140, highlight=False).print(table)
