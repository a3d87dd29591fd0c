"""The time of one training step of an experiment, without a run."""

import statistics
import time

import torch

from knowsam import build
from knowsam.config import Config
from knowsam.data.streams import RawBatch, derive_seed
from knowsam.engine import distributed
from knowsam.engine.train import autocast

MOMENTS = (0.0, 0.3, 0.5, 0.7, 0.99)
"""Parts of a run from which steps are timed: what a step does may change (mixing starts, terms ramp up)."""


def step_seconds(config: Config, threads: int | None = None) -> float:
    """Mean over the run of the time of one update, seconds; nothing is written but the decoded cache.

    Args:
        config: the experiment, whose data must be there.
        threads: CPU threads where the experiment leaves them open; torch's choice if None.
    Raises:
        KnowsamError: it cannot be built here.
    """
    if threads := config.train.threads or threads:
        torch.set_num_threads(threads)
    device = distributed.setup(config.train.device).device
    streams = build.build_streams(config, build.build_source(config))
    method = build.build_method(config).method.to(device).train()
    optimizers = build.build_optimizers(config, method)
    augmenter = build.build_augmenter(config)

    def once(step: int) -> float:
        begin = time.perf_counter()
        for micro in range(config.train.accumulate):
            raw = RawBatch(*(x.to(device) for x in streams[step * config.train.accumulate + micro]))
            batch = augmenter(*raw, seed=derive_seed(config.train.seed, "augment", 0, step))
            with autocast(device, config.train.precision):
                losses = method(batch, step).losses
            torch.stack([term.float() for term in losses.values()]).sum().backward()
        for item in optimizers.values():
            item.optimizer.step()
            item.optimizer.zero_grad(set_to_none=True)
        method.after_step(step)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - begin

    steps = [int(moment * config.train.max_steps) for moment in MOMENTS]
    for step in (steps[0], steps[-1]):  # the first call of each kind compiles kernels and makes buffers
        once(step)
    return statistics.mean(once(step) for step in steps)
