"""Shannon entropy of a prediction, normalised by log K."""

import math

from torch import Tensor


def entropy_map(logits: Tensor) -> Tensor:
    """Entropy of every pixel's class distribution divided by log K, in float32.

    Args:
        logits: (B, K, *spatial), K >= 2.
    Returns:
        (B, *spatial) in 0..1: 0 when certain, 1 when uniform, for every K.
    """
    log_probs = logits.float().log_softmax(1)
    return -(log_probs.exp() * log_probs).sum(1) / math.log(logits.shape[1])


def entropy_loss(logits: Tensor) -> Tensor:
    """Mean of :func:`entropy_map`: minimising it makes predictions confident.

    Args:
        logits: (B, K, *spatial), K >= 2.
    Returns:
        Scalar in 0..1.
    Source:
        Grandvalet and Bengio, NIPS 2004; arXiv:2412.13742.
    """
    return entropy_map(logits).mean()
