"""``knowsam check``: everything that is wrong with an experiment's data, before anything is trained."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from knowsam.config import Config
    from knowsam.data.check import Findings
    from knowsam.data.source import Source

EPILOG = """examples:
  python tools/check_data.py experiments/my_study.yaml
  python tools/check_data.py experiments/my_study.yaml --json check.json --preview preview.png
  python tools/check_data.py experiments/my_study.yaml data.labelled=labelled_5pct --quick

Reads every image, and every mask of labelled, val and test cases; masks of unlabelled cases are never opened.
--quick is what train does first: lists, files, and equal images in two splits as far as known without decoding.
exit codes: 0 fit to train on, 65 errors were found, 66 not found, 74 disk, 78 configuration.
"""

_SHOWN = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument("experiment", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted keys, such as data.labelled=all")
    parser.add_argument("--quick", action="store_true", help="only what training checks before it begins")
    parser.add_argument("--json", metavar="FILE", help="also write all findings as JSON")
    parser.add_argument("--preview", metavar="FILE", help="also draw images, masks and augmented views as PNG")
    parser.add_argument("--no-near-duplicates", action="store_true", help="look for equal images only")
    parser.add_argument("--all", action="store_true", help=f"print every finding, not {_SHOWN} of a kind")


def run(args: argparse.Namespace) -> int:
    """Check, report; 65 if there are errors."""
    from knowsam import build
    from knowsam.config import load_config
    from knowsam.data.check import check_all, check_quick
    from knowsam.engine.log import Counter, say
    from knowsam.errors import ConfigError, DataError

    config = load_config(args.experiment, args.overrides)
    if args.quick and (args.json or args.preview):
        raise ConfigError("--quick writes no files", hint="Leave out --quick, or --json and --preview.")
    if args.quick:
        check_quick(build.build_source(config), config.data.cache)
        say(f"{config.name}: nothing wrong was found; without --quick every file is read")
        return 0
    with Counter("checking cases") as progress:
        found, source = check_all(
            lambda splits: build.build_source(config, splits),
            build.inspect_splits(config),
            num_classes=config.num_classes,
            class_names=config.data.classes,
            near=not args.no_near_duplicates,
            cache_folder=config.data.cache,
            progress=progress,
        )
    _print(config, found, None if args.all else _SHOWN)
    if args.json:
        report = {"experiment": config.name, **found.to_dict(config.data.classes)}
        _write(args.json, json.dumps(report, indent=2).encode() + b"\n")
        say(f"all findings: {args.json}")
    if args.preview:
        if source is None:
            say("no preview: the data cannot be read")
        else:
            try:
                _write(args.preview, _preview(config, source, found))
                say(f"preview: {args.preview}")
            except DataError as error:
                say(f"no preview: {error}")
    counts = f"{_number(len(found.errors), 'error')}, {_number(len(found.warnings), 'warning')}"
    if found.errors:
        say(f"{config.name}: {counts}; mend the errors before training")
        return DataError.exit_code
    say(
        f"{config.name}: {counts}; fit to train on: knowsam train {args.experiment} {' '.join(args.overrides)}".rstrip()
    )
    return 0


def _preview(config: "Config", source: "Source", found: "Findings") -> bytes:
    from knowsam import build
    from knowsam.data.preview import preview_cases

    return preview_cases(
        source,
        found,
        build.build_augmenter(config),
        image_size=config.data.image_size,
        fit=config.data.fit,
        class_names=config.data.classes,
        seed=config.train.seed,
    )


def _print(config: "Config", found: "Findings", most: int | None) -> None:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from knowsam.engine.log import say

    sizes = ""
    if found.sizes:
        sizes = "; images of " + " to ".join(f"{h} x {w}" for h, w in dict.fromkeys(found.sizes)) + " (height x width)"
    counts = ", ".join(f"{n} {name}" for name, n in found.cases.items())
    say(f"{config.name}: {counts or 'the data cannot be read'}{sizes}")
    for title, faults in (("error", found.errors), ("warning", found.warnings)):
        for kind in dict.fromkeys(fault.kind for fault in faults):
            those = [fault for fault in faults if fault.kind == kind]
            say(f"\n{title}: {kind} ({len(those)})")
            for fault in those[:most]:
                say("  " + fault.text.replace("\n", "\n    "))
            if most is not None and len(those) > most:
                say(f"  ... and {len(those) - most} more; --all prints them, --json writes them")
    if not found.classes:
        return
    table = Table(title="\nmasks that may be read", box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left")
    table.add_column("list")
    for column in ("masks", "empty"):
        table.add_column(column, justify="right")
    ignored = any(counted.ignored for counted in found.classes.values())
    if ignored:
        table.add_column("ignored\n% of pixels", justify="right")
    for name in config.data.classes:
        table.add_column(f"{escape(name)}\n% of pixels", justify="right")
        table.add_column("\ncases", justify="right")
    for name, counted in found.classes.items():
        row = [name, str(counted.cases), str(len(counted.empty))]
        row += [f"{100 * counted.ignored_share:.2f}"] if ignored else []
        for share, cases in zip(counted.shares, counted.present, strict=True):
            row += [f"{100 * share:.2f}", str(cases)]
        table.add_row(*row)
    Console(width=None if Console().is_terminal else 140, highlight=False).print(table)


def _write(path: str, data: bytes) -> None:
    from knowsam.data.make_splits import make_folder
    from knowsam.files import write_bytes

    file = Path(path)
    make_folder(file.parent)
    write_bytes(file, data)


def _number(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"
