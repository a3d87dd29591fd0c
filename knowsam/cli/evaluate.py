"""``knowsam evaluate``: score finished runs case by case, and compare them."""

import argparse
from dataclasses import replace

from knowsam.cli.loading import add_checkpoint_argument

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
    parser.add_argument("--device", default="auto")


def run(args: argparse.Namespace) -> int:
    """Evaluate each run; compare when there are several."""
    from rich.console import Console

    from knowsam.engine.score_tables import comparison_table, score_table

    console = Console(width=None if Console().is_terminal else 140)
    results = {}
    for folder in args.runs:
        evaluation = evaluate_run(folder, args)
        results[folder] = evaluation
        console.print(score_table(evaluation))
    if len(results) > 1:
        console.print(comparison_table(results))
    return 0


def evaluate_run(folder: str, args: argparse.Namespace):
    """Load a run's checkpoint, score it, write the files; returns the ``Evaluation``."""
    from knowsam import build
    from knowsam.cli.loading import load_run
    from knowsam.config import load_config
    from knowsam.engine import distributed
    from knowsam.engine.evaluate import evaluate
    from knowsam.engine.log import Counter
    from knowsam.engine.train import autocast_dtype
    from knowsam.errors import ConfigError

    loaded = load_run(folder, args.checkpoint)
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
    with Counter(f"scoring {args.split}") as progress:
        evaluation = evaluate(
            method.predict,
            build.build_source(data_config),
            args.split,
            outputs=outputs,
            image_size=config.data.image_size,
            batch_size=config.evaluate.batch_size,
            device=device,
            class_names=config.data.classes[1:],
            nsd_tolerance=config.evaluate.nsd_tolerance,
            empty=args.empty,
            autocast=autocast_dtype(config.train.precision),
            progress=progress,
        )
    evaluation = replace(evaluation, checkpoint=loaded.origin())
    stem = args.split if not args.dataset else f"{data_config.name}_{args.split}"
    evaluation.write(loaded.run.evaluation, stem)
    return evaluation


def score_if_new(folder: str, device: str) -> None:
    """Score the best checkpoint on test and show the table, unless that was done since the checkpoint was written."""
    from rich.console import Console

    from knowsam.engine.log import say
    from knowsam.engine.runfolder import RunFolder
    from knowsam.engine.score_tables import score_table

    run = RunFolder(folder, create=False)
    scores = run.evaluation / "test.json"
    if scores.exists() and run.best.exists() and scores.stat().st_mtime_ns >= run.best.stat().st_mtime_ns:
        say(f"{run} is scored already: {scores}")
        return
    defaults = argparse.ArgumentParser()
    add_arguments(defaults)
    evaluation = evaluate_run(folder, defaults.parse_args([folder, "--device", device]))
    Console(width=None if Console().is_terminal else 140).print(score_table(evaluation))
