"""Checkpoints that are either the new one or the old one, whatever happens while they are written."""

import hashlib
import os
import platform
import subprocess
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import torch
from torch import Tensor, nn

import knowsam
from knowsam.digest import LENGTH as DIGEST_LENGTH
from knowsam.digest import MARK
from knowsam.engine import distributed
from knowsam.engine.log import warn
from knowsam.errors import CheckpointError, NotFoundError, NumericError
from knowsam.files import storage_error, write_atomically

SCHEMA_VERSION = 2
"""Layout of the saved dictionary; raised by one whenever another program could not read it.

1: knowsam 0.1. 2: knowsam 0.2, whose methods and networks are arranged anew.
"""

_FORMAT = "knowsam checkpoint"
_PLAIN = (str, int, float, bool, bytes, type(None))


def save_checkpoint(path: str | os.PathLike[str], state: dict[str, Any], *, keep_previous: bool = True) -> None:
    """Write ``state`` to ``path`` so that a crash at any moment leaves a valid checkpoint.

    The file is written under another name in the same folder, synced to the disk, renamed, and the folder synced. It is
    an ordinary ``torch.save`` file whose zip comment holds the SHA-256 of all that precedes it.

    Args:
        path: for example ``run/last.pt``. One process at a time may write it (see ``RunFolder.lock``).
        state: tensors and plain types, nested in dictionaries, lists and tuples.
        keep_previous: keep the valid checkpoint that ``path`` held as ``<stem>.prev<suffix>``, to fall back to.
    Raises:
        TypeError: something in ``state`` is neither a tensor nor a plain type; names its place.
        NumericError: a tensor holds NaN or infinity; nothing is written.
        StorageError: the disk is full or a write failed; the old file is untouched.
    """
    path = Path(path)
    check_state(state)
    _check_finite(state)
    envelope = {"format": _FORMAT, "schema": SCHEMA_VERSION, "version": str(knowsam.__version__), "state": state}
    need = sum(tensor.numel() * tensor.element_size() for _, tensor in _tensors(state))

    def write(file: BinaryIO) -> None:
        writer = _HashingWriter(file)
        torch.save(envelope, cast(IO[bytes], writer))  # it has all that torch asks of a file
        if writer.failure is not None:
            raise writer.failure
        # A zip file ends with the length of its comment, 0 as torch writes it.
        file.seek(-2, os.SEEK_END)
        file.write(DIGEST_LENGTH.to_bytes(2, "little"))
        file.write(MARK + writer.sha256.hexdigest().encode())

    def keep() -> None:
        # Never put a damaged file in the place of a good predecessor.
        if keep_previous and path.exists() and _digest_problem(path) is None:
            _second_name(path, _previous(path))

    write_atomically(path, write, need=need, before_rename=keep)


def forget_previous(path: str | os.PathLike[str]) -> None:
    """Delete what ``save_checkpoint`` kept beside ``path`` to fall back to: a complete run has no use for it."""
    with suppress(OSError):
        _previous(Path(path)).unlink(missing_ok=True)


def load_checkpoint(path: str | os.PathLike[str], *, fall_back: bool = True) -> dict[str, Any]:
    """The state given to ``save_checkpoint``, on the CPU, its digest verified. Never runs code from the file.

    Args:
        path: for example ``run/last.pt``.
        fall_back: when ``path`` is damaged or missing, use ``<stem>.prev<suffix>`` with one warning.
    Raises:
        NotFoundError: neither file is there.
        CheckpointError: damaged, not ours, or written by a newer knowsam; names the file and the cause.
    """
    path = Path(path)
    previous = _previous(path)
    try:
        return _load(path)
    except _Unusable as first:
        if not (fall_back and previous.exists()):
            raise
        try:
            state = _load(previous)
        except _Unusable as second:
            hint = "Both checkpoints are damaged. Train again in a new run folder."
            raise CheckpointError(f"{first}\n{second}", hint=hint) from second
        warn(f"{first}; using {previous.name}, the checkpoint before it")
        return state
    except NotFoundError:
        # Without hard links there is a moment in which only the previous file exists.
        if not (fall_back and previous.exists()):
            raise
        state = _load(previous)
        warn(f"{path} is missing; using {previous.name}, the checkpoint before it")
        return state


def save_snapshot(folder: Path, model: nn.Module, step: int) -> None:
    """Keep the deployed networks as they are after ``step`` updates, as ``<folder>/step_<step>.pt``.

    Args:
        folder: made if it is not there.
        model: ``method.inference_model()``; ``load_state_dict`` of another one brings the weights back.
        step: updates done.
    Raises:
        StorageError: a write failed.
        NumericError: a tensor holds NaN or infinity.
    """
    path = folder / f"step_{step:07d}.pt"
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise storage_error(path, error) from error
    save_checkpoint(path, {"deployed": dict(model.state_dict()), "step": step}, keep_previous=False)


def check_state(state: Any) -> None:
    """Refuse what ``torch.load(weights_only=True)`` could not give back.

    Raises:
        TypeError: names the place, for example ``state['best']['dice']: numpy.float64``.
    """
    _check_state(state, "state")


def environment_fingerprint(device: torch.device | None = None) -> dict[str, str]:
    """What a result may depend on beside config, data and seed. Values are text; empty when unknown.

    Args:
        device: the device in use; the current CUDA device, else the CPU, if None.
    """
    cuda = torch.cuda.is_available() and (device is None or device.type == "cuda")
    commit, changed = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "--untracked-files=all")
    return {
        "knowsam": str(knowsam.__version__),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "cuda": str(torch.version.cuda or "") if cuda else "",
        "cudnn": str(torch.backends.cudnn.version() or "") if cuda else "",
        "device": torch.cuda.get_device_name(device) if cuda else f"{(device or torch.device('cpu')).type}",
        "machine": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
        "world_size": str(distributed.world_size()),
        "git_commit": (commit or "").strip(),
        "git_dirty": "" if changed is None else ("yes" if _changes_code(changed) else "no"),
    }


def environment_changes(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """One line for each value that differs, for example ``threads: 2 -> 1``; in the order of ``new``.

    Args:
        old, new: from ``environment_fingerprint``.
    """
    names = [*new, *(name for name in old if name not in new)]
    return [
        f"{name}: {old.get(name, '') or 'unknown'} -> {new.get(name, '') or 'unknown'}"
        for name in names
        if old.get(name, "") != new.get(name, "")
    ]


def _changes_code(status: str) -> bool:
    """Whether ``git status --porcelain`` names more than new files that are no Python: a user's lists and settings."""
    return any(not line.startswith("??") or line.endswith((".py", '.py"')) for line in status.splitlines())


def git_diff() -> str:
    """Changes of the checkout against its commit, untracked files by name only; empty when clean or not a checkout."""
    diff = _git("diff", "HEAD") or ""
    untracked = _git("ls-files", "--others", "--exclude-standard") or ""
    return diff + "".join(f"# untracked: {name}\n" for name in untracked.splitlines())


class _Unusable(CheckpointError):
    """Damaged or not ours: a predecessor may serve instead. (A newer schema is a plain CheckpointError.)"""


class _HashingWriter:
    """Passes bytes on and hashes them. Keeps an OSError for later: torch's C++ writer would make another one of it."""

    def __init__(self, file: BinaryIO):
        self.file = file
        self.sha256 = hashlib.sha256()
        self.failure: OSError | None = None

    def write(self, data: Any) -> int:
        if self.failure is None:
            self.sha256.update(data)
            try:
                self.file.write(data)
            except OSError as error:
                self.failure = error
        return len(data)

    def flush(self) -> None:
        pass  # write_atomically flushes, once


def _load(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise NotFoundError(f"no checkpoint {path}", hint="Check the run folder; training writes last.pt and best.pt.")
    problem = _digest_problem(path)
    if problem is not None:
        raise _Unusable(f"{path}: {problem}")
    try:
        envelope = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        cause = str(error).strip().splitlines()
        raise _Unusable(f"{path}: cannot be read: {cause[0] if cause else type(error).__name__}") from error
    if not isinstance(envelope, dict) or envelope.get("format") != _FORMAT:
        raise _Unusable(f"{path}: not a knowsam checkpoint")
    if envelope["schema"] > SCHEMA_VERSION:
        raise CheckpointError(
            f"{path}: written by knowsam {envelope['version']} (checkpoint schema {envelope['schema']}), "
            f"this is knowsam {knowsam.__version__} (schema {SCHEMA_VERSION})",
            hint="Use the newer knowsam.",
        )
    if envelope["schema"] < SCHEMA_VERSION:
        raise CheckpointError(
            f"{path}: written by knowsam {envelope['version']} (checkpoint schema {envelope['schema']}); this is "
            f"knowsam {knowsam.__version__} (schema {SCHEMA_VERSION}), which arranges methods and networks otherwise",
            hint=f"Use knowsam {envelope['version']} for this run, or train it again.",
        )
    state: dict[str, Any] = envelope["state"]
    return state


def _digest_problem(path: Path) -> str | None:
    """What is wrong with the file, or None when all of it is as it was written."""
    sha256 = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            left = file.seek(0, os.SEEK_END) - DIGEST_LENGTH - 2
            file.seek(max(left, 0))
            tail = file.read()
            file.seek(0)
            if not tail[2:].startswith(MARK) or left < 0:
                return _foreign(path, file.read(4), tail)
            while left > 0 and (block := file.read(min(left, 1 << 20))):
                sha256.update(block)
                left -= len(block)
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    # The length field is hashed as torch wrote it; what we made of it must be exact.
    sha256.update(b"\0\0")
    intact = tail[:2] == DIGEST_LENGTH.to_bytes(2, "little") and tail[2:] == MARK + sha256.hexdigest().encode()
    return None if intact else "damaged: its content does not match its SHA-256"


def _foreign(path: Path, magic: bytes, tail: bytes) -> str:
    if path.stat().st_size == 0:
        return "damaged: the file is empty"
    if MARK in tail:  # ours, but not where it should be
        return "damaged: bytes are missing or were added at its end"
    if zipfile.is_zipfile(path):
        return "not a knowsam checkpoint (no digest); was it written by another program?"
    if magic == b"PK\x03\x04":
        return "damaged: the file is truncated"
    return "not a knowsam checkpoint"


def _previous(path: Path) -> Path:
    return path.with_name(f"{path.stem}.prev{path.suffix}")


def _second_name(path: Path, second: Path) -> None:
    temporary = second.with_name(f".{second.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
    except OSError:  # a file system without hard links; load_checkpoint copes with the gap
        os.replace(path, second)
        return
    try:
        os.replace(temporary, second)
    finally:
        # Also after success: renaming one name of a file to another name of the same file does nothing.
        temporary.unlink(missing_ok=True)


def _check_state(value: Any, place: str) -> None:
    kind = type(value)  # exact: numpy.float64 is a float, but does not load again
    if kind in (dict, OrderedDict):
        for key, item in value.items():
            if type(key) not in (str, int):
                raise TypeError(f"{place} has a key of type {_type_name(key)}; allowed: str, int")
            _check_state(item, f"{place}[{key!r}]")
    elif kind in (list, tuple):
        for index, item in enumerate(value):
            _check_state(item, f"{place}[{index}]")
    elif kind not in (*_PLAIN, Tensor, nn.Parameter):
        raise TypeError(f"{place}: {_type_name(value)} cannot be saved; allowed: tensors and plain types")


def _type_name(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _tensors(value: Any, place: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield place, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _tensors(item, f"{place}.{key}" if place else str(key))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _tensors(item, f"{place}.{index}")


def _check_finite(state: dict[str, Any]) -> None:
    bad = [
        name
        for name, tensor in _tensors(state)
        if (tensor.is_floating_point() or tensor.is_complex()) and not bool(torch.isfinite(tensor).all())
    ]
    if bad:
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise NumericError(
            f"{len(bad)} tensor{'s' if len(bad) > 1 else ''} with NaN or infinity, checkpoint not written: "
            f"{', '.join(bad[:5])}{more}",
            hint="The checkpoint before it is still valid; lower the learning rate or use float32.",
        )


def _git(*arguments: str) -> str | None:
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():  # installed: an enclosing repository would be somebody else's
        return None
    try:
        command = ["git", "-C", str(root), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
