"""``knowsam train``: an experiment file in, a run folder out."""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from knowsam.cli.arguments import positive
from knowsam.config import Config, load_config, modules_named, to_yaml
from knowsam.config.identity import config_changes, init_digests

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from knowsam.build import BuiltMethod
    from knowsam.data.source import Source
    from knowsam.data.streams import TwoStreams
    from knowsam.engine.distributed import Rank
    from knowsam.engine.optim import ScheduledOptimizer
    from knowsam.engine.options import TrainOptions
    from knowsam.engine.runfolder import RunFolder
    from knowsam.engine.saving import RunRecord

T = TypeVar("T")

EPILOG = """examples:
  python tools/train.py experiments/quickstart.yaml
  python tools/train.py experiments/quickstart.yaml train.seed=1 method.name=supervised
  python tools/train.py experiments/kvasir_10pct.yaml --print-config
  torchrun --nproc_per_node=4 tools/train.py experiments/kvasir_10pct.yaml

The same command on an unfinished run goes on where it stopped; on a finished one it does nothing.
exit codes: 0 finished, 65 bad data, 66 not found, 73 run folder in use or of another run, 74 disk,
75 interrupted with the checkpoint saved, 78 configuration, 79 a loss is not finite, 80 checkpoint, 70 a bug.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command line."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument("experiment", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted settings, as train.max_steps=100")
    parser.add_argument("--print-config", action="store_true", help="show the resolved configuration and end")
    parser.add_argument("--dry-run", action="store_true", help="build all, run one batch, show shapes and parameters")
    parser.add_argument(
        "--overfit-one-batch",
        type=positive,
        nargs="?",
        const=200,
        metavar="STEPS",
        help="train on one batch without augmentation (default 200 steps): its Dice must approach 1",
    )
    parser.add_argument(
        "--evaluate", action="store_true", help="score the finished run on test, as knowsam evaluate does"
    )
    parser.add_argument("--stop-at", type=positive, metavar="STEP", help="end after this step as if interrupted")
    parser.add_argument(
        "--accept-code", action="store_true", help="resume although code of your own that the run runs has changed"
    )


@dataclass
class TrainArguments:
    """What a script gives in the place of a command line; the same names."""

    experiment: str
    overrides: list[str]
    print_config: bool = False
    dry_run: bool = False
    overfit_one_batch: int | None = None
    evaluate: bool = False
    stop_at: int | None = None
    accept_code: bool = False


def run(args: argparse.Namespace | TrainArguments) -> int:
    """Train, or show what would be trained."""
    notes: list[str] = []
    config = load_config(args.experiment, args.overrides, notes)
    if args.print_config:
        print(to_yaml(config), end="")
        return 0
    with session(config) as rank:
        _refuse_precision(config, rank)
        if args.dry_run:
            from knowsam.cli.trial import dry_run

            return dry_run(config, rank, notes)
        if args.overfit_one_batch:
            from knowsam.cli.trial import overfit

            return overfit(config, rank, args.overfit_one_batch)
        from knowsam.engine.distributed import call_on_main
        from knowsam.engine.train import train

        finished = True
        with prepared(config, args, rank, notes) as job:
            if job is not None:
                state = train(
                    job.built.method,
                    job.streams,
                    job.augmenter,
                    job.optimizers,
                    job.validate,
                    job.options,
                    run=job.run,
                    rank=rank,
                    record=job.record,
                    resume=job.resume,
                )
                finished = state.step == config.train.max_steps
                if finished:
                    _say_finished(job.run, state.step, state.best, scores_follow=args.evaluate)
        if args.evaluate and finished:
            from knowsam.cli.evaluate import score_if_new

            settings = (run_path(config), config.train.device, config.evaluate.nsd_tolerance)
            call_on_main(lambda: score_if_new(*settings, config.evaluate.postprocess))
    return 0


def run_path(config: Config) -> str:
    """Where the run goes: ``run``, or ``runs/<name>/<method>[_skd]_<labelled>_seed<seed>``."""
    if config.run:
        return config.run
    method = str(config.method["name"]).rpartition(":")[2] + ("_skd" if config.skd is not None else "")
    return f"runs/{config.name}/{method}_{config.lists[1]}_seed{config.train.seed}"


@contextmanager
def session(config: Config) -> "Iterator[Rank]":
    """This process among those that train together, with the threads and the arithmetic that are asked for."""
    import torch

    from knowsam.engine import distributed
    from knowsam.engine.memory import keep_freed_memory
    from knowsam.engine.precision import settle_math

    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    torch.use_deterministic_algorithms(config.train.deterministic, warn_only=True)
    # Others wait while rank 0 decodes the cache or validates.
    rank = distributed.setup(config.train.device, timeout=3600)
    if rank.device.type == "cpu":
        keep_freed_memory()
        settle_math()
    try:
        yield rank
    finally:
        distributed.teardown()


@dataclass
class Job:
    """A training that can begin: what ``engine.train.train`` takes."""

    run: "RunFolder"
    built: "BuiltMethod"
    streams: "TwoStreams"
    augmenter: Callable[..., Any]
    optimizers: "Mapping[str, ScheduledOptimizer]"
    validate: "Callable[[], Mapping[str, float]]"
    options: "TrainOptions"
    record: "RunRecord"
    resume: "Mapping[str, Any] | None"


@contextmanager
def prepared(
    config: Config, args: argparse.Namespace | TrainArguments, rank: "Rank", notes: "Sequence[str]"
) -> "Iterator[Job | None]":
    """Everything that comes before the first step, the run folder locked meanwhile; None when the run is complete.

    What costs little and may be wrong comes before the run folder; decoding the images comes last.
    """
    from dataclasses import replace

    from knowsam import build
    from knowsam.data.check import check_quick
    from knowsam.engine.compile import compile_parts
    from knowsam.engine.distributed import call_on_main
    from knowsam.engine.log import Counter, say, warn
    from knowsam.engine.owncode import OwnCode
    from knowsam.engine.precision import autocast_dtype, store_frozen
    from knowsam.engine.runfolder import RunFolder
    from knowsam.engine.saving import RunRecord
    from knowsam.errors import DataError

    source = on_main_first(lambda: build.build_source(config))
    if not source.eval_ids("val"):
        raise DataError("there is no validation case, so no checkpoint could be chosen", hint="Write a val.txt.")
    call_on_main(lambda: check_quick(source, config.data.cache))
    run = on_main_first(lambda: RunFolder(run_path(config)))
    call_on_main(run.lock)
    with run:
        resume = _resume(run, config, rank)
        if resume is not None and resume["step"] >= config.train.max_steps:
            say(f"{run} is already complete at step {resume['step']}; evaluate it with: knowsam evaluate {run}")
            yield None
            return
        code = OwnCode(modules_named(config))
        built = build.build_method(config, init=resume is None)
        code.texts()
        method = built.method.to(rank.device)
        if method.sam_teacher is not None:  # its frozen weights never move, as those of an EMA teacher do
            store_frozen(method.sam_teacher, autocast_dtype(config.train.precision))
        compile_parts(method.compilable(), config.train.compile, rank.device.type)
        notes = list(notes)
        optimizers = build.build_optimizers(config, method, notes)
        preparation = _prepare_images(source, resume)
        with Counter("decoding images") as progress:
            streams = on_main_first(
                lambda: build.build_streams(
                    config, source, rank=rank.rank, world_size=rank.world_size, progress=progress
                )
            )
        lineage = [ancestor.record() for ancestor in built.lineage] or (resume or {}).get("lineage", [])
        record = RunRecord(
            to_yaml(config),
            _fingerprints(config, source, streams, lineage),
            lineage,
            preparation,
            code,
            args.accept_code,
        )
        if resume is None:
            if rank.rank == 0:
                _begin(run, config, args.overrides, rank, source, built)
            for note in notes:
                say(f"note: {note}")
            _introduce(run, config, rank, streams, built)
            if rank.rank == 0 and (never := _classes_never_seen(streams, config)):
                warn(
                    f"no labelled image shows {', '.join(never)} ({config.lists[1]}, {config.data.image_size} "
                    "px): no network can learn that; choose a longer label list"
                )
        yield Job(
            run,
            built,
            streams,
            build.build_augmenter(config),
            optimizers,
            _validation(config, built, source, rank),
            replace(build.train_options(config), stop_at=args.stop_at),
            record,
            resume,
        )


def _prepare_images(source: "Source", resume: "Mapping[str, Any] | None") -> dict[str, Any]:
    """Fit the intensity rule once, on rank 0, or take over what the run fitted; the state that it keeps."""
    from knowsam.build import fit_preparation
    from knowsam.data.source import CaseSource
    from knowsam.engine.distributed import call_on_main
    from knowsam.engine.log import say

    if not isinstance(source, CaseSource):
        return {}
    if resume is not None and resume.get("preparation"):
        source.preparation.load_state(resume["preparation"])
    elif source.preparation.intensity.needs_fit:
        state: dict[str, Any] = call_on_main(fit_preparation, source)
        source.preparation.load_state(state)
        say(f"intensity {source.preparation.intensity.about()}: fitted on {len(source.train_ids())} training images")
    return source.preparation.state()


def _refuse_precision(config: Config, rank: "Rank") -> None:
    """Refuse what the device cannot compute, or computes wrongly."""
    from knowsam.errors import ConfigError

    if rank.device.type != "cpu":
        return
    if config.train.precision == "fp16":
        raise ConfigError("train.precision is fp16, which needs a CUDA device", hint="Use bf16 or fp32 on the CPU.")
    if config.train.precision == "bf16" and config.spatial_dims == 3:
        # The weights' gradients of 3x3x3 convolutions over 2 slices read memory that nobody wrote (torch 2.13).
        raise ConfigError(
            "train.precision is bf16, in which torch's convolutions of volumes give wrong gradients on the CPU",
            hint="Use train.precision=fp32 on the CPU.",
        )


def on_main_first(function: Callable[[], T]) -> T:
    """Rank 0 first (it may build the cache), then the others, each with its own result.

    A KnowsamError of rank 0 is raised on every rank, so that nobody waits for it in a collective.
    """
    from knowsam.engine import distributed

    result: list[T] = []
    distributed.call_on_main(lambda: result.append(function()))
    return result[0] if distributed.is_main() else function()


def _resume(run: "RunFolder", config: Config, rank: "Rank") -> dict[str, Any] | None:
    """The checkpoint to go on from, or None; refuses a folder that holds a different experiment."""
    from knowsam.engine.checkpoint import environment_changes, environment_fingerprint, load_checkpoint
    from knowsam.engine.distributed import broadcast_object
    from knowsam.engine.log import say, warn
    from knowsam.errors import ConfigError, RunFolderError

    state = load_checkpoint(run.last) if run.resumable else _end_without_last(run)
    step = state["step"] if state is not None else None
    if step != broadcast_object(step):
        raise RunFolderError(
            f"{run} is at step {step} for rank {rank.rank} and at another for rank 0",
            hint="All machines must see the same run folder: put it on a shared file system.",
        )
    if state is None:
        return None
    changed = config_changes(state["config"], config)
    if changed:
        raise RunFolderError(
            f"{run} holds a run with other settings:\n" + "\n".join(f"  {line}" for line in changed),
            hint="Choose another folder with run=..., or give the old settings to go on with it.",
        )
    if "world_size" not in state:
        return state
    if state["world_size"] != rank.world_size:
        raise ConfigError(
            f"{run} was trained by {state['world_size']} process(es), this is {rank.world_size}: the batches differ",
            hint=f"Use {state['world_size']} process(es), or a new run folder.",
        )
    for change in environment_changes(state["environment"], environment_fingerprint(rank.device)):
        warn(f"resuming in another environment, results will not be bit-identical: {change}")
    if 0 < state["step"] < config.train.max_steps:
        say(f"resuming {run} after step {state['step']}")
    return state


def _end_without_last(run: "RunFolder") -> dict[str, Any] | None:
    """Step and config of a complete run that kept its best.pt alone, which must not be trained anew over it."""
    from knowsam.engine.checkpoint import load_checkpoint
    from knowsam.errors import RunFolderError

    status = run.read_status()
    if status.get("state") != "complete" or not run.best.exists():
        return None
    if status["step"] is None:
        raise RunFolderError(f"{run} holds a converted checkpoint, not a training", hint="Choose another run=...")
    return {"step": int(status["step"]), "config": load_checkpoint(run.best)["config"]}


def _fingerprints(
    config: Config, source: "Source", streams: "TwoStreams", lineage: "Sequence[Mapping[str, Any]]"
) -> dict[str, str]:
    """Of everything that decides about the weights; a run is only resumed with the same."""
    from knowsam.data.cache import cases_fingerprint

    validation = on_main_first(lambda: cases_fingerprint(source, source.eval_ids("val"), folder=config.data.cache))
    # A checkpoint that the run began from may be gone since; what it was stands in the run's own.
    began_from = {f"init {ancestor['part']}": str(ancestor["sha256"]) for ancestor in lineage}
    return {**streams.fingerprint(), "validation": validation, **began_from, **init_digests(config)}


def _validation(
    config: Config, built: "BuiltMethod", source: "Source", rank: "Rank"
) -> "Callable[[], Mapping[str, float]]":
    from knowsam.build import sight
    from knowsam.engine.evaluate import validate
    from knowsam.engine.precision import autocast_dtype

    method = built.method
    deployed_only = config.train.validate_outputs == "deployed"

    def dice() -> dict[str, float]:
        evaluation = validate(
            method.predict_deployed if deployed_only else method.predict,
            source,
            outputs=method.outputs()[:1] if deployed_only else method.outputs(),
            **sight(config),
            batch_size=config.evaluate.batch_size,
            device=rank.device,
            class_names=config.data.classes[1:],
            autocast=autocast_dtype(config.train.precision),
        )
        return {output: evaluation.dice(output) for output in evaluation.outputs}

    return dice


def _begin(
    run: "RunFolder",
    config: Config,
    overrides: "Sequence[str]",
    rank: "Rank",
    source: "Source",
    built: "BuiltMethod",
) -> None:
    """Write down what the run is, and take away what a run left that ended before its first checkpoint."""
    from knowsam.cli.trial import sam_weights_line
    from knowsam.engine.checkpoint import environment_fingerprint
    from knowsam.files import write_text

    run.best.unlink(missing_ok=True)
    for stale in run.snapshots.glob("step_*.pt"):
        stale.unlink()
    splits = {
        "labelled": source.labelled_ids(),
        "train": source.train_ids(),
        "train_cases": len(source.train_ids()),
        "source": repr(source),
        "sha256": dict(getattr(getattr(source, "splits", None), "sha256", {})),
    }
    run.describe(to_yaml(config), overrides, environment_fingerprint(rank.device), splits)
    if built.lineage:
        run.write_json(run.path / "lineage.json", {"from": [ancestor.record() for ancestor in built.lineage]})
    if config.uses_sam:
        write_text(run.sam_weights, f"{sam_weights_line(config, built)}\n")


def _classes_never_seen(streams: "TwoStreams", config: Config) -> list[str]:
    """Names of the classes that no labelled image shows."""
    import numpy as np

    masks = streams.labelled.masks
    assert masks is not None, "labelled cases are cached with their masks"
    seen = np.zeros(256, dtype=bool)
    for mask in map(masks.view, range(len(masks))):
        seen |= np.bincount(mask.ravel(), minlength=256) > 0
        if seen[: config.num_classes].all():
            return []
    return [name for name, there in zip(config.data.classes, seen[: config.num_classes], strict=True) if not there]


def _introduce(run: "RunFolder", config: Config, rank: "Rank", streams: "TwoStreams", built: "BuiltMethod") -> None:
    """Say in a few lines what is about to happen, SAM's weights above all."""
    from knowsam.build import method_name
    from knowsam.cli.trial import sam_weights_line
    from knowsam.engine.log import say

    unlabelled = len(streams.unlabelled.ids) if streams.unlabelled is not None else 0
    say(
        f"{method_name(config)} on {config.name}: "
        f"{len(streams.labelled.ids)} labelled and {unlabelled} unlabelled images, K = {config.num_classes}, "
        f"{config.data.image_size} px, {config.train.max_steps} steps on {rank.world_size} x {rank.device} "
        f"({config.train.precision})"
    )
    groups = built.method.trainable_groups()
    counts = {name: sum(p.numel() for p in parameters) for name, parameters in groups.items()}
    say("trains " + ", ".join(f"{name} {count / 1e6:.2f} M" for name, count in counts.items()) + f"; run folder {run}")
    for ancestor in built.lineage:
        say(f"{ancestor.part} begins from {ancestor.run}, {ancestor.file} of step {ancestor.step}")
    if config.uses_sam:
        say(sam_weights_line(config, built))


def _say_finished(run: "RunFolder", step: int, best: "Mapping[str, float]", *, scores_follow: bool) -> None:
    from knowsam.engine.log import say

    next_step = "" if scores_follow else f"\nnext: knowsam evaluate {run}"
    shown = f"best validation Dice {100 * best['dice']:.2f} % at step {best['step']}"
    say(f"finished {run} at step {step}: {shown}{next_step}")
