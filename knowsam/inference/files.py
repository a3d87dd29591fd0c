"""Files to segment: what is found, and what a prediction in the file's own geometry looks like.

How files are read: ``knowsam.io``.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from knowsam import io
from knowsam.data.case import Case
from knowsam.errors import DataError, NotFoundError
from knowsam.io import PredictionKind, Reading

OutputKind = Literal["masks", "probabilities", "uncertainty", "overlays"]
OUTPUT_KINDS: tuple[OutputKind, ...] = ("masks", "probabilities", "uncertainty", "overlays")
"""All that may be written of a file; each kind has a folder of its name."""


@dataclass(frozen=True)
class InputFile:
    """One file, or the folder of one DICOM series, to segment.

    Attributes:
        path: where it is.
        stem: its path below the folder that was given, with ``/`` and without extension; names the case, and what is
            predicted of it.
        reading: how to read it.
    """

    path: Path
    stem: str
    reading: Reading = field(default_factory=Reading)

    @property
    def name(self) -> str:
        """The case in messages and records: stem with the file's extension."""
        return self.stem if self.path.is_dir() else self.stem + io.suffix(self.path.name)

    def read(self) -> Case:
        """The case as stored.

        Raises:
            NotFoundError: it is not there any more.
            DataError: damaged, or not what its extension says.
        """
        stored = io.read_image(self.path, self.reading)
        return Case(stored.array, stored.spacing, stored.full_range, stored.display)

    def extension(self, kind: PredictionKind) -> str:
        """What the name of a prediction ends with."""
        return io.extension(self.path, kind)

    def encode(self, kind: PredictionKind, values: np.ndarray, classes: Sequence[str]) -> bytes:
        """Content of a prediction's file, in the file's own orientation.

        Args:
            kind: what ``values`` are.
            values: label values (H, W) or (D, H, W) of unsigned integers, for pictures also colours (H, W, 3);
                probabilities (K, ...); uncertainty in 0..1, (...).
            classes: K names.
        """
        return io.encode(self.path, kind, values, classes, self.reading)[1]


@dataclass(frozen=True)
class Found:
    """What is to be segmented, and what is not.

    Attributes:
        files: sorted by name.
        passed_over: why -> files that are left out.
    """

    files: list[InputFile]
    passed_over: dict[str, list[Path]]


def find_inputs(path: str | Path, reading: Reading, *, beside: str | Path | None = None) -> list[InputFile]:
    """The files of ``find``."""
    return find(path, reading, beside=beside).files


def find(path: str | Path, reading: Reading, *, beside: str | Path | None = None) -> Found:
    """The file, or all files of known kinds in a folder and its subfolders.

    Args:
        path: file or folder. A folder of slices of one DICOM series is one case.
        reading: how to read them.
        beside: the folder that the predictions go to; what is in it is left out, or, where it holds the files
            themselves, its folders of predictions.
    Raises:
        NotFoundError: no such file or folder.
        DataError: a file of an unknown kind, or a folder without one of a known kind.
    """
    path = Path(path)
    if not path.exists():
        raise NotFoundError(f"{path} does not exist", hint="Give a picture, a volume, or a folder that holds some.")
    if not path.is_dir():
        io.kind_of(path)  # refuses what is of no known kind
        return Found([InputFile(path, path.name.removesuffix(io.suffix(path.name)), reading)], {})
    scan = io.scan(path)
    out = [] if beside is None else _output_folders(Path(beside).resolve(), path.resolve())
    files = [
        InputFile(file, case_id, reading)
        for case_id, group in scan.files.items()
        for file in group
        if not any(file.resolve().is_relative_to(folder) for folder in out)
    ]
    passed_over = {
        reason: kept
        for reason, those in scan.passed_over.items()
        if (kept := [p for p in those if not any(p.resolve().is_relative_to(folder) for folder in out)])
    }
    if not files:
        raise DataError(f"{path} holds nothing to segment; known are {', '.join(io.extensions())}")
    return Found(sorted(files, key=lambda item: item.name), passed_over)


def _output_folders(out: Path, files: Path) -> list[Path]:
    """Folders that hold predictions, not files to segment."""
    return [out / kind for kind in OUTPUT_KINDS] if files.is_relative_to(out) else [out]
