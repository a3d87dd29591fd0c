"""Mean Teacher: an averaged copy of the students teaches them on unlabelled images."""

from typing import Literal

import torch
from torch import nn

from knowsam.data.batch import Batch
from knowsam.losses import consistency_loss, mse_consistency_loss, pseudo_label_loss
from knowsam.methods.base import Prediction, StepOutput, StudentMethod, Views, check_range, supervised_losses
from knowsam.methods.ema import EmaTeacher
from knowsam.models.students import Students
from knowsam.needs import Needs
from knowsam.schedules import sigmoid_rampup

CONSISTENCY = {"mse": mse_consistency_loss, "bce": consistency_loss, "pseudo_label": pseudo_label_loss}


class MeanTeacher(StudentMethod):
    """Supervised loss + agreement with an EMA teacher: it sees the weak view, the students the strong one.

    Args:
        students: the networks that receive gradient; by default one U-Net.
        max_steps: length of the run, for the ramp.
        ema_decay: decay of the average per step, 0..1.
        consistency: ``mse`` on probabilities (the paper's), ``bce``, or ``pseudo_label`` (cross-entropy to the argmax).
        consistency_weight: factor at the end of the ramp.
        rampup: length of the sigmoid ramp as a fraction of the run.
    Source:
        arXiv:1703.01780.
    """

    needs = Needs(unlabelled=True, strong_views=1, partial_labels=True)

    def __init__(
        self,
        students: Students,
        max_steps: int,
        *,
        ema_decay: float = 0.99,
        consistency: Literal["mse", "bce", "pseudo_label"] = "mse",
        consistency_weight: float = 1.0,
        rampup: float = 0.4,
    ):
        super().__init__(students)
        if consistency not in CONSISTENCY:
            raise ValueError(f"consistency must be one of {sorted(CONSISTENCY)}, got {consistency!r}")
        check_range(0, 1, ema_decay=ema_decay)
        check_range(0, float("inf"), consistency_weight=consistency_weight, rampup=rampup)
        self.teacher = EmaTeacher(students, ema_decay)
        self.consistency = CONSISTENCY[consistency]
        self.consistency_weight = consistency_weight
        self.rampup_steps = rampup * max_steps

    def forward(self, batch: Batch, step: int) -> StepOutput:
        """Losses ``seg_*`` and ``consistency_*`` per output of the students."""
        joined = batch.join(batch.strong[0])
        logits = self.students(joined.images)
        with torch.no_grad():
            target = self.teacher(batch.weak)[self.students.deployed]  # (U, K, *S)
        losses = supervised_losses(self.students, logits, batch)
        weight = self.consistency_weight * sigmoid_rampup(step, self.rampup_steps) / len(logits)
        for name, x in logits.items():
            losses[f"consistency_{name}"] = weight * self.consistency(joined.unlabelled(x), target)
        views = Views({"teacher": Prediction(batch.weak, target, batch.mask[:0])})
        return self.report(losses, joined, logits, monitors={"consistency_weight": torch.tensor(weight)}, views=views)

    def after_step(self, step: int) -> None:
        """Move the teacher towards the students."""
        self.teacher.update(step)

    def networks(self) -> dict[str, nn.Module]:
        """The teacher first, then the students."""
        average: Students = self.teacher.average  # type: ignore[assignment]
        return {"teacher": average.network(average.deployed), **super().networks()}

    def prompting_output(self) -> str:
        """The students', as in training: the teacher's logits take no part in training SAM."""
        return self.students.deployed
