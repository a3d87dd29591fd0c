"""SKD for any method: SAM learns from the labelled images and teaches the method's students, by composition."""

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from knowsam.data.batch import Batch
from knowsam.losses import sam_distillation_loss, segmentation_loss
from knowsam.methods.base import SSLMethod, StepOutput, ask_sam, check_range
from knowsam.schedules import sigmoid_rampup


class WithSKD(SSLMethod):
    """Adds SAM's supervised loss and its distillation into every student; the wrapped method is not touched.

    SAM is prompted with the method's ``prompting_output``, in training as in prediction. Outputs that the method marks
    as not to be distilled (a fusion head) prompt but are not taught.

    Args:
        method: any method that reports ``predictions``.
        sam_guide: (images, coarse_logits) -> SAM's class logits; trained as optimizer group ``sam``.
        max_steps: length of the run, for the ramp.
        weight: factor of the distillation at the end of the ramp, shared by the students.
        temperature: T > 0.
        rampup: length of the sigmoid ramp as a fraction of the run; 0 teaches at full weight from the start.
        confidence_threshold: least probability of SAM's argmax for a pixel to be taught, 0..1.
        sam_teacher_mode: ``eval`` (no dropout, averaged batch statistics while teaching) or ``train`` (as published).
        sam_gradient: which images SAM's encoder keeps a graph of, as in ``KnowSAM``.
    Source:
        arXiv:2412.13742 (SKD as a plug-in).
    """

    def __init__(
        self,
        method: SSLMethod,
        sam_guide: nn.Module,
        max_steps: int,
        *,
        weight: float = 1.0,
        temperature: float = 10.0,
        rampup: float = 0.4,
        confidence_threshold: float = 0.0,
        sam_teacher_mode: Literal["eval", "train"] = "eval",
        sam_gradient: Literal["all", "labelled"] = "all",
    ):
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"temperature must be > 0, got {temperature}")
        if sam_gradient not in ("all", "labelled"):
            raise ValueError(f"sam_gradient must be one of ('all', 'labelled'), got {sam_gradient!r}")
        check_range(0, 1, confidence_threshold=confidence_threshold)
        check_range(0, float("inf"), weight=weight, rampup=rampup)
        self.method = method
        self.sam_guide = sam_guide
        self.weight = weight
        self.temperature = temperature
        self.rampup_steps = rampup * max_steps
        self.confidence_threshold = confidence_threshold
        self.sam_teacher_mode = sam_teacher_mode
        self.sam_gradient = sam_gradient

    def forward(self, batch: Batch, step: int) -> StepOutput:
        """The method's losses, plus ``sam`` and ``skd_<student>``."""
        out = self.method(batch, step)
        if not out.predictions:
            raise ValueError(f"{type(self.method).__name__} reports no predictions, so SAM has no student to teach")
        # Students that saw the same images share one pass of SAM.
        groups: dict[int, list[str]] = {}
        for name, prediction in out.predictions.items():
            groups.setdefault(id(prediction.images), []).append(name)
        ramp = sigmoid_rampup(step, self.rampup_steps)
        share = self.weight * ramp / max(1, sum(prediction.distil for prediction in out.predictions.values()))
        prompting = self.method.prompting_output()
        losses, teachers = dict(out.losses), dict(out.views.teachers)
        for names in groups.values():
            shown = out.predictions[prompting if prompting in names else names[0]]
            sam_logits, teacher_logits = ask_sam(
                self.sam_guide,
                shown.images,
                shown.logits.detach(),
                self.sam_teacher_mode,
                labelled=len(shown.mask),
                gradient=self.sam_gradient,
            )
            seg = segmentation_loss(sam_logits[: len(shown.mask)], shown.mask) / len(groups)
            losses["sam"] = losses.get("sam", 0.0) + seg
            if prompting in names or "sam" not in teachers:
                teachers["sam"] = teacher_logits
            confidence = teacher_logits.float().softmax(1).amax(1)  # (B, S, S)
            for name in names:
                if out.predictions[name].distil:
                    losses[f"skd_{name}"] = share * sam_distillation_loss(
                        out.predictions[name].logits,
                        teacher_logits,
                        temperature=self.temperature,
                        valid=confidence >= self.confidence_threshold,
                    )
        monitors = {**out.monitors, "skd_rampup": torch.tensor(ramp)}
        return StepOutput(losses, out.predictions, monitors, replace(out.views, teachers=teachers))

    def after_step(self, step: int) -> None:
        """Pass the step on to the method within."""
        self.method.after_step(step)

    def trainable_groups(self) -> dict[str, list[nn.Parameter]]:
        """As the contract says: one optimizer group per name."""
        sam = [p for p in self.sam_guide.parameters() if p.requires_grad]
        return {**self.method.trainable_groups(), "sam": sam}

    def outputs(self) -> tuple[str, ...]:
        """Names of what can be evaluated, the deployed one first."""
        return (*self.method.outputs(), "sam")

    def predict(self, images: Tensor) -> dict[str, Tensor]:
        """(B, 3, S, S) in 0..1 -> logits (B, K, S, S) by output name."""
        logits = self.method.predict(images)
        return {**logits, "sam": self.sam_guide(images, logits[self.method.prompting_output()])}

    def compilable(self) -> list[nn.Module]:
        """Parts of the method within, and of SAM."""
        return [*self.method.compilable(), *super().compilable()]

    def prompting_output(self) -> str:
        """Output whose logits prompt SAM."""
        return self.method.prompting_output()

    def inference_model(self) -> nn.Module:
        """Image (B, 3, S, S) in 0..1 -> logits (B, K, S, S), as deployed."""
        return self.method.inference_model()

    def deployable(self) -> dict[str, nn.Module]:
        """Networks that work without SAM, by output name, the deployed one first."""
        return self.method.deployable()
