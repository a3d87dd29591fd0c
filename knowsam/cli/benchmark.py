"""``knowsam benchmark``: how fast this package is on this machine, and how near to the machine's limit."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knowsam.cli.arguments import positive

if TYPE_CHECKING:
    from knowsam.benchmark.worker import Subject
    from knowsam.benchmark.workload import Workload
    from knowsam.config import Config
    from knowsam.methods.base import SSLMethod

EPILOG = """examples:
  python tools/benchmark.py step --threads 2                                   # plain baseline, float32, bf16
  python tools/benchmark.py step --compare data.labelled_batch=4 --compare sam.encoder.checkpointing=true
  python tools/benchmark.py parts data inference prediction startup processes
  python tools/benchmark.py step --experiment experiments/quickstart.yaml --device cuda

Steps are compared in pairs: one of each in turn, in processes of their own; ratios are medians over the pairs with the
smallest and the largest. Nothing else should run meanwhile; where something does, trust the column of CPU seconds.
exit codes: 0 done, 78 configuration, 70 a measured process failed.
"""

SUITES = ("step", "parts", "data", "inference", "prediction", "startup", "processes")
# Batch 4 of the published setting; SAM is frozen but for its adapters, as official weights are (values do not matter).
STEP = (
    "sam.weights=null",
    "sam.train=[tuning,prompt]",
    "data.labelled_batch=2",
    "data.unlabelled_batch=2",
)
MIX = "method.mix.start=0.0"
"""A method that mixes does so in every step that is measured."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"{', '.join(SUITES)}; all if none is given")
    parser.add_argument("--experiment", default="experiments/kvasir_10pct.yaml", metavar="YAML")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="for every subject; repeatable")
    parser.add_argument(
        "--compare",
        action="append",
        metavar="'KEY=VALUE ...'",
        help="a subject beside the first; 'plain' is the baseline on segment-anything's own computations; repeatable",
    )
    parser.add_argument("--first", default="plain", metavar="'KEY=VALUE ...'", help="what the others are compared with")
    parser.add_argument("--repeats", type=positive, default=5)
    parser.add_argument("--threads", type=positive, help="of torch; all cores if not given")
    parser.add_argument("--images", type=positive, default=200, help="of the suite prediction")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", metavar="FILE", help="write all numbers there, too")


def run(args: argparse.Namespace) -> int:
    """Measure and show."""
    import torch

    from knowsam.benchmark import show, suites, use
    from knowsam.benchmark.machine import ceilings, describe
    from knowsam.config import load_config
    from knowsam.engine import distributed
    from knowsam.engine.log import say
    from knowsam.engine.memory import keep_freed_memory
    from knowsam.errors import ConfigError
    from knowsam.files import write_text

    wanted = args.suites or list(SUITES)
    if unknown := [name for name in wanted if name not in SUITES]:
        raise ConfigError(f"no suite {unknown[0]!r}; there are {', '.join(SUITES)}")
    device = distributed.setup(args.device).device
    if args.threads:
        torch.set_num_threads(args.threads)
    threads = torch.get_num_threads()

    def overrides(*own: str) -> list[str]:
        given = [*args.set, f"train.device={device.type}", *own]
        config = load_config(args.experiment, [*STEP, *given])  # a typo is refused here rather than by a process
        return [*STEP, *([MIX] if mixes(config) else []), *given]

    def experiment(*own: str) -> "Workload":
        return workload(load_config(args.experiment, overrides(*own)))

    measured = experiment()
    keep_freed_memory()
    results: dict[str, Any] = {"machine": describe(device), "ceilings": ceilings(device)}
    say(show.machine(results["machine"], results["ceilings"]))

    def subject(text: str, processes: int = 1) -> "Subject":
        from knowsam.benchmark.worker import Subject

        plain = text.split()[:1] == ["plain"]
        own = text.split()[1:] if plain else text.split()
        if plain and not any(word.startswith("train.precision=") for word in own):
            own.append("train.precision=fp32")
        return Subject(text, args.experiment, tuple(overrides(*own)), plain, max(1, threads // processes), processes)

    if "step" in wanted:
        compared = args.compare or ["train.precision=fp32", "train.precision=bf16"]
        results["step"] = suites.steps(
            [subject(args.first), *map(subject, compared)], workload_of, repeats=args.repeats, progress=say
        )
        say(show.steps(results["step"], results["ceilings"]))
    if "parts" in wanted:
        for precision in ("fp32", "bf16"):
            at = experiment(f"train.precision={precision}")
            results[f"parts_{precision}"] = suites.parts(at, device, repeats=args.repeats)
            say(show.parts(results[f"parts_{precision}"], results["ceilings"][precision], precision))
    if "data" in wanted:
        results["data"] = suites.data(measured, device)
        say(show.data(results["data"], results.get("step")))
    if "inference" in wanted:
        results["inference"] = use.inference(measured, device, repeats=args.repeats)
        say(show.inference(results["inference"]))
    if "prediction" in wanted:
        results["prediction"] = use.prediction(
            measured, device, repeats=args.repeats, images=args.images, batch_size=8, progress=say
        )
        say(show.prediction(results["prediction"], args.images))
    if "startup" in wanted:
        results["startup"] = suites.startup(repeats=args.repeats)
        say(show.startup(results["startup"]))
    if "processes" in wanted:
        bf16 = "train.precision=bf16"
        results["processes"] = suites.steps(
            # the same cores, shared by two
            [subject(bf16), subject(bf16, 2), subject(f"{bf16} train.gradient_exchange=bf16", 2)],
            workload_of,
            repeats=args.repeats,
            flops=False,
            progress=say,
        )
        say(show.processes(results["processes"]))
    if args.json:
        write_text(Path(args.json), json.dumps(results, indent=2, default=asdict) + "\n")
        say(f"written: {args.json}")
    return 0


def mixes(config: "Config") -> bool:
    """Whether the method exchanges parts of images, as options ``mix`` say."""
    from knowsam import components
    from knowsam.config import component

    takes = components.signature(component(components.METHODS, config.method))
    return "mix" in takes and config.method.get("mix", {}) is not None


def workload_of(subject: "Subject") -> "Workload":
    """What a subject trains; called in its own process."""
    from knowsam.config import load_config

    return workload(load_config(subject.experiment, list(subject.overrides)))


def workload(config: "Config") -> "Workload":
    """An experiment as what is measured of it."""
    from functools import partial

    from knowsam import build
    from knowsam.benchmark.workload import Workload

    def make_method(*, sam: bool = True) -> "SSLMethod":
        return build.build_method(config, sam=sam).method

    return Workload(
        make_method,
        partial(build.build_optimizers, config),
        partial(build.build_augmenter, config),
        lambda: build.build_streams(config, build.build_source(config)),
        build.train_options(config),
        num_classes=config.num_classes,
        image_size=config.data.image_size,
        labelled_batch=config.data.labelled_batch,
        unlabelled_batch=config.data.unlabelled_batch if config.needs.unlabelled else 0,
        sam=config.sam if config.uses_sam else None,
        device=config.train.device,
        compile=config.train.compile,
        threads=config.train.threads,
    )
