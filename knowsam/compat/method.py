"""The published code's form of KnowSAM's terms."""

from collections.abc import Callable, Container
from functools import partial
from typing import Any

from torch import Tensor

from knowsam.compat.losses import (
    entropy_map_nats,
    last_class_consistency_loss,
    log_two_entropy_loss,
    width_two_distillation_loss,
)
from knowsam.compat.schedules import stairs_rampup
from knowsam.losses import consistency_loss
from knowsam.methods.knowsam import Formulas


def consistency_terms(
    first: Tensor, second: Tensor, *, loss: Callable[[Tensor, Tensor], Tensor], swapped: bool
) -> tuple[Tensor, Tensor]:
    """Both students' consistency.

    Args:
        first, second: logits (B, K, S, S).
        loss: prediction with gradient and constant target -> scalar.
        swapped: the second student's logits stand as target in its own term too, so that term is a constant.
    """
    return loss(first, second), loss(first.detach(), second) if swapped else loss(second, first)


def formulas(rows: Container[str]) -> Formulas:
    """KnowSAM's terms with the chosen rows of the published code."""
    exchanged: dict[str, Any] = {}
    last_class, swapped = "consistency_last_class" in rows, "consistency_swapped" in rows
    if last_class or swapped:
        loss = last_class_consistency_loss if last_class else consistency_loss
        exchanged["consistency"] = partial(consistency_terms, loss=loss, swapped=swapped)
    for row, name, formula in (
        ("distillation_width_two", "distillation", width_two_distillation_loss),
        ("entropy_log_two", "entropy", log_two_entropy_loss),
        ("mix_least_uncertain", "uncertainty", entropy_map_nats),
        ("ramp_in_stairs", "consistency_rampup", stairs_rampup),
    ):
        if row in rows:
            exchanged[name] = formula
    return Formulas(**exchanged)
