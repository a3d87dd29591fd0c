"""What ``build.py`` asks for when it assembles an experiment: the chosen rows of the published code, part by part.

Where none of its rows is chosen, a function gives back what it was given, or nothing.
"""

from collections.abc import Container, Mapping
from typing import Any

import torch

from knowsam.compat import rows as table
from knowsam.compat.method import formulas
from knowsam.compat.sam import sam_blocks
from knowsam.compat.schedules import one_step_late
from knowsam.engine.optim import ScheduledOptimizer

__all__ = ["formulas", "fusion_head", "optimizers", "sam_blocks", "settings", "students_arguments"]

FUSION_HEAD = "knowsam.compat.fusion:PublishedFusionHead"


def settings(rows: tuple[str, ...]) -> dict[str, Any]:
    """Options that the chosen rows set outside the ``sam`` block, by dotted key; those inside: :func:`sam_blocks`."""
    return {key: value for key, value in table.settings(rows).items() if not key.startswith("sam.")}


def students_arguments(rows: Container[str]) -> dict[str, Any]:
    """Arguments of ``Students`` beside the networks."""
    arguments: dict[str, Any] = {"mean": 0.0, "std": 1.0} if "students_unnormalised" in rows else {}
    if "fusion_xor" in rows:
        # A cut at 0.5 makes a pixel jump for a difference in the last digit, which depends on the layout.
        arguments["memory_format"] = torch.contiguous_format
    return arguments


def fusion_head(rows: Container[str], target: str) -> tuple[str, dict[str, Any]]:
    """The fusion head's constructor as ``module:name``, and its arguments beside the number of classes."""
    chosen = {name: f"fusion_{name}" in rows for name in ("xor", "entropy_nats", "rectified")}
    return (FUSION_HEAD, chosen) if any(chosen.values()) else (target, {})


def optimizers(rows: Container[str], made: Mapping[str, ScheduledOptimizer]) -> dict[str, ScheduledOptimizer]:
    """The optimizers by group, on the published schedule."""
    return {name: one_step_late(item) if "late_learning_rate" in rows else item for name, item in made.items()}
