"""Shannon entropy of a prediction, normalised by log K."""

import math

from torch import Tensor

from knowsam.losses.pixels import average, check_shapes


def entropy_map(logits: Tensor) -> Tensor:
    """Entropy of every pixel's class distribution divided by log K, in float32.

    Args:
        logits: (B, K, *S), K >= 2.
    Returns:
        (B, *S) in 0..1: 0 when certain, 1 when uniform, for every K.
    Raises:
        ValueError: fewer than two classes.
    """
    check_shapes(logits)
    log_probs = logits.float().log_softmax(1)
    return -(log_probs.exp() * log_probs).sum(1) / math.log(logits.shape[1])


def entropy_loss(logits: Tensor, *, valid: Tensor | None = None) -> Tensor:
    """Mean of :func:`entropy_map`: minimising it makes predictions confident.

    Args:
        logits: (B, K, *S), K >= 2.
        valid: bool (B, *S), pixels that count; all if None.
    Returns:
        Scalar in 0..1; 0 where no pixel counts.
    Raises:
        ValueError: shapes or types that do not belong together.
    Source:
        Grandvalet and Bengio, NIPS 2004; arXiv:2412.13742.
    """
    check_shapes(logits, valid=valid)
    return average(entropy_map(logits), valid)
