"""What of a folder is read, as which case, and what is passed over."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from knowsam.errors import NotFoundError
from knowsam.io.dicom_series import DIRECTORY, EXTENSIONS, series_of
from knowsam.io.kind import suffix

_JUNK = {"thumbs.db", "desktop.ini"}
HIDDEN = "hidden or of the system"
LINK = "link to a folder"
NOT_A_FILE = "not a regular file"
NO_KIND = "no extension, and of no known content"
SEVERAL_SERIES = "several DICOM series in one folder"


@dataclass(frozen=True)
class Scan:
    """A folder's files.

    Attributes:
        files: case id -> its files, sorted. The id is the path below the folder with ``/`` and without extension. Of a
            DICOM series the folder that holds its slices is the one "file".
        passed_over: extension, in small letters, or reason -> paths, sorted.
    """

    files: dict[str, list[Path]]
    passed_over: dict[str, list[Path]]

    @property
    def notes(self) -> tuple[str, ...]:
        """A line for each reason: how many, and the first of them."""
        return tuple(
            f"{len(paths)} passed over, {reason}: {', '.join(p.name for p in paths[:3])}{', ...' * (len(paths) > 3)}"
            for reason, paths in self.passed_over.items()
        )


def scan_folder(
    folder: str | Path, extensions: frozenset[str], knows: Callable[[Path], bool], *, series: bool = True
) -> Scan:
    """See ``knowsam.io.scan``.

    Args:
        folder: where to look; its subfolders too.
        extensions: that are read, in small letters.
        knows: whether a file without extension is read, by its content.
        series: whether folders of DICOM slices are volumes; else each file is a picture.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise NotFoundError(f"data folder {folder} does not exist", hint="check the dataset's root and folder names")
    files: dict[str, list[Path]] = {}
    passed: dict[str, list[Path]] = {}
    for parent, names in _walk(folder, passed):
        slices: list[Path] = []
        for path in names:
            ending = suffix(path.name)
            if ending.lower() in EXTENSIONS and series:
                slices.append(path)
            elif ending.lower() in extensions:
                files.setdefault(_id(path, folder, ending), []).append(path)
            elif path.name == DIRECTORY:
                passed.setdefault("table of contents of DICOM", []).append(path)
            elif ending:
                passed.setdefault(ending.lower(), []).append(path)
            elif knows(path):
                slices.append(path)
            else:
                passed.setdefault(NO_KIND, []).append(path)
        found, single = series_of(slices, strict=False) if series and len(slices) > 1 else ({}, slices)
        if len(found) > 1:
            passed.setdefault(SEVERAL_SERIES, []).append(parent)
        elif found:
            files.setdefault(_id(parent, folder, "") if parent != folder else folder.resolve().name, []).append(parent)
            passed.setdefault("beside a DICOM series", []).extend(single)
            single = []
        for path in single:
            files.setdefault(_id(path, folder, suffix(path.name)), []).append(path)
    return Scan(dict(sorted(files.items())), {k: sorted(v) for k, v in sorted(passed.items()) if v})


def _id(path: Path, folder: Path, ending: str) -> str:
    name = path.relative_to(folder).as_posix()
    return name.removesuffix(ending)


def _walk(folder: Path, passed: dict[str, list[Path]]) -> Iterator[tuple[Path, list[Path]]]:
    """Each folder with its regular files. Links to folders are not followed: a loop of them would trap the scan."""
    waiting = [folder]
    while waiting:
        parent = waiting.pop()
        names: list[Path] = []
        with os.scandir(parent) as entries:
            for entry in sorted(entries, key=lambda e: e.name):
                path = parent / entry.name
                if entry.name.startswith(".") or entry.name == "__MACOSX" or entry.name.lower() in _JUNK:
                    passed.setdefault(HIDDEN, []).append(path)
                elif entry.is_dir():
                    if entry.is_symlink():
                        passed.setdefault(LINK, []).append(path)
                    else:
                        waiting.append(path)
                elif entry.is_file():
                    names.append(path)
                else:
                    passed.setdefault(NOT_A_FILE, []).append(path)
        yield parent, names
