"""Runs that begin from parts of other runs, and what is remembered of it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from knowsam.digest import stated_digest
from knowsam.engine.checkpoint import load_checkpoint
from knowsam.engine.runfolder import RunFolder
from knowsam.errors import CheckpointError, ConfigError, NotFoundError


@dataclass(frozen=True)
class Ancestor:
    """A part that a run took from another one before its first step.

    Attributes:
        run: folder of the other run.
        part: ``students`` or ``sam``.
        file: name of its checkpoint.
        step: updates that it had done.
        sha256: of the checkpoint's content.
    """

    run: str
    part: str
    file: str
    step: int
    sha256: str

    def record(self) -> dict[str, Any]:
        """Plain values, for files."""
        return asdict(self)


def checkpoint_of(run: str, checkpoint: str) -> Path:
    """The file of a run's checkpoint.

    Raises:
        NotFoundError: no such run, or it has no such checkpoint.
    """
    folder = RunFolder(run, create=False)
    path = folder.best if checkpoint == "best" else folder.last
    if not path.exists():
        raise NotFoundError(f"init: {folder} has no {path.name}", hint="Train it first, or name another checkpoint.")
    return path


def load_parts(blocks: Sequence[Mapping[str, str]], modules: Mapping[str, nn.Module | None]) -> list[Ancestor]:
    """Give networks the weights that the same part of another run ended with, in place.

    Args:
        blocks: ``run``, ``part`` and ``checkpoint`` (``best`` or ``last``) each.
        modules: part -> the networks; None where this experiment has none.
    Raises:
        ConfigError: a part that this experiment does not have.
        NotFoundError: no such run or checkpoint.
        CheckpointError: damaged, without this part, or of networks of other shapes; nothing was loaded from it.
    """
    found = []
    for block in blocks:
        module, part = modules.get(block["part"]), block["part"]
        if module is None:
            raise ConfigError(f"init.part is {part!r}, but this experiment builds no {part}")
        path = checkpoint_of(block["run"], block["checkpoint"])
        state = load_checkpoint(path, fall_back=False)
        prefix = state.get("parts", {}).get(part)
        if prefix is None:
            has = ", ".join(state.get("parts", {})) or "none"
            raise CheckpointError(f"init: {path} holds no {part}; its parts are {has}")
        theirs = {key.removeprefix(prefix): x for key, x in state["method"].items() if key.startswith(prefix)}
        own = module.state_dict()
        wrong = [
            *(f"{key} is not there" for key in own if key not in theirs),
            *(f"{key} is too much" for key in theirs if key not in own),
            *(
                f"{key} is {tuple(theirs[key].shape)}, here {tuple(own[key].shape)}"
                for key in own
                if key in theirs and theirs[key].shape != own[key].shape
            ),
        ]
        if wrong:
            more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise CheckpointError(
                f"init: {part} of {path} does not fit this experiment's: {'; '.join(wrong[:3])}{more}",
                hint="Both experiments must name the same networks, classes and image size.",
            )
        module.load_state_dict(theirs)
        found.append(Ancestor(block["run"], part, path.name, int(state["step"] or 0), stated_digest(path) or ""))
    return found
