"""What all losses share: which tensors belong together, and the average over pixels that count."""

import torch
from torch import Tensor

IGNORE = 255
"""Class id of a mask's pixels that take no part in any supervised loss."""


def check_shapes(
    logits: Tensor,
    target_logits: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    valid: Tensor | None = None,
    weight: Tensor | None = None,
    names: tuple[str, str] = ("logits", "target_logits"),
) -> None:
    """Refuse tensors that do not belong together: broadcasting would give a wrong number without an error.

    Args:
        logits: (B, K, *S), K >= 2.
        target_logits: of the same shape.
        mask: integers (B, *S).
        valid: bool (B, *S).
        weight: floating (B, *S).
        names: what the caller calls its logits and its target, for the message.
    Raises:
        ValueError: says which shapes or types came, and which are allowed.
    """
    shape = tuple(logits.shape)
    if len(shape) < 2 or shape[1] < 2:
        raise ValueError(f"{names[0]} need K >= 2 classes on axis 1, got shape {shape}")
    if target_logits is not None and target_logits.shape != logits.shape:
        raise ValueError(f"{names[0]} {shape} and {names[1]} {tuple(target_logits.shape)} differ")
    pixels = (shape[0], *shape[2:])
    for name, given in (("mask", mask), ("valid", valid), ("weight", weight)):
        if given is not None and given.shape != pixels:
            raise ValueError(f"{name} must be (B, *S) = {pixels} for {names[0]} {shape}, got {tuple(given.shape)}")
    if mask is not None and (mask.is_floating_point() or shape[1] >= IGNORE):
        wrong = f"mask of {mask.dtype}" if mask.is_floating_point() else f"K = {shape[1]}"
        raise ValueError(f"a mask holds integer class ids of at most {IGNORE - 1} classes, got {wrong}")
    if valid is not None and valid.dtype != torch.bool:
        raise ValueError(f"valid must be bool, got {valid.dtype}; compare it with a threshold, or give it as a weight")
    if weight is not None and not weight.is_floating_point():
        raise ValueError(f"weight must be a floating tensor, got {weight.dtype}; a bool one is a valid")


def average(loss: Tensor, valid: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
    """sum(weight * valid * loss) / max(sum(valid), 1); where nothing is valid, exactly 0, with a graph.

    Args:
        loss: (B, *S), or (B, K, *S), which is averaged over K too.
        valid: bool (B, *S), pixels that count; all if None.
        weight: (B, *S), factor of every pixel; 1 if None.
    Returns:
        Scalar.
    """
    factor = valid if weight is None else weight
    if factor is None:
        return loss.mean() if loss.numel() else loss.sum()
    if loss.ndim > factor.ndim:
        loss = loss.mean(1)
    if weight is not None:
        loss = loss * weight
    if valid is None:
        return average(loss)
    return (loss * valid).sum() / valid.sum().clamp(min=1)
