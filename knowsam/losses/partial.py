"""Supervised loss of masks that label some of the classes only: background is background *or an unlabelled class*."""

import torch
from torch import Tensor

from knowsam.losses.pixels import IGNORE, average, check_shapes
from knowsam.losses.supervised import dice_by_class, segmentation_loss


def partial_segmentation_loss(
    logits: Tensor, mask: Tensor, valid_classes: Tensor | None, *, valid: Tensor | None = None, smooth: float = 1e-10
) -> Tensor:
    """Cross-entropy + soft Dice of marginal probabilities: classes that a mask does not label belong to its background.

    Of a pixel of background the probabilities of background and of every unlabelled class are added, so that finding an
    unlabelled organ costs nothing; of a labelled pixel the loss is the ordinary one. Dice has one ratio per class over
    the pixels whose source labels it, averaged over the classes that are labelled somewhere in the batch.

    Args:
        logits: (B, K, *S), K >= 2.
        mask: (B, *S) integer class ids in 0..K-1, or ``IGNORE``. Ids of unlabelled classes count as background.
        valid_classes: bool (B, K), which classes the image's source labels; or (B, K, *S), of each pixel, where images
            of several sources are mixed. Background, class 0, is always known up to what is merged with it: its entry
            is not looked at. None: all, the ordinary loss.
        valid: bool (B, *S), pixels that count; all but the ignored if None.
        smooth: defines 0/0 as a Dice of 1.
    Returns:
        Scalar; equal to ``segmentation_loss`` where every class is labelled; 0 where no pixel counts.
    Raises:
        ValueError: shapes or types that do not belong together.
    Source:
        Shi et al., Medical Image Analysis 70 (2021) 101979 (marginal loss), arXiv:2007.03868.
    """
    if valid_classes is None:
        return segmentation_loss(logits, mask, valid=valid)
    check_shapes(logits, mask=mask, valid=valid)
    labelled = _by_pixel(valid_classes, logits)  # (B, K, *S) or (B, K, 1, ...)
    counts = mask != IGNORE if valid is None else valid & (mask != IGNORE)  # (B, *S)
    ids = mask.long().masked_fill(mask == IGNORE, 0).unsqueeze(1)  # (B, 1, *S)
    ids = ids.masked_fill(~labelled.expand_as(logits).gather(1, ids), 0).squeeze(1)
    log_probs = marginal_log_probs(logits, valid_classes)
    cross_entropy = average(-log_probs.gather(1, ids.unsqueeze(1)).squeeze(1), counts)
    dice = dice_by_class(log_probs.exp(), ids, counts, smooth)  # (K,)
    over = (0, *range(2, logits.ndim))
    known = (labelled & counts.unsqueeze(1)).any(over) if counts.numel() else counts.new_zeros(logits.shape[1])
    return cross_entropy + (dice * known).sum() / known.sum().clamp(min=1)


def marginal_log_probs(logits: Tensor, valid_classes: Tensor) -> Tensor:
    """Log-probabilities after unlabelled classes were merged with the background, float32.

    Args:
        logits: (B, K, *S), K >= 2.
        valid_classes: bool (B, K) or (B, K, *S), as in :func:`partial_segmentation_loss`.
    Returns:
        (B, K, *S): class 0 is background or any unlabelled class; unlabelled classes are at minus infinity.
    Raises:
        ValueError: shapes or types that do not belong together.
    """
    check_shapes(logits)
    labelled = _by_pixel(valid_classes, logits)
    log_probs = logits.float().log_softmax(1)
    merged = torch.cat([torch.ones_like(labelled[:, :1]), ~labelled[:, 1:]], 1)
    background = log_probs.masked_fill(~merged, -torch.inf).logsumexp(1, keepdim=True)
    return torch.cat([background, log_probs.masked_fill(~labelled, -torch.inf)[:, 1:]], 1)


def _by_pixel(valid_classes: Tensor, logits: Tensor) -> Tensor:
    """Checked, class 0 always labelled, and with an axis for each of the logits': bool (B, K, *S) or (B, K, 1, ...)."""
    batch, classes, *size = logits.shape
    allowed = [(batch, classes), (batch, classes, *size)]
    if tuple(valid_classes.shape) not in allowed or valid_classes.dtype != torch.bool:
        raise ValueError(
            f"valid_classes must be bool (B, K) = {allowed[0]} or (B, K, *S) = {allowed[1]}, got "
            f"{valid_classes.dtype} {tuple(valid_classes.shape)}"
        )
    if valid_classes.ndim == 2:
        valid_classes = valid_classes.view(batch, classes, *(1,) * len(size))
    return torch.cat([torch.ones_like(valid_classes[:, :1]), valid_classes[:, 1:]], 1)
