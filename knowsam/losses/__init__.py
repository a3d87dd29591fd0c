"""Tensors in, scalar out. Each loss is float32 inside, right for every number of classes, and usable alone.

Shapes are checked: logits are (B, K, *S), *S one of (H, W) and (D, H, W); masks, ``valid`` and ``weight`` (B, *S).
"""

from knowsam.losses.consistency import consistency_loss, mse_consistency_loss, pseudo_label_loss, sharpen
from knowsam.losses.distillation import kl_loss, sam_distillation_loss
from knowsam.losses.entropy import entropy_loss, entropy_map
from knowsam.losses.partial import marginal_log_probs, partial_segmentation_loss
from knowsam.losses.pixels import IGNORE, average, check_shapes
from knowsam.losses.supervised import cross_entropy_loss, segmentation_loss, soft_dice_loss

__all__ = [
    "IGNORE",
    "average",
    "check_shapes",
    "consistency_loss",
    "cross_entropy_loss",
    "entropy_loss",
    "entropy_map",
    "kl_loss",
    "marginal_log_probs",
    "mse_consistency_loss",
    "partial_segmentation_loss",
    "pseudo_label_loss",
    "sam_distillation_loss",
    "segmentation_loss",
    "sharpen",
    "soft_dice_loss",
]
