"""Supervised losses: cross-entropy and soft Dice. Pixels of a mask with id ``IGNORE`` take no part."""

import torch
import torch.nn.functional as F
from torch import Tensor

from knowsam.losses.pixels import IGNORE, average, check_shapes


def cross_entropy_loss(
    logits: Tensor, mask: Tensor, *, valid: Tensor | None = None, weight: Tensor | None = None
) -> Tensor:
    """Cross-entropy, averaged over the pixels that count.

    Args:
        logits: (B, K, *S), K >= 2.
        mask: (B, *S) integer class ids in 0..K-1, or ``IGNORE``.
        valid: bool (B, *S), pixels that count; all but the ignored if None.
        weight: (B, *S), factor of every pixel; 1 if None.
    Returns:
        Scalar, nats; 0 where no pixel counts.
    Raises:
        ValueError: shapes or types that do not belong together.
    """
    check_shapes(logits, mask=mask, valid=valid, weight=weight)
    known = mask != IGNORE
    if valid is None and weight is None:
        # F.cross_entropy's own mean over the pixels that are not ignored is NaN where there are none.
        total = F.cross_entropy(logits.float(), mask.long(), ignore_index=IGNORE, reduction="sum")
        return total / known.sum().clamp(min=1)
    per_pixel = F.cross_entropy(logits.float(), mask.long(), ignore_index=IGNORE, reduction="none")  # (B, *S)
    return average(per_pixel, known if valid is None else valid & known, weight)


def soft_dice_loss(logits: Tensor, mask: Tensor, *, valid: Tensor | None = None, smooth: float = 1e-10) -> Tensor:
    """Soft Dice with squared denominators, one ratio per class over the whole batch, averaged over all K classes.

    mean_k 1 - (2 sum(p_k t_k) + s) / (sum(p_k^2) + sum(t_k^2) + s), in float32. Taken over the batch rather than per
    image, so that an image without the class does not by itself cost a full point.

    Args:
        logits: (B, K, *S), K >= 2.
        mask: (B, *S) integer class ids in 0..K-1, or ``IGNORE``.
        valid: bool (B, *S), pixels that count; all but the ignored if None.
        smooth: s above; defines 0/0 as a Dice of 1.
    Returns:
        Scalar in 0..1; 0 where no pixel counts.
    Raises:
        ValueError: shapes or types that do not belong together.
    Source:
        arXiv:1606.04797 (V-Net), the form used by KnowSAM (arXiv:2412.13742).
    """
    check_shapes(logits, mask=mask, valid=valid)
    counts = mask != IGNORE if valid is None else valid & (mask != IGNORE)  # (B, *S)
    ids = mask.long().masked_fill(mask == IGNORE, 0)
    return dice_by_class(logits.float().softmax(1), ids, counts, smooth).mean()


def dice_by_class(probs: Tensor, ids: Tensor, counts: Tensor, smooth: float = 1e-10) -> Tensor:
    """One minus soft Dice of every class over the whole batch, as :func:`soft_dice_loss` averages them.

    Args:
        probs: (B, K, *S) float32.
        ids: int64 (B, *S) class ids in 0..K-1, also where they do not count.
        counts: bool (B, *S), pixels that count.
        smooth: defines 0/0 as a Dice of 1.
    Returns:
        (K,).
    """
    keep = counts.to(torch.float32)
    # 1 at the class of every pixel that counts; the classes lie last in memory, as those of channels-last logits do.
    target = keep.new_zeros(*ids.shape, probs.shape[1])
    target = target.scatter_(-1, ids.unsqueeze(-1), keep.unsqueeze(-1)).movedim(-1, 1)  # (B, K, *S)
    probs = probs * keep.unsqueeze(1)
    over = (0, *range(2, probs.ndim))
    intersection = (probs * target).sum(over)  # (K,)
    denominator = probs.square().sum(over) + target.square().sum(over)
    return 1.0 - (2.0 * intersection + smooth) / (denominator + smooth)


def segmentation_loss(logits: Tensor, mask: Tensor, *, valid: Tensor | None = None) -> Tensor:
    """Cross-entropy + soft Dice, both in float32.

    Args:
        logits: (B, K, *S), K >= 2.
        mask: (B, *S) integer class ids in 0..K-1, or ``IGNORE``.
        valid: bool (B, *S), pixels that count; all but the ignored if None.
    Returns:
        Scalar; 0 where no pixel counts, as in an empty batch.
    Raises:
        ValueError: shapes or types that do not belong together.
    Source:
        arXiv:2412.13742.
    """
    return cross_entropy_loss(logits, mask, valid=valid) + soft_dice_loss(logits, mask, valid=valid)
