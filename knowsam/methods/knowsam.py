"""KnowSAM: two co-trained students, a fusion head, and SAM as their teacher."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from knowsam.data.batch import Batch
from knowsam.losses import consistency_loss, entropy_loss, entropy_map, sam_distillation_loss, segmentation_loss
from knowsam.methods.base import Mix, Prediction, SSLMethod, StepOutput, Views, ask_sam, check_range
from knowsam.methods.supervised import output_names, student_networks
from knowsam.mixing import cells_to_mask, paste, select_cells
from knowsam.models.students import DeployedStudents, Students
from knowsam.schedules import sigmoid_rampup

Loss = Callable[[Tensor, Tensor], Tensor]
"""Logits (B, K, S, S) that learn, logits of the same shape that they learn from -> scalar."""


@dataclass(frozen=True)
class Formulas:
    """What KnowSAM's terms are computed with, for whoever wants to compare with other forms of them.

    Attributes:
        consistency: the first and the second student's, from its own logits and the other's.
        distillation: student's and SAM's logits, ``temperature``, ``valid`` -> scalar.
        entropy: logits -> scalar, the students' entropy term.
        uncertainty: fused logits -> (B, S, S), by which cells are chosen for mixing.
        consistency_rampup: step and length of the ramp, in steps -> factor of the consistency.
    """

    consistency: tuple[Loss, Loss] = (consistency_loss, consistency_loss)
    distillation: Callable[..., Tensor] = sam_distillation_loss
    entropy: Callable[[Tensor], Tensor] = entropy_loss
    uncertainty: Callable[[Tensor], Tensor] = entropy_map
    consistency_rampup: Callable[[float, float], float] = sigmoid_rampup


class KnowSAM(SSLMethod):
    """Co-training + SAM-induced distillation + feedback of the fused prediction to SAM + uncertainty-guided mixing.

    Per student v: (seg + skd_weight KL(SAM -> v) + entropy_weight H + w(t) consistency with the other student) / 2;
    the fusion head: seg on the labelled images; SAM: seg on the labelled images. From ``mix_start`` on, the students
    and the fusion head also learn from images whose grid cells were exchanged between labelled and unlabelled ones.

    Args:
        students: two students and a fusion head; trained as optimizer group ``subnets``.
        sam_guide: (images, coarse_logits) -> SAM's class logits; its trainable part is optimizer group ``sam``.
            It must offer ``encode`` and ``decode`` when ``sam_teacher_mode`` is ``eval``.
        max_steps: length of the run, for ramps and the start of mixing.
        skd_weight: factor of the distillation at the end of its ramp.
        skd_temperature: T > 0.
        skd_rampup: length of the sigmoid ramp of the distillation, as a fraction of the run; 0 is the published form.
        skd_confidence_threshold: least probability of SAM's argmax for a pixel to be distilled; 0 distils all.
        sam_teacher_mode: ``eval`` (no dropout, averaged batch statistics while teaching) or ``train`` (as published).
        sam_view: which view of an unlabelled image SAM sees: ``weak``, or ``strong`` as the students do (published).
        sam_gradient: which images SAM's encoder keeps a graph of. SAM's loss is of the labelled ones; the others reach
            it through the batch statistics of the prompt generator only. ``all`` keeps that; ``labelled`` leaves it
            out and saves half of the encoder's backward pass. A teacher in ``train`` mode keeps all.
        entropy_weight: factor of the students' normalised entropy.
        consistency_weight: factor of the cross-student consistency at the end of its ramp.
        consistency_rampup: length of that ramp as a fraction of the run.
        mixing: whether to mix at all.
        mix_start: when mixing starts, as a fraction of the run (12,000 of 50,000 steps published).
        mix_weight: factor of all losses on mixed images at the end of its ramp.
        mix_rampup: length of the sigmoid ramp of that factor from ``mix_start`` on, as a fraction of the run; 0 is the
            published form. SAM's labels cover most of a mixed unlabelled image: a ramp lets SAM learn first.
        mix_grid: cells per side.
        mix_cells: cells exchanged per image.
        mix_pick: ``most_uncertain`` or ``least_uncertain`` cells, by the fused entropy.
        mix_confidence_threshold: least probability of SAM's argmax for its pseudo-labels to count in a mix, 0..1.
        formulas: other forms of the terms; ours if None.
    Source:
        arXiv:2412.13742, in the corrected form that docs/architecture.md lists.
    """

    def __init__(
        self,
        students: Students,
        sam_guide: nn.Module,
        max_steps: int,
        *,
        skd_weight: float = 1.0,
        skd_temperature: float = 10.0,
        skd_rampup: float = 0.4,
        skd_confidence_threshold: float = 0.0,
        sam_teacher_mode: Literal["eval", "train"] = "eval",
        sam_view: Literal["weak", "strong"] = "weak",
        sam_gradient: Literal["all", "labelled"] = "all",
        entropy_weight: float = 0.9,
        consistency_weight: float = 1.0,
        consistency_rampup: float = 1.0,
        mixing: bool = True,
        mix_start: float = 0.24,
        mix_weight: float = 1.0,
        mix_rampup: float = 0.0,
        mix_grid: int = 4,
        mix_cells: int = 5,
        mix_pick: Literal["most_uncertain", "least_uncertain"] = "most_uncertain",
        mix_confidence_threshold: float = 0.0,
        formulas: Formulas | None = None,
    ):
        super().__init__()
        if len(students.names) != 2 or students.fusion_head is None:
            raise ValueError(f"KnowSAM co-trains 2 students with a fusion head, got {len(students.names)} student(s)")
        if skd_temperature <= 0:
            raise ValueError(f"skd_temperature must be > 0, got {skd_temperature}")
        for name, value, allowed in (
            ("sam_teacher_mode", sam_teacher_mode, ("eval", "train")),
            ("sam_view", sam_view, ("weak", "strong")),
            ("sam_gradient", sam_gradient, ("all", "labelled")),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {value!r}")
        check_range(
            0,
            1,
            mix_start=mix_start,
            skd_confidence_threshold=skd_confidence_threshold,
            mix_confidence_threshold=mix_confidence_threshold,
        )
        check_range(
            0,
            float("inf"),
            skd_weight=skd_weight,
            skd_rampup=skd_rampup,
            entropy_weight=entropy_weight,
            consistency_weight=consistency_weight,
            consistency_rampup=consistency_rampup,
            mix_weight=mix_weight,
            mix_rampup=mix_rampup,
        )
        self.students = students
        self.sam_guide = sam_guide
        self.skd_weight = skd_weight
        self.skd_temperature = skd_temperature
        self.skd_rampup_steps = skd_rampup * max_steps
        self.skd_confidence_threshold = skd_confidence_threshold
        self.sam_teacher_mode = sam_teacher_mode
        self.sam_view = sam_view
        self.sam_gradient = sam_gradient
        self.entropy_weight = entropy_weight
        self.consistency_weight = consistency_weight
        self.consistency_rampup_steps = consistency_rampup * max_steps
        self.mix_from_step = mix_start * max_steps if mixing else float("inf")
        self.mix_weight = mix_weight
        self.mix_rampup_steps = mix_rampup * max_steps
        self.mix_cells = {"grid": mix_grid, "cells": mix_cells, "pick": mix_pick}
        self.mix_confidence_threshold = mix_confidence_threshold
        self.formulas = formulas or Formulas()
        self.formulas.consistency_rampup(0, self.consistency_rampup_steps)  # a length that it refuses is refused here
        if mixing:  # refused here rather than when mixing starts, thousands of steps later
            select_cells(torch.zeros(1, mix_grid, mix_grid), **self.mix_cells)

    def forward(self, batch: Batch, step: int) -> StepOutput:
        """Losses ``sam``, ``seg_*``, ``skd_*``, ``entropy_*``, ``consistency_*`` and, when mixing, ``mix_*``."""
        images = torch.cat([batch.labelled, batch.strong])  # (L + U, 3, S, S)
        logits = self.students(images)
        sam_images = images if self.sam_view == "strong" else torch.cat([batch.labelled, batch.weak])
        sam_logits, teacher_logits = ask_sam(
            self.sam_guide,
            sam_images,
            logits["fusion"].detach(),
            self.sam_teacher_mode,
            labelled=len(batch.mask),
            gradient=self.sam_gradient,
        )
        confidence, sam_label = teacher_logits.float().softmax(1).max(1)  # (L + U, S, S) each

        skd = self.skd_weight * sigmoid_rampup(step, self.skd_rampup_steps)
        consistency = self.consistency_weight * self.formulas.consistency_rampup(step, self.consistency_rampup_steps)
        labelled = len(batch.mask)
        losses = {
            "sam": segmentation_loss(sam_logits[:labelled], batch.mask),
            "seg_fusion": segmentation_loss(logits["fusion"][:labelled], batch.mask),
        }
        for name, other, agree in self._pairs():
            losses[f"seg_{name}"] = 0.5 * segmentation_loss(logits[name][:labelled], batch.mask)
            losses[f"skd_{name}"] = (0.5 * skd) * self.formulas.distillation(
                logits[name],
                teacher_logits,
                temperature=self.skd_temperature,
                valid=confidence >= self.skd_confidence_threshold,
            )
            losses[f"entropy_{name}"] = 0.5 * self.entropy_weight * self.formulas.entropy(logits[name])
            losses[f"consistency_{name}"] = 0.5 * consistency * agree(logits[name], logits[other])
        views = Views({"sam": teacher_logits})
        if step > self.mix_from_step:
            uncertainty = self.formulas.uncertainty(logits["fusion"].detach())  # (L + U, S, S)
            mixed, mix = self._mix(images, batch.mask, uncertainty, sam_label, confidence, consistency)
            ramp = self.mix_weight * sigmoid_rampup(step - self.mix_from_step, self.mix_rampup_steps)
            losses |= {name: ramp * term for name, term in mixed.items()}
            views.uncertainty, views.mix = uncertainty, mix

        monitors = {
            "skd_weight": torch.tensor(skd),
            "consistency_weight": torch.tensor(consistency),
            "sam_confidence": confidence[labelled:].mean(),
            "sam_agreement": (sam_label == logits["fusion"].argmax(1))[labelled:].float().mean(),
        }
        predictions = {name: Prediction(images, x, batch.mask, name != "fusion") for name, x in logits.items()}
        return StepOutput(losses, predictions, monitors, views)

    def _pairs(self) -> tuple[tuple[str, str, Loss], tuple[str, str, Loss]]:
        """Each student, the other one, and the consistency loss between them."""
        (first, second), (of_first, of_second) = self.students.names, self.formulas.consistency
        return (first, second, of_first), (second, first, of_second)

    def _mix(
        self, images: Tensor, mask: Tensor, uncertainty: Tensor, sam_label: Tensor, confidence: Tensor, weight: float
    ) -> tuple[Mapping[str, Tensor], Mix]:
        """Losses of the students and the fusion head on images whose uncertain cells were exchanged; these images."""
        labelled, unlabelled = len(mask), len(images) - len(mask)
        # Image b of one half meets image b of the other; the shorter half is repeated.
        partner = torch.cat(
            [
                labelled + torch.arange(labelled, device=images.device) % unlabelled,
                torch.arange(unlabelled, device=images.device) % labelled,
            ]
        )
        label = torch.cat([mask, sam_label[labelled:]])  # truth where there is one, SAM's answer elsewhere
        sure = torch.ones_like(label, dtype=torch.bool)
        sure[labelled:] = confidence[labelled:] >= self.mix_confidence_threshold
        where = cells_to_mask(select_cells(uncertainty, **self.mix_cells), images.shape[-2:])
        mixed = paste(images, images[partner], where)
        mixed_label = paste(label, label[partner], where)
        sure = paste(sure, sure[partner], where)

        logits = self.students(mixed)
        fused_label = logits["fusion"].detach().argmax(1)
        losses = {"mix_seg_fusion": segmentation_loss(logits["fusion"], mixed_label, valid=sure)}
        for name, other, agree in self._pairs():
            x = logits[name]
            losses[f"mix_seg_{name}"] = 0.5 * segmentation_loss(x, mixed_label, valid=sure)
            losses[f"mix_entropy_{name}"] = 0.5 * self.entropy_weight * self.formulas.entropy(x)
            losses[f"mix_consistency_{name}"] = (0.5 * weight) * (
                agree(x, logits[other]) + segmentation_loss(x[labelled:], fused_label[labelled:])
            )
        return losses, Mix(mixed, mixed_label, where, sure, logits["fusion"].detach())

    def trainable_groups(self) -> dict[str, list[nn.Parameter]]:
        """As the contract says: one optimizer group per name."""
        return {
            "subnets": list(self.students.parameters()),
            "sam": [p for p in self.sam_guide.parameters() if p.requires_grad],
        }

    def outputs(self) -> tuple[str, ...]:
        """Names of what can be evaluated, the deployed one first."""
        return (*output_names(self.students), "sam")

    def predict(self, images: Tensor) -> dict[str, Tensor]:
        """(B, 3, S, S) in 0..1 -> logits (B, K, S, S) by output name."""
        logits = self.students(images)
        return {**logits, "sam": self.sam_guide(images, logits["fusion"])}

    def inference_model(self) -> nn.Module:
        """Image (B, 3, S, S) in 0..1 -> logits (B, K, S, S), as deployed."""
        return DeployedStudents(self.students)

    def deployable(self) -> dict[str, nn.Module]:
        """Networks that work without SAM, by output name, the deployed one first."""
        return student_networks(self.students)
