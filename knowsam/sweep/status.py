"""How a sweep stands, for people: progress, summary, exit code."""

from collections import Counter
from typing import Any

from knowsam.sweep.store import FINISHED, Store
from knowsam.text import duration


def progress(store: Store) -> str:
    """``[12/26, about 0:25:00 left]``: finished trials of all workers, and the time left at the pace of the past."""
    items = [item for item in store.trials() if item["state"] != "retired"]
    total = store.plan["search"]["trials"] if store.plan["search"] else len(items)
    done = [item for item in items if item["state"] in FINISHED]
    times = [item["seconds"] for item in done if item["state"] == "complete" and item["seconds"]]
    workers = max(1, sum(item["state"] == "running" for item in items))
    left = total - len(done)
    if not times or not left:
        return f"[{len(done)}/{total}]"
    # The one that has just ended counted as running until now, so workers + 1 would be too many.
    return f"[{len(done)}/{total}, about {duration(left * sum(times) / len(times) / workers)} left]"


def trial_line(store: Store, folder: str, state: str) -> str:
    """``[12/26, about 0:25:00 left] complete: no SKD, seed 1: validation Dice 70.12 % (0:03:10)``.

    Args:
        store: the sweep.
        folder: of the trial's run, below the sweep's.
        state: in which it ended.
    """
    item = next(item for item in store.trials() if item["folder"] == folder)
    text = f"{progress(store)} {state}: {item['setting']}, seed {item['seed']}"
    if item["value"] is not None:
        text += f": validation Dice {100 * item['value']:.2f} %"
    if item["message"]:
        text += f": {item['message']}"
    return text + f" ({duration(item['seconds'] or 0)})"


def summary(store: Store) -> tuple[str, int]:
    """How the sweep stands, as text, and the exit code: 0 all complete, 1 some failed, 75 some left to do."""
    items = store.trials()
    live = [item for item in items if item["state"] != "retired"]
    states = Counter(item["state"] for item in live)
    left = store.left()
    parts = [f"{states['complete']} complete"]
    if states["pruned"]:
        parts.append(f"{states['pruned']} pruned")
    codes = Counter(item["exit_code"] for item in live if item["state"] == "failed")
    parts += [f"{count} failed ({_code(code)})" for code, count in sorted(codes.items(), key=lambda x: str(x[0]))]
    if left:
        parts.append(f"{left} left")
    retired = len(items) - len(live)
    if retired:
        parts.append(f"{retired} retired (no longer in the sweep file; their runs are kept)")
    lines = [f"{store.plan['name']}: " + ", ".join(parts)]
    lines += [
        f"  failed: {item['setting']}, seed {item['seed']}: {item['message']} (logs/{item['key']}.log)"
        for item in live
        if item["state"] == "failed"
    ]
    if store.plan["search"] and (best := best_item(live)):
        chosen = " ".join(f"{key}={value}" for key, value in best["overrides"].items())
        lines.append(f"  best validation Dice {100 * best['value']:.2f} %: {chosen}")
    return "\n".join(lines), 75 if left else 1 if codes else 0


def best_item(items: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The complete trial of the best validation Dice."""
    complete = [item for item in items if item["state"] == "complete" and item["value"] is not None]
    return max(complete, key=lambda item: item["value"], default=None)


def _code(code: int | None) -> str:
    return "no exit code" if code is None else f"exit {code}" if code >= 0 else f"signal {-code}"
