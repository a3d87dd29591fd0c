"""Agreement of two views or two networks. The target never receives gradient."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from knowsam.losses.pixels import average, check_shapes


def consistency_loss(
    logits: Tensor, target_logits: Tensor, *, valid: Tensor | None = None, weight: Tensor | None = None
) -> Tensor:
    """Binary cross-entropy between class probabilities, averaged over pixels and over *all* classes.

    Args:
        logits: (B, K, *S), K >= 2; receives gradient.
        target_logits: same shape; detached here.
        valid: bool (B, *S), pixels that count; all if None.
        weight: (B, *S), factor of every pixel; 1 if None.
    Returns:
        Scalar, nats; smallest (the target's own binary entropy) when both agree, 0 where no pixel counts.
    Raises:
        ValueError: shapes or types that do not belong together.
    Source:
        arXiv:2412.13742 (cross-network consistency of KnowSAM).
    """
    check_shapes(logits, target_logits, valid=valid, weight=weight)
    log_probs = logits.float().log_softmax(1)
    # log(1 - p) of a class above 1/2 from the *other* classes' logits: 1 - p itself rounds to 0 where the student is
    # sure, and a clamp there would take away the gradient just where the target disagrees most. No pixel has two.
    if logits.shape[1] == 2:
        log_complement = log_probs.flip(1)
    else:
        above = log_probs.detach() > -math.log(2)
        others = log_probs.masked_fill(above, -torch.inf).logsumexp(1, keepdim=True)
        log_complement = torch.where(above, others, torch.log1p(-log_probs.exp().masked_fill(above, 0.0)))
    target = target_logits.detach().float().softmax(1)
    return -average(target * log_probs + (1 - target) * log_complement, valid, weight)


def mse_consistency_loss(
    logits: Tensor, target_logits: Tensor, *, valid: Tensor | None = None, weight: Tensor | None = None
) -> Tensor:
    """Mean squared difference of class probabilities.

    Args:
        logits: (B, K, *S), K >= 2; receives gradient.
        target_logits: same shape; detached here.
        valid: bool (B, *S), pixels that count; all if None.
        weight: (B, *S), factor of every pixel; 1 if None.
    Returns:
        Scalar in 0..1 for weights in 0..1; 0 where no pixel counts.
    Raises:
        ValueError: shapes or types that do not belong together.
    Source:
        arXiv:1703.01780 (mean teacher).
    """
    check_shapes(logits, target_logits, valid=valid, weight=weight)
    probs, target = logits.float().softmax(1), target_logits.detach().float().softmax(1)
    if valid is None and weight is None and probs.numel():
        return F.mse_loss(probs, target)
    return average((probs - target).square(), valid, weight)


def pseudo_label_loss(
    logits: Tensor,
    target_logits: Tensor,
    *,
    confidence_threshold: float = 0.0,
    valid: Tensor | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """Cross-entropy against the target's argmax where the target is sure, averaged over *all* valid pixels.

    Args:
        logits: (B, K, *S), K >= 2; receives gradient.
        target_logits: same shape; detached here.
        confidence_threshold: 0..1, least probability of the target's argmax for a pixel to count.
        valid: bool (B, *S), pixels that are averaged over, sure or not; all if None.
        weight: (B, *S), factor of every pixel; 1 if None.
    Returns:
        Scalar, nats; 0 when no pixel is sure enough.
    Raises:
        ValueError: shapes or types that do not belong together.
    Source:
        arXiv:2001.07685 (FixMatch).
    """
    check_shapes(logits, target_logits, valid=valid, weight=weight)
    confidence, pseudo_label = target_logits.detach().float().softmax(1).max(1)  # (B, *S) each
    per_pixel = F.cross_entropy(logits.float(), pseudo_label, reduction="none")
    return average(per_pixel * (confidence >= confidence_threshold), valid, weight)


def sharpen(probs: Tensor, temperature: float) -> Tensor:
    """Probabilities to the power 1 / T, normalised to 1: below T = 1 closer to one-hot.

    Args:
        probs: (B, K, *S), summing to 1 over K.
        temperature: T > 0, no unit.
    Returns:
        (B, K, *S), float32; with a graph if ``probs`` has one.
    Raises:
        ValueError: T <= 0.
    Source:
        arXiv:1905.02249 (MixMatch).
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    # In logarithms, as small powers of every class round to 0.
    least = torch.finfo(torch.float32).tiny
    return (probs.float().clamp(min=least).log() / temperature).softmax(1)
