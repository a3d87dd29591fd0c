"""The tables of a page about runs, as rows of text."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from knowsam.engine.cost import PARTS
from knowsam.engine.scores import MEAN
from knowsam.metrics.segmentation import STATUSES
from knowsam.report.checks import UNKNOWN, checkpoint_kind
from knowsam.report.record import SPEED, Record, shown
from knowsam.report.runs import Run
from knowsam.report.tables import NONE, Table, metric_name, number
from knowsam.text import duration

HIDDEN = frozenset({"run", "data.cache", "data.obtain"})
"""Settings that say where files lie, or how to get them; they are no part of the experiment."""

NO_VALUE = object()


def glance(records: Sequence[Record], outputs: Mapping[str, str]) -> Table:
    """A row per run: what it is, how far it came, how good it is."""
    head = ["run", "method", "state", "output", "seed", "labelled", "step", "Dice %", "checkpoint of step"]
    head += ["best val Dice %", "training time"]
    rows = []
    for record in records:
        run, best, output = record.scores, record.history.best, outputs.get(record.name)
        labelled = record.splits.get("labelled")
        budget = record.settings.get("train.max_steps")
        rows.append(
            [
                record.name,
                record.method,
                record.state,
                output or NONE,
                str(record.seed),
                str(len(labelled)) if isinstance(labelled, list) else UNKNOWN,
                NONE if record.step is None else f"{record.step} of {budget}",
                NONE if run is None else number("dice", run.mean(output, MEAN, "dice")),
                NONE if run is None or run.checkpoint is None else str(run.checkpoint["step"]),
                NONE if best is None else f"{100 * best[1]:.2f} at {best[0]}",
                _seconds(record.history.cost.get("seconds")),
            ]
        )
    return Table("glance", "at a glance", head, rows, 4)


def scores(record: Record) -> Table:
    """All outputs and classes of one run: mean ± sd over cases."""
    run = record.scores
    names = [*run.scores["class_names"], *([MEAN] if len(run.scores["class_names"]) > 1 else [])]
    rows, strong = [], set()
    for output in run.outputs:
        for name in names:
            if output == run.outputs[0] and name == names[-1]:
                strong.add(len(rows))
            rows.append([output, _class(name), *_cells(run, output, name, run.scores["metrics"])])
    head = ["output", "class", "cases", *(metric_name(m, run.scores["unit"]) for m in run.scores["metrics"])]
    head += ["missed", "false", "empty"]
    title = f"{record.name}: {run.scores['num_cases']} {run.scores['split']} cases, mean ± sd over cases"
    return Table("scores", title, head, rows, 2, frozenset(strong))


def side_by_side(records: Sequence[Record], outputs: Mapping[str, str], class_name: str) -> Table:
    """A row per scored run: its chosen output on one class, mean ± sd over cases; the best Dice set off.

    Args:
        records: scored ones, of the same classes.
        outputs: name of the run -> output.
        class_name: one of their classes, or ``MEAN``.
    """
    runs = [record.scores for record in records]
    metrics = [m for m in runs[0].scores["metrics"] if all(m in run.scores["metrics"] for run in runs)]
    units = "/".join(dict.fromkeys(run.scores["unit"] for run in runs))
    rows = [
        [record.name, outputs[record.name], *_cells(record.scores, outputs[record.name], class_name, metrics)]
        for record in records
    ]
    means = [run.mean(outputs[record.name], class_name, "dice") for record, run in zip(records, runs, strict=True)]
    best = max((mean for mean in means if mean is not None), default=None)
    strong = frozenset(i for i, mean in enumerate(means) if mean == best and best is not None)
    head = ["run", "output", "cases", *(metric_name(metric, units) for metric in metrics), "missed", "false", "empty"]
    words = f"mean over {len(runs[0].scores['class_names'])} classes" if class_name == MEAN else class_name
    title = f"{words} on {runs[0].scores['split']}, mean ± sd over cases; set off: highest mean Dice"
    return Table(f"runs-{class_name}", title, head, rows, 2, strong)


def score_records(records: Sequence[Record]) -> list[dict[str, str]]:
    """Every mean and sd of every scored run, unrounded, a record per output, class and metric."""
    found = []
    for record in records:
        run = record.scores
        for output in run.outputs if run is not None else ():
            for name, row in run.scores["summary"][output].items():
                for metric in run.scores["metrics"]:
                    found.append(
                        {
                            "run": record.name,
                            "seed": str(record.seed),
                            "split": run.scores["split"],
                            "output": output,
                            "class": name,
                            "metric": metric,
                            "unit": run.scores["unit"] if metric in ("hd95", "asd") else "fraction",
                            "mean": _exact(row[metric]["mean"]),
                            "sd": _exact(row[metric]["sd"]),
                            "n": str(row["n"]),
                            "cases": str(row["cases"]),
                            **{status: str(row[status]) for status in STATUSES},
                            "checkpoint": checkpoint_kind(run),
                            "step": "" if run.checkpoint is None else str(run.checkpoint["step"]),
                        }
                    )
    return found


def worst_cases(record: Record, output: str, count: int = 10) -> Table:
    """The cases with the lowest Dice, each class with what was wrong."""
    run = record.scores
    values = run.case_values(output, MEAN, "dice")
    order = sorted(values, key=lambda case: (values[case], case))[:count]
    names = run.scores["class_names"]
    found = {(row["case"], row["class"]): row for row in run.rows if row["output"] == output}
    rows = []
    for case in order:
        cells = [found[case, name] for name in names]
        texts = [number("dice", cell["dice"]) if cell["status"] != "empty_both" else NONE for cell in cells]
        wrong = [
            f"{name} {cell['status'].replace('_', ' ')}"
            for name, cell in zip(names, cells, strict=True)
            if cell["status"] in ("missed", "false_positive")
        ]
        mean = [number("dice", values[case])] if len(names) > 1 else []
        rows.append([case, *texts, *mean, ", ".join(wrong) or NONE])
    head = ["case", *(f"{name} Dice %" for name in names), *(["mean"] if len(names) > 1 else []), "status"]
    return Table("worst", f"{record.name}: the {len(rows)} lowest Dice of {output}", head, rows, 1)


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
        steps = None if total is None or None in parts else max(0.0, total - math.fsum(parts))
        rows.append(
            [
                record.name,
                str(record.environment.get("device") or UNKNOWN),
                str(record.environment.get("world_size") or UNKNOWN),
                *(_seconds(s) for s in (total, steps, *parts)),
                f"{statistics.median(speeds):.1f}" if speeds else NONE,
                *(f"{values[key]:.0f}" if key in values else NONE for key in ("peak_host_mib", "peak_device_mib")),
            ]
        )
    return Table("cost", "time (h:mm:ss) and largest memory, of rank 0", head, rows, 2)


def differing_settings(records: Sequence[Record]) -> Table | None:
    """The settings that are not the same in all runs; None when there are none."""
    keys = [key for key in _keys(records) if key != "train.seed" and _differs(records, key)]
    if any(record.seed != records[0].seed for record in records):
        keys = ["train.seed", *keys]
    rows = [[key, *(_setting(record, key) for record in records)] for key in keys]
    head = ["key", *(record.name for record in records)]
    return Table("differing", "settings in which the runs differ", head, rows, len(head)) if rows else None


def changed_settings(record: Record, defaults: Mapping[str, Any]) -> Table:
    """The settings that are not the defaults of this version."""
    rows = [
        [key, _setting(record, key), shown(defaults[key]) if key in defaults else NONE]
        for key in _keys([record])
        if key not in defaults or shown(defaults[key]) != shown(record.settings[key])
    ]
    return Table("changed", f"{record.name}: settings other than the defaults", ["key", "value", "default"], rows, 3)


def all_settings(records: Sequence[Record], defaults: Mapping[str, Mapping[str, Any]]) -> Table:
    """Every setting, those that are written down and those that the components took by default.

    Args:
        records: the runs.
        defaults: by run, what ``changed_settings`` takes.
    """
    written = _keys(records)
    silent = [
        key
        for key in dict.fromkeys(key for record in records for key in defaults.get(record.name, {}))
        if key not in written and key not in HIDDEN
    ]
    rows, strong = [], set()
    for key in [*written, *silent]:
        texts = []
        for record in records:
            default = defaults.get(record.name, {}).get(key, NO_VALUE)
            value = record.settings.get(key, NO_VALUE)
            texts.append(f"({shown(default)})" if value is NO_VALUE and default is not NO_VALUE else _text(value))
            if value is not NO_VALUE and (default is NO_VALUE or shown(default) != shown(value)) and len(records) == 1:
                strong.add(len(rows))
        if len(set(texts)) > 1:
            strong.add(len(rows))
        rows.append([key, *texts])
    title = "all settings; in brackets what config.yaml leaves to the component's default; set off: "
    title += "other than the default" if len(records) == 1 else "differing between the runs"
    head = ["key", *(record.name for record in records)]
    return Table("settings", title, head, rows, len(head), frozenset(strong))


def splits(records: Sequence[Record]) -> Table:
    """How many cases, from which lists."""
    names = dict.fromkeys(
        name
        for record in records
        for name in (record.splits.get("sha256") or {})
        if isinstance(record.splits.get("sha256"), dict)
    )
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


def _cells(run: Run, output: str, class_name: str, metrics: Sequence[str]) -> list[str]:
    """Counted cases, mean ± sd of each metric, and the three counts of what was empty."""
    row = run.scores["summary"][output][class_name]
    n = str(row["n"]) if row["n"] == row["cases"] else f"{row['n']} of {row['cases']}"
    texts = []
    for metric in metrics:
        mean, sd = row[metric]["mean"], row[metric]["sd"]
        texts.append(number(metric, mean) + ("" if sd is None else f" ± {number(metric, sd)}"))
    return [n, *texts, *(str(row[status]) for status in ("missed", "false_positive", "empty_both"))]


def _keys(records: Sequence[Record]) -> list[str]:
    keys = dict.fromkeys(key for record in records for key, value in record.settings.items() if value != {})
    return [key for key in keys if key not in HIDDEN]


def _differs(records: Sequence[Record], key: str) -> bool:
    return len({_setting(record, key) for record in records}) > 1


def _setting(record: Record, key: str) -> str:
    return _text(record.settings.get(key, NO_VALUE))


def _text(value: Any) -> str:
    return NONE if value is NO_VALUE else shown(value)


def _class(name: str) -> str:
    return "mean over classes" if name == MEAN else name


def _count(value: Any) -> str:
    return str(len(value)) if isinstance(value, list) else UNKNOWN


def _scored(run: Run) -> str:
    return f"{run.scores['num_cases']} of {run.scores['split']}, sha256 {run.scores['cases_sha256'][:12]}"


def _hash(record: Record, name: str) -> str:
    hashes = record.splits.get("sha256")
    return str(hashes[name])[:12] if isinstance(hashes, dict) and name in hashes else NONE


def _seconds(value: float | None) -> str:
    return NONE if value is None else duration(value)


def _exact(value: float | None) -> str:
    return "" if value is None else f"{value:.10g}"
