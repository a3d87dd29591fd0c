"""Knowledge distillation from SAM into a student."""

from torch import Tensor


def sam_distillation_loss(
    student_logits: Tensor,
    sam_logits: Tensor,
    *,
    temperature: float = 10.0,
    valid: Tensor | None = None,
) -> Tensor:
    """Distil SAM's per-pixel class distribution into a student (SKD).

    KL(softmax(sam / T) || softmax(student / T)), summed over classes, averaged over pixels, times T^2 so that
    the gradient keeps its size when T changes. Computed in float32; SAM is treated as constant.

    Args:
        student_logits: (B, K, *spatial), K >= 2; receives gradient.
        sam_logits: same shape; detached here.
        temperature: T > 0, no unit.
        valid: bool (B, *spatial), pixels that count; all if None. With no valid pixel the loss is 0.
    Returns:
        Scalar, nats per pixel times T^2; 0 when both distributions agree.
    Raises:
        ValueError: shapes differ, K < 2, or T <= 0.
    Source:
        arXiv:1503.02531 (distillation), arXiv:2412.13742 (KnowSAM).
    Example:
        >>> loss = loss + 1.0 * sam_distillation_loss(student_logits, sam_logits, temperature=10.0)
    """
    if student_logits.shape != sam_logits.shape:
        raise ValueError(
            f"student_logits {tuple(student_logits.shape)} and sam_logits {tuple(sam_logits.shape)} differ"
        )
    if student_logits.ndim < 2 or student_logits.shape[1] < 2:
        raise ValueError(f"logits need K >= 2 classes on axis 1, got shape {tuple(student_logits.shape)}")
    if temperature <= 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    teacher = (sam_logits.detach().float() / temperature).log_softmax(1)
    student = (student_logits.float() / temperature).log_softmax(1)
    per_pixel = (teacher.exp() * (teacher - student)).sum(1) * temperature**2  # (B, *spatial)
    if valid is None:
        return per_pixel.mean()
    return (per_pixel * valid).sum() / valid.sum().clamp(min=1)
