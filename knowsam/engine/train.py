"""The training loop: read once from top to bottom. It knows the method's contract and nothing of any method."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from knowsam.data.streams import RawBatch, TwoStreams, derive_seed
from knowsam.engine import distributed
from knowsam.engine.checkpoint import environment_fingerprint, forget_previous, save_checkpoint, save_snapshot
from knowsam.engine.cost import Cost
from knowsam.engine.distributed import Rank
from knowsam.engine.guard import StepGuard
from knowsam.engine.log import MetricsLog, Progress, read_metrics
from knowsam.engine.optim import ScheduledOptimizer
from knowsam.engine.pictures import Pictures
from knowsam.engine.runfolder import RunFolder
from knowsam.engine.scores import Evaluation
from knowsam.engine.spans import span
from knowsam.engine.watch import Watch, gradient_norm, label_statistics, parameter_norms
from knowsam.errors import DataError, KnowsamError
from knowsam.methods.base import SSLMethod
from knowsam.signals import StopSignal

DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Interrupted(KnowsamError):
    """A signal asked for an end; the checkpoint is saved and the same command goes on from it."""

    exit_code = 75
    kind = "interrupted"


@dataclass
class TrainState:
    """Where a run stands, besides the weights.

    Attributes:
        step: optimizer updates done.
        best: ``dice`` and ``step`` of the best validation so far; empty before the first.
    """

    step: int = 0
    best: dict[str, float] = field(default_factory=dict)


def train(
    method: SSLMethod,
    streams: TwoStreams,
    augmenter: Callable[..., Any],
    optimizers: Mapping[str, ScheduledOptimizer],
    validate: Callable[[], Evaluation],
    *,
    run: RunFolder,
    rank: Rank,
    config_yaml: str,
    data: Mapping[str, str],
    max_steps: int,
    seed: int,
    precision: str = "fp32",
    accumulate: int = 1,
    clip_norm: float = 0.0,
    gradient_exchange: str = "fp32",
    validate_every: int = 200,
    checkpoint_every: int = 200,
    log_every: int = 20,
    snapshot_every: int = 0,
    workers: int = 0,
    tensorboard: bool = True,
    pictures_every: int = 0,
    class_names: Sequence[str] = (),
    title: str = "",
    resume: Mapping[str, Any] | None = None,
    stop_at: int | None = None,
) -> TrainState:
    """Train to ``max_steps`` and leave ``last.pt``, ``best.pt`` and ``metrics.jsonl`` in the run folder.

    Args:
        method: on ``rank.device``; with several processes every rank holds the same weights.
        streams: batch t of this rank.
        augmenter: raw batch, seed -> Batch.
        optimizers: one per group of ``method.trainable_groups()``.
        validate: scores the method on the validation split; called on rank 0 alone.
        run: locked folder.
        rank: this process.
        config_yaml: resolved configuration, stored in the checkpoints so that they know their architecture.
        data: name -> fingerprint of all images and masks that decide about the weights, those for validation included;
            stored in the checkpoints, and a run is only resumed with the same.
        max_steps: optimizer updates in all.
        seed: of the run; all noise of micro-batch t is a function of (seed, rank, t).
        precision: ``fp32``, ``bf16`` or ``fp16`` autocast; losses are float32 in any case.
        accumulate: micro-batches per update.
        clip_norm: largest gradient norm per optimizer; 0 for no clipping.
        gradient_exchange: ``fp32`` or ``bf16``, what gradients travel in between processes.
        validate_every, checkpoint_every, log_every: updates between each; all three also at the end.
        snapshot_every: updates between copies of the deployed networks that are kept; 0 keeps none.
        workers: loader processes; their number changes no result.
        tensorboard: write events beside ``metrics.jsonl``.
        pictures_every: updates between pictures of a step; 0 for none.
        class_names: K names, background first, for the pictures.
        title: said above the pictures.
        resume: a loaded ``last.pt``.
        stop_at: end early after this many updates, as if interrupted (for tests of resuming).
    Raises:
        NumericError: a loss term is not finite; nothing was updated with it.
        Interrupted: a signal came; the checkpoint is saved.
    """
    state = TrainState()
    scaler = torch.amp.GradScaler(rank.device.type, enabled=precision == "fp16")
    if resume is not None:
        # Older checkpoints know nothing of the validation data.
        before = {"validation": data.get("validation"), **resume["data"]}
        if before != dict(data):
            changed = [name for name in {**before, **data} if before.get(name) != data.get(name)]
            raise DataError(
                f"the data of {run} have changed since step {resume['step']}: lists, images or masks that may be read "
                f"({', '.join(changed)})",
                hint="Bring the old data back, or train again in a new run folder (run=...).",
            )
        method.load_state_dict(resume["method"])
        for name, item in optimizers.items():
            item.optimizer.load_state_dict(resume["optimizers"][name])
        scaler.load_state_dict(resume["scaler"])
        state = TrainState(resume["step"], dict(resume["best"]))

    runner = distributed.replicate(method, rank, gradient_exchange)
    environment = environment_fingerprint(rank.device)  # once: it asks git about the code that is running now

    def save() -> None:
        log.write("cost", state.step, cost.values())
        log.flush()  # a checkpoint is never newer than its metrics
        contents = {
            "method": method.state_dict(),
            "optimizers": {name: item.optimizer.state_dict() for name, item in optimizers.items()},
            "scaler": scaler.state_dict(),
            "step": state.step,
            "best": state.best,
            "config": config_yaml,
            "data": dict(data),
            "environment": environment,
            "world_size": rank.world_size,
        }
        save_checkpoint(run.last, contents)
        if state.step == max_steps:
            forget_previous(run.last)

    def run_validation() -> None:
        evaluation = validate()
        scores = {f"dice_{output}": evaluation.dice(output) for output in evaluation.outputs}
        log.write("val", state.step, scores)
        watch.heed("val", state.step, scores)
        deployed = evaluation.dice()
        if deployed > state.best.get("dice", -1.0):
            state.best = {"dice": deployed, "step": state.step}
            contents = {"method": method.state_dict(), "step": state.step, "best": state.best, "config": config_yaml}
            save_checkpoint(run.best, contents, keep_previous=False)
        shown = "  ".join(f"{name.removeprefix('dice_')} {100 * value:.2f}" for name, value in scores.items())
        progress.print_line(f"step {state.step}: validation Dice %  {shown}  (best {100 * state.best['dice']:.2f})")

    method.train()
    log = MetricsLog(run, tensorboard=tensorboard)
    if state.step or run.metrics.exists():
        log.truncate_after(state.step)
    cost = Cost(rank.device, read_metrics(run.metrics))
    images_per_step = sum(streams.batch.values()) * accumulate * rank.world_size
    first, last = state.step * accumulate, max_steps * accumulate
    loader = streams.loader(first, last, workers=workers, pin_memory=rank.device.type == "cuda")
    batches = zip(range(first, last), loader, strict=True)
    progress = Progress(max_steps, start_step=state.step, log_every=log_every)
    watch = Watch(log, progress, max_steps=max_steps, records=read_metrics(run.metrics))
    pictures = Pictures(
        run.pictures, log, every=pictures_every, max_steps=max_steps, class_names=class_names, title=title
    )
    stop = StopSignal()
    guard = StepGuard(streams, run, rank.device)
    try:
        with log, progress, stop:
            while state.step < max_steps:
                step = state.step
                for item in optimizers.values():
                    item.optimizer.zero_grad(set_to_none=True)
                rates = {f"lr_{name}": item.set_lr(step, max_steps) for name, item in optimizers.items()}
                sums: dict[str, Tensor] = {}
                taken: list[int] = []
                for micro in range(accumulate):
                    with cost.part("data"), span("data"):
                        t, raw = next(batches)
                        taken.append(t)
                        raw = RawBatch(*(x.to(rank.device, non_blocking=True) for x in raw))
                    with span("augmentation"):
                        batch = augmenter(*raw, seed=derive_seed(seed, "augment", rank.rank, t))
                    # Dropout of batch t depends on t alone, so resuming needs no generator state.
                    torch.manual_seed(derive_seed(seed, "noise", rank.rank, t) & 0xFFFFFFFF)
                    # Gradients are exchanged once per update, with the last micro-batch.
                    last_micro = micro == accumulate - 1
                    with contextlib.nullcontext() if last_micro or runner is method else runner.no_sync():
                        with span("losses"), autocast(rank.device, precision):
                            out = runner(batch, step)
                        total = torch.stack([term.float() for term in out.losses.values()]).sum()
                        with span("backward"):
                            scaler.scale(total / accumulate).backward()
                    for name, value in {"loss": total, **out.losses, **out.monitors}.items():
                        sums[name] = sums.get(name, 0.0) + value.detach().float()
                terms = {name: sums[name] for name in out.losses}
                guard.watch(terms, sums["loss"], step, taken, [item.optimizer for item in optimizers.values()])
                finished = step + 1 == max_steps
                logged = (step + 1) % log_every == 0 or finished
                norms: dict[str, Tensor] = {}
                with span("optimizers"):
                    for name, item in optimizers.items():
                        if clip_norm > 0 or logged:
                            scaler.unscale_(item.optimizer)
                        if clip_norm > 0:
                            norms[f"grad_norm_{name}"] = nn.utils.clip_grad_norm_(item.parameters, clip_norm)
                        elif logged:
                            norms[f"grad_norm_{name}"] = gradient_norm(item)
                        scaler.step(item.optimizer)
                scaler.update()
                method.after_step(step)
                state.step = step + 1

                values = None
                validates, saves = (state.step % every == 0 for every in (validate_every, checkpoint_every))
                snaps = snapshot_every > 0 and state.step % snapshot_every == 0
                draws = pictures.due(state.step)
                if finished or validates or saves or snaps or draws:
                    guard.settle()
                if logged:
                    means = {name: value / accumulate for name, value in sums.items()}
                    norms |= parameter_norms(optimizers) | label_statistics(out, batch)
                    values = distributed.all_reduce_mean(_to_floats(means | norms))
                progress.update(state.step, values and _by_kind(values, out.losses), images=images_per_step)
                if values is not None:
                    values |= rates | {"images_per_second": progress.images_per_second}
                    log.write("train", state.step, values)
                    watch.heed("train", state.step, values, terms=out.losses)
                if draws:
                    with progress.paused():
                        pictures.draw(state.step, batch, out)
                if validates or finished:
                    with progress.paused(), cost.part("validation"):
                        state.best = distributed.call_on_main(lambda: (run_validation(), state.best)[1])
                if snaps:
                    with progress.paused(), cost.part("checkpoints"):
                        distributed.call_on_main(
                            lambda: save_snapshot(run.snapshots, method.inference_model(), state.step)
                        )
                # One rank's signal stops all of them after the same step.
                going_on = guard.all_go_on(not stop.name) and state.step != stop_at
                if not going_on:
                    guard.settle()
                if saves or finished or not going_on:
                    with progress.paused(), cost.part("checkpoints"):
                        differing = distributed.replicas_equal(method)
                        assert not differing, f"replicas differ after step {state.step}: {differing[:5]}"
                        distributed.call_on_main(save)
                    run.status("complete" if finished else "running", state.step)
                if not going_on and not finished:
                    reason = "stop_at" if state.step == stop_at else stop.name or "a signal to another rank"
                    run.status("interrupted", state.step, reason=reason)
                    if state.step == stop_at:
                        break
                    interrupted = Interrupted(
                        f"stopped by {reason} after step {state.step}; the checkpoint is saved",
                        hint="The same command goes on from there.",
                    )
                    interrupted.told_by_main = True  # all ranks stop here, and rank 0 says it
                    raise interrupted
    except KnowsamError as error:
        if not isinstance(error, Interrupted):
            run.status("failed", state.step, code=error.exit_code, reason=str(error))
        raise
    except BaseException as error:
        run.status("failed", state.step, reason=f"{type(error).__name__}: {error}")
        run.write_error(error)
        raise
    return state


def autocast_dtype(precision: str) -> torch.dtype | None:
    """The dtype of autocast for ``fp32``, ``bf16`` or ``fp16``; None for none."""
    return DTYPES[precision]


@contextlib.contextmanager
def autocast(device: torch.device, precision: str) -> Iterator[None]:
    """Autocast of a training step; nothing for ``fp32``."""
    dtype = DTYPES[precision]
    with torch.autocast(device.type, dtype, enabled=dtype is not None):
        yield


def _to_floats(values: Mapping[str, Tensor]) -> dict[str, float]:
    """Move scalars off the device in one transfer."""
    device = values["loss"].device
    stacked = torch.stack([v.detach().float().to(device) for v in values.values()])
    return dict(zip(values, stacked.tolist(), strict=True))


def _by_kind(values: Mapping[str, float], terms: Mapping[str, Tensor]) -> dict[str, float]:
    """The loss and its terms summed by their first word, which fits a line: seg, skd, mix, ..."""
    kinds = {"loss": values["loss"]}
    for name in terms:
        kind = name.partition("_")[0]
        kinds[kind] = kinds.get(kind, 0.0) + values[name]
    return kinds
