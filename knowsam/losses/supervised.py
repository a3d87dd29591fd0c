"""Supervised losses: cross-entropy and soft Dice."""

import torch.nn.functional as F
from torch import Tensor


def soft_dice_loss(logits: Tensor, mask: Tensor, *, valid: Tensor | None = None, smooth: float = 1e-10) -> Tensor:
    """Soft Dice with squared denominators, one ratio per class over the whole batch, averaged over all K classes.

    mean_k 1 - (2 sum(p_k t_k) + s) / (sum(p_k^2) + sum(t_k^2) + s), in float32. Taken over the batch rather than per
    image, so that an image without the class does not by itself cost a full point.

    Args:
        logits: (B, K, *spatial), K >= 2.
        mask: (B, *spatial) int64 class ids in 0..K-1.
        valid: bool (B, *spatial), pixels that count; all if None.
        smooth: s above; defines 0/0 as a Dice of 1.
    Returns:
        Scalar in 0..1.
    Source:
        arXiv:1606.04797 (V-Net), the form used by KnowSAM (arXiv:2412.13742).
    """
    probs = logits.float().softmax(1)  # (B, K, *S)
    target = F.one_hot(mask, probs.shape[1]).movedim(-1, 1).to(probs.dtype)
    if valid is not None:
        keep = valid.unsqueeze(1).to(probs.dtype)
        probs, target = probs * keep, target * keep
    over = (0, *range(2, probs.ndim))
    intersection = (probs * target).sum(over)  # (K,)
    denominator = probs.square().sum(over) + target.square().sum(over)
    return (1.0 - (2.0 * intersection + smooth) / (denominator + smooth)).mean()


def segmentation_loss(logits: Tensor, mask: Tensor, *, valid: Tensor | None = None) -> Tensor:
    """Cross-entropy + soft Dice, both in float32.

    Args:
        logits: (B, K, *spatial).
        mask: (B, *spatial) int64 class ids.
        valid: bool (B, *spatial), pixels that count; all if None. With no valid pixel the loss is 0.
    Returns:
        Scalar.
    Source:
        arXiv:2412.13742.
    """
    if valid is None:
        return F.cross_entropy(logits.float(), mask) + soft_dice_loss(logits, mask)
    per_pixel = F.cross_entropy(logits.float(), mask, reduction="none")  # (B, *S)
    cross_entropy = (per_pixel * valid).sum() / valid.sum().clamp(min=1)
    return cross_entropy + soft_dice_loss(logits, mask, valid=valid)
