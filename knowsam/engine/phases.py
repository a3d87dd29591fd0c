"""The parts of a run: what restarts at their borders, and over which of them a learning rate is scheduled."""

import itertools
from collections.abc import Mapping

from torch import Tensor

from knowsam.engine.optim import ScheduledOptimizer
from knowsam.methods.base import Phase, SSLMethod
from knowsam.methods.contract import check_phases


class Phases:
    """What a border means. A restart is done before the first update of a phase, by whoever comes there.

    A checkpoint between two phases was saved before the restart, so a resumed run does it as the uninterrupted one.

    Args:
        method: as built, with its initial weights: they are kept if some phase begins from them again.
        optimizers: by group.
        max_steps: length of the run.
    """

    def __init__(self, method: SSLMethod, optimizers: Mapping[str, ScheduledOptimizer], max_steps: int):
        self._method, self._optimizers = method, optimizers
        self._phases = check_phases(method)
        wants_initial = any("students" in phase.restart for phase in self._phases)
        self._initial: dict[str, Tensor] = (
            {key: x.detach().clone() for key, x in method.state_dict().items()} if wants_initial else {}
        )
        starts = [0, *(phase.start for phase in self._phases[1:] if "schedule" in phase.restart), max_steps]
        self._scheduled = list(itertools.pairwise(starts))

    def enter(self, step: int) -> bool:
        """Restart what the phase that begins with this update restarts; whether one begins."""
        phase = self._starting(step)
        if phase is None:
            return False
        for what in phase.restart if step else ():
            if what == "optimizer":
                for item in self._optimizers.values():
                    item.optimizer.state.clear()
            elif what != "schedule":
                self._method.restart(what, self._initial)
        return True

    def set_lr(self, item: ScheduledOptimizer, step: int) -> float:
        """Set and return the learning rate of an update."""
        start, end = next((a, b) for a, b in self._scheduled if step < b)
        return item.set_lr(step - start, end - start)

    def _starting(self, step: int) -> Phase | None:
        return next((phase for phase in self._phases if phase.start == step), None)
