"""Mean Teacher: an averaged copy of the students teaches them on unlabelled images."""

import copy
from typing import Literal

import torch
from torch import Tensor, nn

from knowsam.data.batch import Batch
from knowsam.losses import consistency_loss, mse_consistency_loss, pseudo_label_loss
from knowsam.methods.base import Prediction, SSLMethod, StepOutput, Views, check_range
from knowsam.methods.supervised import output_names, student_networks, supervised_terms
from knowsam.models.students import DeployedStudents, Students
from knowsam.schedules import ema_decay, sigmoid_rampup

CONSISTENCY = {"mse": mse_consistency_loss, "bce": consistency_loss, "pseudo_label": pseudo_label_loss}


class MeanTeacher(SSLMethod):
    """Supervised loss + agreement with an EMA teacher: it sees the weak view, the students the strong one.

    The teacher stays in eval mode (no dropout, averaged batch statistics) and is moved by ``after_step`` only; its
    buffers follow the same average as its weights.

    Args:
        students: the networks that receive gradient.
        max_steps: length of the run, for the ramp.
        ema_decay: decay of the average per step, 0..1.
        consistency: ``mse`` on probabilities (the paper's), ``bce``, or ``pseudo_label`` (cross-entropy to the argmax).
        consistency_weight: factor at the end of the ramp.
        rampup: length of the sigmoid ramp as a fraction of the run.
    Source:
        arXiv:1703.01780.
    """

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
        super().__init__()
        if consistency not in CONSISTENCY:
            raise ValueError(f"consistency must be one of {sorted(CONSISTENCY)}, got {consistency!r}")
        check_range(0, 1, ema_decay=ema_decay)
        check_range(0, float("inf"), consistency_weight=consistency_weight, rampup=rampup)
        self.students = students
        self.teacher = copy.deepcopy(students).requires_grad_(False).eval()
        self.ema_decay = ema_decay
        self.consistency = CONSISTENCY[consistency]
        self.consistency_weight = consistency_weight
        self.rampup_steps = rampup * max_steps

    def train(self, mode: bool = True) -> "MeanTeacher":
        """Training mode for the students alone: the teacher never leaves eval mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, batch: Batch, step: int) -> StepOutput:
        """Losses ``seg_*`` and ``consistency_*`` per output of the students."""
        images = torch.cat([batch.labelled, batch.strong])
        logits = self.students(images)
        with torch.no_grad():
            target = self.teacher(batch.weak)[self.teacher.deployed]  # (U, K, S, S)
        losses = supervised_terms(self.students, logits, batch.mask)
        weight = self.consistency_weight * sigmoid_rampup(step, self.rampup_steps) / len(logits)
        for name, x in logits.items():
            losses[f"consistency_{name}"] = weight * self.consistency(x[len(batch.mask) :], target)
        return StepOutput(
            losses,
            {name: Prediction(images, x, batch.mask, name != "fusion") for name, x in logits.items()},
            {"consistency_weight": torch.tensor(weight)},
            Views({"teacher": target}),
        )

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Move the teacher towards the students, buffers included; integer buffers are copied."""
        decay = ema_decay(step, self.ema_decay)
        for averaged, current in zip(
            self.teacher.state_dict().values(), self.students.state_dict().values(), strict=True
        ):
            if averaged.is_floating_point():
                averaged.lerp_(current, 1.0 - decay)
            else:
                averaged.copy_(current)

    def trainable_groups(self) -> dict[str, list[nn.Parameter]]:
        """As the contract says: one optimizer group per name."""
        return {"subnets": list(self.students.parameters())}

    def outputs(self) -> tuple[str, ...]:
        """Names of what can be evaluated, the deployed one first."""
        return ("teacher", *output_names(self.students))

    def prompting_output(self) -> str:
        """Output whose logits prompt SAM."""
        return self.students.deployed  # the teacher's logits take no part in training SAM

    def predict(self, images: Tensor) -> dict[str, Tensor]:
        """(B, 3, S, S) in 0..1 -> logits (B, K, S, S) by output name."""
        return {"teacher": self.teacher(images)[self.teacher.deployed], **self.students(images)}

    def inference_model(self) -> nn.Module:
        """Image (B, 3, S, S) in 0..1 -> logits (B, K, S, S), as deployed."""
        return DeployedStudents(self.teacher)

    def deployable(self) -> dict[str, nn.Module]:
        """Networks that work without SAM, by output name, the deployed one first."""
        return {"teacher": self.inference_model(), **student_networks(self.students)}
