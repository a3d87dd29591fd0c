"""A page about one run or several beside each other, and its tables as files. Equal runs give equal bytes."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from knowsam.errors import ConfigError, StorageError
from knowsam.files import write_text
from knowsam.report.checks import KINDS, choose_outputs, refuse_mixture
from knowsam.report.document import render
from knowsam.report.page import sections
from knowsam.report.page.pictures import Pictures
from knowsam.report.page.pseudo_labels import PseudoLabels
from knowsam.report.page.record import Record, scored_runs
from knowsam.report.page.score_tables import (
    error_table,
    other_data_table,
    score_records,
    score_table,
    subgroup_table,
)
from knowsam.report.table import markdown_text, to_csv, to_latex, to_markdown


def default_path(records: Sequence[Record]) -> Path:
    """Where the page goes if nobody says it: into the folder of a single run, else here."""
    return (Path(records[0].folder) if len(records) == 1 else Path()) / "report.html"


def check_path(path: Path) -> None:
    """Refuse what is no name for a page, before any work is done.

    Raises:
        ConfigError: a folder, or another ending.
    """
    if path.is_dir() or path.suffix.lower() not in (".html", ".htm"):
        what = "is a folder" if path.is_dir() else "does not end in .html"
        better = path / "report.html" if path.is_dir() else path.with_suffix(".html")
        raise ConfigError(f"-o {path} {what}", hint=f"Name the page, such as -o {better}.")


def main_outputs(records: Sequence[Record], output: str | None) -> dict[str, str]:
    """Name of each scored run -> the output that stands for it.

    Args:
        records: of the page.
        output: name for all; each run's deployed one if None.
    Raises:
        ConfigError: a scored run lacks the output.
        DataError: the scored runs have different classes, and so nothing to be shown beside each other.
    """
    runs = scored_runs(records)
    if runs:
        refuse_mixture(runs, (), KINDS)
    return choose_outputs(runs, output)


def write_page(
    path: Path,
    records: Sequence[Record],
    outputs: Mapping[str, str],
    pictures: Pictures,
    pseudo_labels: Sequence[PseudoLabels] = (),
) -> list[Path]:
    """Write the page, and its tables of scores beside it; each file appears whole or not at all.

    Args:
        path: ends in ``.html``; its folder is made if it is not there.
        records: at least one.
        outputs: from ``main_outputs``.
        pictures: of cases.
        pseudo_labels: one per run, if they were asked for.
    Returns:
        The page, then ``<stem>_tables.md``, ``.tex`` and ``.csv`` if any run has scores.
    Raises:
        ConfigError: ``path`` is a folder or has another ending.
        DataError: runs of different classes.
        StorageError: the disk refuses.
    """
    check_path(path)
    texts = {path: page(records, outputs, pictures, pseudo_labels)}
    texts |= {path.with_name(f"{path.stem}{name}"): text for name, text in _tables(records, outputs).items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"cannot make {path.parent}: {error.strerror or error}", hint="Choose another with -o."
        ) from error
    for name, text in texts.items():
        write_text(name, text)
    return list(texts)


def page(
    records: Sequence[Record],
    outputs: Mapping[str, str],
    pictures: Pictures,
    pseudo_labels: Sequence[PseudoLabels] = (),
) -> str:
    """The page as text. Arguments and errors as of ``write_page``."""
    return render(
        "page/page.html",
        **sections.head(records, outputs, pictures),
        **sections.scores(records, outputs),
        **sections.cases(records, outputs, pictures),
        **sections.training(records),
        **sections.pseudo_labels(pseudo_labels, several=len(records) > 1),
        **sections.configuration(records),
    )


def _tables(records: Sequence[Record], outputs: Mapping[str, str]) -> dict[str, str]:
    """End of a file's name -> its text; empty if no run has scores."""
    runs = scored_runs(records)
    if not runs:
        return {}
    tables = sections.score_tables(runs, outputs)
    tables += [table for run in runs if len(runs) > 1 for table in (score_table(run), error_table(run))]
    others = [run for record in records for run in record.others]
    apart = [subgroup_table(runs, outputs), other_data_table(others, outputs)]
    tables += [table for table in apart if table is not None]
    notes = sections.score_notes(runs)
    title = f"# {markdown_text(sections.title(records))}\n\n"
    below = "".join(f"- {markdown_text(note)}\n" for note in notes)
    return {
        "_tables.md": title + "\n".join(map(to_markdown, tables)) + "\n" + below,
        "_tables.tex": "\n".join([r"% needs \usepackage{booktabs}", "", *(to_latex(table, notes) for table in tables)]),
        "_tables.csv": to_csv(score_records([*runs, *others])),
    }
