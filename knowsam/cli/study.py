"""What ``knowsam splits`` and ``knowsam init`` share: their arguments, and the screen."""

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from knowsam.study.read import Study, StudyOptions


def add_folder_arguments(parser: argparse.ArgumentParser, *, images_required: bool = True) -> None:
    """Arguments that say where the pictures are and how to divide them."""
    data = parser.add_argument_group("data")
    data.add_argument(
        "--images", required=images_required, metavar="DIR", help="images; or a folder that holds images and masks"
    )
    data.add_argument("--masks", metavar="DIR", help="masks, called like their images; looked for near the images")
    data.add_argument("--unlabelled", metavar="DIR", help="further images without masks; looked for near the images")
    data.add_argument("--image-suffix", metavar="TEXT", help="what image names have after the case, such as _0000")
    data.add_argument("--mask-suffix", metavar="TEXT", help="what mask names have after the case, such as _mask")
    data.add_argument("--classes", metavar="A,B", help="names of the classes, background first: background,lesion")
    data.add_argument(
        "--labels",
        metavar="MAP",
        help="mask values of each class, such as '{0: 0, 1: [128, 255]}'; or binary: all above 0 is one class",
    )
    data.add_argument("--ignore", metavar="N", help="mask value of pixels about which nothing is known, such as 255")
    data.add_argument(
        "--several-masks",
        choices=("merge", "leave"),
        help="images with several masks, a_mask.png and a_mask_1.png: parts of one mask, or not to be used",
    )
    data.add_argument("--intensity", choices=("as_is", "minmax", "percentile"), help="how values become 0..1")
    parts = parser.add_argument_group("division")
    parts.add_argument(
        "--splits",
        choices=("keep", "draw"),
        default="keep",
        help="folders called train, val and test: keep them as lists, or draw anew; keep",
    )
    parts.add_argument("--val", type=float, default=10.0, metavar="PERCENT", help="of the cases with a mask; 10")
    parts.add_argument("--test", type=float, default=20.0, metavar="PERCENT", help="of the cases with a mask; 20")
    parts.add_argument(
        "--labelled",
        nargs="+",
        metavar="N",
        help="sizes of the label lists: per cent of the training cases, 8cases or 3groups; 5 10 20",
    )
    parts.add_argument("--group-regex", metavar="REGEX", help="the part of a name that is the patient: '^(p[0-9]+)'")
    parts.add_argument("--groups", metavar="CSV", help="file that names the patient of each image")
    parts.add_argument("--group-column", default="group", metavar="NAME", help="its column of patients; group")
    parts.add_argument("--id-column", default="id", metavar="NAME", help="its column of image names; id")
    parts.add_argument("--no-near-duplicates", action="store_true", help="keep only equal images on one side")
    parts.add_argument("--seed", type=int, default=0)
    parts.add_argument("--force", action="store_true", help="replace what is there")


def read_folder(args: argparse.Namespace) -> "Study":
    """Read and divide the folder that the arguments name, with progress on the screen.

    Raises:
        NotFoundError, DataError, ConfigError: what keeps the folder from being used.
    """
    from knowsam.engine.log import Counter
    from knowsam.study.read import read_study

    options = study_options(args)
    with Counter("reading images and masks") as progress:
        return read_study(options, progress)


def study_options(args: argparse.Namespace) -> "StudyOptions":
    """The arguments of ``add_folder_arguments`` as options.

    Raises:
        ConfigError: an argument that cannot be meant.
    """
    from knowsam.data.make_splits import Amount
    from knowsam.study.read import StudyOptions

    return StudyOptions(
        images=Path(args.images),
        masks=Path(args.masks) if args.masks is not None else None,
        unlabelled=Path(args.unlabelled) if args.unlabelled is not None else None,
        image_suffix=args.image_suffix,
        mask_suffix=args.mask_suffix,
        classes=[name.strip() for name in args.classes.split(",")] if args.classes else None,
        labels=_labels(args.labels) if args.labels else None,
        ignore=_ignore(args.ignore) if args.ignore else None,
        several_masks=args.several_masks,
        intensity=args.intensity,
        val=args.val,
        test=args.test,
        labelled=[Amount.parse(text) for text in args.labelled] if args.labelled else None,
        group_regex=args.group_regex or None,
        groups=Path(args.groups) if args.groups else None,
        group_column=args.group_column,
        id_column=args.id_column,
        near_duplicates=not args.no_near_duplicates,
        ready_splits=args.splits == "keep",
        seed=args.seed,
    )


def _ignore(text: str) -> Any:
    import yaml

    from knowsam.errors import ConfigError

    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--ignore {text!r} is no YAML: {error}") from error
    if not isinstance(value, int | list):
        raise ConfigError(f"--ignore {text!r}; needed is a mask value such as 255, or several: [254, 255]")
    return value


def _labels(text: str) -> "dict[Any, Any] | Literal['binary']":
    import yaml

    from knowsam.errors import ConfigError

    if text == "binary":
        return "binary"
    try:
        labels = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--labels {text!r} is no YAML: {error}") from error
    if not isinstance(labels, dict):
        raise ConfigError(f"--labels {text!r}; needed are classes and values, such as {{0: 0, 1: 255}}, or binary")
    return labels


def show(study: "Study") -> None:
    """Print what was found, assumed and drawn."""
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from knowsam.engine.log import say, warn
    from knowsam.study.lists import list_table

    for note in study.notes:
        say(note)
    for warning in study.warnings:
        warn(warning)
    columns, rows = list_table(study)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for n, name in enumerate(columns):
        table.add_column(escape(name), justify="left" if n == 0 else "right")
    for row in rows:
        table.add_row(*map(escape, row))
    Console(width=None if Console().is_terminal else 140, highlight=False).print(table)


def command(name: str, args: argparse.Namespace) -> str:
    """The command that would do the same again, with every option that was given or has a default."""
    arguments = ["knowsam", name, *([args.name] if "name" in args else [])]
    for key, value in vars(args).items():
        option = f"--{key.replace('_', '-')}"
        if value is None or value is False or key in ("force", "name"):
            continue
        if key in ("group_column", "id_column") and not args.groups:
            continue
        if value is True:
            arguments.append(option)
        else:
            arguments += [option, *map(_plain, value if isinstance(value, list) else [value])]
    return shlex.join(arguments)


def plain_command(name: str, words: list[str]) -> str:
    """A command as one line that a shell reads back.

    Args:
        name: of the command.
        words: after it.
    """
    return shlex.join(["knowsam", name, *words])


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
