"""Tensors in, scalar out. Each loss is float32 inside, right for every number of classes, and usable alone."""

from knowsam.losses.consistency import consistency_loss, mse_consistency_loss, pseudo_label_loss
from knowsam.losses.distillation import sam_distillation_loss
from knowsam.losses.entropy import entropy_loss, entropy_map
from knowsam.losses.supervised import segmentation_loss, soft_dice_loss

__all__ = [
    "consistency_loss",
    "entropy_loss",
    "entropy_map",
    "mse_consistency_loss",
    "pseudo_label_loss",
    "sam_distillation_loss",
    "segmentation_loss",
    "soft_dice_loss",
]
