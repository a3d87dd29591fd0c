"""A comparison as files: Markdown, LaTeX, CSV, one HTML page, and its plots. Equal numbers give equal bytes."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from knowsam.engine.scores import MEAN
from knowsam.errors import StorageError
from knowsam.files import write_text
from knowsam.report.compare import plots, tables
from knowsam.report.compare.collect import on_data
from knowsam.report.compare.comparison import Comparison, TableSet
from knowsam.report.compare.notes import notes
from knowsam.report.document import figure, render
from knowsam.report.numbers import metric_name
from knowsam.report.table import Table, markdown_text, to_csv, to_latex, to_markdown

STEM = "comparison"
"""Of the files' names."""


@dataclass(frozen=True)
class Plot:
    """A picture of one experiment.

    Attributes:
        file: its name.
        caption: plain words.
        svg: the picture.
    """

    file: str
    caption: str
    svg: str


Plots = Mapping[str, Sequence[Plot]]
"""Experiment -> its pictures."""


def write(comparison: Comparison, folder: str | os.PathLike[str]) -> list[Path]:
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
    drawn = {item.experiment: list(_plots(comparison, item)) for item in comparison.sets}
    texts = {
        f"{STEM}.md": markdown(comparison, drawn),
        f"{STEM}.tex": latex(comparison),
        f"{STEM}.csv": to_csv([record for item in _filled(comparison) for record in tables.records(item)]),
        f"{STEM}.html": html(comparison, drawn),
    }
    texts |= {plot.file: plot.svg for some in drawn.values() for plot in some}
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"cannot make {folder}: {error.strerror or error}", hint="Choose another with -o."
        ) from error
    for name, text in texts.items():
        write_text(folder / name, text)
    return [folder / name for name in texts]


def markdown(comparison: Comparison, drawn: Plots) -> str:
    """All tables and notes.

    Args:
        comparison: what to show.
        drawn: the plots to link to.
    """
    parts = [f"# {markdown_text(comparison.name)}: comparison on {comparison.split}", ""]
    for item in comparison.sets:
        parts += [f"## {markdown_text(item.experiment)}", ""]
        if item.rows:
            parts += [to_markdown(tables.results(item)), to_markdown(tables.errors(item))]
        over = data_sets_of(comparison, item)
        parts += [to_markdown(over)] if over is not None else []
        parts += [*(f"- {markdown_text(note)}" for note in notes(item)), ""]
        for plot in drawn[item.experiment]:
            parts += [f"![{markdown_text(plot.caption)}]({plot.file})", ""]
        parts += [to_markdown(table) for table in _details(item)]
    return "\n".join(parts).rstrip("\n") + "\n"


def latex(comparison: Comparison) -> str:
    """The result tables, and the tests of the mean over classes, a table per metric so that each fits a page."""
    parts = [r"% needs \usepackage{booktabs}", ""]
    for item in _filled(comparison):
        parts += [to_latex(tables.results(item), notes(item)), to_latex(tables.errors(item))]
        over = data_sets_of(comparison, item)
        parts += [to_latex(over)] if over is not None else []
        parts += [to_latex(tables.results(item, name)) for name in item.classes[1:]]
        if item.baseline is not None:
            parts += [to_latex(tables.tests(item, metrics=[metric])) for metric in item.metrics]
    return "\n".join(parts)


def html(comparison: Comparison, drawn: Plots) -> str:
    """One page that needs no other file and no network.

    Args:
        comparison: what to show.
        drawn: the plots to embed.
    """
    sections: list[dict[str, Any]] = [
        {
            "title": item.experiment,
            "results": [tables.results(item), tables.errors(item)] if item.rows else [],
            "data_sets": data_sets_of(comparison, item),
            "notes": notes(item),
            "figures": [figure(plot.svg, plot.caption) for plot in drawn[item.experiment]],
            "details": list(_details(item)),
        }
        for item in comparison.sets
    ]
    return render("compare/comparison.html", name=comparison.name, split=comparison.split, sections=sections)


def data_sets_of(comparison: Comparison, item: TableSet) -> Table | None:
    """The own and the other data of an experiment beside each other; None in the sections of the others.

    Args:
        comparison: with ``item``.
        item: of one experiment, on its own data or on others.
    """
    if not item.rows or item.dataset is not None:
        return None
    others = [
        o for o in comparison.sets if o.dataset is not None and o.experiment == on_data(item.experiment, o.dataset)
    ]
    return tables.data_sets([item, *others])


def _filled(comparison: Comparison) -> list[TableSet]:
    return [item for item in comparison.sets if item.rows]


def _details(item: TableSet) -> Iterator[Table]:
    """Tables after the first."""
    if not item.rows:
        return
    for name in item.classes[1:]:
        yield tables.results(item, name)
        yield tables.errors(item, name)
    if item.baseline is not None:
        for name in item.classes:
            yield tables.tests(item, name)
    if item.settings:
        yield tables.settings(item)
    yield tables.checkpoints(item)


def _plots(comparison: Comparison, item: TableSet) -> Iterator[Plot]:
    prefix = "" if len(comparison.sets) == 1 else f"{_slug(item, comparison)}_"
    for metric in item.metrics:
        name = metric_name(metric, item.units, arrow=False)
        if item.curves:
            caption = f"{name} on {comparison.split} against the number of labelled cases, mean and sd over seeds"
            yield Plot(f"{prefix}label_efficiency_{metric}.svg", caption, plots.label_efficiency(item, metric))
        if any(row.cells[MEAN, metric].differences for row in item.rows):
            caption = f"{name}: difference to {item.baseline!r}, a dot a case; box: quartiles, whiskers: 5 % to 95 %"
            yield Plot(f"{prefix}differences_{metric}.svg", caption, plots.differences(item, metric))


def _slug(item: TableSet, comparison: Comparison) -> str:
    """The experiment's name as part of a file name, different from that of the others."""
    slugs = [re.sub(r"[^A-Za-z0-9-]+", "_", other.experiment).strip("_") or "x" for other in comparison.sets]
    place = comparison.sets.index(item)
    return slugs[place] if slugs.count(slugs[place]) == 1 else f"{slugs[place]}_{place + 1}"
