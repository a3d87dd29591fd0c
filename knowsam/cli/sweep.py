"""``knowsam sweep``: many trials from one file, on one machine or many."""

import argparse
from typing import TYPE_CHECKING

from knowsam.cli.arguments import positive

if TYPE_CHECKING:
    from knowsam.sweep.spec import Sweep

EPILOG = """examples:
  python tools/sweep.py experiments/sweeps/skd_ablation_small.yaml --dry-run
  python tools/sweep.py experiments/sweeps/skd_ablation_small.yaml --workers 2
  python tools/sweep.py work runs/sweeps/skd_ablation_small      # join from another machine or terminal
  python tools/sweep.py status runs/sweeps/skd_ablation_small

The same command goes on where the sweep stopped: finished trials are not run again, interrupted ones are resumed.
exit codes: 0 all trials complete, 1 some failed, 66 not found, 74 disk, 75 some are left to do, 78 configuration.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.usage = "knowsam sweep SWEEP.yaml [options] | work FOLDER [--trials N] | status FOLDER"
    parser.add_argument("arguments", nargs="+", metavar="SWEEP.yaml", help="sweep file; or: work FOLDER, status FOLDER")
    parser.add_argument("--dry-run", action="store_true", help="list the trials and what they will cost")
    parser.add_argument("--no-timing", action="store_true", help="with --dry-run: list only, time no step")
    parser.add_argument("--plan-only", action="store_true", help="write the plan and end; workers join with work")
    parser.add_argument("--workers", type=positive, metavar="N", help="trials at a time, instead of launcher.workers")
    parser.add_argument("--launcher", choices=("local", "slurm", "ray"), help="instead of launcher.name")
    parser.add_argument("--retry-failed", action="store_true", help="give failed trials one more try")
    parser.add_argument("--trials", type=positive, metavar="N", help="with work: end after so many")


def run(args: argparse.Namespace) -> int:
    """Expand the sweep, run what is left of it, say how it stands."""
    from knowsam.errors import ConfigError

    given: list[str] = args.arguments
    if len(given) == 2 and given[0] == "work":
        return _work(given[1], args.trials)
    if len(given) == 2 and given[0] == "status":
        return _status(given[1])
    if len(given) != 1:
        raise ConfigError(f"got {' '.join(given)!r}", hint="Give SWEEP.yaml, or work FOLDER, or status FOLDER.")

    from knowsam.sweep.spec import load_sweep

    sweep = load_sweep(given[0])
    if args.workers:
        sweep.launcher["workers"] = args.workers
    if args.launcher:
        sweep.launcher["name"] = args.launcher
    for warning in sweep.warnings:
        print(f"warning: {warning}", flush=True)
    if args.dry_run:
        from knowsam.cli.sweep_cost import show

        return show(sweep, timing=not args.no_timing)
    return _run(sweep, args.retry_failed, args.plan_only)


def _run(sweep: "Sweep", retry_failed: bool, plan_only: bool) -> int:
    import importlib

    from knowsam.sweep.status import summary
    from knowsam.sweep.store import Store

    store = Store.enrol(sweep, retry_failed=retry_failed)
    name, workers = sweep.launcher["name"], sweep.launcher.get("workers", 1)
    left = store.left()
    if plan_only:
        print(f"{sweep.name}: {left} trials to do; workers join with: knowsam sweep work {sweep.folder}")
        return 0
    if left:
        print(f"{sweep.name}: {left} trials to do, {workers} at a time ({name}); folder {sweep.folder}", flush=True)
        importlib.import_module(f"knowsam.sweep.{name}").launch(store, sweep.launcher)
    store.export()
    text, code = summary(store)
    print(text)
    if code == 75:
        print("The same command goes on from there.")
    elif sweep.search is None:
        print(f"next: knowsam compare {sweep.folder}")
    return code


def _work(folder: str, trials: int | None) -> int:
    from knowsam.signals import StopSignal
    from knowsam.sweep.store import Store
    from knowsam.sweep.worker import work

    with StopSignal() as stop:
        work(folder, max_trials=trials, stop=stop, say=lambda line: print(line, flush=True))
        Store(folder).export()
    return 75 if stop.name else 0


def _status(folder: str) -> int:
    from rich.console import Console
    from rich.table import Table

    from knowsam.sweep.status import summary
    from knowsam.sweep.store import Store
    from knowsam.text import duration

    store = Store(folder)
    table = Table(box=None, pad_edge=False)
    for column in ("state", "experiment", "setting", "seed", "val Dice %", "time", "run"):
        table.add_column(column, justify="right" if column in ("seed", "val Dice %", "time") else "left")
    interrupted = store.interrupted()
    for item in store.export():
        state = "interrupted" if item["state"] == "running" and item["key"] in interrupted else item["state"]
        dice = "" if item["value"] is None else f"{100 * item['value']:.2f}"
        time = duration(item["seconds"]) if item["seconds"] else ""
        row = (state, item["experiment"], item["setting"], str(item["seed"]), dice, time, item["folder"])
        table.add_row(*row)
    Console(width=None if Console().is_terminal else 160).print(table)
    text, code = summary(store)
    print(text)
    return code
