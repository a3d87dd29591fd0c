"""``knowsam init``: a user's folder of images and masks in, an experiment that trains as it is out."""

import argparse
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knowsam.cli.study import add_folder_arguments

if TYPE_CHECKING:
    from knowsam.cli.study import Study

EPILOG = """examples:
  python tools/init.py my_study --images /data/polyps/images --masks /data/polyps/masks
  python tools/init.py my_study --images /data/polyps --classes background,polyp --group-regex '^(patient[0-9]+)'
  python tools/init.py my_study --images scans --labels '{0: 0, 1: [128, 255]}' --labelled 5 10 20 --out ~/studies

Writes experiments/NAME.yaml and data_splits/NAME/ below --out. Your files are only read: not moved, not changed. What
is worked out from them is said, and stands in the files. docs/own_data.md goes on from there.
exit codes: 0 done, 65 bad data, 66 not found, 73 it exists already, 74 disk, 78 wrong words.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Words of the command line."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument("name", metavar="NAME", help="of the experiment: letters, digits, _ and -")
    parser.add_argument(
        "--out", default=".", metavar="DIR", help="gets experiments/ and data_splits/; here if not given"
    )
    add_folder_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Read the folder, write lists and experiment, tell what to do next."""
    from knowsam.cli.study import command, read_study, show, summary
    from knowsam.config import load_config
    from knowsam.data.make_splits import list_files, make_folder, write_lists
    from knowsam.engine.log import say
    from knowsam.errors import ConfigError, ExistsError
    from knowsam.files import write_text

    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", args.name):
        raise ConfigError(f"{args.name!r} cannot be a name; allowed are letters, digits, _ and -")
    out = Path(args.out).expanduser()
    experiment, lists = out / "experiments" / f"{args.name}.yaml", out / "data_splits" / args.name
    if experiment.exists() and not args.force:  # said before the folder is read
        raise ExistsError(f"{experiment} is there already", hint="Choose another name, or replace it with --force.")
    study = read_study(args)
    text = experiment_text(args, study, experiment, lists)
    files = list_files(study.drawn, study.groups if args.groups else None)
    write_lists(lists, files, summary(study, files, command("init", args)), force=args.force)
    make_folder(experiment.parent)
    write_text(experiment, text)
    load_config(experiment)
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


def experiment_text(args: argparse.Namespace, study: "Study", experiment: Path, lists: Path) -> str:
    """The experiment as commented YAML."""
    import yaml

    def flow(value: Any) -> str:
        # in a list, for a scalar alone would be followed by the end of a document
        text = yaml.safe_dump([value], default_flow_style=True, width=10**6, sort_keys=False, allow_unicode=True)
        return text.strip()[1:-1]

    layout = study.layout
    root = layout.root()
    source = {"name": "image_folder", "root": _portable_root(root)}
    masks = (layout.masks or layout.images).absolute()
    for key, folder, usual in (("image_dir", layout.images.absolute(), "images"), ("mask_dir", masks, "masks")):
        if (relative := folder.relative_to(root).as_posix()) != usual:
            source[key] = relative
    for key in ("image_suffix", "mask_suffix"):
        if getattr(layout, key):
            source[key] = getattr(layout, key)
    if study.intensity != "dtype":
        source["intensity"] = study.intensity
    labelled = default_labelled(study)
    available = ", ".join(name for name in study.drawn.lists if name.startswith("labelled_"))
    lines = [
        f"# {args.name}: written by knowsam init. Every key: `make docs`, docs/_build/html/config_reference.html.",
        f"#   knowsam check {args.name}.yaml, then knowsam train {args.name}.yaml; baseline: method.name=supervised",
        f"inherits: {_inherits(experiment)}   # small: 2 cores will do. With a GPU and SAM's weights: published.yaml",
        f"name: {args.name}",
        "data:",
        f"  source: {flow(source)}",
        f"  splits: {flow(_portable_lists(lists))}",
        f"  labelled: {labelled}   # {_why(study, labelled)}; there are: {available}",
        f"  classes: {flow(study.classes)}",
    ]
    if study.threshold is not None:
        lines.append(
            f"  label_threshold: {study.threshold}   # soft edges: mask values above it are {study.classes[1]}"
        )
    elif study.labels is not None:
        lines.append(f"  labels: {flow(study.labels)}   # class id: value(s) in the mask files")
    else:
        lines.append("  # labels are not needed: masks hold class ids")
    if args.group_regex:
        lines.append(f"  group_regex: {flow(args.group_regex)}   # the part of a name that is the patient")
    elif args.groups:
        lines.append(f"  # patients: groups.csv beside the lists, drawn from {Path(args.groups).name}")
    else:
        lines.append(
            r"  # group_regex: ^(patient\d+)   # patients are unknown; if names tell them, draw the lists again"
        )
    if len(study.drawn.lists[labelled]) == len(study.drawn.lists["train"]):
        lines.append("  unlabelled_includes_labelled: true   # no training image is without a label")
    lines += [
        "  # image_size: 128    # pixels; details smaller than an image pixel at this size are lost",
        "train:",
        "  max_steps: 400       # for a first look; more for results (docs/own_data.md)",
        "  seed: 0",
    ]
    return "\n".join(lines) + "\n"


def default_labelled(study: "Study") -> str:
    """The label list that the experiment begins with.

    Where only part of the images has masks, all of these are used. Else the masks of most are set aside, as in studies
    of label efficiency: by the list nearest to 10 per cent that holds every class.
    """
    from knowsam.cli.study import absent_classes
    from knowsam.data.make_splits import ALL_MASKS

    lists = study.drawn.lists
    train = len(lists["train"])
    drawn = [name for name in lists if name.startswith("labelled_") and name != ALL_MASKS]
    drawn = [name for name in drawn if not absent_classes(study.survey, lists[name], study.table)]
    if not drawn or len(lists[ALL_MASKS]) < 0.9 * train:
        return ALL_MASKS
    return min(drawn, key=lambda name: (abs(len(lists[name]) - 0.1 * train), name))


def _why(study: "Study", name: str) -> str:
    from knowsam.data.make_splits import ALL_MASKS

    number, train = len(study.drawn.lists[name]), len(study.drawn.lists["train"])
    if name == ALL_MASKS:
        return f"all {number} of {train} training images that have a mask"
    return f"{number} of {train} training images; the other masks are not opened"


def _inherits(experiment: Path) -> str:
    from knowsam.config import REPOSITORY
    from knowsam.errors import NotFoundError

    base = REPOSITORY / "experiments" / "base" / "small.yaml"
    if not base.is_file():
        raise NotFoundError(
            f"{base} is not there, from which experiments inherit",
            hint="Run this in a checkout of knowsam, pip install -e .",
        )
    folder = experiment.parent.absolute()
    inside = folder.is_relative_to(REPOSITORY)
    return os.path.relpath(base, folder) if inside else str(base)


def _portable_root(root: Path) -> str:
    """Relative where training would find it by that name, so that the experiment works on another machine too."""
    from knowsam.config import REPOSITORY

    above = os.environ.get("KNOWSAM_DATA")
    for place in ([Path(above)] if above else []) + [REPOSITORY / "data"]:
        place = place.absolute()
        if root != place and root.is_relative_to(place):
            return root.relative_to(place).as_posix()
    return str(root)


def _portable_lists(lists: Path) -> str:
    from knowsam.config import REPOSITORY

    lists = lists.absolute()
    return lists.relative_to(REPOSITORY).as_posix() if lists.is_relative_to(REPOSITORY) else str(lists)
