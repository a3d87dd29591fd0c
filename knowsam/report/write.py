"""A comparison as files: Markdown, LaTeX, CSV, one HTML page, and its plots. Equal numbers give equal bytes."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from knowsam.engine.scores import MEAN
from knowsam.errors import StorageError
from knowsam.files import write_text
from knowsam.report import plots, tables
from knowsam.report.comparison import Comparison, TableSet
from knowsam.report.markup import markdown_text, to_csv, to_latex, to_markdown
from knowsam.report.notes import notes
from knowsam.report.page import figure, render

STEM = "comparison"


def write(comparison: Comparison, folder: str | os.PathLike) -> list[Path]:
    """Write everything; each file appears whole or not at all.

    Args:
        comparison: what to show.
        folder: made if it is not there.
    Returns:
        The files: Markdown, LaTeX, CSV, HTML, then the plots.
    Raises:
        StorageError: the disk refuses.
    """
    folder = Path(folder)
    drawn = {item.experiment: dict(_plots(comparison, item)) for item in comparison.sets}
    texts = {
        f"{STEM}.md": markdown(comparison, drawn),
        f"{STEM}.tex": latex(comparison),
        f"{STEM}.csv": to_csv([record for item in _filled(comparison) for record in tables.records(item)]),
        f"{STEM}.html": html(comparison, drawn),
    }
    texts |= {name: svg for plots_of in drawn.values() for name, (_, svg) in plots_of.items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"cannot make {folder}: {error.strerror or error}", hint="Choose another with -o."
        ) from error
    for name, text in texts.items():
        write_text(folder / name, text)
    return [folder / name for name in texts]


def markdown(comparison: Comparison, drawn: dict[str, dict[str, tuple[str, str]]] | None = None) -> str:
    """All tables and notes.

    Args:
        comparison: what to show.
        drawn: experiment -> file name -> (description, SVG), for links to the plots.
    """
    parts = [f"# {markdown_text(comparison.name)}: comparison on {comparison.split}", ""]
    for item in comparison.sets:
        parts += [f"## {markdown_text(item.experiment)}", ""]
        if item.rows:
            parts += [to_markdown(tables.results(item))]
        parts += [*(f"- {markdown_text(note)}" for note in notes(item)), ""]
        for name, (description, _) in (drawn or {}).get(item.experiment, {}).items():
            parts += [f"![{markdown_text(description)}]({name})", ""]
        parts += [to_markdown(table) for table in _details(item)]
    return "\n".join(parts).rstrip("\n") + "\n"


def latex(comparison: Comparison) -> str:
    """The result tables, and the tests of the mean over classes, a table per metric so that each fits a page."""
    parts = [r"% needs \usepackage{booktabs}", ""]
    for item in _filled(comparison):
        parts += [to_latex(tables.results(item), notes(item))]
        parts += [to_latex(tables.results(item, name)) for name in item.classes[1:]]
        if item.baseline is not None:
            parts += [to_latex(tables.tests(item, metrics=[metric])) for metric in item.metrics]
    return "\n".join(parts)


def html(comparison: Comparison, drawn: dict[str, dict[str, tuple[str, str]]]) -> str:
    """One page that needs no other file and no network."""
    sections: list[dict[str, Any]] = []
    for item in comparison.sets:
        figures = [figure(svg, description) for description, svg in drawn.get(item.experiment, {}).values()]
        sections.append(
            {
                "title": item.experiment,
                "results": tables.results(item) if item.rows else None,
                "notes": notes(item),
                "figures": figures,
                "details": list(_details(item)),
            }
        )
    return render(f"{STEM}.html", name=comparison.name, split=comparison.split, sections=sections)


def _filled(comparison: Comparison) -> list[TableSet]:
    return [item for item in comparison.sets if item.rows]


def _details(item: TableSet) -> Iterator[tables.Table]:
    """Tables after the first."""
    if not item.rows:
        return
    for name in item.classes[1:]:
        yield tables.results(item, name)
    if item.baseline is not None:
        for name in item.classes:
            yield tables.tests(item, name)
    if item.settings:
        yield tables.settings(item)
    yield tables.checkpoints(item)


def _plots(comparison: Comparison, item: TableSet) -> Iterator[tuple[str, tuple[str, str]]]:
    """(file name, (description, SVG)) of every plot of one experiment."""
    prefix = "" if len(comparison.sets) == 1 else f"{_slug(item, comparison)}_"
    for metric in item.metrics:
        name = tables.metric_name(metric, item.units, arrow=False)
        if item.curves:
            words = f"{name} on {comparison.split} against the number of labelled cases, mean and sd over seeds"
            yield f"{prefix}label_efficiency_{metric}.svg", (words, plots.label_efficiency(item, metric))
        if any(row.cells[MEAN, metric].differences for row in item.rows):
            words = f"{name}: difference to {item.baseline!r}, a dot a case; box: quartiles, whiskers: 5 % to 95 %"
            yield f"{prefix}differences_{metric}.svg", (words, plots.differences(item, metric))


def _slug(item: TableSet, comparison: Comparison) -> str:
    """The experiment's name as part of a file name, different from that of the others."""
    slugs = [re.sub(r"[^A-Za-z0-9-]+", "_", other.experiment).strip("_") or "x" for other in comparison.sets]
    place = comparison.sets.index(item)
    return slugs[place] if slugs.count(slugs[place]) == 1 else f"{slugs[place]}_{place + 1}"
