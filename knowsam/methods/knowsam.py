"""KnowSAM: two co-trained students, a fusion head, and SAM as their teacher."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from knowsam.data.batch import Batch, Joined
from knowsam.losses import (
    IGNORE,
    consistency_loss,
    entropy_loss,
    entropy_map,
    partial_segmentation_loss,
    sam_distillation_loss,
    segmentation_loss,
)
from knowsam.methods.base import (
    Mix,
    StepOutput,
    StudentMethod,
    Taught,
    Views,
    check_range,
    classes_by_pixel,
    supervised_loss,
)
from knowsam.methods.sam_teacher import SamOutput, SamTeacher, SkdOptions
from knowsam.mixing import cells_to_mask, paste, select_cells
from knowsam.models.students import Students
from knowsam.needs import Needs
from knowsam.schedules import sigmoid_rampup

Loss = Callable[..., Tensor]
"""Logits (B, K, *S) that learn, logits of the same shape that they learn from, ``valid`` (B, *S) -> scalar."""


@dataclass(frozen=True)
class Formulas:
    """What KnowSAM's terms are computed with, for whoever wants to compare with other forms of them.

    Attributes:
        consistency: the first and the second student's, from its own logits and the other's.
        distillation: student's and SAM's logits, ``temperature``, ``valid`` -> scalar.
        entropy: logits, ``valid`` -> scalar, the students' entropy term.
        uncertainty: fused logits -> (B, *S), by which cells are chosen for mixing.
        consistency_rampup: step and length of the ramp, in steps -> factor of the consistency.
        second_is_constant: whether the second student's consistency has no gradient.
    """

    consistency: tuple[Loss, Loss] = (consistency_loss, consistency_loss)
    distillation: Callable[..., Tensor] = sam_distillation_loss
    entropy: Callable[..., Tensor] = entropy_loss
    uncertainty: Callable[[Tensor], Tensor] = entropy_map
    consistency_rampup: Callable[[float, float], float] = sigmoid_rampup
    second_is_constant: bool = False


@dataclass(frozen=True)
class Consistency:
    """Agreement of the two students.

    Attributes:
        weight: factor at the end of the ramp.
        rampup: length of the sigmoid ramp as a fraction of the run.
    Raises:
        ValueError: a value below 0.
    """

    weight: float = 1.0
    rampup: float = 1.0

    def __post_init__(self) -> None:
        check_range(0, float("inf"), weight=self.weight, rampup=self.rampup)


@dataclass(frozen=True)
class Mixing:
    """Exchange of grid cells between labelled and unlabelled images (UGDA).

    Attributes:
        start: when it starts, as a fraction of the run (12,000 of 50,000 steps published).
        weight: factor of all losses on mixed images at the end of its ramp.
        rampup: length of the sigmoid ramp of that factor from ``start`` on, as a fraction of the run; 0 is the
            published form. SAM's labels cover most of a mixed unlabelled image: a ramp lets SAM learn first.
        grid: cells per side.
        cells: cells exchanged per image.
        pick: ``most_uncertain`` or ``least_uncertain`` cells, by the fused entropy.
        confidence_threshold: least probability of SAM's argmax for its pseudo-labels to count in a mix, 0..1.
    Raises:
        ValueError: a value outside what is stated, or more cells than the grid has.
    """

    start: float = 0.24
    weight: float = 1.0
    rampup: float = 0.0
    grid: int = 4
    cells: int = 5
    pick: Literal["most_uncertain", "least_uncertain"] = "most_uncertain"
    confidence_threshold: float = 0.0

    def __post_init__(self) -> None:
        check_range(0, 1, start=self.start, confidence_threshold=self.confidence_threshold)
        check_range(0, float("inf"), weight=self.weight, rampup=self.rampup)
        self.select(torch.zeros(1, self.grid, self.grid))  # refused here rather than thousands of steps later

    def select(self, uncertainty: Tensor, valid: Tensor | None = None) -> Tensor:
        """The cells of each image by its uncertainty (B, *S) where it is ``valid``: bool (B, grid, ...)."""
        return select_cells(uncertainty, grid=self.grid, cells=self.cells, pick=self.pick, valid=valid)


class KnowSAM(StudentMethod):
    """Co-training + SAM-induced distillation + feedback of the fused prediction to SAM + uncertainty-guided mixing.

    Per student v: (seg + w_skd KL(SAM -> v) + entropy_weight H + w(t) consistency with the other student) / 2;
    the fusion head: seg on the labelled images; SAM: seg on the labelled images. From ``mix.start`` on, the students
    and the fusion head also learn from images whose grid cells were exchanged between labelled and unlabelled ones.

    Args:
        students: two students and a fusion head; trained as optimizer group ``subnets``.
        sam_guide: (images, coarse_logits) -> SAM's class logits; its trainable part is optimizer group ``sam``.
        max_steps: length of the run, for ramps and the start of mixing.
        skd: how SAM teaches.
        consistency: agreement of the two students.
        entropy_weight: factor of the students' normalised entropy.
        mix: exchange of grid cells; None for none.
        formulas: other forms of the terms; ours if None.
    Source:
        arXiv:2412.13742, in the corrected form that docs/fidelity.md lists.
    """

    needs = Needs(students=2, fusion=True, sam="guide", strong_views=1, partial_labels=True)
    default_students: ClassVar[Mapping[str, Any]] = {"unet": {"name": "unet"}, "vnet": {"name": "vnet"}}
    default_fusion: ClassVar[Mapping[str, Any] | None] = {"name": "ham"}
    published_rows = True

    def __init__(
        self,
        students: Students,
        sam_guide: nn.Module,
        max_steps: int,
        *,
        skd: SkdOptions = SkdOptions(),
        consistency: Consistency = Consistency(),
        entropy_weight: float = 0.9,
        mix: Mixing | None = Mixing(),
        formulas: Formulas | None = None,
    ):
        super().__init__(students)
        if len(students.names) != 2 or students.fusion_head is None:
            raise ValueError(f"KnowSAM co-trains 2 students with a fusion head, got {len(students.names)} student(s)")
        check_range(0, float("inf"), entropy_weight=entropy_weight)
        self.sam_teacher = SamTeacher(sam_guide, max_steps, skd)
        self.consistency = consistency
        self.consistency_rampup_steps = consistency.rampup * max_steps
        self.entropy_weight = entropy_weight
        self.mix = mix
        self.mix_from_step = mix.start * max_steps if mix is not None else float("inf")
        self.mix_rampup_steps = mix.rampup * max_steps if mix is not None else 0.0
        self.formulas = formulas or Formulas()
        self.formulas.consistency_rampup(0, self.consistency_rampup_steps)  # a length that it refuses is refused here

    def forward(self, batch: Batch, step: int) -> StepOutput:
        """Losses ``sam``, ``seg_*``, ``skd_*``, ``entropy_*``, ``consistency_*`` and, when mixing, ``mix_*``."""
        teacher = self.sam_teacher
        assert teacher is not None
        joined = batch.join(batch.strong[0])  # (L + U, C, *S)
        logits = self.students(joined.images)
        said: SamOutput = teacher(batch, logits["fusion"])
        consistency = self.consistency.weight * self.formulas.consistency_rampup(step, self.consistency_rampup_steps)

        losses = {
            "sam": said.loss,
            "seg_fusion": supervised_loss(logits["fusion"], batch),
        }
        taught = {name: Taught(logits[name]) for name in self.students.names}
        for lesson, (name, other, agree) in zip(teacher.lessons(said, taught, step), self._pairs(), strict=True):
            x = logits[name]
            losses[f"seg_{name}"] = 0.5 * supervised_loss(x, batch)
            losses[f"skd_{name}"] = lesson.weight * self.formulas.distillation(
                x, lesson.target, temperature=teacher.options.temperature, valid=lesson.valid
            )
            losses[f"entropy_{name}"] = 0.5 * self.entropy_weight * self.formulas.entropy(x, valid=said.known)
            losses[f"consistency_{name}"] = 0.5 * consistency * agree(x, logits[other], valid=said.known)

        views = Views({"sam": said.prediction})
        if self.mix is not None and step > self.mix_from_step:
            views.uncertainty = self.formulas.uncertainty(logits["fusion"].detach())  # (L + U, *S)
            mixed, views.mix = self._mix(self.mix, joined, views.uncertainty, said, consistency)
            ramp = self.mix.weight * sigmoid_rampup(step - self.mix_from_step, self.mix_rampup_steps)
            losses |= {name: ramp * term for name, term in mixed.items()}
        monitors = {
            "skd_weight": torch.tensor(teacher.ramp(step)),
            "consistency_weight": torch.tensor(consistency),
            "sam_confidence": joined.unlabelled(said.confidence).mean(),
            "sam_agreement": joined.unlabelled(said.label == logits["fusion"].argmax(1)).float().mean(),
        }
        out = self.report(losses, joined, logits, monitors=monitors, views=views)
        if self.formulas.second_is_constant:
            out.constant = frozenset({f"consistency_{self.students.names[1]}"})
        return out

    def _pairs(self) -> tuple[tuple[str, str, Loss], tuple[str, str, Loss]]:
        """Each student, the other one, and the consistency loss between them."""
        (first, second), (of_first, of_second) = self.students.names, self.formulas.consistency
        return (first, second, of_first), (second, first, of_second)

    def _mix(
        self, mix: Mixing, joined: Joined, uncertainty: Tensor, said: SamOutput, weight: float
    ) -> tuple[Mapping[str, Tensor], Mix]:
        """Losses of the students and the fusion head on images whose uncertain cells were exchanged; these images."""
        images, labelled, unlabelled = joined.images, joined.count, len(joined.images) - joined.count
        # Image b of one half meets image b of the other; the shorter half is repeated. One half alone meets nothing.
        partner = torch.arange(len(images), device=images.device)
        if labelled and unlabelled:
            partner = torch.cat([labelled + partner[:labelled] % unlabelled, partner[:unlabelled] % labelled])
        label = torch.cat([joined.mask, joined.unlabelled(said.label)])  # truth where there is one, else SAM's argmax
        sure = torch.ones_like(label, dtype=torch.bool)
        sure[labelled:] = joined.unlabelled(said.confidence) >= mix.confidence_threshold
        known, classes = said.known, classes_by_pixel(joined)
        where = cells_to_mask(mix.select(uncertainty, known), images.shape[2:])
        mixed = paste(images, images[partner], where)
        mixed_label = paste(label, label[partner], where)
        sure = paste(sure, sure[partner], where)
        known = paste(known, known[partner], where)
        classes = None if classes is None else paste(classes, classes[partner], where)

        logits = self.students(mixed)
        fused_label = logits["fusion"].detach().argmax(1)
        losses = {"mix_seg_fusion": partial_segmentation_loss(logits["fusion"], mixed_label, classes, valid=sure)}
        for name, other, agree in self._pairs():
            x = logits[name]
            losses[f"mix_seg_{name}"] = 0.5 * partial_segmentation_loss(x, mixed_label, classes, valid=sure)
            losses[f"mix_entropy_{name}"] = 0.5 * self.entropy_weight * self.formulas.entropy(x, valid=known)
            losses[f"mix_consistency_{name}"] = (0.5 * weight) * (
                agree(x, logits[other], valid=known)
                + segmentation_loss(x[labelled:], fused_label[labelled:], valid=known[labelled:])
            )
        counted = sure & (mixed_label != IGNORE)
        return losses, Mix(mixed, mixed_label, where, counted, logits["fusion"].detach())
