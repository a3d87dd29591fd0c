"""``knowsam splits``: a folder of images in, seeded split lists out."""

import argparse

from knowsam.cli.study import add_folder_arguments

EPILOG = """examples:
  python tools/make_splits.py --images study/images --masks study/masks --out data_splits/study
  python tools/make_splits.py --images study --labelled 5 10 20 --group-regex '^(patient[0-9]+)' --out data_splits/study
  python tools/make_splits.py --images study --groups patients.csv --group-column patient --out data_splits/study

The lists depend on the seed and the names alone: another percentage or a new image moves as few cases as possible. No
group is divided, near duplicates stay on one side. docs/own_data.md tells more.
exit codes: 0 done, 65 bad data, 66 not found, 73 other lists are there, 74 disk, 78 wrong words.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Words of the command line."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the lists, such as data_splits/study")
    add_folder_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Read the folder, draw, write, tell."""
    from knowsam.cli.study import command, read_study, show, summary
    from knowsam.data.make_splits import list_files, lists_hash, write_lists
    from knowsam.engine.log import say

    study = read_study(args)
    files = list_files(study.drawn, study.groups if args.groups else None)
    written = write_lists(args.out, files, summary(study, files, command("splits", args)), force=args.force)
    show(study)
    say(f"\nlists in {args.out}, sha256 {lists_hash(files)[:12]}; summary.md beside them says how they were made")
    if not written:
        say("exactly these lists were there already: nothing was written")
    return 0
