"""``knowsam init``: a user's folder of images and masks in, an experiment that trains as it is out."""

import argparse
from typing import TYPE_CHECKING

from knowsam.cli.study import add_folder_arguments

if TYPE_CHECKING:
    from knowsam.study.experiment import Recipe

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
    parser.add_argument(
        "--recipe",
        choices=("auto", "full", "small"),
        default="auto",
        help="what the experiment inherits: the published recipe, for a GPU, or the small one; auto looks for a GPU",
    )
    add_folder_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Read the folder, write lists and experiment, say what to do next."""
    from knowsam.cli.study import command, read_folder, show
    from knowsam.engine.log import say
    from knowsam.study.experiment import experiment_places, write_experiment

    experiment, lists = experiment_places(args.out, args.name, force=args.force)
    recipe, why = choose_recipe(args.recipe)
    study = read_folder(args)
    text = command("init", args)
    write_experiment(study, experiment, lists, command=text, recipe=recipe, force=args.force)
    show(study)
    say(f"\nrecipe {recipe}: {why}")
    say(f"written: {experiment} and the lists in {lists}")
    steps = [("check", "--preview preview.png", "reads every file; look at the picture")]
    steps += [("train", "--dry-run", "one batch"), ("train", "--evaluate", "train, then score on test")]
    if not study.drawn.lists.get("test"):
        steps[-1] = ("train", "", "train; there is no test list to score on")
    lines = [f"  knowsam {name} {experiment} {words:22}    # {what}" for name, words, what in steps]
    lines.append(f"  {lines[-1].partition('    #')[0].strip()} method.name=supervised    # the baseline")
    if recipe == "full":
        lines.insert(0, "  knowsam weights fetch vit_b    # SAM's weights, if they are not here yet")
    say("next:\n" + "\n".join(lines))
    return 0


def choose_recipe(asked: str) -> "tuple[Recipe, str]":
    """The recipe, and why, for people.

    Args:
        asked: ``auto``, ``full`` or ``small``.
    """
    if asked in ("full", "small"):
        return ("full" if asked == "full" else "small"), "as --recipe says"
    import torch

    if torch.cuda.is_available():
        return "full", f"this machine has a GPU ({torch.cuda.get_device_name()}); --recipe small is for a first look"
    return "small", "this machine has no GPU; --recipe full writes the published one"
