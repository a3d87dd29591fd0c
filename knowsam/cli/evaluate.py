"""``knowsam evaluate``: score finished runs case by case, and compare them."""

import argparse
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from knowsam.cli.arguments import add_checkpoint_argument

if TYPE_CHECKING:
    from knowsam.config import Config
    from knowsam.data.source import Source
    from knowsam.engine.scores import Evaluation
    from knowsam.runs import LoadedRun

EPILOG = """examples:
  python tools/evaluate.py runs/quickstart/knowsam_labelled_10pct_seed0
  python tools/evaluate.py runs/a runs/b --split val
  python tools/evaluate.py runs/kvasir --dataset experiments/base/polyp_external.yaml

Writes evaluation/<split>_cases.csv, _summary.csv and .json into each run folder; several runs are also compared.
exit codes: 0 done, 65 bad data, 66 no such run, 74 disk, 78 configuration, 80 checkpoint.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Words of the command line."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder written by train")
    parser.add_argument("--split", choices=("val", "test"), default="test")
    add_checkpoint_argument(parser)
    parser.add_argument("--outputs", help="comma-separated, such as fusion,sam; all if not given")
    parser.add_argument("--dataset", metavar="YAML", help="score on the data of another experiment (same classes)")
    parser.add_argument("--empty", choices=("exclude", "include"), default="exclude", help="cases empty on both sides")
    parser.add_argument(
        "--nsd-tolerance", type=_tolerance, metavar="MM", help="mm, or pixels without a spacing; the run's if not given"
    )
    parser.add_argument("--device", default="auto")


def _tolerance(word: str) -> float:
    value = float(word)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{word} is not allowed; give a number of at least 0")
    return value


def run(args: argparse.Namespace) -> int:
    """Evaluate each run; compare when there are several."""
    from rich.console import Console

    from knowsam.engine.runfolder import RunFolder
    from knowsam.engine.score_tables import comparison_table, score_table

    for folder in args.runs:
        RunFolder(folder, create=False)  # a wrong name is told before the others are scored
    console = Console(width=None if Console().is_terminal else 140)
    results = {}
    for folder in args.runs:
        evaluation = evaluate_run(folder, args)
        results[folder] = evaluation
        console.print(score_table(evaluation))
    if len(results) > 1:
        console.print(comparison_table(results))
    return 0


def evaluate_run(folder: str, args: argparse.Namespace) -> "Evaluation":
    """Load a run's checkpoint, score it and write the files."""
    from knowsam import build
    from knowsam.config import load_config
    from knowsam.engine import distributed
    from knowsam.engine.evaluate import evaluate
    from knowsam.engine.log import Counter
    from knowsam.engine.precision import autocast_dtype
    from knowsam.errors import ConfigError
    from knowsam.runs import load_run

    loaded = load_run(folder, args.checkpoint, sam=True, quiet=False)
    config, method = loaded.config, loaded.method
    data_config = load_config(args.dataset) if args.dataset else config
    if data_config.data.classes != config.data.classes:
        raise ConfigError(f"{args.dataset} has classes {data_config.data.classes}, the run has {config.data.classes}")
    device = distributed.setup(args.device).device
    method.to(device)
    outputs = args.outputs.split(",") if args.outputs else method.outputs()
    unknown = sorted(set(outputs) - set(method.outputs()))
    if unknown:
        raise ConfigError(f"no output {', '.join(unknown)}; the method has {', '.join(method.outputs())}")
    source = build.build_source(data_config)
    _refuse_training_cases(loaded, data_config, source, args.split)
    tolerance = config.evaluate.nsd_tolerance if args.nsd_tolerance is None else args.nsd_tolerance
    with Counter(f"scoring {args.split}") as progress:
        evaluation = evaluate(
            method.predict,
            source,
            args.split,
            outputs=outputs,
            image_size=config.data.image_size,
            batch_size=config.evaluate.batch_size,
            device=device,
            class_names=config.data.classes[1:],
            nsd_tolerance=tolerance,
            empty=args.empty,
            autocast=autocast_dtype(config.train.precision),
            progress=progress,
        )
    evaluation = replace(evaluation, checkpoint=loaded.origin())
    stem = args.split if not args.dataset else f"{data_config.name}_{args.split}"
    evaluation.write(loaded.run.evaluation, stem)
    return evaluation


def _refuse_training_cases(loaded: "LoadedRun", data_config: "Config", source: "Source", split: str) -> None:
    """The lists may have been drawn anew since the run was trained: what it has seen tells nothing on any split."""
    from knowsam.data.splits import group_of
    from knowsam.engine.log import warn
    from knowsam.errors import DataError

    if data_config.data.source != loaded.config.data.source:
        return  # in other data an equal id is another case
    run, regex = loaded.run, data_config.data.group_regex
    record = run.read_json(run.splits)
    cases = source.eval_ids(split)

    def patient(case_id: str) -> str:
        return (regex and group_of(case_id, regex)) or case_id

    seen = {patient(case_id) for name in ("train", "labelled") for case_id in record.get(name) or ()}
    trained = [case_id for case_id in cases if patient(case_id) in seen]
    if trained:
        raise DataError(
            f"{len(trained)} of the {len(cases)} {split} cases, {trained[0]!r} for one, were training cases of {run}: "
            "the split lists have changed since",
            hint="Score it on the lists that it was trained with, or train anew with these.",
        )
    before, now = (record.get("sha256") or {}), getattr(getattr(source, "splits", None), "sha256", {})
    name = f"{split}.txt"
    if name in before and before[name] != now.get(name):
        warn(f"{name} has changed since {run} was trained; none of its cases was trained on")


def score_if_new(folder: str, device: str, nsd_tolerance: float) -> None:
    """Score the best checkpoint on test and show the table, unless just that was done already."""
    from rich.console import Console

    from knowsam.engine.log import say
    from knowsam.engine.runfolder import RunFolder
    from knowsam.engine.score_tables import score_table

    run = RunFolder(folder, create=False)
    scores = run.evaluation / "test.json"
    newer = scores.exists() and run.best.exists() and scores.stat().st_mtime_ns >= run.best.stat().st_mtime_ns
    if newer and _is_whole(run.read_json(scores), nsd_tolerance):
        say(f"{run} is scored already: {scores}")
        return
    defaults = argparse.ArgumentParser()
    add_arguments(defaults)
    words = [folder, "--device", device, "--nsd-tolerance", str(nsd_tolerance)]
    evaluation = evaluate_run(folder, defaults.parse_args(words))
    Console(width=None if Console().is_terminal else 140).print(score_table(evaluation))


def _is_whole(scores: dict[str, Any], nsd_tolerance: float) -> bool:
    """Whether these are the scores that ``evaluate`` gives with no other option than this tolerance."""
    checkpoint = scores.get("checkpoint") or {}
    return (
        checkpoint.get("file") == "best.pt"
        and scores.get("outputs") == checkpoint.get("outputs")
        and scores.get("empty") == "exclude"
        and scores.get("nsd_tolerance") == nsd_tolerance
    )
