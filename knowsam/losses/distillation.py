"""Knowledge distillation from a teacher, SAM for one, into a student."""

from torch import Tensor

from knowsam.losses.pixels import average, check_shapes


def kl_loss(
    logits: Tensor,
    target_logits: Tensor,
    *,
    temperature: float = 1.0,
    valid: Tensor | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """KL(softmax(target / T) || softmax(logits / T)), summed over classes, averaged over pixels, times T^2.

    T^2 keeps the gradient's size when T changes. Computed in float32.

    Args:
        logits: (B, K, *S), K >= 2; receives gradient.
        target_logits: same shape; detached here.
        temperature: T > 0, no unit.
        valid: bool (B, *S), pixels that count; all if None.
        weight: (B, *S), factor of every pixel; 1 if None.
    Returns:
        Scalar, nats per pixel times T^2; 0 when both distributions agree, or no pixel counts.
    Raises:
        ValueError: shapes or types that do not belong together, or T <= 0.
    Source:
        arXiv:1503.02531 (distillation).
    """
    check_shapes(logits, target_logits, valid=valid, weight=weight)
    return _kl(logits, target_logits, temperature, valid, weight)


def sam_distillation_loss(
    student_logits: Tensor,
    sam_logits: Tensor,
    *,
    temperature: float = 10.0,
    valid: Tensor | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """Distil SAM's per-pixel class distribution into a student (SKD).

    KL(softmax(sam / T) || softmax(student / T)), summed over classes, averaged over pixels, times T^2 so that
    the gradient keeps its size when T changes. Computed in float32; SAM is treated as constant.

    Args:
        student_logits: (B, K, *S), K >= 2; receives gradient.
        sam_logits: same shape; detached here.
        temperature: T > 0, no unit.
        valid: bool (B, *S), pixels that count; all if None. With no valid pixel the loss is 0.
        weight: (B, *S), factor of every pixel; 1 if None.
    Returns:
        Scalar, nats per pixel times T^2; 0 when both distributions agree.
    Raises:
        ValueError: shapes or types that do not belong together, or T <= 0.
    Source:
        arXiv:1503.02531 (distillation), arXiv:2412.13742 (KnowSAM).
    Example:
        >>> loss = loss + 1.0 * sam_distillation_loss(student_logits, sam_logits, temperature=10.0)
    """
    names = ("student_logits", "sam_logits")
    check_shapes(student_logits, sam_logits, valid=valid, weight=weight, names=names)
    return _kl(student_logits, sam_logits, temperature, valid, weight)


def _kl(logits: Tensor, target: Tensor, temperature: float, valid: Tensor | None, weight: Tensor | None) -> Tensor:
    if temperature <= 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    teacher = (target.detach().float() / temperature).log_softmax(1)
    student = (logits.float() / temperature).log_softmax(1)
    per_pixel = (teacher.exp() * (teacher - student)).sum(1) * temperature**2  # (B, *S)
    return average(per_pixel, valid, weight)
