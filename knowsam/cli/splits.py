"""``knowsam splits``: a folder of images in, seeded split lists out."""

import argparse

from knowsam.cli.study import add_folder_arguments

EPILOG = """examples:
  python tools/make_splits.py --images study/images --masks study/masks --out data_splits/study
  python tools/make_splits.py --images study --labelled 5 10 20 --group-regex '^(patient[0-9]+)' --out data_splits/study
  python tools/make_splits.py --images study --groups patients.csv --group-column patient --out data_splits/study

The lists depend on the seed and the names alone: another percentage or a new image moves as few cases as possible. No
group is divided, near duplicates stay on one side. More in docs/own_data.md.
exit codes: 0 done, 65 bad data, 66 not found, 73 other lists are there, 74 disk, 78 wrong arguments.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the lists, such as data_splits/study")
    add_folder_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Read the folder, draw, write, report."""
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
