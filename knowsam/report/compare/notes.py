"""What a reader must know to judge the tables, in sentences."""

from collections.abc import Iterator, Sequence
from itertools import groupby

from knowsam import errors
from knowsam.engine.scores import MEAN
from knowsam.report.checks import UNKNOWN, checkpoint_kind
from knowsam.report.compare.collect import RETIRED, Absent
from knowsam.report.compare.comparison import Cell, Row, TableSet
from knowsam.report.compare.statistics import PairedTest
from knowsam.report.numbers import postprocessing, scoring_rule
from knowsam.report.runs import OLD_DIGITS, Run

_KINDS = {
    error.exit_code: error.kind
    for error in vars(errors).values()
    if isinstance(error, type) and issubclass(error, errors.KnowsamError) and error.exit_code != 1
}


def notes(tables: TableSet) -> list[str]:
    """Sentences in the order of their weight: what is missing, what is mixed, what the numbers are."""
    return [
        *_absences(tables),
        *_warnings(tables),
        *_mixtures(tables),
        *_scored(tables),
        *_rules(tables),
        *_tests(tables),
    ]


def messages(absent: Sequence[Absent]) -> list[str]:
    """What failed runs said, for the console; it may name paths of this machine."""
    return [f"{item.setting}, seed {item.seed}: {item.message}" for item in absent if item.message]


def _absences(tables: TableSet) -> Iterator[str]:
    finished = {row.setting: row for row in tables.rows}
    away = [item for item in tables.absent if item.state != RETIRED]
    for setting in tables.planned:
        missing = [item for item in away if item.setting == setting]
        if not missing:
            continue
        done = len(finished[setting].runs) if setting in finished else 0
        total = f"{done + len(missing)} runs" if done + len(missing) > 1 else "1 run"
        by_state = {state: list(items) for state, items in groupby(sorted(missing, key=_state), key=_state)}
        parts = ", ".join(f"{len(items)} {_state_text(state)} ({_seeds(items)})" for state, items in by_state.items())
        if len(by_state) == 1:
            state = _state_text(missing[0].state)
            begin = f"{len(missing)} of {total} of {setting!r} {state} ({_seeds(missing)})"
        else:
            begin = f"{len(missing)} of {total} of {setting!r} are missing, {parts}"
        yield begin + (f": its means are over {_plural(done, 'seed')}." if done else ": it has no row.")
    retired = [item for item in tables.absent if item.state == RETIRED]
    if retired:
        named = ", ".join(f"{item.setting!r} seed {item.seed}" for item in retired)
        yield f"{_plural(len(retired), 'retired trial')} of an earlier plan left out: {named}."


def _warnings(tables: TableSet) -> Iterator[str]:
    """What the runs were warned of, each text once, with the runs; texts with numbers of their own stand apart."""
    found: dict[str, list[Run]] = {}
    for row in tables.rows:
        for run in row.runs:
            for warned in run.warnings:
                # Of another output than the one that stands here there is nothing to warn.
                if warned.name != "deployed_behind" or row.output == run.outputs[0]:
                    found.setdefault(warned.text, []).append(run)
    every = sum(len(row.runs) for row in tables.rows)
    for text, runs in found.items():
        if len(runs) == every and every > 1:
            whose = "all runs"
        else:
            named = {setting: [run.seed for run in runs if run.setting == setting] for setting in _settings(runs)}
            whose = "; ".join(f"{name!r} seed {', '.join(map(str, seeds))}" for name, seeds in named.items())
        yield f"Warning, {whose}: {text}"


def _settings(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(run.setting for run in runs))


def _mixtures(tables: TableSet) -> Iterator[str]:
    for line in tables.mixed:
        yield f"Mixed because it was asked for ({line})."
    if tables.left_out:
        yield f"Left out because only some runs have it: {', '.join(tables.left_out)}."


def _scored(tables: TableSet) -> Iterator[str]:
    if not tables.rows:
        return
    outputs = list(dict.fromkeys(row.output for row in tables.rows))
    if len(outputs) == 1:
        yield f"Output: {outputs[0]}."
    else:
        yield "Outputs differ: " + ", ".join(f"{row.output} for {row.setting!r}" for row in tables.rows) + "."
    runs = [run for row in tables.rows for run in row.runs]
    kinds = list(dict.fromkeys(checkpoint_kind(run) for run in runs))
    for kind in kinds:
        some = [run for run in runs if checkpoint_kind(run) == kind]
        whom = "" if len(kinds) == 1 else f" of {len(some)} of {len(runs)} runs"
        if kind == UNKNOWN:
            yield f"Checkpoint{whom}: unknown; these scores were made before they said which weights they are of."
            continue
        if kind == "masks":
            yield f"Masks of another tool, scored as they are: {', '.join(map(repr, _settings(some)))}."
            continue
        if kind == "ensemble":
            yield f"Means of the probabilities of several runs: {', '.join(map(repr, _settings(some)))}."
            continue
        checkpoints = [run.checkpoint for run in some if run.checkpoint is not None]
        chosen = "; ".join(dict.fromkeys(str(checkpoint["chosen_by"]) for checkpoint in checkpoints))
        files = ", ".join(dict.fromkeys(str(checkpoint["file"]) for checkpoint in checkpoints))
        steps = sorted(int(checkpoint["step"]) for checkpoint in checkpoints)
        at = f"step {steps[0]}" if steps[0] == steps[-1] else f"steps {steps[0]} to {steps[-1]}"
        yield f"Checkpoint{whom}: {files}, chosen by: {chosen}; {at}."
    done = {
        row.setting: list(dict.fromkeys(postprocessing(run.scores, row.output) for run in row.runs))
        for row in tables.rows
    }
    if any(any(texts) for texts in done.values()):
        parts = [f"{' or '.join(text or 'none' for text in texts)} for {name!r}" for name, texts in done.items()]
        alike = len({tuple(texts) for texts in done.values()}) == 1
        yield "Post-processing: " + (parts[0].rpartition(" for ")[0] if alike else ", ".join(parts)) + "."
    if any(run.checkpoint and run.checkpoint.get("split") == tables.scores["split"] for run in runs):
        yield (
            f"These are scores on {tables.scores['split']}, which also chose the checkpoints: they are too good. "
            "Compare on test."
        )


def _rules(tables: TableSet) -> Iterator[str]:
    if not tables.rows:
        return
    yield scoring_rule(tables.scores, tables.metrics, tables.units)
    if any(len(row.runs) > 1 for row in tables.rows):
        yield "± is the standard deviation over seeds (n - 1)."
    else:
        yield "One seed each: nothing here tells how much another seed would change."


def _tests(tables: TableSet) -> Iterator[str]:
    if len(tables.rows) < 2:
        return
    if tables.baseline is None:
        yield f"No tests: {tables.baseline_origin}."
        return
    tested = list(_tested(tables))
    yield f"Baseline: {tables.baseline!r} ({tables.baseline_origin}). Δ is setting minus baseline over shared seeds."
    for row, cell, _ in tested:
        delta = cell.delta
        if delta is not None and delta.n < max(len(row.runs), len(tables.rows[0].runs)):
            yield (
                f"{row.setting!r} and the baseline share {_plural(delta.n, 'seed')}: Δ and its test are over "
                + ("it alone." if delta.n == 1 else "these." if delta.n else "none.")
            )
    given = sum(test.p is not None for _, _, test in tested)
    yield (
        "p: two-sided Wilcoxon signed-rank test over cases, each case's difference averaged over the shared seeds; "
        "zero differences dropped, Holm-adjusted over the settings of one metric and class"
        + (f" ({given} tests of the main metric). " if given != 1 else " (a single test). ")
        + "The unit is the case: it speaks of these trained models, not of what retraining would give. "
        "r: matched-pairs rank-biserial correlation, positive where the setting's values are larger."
    )
    alike = tables.rows[0].runs[0].alike
    if alike:
        yield (
            f"Each of the {_plural(len(set(alike.values())), 'group')} of near duplicates counts as one case in the "
            f"tests ({len(alike)} cases in all)."
        )
    for row, cell, test in tested:
        if test.p is None:
            yield f"No p for {row.setting!r}: {test.reason}."
        ours, theirs = cell.one_sided
        if ours or theirs:
            yield (
                f"{row.setting!r}: {ours} case scores count for it alone and {theirs} for the baseline alone "
                "(empty on both sides for the other); the test leaves them out, the means do not."
            )
    if tables.digits is not None:
        yield (
            f"Some cases files were written with {OLD_DIGITS} digits, so all cases were rounded to that for the tests: "
            "close scores count as equal. Scoring the runs again removes this."
        )


def _tested(tables: TableSet) -> Iterator[tuple[Row, Cell, PairedTest]]:
    """Every setting with a test, and its numbers of the main metric, mean over classes."""
    for row in tables.rows:
        cell = row.cells[MEAN, tables.metrics[0]]
        if cell.test is not None:
            yield row, cell, cell.test


def _state(item: Absent) -> str:
    return item.state


def _state_text(state: str) -> str:
    return {"waiting": "not started", "running": "unfinished", "pruned": "ended early"}.get(state, state)


def _seeds(items: Sequence[Absent]) -> str:
    parts = []
    for item in sorted(items, key=lambda item: item.seed):
        code = "" if item.exit_code is None else f", exit {item.exit_code}"
        parts.append(f"seed {item.seed}{code}" + (f": {_KINDS[item.exit_code]}" if item.exit_code in _KINDS else ""))
    return "; ".join(parts)


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")
