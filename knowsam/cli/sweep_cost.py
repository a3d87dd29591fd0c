"""``knowsam sweep --dry-run``: the trials of a sweep, and what their training steps will cost."""

from rich.console import Console
from rich.table import Table

from knowsam.config import parse_config
from knowsam.sweep.cost import sweep_cost
from knowsam.sweep.spec import Sweep
from knowsam.text import duration


def show(sweep: Sweep, *, timing: bool) -> int:
    """Print the trials; with ``timing``, build each setting and time some of its steps on this machine."""

    def timed(experiment: str) -> float:
        from knowsam.benchmark.step import step_seconds
        from knowsam.cli.benchmark import workload

        return step_seconds(workload(parse_config(experiment, sweep.name)), sweep.launcher.get("threads"))

    cost = sweep_cost(sweep, timed if timing else None)
    table = Table(box=None, pad_edge=False)
    for column in ("experiment", "setting", "seeds", "key", "s/step", "steps", "one run"):
        table.add_column(column, justify="left" if column in ("experiment", "setting", "key") else "right")
    for item in cost.settings:
        step = "?" if item.step_seconds is None else f"{item.step_seconds:.3f}"
        run = "?" if item.run_seconds is None else duration(item.run_seconds)
        seeds = ", ".join(map(str, item.seeds))
        table.add_row(item.experiment, item.setting, seeds, " ".join(item.keys), step, str(item.steps), run)
    Console(width=None if Console().is_terminal else 160).print(table)
    workers = sweep.launcher.get("workers", 1)
    print(f"{sweep.name}: {cost.trials} trials, folder {sweep.folder}")
    if cost.seconds:
        print(
            f"expected: {duration(cost.seconds)} of training steps in all, {duration(cost.seconds / workers)} with "
            f"{workers} at a time if they don't slow each other down; timed on this machine, one trial alone. "
            "Start-up, validation and scoring come on top."
        )
    for problem, settings in cost.unknown.items():
        print(f"cost unknown of {len(settings)} settings ({settings[0]}, ...): {problem}")
    return 0
