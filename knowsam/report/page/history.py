"""What a training logged: losses, rates, validation, cost, each over the steps."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

RATE, NORM, WEIGHTS, SPEED = "lr_", "grad_norm_", "param_norm_", "images_per_second"
"""What the loop itself records beside the losses; see ``engine.train``."""

TOP, ERROR = "top_class_", "error_"
"""What it records of the predictions; see ``engine.watch.label_statistics``."""

# What methods log and do not minimise; a name that this does not know is taken for a loss term and shown with them.
_MONITOR = re.compile(r"_(weight|rampup|confidence|agreement)$")


@dataclass(frozen=True)
class Series:
    """A number over the training.

    Attributes:
        steps: updates done, rising.
        values: NaN where the run met a number that was not finite.
    """

    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    @property
    def finite(self) -> list[float]:
        """The values that are numbers."""
        return [value for value in self.values if math.isfinite(value)]


@dataclass(frozen=True)
class History:
    """What a training logged.

    Attributes:
        train: of ``train`` lines, by name.
        dice: validation Dice, 0 .. 1, by output, the deployed one first.
        cost: the last ``cost`` line: ``seconds`` and so on; empty for a run that did not measure it.
    """

    train: dict[str, Series]
    dice: dict[str, Series]
    cost: dict[str, float]

    @property
    def losses(self) -> dict[str, Series]:
        """``loss`` and its terms."""
        return {name: series for name, series in self.train.items() if not _is_monitor(name)}

    @property
    def monitors(self) -> dict[str, Series]:
        """What methods log beside their losses, such as the ramp of a weight."""
        return {name: series for name, series in self.train.items() if _MONITOR.search(name)}

    def named(self, prefix: str) -> dict[str, Series]:
        """The series whose names begin so, without the prefix."""
        return {name.removeprefix(prefix): s for name, s in self.train.items() if name.startswith(prefix)}

    @property
    def best(self) -> tuple[int, float] | None:
        """Step and value of the best validation Dice of the deployed output: what chose ``best.pt``."""
        deployed = next(iter(self.dice.values()), Series())
        pairs = [pair for pair in zip(deployed.steps, deployed.values, strict=True) if math.isfinite(pair[1])]
        return max(pairs, key=lambda pair: (pair[1], -pair[0]), default=None)

    @property
    def not_finite(self) -> int:
        """Logged values that were NaN or infinite; the speed of the first moment is none."""
        some = [s for name, s in self.train.items() if name != SPEED]
        return sum(len(s.values) - len(s.finite) for s in (*some, *self.dice.values()))


def read_history(records: Iterable[Mapping[str, Any]]) -> History:
    """Sort the lines of a ``metrics.jsonl``.

    Args:
        records: in the order of the file; lines of an unknown kind are left out.
    """
    train: dict[str, Series] = {}
    dice: dict[str, Series] = {}
    cost: dict[str, float] = {}
    for record in records:
        kind = record.get("kind")
        values = {k: _number(v) for k, v in record.items() if k not in ("step", "kind") and _is_number(v)}
        if kind == "cost":
            cost = {name: value for name, value in values.items() if math.isfinite(value)}
        elif kind in ("train", "val"):
            for name, value in values.items():
                if kind == "val" and not name.startswith("dice_"):
                    continue
                series = (train if kind == "train" else dice).setdefault(name.removeprefix("dice_"), Series())
                series.steps.append(record["step"])
                series.values.append(value)
    return History(train, dice, cost)


def _is_monitor(name: str) -> bool:
    return bool(_MONITOR.search(name)) or name.startswith((RATE, NORM, WEIGHTS, TOP, ERROR)) or name == SPEED


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
