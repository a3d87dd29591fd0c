"""``knowsam compare``: statistics over runs, settings beside each other and against a baseline."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table as RichTable

    from knowsam.report.comparison import Comparison
    from knowsam.report.tables import Table

EPILOG = """examples:
  python tools/compare.py runs/sweeps/skd_ablation_small
  python tools/compare.py runs/quickstart/* --baseline method.name=supervised
  python tools/compare.py 'full=runs/b/knowsam_*' 'supervised=runs/b/supervised_*' --metric dice,hd95 -o comparison

Runs that differ only in train.seed are one setting: mean and sd are over its seeds. Tests are paired over cases,
against the baseline, Holm-corrected. docs/comparing.md explains every number.
exit codes: 0 done, 65 runs that must not stand in one table, 66 no run or no scores, 74 disk, 78 wrong words.
"""

METRICS = ("dice", "iou", "hd95", "asd", "nsd")
ALLOWED = ("splits", "rules", "budget", "checkpoint")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Words of the command line."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument(
        "paths", nargs="+", metavar="PATH", help="run folders, also as NAME=FOLDER; or the folder of one sweep"
    )
    parser.add_argument("--baseline", metavar="NAME", help="setting to compare with; the sweep's, else the first")
    parser.add_argument("--output", metavar="NAME", help="such as fusion or sam; the deployed one if not given")
    parser.add_argument("--metric", action="append", type=_list(METRICS), help="comma-separated, the main one first")
    parser.add_argument("--split", choices=("test", "val"), default="test")
    parser.add_argument(
        "--allow",
        action="append",
        type=_list(ALLOWED),
        metavar="|".join(ALLOWED),
        help="what may differ between the runs, comma-separated",
    )
    parser.add_argument(
        "-o", "--out", metavar="FOLDER", help="for Markdown, LaTeX, CSV, HTML, plots; a sweep's is SWEEP/comparison"
    )


def _list(allowed: tuple[str, ...]) -> Any:
    def words(text: str) -> list[str]:
        found = [word.strip() for word in text.split(",") if word.strip()]
        wrong = [word for word in found if word not in allowed]
        if wrong or not found:
            raise argparse.ArgumentTypeError(f"got {text!r}; allowed, comma-separated: {', '.join(allowed)}")
        return found

    return words


def run(args: argparse.Namespace) -> int:
    """Read the runs, compute, show, and write where there is a place for it."""
    from knowsam.engine.log import say
    from knowsam.report.collect import TRIALS, collect
    from knowsam.report.comparison import compare
    from knowsam.report.notes import messages
    from knowsam.report.write import write

    found = collect(args.paths, reader(args.split))
    comparison = compare(
        found,
        baseline=args.baseline,
        output=args.output,
        metrics=list(dict.fromkeys(name for names in args.metric for name in names)) if args.metric else None,
        allow={name for names in args.allow or () for name in names},
    )
    _print(comparison)
    for message in messages(found.absent):
        say(f"  {message}")
    sweep = Path(args.paths[0])
    folder = args.out or (sweep / "comparison" if (sweep / TRIALS).is_file() else None)
    if folder is None:
        say("-o FOLDER writes this as Markdown, LaTeX, CSV and HTML with plots")
    else:
        files = write(comparison, folder)
        say(f"written: {', '.join(str(file) for file in files[:4])}; {len(files) - 4} plots beside them")
    return 0


def reader(split: str) -> Any:
    """A ``report.runs.Reader`` that knows the configuration: what its keys mean stays out of the report."""
    import yaml

    from knowsam.config import parse_config
    from knowsam.errors import ConfigError
    from knowsam.identity import COSMETIC, flat_config
    from knowsam.report.runs import Reader

    def flatten(text: str) -> dict[str, Any]:
        try:
            # Filled up with today's defaults: a key that did not exist when an older run was made is no difference.
            return flat_config(parse_config(text, "config.yaml"))
        except ConfigError:  # a method of one's own that is not installed here, say; its scores are good all the same
            try:
                return flat_config(text)
            except yaml.YAMLError as error:
                raise ValueError(str(error)) from error

    return Reader(split, flatten, frozenset(COSMETIC))


def _print(comparison: "Comparison") -> None:
    from rich.console import Console

    from knowsam.report import tables
    from knowsam.report.notes import notes

    console = Console(width=None if Console().is_terminal else 140, highlight=False)
    for item in comparison.sets:
        if not item.rows:
            console.print(item.experiment, markup=False)
        else:
            for name in item.classes:
                console.print(_rich(tables.results(item, name)))
        for note in notes(item):
            console.print(f"- {note}", markup=False)
        console.print()


def _rich(table: "Table") -> "RichTable":
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    shown = Table(title=escape(table.title), box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    shown.title_justify = "left"
    for i, name in enumerate(table.head):
        shown.add_column(escape(name), justify="left" if i < table.left else "right", overflow="fold")
    for i, row in enumerate(table.rows):
        shown.add_row(*(escape(text) for text in row), style="bold" if i in table.strong else "")
    return shown
