"""Locks between processes, on one machine or on several of a shared folder."""

import errno
import fcntl
import os
from pathlib import Path

from knowsam.errors import StorageError


class FileLock:
    """A lock between processes that the kernel frees when the holder dies, however it dies.

    Args:
        path: lock file; made if it is not there, and never removed.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self.handle: int | None = None

    def acquire(self, *, wait: bool = True) -> bool:
        """Take the lock; without ``wait``, False if another process holds it. Raises StorageError."""
        try:
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise StorageError(f"cannot write {self.path}: {error.strerror}", hint="Choose another folder.") from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            os.close(handle)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                return False
            raise StorageError(
                f"the file system of {self.path.parent} has no locks ({error.strerror}), so trials could run twice",
                hint="Set folder: to a file system with locks (Lustre needs the mount option flock).",
            ) from error
        self.handle = handle
        return True

    def release(self) -> None:
        """Let others in; without effect when not held. A child that inherited the handle still holds the lock."""
        if self.handle is not None:
            os.close(self.handle)
        self.handle = None

    def __enter__(self) -> "FileLock":
        self.acquire()
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()
