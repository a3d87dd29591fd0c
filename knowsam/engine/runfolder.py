"""One folder a run: what it was asked to do, where it did it, what came out."""

import errno
import fcntl
import itertools
import json
import os
import socket
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from knowsam.engine.checkpoint import git_diff
from knowsam.engine.distributed import is_main, rank
from knowsam.engine.log import kept_warnings, warn
from knowsam.errors import NotFoundError, RunFolderError
from knowsam.files import write_text

_OURS = {".lock", "config.yaml", "overrides.txt", "environment.json", "splits.json", "metrics.jsonl", "status.json"}


class RunFolder:
    """The paths of a run, and the lock that keeps a second process out.

    Args:
        path: the folder; made, with its parents, if ``create``.
        create: False for commands that only read a run.
    Attributes:
        config, overrides, environment, diff, splits, sam_weights, metrics, last, best, status_file: files; may not
            exist yet.
        tensorboard, pictures, snapshots, evaluation, errors: folders; made when first needed.
    Raises:
        NotFoundError: not ``create`` and the folder is no run.
        RunFolderError: the folder cannot be written, is a file, or holds something that is not a run.
    """

    def __init__(self, path: str | os.PathLike[str], *, create: bool = True) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.overrides = self.path / "overrides.txt"
        self.environment = self.path / "environment.json"
        self.diff = self.path / "git.diff"
        self.splits = self.path / "splits.json"
        self.metrics = self.path / "metrics.jsonl"
        self.tensorboard = self.path / "tensorboard"
        self.pictures = self.path / "pictures"
        self.last = self.path / "last.pt"
        self.best = self.path / "best.pt"
        self.status_file = self.path / "status.json"
        self.snapshots = self.path / "snapshots"
        self.sam_weights = self.path / "sam_weights.txt"
        self.evaluation = self.path / "evaluation"
        self.errors = self.path / "errors"
        self._handle: int | None = None
        self._within = ExitStack()
        if create:
            self._create()
        elif not self.exists(self.path):
            inside = sorted(path.parent.name for path in self.path.glob("*/config.yaml"))
            hint = "Give the folder that training wrote."
            if inside:
                shown = ", ".join(inside[:3]) + (", ..." if len(inside) > 3 else "")
                hint = f"It holds runs: {shown}. Try {self.path}/{inside[0] if len(inside) == 1 else '*'}"
            raise NotFoundError(f"no run in {self.path} (no config.yaml)", hint=hint)

    def __str__(self) -> str:
        return str(self.path)

    def __fspath__(self) -> str:
        return str(self.path)

    @staticmethod
    def exists(path: str | os.PathLike[str]) -> bool:
        """True when ``path`` holds a run, finished or not."""
        return (Path(path) / "config.yaml").is_file()

    @property
    def resumable(self) -> bool:
        """True when there is a checkpoint to go on from (it may turn out to be damaged)."""
        return self.last.exists() or self.last.with_name("last.prev.pt").exists()

    def lock(self) -> None:
        """Keep other processes out until ``unlock`` or the end of this process, however it ends. Rank 0 only.

        Raises:
            RunFolderError: another process holds the lock; says which, where and since when.
        """
        if not is_main() or self._handle is not None:
            return
        # The file stays: were it removed, one process could lock the old file and another a new one.
        try:
            handle = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(handle)
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                warn(f"{self.path}: this file system has no locks; do not start a second process on this folder")
                return
            raise RunFolderError(
                f"{self.path} is locked by {self._holder()}",
                hint="Wait for it to end, or choose another folder with run=...",
            ) from None
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since}).encode(), 0)
        self._handle = handle
        # A forked data worker shares the lock; without this one that outlives us would hold it.
        os.register_at_fork(after_in_child=self._close)

    def unlock(self) -> None:
        """Let others in; without effect when not locked."""
        self._close()

    def __enter__(self) -> "RunFolder":
        self.lock()
        self._within.enter_context(kept_warnings(self.path))
        return self

    def __exit__(self, *exception: object) -> None:
        self._within.close()
        self.unlock()

    def describe(
        self,
        config_yaml: str,
        overrides: Sequence[str],
        environment: Mapping[str, str],
        splits: Mapping[str, Any],
    ) -> None:
        """Write down what the run is: rank 0 calls it once, before the first step.

        Args:
            config_yaml: the resolved configuration, YAML text.
            overrides: ``key=value`` as given on the command line.
            environment: from ``environment_fingerprint``.
            splits: split hashes by name.
        Raises:
            StorageError: a write failed.
        """
        write_text(self.overrides, "".join(f"{override}\n" for override in overrides))
        self.write_json(self.environment, dict(environment))
        self.write_json(self.splits, dict(splits))
        diff = git_diff()
        if diff:
            write_text(self.diff, diff)
        write_text(self.config, config_yaml)  # last: it makes the folder a run

    def keep_code(self, texts: Mapping[str, str]) -> None:
        """Keep the source text of the user's own modules in ``code/``; what is there already stays as it is.

        Args:
            texts: by module.
        Raises:
            StorageError: a write failed.
        """
        for module, text in texts.items():
            # A run that went on with changed code keeps every text that it ran: my_lab.py, my_lab.2.py, ...
            names = (f"{module}{f'.{n}' if n > 1 else ''}.py" for n in itertools.count(1))
            for file in (self.path / "code" / name for name in names):
                if not file.exists():
                    file.parent.mkdir(exist_ok=True)
                    write_text(file, text)
                    break
                if file.read_text(encoding="utf-8", errors="replace") == text:
                    break

    def status(self, state: str, step: int, **more: Any) -> None:
        """Replace ``status.json``. Information only: a write that fails is a warning, never the end of a training.

        Args:
            state: ``running``, ``complete``, ``interrupted`` or ``failed``.
            step: optimizer updates done.
            more: plain values, for example ``code=79, reason="..."``.
        """
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        record = {"state": state, "step": step, "pid": os.getpid(), "host": socket.gethostname(), "time": now, **more}
        if not is_main():
            return
        try:
            self.write_json(self.status_file, record)
        except Exception as error:
            warn(str(error))

    def read_status(self) -> dict[str, Any]:
        """Content of ``status.json``; empty when there is none or it cannot be read."""
        return self.read_json(self.status_file)

    def write_error(self, error: BaseException) -> Path | None:
        """Put the whole traceback into ``errors/<time>-rank<k>.txt``; None when even that fails. Any rank."""
        name = self.errors / f"{time.strftime('%Y%m%d-%H%M%S')}-rank{rank()}.txt"
        try:
            self.errors.mkdir(exist_ok=True)
            name.write_text("".join(traceback.format_exception(error)), encoding="utf-8", errors="backslashreplace")
        except OSError:
            return None
        return name

    @staticmethod
    def write_json(path: Path, value: Any) -> None:
        """Replace a JSON file, all or nothing. Raises StorageError."""
        write_text(path, json.dumps(value, indent=2) + "\n")

    @staticmethod
    def read_json(path: Path) -> dict[str, Any]:
        """A JSON object; empty when the file is missing or is not one."""
        with suppress(OSError, ValueError):
            value = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(value, dict):
                return value
        return {}

    def _create(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            names = os.listdir(self.path)
        except OSError as error:
            raise self._unwritable(error) from error
        strangers = [name for name in names if not name.startswith(".")]
        if strangers and not _OURS.intersection(names):
            raise RunFolderError(
                f"{self.path} is not empty and holds no run (found {', '.join(sorted(strangers)[:3])})",
                hint="Choose a new folder with run=...",
            )
        if not os.access(self.path, os.W_OK | os.X_OK):
            raise self._unwritable(PermissionError(errno.EACCES, "Permission denied"))

    def _unwritable(self, error: OSError) -> RunFolderError:
        return RunFolderError(
            f"cannot write into run folder {self.path}: {error.strerror or error}",
            hint="Choose a folder that you may write with run=...",
        )

    def _holder(self) -> str:
        for _ in range(10):  # the holder writes its name just after it has the lock
            holder = self.read_json(self.path / ".lock")
            if holder:
                return f"pid {holder.get('pid')} on {holder.get('host')} since {holder.get('since')}"
            time.sleep(0.02)
        return "another process"

    def _close(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
        self._handle = None
