"""The lists of a study, counted for people and written down."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import knowsam
from knowsam.data.make_splits import list_files, lists_hash, write_lists
from knowsam.study.classes import class_shares
from knowsam.study.read import Study


def list_table(study: Study) -> tuple[list[str], list[list[str]]]:
    """Column names and rows of the table of lists: cases, patients where they are known, each class's share in %."""
    columns = ["list", "cases", *(["groups"] if study.groups else []), *(f"{name} %" for name in study.classes.names)]
    rows = []
    for name, ids in study.drawn.lists.items():
        row = [name, str(len(ids))]
        if study.groups:
            row.append(str(len({study.groups[i] for i in ids})))
        if name == "train":  # most of its masks are never used; their shares would say what training does not know
            row += ["-"] * len(study.classes.names)
        else:
            row += [f"{100 * share:.2f}" for share in class_shares(study.survey, ids, study.classes.table)]
        rows.append(row)
    return columns, rows


def study_files(study: Study) -> dict[str, str]:
    """File name -> text of every list; with ``groups.csv`` where a table named the patients."""
    return list_files(study.drawn, study.groups if study.options.groups else None)


def write_study_lists(study: Study, folder: str | Path, *, command: str, force: bool = False) -> bool:
    """Write the lists and the summary that says how they were made.

    Args:
        study: read and drawn.
        folder: for the lists; made if it is not there.
        command: the command line that would do the same again.
        force: replace other lists.
    Returns:
        False if exactly these lists were there already; then nothing is written.
    Raises:
        ExistsError: other lists are there and ``force`` is not given.
        StorageError: the folder cannot be written.
    """
    files = study_files(study)
    return write_lists(folder, files, summary(study, files, command), force=force)


def summary(study: Study, files: Mapping[str, str], command: str) -> str:
    """The text of ``summary.md``.

    Args:
        study: read and drawn.
        files: file name -> text of every list.
        command: the command line that would do the same again.
    """
    columns, rows = list_table(study)
    lines = [
        "# Split lists",
        "",
        f"Drawn by knowsam {knowsam.__version__} with",
        "",
        f"    {command}",
        "",
        "Ids only, sorted, one a line. `train.txt` holds every training case; the `labelled_*.txt` lists, each inside",
        "every larger one, name those whose masks may be used. Do not edit them after the first training.",
        "",
        "| " + " | ".join(columns) + " |",
        "|---" * len(columns) + "|",
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
        *(f"- {note}" for note in study.notes),
        *(f"- Warning: {warning}" for warning in study.warnings),
        "",
        f"sha256 of all lists: `{lists_hash(files)}`",
        "",
        *(f"- `{name}`: `{hashlib.sha256(text.encode()).hexdigest()}`" for name, text in sorted(files.items())),
    ]
    return "\n".join(lines) + "\n"
