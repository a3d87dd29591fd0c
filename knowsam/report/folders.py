"""Which run folders the arguments of a command name, and texts without the folders of this machine."""

import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

from knowsam.errors import ConfigError, NotFoundError

_PLACES = re.compile(r"(?<![\w.:/])(?:/[^\s/:'\",]+)+/(?=[^\s/:'\",])")


def named_folders(arguments: Sequence[str]) -> list[tuple[str | None, str]]:
    """(name that the user gave or None, folder) of every run, in the order of the arguments.

    Args:
        arguments: folders, also as ``NAME=FOLDER``. Patterns such as ``full=runs/full_*`` are expanded.
    Raises:
        NotFoundError: an argument names no folder.
        ConfigError: a folder is named twice.
    """
    named = [pair for argument in arguments for pair in _expand(argument)]
    seen: set[str] = set()
    for _, folder in named:
        real = os.path.realpath(folder)
        if real in seen:
            raise ConfigError(f"{folder} is named twice", hint="Give each run once.")
        seen.add(real)
    return named


def _expand(argument: str) -> list[tuple[str | None, str]]:
    """The pairs of one argument; a folder whose own name holds ``=`` is a folder."""
    if Path(argument).is_dir():
        return [(None, argument)]
    places = [i for i, letter in enumerate(argument) if letter == "="]
    for place in places:
        name, pattern = argument[:place], argument[place + 1 :]
        folders = [pattern] if Path(pattern).is_dir() else sorted(p for p in glob.glob(pattern) if Path(p).is_dir())
        if name and pattern and folders:
            return [(name, folder) for folder in folders]
    raise NotFoundError(
        f"there is no folder {argument}",
        hint="Give run folders that train wrote, NAME=FOLDER, or the folder of a sweep.",
    )


@overload
def without_places(value: str) -> str: ...
@overload
def without_places(value: Any) -> Any: ...
def without_places(value: Any) -> Any:
    """Text, or a list of it, with ``.../name`` for each absolute path: a page may be shown to anybody.

    Args:
        value: what is neither text nor a list stays as it is.
    """
    if isinstance(value, list):
        return [without_places(item) for item in value]
    return _PLACES.sub("…/", value) if isinstance(value, str) else value
