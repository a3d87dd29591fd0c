"""``knowsam score``: score masks that another tool wrote, by the rules by which runs are scored."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from knowsam.cli.evaluate import _tolerance

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np

    from knowsam.config import Config
    from knowsam.data.source import Source
    from knowsam.inference.masks import Found

EPILOG = """examples:
  python tools/score.py nnunet_out --experiment experiments/my_study.yaml
  python tools/score.py nnunet_out --experiment experiments/my_study.yaml --name nnunet --values ids -o runs/nnunet
  python tools/compare.py runs/my_study/* --baseline nnunet

A mask belongs to the case whose id is its path below MASKS without extension, or the last part of its id. Its values
are those of the experiment's own masks (data.labels), or class ids with --values ids. Writes a folder that compare
and report read as a run's. docs/metrics.md explains every number.
exit codes: 0 done, 65 missing or unfit masks, 66 no such folder, 73 folder holds a training, 74 disk, 78 configuration.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Words of the command line."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument("masks", metavar="FOLDER", help="folder of the masks, one file a case")
    parser.add_argument("--experiment", required=True, metavar="EXPERIMENT.yaml", help="whose data and split lists")
    parser.add_argument("--split", choices=("val", "test"), default="test")
    parser.add_argument("--name", help="of the tool, by which tables call it; the folder's if not given")
    parser.add_argument("--suffix", default="", metavar="TEXT", help="what names of masks have after the id, as _pred")
    parser.add_argument(
        "--values",
        choices=("data", "ids"),
        default="data",
        help="as in the experiment's own masks, or class ids 0, 1, ..",
    )
    parser.add_argument("--empty", choices=("exclude", "include"), default="exclude", help="cases empty on both sides")
    parser.add_argument("--nsd-tolerance", type=_tolerance, metavar="MM", help="the experiment's if not given")
    parser.add_argument("--by", metavar="WHAT", help="scores by subgroup, as of evaluate")
    parser.add_argument("-o", "--out", metavar="FOLDER", help="default: runs/<experiment>/<name>")


def run(args: argparse.Namespace) -> int:
    """Find the masks, score them, write the folder."""
    from dataclasses import replace

    from rich.console import Console

    from knowsam import build
    from knowsam.cli.evaluate import grouped, show
    from knowsam.cli.scored import write_scored
    from knowsam.config import load_config
    from knowsam.engine.evaluate import score
    from knowsam.engine.log import Counter, say, warn
    from knowsam.engine.subgroups import near_duplicates
    from knowsam.inference.masks import find_masks

    config = load_config(args.experiment)
    source = build.build_source(config)
    cases = source.eval_ids(args.split)
    name = args.name or Path(args.masks).resolve().name
    found = find_masks(args.masks, cases, suffix=args.suffix)
    _refuse_missing(found, args, len(cases))
    if found.strangers:
        shown = ", ".join(found.strangers[:3]) + (", ..." if len(found.strangers) > 3 else "")
        many = "1 file of" if len(found.strangers) == 1 else f"{len(found.strangers)} files of"
        warn(f"passed over, as their names are no {args.split} cases: {many} {args.masks}: {shown}")
    groups, by = grouped(args.by, source, cases)
    tolerance = config.evaluate.nsd_tolerance if args.nsd_tolerance is None else args.nsd_tolerance
    with Counter(f"scoring {args.split}") as progress:
        evaluation = score(
            _predictions(found, cases, source, config, args.values, name),
            source,
            cases,
            args.split,
            class_names=config.data.classes[1:],
            nsd_tolerance=tolerance,
            empty=args.empty,
            progress=progress,
        )
    checkpoint = {"kind": "masks", "file": f"masks of {name}", "step": None, "outputs": [name]}
    checkpoint |= {"chosen_by": "unknown, they were scored as they are", "split": None, "value": None}
    evaluation = replace(evaluation, checkpoint=checkpoint, groups=groups or None, grouped_by=by)
    evaluation = replace(evaluation, near_duplicates=near_duplicates(source, cases) or None)
    out = Path(args.out) if args.out else Path("runs") / config.name / name
    splits = {
        "labelled": source.labelled_ids(),
        "train_cases": len(source.train_ids()),
        "source": repr(source),
        "sha256": dict(getattr(getattr(source, "splits", None), "sha256", {})),
    }
    write_scored(out, config, name, splits, evaluation, args.split)
    show(evaluation, Console(width=None if Console().is_terminal else 140))
    say(f"written: {out}; compare takes it as a run: knowsam compare {out} RUN ...")
    return 0


def _refuse_missing(found: "Found", args: argparse.Namespace, count: int) -> None:
    from knowsam.errors import DataError

    if not found.missing:
        return
    shown = ", ".join(found.missing[:5]) + (", ..." if len(found.missing) > 5 else "")
    there = ", ".join(found.strangers[:3])
    hint = f"Names there: {there}. " if there else "The folder holds no mask of a known kind. "
    raise DataError(
        f"{len(found.missing)} of {count} {args.split} cases have no mask in {args.masks}: {shown}",
        hint=hint + "A mask's name without extension is the id of its case; --suffix says what it has after it.",
    )


def _predictions(
    found: "Found", cases: "list[str]", source: "Source", config: "Config", values: str, output: str
) -> "Iterator[tuple[str, dict[str, np.ndarray]]]":
    """(case, class ids by the tool's name), read as they are needed."""
    from dataclasses import replace

    from knowsam import build
    from knowsam.data.labels import LabelTable
    from knowsam.errors import DataError
    from knowsam.inference.masks import read_raw

    data, reading = config.data, build.reading(config)
    if values == "data":
        # without data.ignore: "nobody knows" is an answer of annotators, not of a tool
        table = LabelTable(data.labels, config.num_classes, threshold=data.label_threshold)
    else:
        table = LabelTable(None, config.num_classes)
        reading = replace(reading, palette="auto")  # the experiment's palettes say nothing about these files
    for case in cases:
        raw = read_raw(found.paths[case], reading)
        try:
            labels = table.apply(raw, where=str(found.paths[case]))
        except DataError as error:
            other = "ids" if values == "data" else "data"
            raise DataError(str(error), hint=f"{error.hint}; or try --values {other}") from error
        truth = source.mask(case)
        if labels.ndim == 3 and truth.ndim == 2 and labels.shape[0] == 1:
            labels = labels[0]  # a volume of one slice
        if labels.shape != truth.shape:
            raise DataError(
                f"{found.paths[case]} is {labels.shape}, the mask of case {case} is {truth.shape}",
                hint="Bring the masks to the size of the originals; nothing is resized here.",
            )
        yield case, {output: labels}
