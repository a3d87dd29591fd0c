"""``knowsam sweep --dry-run``: the trials of a sweep, and what their training steps will cost."""

import statistics
import time
from collections import defaultdict
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from knowsam.errors import KnowsamError
from knowsam.sweep.spec import Search, Sweep, first_point, resolve
from knowsam.text import duration

if TYPE_CHECKING:
    from knowsam.config import Config

# What a step does may change over a run (mixing starts, terms ramp up), so steps from all of it are timed.
MOMENTS = (0.0, 0.3, 0.5, 0.7, 0.99)


def show(sweep: Sweep, *, timing: bool) -> int:
    """Print the trials; with ``timing``, build each setting and time some of its steps on this machine."""
    from knowsam.config import parse_config

    table = Table(box=None, pad_edge=False)
    for column in ("experiment", "setting", "seeds", "key", "s/step", "steps", "one run"):
        table.add_column(column, justify="left" if column in ("experiment", "setting", "key") else "right")
    if sweep.search is not None:
        config = resolve(sweep.base, {**sweep.overrides, **first_point(sweep.search), "train.seed": sweep.seed})
        groups = [("search", "its first point", [config], [""])]
    else:
        names = dict.fromkeys((trial.experiment, trial.setting) for trial in sweep.trials)
        groups = []
        for experiment, setting in names:
            members = [t for t in sweep.trials if (t.experiment, t.setting) == (experiment, setting)]
            groups.append(
                (experiment, setting, [parse_config(t.config, setting) for t in members], [t.key for t in members])
            )
    total = 0.0
    unknown: dict[str, list[str]] = defaultdict(list)
    for experiment, setting, configs, keys in groups:
        seconds = None
        if timing:
            try:
                seconds = step_seconds(configs[0], sweep.launcher.get("threads"))
            except KnowsamError as error:
                unknown[str(error)].append(f"{experiment}, {setting}")
        steps = configs[0].train.max_steps
        runs = sweep.search.trials if sweep.search else len(configs)
        total += (seconds or 0.0) * steps * runs
        seeds = ", ".join(str(config.train.seed) for config in configs)
        cost = (f"{seconds:.3f}", str(steps), duration(seconds * steps)) if seconds else ("?", str(steps), "?")
        table.add_row(experiment, setting, seeds, " ".join(keys), *cost)
    Console(width=None if Console().is_terminal else 160).print(table)
    trials = sweep.search.trials if isinstance(sweep.search, Search) else len(sweep.trials)
    workers = sweep.launcher.get("workers", 1)
    print(f"{sweep.name}: {trials} trials, folder {sweep.folder}")
    if timing and total:
        print(
            f"expected: {duration(total)} of training steps in all, {duration(total / workers)} with {workers} at a "
            "time if they don't slow each other down; timed on this machine, one trial alone. Start-up, validation and "
            "scoring come on top."
        )
    for problem, settings in unknown.items():
        print(f"cost unknown of {len(settings)} settings ({settings[0]}, ...): {problem}")
    return 0


def step_seconds(config: "Config", threads: int | None) -> float:
    """Mean over the run of the time of one update, seconds; nothing is written but the decoded cache."""
    import torch

    from knowsam import build
    from knowsam.data.streams import RawBatch, derive_seed
    from knowsam.engine import distributed
    from knowsam.engine.train import autocast

    if config.train.threads or threads:
        torch.set_num_threads(config.train.threads or threads)
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
