"""What runs are, beside their scores, as tables: at a glance, cost, data, environment."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from knowsam.engine.cost import PARTS
from knowsam.engine.scores import MEAN
from knowsam.report.checks import UNKNOWN
from knowsam.report.numbers import NONE, number
from knowsam.report.page.history import SPEED
from knowsam.report.page.record import Record, shown
from knowsam.report.runs import Run
from knowsam.report.table import Table
from knowsam.text import duration


def glance(records: Sequence[Record], outputs: Mapping[str, str]) -> Table:
    """A row per run: what it is, how far it came, how good it is.

    Args:
        records: of the page.
        outputs: name of each scored run -> the output that stands for it.
    """
    head = ["run", "method", "state", "output", "seed", "labelled", "step", "Dice %", "checkpoint of step"]
    head += ["best val Dice %", "training time"]
    rows = []
    for record in records:
        run, best = record.scores, record.history.best
        budget = record.settings.get("train.max_steps")
        rows.append(
            [
                record.name,
                record.method,
                record.state,
                outputs.get(record.name) or NONE,
                str(record.seed),
                _count(record.splits.get("labelled")),
                NONE if record.step is None else f"{record.step} of {budget}",
                NONE if run is None else number("dice", run.mean(outputs[run.setting], MEAN, "dice")),
                _step(run),
                NONE if best is None else f"{100 * best[1]:.2f} at {best[0]}",
                _duration(record.history.cost.get("seconds")),
            ]
        )
    return Table("glance", "at a glance", head, rows, 4)


def cost(records: Sequence[Record]) -> Table:
    """Where the time went, and how much memory it took."""
    head = ["run", "device", "processes", "in all", "steps"]
    head += [*PARTS, "images/s (median)", "memory MiB", "device memory MiB"]
    rows = []
    for record in records:
        values = record.history.cost
        speeds = record.history.train[SPEED].finite if SPEED in record.history.train else []
        # The rest: forward, backward, update, augmentation.
        total, parts = values.get("seconds"), [values.get(f"seconds_{part}") for part in PARTS]
        known = [part for part in parts if part is not None]
        steps = None if total is None or len(known) < len(parts) else max(0.0, total - math.fsum(known))
        rows.append(
            [
                record.name,
                str(record.environment.get("device") or UNKNOWN),
                str(record.environment.get("world_size") or UNKNOWN),
                *(_duration(seconds) for seconds in (total, steps, *parts)),
                f"{statistics.median(speeds):.1f}" if speeds else NONE,
                *(f"{values[key]:.0f}" if key in values else NONE for key in ("peak_host_mib", "peak_device_mib")),
            ]
        )
    return Table("cost", "time (h:mm:ss) and largest memory, of rank 0", head, rows, 2)


def splits(records: Sequence[Record]) -> Table:
    """How many cases, from which lists; differing rows set off."""
    names = dict.fromkeys(name for record in records for name in record.list_hashes)
    facts: list[tuple[str, list[str]]] = [
        ("training cases", [str(record.splits.get("train_cases", UNKNOWN)) for record in records]),
        ("labelled of them", [_count(record.splits.get("labelled")) for record in records]),
        ("labelled list", [shown(record.settings.get("data.labelled", UNKNOWN)) for record in records]),
        ("scored cases", [NONE if r.scores is None else _scored(r.scores) for r in records]),
        *((f"sha256 of {name}", [_hash(record, name) for record in records]) for name in names),
    ]
    if not names:
        facts.append(("source", [str(record.splits.get("source", UNKNOWN)) for record in records]))
    return _facts("splits", "data and split lists", facts, records)


def environment(records: Sequence[Record]) -> Table:
    """Versions, device and commit; differing rows set off."""
    keys = dict.fromkeys(key for record in records for key in record.environment)
    facts = [(key, [str(record.environment.get(key) or NONE) for record in records]) for key in keys]
    facts = [(key, [text[:12] if key == "git_commit" else text for text in texts]) for key, texts in facts]
    return _facts("environment", "environment of the training", facts, records)


def _facts(name: str, title: str, facts: Sequence[tuple[str, list[str]]], records: Sequence[Record]) -> Table:
    rows = [[key, *texts] for key, texts in facts]
    strong = frozenset(i for i, (_, texts) in enumerate(facts) if len(set(texts)) > 1)
    head = ["", *(record.name for record in records)]
    return Table(
        name, title + ("; set off: differing between the runs" if strong else ""), head, rows, len(head), strong
    )


def _step(run: Run | None) -> str:
    """Of the checkpoint that was scored, where the scores say."""
    step = None if run is None or run.checkpoint is None else run.checkpoint.get("step")
    return NONE if step is None else str(step)


def _count(value: Any) -> str:
    return str(len(value)) if isinstance(value, list) else UNKNOWN


def _scored(run: Run) -> str:
    return f"{run.scores['num_cases']} of {run.scores['split']}, sha256 {run.scores['cases_sha256'][:12]}"


def _hash(record: Record, name: str) -> str:
    return record.list_hashes[name][:12] if name in record.list_hashes else NONE


def _duration(value: float | None) -> str:
    return NONE if value is None else duration(value)
