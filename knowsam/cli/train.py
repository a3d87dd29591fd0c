"""``knowsam train``: an experiment file in, a run folder out."""

import argparse
from typing import TYPE_CHECKING, Any

from knowsam.cli.arguments import positive
from knowsam.config import Config, load_config, to_yaml
from knowsam.identity import config_changes, flat_config

if TYPE_CHECKING:
    from knowsam.engine.distributed import Rank
    from knowsam.engine.runfolder import RunFolder

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
    """Words of the command line."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument("experiment", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted words, such as train.max_steps=100")
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


def run(args: argparse.Namespace) -> int:
    """Train, or show what would be trained."""
    config = load_config(args.experiment, args.overrides)
    if args.print_config:
        print(to_yaml(config), end="")
        return 0

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
        if args.dry_run or args.overfit_one_batch:
            from knowsam.cli import trial

            return trial.dry_run(config, rank) if args.dry_run else trial.overfit(config, rank, args.overfit_one_batch)
        finished = _train(config, args.overrides, rank, args.stop_at, scores_follow=args.evaluate)
        if args.evaluate and finished:
            from knowsam.cli.evaluate import score_if_new

            settings = (run_path(config), config.train.device, config.evaluate.nsd_tolerance)
            distributed.call_on_main(lambda: score_if_new(*settings))
        return 0
    finally:
        distributed.teardown()


def run_path(config: Config) -> str:
    """Where the run goes: ``run``, or ``runs/<name>/<method>[_skd]_<labelled>_seed<seed>``."""
    if config.run:
        return config.run
    method = config.method["name"].rpartition(":")[2] + ("_skd" if config.skd is not None else "")
    return f"runs/{config.name}/{method}_{config.data.labelled}_seed{config.train.seed}"


def _method_name(config: Config) -> str:
    return config.method["name"] + (" + SKD" if config.skd is not None else "")


def _pictures_every(config: Config) -> int:
    every = config.train.pictures_every
    return config.train.validate_every if every is None else every


def _train(
    config: Config, overrides: list[str], rank: "Rank", stop_at: int | None, *, scores_follow: bool = False
) -> bool:
    """Train, or go on; True when the run is complete."""
    from knowsam import build
    from knowsam.cli.trial import sam_weights_line
    from knowsam.data.cache import cases_fingerprint
    from knowsam.data.check import check_quick
    from knowsam.engine.compile import compile_parts
    from knowsam.engine.distributed import call_on_main
    from knowsam.engine.log import Counter, say
    from knowsam.engine.precision import store_frozen
    from knowsam.engine.runfolder import RunFolder
    from knowsam.engine.train import autocast_dtype, train
    from knowsam.errors import ConfigError, DataError
    from knowsam.files import write_text

    if config.train.precision == "fp16" and rank.device.type == "cpu":
        raise ConfigError("train.precision is fp16, which needs a CUDA device", hint="Use bf16 or fp32 on the CPU.")
    # What costs little and may be wrong comes before the run folder; decoding the images comes last.
    source = call_on_main_first(lambda: build.build_source(config))
    if not source.eval_ids("val"):
        raise DataError("there is no validation case, so no checkpoint could be chosen", hint="Write a val.txt.")
    call_on_main(lambda: check_quick(source, config.data.cache))
    run = call_on_main_first(lambda: RunFolder(run_path(config)))
    call_on_main(run.lock)
    with run:
        resume = _prepare(run, config, rank)
        if resume is not None and resume["step"] >= config.train.max_steps:
            say(f"{run} is already complete at step {resume['step']}; evaluate it with: knowsam evaluate {run}")
            return True
        built = build.build_method(config)
        method = built.method.to(rank.device)
        if (guide := getattr(method, "sam_guide", None)) is not None:  # an EMA teacher is frozen, too, but moves
            store_frozen(guide, autocast_dtype(config.train.precision))
        compile_parts(method.compilable(), config.train.compile, rank.device.type)
        optimizers = build.build_optimizers(config, method)
        augmenter = build.build_augmenter(config)
        validation = call_on_main_first(
            lambda: cases_fingerprint(source, source.eval_ids("val"), folder=config.data.cache)
        )
        with Counter("decoding images") as progress:
            streams = call_on_main_first(
                lambda: build.build_streams(
                    config, source, rank=rank.rank, world_size=rank.world_size, progress=progress
                )
            )
        if rank.rank == 0 and resume is None:
            run.best.unlink(missing_ok=True)  # of a run that ended before its first checkpoint
            for stale in run.snapshots.glob("step_*.pt"):
                stale.unlink()
            _describe(run, config, overrides, rank, source)
            if config.uses_sam:
                write_text(run.sam_weights, f"{sam_weights_line(config, built.load_report)}\n")
        _introduce(run, config, rank, streams, method, built.load_report, resume)
        if rank.rank == 0:
            _warn_of_classes_never_seen(streams.labelled.masks, config)

        from knowsam.engine.evaluate import validate

        deployed_only = config.train.validate_outputs == "deployed"
        state = train(
            method,
            streams,
            augmenter,
            optimizers,
            lambda: validate(
                method.predict_deployed if deployed_only else method.predict,
                source,
                outputs=method.outputs()[:1] if deployed_only else method.outputs(),
                image_size=config.data.image_size,
                batch_size=config.evaluate.batch_size,
                device=rank.device,
                class_names=config.data.classes[1:],
                autocast=autocast_dtype(config.train.precision),
            ),
            run=run,
            rank=rank,
            config_yaml=to_yaml(config),
            data={**streams.fingerprint(), "validation": validation},
            max_steps=config.train.max_steps,
            seed=config.train.seed,
            precision=config.train.precision,
            accumulate=config.train.accumulate,
            clip_norm=config.train.clip_norm,
            gradient_exchange=config.train.gradient_exchange,
            validate_every=config.train.validate_every,
            checkpoint_every=config.train.checkpoint_every,
            log_every=config.train.log_every,
            snapshot_every=config.train.snapshot_every,
            workers=config.data.workers,
            tensorboard=config.train.tensorboard,
            pictures_every=_pictures_every(config),
            class_names=config.data.classes,
            title=f"{config.name}, {_method_name(config)}",
            resume=resume,
            stop_at=stop_at,
        )
    complete = state.step == config.train.max_steps
    if complete:
        next_step = "" if scores_follow else f"\nnext: knowsam evaluate {run}"
        best = f"best validation Dice {100 * state.best['dice']:.2f} % at step {state.best['step']}"
        say(f"finished {run} at step {state.step}: {best}{next_step}")
    return complete


def call_on_main_first(function) -> Any:
    """Rank 0 first (it may build the cache), then the others, each with its own result.

    A KnowsamError of rank 0 is raised on every rank, so that nobody waits for it in a collective.
    """
    from knowsam.engine import distributed

    result: list[Any] = []
    distributed.call_on_main(lambda: result.append(function()))
    return result[0] if distributed.is_main() else function()


def _prepare(run: "RunFolder", config: Config, rank: "Rank") -> dict[str, Any] | None:
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


def _describe(run: "RunFolder", config: Config, overrides: list[str], rank: "Rank", source: Any) -> None:
    from knowsam.engine.checkpoint import environment_fingerprint

    splits = {
        "labelled": source.labelled_ids(),
        "train": source.train_ids(),
        "train_cases": len(source.train_ids()),
        "source": repr(source),
        "sha256": dict(getattr(getattr(source, "splits", None), "sha256", {})),
    }
    run.describe(to_yaml(config), overrides, environment_fingerprint(rank.device), splits, _own_code(config))


def _own_code(config: Config) -> dict[str, str]:
    """Source text by module of the components that are not knowsam's: git may know nothing of them."""
    from knowsam.components import source_file

    names = [str(value) for key, value in flat_config(config).items() if key.endswith(".name")]
    modules = {name.partition(":")[0] for name in names if ":" in name and not name.startswith("knowsam.")}
    return {module: source_file(module).read_text(encoding="utf-8", errors="replace") for module in sorted(modules)}


def _warn_of_classes_never_seen(masks: Any, config: Config) -> None:
    import numpy as np

    from knowsam.engine.log import warn

    seen = np.zeros(256, dtype=bool)
    for mask in masks:
        seen |= np.bincount(mask.ravel(), minlength=256) > 0
        if seen[: config.num_classes].all():
            return
    never = [name for name, there in zip(config.data.classes, seen[: config.num_classes], strict=True) if not there]
    if never:
        warn(
            f"no labelled image shows {', '.join(never)} ({config.data.labelled}, {config.data.image_size} px): "
            "no network can learn that; choose a longer label list"
        )


def _introduce(run, config: Config, rank: "Rank", streams, method, load_report, resume) -> None:
    """Say in a few lines what is about to happen, SAM's weights above all."""
    from knowsam.cli.trial import sam_weights_line
    from knowsam.engine.log import say

    if resume is not None:
        return
    unlabelled = len(streams.unlabelled.ids) if streams.unlabelled is not None else 0
    say(
        f"{_method_name(config)} on {config.name}: "
        f"{len(streams.labelled.ids)} labelled and {unlabelled} unlabelled images, K = {config.num_classes}, "
        f"{config.data.image_size} px, {config.train.max_steps} steps on {rank.world_size} x {rank.device} "
        f"({config.train.precision})"
    )
    groups = {name: sum(p.numel() for p in parameters) for name, parameters in method.trainable_groups().items()}
    say("trains " + ", ".join(f"{name} {count / 1e6:.2f} M" for name, count in groups.items()) + f"; run folder {run}")
    if config.uses_sam:
        say(sam_weights_line(config, load_report))
