"""Which subgroup a case belongs to: the folder in its id, a column of a table, or the domain that its source names."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from knowsam.data.source import Source
from knowsam.data.splits import DUPLICATES_FILE, GROUPS_FILE, read_groups
from knowsam.errors import DataError, NotFoundError

FOLDER, DOMAIN = "folder", "domain"


"""Beside the lists where pictures of one list show the same thing: ``id,group``, those pictures only."""


def subgroups(by: str, source: Source, case_ids: Sequence[str]) -> tuple[dict[str, str], str]:
    """The subgroup of each case, and what the subgroups are, in words.

    Args:
        by: ``folder``: the part of the id before its last ``/``; ``domain``: as the source says; ``FILE.csv:COLUMN`` of
            a table with a column ``id`` (without ``:COLUMN``: its column ``group``); or the name of a column of
            ``groups.csv`` beside the split lists.
        source: the data set.
        case_ids: of it.
    Raises:
        NotFoundError: no such table.
        DataError: no such column, or no case has a subgroup.
    """
    if by == FOLDER:
        found = {case: case.rpartition("/")[0] for case in case_ids if "/" in case}
        if not found:
            raise DataError(
                f"no id names a folder, {case_ids[0]!r} for one, so there are no subgroups by {FOLDER}",
                hint="Give a table: --by FILE.csv:COLUMN, with a column id.",
            )
        return found, FOLDER
    if by == DOMAIN:
        found = domains(source, case_ids)
        if not found:
            raise DataError("the data name no domain", hint="Give a table: --by FILE.csv:COLUMN, with a column id.")
        return found, DOMAIN
    path, column = _table(by, source)
    groups = read_groups(path, group_column=column)
    found = {case: groups[case] for case in case_ids if case in groups}
    if not found:
        raise DataError(
            f"none of the {len(case_ids)} cases is in {path} with a {column}: the ids there are "
            f"{', '.join(map(repr, list(groups)[:3])) or 'none'}, those of the cases {case_ids[0]!r} and so on",
            hint="The column id must hold the ids of the split lists.",
        )
    return found, column


def domains(source: Source, case_ids: Sequence[str]) -> dict[str, str]:
    """Domain of each case, of sources that name one; empty for others."""
    of = getattr(source, "domain", None)
    if not callable(of):
        return {}
    named = {case: of(case) for case in case_ids}
    return {case: str(name) for case, name in named.items() if name is not None}


def near_duplicates(source: Source, case_ids: Sequence[str]) -> dict[str, str]:
    """Group of each case that shows nearly the same as another of them, by the table beside the split lists.

    Args:
        source: the data set.
        case_ids: that are scored.
    Raises:
        DataError: the table cannot be read.
    """
    folder = getattr(getattr(source, "splits", None), "folder", None)
    if folder is None or not (Path(folder) / DUPLICATES_FILE).is_file():
        return {}
    groups = read_groups(Path(folder) / DUPLICATES_FILE)
    found = {case: groups[case] for case in case_ids if case in groups}
    members = Counter(found.values())
    return {case: group for case, group in found.items() if members[group] > 1}


def _table(by: str, source: Source) -> tuple[Path, str]:
    """The file and its column."""
    file, _, column = by.rpartition(":")
    if file.lower().endswith(".csv"):
        return Path(file), column
    if by.lower().endswith(".csv"):
        return Path(by), "group"
    folder = getattr(getattr(source, "splits", None), "folder", None)
    if folder is None or not (Path(folder) / GROUPS_FILE).is_file():
        raise NotFoundError(
            f"--by {by}: there is no {GROUPS_FILE} beside the split lists with such a column",
            hint=f"Allowed: {FOLDER}, {DOMAIN}, FILE.csv:COLUMN, or a column of {GROUPS_FILE}.",
        )
    return Path(folder) / GROUPS_FILE, by
