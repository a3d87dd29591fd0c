"""The published code's loss formulas, written from a description of them; ours stand in ``knowsam.losses``."""

import math

import torch.nn.functional as F
from torch import Tensor

from knowsam.losses import average

# What the published code adds to a probability before its logarithm, and where it clamps one.
ENTROPY_EPSILON = 1e-6
LEAST, MOST = 1e-8, 1 - 1e-7


def last_class_consistency_loss(logits: Tensor, target_logits: Tensor, *, valid: Tensor | None = None) -> Tensor:
    """Binary cross-entropy on the clamped probabilities of the last class; the others were computed and thrown away.

    Args:
        logits: (B, K, *spatial); receives gradient where its probability is not clamped.
        target_logits: same shape; detached here.
        valid: bool (B, *spatial), pixels that count; all if None.
    Returns:
        Scalar, nats.
    """
    probs = logits.float().softmax(1)[:, -1].clamp(LEAST, MOST)  # (B, *spatial)
    target = target_logits.detach().float().softmax(1)[:, -1]
    return -average(target * probs.log() + (1 - target) * (1 - probs).log(), valid)


def width_two_distillation_loss(
    student_logits: Tensor, sam_logits: Tensor, *, temperature: float = 10.0, valid: Tensor | None = None
) -> Tensor:
    """Distillation over rows of width 2, cut from the logits in (B, H, W, K) order, averaged over rows, times T^2.

    With two classes this is the distillation; with four, the classes of a pixel are compared in two pairs.

    Args:
        student_logits: (B, K, *spatial), an even number of elements; receives gradient.
        sam_logits: same shape; detached here.
        temperature: T > 0.
        valid: bool (B, *spatial), pixels that count; all if None. A row across two pixels counts where both do.
    Returns:
        Scalar.
    Raises:
        ValueError: an odd number of elements, which has no rows of width 2.
    """
    if student_logits.numel() % 2:
        raise ValueError(f"logits {tuple(student_logits.shape)} cannot be cut into rows of width 2, as published")
    teacher, student = (
        (logits.float().movedim(1, -1).reshape(-1, 2) / temperature).log_softmax(1)
        for logits in (sam_logits.detach(), student_logits)
    )  # (rows, 2) each
    per_row = F.kl_div(student, teacher, reduction="none", log_target=True).sum(1)
    if valid is None:
        return per_row.mean() * temperature**2
    rows = valid.unsqueeze(-1).expand(*valid.shape, student_logits.shape[1]).reshape(-1, 2).all(1)
    return average(per_row, rows) * temperature**2


def entropy_map_nats(logits: Tensor) -> Tensor:
    """-sum_k p_k log(p_k + 1e-6): (B, K, *spatial) -> (B, *spatial), nats, float32; just below 0 when certain."""
    probs = logits.float().softmax(1)
    return -(probs * (probs + ENTROPY_EPSILON).log()).sum(1)


def log_two_entropy_loss(logits: Tensor, *, valid: Tensor | None = None) -> Tensor:
    """Mean of :func:`entropy_map_nats` divided by log 2, for any K: (B, K, *spatial) -> scalar, above 1 for K > 2.

    Args:
        logits: (B, K, *spatial).
        valid: bool (B, *spatial), pixels that count; all if None.
    """
    return average(entropy_map_nats(logits), valid) / math.log(2)
