"""What a page about runs says, section by section: the values that ``page.html`` lays out."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from knowsam.engine.scores import MEAN
from knowsam.palette import CLASS_COLOURS
from knowsam.report.document import Figure, figure
from knowsam.report.numbers import number, postprocessing, scoring_rule
from knowsam.report.page import run_tables
from knowsam.report.page.cautions import cautions, changed_predictions
from knowsam.report.page.curves import curve_figures, curve_notes, teaching_figures
from knowsam.report.page.distributions import distribution_figures
from knowsam.report.page.overlays import Overlay, to_svg
from knowsam.report.page.pictures import Pictures
from knowsam.report.page.pseudo_labels import PseudoLabels, pseudo_label_note, pseudo_label_plot, pseudo_label_table
from knowsam.report.page.record import Record, scored_runs
from knowsam.report.page.score_tables import (
    error_table,
    errors_side_by_side,
    other_data_table,
    score_table,
    side_by_side,
    subgroup_table,
    worst_cases,
)
from knowsam.report.page.setting_tables import all_settings, changed_settings, differing_settings
from knowsam.report.runs import Run
from knowsam.report.table import Table, to_csv, to_latex, to_markdown

Values = dict[str, Any]
"""Names of the template -> what stands there."""


def head(records: Sequence[Record], outputs: Mapping[str, str], pictures: Pictures) -> Values:
    """Title, warnings, and the runs at a glance."""
    runs = scored_runs(records)
    warnings = cautions(records, outputs)
    for run in runs:
        overlays = pictures.of(run.setting)
        warnings += changed_predictions(run, outputs[run.setting], overlays) if overlays else []
    return {
        "title": title(records),
        "several": len(records) > 1,
        "runs": [record.name for record in records],
        "split": runs[0].scores["split"] if runs else "",
        "cautions": warnings,
        "glance": run_tables.glance(records, outputs),
    }


def title(records: Sequence[Record]) -> str:
    """The experiment, and the run or how many there are."""
    names = list(dict.fromkeys(str(record.settings.get("name") or "") for record in records))
    experiment = names[0] if len(names) == 1 and names[0] else "runs"
    return f"{experiment}: {records[0].name}" if len(records) == 1 else f"{experiment}: {len(records)} runs"


# ---------------------------------------------------------------- scores


def scores(records: Sequence[Record], outputs: Mapping[str, str]) -> Values:
    """Tables of scores, each also to be copied, and how the cases are distributed."""
    runs = scored_runs(records)
    first, more = distribution_figures(runs, outputs)
    details = [table for run in runs if len(records) > 1 for table in (score_table(run), error_table(run))]
    details += [worst_cases(run, outputs[run.setting]) for run in runs]
    others = [run for record in records for run in record.others]
    apart = [subgroup_table(runs, outputs), other_data_table(others, outputs)]
    return {
        "scores": [
            {
                "table": table,
                "forms": {"Markdown": to_markdown(table), "LaTeX": to_latex(table), "CSV": _csv(table)},
            }
            for table in [*score_tables(runs, outputs), *(table for table in apart if table is not None)]
        ],
        "score_notes": score_notes(runs),
        "score_details": details,
        "distributions": first,
        "more_distributions": more,
    }


def score_tables(runs: Sequence[Run], outputs: Mapping[str, str]) -> list[Table]:
    """One run: its outputs and classes. Several: the runs beside each other, a table per class and their mean.

    Args:
        runs: of the same classes.
        outputs: name of each run -> the output that stands for it among several.
    """
    if len(runs) == 1:
        return [score_table(runs[0]), error_table(runs[0])]
    names = runs[0].scores["class_names"] if runs else []
    names = [*([MEAN] if len(names) > 1 else []), *names]
    scores = [side_by_side(runs, outputs, name) for name in names]
    return scores + [errors_side_by_side(runs, outputs, name) for name in names]


def score_notes(runs: Sequence[Run]) -> list[str]:
    """What the numbers are; once where it is the same for all runs."""
    rules = {run.setting: scoring_rule(run.scores, run.scores["metrics"], run.scores["unit"]) for run in runs}
    for run in runs:
        done: dict[str, list[str]] = {}
        for output in run.outputs:
            if text := postprocessing(run.scores, output):
                done.setdefault(text, []).append(output)
        if done:
            words = "; ".join(f"{text} of {', '.join(outputs)}" for text, outputs in done.items())
            rules[run.setting] += f" Post-processing: {words}."
    if len(set(rules.values())) == 1:
        notes = [next(iter(rules.values()))]
    else:
        notes = [f"{name}: {rule}" for name, rule in rules.items()]
    if runs:
        notes.append(
            "± is the standard deviation over cases (n - 1), not over seeds. The columns missed, false and empty count "
            "the cases whose truth alone, whose prediction alone, and where neither has the class; the mean over "
            "classes is that of the classes' means, and its counts are sums. Recall is the sensitivity of pixels. "
            "Image sensitivity: of the cases with the structure the share where some of it was found. "
            "Image specificity: of the cases without it the share where none was."
        )
    if len(runs) > 1:
        notes.append("Nothing here is a test: knowsam compare gives spread over seeds and paired tests.")
    return notes


def _csv(table: Table) -> str:
    return to_csv([dict(zip(table.head, row, strict=True)) for row in table.rows])


# ---------------------------------------------------------------- cases


def cases(records: Sequence[Record], outputs: Mapping[str, str], pictures: Pictures) -> Values:
    """Pictures under headings, or why there are none."""
    runs = scored_runs(records)
    # Outlines are told apart by colour where there are several classes.
    names = list(runs[0].scores["class_names"]) if runs else []
    return {
        "blocks": _blocks(outputs, pictures, several=len(records) > 1),
        "by_class": names if len(names) > 1 else [],
        "class_colours": [f"rgb{colour}" for colour in CLASS_COLOURS],
        "without": [f"{name}: {why}" if len(records) > 1 else why for name, why in pictures.without.items()],
    }


def _blocks(outputs: Mapping[str, str], pictures: Pictures, *, several: bool) -> list[Values]:
    """One run's pictures by why they were chosen, several runs' by case."""
    panels = [panel for panel in pictures.panels if (panel.run, panel.case) in pictures.overlays]
    shared = len({panel.run for panel in panels}) > 1 and len({panel.case for panel in panels}) < len(panels)
    found: dict[str, list[dict[str, str]]] = {}
    for panel in panels:
        overlay = pictures.overlays[panel.run, panel.case]
        place = f", {overlay.place}" if overlay.place else ""
        dice = _dice_text(overlay)
        if shared:
            heading, caption = f"{panel.why}: {panel.case}{place}", f"{panel.run}: {dice}"
        elif several:
            heading, caption = f"{panel.run}, {panel.why}", f"{panel.case}{place}: {dice}"
        else:
            heading, caption = panel.why, f"{panel.case}{place}: {dice}"
        description = f"{panel.case}{place}, {panel.run}: outlines of truth and of {outputs[panel.run]}; {dice}"
        found.setdefault(heading, []).append({"svg": to_svg(overlay, description), "caption": caption})
    return [{"title": heading, "panels": items} for heading, items in found.items()]


def _dice_text(overlay: Overlay) -> str:
    """``Dice % 81.20``, or the classes' one after the other."""
    values = {name: "absent on both sides" if d is None else number("dice", d) for name, d in overlay.dice.items()}
    if len(values) == 1:
        return f"Dice % {next(iter(values.values()))}"
    return "Dice % " + ", ".join(f"{name} {value}" for name, value in values.items())


# ---------------------------------------------------------------- the training


def training(records: Sequence[Record]) -> Values:
    """Curves over the steps, and what the training cost."""
    return {
        "curves": list(curve_figures(records)),
        "curve_notes": curve_notes(records),
        "teaching": list(teaching_figures(records)),
        "cost": run_tables.cost(records),
        "cost_known": any(record.history.cost for record in records),
    }


def pseudo_labels(found: Sequence[PseudoLabels], *, several: bool) -> Values:
    """How good the pseudo-labels are, for each run of which it was asked."""
    return {"pseudo": [_pseudo_labels(item, several) for item in found]}


def _pseudo_labels(found: PseudoLabels, several: bool) -> Values:
    if found.reason:
        reason = f"{found.run}: {found.reason}" if several else found.reason
        return {"reason": reason, "sentence": "", "table": None, "figures": []}
    return {
        "reason": "",
        "sentence": pseudo_label_note(found),
        "table": pseudo_label_table(found),
        "figures": list(_pseudo_label_figures(found)),
    }


def _pseudo_label_figures(found: PseudoLabels) -> Iterator[Figure]:
    svg = pseudo_label_plot(found)
    if svg is not None:
        yield figure(svg, f"{found.run}: Dice on unlabelled training cases, mean over cases and classes")


# ---------------------------------------------------------------- what was trained


def configuration(records: Sequence[Record]) -> Values:
    """Settings, data, SAM's weights and the environment."""
    return {
        "settings": differing_settings(records) if len(records) > 1 else changed_settings(records[0]),
        "all_settings": all_settings(records),
        "overrides": [(record.name, record.overrides) for record in records if record.overrides],
        "splits": run_tables.splits(records),
        "sam": _sam_weights(records),
        "environment": run_tables.environment(records),
        "diffs": [(record.name, record.diff_lines) for record in records if record.diff_lines],
    }


def _sam_weights(records: Sequence[Record]) -> list[tuple[str, str]]:
    """Text by run: the load report, or that there is none."""
    found = []
    for record in records:
        trained = any(name == "sam" or name.startswith("skd") for name in record.history.losses)
        if record.sam_weights:
            found.append((record.name, record.sam_weights))
        elif trained:
            weights = record.settings.get("sam.weights")
            what = f"sam.weights is {weights}" if weights else "sam.weights is null: random weights"
            found.append((record.name, f"no load report is kept (the run is older than that); {what}"))
    return found
