"""What could mislead the reader of a page about runs, in plain words, the weightiest first."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from knowsam.report.checks import KINDS, LAST, UNKNOWN, checkpoint_kind, refuse_mixture, untrained
from knowsam.report.folders import without_places
from knowsam.report.page.history import Series
from knowsam.report.page.overlays import Overlay
from knowsam.report.page.record import Record, scored_runs
from knowsam.report.runs import Run
from knowsam.report.warnings import RANDOM

SAME = 0.005
"""Dice of a case predicted anew and Dice of its scores may differ by this: another device rounds otherwise."""


def cautions(records: Sequence[Record], outputs: Mapping[str, str]) -> list[str]:
    """Sentences about the runs.

    Args:
        records: of the page.
        outputs: name of the run -> output that is shown first.
    Raises:
        DataError: scored runs of different classes, which have no table in common.
    """
    found = [
        *_about(records, _unfinished),
        *_about(records, _checkpoints),
        *_about(records, lambda record: _warned(record, outputs)),
        *_mixtures(records),
        *_about(records, _trainings),
        *_outputs(records, outputs),
    ]
    return [sentence[:1].upper() + sentence[1:] for sentence in found] if len(records) == 1 else found


def _about(records: Sequence[Record], sentences_of: Callable[[Record], Iterator[str]]) -> Iterator[str]:
    """Each sentence once, with the runs that it is about."""
    found: dict[str, list[str]] = {}
    for record in records:
        for sentence in sentences_of(record):
            found.setdefault(sentence, []).append(record.name)
    for sentence, names in found.items():
        if len(records) == 1:
            yield sentence
        elif len(names) == len(records):
            yield f"All runs: {sentence}"
        else:
            yield f"{', '.join(names)}: {sentence}"


def changed_predictions(run: Run, output: str, overlays: Mapping[str, Overlay]) -> list[str]:
    """A sentence if the weights no longer give what the scores say, or none.

    Args:
        run: scored.
        output: that was predicted anew.
        overlays: case -> its new prediction.
    """
    rows = {(row["case"], row["class"]): row for row in run.rows if row["output"] == output}
    off: dict[str, tuple[float, float]] = {}  # case -> Dice % of the scores, and of the new prediction
    for case, overlay in overlays.items():
        for name, dice in overlay.dice.items():
            row = rows.get((case, name))
            if row is not None and dice is not None and abs(dice - row["dice"]) > SAME:
                off.setdefault(case, (100 * row["dice"], 100 * dice))
    if not off:
        return []
    case, (before, now) = next(iter(off.items()))
    return [
        f"{run.setting}: {len(off)} of {len(overlays)} pictured cases, predicted anew, do not have the Dice of the "
        f"scores ({case}: {before:.2f} there, {now:.2f} now). The checkpoint, the data or the code has changed since: "
        "score the run again."
    ]


def _unfinished(record: Record) -> Iterator[str]:
    budget = record.settings.get("train.max_steps")
    if record.state not in ("complete", UNKNOWN):
        reason = without_places(str(record.status.get("reason") or "")).splitlines()
        at = f" at step {record.step} of {budget}" if record.step is not None else ""
        yield f"not finished: {record.state}{at}" + (f" ({reason[0]})." if reason else ".")
    if record.scores is None:
        yield f"{record.unscored}; its place in the tables of scores stays empty."


def _checkpoints(record: Record) -> Iterator[str]:
    run, best = record.scores, record.history.best
    if run is None:
        return
    checkpoint = run.checkpoint
    if checkpoint is None:
        yield "the scores do not say which weights they are of; score the run again to know."
        return
    if untrained(run):
        masks = checkpoint_kind(run) == "masks"
        yield (
            "these are masks of another tool, scored as they are."
            if masks
            else f"this is the mean of the probabilities of {len(checkpoint.get('runs') or ())} runs."
        )
        return
    if checkpoint_kind(run) == LAST:
        yield (
            f"the scores are of the last step's weights ({checkpoint['file']}, step {checkpoint['step']}), which no "
            "validation chose. The usual choice is best.pt."
        )
    elif best is not None and best[0] != checkpoint["step"]:
        yield (
            f"the scores are of step {checkpoint['step']}, but the best validation Dice is now that of step {best[0]}: "
            "score the run again."
        )
    if checkpoint.get("split") == run.scores["split"]:
        yield f"these are scores on {run.scores['split']}, which also chose the weights: they are too good."


def _warned(record: Record, outputs: Mapping[str, str]) -> Iterator[str]:
    """What the run was warned of; of random weights the page speaks in its own words."""
    for warned in record.warnings:
        elsewhere = record.scores is not None and outputs.get(record.name) != record.scores.outputs[0]
        if warned.name != RANDOM and not (warned.name == "deployed_behind" and elsewhere):
            yield warned.text


def _mixtures(records: Sequence[Record]) -> Iterator[str]:
    scored = scored_runs(records)
    if len(scored) > 1:
        metrics = list(dict.fromkeys(metric for run in scored for metric in run.scores["metrics"]))
        for line in refuse_mixture(scored, metrics, KINDS):
            kind, _, text = line.partition(": ")
            yield f"The runs differ in their {kind}, so their scores are not comparable as they stand: {text}."
    lists = {record.name: _lists(record) for record in records if record.scores is None}
    known = next((_lists(record) for record in records if record.scores is not None), None)
    known = known if known is not None else next(iter(lists.values()), None)
    for name, found in lists.items():
        off = [key for key in found if known and key in known and found[key] != known[key]]
        if off:
            yield f"{name}: other cases than the other runs: {', '.join(off)}."
    commits = {str(record.environment.get("git_commit")) for record in records if record.environment.get("git_commit")}
    versions = {str(record.environment.get("torch")) for record in records if record.environment.get("torch")}
    if len(commits) > 1:
        yield f"The runs were made by {len(commits)} different commits of the code."
    if len(versions) > 1:
        yield f"The runs were made with different versions of torch: {', '.join(sorted(versions))}."


def _trainings(record: Record) -> Iterator[str]:
    history = record.history
    if record.scores is not None and untrained(record.scores):
        return
    if not history.train:
        yield "nothing was logged, so there are no curves."
    deployed = next(iter(history.dice.values()), Series()).steps
    if record.state == "complete" and len(deployed) > 1 and history.best and history.best[0] == deployed[-1]:
        yield "the best validation Dice is that of the last validation: a longer training may be better."
    if history.not_finite:
        many = "s were" if history.not_finite > 1 else " was"
        yield f"{history.not_finite} logged value{many} not finite; the curves have gaps there."
    if _uses_sam(record) and not record.settings.get("sam.weights"):
        yield "SAM started from random weights (sam.weights is null): this is not the published method."
    if record.settings.get("published_code"):
        yield f"the run behaves as the published code in {_rows(record.settings['published_code'])}."
    if record.environment.get("git_dirty") == "yes":
        kept = f"git.diff, {record.diff_lines} lines" if record.diff_lines else "no git.diff is kept"
        yield f"the code had changes that were in no commit ({kept})."


def _outputs(records: Sequence[Record], outputs: Mapping[str, str]) -> Iterator[str]:
    names = dict.fromkeys(outputs[record.name] for record in records if record.scores is not None)
    if len(names) > 1:
        listed = [
            f"{name} ({', '.join(record.name for record in records if outputs.get(record.name) == name)})"
            for name in names
        ]
        yield f"Not all runs are shown by the same output: {', '.join(listed)}."


def _uses_sam(record: Record) -> bool:
    return "sam" in record.history.train or any(name.startswith("skd") for name in record.history.train)


def _lists(record: Record) -> dict[str, str]:
    """Hashes of the lists that must not differ; the labelled ones may."""
    return {name: value for name, value in record.list_hashes.items() if name in ("train.txt", "val.txt", "test.txt")}


def _rows(value: Any) -> str:
    return "every row of docs/fidelity.md" if value is True else f"these rows of docs/fidelity.md: {value}"
