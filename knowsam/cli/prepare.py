"""``knowsam prepare``: a public data set as its official download comes in, lists and an experiment out."""

import argparse
from pathlib import Path

EPILOG = """examples:
  python tools/prepare.py kvasir kvasir-seg.zip --out studies
  python tools/prepare.py isic2018 downloads/isic --out studies        # a folder with the zip files
  python tools/prepare.py acdc ACDC.zip --out studies --recipe full
  python tools/prepare.py la "2018LA_Seg_Training Set" --out studies

Writes data_splits/ and experiments/NAME.yaml below --out, and what it unpacks or converts into data/NAME; pictures in a
folder are used where they lie. Nothing is downloaded. Give the same command again after a break: what is done stays.
exit codes: 0 done, 65 not the download or incomplete, 66 not found, 73 it exists already, 74 disk, 78 wrong arguments.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument("dataset", choices=("kvasir", "isic2018", "acdc", "busi", "la"))
    parser.add_argument("source", metavar="INPUT", help="the download: an archive (zip, tar), or a folder")
    parser.add_argument("--out", default=".", metavar="DIR", help="gets data/, data_splits/ and experiments/; here")
    parser.add_argument("--recipe", choices=("auto", "full", "small"), default="auto", help="as for init; auto")
    parser.add_argument("--seed", type=int, default=0, help="of lists that are drawn because none are published; 0")
    parser.add_argument("--allow-missing", action="store_true", help="go on without cases that published lists name")
    parser.add_argument("--force", action="store_true", help="replace an experiment and lists that are there")


def run(args: argparse.Namespace) -> int:
    """Unpack, convert, write; say what to do next."""
    from knowsam.cli.init import choose_recipe
    from knowsam.cli.study import plain_command, show
    from knowsam.engine.log import Counter, say, warn
    from knowsam.study.prepare import prepare

    recipe, why = choose_recipe(args.recipe)
    words = [args.dataset, args.source, "--out", args.out, "--recipe", recipe, "--seed", str(args.seed)]
    words += ["--allow-missing"] if args.allow_missing else []
    with Counter(f"preparing {args.dataset}") as progress:
        made = prepare(
            args.dataset,
            Path(args.source).expanduser(),
            Path(args.out).expanduser(),
            recipe=recipe,
            seed=args.seed,
            allow_missing=args.allow_missing,
            force=args.force,
            command=plain_command("prepare", words),
            progress=progress,
        )
    if made.study is not None:
        made.study.notes, made.study.warnings = made.notes, made.warnings
        show(made.study)
    else:
        for note in made.notes:
            say(note)
        for warning in made.warnings:
            warn(warning)
    say(f"recipe {recipe}: {why}")
    say(f"written: {made.experiment}; the lists are in {made.lists}")
    say(f"next:\n  knowsam check {made.experiment} --preview preview.png\n  knowsam train {made.experiment} --evaluate")
    return 0
