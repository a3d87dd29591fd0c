"""The settings of runs as tables: in what they differ, what is no default, and all of them."""

from collections.abc import Sequence

from knowsam.report.numbers import NONE
from knowsam.report.page.record import Record, shown
from knowsam.report.table import Table

HIDDEN = frozenset({"run", "data.cache", "data.obtain"})
"""Settings that say where files lie, or how to get them; they are no part of the experiment."""


def differing_settings(records: Sequence[Record]) -> Table | None:
    """The settings that are not the same in all runs; None when there are none."""
    keys = [key for key in _keys(records) if key != "train.seed" and _differs(records, key)]
    if any(record.seed != records[0].seed for record in records):
        keys = ["train.seed", *keys]
    rows = [[key, *(_setting(record, key) for record in records)] for key in keys]
    head = ["key", *(record.name for record in records)]
    return Table("differing", "settings in which the runs differ", head, rows, len(head)) if rows else None


def changed_settings(record: Record) -> Table:
    """The settings that are not the defaults of this version."""
    defaults = record.defaults
    rows = [
        [key, _setting(record, key), shown(defaults[key]) if key in defaults else NONE]
        for key in _keys([record])
        if _chosen(record, key)
    ]
    return Table("changed", f"{record.name}: settings other than the defaults", ["key", "value", "default"], rows, 3)


def all_settings(records: Sequence[Record]) -> Table:
    """Every setting, those that are written down and, in brackets, those that the components took by default.

    Set off are those that differ between the runs; of a single run, those that are no defaults.
    """
    written = _keys(records)
    silent = [
        key
        for key in dict.fromkeys(key for record in records for key in record.defaults)
        if key not in written and key not in HIDDEN
    ]
    rows: list[list[str]] = []
    strong = set()
    for key in [*written, *silent]:
        texts = [_with_default(record, key) for record in records]
        if len(set(texts)) > 1 or (len(records) == 1 and _chosen(records[0], key)):
            strong.add(len(rows))
        rows.append([key, *texts])
    title = "all settings; in brackets what config.yaml leaves to the component's default; set off: "
    title += "other than the default" if len(records) == 1 else "differing between the runs"
    head = ["key", *(record.name for record in records)]
    return Table("settings", title, head, rows, len(head), frozenset(strong))


def _keys(records: Sequence[Record]) -> list[str]:
    keys = dict.fromkeys(key for record in records for key, value in record.settings.items() if value != {})
    return [key for key in keys if key not in HIDDEN]


def _differs(records: Sequence[Record], key: str) -> bool:
    return len({_setting(record, key) for record in records}) > 1


def _setting(record: Record, key: str) -> str:
    return shown(record.settings[key]) if key in record.settings else NONE


def _with_default(record: Record, key: str) -> str:
    if key not in record.settings and key in record.defaults:
        return f"({shown(record.defaults[key])})"
    return _setting(record, key)


def _chosen(record: Record, key: str) -> bool:
    """Whether the value is written down and is not the default."""
    if key not in record.settings:
        return False
    return key not in record.defaults or shown(record.defaults[key]) != shown(record.settings[key])
