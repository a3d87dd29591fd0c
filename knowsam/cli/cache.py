"""``knowsam cache``: what the decoded cache holds, whether it is whole, and what of it may go."""

import argparse
from typing import TYPE_CHECKING

from knowsam.cli.arguments import positive

if TYPE_CHECKING:
    from pathlib import Path

EPILOG = """examples:
  python tools/cache.py show
  python tools/cache.py verify                # reads everything; damaged parts are decoded anew when next used
  python tools/cache.py prune --unused-for 30 # lists that no training has opened for 30 days, and rows of no other list
  python tools/cache.py prune --all

The cache is $KNOWSAM_CACHE, else ~/.cache/knowsam, or --folder. Whatever goes is decoded anew when it is wanted.
exit codes: 0 done, 65 verify found damage (it is forgotten), 66 no such folder, 74 it cannot be written.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument("what", choices=("show", "verify", "prune"))
    parser.add_argument("--folder", metavar="DIR", help="the cache, if it is not the usual one")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--unused-for", type=positive, metavar="DAYS", help="of prune: lists not opened for so long")
    group.add_argument("--all", action="store_true", help="of prune: everything")


def run(args: argparse.Namespace) -> int:
    """Show, verify or prune."""
    from pathlib import Path

    from knowsam.data.cache import default_folder, lists, prune, shards, verify_shard
    from knowsam.engine.log import say
    from knowsam.errors import ConfigError, DataError, NotFoundError

    folder = Path(args.folder) if args.folder else default_folder()
    if not folder.is_dir():
        raise NotFoundError(f"there is no cache {folder}", hint="It is made by the first training.")
    if (args.unused_for or args.all) and args.what != "prune":
        raise ConfigError(f"--unused-for and --all belong to prune, not to {args.what}")
    if args.what == "show":
        return _show(folder)
    if args.what == "verify":
        broken = [file for file in shards(folder) if not verify_shard(file)]
        for file in broken:
            say(f"damaged, forgotten: {file}")
        say(f"{folder}: {len(shards(folder))} shards are whole, {len(broken)} were damaged")
        return DataError.exit_code if broken else 0
    if not (args.unused_for or args.all):
        raise ConfigError("prune needs to know what may go", hint="Say --unused-for DAYS, or --all.")
    before = len(lists(folder))
    freed = prune(folder, days=None if args.all else args.unused_for)
    say(f"{folder}: {before - len(lists(folder))} of {before} lists went, {freed / 1e6:.1f} MB are free again")
    return 0


def _show(folder: "Path") -> int:
    import time

    from rich.console import Console
    from rich.table import Table

    from knowsam.data.cache import lists, shards
    from knowsam.engine.log import say

    table = Table(title=f"lists in {folder}")
    for name in ("list", "cases", "masks", "MB", "first case", "last opened, days ago"):
        table.add_column(name, justify="right" if name in ("cases", "MB", "last opened, days ago") else "left")
    for found in lists(folder):
        days = (time.time() - found.folder.stat().st_mtime) / 86400
        size = found.images.nbytes + (found.masks.nbytes if found.masks is not None else 0)
        masks = "yes" if found.masks is not None else "no"
        table.add_row(found.folder.name, f"{len(found):,}", masks, f"{size / 1e6:.1f}", found.ids[0], f"{days:.1f}")
    Console().print(table)
    on_disk = sum(file.with_suffix(".rows").stat().st_size for file in shards(folder))
    say(f"{len(shards(folder))} shards hold {on_disk / 1e6:.1f} MB; lists that name the same case share its rows")
    return 0
