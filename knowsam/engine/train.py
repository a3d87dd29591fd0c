"""The training loop: read once from top to bottom. It knows the method's contract and nothing of any method."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from knowsam.data.batch import Batch
from knowsam.data.streams import TwoStreams
from knowsam.engine import distributed
from knowsam.engine.cost import Cost
from knowsam.engine.distributed import Rank
from knowsam.engine.feed import Feed
from knowsam.engine.guard import StepGuard
from knowsam.engine.log import MetricsLog, Progress, read_metrics
from knowsam.engine.optim import ScheduledOptimizer
from knowsam.engine.options import TrainOptions
from knowsam.engine.phases import Phases
from knowsam.engine.pictures import Pictures
from knowsam.engine.precision import autocast
from knowsam.engine.runfolder import RunFolder
from knowsam.engine.saving import RunRecord, Saver, TrainState
from knowsam.engine.spans import span
from knowsam.engine.watch import Watch, gradient_norm, label_statistics, parameter_norms
from knowsam.errors import ConfigError, KnowsamError
from knowsam.methods.base import SSLMethod, StepOutput
from knowsam.methods.contract import check_held, check_output, check_reached, explain_unused
from knowsam.signals import StopSignal


class Interrupted(KnowsamError):
    """A signal asked for an end; the checkpoint is saved and the same command goes on from it."""

    exit_code = 75
    kind = "interrupted"


def train(
    method: SSLMethod,
    streams: TwoStreams,
    augmenter: Callable[..., Batch],
    optimizers: Mapping[str, ScheduledOptimizer],
    validate: Callable[[], Mapping[str, float]],
    options: TrainOptions,
    *,
    run: RunFolder,
    rank: Rank,
    record: RunRecord,
    resume: Mapping[str, Any] | None = None,
) -> TrainState:
    """Train to ``options.max_steps`` and leave ``last.pt``, ``best.pt`` and ``metrics.jsonl`` in the run folder.

    Args:
        method: on ``rank.device``; with several processes every rank holds the same weights.
        streams: batch t of this rank.
        augmenter: raw batch, ``seed=`` -> Batch.
        optimizers: one per group of ``method.trainable_groups()``.
        validate: mean Dice 0..1 on the validation split by output, the deployed one first; called on rank 0 alone.
        options: what to do.
        run: locked folder.
        rank: this process.
        record: what checkpoints say of the run.
        resume: a loaded ``last.pt``.
    Raises:
        NumericError: a loss term is not finite; nothing was updated with it.
        ContractError: the method does not keep its contract.
        DataError: the data, or the code, are not those that the run began with.
        Interrupted: a signal came; the checkpoint is saved.
    """
    rounds, max_steps, accumulate = method.updates_per_batch, options.max_steps, options.accumulate
    if max_steps % rounds:
        raise ConfigError(f"train.max_steps is {max_steps}; this method makes {rounds} updates of a batch: a multiple")
    state, scaler = TrainState(), torch.amp.GradScaler(rank.device.type, enabled=options.precision == "fp16")
    phases = Phases(method, optimizers, max_steps)
    saver = Saver(run, method, optimizers, scaler, state, record, rank, max_steps)
    if resume is not None:
        saver.restore(resume)
    runner = distributed.replicate(method, rank, options.gradient_exchange)
    method.train()
    log = MetricsLog(run, tensorboard=options.tensorboard)
    if state.step or run.metrics.exists():
        log.truncate_after(state.step)
    cost = Cost(rank.device, read_metrics(run.metrics))
    feed = Feed(streams, augmenter, options, rank, cost, start=state.step, rounds=rounds)
    progress = Progress(max_steps, start_step=state.step, log_every=options.log_every)
    watch = Watch(log, progress, max_steps=max_steps, records=read_metrics(run.metrics))
    pictures = Pictures(run.pictures, log, options)
    stop, guard, started_at = StopSignal(), StepGuard(streams, run, rank.device), state.step

    def run_validation() -> dict[str, float]:
        scores = {f"dice_{name}": dice for name, dice in validate().items()}
        log.write("val", state.step, scores)
        watch.heed("val", state.step, scores)
        best = saver.better(next(iter(scores.values())))
        shown = "  ".join(f"{name.removeprefix('dice_')} {100 * value:.2f}" for name, value in scores.items())
        progress.print_line(f"step {state.step}: validation Dice %  {shown}  (best {100 * best['dice']:.2f})")
        return best

    def save() -> None:
        log.write("cost", state.step, cost.values())
        log.flush()  # a checkpoint is never newer than its metrics
        saver.save()

    try:
        with log, progress, stop:
            while state.step < max_steps:
                step = state.step
                new_phase = phases.enter(step)
                checked = new_phase or step == started_at
                held = check_held(method, step, optimizers)
                for item in optimizers.values():
                    item.optimizer.zero_grad(set_to_none=True)
                rates = {f"lr_{name}": phases.set_lr(item, step) for name, item in optimizers.items()}
                sums: dict[str, Tensor] = {}
                for micro in range(accumulate):
                    batch = feed(step, micro)
                    # Gradients are exchanged once per update, with the last micro-batch.
                    last_micro = micro == accumulate - 1
                    with contextlib.nullcontext() if last_micro else distributed.without_exchange(runner):
                        with span("losses"), autocast(rank.device, options.precision), _ddp_in_words(method):
                            out: StepOutput = runner(batch, step)
                        if checked:
                            check_output(method, out, batch)
                        total = torch.stack([term.float() for term in out.losses.values()]).sum()
                        with span("backward"):
                            scaler.scale(total / accumulate).backward()
                    feed.hand_on(micro, out)
                    for name, value in {"loss": total, **out.losses, **out.monitors}.items():
                        sums[name] = sums.get(name, 0.0) + value.detach().float()
                if checked:
                    check_reached(method)
                    watch.meet(out)
                moved = {name: item for name, item in optimizers.items() if name not in held}
                terms = {name: sums[name] for name in out.losses}
                guard.watch(terms, sums["loss"], step, feed.taken, [item.optimizer for item in moved.values()])
                finished = step + 1 == max_steps
                logged = (step + 1) % options.log_every == 0 or finished
                norms: dict[str, Tensor] = {}
                with span("optimizers"):
                    for name, item in moved.items():
                        if options.clip_norm > 0 or logged:
                            scaler.unscale_(item.optimizer)
                        if options.clip_norm > 0:
                            norms[f"grad_norm_{name}"] = nn.utils.clip_grad_norm_(item.parameters, options.clip_norm)
                        elif logged:
                            norms[f"grad_norm_{name}"] = gradient_norm(item)
                        scaler.step(item.optimizer)
                scaler.update()
                method.after_step(step)
                state.step = step + 1

                # Between updates from one batch nothing is saved, so a run goes on from where a batch begins.
                between = state.step % rounds == 0
                validates, saves, snaps = (
                    between and every > 0 and state.step % every < rounds
                    for every in (options.validate_every, options.checkpoint_every, options.snapshot_every)
                )
                draws = pictures.due(state.step)
                if finished or validates or saves or snaps or draws:
                    guard.settle()
                values: dict[str, float] | None = None
                if logged:
                    means = {name: value / accumulate for name, value in sums.items()}
                    norms |= parameter_norms(optimizers) | label_statistics(out)
                    values = distributed.all_reduce_mean(_to_floats(means | norms))
                progress.update(state.step, values and _by_kind(values, out.losses), images=feed.images)
                if values is not None:
                    values |= rates | {"images_per_second": progress.images_per_second}
                    log.write("train", state.step, values)
                    watch.heed("train", state.step, values, terms=out.losses)
                if draws:
                    with progress.paused():
                        pictures.draw(state.step, batch, out)
                if validates or finished:
                    with progress.paused(), cost.part("validation"):
                        best, state.best = state.best, distributed.call_on_main(run_validation)
                        saves = saves or state.best != best  # best.pt is never of a later step than last.pt
                if snaps:
                    with progress.paused(), cost.part("checkpoints"):
                        distributed.call_on_main(saver.snapshot)
                # One rank's signal stops all of them after the same step.
                going_on = not between or (guard.all_go_on(not stop.name) and state.step != options.stop_at)
                if not going_on:
                    guard.settle()
                if saves or finished or not going_on:
                    with progress.paused(), cost.part("checkpoints"):
                        differing = distributed.replicas_equal(method)
                        assert not differing, f"replicas differ after step {state.step}: {differing[:5]}"
                        distributed.call_on_main(save)
                    run.status("complete" if finished else "running", state.step)
                if not going_on and not finished:
                    _end_early(state.step, options.stop_at, stop.name, run)
                    break
    except KnowsamError as error:
        if not isinstance(error, Interrupted):
            run.status("failed", state.step, code=error.exit_code, reason=str(error))
        raise
    except BaseException as error:
        run.status("failed", state.step, reason=f"{type(error).__name__}: {error}")
        run.write_error(error)
        raise
    return state


@contextlib.contextmanager
def _ddp_in_words(method: SSLMethod) -> Iterator[None]:
    """Parameters that got no gradient in the step before are called by their names, not by numbers."""
    try:
        yield
    except RuntimeError as error:
        explained = explain_unused(method, error)
        if explained is None:
            raise
        raise explained from error


def _end_early(step: int, stop_at: int | None, signal: str, run: RunFolder) -> None:
    """Say why the run ends before its end; raises Interrupted where that was a signal."""
    reason = "stop_at" if step == stop_at else signal or "a signal to another rank"
    run.status("interrupted", step, reason=reason)
    if step != stop_at:
        interrupted = Interrupted(
            f"stopped by {reason} after step {step}; the checkpoint is saved",
            hint="The same command goes on from there.",
        )
        interrupted.reported_by_main = True  # all ranks stop here
        raise interrupted


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
