"""A page about one run or several beside each other, and its tables as files. Equal runs give equal bytes."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from knowsam.engine.scores import MEAN
from knowsam.errors import ConfigError, StorageError
from knowsam.files import write_text
from knowsam.palette import CLASS_COLOURS
from knowsam.report import pseudo, run_tables
from knowsam.report.cautions import cautions, changed_predictions
from knowsam.report.checks import KINDS, choose_outputs, refuse_mixture
from knowsam.report.markup import markdown_text, to_csv, to_latex, to_markdown
from knowsam.report.notes import rule
from knowsam.report.overlays import Overlay, choose_cases, to_svg
from knowsam.report.page import Figure, figure, render
from knowsam.report.record import Record
from knowsam.report.run_curves import curve_notes, curves, teaching
from knowsam.report.run_plots import distributions
from knowsam.report.tables import Table, metric_name, number

SHOWN_FIRST = ("dice", "hd95")
"""Metrics whose distributions need no unfolding."""


@dataclass(frozen=True)
class Panel:
    """A picture that belongs on the page.

    Attributes:
        run: its name.
        case: id.
        why: it was chosen.
    """

    run: str
    case: str
    why: str


@dataclass(frozen=True)
class Extras:
    """What a page shows beside what lies in the run folders.

    Attributes:
        panels: pictures to show, in order.
        overlays: (run, case) -> what to draw there.
        without: run -> why it has no pictures.
        pseudo_labels: one per run, if they were asked for.
        defaults: run -> dotted key -> value that the setting has by default.
    """

    panels: Sequence[Panel] = ()
    overlays: Mapping[tuple[str, str], Overlay] = field(default_factory=dict)
    without: Mapping[str, str] = field(default_factory=dict)
    pseudo_labels: Sequence[pseudo.PseudoLabels] = ()
    defaults: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def main_outputs(records: Sequence[Record], output: str | None) -> dict[str, str]:
    """Name of each scored run -> the output that stands for it: the deployed one if None.

    Raises:
        ConfigError: a scored run lacks the output.
        DataError: the scored runs have different classes, and so nothing to be shown beside each other.
    """
    scored = [record.scores for record in records if record.scores is not None]
    if scored:
        refuse_mixture(scored, (), KINDS)
    return choose_outputs(scored, output)


def plan_panels(records: Sequence[Record], outputs: Mapping[str, str], count: int) -> list[Panel]:
    """Which cases to show: the same for all runs that were scored on the same ones, else each run's own.

    Args:
        records: of the page.
        outputs: from ``main_outputs``.
        count: of best, median and worst cases each; 0 for none.
    """
    scored = [record for record in records if record.scores is not None]
    if len({record.scores.scores["cases_sha256"] for record in scored}) == 1:
        picks = choose_cases([r.scores for r in scored], [outputs[r.name] for r in scored], count)
        return [Panel(record.name, pick.case, pick.why) for pick in picks for record in scored]
    return [
        Panel(record.name, pick.case, pick.why)
        for record in scored
        for pick in choose_cases([record.scores], [outputs[record.name]], count)
    ]


def write_page(path: Path, records: Sequence[Record], outputs: Mapping[str, str], extras: Extras) -> list[Path]:
    """Write the page, and its tables of scores beside it; each file appears whole or not at all.

    Args:
        path: ends in ``.html``; its folder is made if it is not there.
        records, outputs, extras: what to show.
    Returns:
        The page, then ``<stem>_tables.md``, ``.tex`` and ``.csv`` if any run has scores.
    Raises:
        ConfigError: ``path`` is a folder or has another ending.
        DataError: runs of different classes.
        StorageError: the disk refuses.
    """
    check_path(path)
    texts = {path: page(records, outputs, extras)}
    scored = [record for record in records if record.scores is not None]
    if scored:
        tables = [*_score_tables(scored, outputs), *(run_tables.scores(r) for r in scored if len(scored) > 1)]
        notes = _score_notes(scored)
        title = f"# {markdown_text(_title(records))}\n\n"
        below = "".join(f"- {markdown_text(note)}\n" for note in notes)
        texts |= {
            path.with_name(f"{path.stem}_tables.md"): title + "\n".join(map(to_markdown, tables)) + "\n" + below,
            path.with_name(f"{path.stem}_tables.tex"): "\n".join(
                [r"% needs \usepackage{booktabs}", "", *(to_latex(table, notes) for table in tables)]
            ),
            path.with_name(f"{path.stem}_tables.csv"): to_csv(run_tables.score_records(scored)),
        }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"cannot make {path.parent}: {error.strerror or error}", hint="Choose another with -o."
        ) from error
    for name, text in texts.items():
        write_text(name, text)
    return list(texts)


def check_path(path: Path) -> None:
    """Refuse what is no name for a page, before any work is done.

    Raises:
        ConfigError: a folder, or another ending.
    """
    if path.is_dir() or path.suffix.lower() not in (".html", ".htm"):
        what = "is a folder" if path.is_dir() else "does not end in .html"
        better = path / "report.html" if path.is_dir() else path.with_suffix(".html")
        raise ConfigError(f"-o {path} {what}", hint=f"Name the page, such as -o {better}.")


def page(records: Sequence[Record], outputs: Mapping[str, str], extras: Extras) -> str:
    """The page as text. Arguments and errors as of ``write_page``."""
    scored = [record for record in records if record.scores is not None]
    several = len(records) > 1
    overlays_of = {
        record.name: {case: item for (run, case), item in extras.overlays.items() if run == record.name}
        for record in scored
    }
    warnings = cautions(records, outputs)
    warnings += [
        line
        for record in scored
        if overlays_of[record.name]
        for line in changed_predictions(record, outputs[record.name], overlays_of[record.name])
    ]
    score_tables = _score_tables(scored, outputs)
    first, more = _distributions(scored, outputs)
    return render(
        "report.html",
        title=_title(records),
        several=several,
        runs=[record.name for record in records],
        split=scored[0].scores.scores["split"] if scored else "",
        glance=run_tables.glance(records, outputs),
        cautions=warnings,
        scores=[
            {
                "table": table,
                "forms": {"Markdown": to_markdown(table), "LaTeX": to_latex(table), "CSV": _csv(table)},
            }
            for table in score_tables
        ],
        score_notes=_score_notes(scored),
        score_details=[run_tables.scores(r) for r in scored if several]
        + [run_tables.worst_cases(r, outputs[r.name]) for r in scored],
        distributions=first,
        more_distributions=more,
        blocks=_blocks(records, outputs, extras),
        by_class=_class_chips(scored),
        class_colours=[f"rgb{colour}" for colour in CLASS_COLOURS],
        without=[f"{name}: {reason}" if several else reason for name, reason in extras.without.items()],
        curves=list(curves(records)),
        curve_notes=curve_notes(records),
        teaching=list(teaching(records)),
        pseudo=[
            {
                "reason": (f"{found.run}: " if several else "") + found.reason if found.reason else "",
                "sentence": "" if found.reason else pseudo.sentence(found),
                "table": None if found.reason else pseudo.table(found),
                "figures": [] if found.reason else list(_pseudo_figures(found)),
            }
            for found in extras.pseudo_labels
        ],
        cost=run_tables.cost(records),
        cost_known=any(record.history.cost for record in records),
        settings=run_tables.differing_settings(records)
        if several
        else run_tables.changed_settings(records[0], extras.defaults.get(records[0].name, {})),
        all_settings=run_tables.all_settings(records, extras.defaults),
        overrides=[(record.name, record.overrides) for record in records if record.overrides],
        splits=run_tables.splits(records),
        sam=_sam(records),
        environment=run_tables.environment(records),
        diffs=[(record.name, record.diff_lines) for record in records if record.diff_lines],
    )


# ---------------------------------------------------------------- scores


def _score_tables(scored: Sequence[Record], outputs: Mapping[str, str]) -> list[Table]:
    """One run: its outputs and classes. Several: the runs beside each other, a table per class and their mean."""
    if len(scored) == 1:
        return [run_tables.scores(scored[0])]
    names = scored[0].scores.scores["class_names"] if scored else []
    names = [*([MEAN] if len(names) > 1 else []), *names]
    return [run_tables.side_by_side(scored, outputs, name) for name in names]


def _score_notes(scored: Sequence[Record]) -> list[str]:
    """What the numbers are; once where it is the same for all runs."""
    sentences = {
        record.name: rule(record.scores.scores, record.scores.scores["metrics"], record.scores.scores["unit"])
        for record in scored
    }
    if len(set(sentences.values())) == 1:
        notes = [next(iter(sentences.values()))]
    else:
        notes = [f"{name}: {sentence}" for name, sentence in sentences.items()]
    if scored:
        notes.append(
            "± is the standard deviation over cases (n - 1), not over seeds. The columns missed, false and empty count "
            "the cases whose truth alone, whose prediction alone, and where neither has the class; the mean over "
            "classes is that of the classes' means, and its counts are sums."
        )
        if len(scored) > 1:
            notes.append("Nothing here is a test: knowsam compare gives spread over seeds and paired tests.")
    return notes


def _csv(table: Table) -> str:
    return to_csv([dict(zip(table.head, row, strict=True)) for row in table.rows])


def _distributions(scored: Sequence[Record], outputs: Mapping[str, str]) -> tuple[list[Figure], list[Figure]]:
    """Plots that are shown at once, and those that are unfolded: a panel per class, a row per output or run."""
    first: list[Figure] = []
    more: list[Figure] = []
    if not scored:
        return first, more
    names = scored[0].scores.scores["class_names"]
    metrics = [m for m in scored[0].scores.scores["metrics"] if all(m in r.scores.scores["metrics"] for r in scored)]
    units = "/".join(dict.fromkeys(record.scores.scores["unit"] for record in scored))

    def add(place: list[Figure], metric: str, rows: Mapping[str, tuple[Record, str]], words: str) -> None:
        panels = {
            name: {
                row: list(record.scores.case_values(output, name, metric).values())
                for row, (record, output) in rows.items()
            }
            for name in names
        }
        colours = {row: i for i, row in enumerate(rows)}
        caption = f"{metric_name(metric, units, arrow=False)}{words}: a dot a case; box: quartiles, line: median, "
        caption += "whiskers: 5 % to 95 %"
        place.append(figure(distributions(f"cases {metric}{words}", panels, metric, units, colours), caption))

    if len(scored) == 1:
        rows = {output: (scored[0], output) for output in scored[0].scores.outputs}
        for metric in metrics:
            add(first if metric in SHOWN_FIRST else more, metric, rows, "")
        return first, more
    chosen = {record.name: (record, outputs[record.name]) for record in scored}
    for metric in metrics:
        add(first if metric in SHOWN_FIRST else more, metric, chosen, "")
    for output in dict.fromkeys(output for record in scored for output in record.scores.outputs):
        rows = {record.name: (record, output) for record in scored if output in record.scores.outputs}
        if any(outputs[name] != output for name in rows):
            add(more, metrics[0], rows, f" of {output}")
    return first, more


# ---------------------------------------------------------------- cases


def _blocks(records: Sequence[Record], outputs: Mapping[str, str], extras: Extras) -> list[dict[str, Any]]:
    """Pictures under headings: one run's by why they were chosen, several runs' by case."""
    panels = [panel for panel in extras.panels if (panel.run, panel.case) in extras.overlays]
    shared = len({panel.run for panel in panels}) > 1 and len({p.case for p in panels}) < len(panels)
    found: dict[str, list[dict[str, str]]] = {}
    for panel in panels:
        overlay = extras.overlays[panel.run, panel.case]
        place = f", {overlay.place}" if overlay.place else ""
        scores = _dice_words(overlay)
        if shared:
            title, caption = f"{panel.why}: {panel.case}{place}", f"{panel.run}: {scores}"
        elif len(records) > 1:
            title, caption = f"{panel.run}, {panel.why}", f"{panel.case}{place}: {scores}"
        else:
            title, caption = panel.why, f"{panel.case}{place}: {scores}"
        words = f"{panel.case}{place}, {panel.run}: outlines of truth and of {outputs[panel.run]}; {scores}"
        found.setdefault(title, []).append({"svg": to_svg(overlay, words), "caption": caption})
    return [{"title": title, "panels": items} for title, items in found.items()]


def _dice_words(overlay: Overlay) -> str:
    """``Dice % 81.20``, or the classes' one after the other."""
    values = {name: "absent on both sides" if d is None else number("dice", d) for name, d in overlay.dice.items()}
    if len(values) == 1:
        return f"Dice % {next(iter(values.values()))}"
    return "Dice % " + ", ".join(f"{name} {value}" for name, value in values.items())


def _class_chips(scored: Sequence[Record]) -> list[str]:
    """Names of the classes, where their outlines are told apart by colour."""
    names = list(scored[0].scores.scores["class_names"]) if scored else []
    return names if len(names) > 1 else []


# ---------------------------------------------------------------- the rest


def _pseudo_figures(found: pseudo.PseudoLabels) -> Iterator[Figure]:
    svg = pseudo.figure(found)
    if svg is not None:
        yield figure(svg, f"{found.run}: Dice on unlabelled training cases, mean over cases and classes")


def _sam(records: Sequence[Record]) -> list[tuple[str, str]]:
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


def _title(records: Sequence[Record]) -> str:
    names = list(dict.fromkeys(str(record.settings.get("name") or "") for record in records))
    experiment = names[0] if len(names) == 1 and names[0] else "runs"
    return f"{experiment}: {records[0].name}" if len(records) == 1 else f"{experiment}: {len(records)} runs"
