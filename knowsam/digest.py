"""The SHA-256 at the end of a checkpoint's file, which is read without torch and without the rest of the file."""

import os

MARK = b"knowsam sha256 "
LENGTH = len(MARK) + 64


def stated_digest(path: str | os.PathLike[str]) -> str | None:
    """The SHA-256 that a checkpoint's file states of its content; None if it is not there or not a checkpoint."""
    try:
        with open(path, "rb") as file:
            file.seek(-LENGTH, os.SEEK_END)
            tail = file.read()
    except OSError:
        return None
    return tail.removeprefix(MARK).decode("ascii", "replace") if tail.startswith(MARK) else None
