"""Names for groups of runs that differ in their settings: short, different, and nothing that differs is left unsaid."""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from knowsam.errors import ConfigError

LONGEST = 60
"""Letters of a name before keys are shortened to their last part."""

_ABSENT = object()

Settings = Mapping[str, Any]
"""Dotted key -> value."""


def differing_keys(settings: Sequence[Settings]) -> list[str]:
    """Dotted keys that do not have one value everywhere, in the order in which they come."""
    keys = dict.fromkeys(key for item in settings for key in item)
    return [key for key in keys if len({_text(item.get(key, _ABSENT)) for item in settings}) > 1]


def telling_keys(settings: Sequence[Settings]) -> list[str]:
    """Those of ``differing_keys`` that do not follow from another component being chosen."""
    return [key for key in differing_keys(settings) if not _follows(key, settings)]


def name_settings(runs: Sequence[tuple[str | None, Settings, str]]) -> list[str]:
    """A name for each run's setting; runs whose settings are equal share one.

    A setting is called by the keys in which it differs from the others, such as ``method.name=supervised``. What
    follows from another component being chosen is not repeated: where ``method.name`` differs, the options of the two
    methods do not stand in the name, and neither do the students that each brings. A single setting is called by its
    method.

    Args:
        runs: (name that the user gave or None, settings, name of the run folder).
    Returns:
        Names in the order of ``runs``.
    Raises:
        ConfigError: equal settings of which some are named in two ways and some not at all.
    """
    # Folders hold runs of one setting, so settings are told apart by content; the text is only a key.
    contents = [_text(dict(sorted(settings.items()))) for _, settings, _ in runs]
    given: dict[str, list[str]] = {}
    for (name, _, _), content in zip(runs, contents, strict=True):
        if name is not None and name not in given.setdefault(content, []):
            given[content].append(name)
    distinct: dict[str, tuple[Settings, str]] = {}
    for (_, settings, folder), content in zip(runs, contents, strict=True):
        distinct.setdefault(content, (settings, folder))
    automatic = dict(zip(distinct, _names(list(distinct.values())), strict=True))
    result = []
    for (name, _, folder), content in zip(runs, contents, strict=True):
        names = given.get(content, [])
        if name is None and len(names) > 1:
            raise ConfigError(
                f"run {folder} has no name, and runs of the same settings are called {' and '.join(map(repr, names))}",
                hint="Name this one too: NAME=FOLDER.",
            )
        result.append(name or (names[0] if names else automatic[content]))
    return result


def _names(groups: Sequence[tuple[Settings, str]]) -> list[str]:
    settings = [item for item, _ in groups]
    if len(groups) == 1:
        return [str(settings[0].get("method.name") or _without_seed(groups[0][1])).rpartition(":")[2]]
    keys = telling_keys(settings)
    last = Counter(key.rpartition(".")[2] for key in keys)
    short = {key: key.rpartition(".")[2] if last[key.rpartition(".")[2]] == 1 else key for key in keys}

    def by_keys(called: Mapping[str, str]) -> list[str]:
        return [", ".join(f"{called[key]}={_shown(item[key])}" for key in keys if key in item) for item, _ in groups]

    names = by_keys({key: key for key in keys})
    if max(map(len, names)) > LONGEST:  # all of them: names that stand beside each other call a key alike
        names = by_keys(short)
    names = [
        name if 0 < len(name) <= LONGEST else _without_seed(folder)
        for name, (_, folder) in zip(names, groups, strict=True)
    ]
    # Two folders may bear one name, and a shortened name may be another's.
    repeated = Counter(names)
    return [name if repeated[name] == 1 else f"{name} ({i + 1})" for i, name in enumerate(names)]


def _follows(key: str, settings: Sequence[Settings]) -> bool:
    """Whether ``a.b`` differs only where ``a.name`` differs too: another component has other options.

    A method has students, a fusion head, and optimizers of its own groups where an experiment names none.
    """
    parts = key.split(".")
    above = [".".join([*parts[:n], "name"]) for n in range(1, len(parts))]
    absent_somewhere = any(key not in item for item in settings)
    if parts[0] in ("students", "fusion") or (parts[0] == "optim" and absent_somewhere):
        above.append("method.name")
    for name in above:
        if name == key or not any(name in item for item in settings):
            continue
        values: dict[str, set[str]] = {}
        for item in settings:
            values.setdefault(_text(item.get(name, _ABSENT)), set()).add(_text(item.get(key, _ABSENT)))
        if all(len(found) == 1 for found in values.values()):
            return True
    return False


def _without_seed(folder: str) -> str:
    return re.sub(r"[-_ ]?seed[-_ ]?\d+$", "", folder) or folder


def _shown(value: Any) -> str:
    if isinstance(value, str):
        return value
    return "null" if value is None else json.dumps(value, default=str)


def _text(value: Any) -> str:
    return "absent" if value is _ABSENT else json.dumps(value, sort_keys=True, default=str)
