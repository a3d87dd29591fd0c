"""Files are opened here, and nowhere else in this room: whatever is wrong with one becomes one error that names it."""

import importlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from knowsam.errors import ConfigError, DataError, KnowsamError, NotFoundError

MAX_PIXELS = 64_000_000
MAX_VOXELS = 2_000_000_000
_most_pixels: ContextVar[int] = ContextVar("most_pixels", default=MAX_PIXELS)


@contextmanager
def pixels_up_to(count: int) -> Iterator[None]:
    """Pictures of so many pixels are read inside."""
    before = _most_pixels.set(count)
    try:
        yield
    finally:
        _most_pixels.reset(before)


def most_pixels() -> int:
    """How many pixels of a picture are read here."""
    return _most_pixels.get()


@contextmanager
def opened(path: Path, what: str) -> Iterator[BinaryIO]:
    """A file open for reading; errors of whoever decodes it inside become ``DataError``.

    Args:
        path: the file.
        what: what it should be, with its article, such as ``"a TIFF"``.
    Raises:
        NotFoundError: no such file.
        DataError: not a regular file (a pipe or device would hang or feed without end), unreadable, or damaged.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise DataError(f"{path}: not a regular file; folders, pipes and devices are not opened")
        with open(path, "rb") as file:
            yield file
    except (KnowsamError, MemoryError):
        raise
    except FileNotFoundError:
        raise NotFoundError(f"{path} does not exist") from None
    except Exception as error:  # a broken file makes decoders raise nearly any class: SyntaxError, struct.error, ...
        raise DataError(f"{path}: {_what_is_wrong(path, what, error)}") from error


def _what_is_wrong(path: Path, what: str, error: Exception) -> str:
    try:
        with open(path, "rb") as file:
            head = file.read(512)
    except OSError as unreadable:
        return f"cannot be read ({unreadable.strerror})"
    if not head:
        return "the file is empty (0 bytes)"
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return f"the file is a web page (HTML), not {what}; the download probably failed"
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return f"not {what} that can be read, truncated or damaged ({lines[0][:200]})"


def fits(path: Path, shape: tuple[int, ...], channels: int = 1) -> None:
    """Refuse what is too large, or empty, by its header.

    Args:
        path: for the message.
        shape: (H, W) or (D, H, W) in any order of axes.
        channels: C.
    Raises:
        DataError: more than ``most_pixels`` of a picture, ``MAX_VOXELS`` with all channels of a volume, or none.
    """
    size = " x ".join(map(str, shape))
    pixels = int(np.prod(shape, dtype=object))
    if pixels < 1 or channels < 1:
        raise DataError(f"{path}: is empty, {size} of {channels} channels")
    if len(shape) == 2 and pixels > most_pixels():
        raise DataError(
            f"{path}: {shape[1]} x {shape[0]} pixels; at most {most_pixels():,} are read",
            hint="check that the file is what it claims to be; data.reading.max_pixels allows more, and "
            "data.patch_size sees large pictures in tiles",
        )
    if pixels * channels > MAX_VOXELS:
        raise DataError(
            f"{path}: {size} voxels of {channels} channels; at most {MAX_VOXELS:,} are read: too large to be a medical "
            "volume",
            hint="crop the volume, or check that the file is what it claims to be",
        )


def medical(module: str) -> Any:
    """A library of the extra ``medical``.

    Raises:
        ConfigError: not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        raise ConfigError(
            f"this kind of file needs {module}, which is not installed", hint="pip install 'knowsam[medical]'"
        ) from None
