"""``knowsam weights``: SAM's published checkpoints, fetched and verified."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from knowsam.pretrained import Pretrained

EPILOG = """examples:
  python tools/weights.py list
  python tools/weights.py fetch vit_b
  python tools/weights.py fetch vit_b --to /scratch/weights --url https://mirror.example.org/sam_vit_b_01ec64.pth
  python tools/weights.py verify
  python tools/weights.py verify /media/stick/sam_vit_b_01ec64.pth

Experiments look for weights/FILE below $KNOWSAM_DATA, then below data/ of the working folder and of the checkout; fetch
puts files into the first of these. What has come before a connection breaks is kept, and the same command goes on.
exit codes: 0 done or all good, 1 not loadable yet, 65 no file can be matched, 66 not found, 69 network, 74 disk,
78 configuration, 80 a file is not what it should be.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument("action", choices=("list", "fetch", "verify"), help="what to do")
    parser.add_argument("names", nargs="*", metavar="NAME|FILE", help="such as vit_b; with verify also files")
    parser.add_argument("--to", metavar="FOLDER", help="with fetch: where to put it")
    parser.add_argument("--url", help="with fetch: another address of the same file, such as a mirror")
    parser.add_argument("--json", action="store_true", help="with list: as JSON")


def run(args: argparse.Namespace) -> int:
    """List, fetch or verify."""
    from knowsam.errors import ConfigError

    for option, action in (("to", "fetch"), ("url", "fetch"), ("json", "list")):
        if getattr(args, option) and args.action != action:
            raise ConfigError(f"--{option} goes with {action}, not with {args.action}")
    return {"list": _list, "fetch": _fetch, "verify": _verify}[args.action](args)


def places() -> list[Path]:
    """Folders in which experiments look for weights, the one for new files first."""
    from knowsam.config import data_places

    return data_places("weights")


def _list(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    from knowsam.errors import ConfigError
    from knowsam.pretrained import WEIGHTS, find, megabytes

    if args.names:
        raise ConfigError(f"list takes no names, got {' '.join(args.names)}")
    rows = [(entry, find(entry, places())) for entry in WEIGHTS.values()]
    if args.json:
        print(json.dumps([_as_json(entry, path) for entry, path in rows], indent=2))
        return 0
    table = Table(box=None, pad_edge=False)
    for column in ("name", "file", "size", "licence", "here"):
        table.add_column(column, justify="right" if column == "size" else "left", overflow="fold")
    for entry, path in rows:
        here = str(path) if path else "no" if entry.loadable else f"not loadable yet: no encoder {entry.variant}"
        if path and path.stat().st_size != entry.size:
            here += " (wrong size)"
        table.add_row(entry.name, entry.file, megabytes(entry.size), entry.licence, here)
    console = Console(width=None if Console().is_terminal else 140, highlight=False)
    console.print(table)
    for entry, _ in rows:
        console.print(f"\n{entry.name}: {entry.project}\n  {entry.url}\n  sha256 {entry.sha256}", markup=False)
    console.print(f"\nlooked in {', '.join(str(place) for place in places())}", markup=False, soft_wrap=True)
    return 0


def _as_json(entry: "Pretrained", path: Path | None) -> dict[str, Any]:
    from dataclasses import asdict

    return {**asdict(entry), "loadable": entry.loadable, "path": str(path) if path else None}


def _fetch(args: argparse.Namespace) -> int:
    from knowsam.engine.log import Counter
    from knowsam.errors import ConfigError
    from knowsam.pretrained import fetch, megabytes, named, require_loadable

    if not args.names or (args.url and len(args.names) > 1):
        raise ConfigError("fetch takes names" if not args.names else "--url takes one name", hint="See weights list.")
    folder = Path(args.to) if args.to else places()[0]
    entries = [named(name) for name in args.names]
    for entry in entries:
        require_loadable(entry)
    for entry in entries:
        print(f"{entry.name}: {megabytes(entry.size)} from {args.url or entry.url}", flush=True)
        try:
            with Counter(f"{entry.file}, MB") as counter:
                new = fetch(entry, folder, url=args.url, progress=lambda a, b: counter(a // 10**6, b // 10**6))
        except KeyboardInterrupt:
            print("stopped; what has come is kept, the same command goes on from there")
            raise
        print(f"{folder / entry.file} is {'complete' if new else 'here already'}, its SHA-256 is right")
        if not any((place / entry.file).exists() for place in places()):
            print(f"experiments do not look there: set sam.weights={folder / entry.file}, or KNOWSAM_DATA")
    return 0


def _verify(args: argparse.Namespace) -> int:
    from knowsam.errors import KnowsamError, NotFoundError
    from knowsam.pretrained import WEIGHTS, find, verify

    if args.names:
        files = [_file(name) for name in args.names]
    else:
        files = [(entry, path) for entry in WEIGHTS.values() if (path := find(entry, places()))]
        if not files:
            looked = ", ".join(str(place) for place in places())
            raise NotFoundError(f"there are no weights; looked in {looked}", hint="knowsam weights fetch vit_b")
    code = 0
    for entry, path in files:
        try:
            verify(path, entry)
            print(f"good    {path} ({entry.name})", flush=True)
        except KnowsamError as error:
            print(f"wrong   {error}\n        {error.hint}", flush=True)
            code = code or error.exit_code
    return code


def _file(name: str) -> tuple["Pretrained", Path]:
    """A name of the list, or a file whose own name is one of the list's."""
    from knowsam.errors import DataError, NotFoundError
    from knowsam.pretrained import WEIGHTS, by_hand, find, named

    path = Path(name)
    if not path.exists() and path.name == name and not path.suffix:
        entry = named(name)
        found = find(entry, places())
        if found is None:
            looked = ", ".join(str(place) for place in places())
            raise NotFoundError(f"{entry.file} is not there; looked in {looked}", hint=by_hand(entry, places()[0]))
        return entry, found
    entries = {entry.file: entry for entry in WEIGHTS.values()}
    if path.name not in entries:
        raise DataError(f"{name}: a published file is called {', '.join(entries)}", hint="Give it its own name first.")
    return entries[path.name], path
