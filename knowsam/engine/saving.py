"""What a run keeps: its full state to go on from, its best weights, and copies on the way."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from knowsam.engine.checkpoint import (
    environment_fingerprint,
    forget_previous,
    load_checkpoint,
    save_checkpoint,
    save_snapshot,
)
from knowsam.engine.distributed import Rank, call_on_main
from knowsam.engine.log import warn
from knowsam.engine.optim import ScheduledOptimizer
from knowsam.engine.owncode import OwnCode, code_changes
from knowsam.engine.runfolder import RunFolder
from knowsam.errors import DataError
from knowsam.methods.base import SSLMethod


@dataclass
class TrainState:
    """Where a run stands, besides the weights.

    Attributes:
        step: optimizer updates done.
        best: ``dice`` and ``step`` of the best validation so far; empty before the first.
    """

    step: int = 0
    best: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class RunRecord:
    """What checkpoints say of a run, so that it goes on as what it began.

    Attributes:
        config: resolved configuration, YAML text: the weights know their architecture.
        data: name -> fingerprint of all images and masks that decide about the weights, those for validation included.
        lineage: the parts that it took from other runs.
        preparation: how images were prepared, with what was fitted; see ``data.intensity.Preparation``.
        code: the user's own modules; None where nobody asks.
        accept_code: go on with modules of the user's that have changed, and say so, rather than refuse.
    """

    config: str
    data: Mapping[str, str]
    lineage: Sequence[Mapping[str, Any]] = ()
    preparation: Mapping[str, Any] = field(default_factory=dict)
    code: OwnCode | None = None
    accept_code: bool = False


class Saver:
    """Writes checkpoints of a run, and reads one to go on from.

    Args:
        run: locked folder.
        method, optimizers, scaler, state: what is saved, as it is at that moment.
        record: what is said beside it.
        rank: this process.
        max_steps: length of the run; at its end nothing is kept to fall back to.
    """

    def __init__(
        self,
        run: RunFolder,
        method: SSLMethod,
        optimizers: Mapping[str, ScheduledOptimizer],
        scaler: torch.amp.GradScaler,
        state: TrainState,
        record: RunRecord,
        rank: Rank,
        max_steps: int,
    ):
        self._run, self._method, self._optimizers, self._scaler = run, method, optimizers, scaler
        self._state, self._record, self._max_steps = state, record, max_steps
        self._world_size = rank.world_size
        self._environment = environment_fingerprint(rank.device)  # once: it asks git about the code that runs now

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Bring everything back to where a checkpoint was saved.

        Raises:
            DataError: data or code are others than those of the run so far.
        """
        before = {"validation": self._record.data.get("validation"), **saved["data"]}
        if before != dict(self._record.data):
            changed = [n for n in {**before, **self._record.data} if before.get(n) != self._record.data.get(n)]
            raise DataError(
                f"the data of {self._run} have changed since step {saved['step']}: lists, images or masks that may be "
                f"read ({', '.join(changed)})",
                hint="Bring the old data back, or train again in a new run folder (run=...).",
            )
        self._check_code(saved)
        self._method.load_state_dict(saved["method"])
        for name, item in self._optimizers.items():
            item.optimizer.load_state_dict(saved["optimizers"][name])
        self._scaler.load_state_dict(saved["scaler"])
        self._state.step, self._state.best = saved["step"], dict(saved["best"])
        call_on_main(self._mend_best)

    def better(self, dice: float) -> dict[str, float]:
        """The best validation, a new one included; ``best.pt`` is written with the checkpoint of this step."""
        if dice > self._state.best.get("dice", -1.0):
            return {"dice": dice, "step": self._state.step}
        return self._state.best

    def save(self) -> None:
        """Write ``last.pt``, then, if this step is the best so far, ``best.pt``.

        In this order a crash between the two leaves no weights that the run does not come to again.
        """
        state = self._state
        contents = {
            **self._weights(),
            "optimizers": {name: item.optimizer.state_dict() for name, item in self._optimizers.items()},
            "scaler": self._scaler.state_dict(),
            "data": dict(self._record.data),
            "lineage": [dict(ancestor) for ancestor in self._record.lineage],
            "code": {} if self._record.code is None else self._record.code.hashes(),
            "environment": self._environment,
            "world_size": self._world_size,
        }
        if self._record.code is not None:
            self._run.keep_code(self._record.code.texts())
        save_checkpoint(self._run.last, contents)
        if state.best.get("step") == state.step:
            self._save_best()
        if state.step == self._max_steps:
            forget_previous(self._run.last)

    def snapshot(self) -> None:
        """Keep a copy of the deployed network."""
        save_snapshot(self._run.snapshots, self._method.inference_model(), self._state.step)

    def _save_best(self) -> None:
        save_checkpoint(self._run.best, self._weights(), keep_previous=False)

    def _weights(self) -> dict[str, Any]:
        return {
            "method": self._method.state_dict(),
            "parts": self._method.parts(),
            "step": self._state.step,
            "best": self._state.best,
            "config": self._record.config,
            "preparation": dict(self._record.preparation),
        }

    def _mend_best(self) -> None:
        """Write ``best.pt`` if a crash came between it and the ``last.pt`` of the same step."""
        best, path = self._state.best, self._run.best
        if best.get("step") != self._state.step or not best:
            return
        if not path.exists() or load_checkpoint(path, fall_back=False)["step"] != best["step"]:
            self._save_best()

    def _check_code(self, saved: Mapping[str, Any]) -> None:
        """Refuse, or say, that a module of the user's is another one now."""
        if self._record.code is None:
            return
        changed = code_changes(saved.get("code", {}), self._record.code.hashes())
        if not changed:
            return
        text = f"code that {self._run} runs has changed since step {saved['step']}: {', '.join(changed)}"
        if not self._record.accept_code:
            raise DataError(
                text,
                hint=f"Bring the old code back ({self._run}/code keeps it), train again in a new run folder (run=...), "
                "or go on with the new code by --accept-code.",
            )
        warn(f"{text}; going on with the new code, so no single version of it gives this run's result")
