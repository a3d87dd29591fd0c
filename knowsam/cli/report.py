"""``knowsam report``: one page about a run, or several beside each other."""

import argparse
from pathlib import Path

EPILOG = """examples:
  python tools/report.py runs/quickstart/knowsam_labelled_10pct_seed0
  python tools/report.py runs/quickstart/* -o quickstart.html
  python tools/report.py 'ours=runs/b/knowsam_seed0' 'plain=runs/b/supervised_seed0' --cases 3 -o both.html
  python tools/report.py runs/a --pseudo-labels

One page that needs no other file and no network, and beside it the tables of scores (_tables.md, .tex, .csv). Pictures
need the data and the checkpoint; without them the page is made all the same and says what is missing. The page shows
images of the data set: think of whom you send it to, or use --cases 0. docs/reports.md explains every part.
exit codes: 0 done, 65 runs of different classes, 66 no such run, 74 cannot write, 78 wrong arguments.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command line."""
    from knowsam.cli.arguments import positive

    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder written by train, also as NAME=FOLDER")
    parser.add_argument("-o", "--out", metavar="PAGE.html", help="default: report.html, of a single run in its folder")
    parser.add_argument("--split", choices=("test", "val"), default="test", help="whose scores (default: test)")
    parser.add_argument("--output", metavar="NAME", help="such as fusion or sam; the deployed one if not given")
    parser.add_argument(
        "--cases", type=_count, default=3, metavar="N", help="pictures of best, median and worst each (default: 3)"
    )
    parser.add_argument(
        "--pseudo-labels",
        action="store_true",
        help="open masks of unlabelled training cases and score best.pt, last.pt and kept snapshots on them",
    )
    parser.add_argument(
        "--pseudo-masks",
        metavar="LIST",
        default="all",
        help="list of the cases that have masks (default: all of train)",
    )
    parser.add_argument(
        "--pseudo-cases", type=positive, default=100, metavar="N", help="of these at most (default: 100)"
    )
    parser.add_argument("--device", default="auto")


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 0, got {text!r}")
    return int(text)


def run(args: argparse.Namespace) -> int:
    """Read the runs, predict what is to be shown, write the page."""
    from knowsam.cli.reading import open_networks, reader
    from knowsam.engine.log import say, warn
    from knowsam.report.page.pictures import take_pictures
    from knowsam.report.page.pseudo_labels import score_pseudo_labels
    from knowsam.report.page.record import read_records
    from knowsam.report.page.write import check_path, default_path, main_outputs, write_page

    path = None if args.out is None else Path(args.out)
    if path is not None:
        check_path(path)
    records = read_records(args.runs, reader(args.split))
    outputs = main_outputs(records, args.output)
    pictures = take_pictures(records, outputs, args.cases, open_networks, device=args.device)
    for name in pictures.failed:
        warn(f"{name}: no pictures: {pictures.without[name]}")
    asked = records if args.pseudo_labels else []
    pseudo_labels = [
        score_pseudo_labels(record, open_networks, masks=args.pseudo_masks, most=args.pseudo_cases, device=args.device)
        for record in asked
    ]
    for found in pseudo_labels:
        if found.reason:
            warn(f"{found.run}: pseudo-labels are not measured: {found.reason}")
    page, *tables = write_page(path or default_path(records), records, outputs, pictures, pseudo_labels)
    say(f"written: {page}" + (f"; tables beside it: {', '.join(file.name for file in tables)}" if tables else ""))
    return 0
