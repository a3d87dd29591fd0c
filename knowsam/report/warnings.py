"""What a run was warned of, by its log and by its scores, so that no table stands without it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from knowsam.engine.log import read_metrics, read_warnings
from knowsam.engine.runfolder import RunFolder
from knowsam.engine.scores import MEAN
from knowsam.engine.watch import BEHIND
from knowsam.report.folders import without_places

RANDOM = "random_weights"
"""Name of the warning that SAM began from nothing."""


@dataclass(frozen=True)
class Warned:
    """A warning.

    Attributes:
        name: a short one, that sets it apart from others.
        text: for people, one line, without places of this machine.
    """

    name: str
    text: str


def logged_warnings(run: RunFolder) -> list[Warned]:
    """What the training said of itself: of its curves, its weights and its data.

    From ``metrics.jsonl``, ``warnings.jsonl`` (what stood on the console), ``sam_weights.txt``, and a list ``warnings``
    in ``splits.json``.
    """
    found = [
        Warned(str(record.get("name")), f"at step {record['step']} of the training: {record.get('text')}")
        for record in read_metrics(run.metrics)
        if record.get("kind") == "warning"
    ]
    if run.sam_weights.is_file():
        text = run.sam_weights.read_text(encoding="utf-8", errors="replace")
        found += [Warned(RANDOM, line) for line in text.splitlines() if "RANDOM weights" in line]
    listed = run.read_json(run.splits).get("warnings")
    found += [Warned("data", str(text)) for text in listed] if isinstance(listed, list) else []
    found += [Warned("console", text) for text in read_warnings(run.path)]
    return [Warned(one.name, without_places(" ".join(one.text.split()))) for one in dict.fromkeys(found)]


def score_warnings(scores: Mapping[str, Any]) -> list[Warned]:
    """What the scores themselves show.

    Args:
        scores: what ``load_evaluation`` gives.
    """
    found = []
    means = {output: rows[MEAN]["dice"]["mean"] for output, rows in scores["summary"].items()}
    deployed, *others = scores["outputs"]
    better = [name for name in others if (means[name] or 0.0) - (means[deployed] or 0.0) >= BEHIND]
    if better:
        best = max(better, key=lambda name: means[name])
        mine, its = 100 * (means[deployed] or 0.0), 100 * means[best]
        found.append(
            Warned(
                "deployed_behind",
                f"on {scores['split']} the deployed output {deployed} has Dice {mine:.2f} % and {best} {its:.2f} %, "
                f"{its - mine:.1f} points more. predict and export take --output {best} where it needs no SAM; it was "
                "not chosen by its own validation, though.",
            )
        )
    alike = scores.get("near_duplicates")
    if isinstance(alike, Mapping) and alike:
        groups = len(set(alike.values()))
        found.append(
            Warned(
                "near_duplicates",
                f"{len(alike)} of the {scores['num_cases']} {scores['split']} cases are near duplicates of others of "
                f"them ({groups} {'group' if groups == 1 else 'groups'}): they tell less than as many different ones.",
            )
        )
    return found
