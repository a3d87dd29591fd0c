"""``knowsam init``: a user's folder of images and masks in, an experiment that trains as it is out."""

import argparse

from knowsam.cli.study import add_folder_arguments

EPILOG = """examples:
  python tools/init.py my_study --images /data/polyps/images --masks /data/polyps/masks
  python tools/init.py my_study --images /data/polyps --classes background,polyp --group-regex '^(patient[0-9]+)'
  python tools/init.py my_study --images scans --labels '{0: 0, 1: [128, 255]}' --labelled 5 10 20 --out ~/studies

Writes experiments/NAME.yaml and data_splits/NAME/ below --out. Your files are only read: not moved, not changed. What
is worked out from them is said, and stands in the files. docs/own_data.md goes on from there.
exit codes: 0 done, 65 bad data, 66 not found, 73 it exists already, 74 disk, 78 wrong arguments.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument("name", metavar="NAME", help="of the experiment: letters, digits, _ and -")
    parser.add_argument(
        "--out", default=".", metavar="DIR", help="gets experiments/ and data_splits/; here if not given"
    )
    add_folder_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Read the folder, write lists and experiment, say what to do next."""
    from knowsam.cli.study import command, read_folder, show
    from knowsam.engine.log import say
    from knowsam.study.experiment import experiment_places, write_experiment

    experiment, lists = experiment_places(args.out, args.name, force=args.force)
    study = read_folder(args)
    write_experiment(study, experiment, lists, command=command("init", args), force=args.force)
    show(study)
    say(f"\nwritten: {experiment} and the lists in {lists}")
    say(
        "next:\n"
        f"  knowsam check {experiment} --preview preview.png    # reads every file; look at the picture\n"
        f"  knowsam train {experiment} --dry-run                # one batch\n"
        f"  knowsam train {experiment} --evaluate               # train, then score on test\n"
        f"  knowsam train {experiment} --evaluate method.name=supervised    # the baseline"
    )
    return 0
