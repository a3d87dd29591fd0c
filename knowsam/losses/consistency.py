"""Agreement of two views or two networks. The target never receives gradient."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def consistency_loss(logits: Tensor, target_logits: Tensor) -> Tensor:
    """Binary cross-entropy between class probabilities, averaged over pixels and over *all* classes.

    Args:
        logits: (B, K, *spatial); receives gradient.
        target_logits: same shape; detached here.
    Returns:
        Scalar, nats; smallest (the target's own binary entropy) when both agree.
    Source:
        arXiv:2412.13742 (cross-network consistency of KnowSAM).
    """
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
    return -(target * log_probs + (1 - target) * log_complement).mean()


def mse_consistency_loss(logits: Tensor, target_logits: Tensor) -> Tensor:
    """Mean squared difference of class probabilities.

    Args:
        logits: (B, K, *spatial); receives gradient.
        target_logits: same shape; detached here.
    Returns:
        Scalar in 0..1.
    Source:
        arXiv:1703.01780 (mean teacher).
    """
    return F.mse_loss(logits.float().softmax(1), target_logits.detach().float().softmax(1))


def pseudo_label_loss(logits: Tensor, target_logits: Tensor, *, confidence_threshold: float = 0.0) -> Tensor:
    """Cross-entropy against the target's argmax where the target is sure, averaged over *all* pixels.

    Args:
        logits: (B, K, *spatial); receives gradient.
        target_logits: same shape; detached here.
        confidence_threshold: 0..1, least probability of the target's argmax for a pixel to count.
    Returns:
        Scalar, nats; 0 when no pixel is sure enough.
    Source:
        arXiv:2001.07685 (FixMatch).
    """
    confidence, pseudo_label = target_logits.detach().float().softmax(1).max(1)  # (B, *S) each
    per_pixel = F.cross_entropy(logits.float(), pseudo_label, reduction="none")
    return (per_pixel * (confidence >= confidence_threshold)).mean()
