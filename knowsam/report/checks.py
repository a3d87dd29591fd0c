"""What must not stand in one table: other splits, metric rules, budgets or checkpoints, unless it is asked for."""

from collections.abc import Callable, Collection, Sequence
from typing import Any

from knowsam.errors import ConfigError, DataError
from knowsam.inference.postprocess import AUTO, describe
from knowsam.metrics.segmentation import DISTANCE_METRICS, MAIN_METRICS
from knowsam.report.runs import Run

KINDS = ("splits", "rules", "budget", "checkpoint")
"""What ``--allow`` may name."""

UNKNOWN = "unknown"
"""Stands for what a run does not say of itself."""

LAST = "last step"
"""Kind of a checkpoint that no validation chose."""

_BUDGET = ("train.max_steps", "data.labelled_batch", "train.accumulate", "data.image_size")

Fact = tuple[str, Callable[[Run], Any]]


def refuse_mixture(runs: Sequence[Run], metrics: Sequence[str], allow: Collection[str]) -> list[str]:
    """Compare what the runs must have in common.

    Args:
        runs: of one table.
        metrics: that the table shows; the unit of distances matters only where distances are shown.
        allow: of ``KINDS``, what may differ.
    Returns:
        One sentence for everything that differs and was allowed to.
    Raises:
        DataError: everything else that differs, in one message, with the runs; or the classes, which never may.
    """
    classes = _differences(runs, [("classes", lambda run: ", ".join(run.scores["class_names"]))])
    if classes:
        raise DataError(f"these runs have no table in common: {classes[0]}", hint="Compare runs of the same classes.")
    found = {kind: _differences(runs, facts) for kind, facts in _facts(runs[0].scores["split"], metrics).items()}
    refused = {kind: lines for kind, lines in found.items() if lines and kind not in allow}
    if refused:
        listed = "\n".join(f"  {kind}: {line}" for kind, lines in refused.items() for line in lines)
        raise DataError(
            f"these runs do not belong into one table:\n{listed}",
            hint=f"Compare them apart, or allow it: --allow {','.join(refused)} (every table then says so).",
        )
    return [f"{kind}: {line}" for kind, lines in found.items() for line in lines]


def choose_outputs(runs: Sequence[Run], output: str | None) -> dict[str, str]:
    """Setting -> the output whose scores are compared.

    Args:
        runs: of one table.
        output: name for all; the first that was scored, which is the deployed one, if None.
    Raises:
        ConfigError: runs that lack the output, or runs of one setting whose first outputs differ.
    """
    if output is not None:
        without = [run for run in runs if output not in run.outputs]
        if without:
            listed = "; ".join(f"{_who([run], runs)} has {', '.join(run.outputs)}" for run in without[:5])
            raise ConfigError(
                f"{len(without)} of {len(runs)} runs have no scores of output {output!r}: {listed}",
                hint="Choose an output that all have, or score the runs again without --outputs.",
            )
        return {run.setting: output for run in runs}
    chosen: dict[str, str] = {}
    for run in runs:
        first = chosen.setdefault(run.setting, run.outputs[0])
        if run.outputs[0] != first:
            raise ConfigError(
                f"setting {run.setting!r} would mix outputs: {first!r}, and {run.outputs[0]!r} of seed {run.seed}",
                hint="Name one with --output, or score the runs again without --outputs.",
            )
    return chosen


def choose_metrics(runs: Sequence[Run], asked: Sequence[str] | None) -> tuple[list[str], list[str]]:
    """The metrics of the table, and those left out because only some runs have them.

    Args:
        runs: of one table.
        asked: names, the main one first; those of ``MAIN_METRICS`` that every run has if None.
    Raises:
        ConfigError: a metric that was asked for and that a run lacks.
    """
    measured = [m for m in MAIN_METRICS if any(m in run.scores["metrics"] for run in runs)]
    if asked:
        for metric in asked:
            without = [run for run in runs if metric not in run.scores["metrics"]]
            if without:
                raise ConfigError(
                    f"{_who(without, runs)} has no {metric}", hint="Score the runs again, or leave it out of --metric."
                )
        return list(asked), []
    everywhere = [metric for metric in measured if all(metric in run.scores["metrics"] for run in runs)]
    return everywhere, [metric for metric in measured if metric not in everywhere]


def checkpoint_kind(run: Run) -> str:
    """``best on <split>``, ``last step``, ``unknown``; or ``masks``, ``ensemble`` of scores without a training."""
    checkpoint = run.checkpoint
    if checkpoint is None:
        return UNKNOWN
    if untrained(run):
        return str(checkpoint["kind"])
    return f"best on {checkpoint['split']}" if checkpoint.get("split") else LAST


def untrained(run: Run) -> bool:
    """Whether these are scores of no training of ours: masks of another tool, or an ensemble of runs."""
    return bool(run.checkpoint and run.checkpoint.get("kind"))


def _facts(split: str, metrics: Sequence[str]) -> dict[str, list[Fact]]:
    rules: list[Fact] = [("metric rules", lambda run: run.scores["metric_rules"])]
    rules += [("cases empty on both sides", lambda run: run.scores["empty"])]
    if set(metrics) & set(DISTANCE_METRICS):
        rules += [("unit of distances", lambda run: run.scores["unit"])]
    # Masks of another tool are what they are; whether something was done to them is not known.
    rules += [("post-processing", lambda run: None if checkpoint_kind(run) == "masks" else _postprocessing(run))]
    if "nsd" in metrics:
        rules += [("NSD tolerance", lambda run: run.scores["nsd_tolerance"])]
    return {
        "splits": [
            (f"{split} cases", lambda run: f"{run.scores['num_cases']} ({run.scores['cases_sha256'][:8]})"),
            ("validation list", lambda run: _list(run, "val.txt")),
            ("training list", lambda run: _list(run, "train.txt")),
            ("number of training cases", lambda run: run.splits.get("train_cases", UNKNOWN)),
        ],
        "rules": rules,
        "budget": [
            # What another tool or an ensemble took to train is no budget of ours.
            *((key, lambda run, key=key: _of_training(run, run.settings.get(key, UNKNOWN))) for key in _BUDGET),
            ("processes", lambda run: _of_training(run, run.world_size or UNKNOWN)),
        ],
        # Scores that do not say what they belong to are not known to differ; the tables call them unknown.
        "checkpoint": [
            ("scored", lambda run: None if run.checkpoint is None or untrained(run) else checkpoint_kind(run))
        ],
    }


def _of_training(run: Run, value: Any) -> Any:
    return None if untrained(run) else value


def _postprocessing(run: Run) -> str:
    """What was asked for; what ``auto`` found may be another thing for every run."""
    asked = (run.scores.get("postprocess") or {}).get("asked")
    return str(asked) if asked == AUTO else describe(asked)


def _list(run: Run, name: str) -> str:
    """What tells one list of cases from another: the hash of its file, or the recipe of generated data."""
    hashes = run.splits.get("sha256")
    if isinstance(hashes, dict) and name in hashes:
        return str(hashes[name])[:8]
    source = str(run.splits.get("source", ""))
    # Without a description of its own Python names an object by its place in memory.
    return source if source and " object at 0x" not in source else UNKNOWN


def _differences(runs: Sequence[Run], facts: Sequence[Fact]) -> list[str]:
    """``train.max_steps is 300 for 'a' and 600 for 'b'`` for every fact that differs."""
    lines = []
    for name, value_of in facts:
        holders: dict[Any, list[Run]] = {}
        for run in runs:
            value = value_of(run)
            if value is not None:
                holders.setdefault(value, []).append(run)
        if len(holders) > 1:
            values = [f"{value} for {_who(some, runs)}" for value, some in holders.items()]
            lines.append(f"{name}: " + ", ".join(values[:-1]) + f" and {values[-1]}")
    return lines


def _who(some: Sequence[Run], runs: Sequence[Run]) -> str:
    """Settings by name; with their seeds where only some of the setting's runs are meant."""
    parts = []
    for setting in dict.fromkeys(run.setting for run in some):
        seeds = [run.seed for run in some if run.setting == setting]
        whole = len(seeds) == sum(run.setting == setting for run in runs)
        parts.append(f"{setting!r}" + ("" if whole else f" seed {', '.join(map(str, seeds))}"))
    return ", ".join(parts)
