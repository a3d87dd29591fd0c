"""``knowsam report``: one page about a run, or several beside each other."""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from knowsam.config import Config
    from knowsam.report.overlays import Overlay
    from knowsam.report.pseudo import Moment, PseudoLabels
    from knowsam.report.record import Record
    from knowsam.report.run_page import Panel

EPILOG = """examples:
  python tools/report.py runs/quickstart/knowsam_labelled_10pct_seed0
  python tools/report.py runs/quickstart/* -o quickstart.html
  python tools/report.py 'ours=runs/b/knowsam_seed0' 'plain=runs/b/supervised_seed0' --cases 3 -o both.html
  python tools/report.py runs/a --pseudo-labels

One page that needs no other file and no network, and beside it the tables of scores (_tables.md, .tex, .csv). Pictures
need the data and the checkpoint; without them the page is made all the same and says what is missing. The page shows
images of the data set: think of whom you send it to, or use --cases 0. docs/reports.md explains every part.
exit codes: 0 done, 65 runs of different classes, 66 no such run, 74 cannot write, 78 wrong words.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Words of the command line."""
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
    from knowsam.cli.compare import reader
    from knowsam.engine.log import say, warn
    from knowsam.report.record import read_records
    from knowsam.report.run_page import Extras, check_path, main_outputs, plan_panels, write_page

    if args.out is not None:
        check_path(Path(args.out))
    records = read_records(args.runs, reader(args.split))
    path = Path(args.out or (Path(records[0].folder) / "report.html" if len(records) == 1 else "report.html"))
    outputs = main_outputs(records, args.output)
    panels = plan_panels(records, outputs, args.cases)
    overlays: dict[tuple[str, str], Overlay] = {}
    without: dict[str, str] = {}
    for record in records:
        wanted = [panel for panel in panels if panel.run == record.name]
        found, reason = _pictures(record, wanted, outputs, args)
        overlays |= {(record.name, case): overlay for case, overlay in found.items()}
        if reason:
            without[record.name] = reason
            if record.scores is not None and args.cases:
                warn(f"{record.name}: no pictures: {reason}")
    pseudo_labels = [_pseudo_labels(record, args) for record in records] if args.pseudo_labels else []
    for found in pseudo_labels:
        if found.reason:
            warn(f"{found.run}: pseudo-labels are not measured: {found.reason}")
    defaults = {record.name: _defaults(record.folder) for record in records}
    files = write_page(path, records, outputs, Extras(panels, overlays, without, pseudo_labels, defaults))
    say(f"written: {files[0]}" + (f"; tables beside it: {', '.join(f.name for f in files[1:])}" if files[1:] else ""))
    return 0


# ---------------------------------------------------------------- pictures


def _pictures(
    record: "Record", wanted: Sequence["Panel"], outputs: Mapping[str, str], args: argparse.Namespace
) -> tuple[dict[str, "Overlay"], str]:
    """Case -> what to draw; and why there is nothing, or an empty text."""
    from knowsam.errors import KnowsamError

    if record.scores is None:
        return {}, f"The run has {record.unscored.partition('. ')[0]}, by which cases would be chosen."
    if not args.cases:
        return {}, "None were asked for (--cases 0)."
    try:
        return dict(_overlays(record, [panel.case for panel in wanted], outputs[record.name], args)), ""
    except KnowsamError as error:
        from knowsam.report.record import without_places

        return {}, str(without_places(" ".join(str(error).split()))) + "."


def _overlays(
    record: "Record", cases: Sequence[str], output: str, args: argparse.Namespace
) -> Iterator[tuple[str, "Overlay"]]:
    """Predict the cases anew, by the code that evaluates, from the checkpoint that was scored."""
    from knowsam import build
    from knowsam.cli.loading import load_run
    from knowsam.engine import distributed
    from knowsam.engine.train import autocast_dtype
    from knowsam.errors import ConfigError, DataError
    from knowsam.inference.predict import predict_cases
    from knowsam.metrics.segmentation import case_metrics
    from knowsam.report.overlays import Overlay, telling_slice

    checkpoint = record.scores.checkpoint
    opened = load_run(record.folder, "last" if checkpoint and checkpoint["file"] == "last.pt" else "best", quiet=True)
    config = opened.config
    source = build.build_source(config)
    strangers = set(cases) - set(source.eval_ids(args.split))
    if strangers:
        raise DataError(f"the split list no longer has {sorted(strangers)[0]!r}, which was scored")
    device = distributed.setup(args.device).device
    method = opened.method.to(device)
    if output not in method.outputs():
        raise ConfigError(f"the networks have no output {output!r}, only {', '.join(method.outputs())}")
    names = config.data.classes[1:]
    predictions = predict_cases(
        method.predict,
        source,
        cases,
        image_size=config.data.image_size,
        batch_size=config.evaluate.batch_size,
        device=device,
        num_classes=source.num_classes,
        outputs=[output],
        autocast=autocast_dtype(config.train.precision),
    )
    for case, labels in predictions:
        image, truth, prediction, place = source.image(case), source.mask(case), labels[output], ""
        scored = case_metrics(prediction, truth, num_classes=source.num_classes, distances=False)
        spacing = source.spacing(case)
        if prediction.ndim == 3:
            z = telling_slice(truth, prediction)
            place = f"slice {z + 1} of {len(truth)}"
            image, truth, prediction = image[z], truth[z], prediction[z]
        yield (
            case,
            Overlay(
                image=image,
                truth=truth,
                prediction=prediction,
                place=place,
                spacing=None if spacing is None else (float(spacing[-2]), float(spacing[-1])),
                dice={
                    name: None if found.status == "empty_both" else found.dice
                    for name, found in zip(names, scored, strict=True)
                },
            ),
        )


# ---------------------------------------------------------------- pseudo-labels


def _pseudo_labels(record: "Record", args: argparse.Namespace) -> "PseudoLabels":
    """Score the run's checkpoints on unlabelled training cases; the only place that opens their masks."""
    from knowsam.errors import DataError, KnowsamError
    from knowsam.report.pseudo import PseudoLabels
    from knowsam.report.record import without_places

    try:
        return _scored_pseudo_labels(record, args)
    except KnowsamError as error:
        reason = str(without_places(" ".join(str(error).split()))).rstrip(".")
        if args.pseudo_masks == "all" and isinstance(error, DataError):
            reason += ". If only some unlabelled images have masks, name a list of those: --pseudo-masks labelled_max"
        return PseudoLabels(record.name, args.pseudo_masks, reason=f"{reason}.")


def _scored_pseudo_labels(record: "Record", args: argparse.Namespace) -> "PseudoLabels":
    from knowsam.cli.loading import load_run
    from knowsam.engine import distributed
    from knowsam.engine.checkpoint import load_checkpoint
    from knowsam.errors import CheckpointError, NotFoundError
    from knowsam.report.pseudo import Moment, PseudoLabels

    device = distributed.setup(args.device).device
    found: dict[int, Moment] = {}  # by step: the weights of one step are the same in every file
    opened = None
    for name in ("best", "last"):
        try:
            opened = load_run(record.folder, name, quiet=True)
        except NotFoundError:
            continue
        step = opened.step
        if step is None:
            raise CheckpointError(f"{opened.path} was converted: nothing is known of its training")
        if not found:
            source, cases = _unlabelled_with_masks(opened.config, args.pseudo_masks)
            chosen = [cases[i * len(cases) // args.pseudo_cases] for i in range(args.pseudo_cases)]
            chosen = chosen if len(cases) > args.pseudo_cases else cases
        method, config = opened.method.to(device), opened.config
        if step not in found:
            outputs = method.outputs()
            found[step] = _moment(opened.path.name, step, method.predict, outputs, source, chosen, config, device)
    if opened is None:
        raise NotFoundError("the run has neither best.pt nor last.pt")
    for path in sorted(opened.run.snapshots.glob("step_*.pt")):
        state = load_checkpoint(path, fall_back=False)
        step = state["step"]
        if step in found:
            continue
        try:
            method.inference_model().load_state_dict(state["deployed"])
        except RuntimeError as error:
            raise CheckpointError(f"{path} does not fit this version of the networks: {error}") from error
        file, outputs = f"snapshots/{path.name}", method.outputs()[:1]
        found[step] = _moment(file, step, method.predict_deployed, outputs, source, chosen, config, device)
    return PseudoLabels(record.name, args.pseudo_masks, len(cases), [found[step] for step in sorted(found)])


def _unlabelled_with_masks(config: "Config", masks: str) -> tuple[Any, list[str]]:
    """A source that may read the masks of a longer list, and the cases of it that the run had without."""
    from dataclasses import replace

    from knowsam import build
    from knowsam.errors import DataError

    known = set(build.build_source(config).labelled_ids())
    source = build.build_source(replace(config, data=replace(config.data, labelled=masks)))
    cases = [case for case in source.labelled_ids() if case not in known]
    if not cases:
        raise DataError(f"the list {masks!r} holds no case that was unlabelled in this run")
    return source, cases


def _moment(
    file: str,
    step: int,
    predict: Any,
    outputs: Sequence[str],
    source: Any,
    cases: Sequence[str],
    config: "Config",
    device: Any,
) -> "Moment":
    from knowsam.engine.evaluate import evaluate
    from knowsam.engine.log import Counter
    from knowsam.engine.train import autocast_dtype
    from knowsam.report.pseudo import Moment

    with Counter(f"scoring {file} on unlabelled cases") as progress:
        evaluation = evaluate(
            predict,
            source,
            "unlabelled",
            cases=cases,
            outputs=outputs,
            image_size=config.data.image_size,
            batch_size=config.evaluate.batch_size,
            device=device,
            class_names=config.data.classes[1:],
            distances=False,
            autocast=autocast_dtype(config.train.precision),
            progress=progress,
        )
    return Moment(file, step, evaluation)


# ---------------------------------------------------------------- defaults


def _defaults(folder: str) -> dict[str, Any]:
    """Dotted key -> default of this version, for everything that the run's configuration may set.

    Empty for a configuration that this version cannot read, such as one with a method that is not installed here.
    """
    from knowsam.config import Config, parse_config
    from knowsam.config.checking import default_settings
    from knowsam.engine.runfolder import RunFolder
    from knowsam.errors import ConfigError
    from knowsam.identity import flat_config

    path = RunFolder(folder, create=False).config
    try:
        config = parse_config(path.read_text(encoding="utf-8"), path)
        defaults = default_settings(config)
        # Where there usually is no such block (skd), writing it is a choice, whatever its options are.
        usually_absent = {key for key, value in flat_config(Config()).items() if value is None}
        chosen = {key for key in flat_config(config) if key.partition(".")[0] in usually_absent}
        return {key: value for key, value in defaults.items() if key not in chosen}
    except ConfigError:
        return {}
