"""Optuna's journal file, made to survive what happens to files: a writer killed in the middle of a line."""

import os
from pathlib import Path

from optuna.storages.journal import JournalFileBackend
from optuna.storages.journal._file import BaseJournalFileLock

from knowsam.sweep.locks import FileLock


class Journal(JournalFileBackend):
    """A journal whose torn last line is cut off before the next one is written.

    A process that dies while it writes leaves a line without its end. Optuna's reader skips it, but its writer would
    append to it, and from then on no process can read the journal. Here the writer, which alone holds the lock, cuts
    the file back to its last whole line first: what the dead process had not finished to say did not happen.

    The lock is the kernel's, so a process that died with it in hand does not keep the others waiting.

    Args:
        path: journal file; made if it is not there.
    """

    def __init__(self, path: str | os.PathLike[str]):
        super().__init__(str(path), lock_obj=_RepairingLock(Path(path)))


class _RepairingLock(BaseJournalFileLock):
    def __init__(self, journal: Path):
        self._journal = journal
        self._lock = FileLock(f"{journal}.lock")

    def acquire(self) -> bool:
        self._lock.acquire()
        cut_torn_line(self._journal)
        return True

    def release(self) -> None:
        self._lock.release()


def cut_torn_line(path: Path) -> None:
    """Shorten a file to its last newline; without effect where it ends with one."""
    with open(path, "rb+") as file:
        size = end = file.seek(0, os.SEEK_END)
        while end:
            start = max(0, end - 4096)
            file.seek(start)
            found = file.read(end - start).rfind(b"\n")
            if found >= 0:
                end = start + found + 1
                break
            end = start
        if end < size:
            file.truncate(end)
