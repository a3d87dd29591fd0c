"""What ``knowsam splits`` and ``knowsam init`` share: a user's folder, read, understood and divided."""

import argparse
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from knowsam.data.labels import LabelTable
    from knowsam.data.layout import Layout
    from knowsam.data.make_splits import Drawn
    from knowsam.data.survey import Survey

DEFAULT_LABELLED = ("5", "10", "20")


def add_folder_arguments(parser: argparse.ArgumentParser) -> None:
    """Words that say where the pictures are and how to divide them; ``knowsam init`` has them too."""
    data = parser.add_argument_group("data")
    data.add_argument("--images", required=True, metavar="DIR", help="images; or a folder that holds images and masks")
    data.add_argument("--masks", metavar="DIR", help="masks, called like their images; looked for near the images")
    data.add_argument("--image-suffix", metavar="TEXT", help="what image names have after the case, such as _0000")
    data.add_argument("--mask-suffix", metavar="TEXT", help="what mask names have after the case, such as _mask")
    data.add_argument("--classes", metavar="A,B", help="names of the classes, background first: background,lesion")
    data.add_argument("--labels", metavar="MAP", help="mask values of each class, such as '{0: 0, 1: [128, 255]}'")
    data.add_argument("--intensity", choices=("dtype", "minmax", "percentile"), help="how values become 0..255")
    parts = parser.add_argument_group("division")
    parts.add_argument("--val", type=float, default=10.0, metavar="PERCENT", help="of the cases with a mask; 10")
    parts.add_argument("--test", type=float, default=20.0, metavar="PERCENT", help="of the cases with a mask; 20")
    parts.add_argument(
        "--labelled",
        nargs="+",
        metavar="N",
        help="sizes of the label lists: per cent of the training cases, 8cases or 3groups; 5 10 20",
    )
    parts.add_argument("--group-regex", metavar="REGEX", help="what of a name tells the patient, such as '^(p[0-9]+)'")
    parts.add_argument("--groups", metavar="CSV", help="file that tells the patient of each image")
    parts.add_argument("--group-column", default="group", metavar="NAME", help="its column of patients; group")
    parts.add_argument("--id-column", default="id", metavar="NAME", help="its column of image names; id")
    parts.add_argument("--no-near-duplicates", action="store_true", help="keep only equal images on one side")
    parts.add_argument("--seed", type=int, default=0)
    parts.add_argument("--force", action="store_true", help="replace what is there")


@dataclass
class Study:
    """A user's folder, read and divided.

    Attributes:
        layout: where images and masks lie.
        intensity: how values become 0..255.
        survey: what can be used.
        labels, threshold, classes: as the experiment has them.
        groups: id -> patient; None: unknown.
        drawn: the lists.
        units: sets of cases that were kept together.
        notes: what was found and assumed, for people.
        warnings: what they should look into.
    """

    layout: "Layout"
    intensity: str
    survey: "Survey"
    labels: dict | None
    threshold: float | None
    classes: list[str]
    table: "LabelTable"
    groups: dict[str, str] | None
    drawn: "Drawn"
    notes: list[str]
    warnings: list[str]


def read_study(args: argparse.Namespace) -> Study:
    """Read images and masks, work out the classes, draw the lists. Nothing is written.

    Raises:
        NotFoundError, DataError, ConfigError: what keeps the folder from being used.
    """
    from knowsam.data.layout import find_layout
    from knowsam.data.make_splits import Amount, draw, tie_units
    from knowsam.data.survey import suggest_intensity, survey, without_strange_masks
    from knowsam.engine.log import Counter

    amounts = [Amount.parse(text) for text in args.labelled or DEFAULT_LABELLED]
    layout = find_layout(args.images, args.masks, image_suffix=args.image_suffix, mask_suffix=args.mask_suffix)
    intensity, why = (args.intensity, "") if args.intensity else _suggest(layout, suggest_intensity)
    with Counter("reading images and masks") as progress:
        found = survey(layout, intensity=intensity, progress=progress)
    notes = [_layout_note(layout, found)]
    if why:
        notes.append(f"intensity {intensity}, for ALL images, those of 8 bits too: {why}")
    labels, threshold, table, classes, reason = _classes(args, found)
    notes += [reason]
    found.cases, strange = without_strange_masks(found.cases, table)
    found.faults += strange
    looks = {case.id: case.look for case in found.cases}
    groups = _groups(args, looks)
    units, same, near = tie_units(looks, groups, near=not args.no_near_duplicates)
    masked = [case.id for case in found.cases if case.values is not None]
    drawn = draw(
        units,
        masked,
        val=args.val,
        test=args.test,
        labelled=amounts,
        seed=args.seed,
        skip_impossible=not args.labelled,  # nobody asked for the usual ones
    )
    notes += _duplicate_notes(same, near)
    warnings = [*drawn.warnings, *_warnings(layout, found, groups, units, drawn, table, classes)]
    return Study(layout, intensity, found, labels, threshold, classes, table, groups, drawn, notes, warnings)


def _suggest(layout: "Layout", suggest: Any) -> tuple[str, str]:
    return suggest(path for files in layout.image_files().values() for path in files)


def _layout_note(layout: "Layout", found: "Survey") -> str:
    masked = sum(case.values is not None for case in found.cases)
    note = f"{len(found.cases)} images that can be used in {layout.images}"
    if layout.image_suffix:
        note += f", called <case>{layout.image_suffix}"
    if layout.masks is None:
        return note + "; no masks were found"
    note += f"; {masked} have a mask in {layout.masks}"
    return note + (f", called <case>{layout.mask_suffix}" if layout.mask_suffix else "")


def _classes(args: argparse.Namespace, found: "Survey") -> tuple[Any, Any, "LabelTable", list[str], str]:
    """labels, threshold, table, names, and what to tell of them."""
    import yaml

    from knowsam.data.label_guess import guess_labels
    from knowsam.data.labels import LabelTable
    from knowsam.errors import ConfigError, DataError

    names = [name.strip() for name in args.classes.split(",")] if args.classes else []
    if names and ("" in names or len(set(names)) != len(names) or len(names) < 2 or "mean" in names):
        raise ConfigError(
            f"--classes {args.classes!r}; needed are 2 or more different names, background first, none of them 'mean'"
        )
    if args.labels:
        try:
            labels = yaml.safe_load(args.labels)
        except yaml.YAMLError as error:
            raise ConfigError(f"--labels {args.labels!r} is no YAML: {error}") from error
        if not isinstance(labels, dict):
            raise ConfigError(f"--labels {args.labels!r}; needed are classes and values, such as {{0: 0, 1: 255}}")
        if len(labels) < 2:
            raise ConfigError(f"--labels {args.labels!r} names {len(labels)} class; needed are 2 or more")
        threshold, count, reason = None, len(labels), "classes as given by --labels"
    else:
        try:
            masks = {case.id: case.values for case in found.cases if case.values is not None}
            guess = guess_labels(masks, len(names) or None)
        except DataError as error:
            reasons = [f"\n  {fault.text}" for fault in found.faults]
            more = [f"\n  ... and {len(reasons) - 10} more"] if len(reasons) > 10 else []
            raise DataError("".join([str(error), *reasons[:10], *more]), hint=error.hint) from error
        labels, threshold, count, reason = guess.labels, guess.threshold, guess.num_classes, guess.reason
    if names and len(names) != count:
        if args.labels or len(names) < count or labels is not None or threshold is not None:
            raise ConfigError(
                f"--classes names {len(names)} classes, but there are {count}: {reason}",
                hint="Name as many, or say with --labels which values belong to which class.",
            )
        count = len(names)  # class ids, of which the highest do not occur
    if not names:
        names = ["background", "foreground"] if count == 2 else ["background", *(f"class_{k}" for k in range(1, count))]
        reason += f"; called {', '.join(names)} for want of --classes"
    return labels, threshold, LabelTable(labels, count, threshold=threshold), names, reason


def _groups(args: argparse.Namespace, ids: Any) -> dict[str, str] | None:
    from knowsam.data.splits import group_of, read_groups
    from knowsam.errors import ConfigError, DataError

    if args.groups and args.group_regex:
        raise ConfigError("--groups and --group-regex exclude each other; give one of them")
    if args.group_regex:
        groups = {i: group_of(i, args.group_regex) for i in ids}
        by = f"by {args.group_regex!r}"
    elif args.groups:
        given = read_groups(args.groups, args.id_column, args.group_column)
        by_stem = {str(Path(i).with_suffix("")): group for i, group in given.items() if Path(i).suffix}
        groups = {i: given.get(i, by_stem.get(i)) for i in ids}
        by = f"in {args.groups}"
    else:
        return None
    if missing := [i for i, group in groups.items() if group is None]:
        shown = ", ".join(missing[:10]) + (", ..." if len(missing) > 10 else "")
        raise DataError(f"{len(missing)} of {len(groups)} images have no group {by}: {shown}")
    return groups


def _duplicate_notes(same: list[list[str]], near: list[tuple[str, str, float]]) -> list[str]:
    notes = []
    if same:
        shown = "; ".join(" = ".join(found) for found in same[:5]) + ("; ..." if len(same) > 5 else "")
        notes.append(f"{len(same)} set(s) of equal images, each kept on one side: {shown}")
    if near:
        shown = "; ".join(f"{a} ~ {b}" for a, b, _ in near[:5]) + ("; ..." if len(near) > 5 else "")
        notes.append(f"{len(near)} pair(s) of near duplicates, each kept on one side: {shown}")
    return notes


def _warnings(
    layout: "Layout",
    found: "Survey",
    groups: dict[str, str] | None,
    units: Any,
    drawn: "Drawn",
    table: "LabelTable",
    classes: list[str],
) -> list[str]:
    from knowsam.data.make_splits import ALL_MASKS
    from knowsam.data.readers import EXTENSIONS

    warnings = [fault.kind + ": " + fault.text for fault in found.faults]
    if others := layout.other_files():
        kinds = ", ".join(f"{n} {kind}" for kind, n in others.most_common(5))
        warnings.append(f"files of other kinds are passed over: {kinds}; read are {', '.join(EXTENSIONS)}")
    if found.orphans:
        shown = ", ".join(found.orphans[:5]) + (", ..." if len(found.orphans) > 5 else "")
        warnings.append(f"{len(found.orphans)} mask(s) have no image: {shown}")
    if drawn.left_out:
        warnings.append(
            f"{len(drawn.left_out)} image(s) without a mask are in no list, for val or test holds their group"
        )
    largest = max(units, key=len)
    if len(largest) > max(10, 0.1 * len(found.cases)) and (groups is None or len({groups[i] for i in largest}) > 1):
        warnings.append(
            f"near duplicates tie {len(largest)} of {len(found.cases)} images together; if they are no copies, "
            "--no-near-duplicates unties them"
        )
    if groups is None:
        warnings.append(
            "patients are unknown: images of one patient may be in train and in test. "
            "If names or a table tell them, give --group-regex or --groups"
        )
    label_lists = [name for name in drawn.lists if name.startswith("labelled_") and name != ALL_MASKS]
    for n, name in enumerate(label_lists):
        for other in label_lists[:n]:
            if drawn.lists[name] == drawn.lists[other]:
                warnings.append(f"{other} and {name} hold the same cases: there are too few to tell them apart")
    for name, ids in drawn.lists.items():
        if name in ("train", ALL_MASKS):
            continue
        if absent := absent_classes(found, ids, table):
            warnings.append(f"{name} holds no pixel of {', '.join(classes[k] for k in absent)}")
    return warnings


def absent_classes(found: "Survey", ids: list[str], table: "LabelTable") -> list[int]:
    """Classes of which no mask of these cases holds a pixel."""
    return [k for k, cases in enumerate(_pixels(found, ids, table)[0]) if not cases]


def _pixels(found: "Survey", ids: list[str], table: "LabelTable") -> tuple[list[int], list[float]]:
    """Cases that hold each class, and each class's share of all pixels."""
    import numpy as np

    from knowsam.data.survey import class_pixels

    wanted = set(ids)
    pixels = [class_pixels(c.values, table)[0] for c in found.cases if c.id in wanted and c.values is not None]
    counts = np.array(pixels) if pixels else np.zeros((0, table.num_classes))
    total = max(counts.sum(), 1)
    return (counts > 0).sum(axis=0).tolist(), (counts.sum(axis=0) / total).tolist()


def table_rows(study: Study) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table of lists."""
    head = ["list", "cases", *(["groups"] if study.groups else []), *(f"{name} %" for name in study.classes)]
    rows = []
    for name, ids in study.drawn.lists.items():
        row = [name, str(len(ids))]
        if study.groups:
            row.append(str(len({study.groups[i] for i in ids})))
        if name == "train":  # most of its masks are never used; their shares would say what training does not know
            row += ["-"] * len(study.classes)
        else:
            row += [f"{100 * share:.2f}" for share in _pixels(study.survey, ids, study.table)[1]]
        rows.append(row)
    return head, rows


def show(study: Study) -> None:
    """Print what was found, assumed and drawn."""
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from knowsam.engine.log import say, warn

    for note in study.notes:
        say(note)
    for warning in study.warnings:
        warn(warning)
    head, rows = table_rows(study)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for n, name in enumerate(head):
        table.add_column(escape(name), justify="left" if n == 0 else "right")
    for row in rows:
        table.add_row(*map(escape, row))
    Console(width=None if Console().is_terminal else 140, highlight=False).print(table)


def summary(study: Study, files: dict[str, str], words: str) -> str:
    """The text of ``summary.md``."""
    import hashlib

    import knowsam
    from knowsam.data.make_splits import lists_hash

    head, rows = table_rows(study)
    lines = [
        "# Split lists",
        "",
        f"Drawn by knowsam {knowsam.__version__} with",
        "",
        f"    {words}",
        "",
        "Ids only, sorted, one a line. `train.txt` holds every training case; the `labelled_*.txt` lists, each inside",
        "every larger one, name those whose masks may be used. Do not edit them after the first training.",
        "",
        "| " + " | ".join(head) + " |",
        "|---" * len(head) + "|",
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
        *(f"- {note}" for note in study.notes),
        *(f"- Warning: {warning}" for warning in study.warnings),
        "",
        f"sha256 of all lists: `{lists_hash(files)}`",
        "",
        *(f"- `{name}`: `{hashlib.sha256(text.encode()).hexdigest()}`" for name, text in sorted(files.items())),
    ]
    return "\n".join(lines) + "\n"


def command(name: str, args: argparse.Namespace) -> str:
    """The command that would do the same again, with every option that was given or has a default."""
    words = ["knowsam", name, *([args.name] if "name" in args else [])]
    for key, value in vars(args).items():
        option = f"--{key.replace('_', '-')}"
        if (
            value is None
            or value is False
            or key == "force"
            or (key in ("group_column", "id_column") and not args.groups)
        ):
            continue
        if key == "name":
            continue
        if value is True:
            words.append(option)
        else:
            words += [option, *map(_plain, value if isinstance(value, list) else [value])]
    return shlex.join(words)


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
