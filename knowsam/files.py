"""Files that are either the new one or the old one, whatever happens while they are written."""

import errno
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from knowsam.errors import StorageError


def write_text(path: Path, text: str) -> None:
    """Replace a file by UTF-8 text, all or nothing. Raises StorageError, as :func:`write_atomically`."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Replace a file by these bytes, all or nothing. Raises StorageError, as :func:`write_atomically`."""
    write_atomically(path, lambda file: file.write(data), need=len(data))


def write_atomically(
    path: Path, write: Callable[[BinaryIO], Any], *, need: int = 0, before_rename: Callable[[], None] | None = None
) -> None:
    """Replace ``path`` by what ``write`` puts into the file it is given, durably and all or nothing.

    Args:
        path: the file; its folder exists. One process at a time may write it.
        write: called with a binary file, open for writing.
        need: bytes about to be written, for the error text.
        before_rename: called when the new content is safe on the disk and ``path`` still is the old one.
    Raises:
        StorageError: the disk is full or a write failed. The temporary file is removed, the old file is untouched.
    """
    # A fixed name, so that what a killed process left is overwritten by the next one and never piles up.
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if before_rename is not None:
            before_rename()
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise storage_error(path, error, need) from error
        raise


def storage_error(path: Path, error: OSError, need: int = 0) -> StorageError:
    """A StorageError that says what failed, how many bytes were needed and how many are free.

    Args:
        path: the file that was to be written.
        error: what the system said.
        need: bytes that were to be written; 0: unknown.
    """
    message = f"cannot write {path}: {error.strerror or error}"
    if need:
        message += f"; needs {_size(need)}"
    with suppress(OSError):
        message += f"; {_size(shutil.disk_usage(path.parent).free)} free"
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    hint = "Free some space and start the same command again." if full else "Check the disk and who may write there."
    return StorageError(message, hint=hint)


def sync_folder(folder: Path) -> None:
    """Make sure that a rename in the folder is on the disk, where the file system can tell."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot
            raise
    finally:
        os.close(handle)


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
