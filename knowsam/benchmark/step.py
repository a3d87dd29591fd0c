"""The time of one training step of an experiment, without a run."""

import statistics
import time

import torch

from knowsam.benchmark.workload import Workload
from knowsam.data.seeds import derive_seed
from knowsam.engine import distributed
from knowsam.engine.precision import autocast

MOMENTS = (0.0, 0.3, 0.5, 0.7, 0.99)
"""Parts of a run from which steps are timed: what a step does may change (mixing starts, terms ramp up)."""


def step_seconds(workload: Workload, threads: int | None = None) -> float:
    """Mean over the run of the time of one update, seconds; nothing is written but the decoded cache.

    Args:
        workload: the experiment, whose data must be there.
        threads: CPU threads where the experiment leaves them open; torch's choice if None.
    Raises:
        KnowsamError: it cannot be built here.
    """
    if threads := workload.threads or threads:
        torch.set_num_threads(threads)
    device, options = distributed.setup(workload.device).device, workload.options
    streams = workload.make_streams()
    method = workload.make_method().to(device).train()
    optimizers = workload.make_optimizers(method)
    augmenter = workload.make_augmenter()

    def once(step: int) -> float:
        begin = time.perf_counter()
        for micro in range(options.accumulate):
            raw = streams[step * options.accumulate + micro].to(device)
            batch = augmenter(raw, seed=derive_seed(options.seed, "augment", 0, step))
            with autocast(device, options.precision):
                losses = method(batch, step).losses
            torch.stack([term.float() for term in losses.values()]).sum().backward()
        for item in optimizers.values():
            item.optimizer.step()
            item.optimizer.zero_grad(set_to_none=True)
        method.after_step(step)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - begin

    steps = [int(moment * options.max_steps) for moment in MOMENTS]
    for step in (steps[0], steps[-1]):  # the first call of each kind compiles kernels and makes buffers
        once(step)
    return statistics.mean(once(step) for step in steps)
