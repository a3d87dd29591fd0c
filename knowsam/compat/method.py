"""The published code's form of KnowSAM's terms."""

from collections.abc import Container
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
from knowsam.methods.knowsam import Formulas, Loss


def swapped(loss: Loss) -> Loss:
    """The loss with prediction and target exchanged: a constant, as the other student's logits are no one's to move."""

    def exchanged(logits: Tensor, other_logits: Tensor, *, valid: Tensor | None = None) -> Tensor:
        return loss(other_logits.detach(), logits, valid=valid)

    return exchanged


def formulas(rows: Container[str]) -> Formulas:
    """KnowSAM's terms with the chosen rows of the published code."""
    exchanged: dict[str, Any] = {}
    if "consistency_last_class" in rows or "consistency_swapped" in rows:
        loss = last_class_consistency_loss if "consistency_last_class" in rows else consistency_loss
        exchanged["consistency"] = (loss, swapped(loss) if "consistency_swapped" in rows else loss)
        exchanged["second_is_constant"] = "consistency_swapped" in rows
    for row, name, formula in (
        ("distillation_width_two", "distillation", width_two_distillation_loss),
        ("entropy_log_two", "entropy", log_two_entropy_loss),
        ("mix_least_uncertain", "uncertainty", entropy_map_nats),
        ("ramp_in_stairs", "consistency_rampup", stairs_rampup),
    ):
        if row in rows:
            exchanged[name] = formula
    return Formulas(**exchanged)
