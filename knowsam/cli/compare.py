"""``knowsam compare``: statistics over runs, settings beside each other and against a baseline."""

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table as RichTable

    from knowsam.report.compare.comparison import Comparison
    from knowsam.report.table import Table

EPILOG = """examples:
  python tools/compare.py runs/sweeps/skd_ablation_small
  python tools/compare.py runs/quickstart/* --baseline method.name=supervised
  python tools/compare.py 'full=runs/b/knowsam_*' 'supervised=runs/b/supervised_*' --metric dice,hd95 -o comparison

Runs that differ only in train.seed are one setting: mean and sd are over its seeds. Tests are paired over cases,
against the baseline, Holm-corrected. docs/comparing.md explains every number.
exit codes: 0 done, 65 runs that must not stand in one table, 66 no run or no scores, 74 disk, 78 wrong arguments.
"""

METRICS = ("dice", "iou", "hd95", "asd", "nsd", "precision", "recall", "specificity")
ALLOWED = ("splits", "rules", "budget", "checkpoint")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command line."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument(
        "paths", nargs="+", metavar="PATH", help="run folders, also as NAME=FOLDER; or the folder of one sweep"
    )
    parser.add_argument("--baseline", metavar="NAME", help="setting to compare with; the sweep's, else the first")
    parser.add_argument("--output", metavar="NAME", help="such as fusion or sam; the deployed one if not given")
    parser.add_argument("--metric", action="extend", type=_list(METRICS), help="comma-separated, the main one first")
    parser.add_argument("--split", choices=("test", "val"), default="test")
    parser.add_argument(
        "--data",
        metavar="NAME",
        default="all",
        help="other data that the runs were scored on, comma-separated; all, or own for none (default: all)",
    )
    parser.add_argument(
        "--allow",
        action="extend",
        type=_list(ALLOWED),
        metavar="|".join(ALLOWED),
        help="what may differ between the runs, comma-separated",
    )
    parser.add_argument(
        "-o", "--out", metavar="FOLDER", help="for Markdown, LaTeX, CSV, HTML, plots; a sweep's is SWEEP/comparison"
    )


def _list(allowed: tuple[str, ...]) -> Callable[[str], list[str]]:
    """What reads a comma-separated argument, of which each part is one of ``allowed``."""

    def names(text: str) -> list[str]:
        found = [name.strip() for name in text.split(",") if name.strip()]
        wrong = [name for name in found if name not in allowed]
        if wrong or not found:
            raise argparse.ArgumentTypeError(f"got {text!r}; allowed, comma-separated: {', '.join(allowed)}")
        return found

    return names


def run(args: argparse.Namespace) -> int:
    """Read the runs, compute, show, and write where there is a place for it."""
    from knowsam.cli.reading import reader
    from knowsam.engine.log import say
    from knowsam.report.compare.collect import collect
    from knowsam.report.compare.comparison import compare
    from knowsam.report.compare.notes import messages
    from knowsam.report.compare.write import write

    others = {"all": None, "own": []}.get(args.data, [name.strip() for name in args.data.split(",") if name.strip()])
    found = collect(args.paths, reader(args.split), others)
    comparison = compare(
        found,
        baseline=args.baseline,
        output=args.output,
        metrics=list(dict.fromkeys(args.metric)) if args.metric else None,
        allow=set(args.allow or ()),
    )
    _print(comparison)
    for message in messages(found.absent):
        say(f"  {message}")
    folder = args.out or found.place
    if folder is None:
        say("-o FOLDER writes this as Markdown, LaTeX, CSV and HTML with plots")
    else:
        files = write(comparison, folder)
        say(f"written: {', '.join(str(file) for file in files[:4])}; {len(files) - 4} plots beside them")
    return 0


def _print(comparison: "Comparison") -> None:
    from rich.console import Console

    from knowsam.report.compare import tables
    from knowsam.report.compare.notes import notes
    from knowsam.report.compare.write import data_sets_of

    console = Console(width=None if Console().is_terminal else 140, highlight=False)
    for item in comparison.sets:
        if not item.rows:
            console.print(item.experiment, markup=False)
        else:
            for name in item.classes:
                console.print(_rich(tables.results(item, name)))
            console.print(_rich(tables.errors(item)))
        over = data_sets_of(comparison, item)
        if over is not None:
            console.print(_rich(over))
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
