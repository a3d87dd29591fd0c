"""The supervised baseline: the same students, labelled images only."""

import torch
from torch import Tensor, nn

from knowsam.data.batch import Batch
from knowsam.losses import segmentation_loss
from knowsam.methods.base import Prediction, SSLMethod, StepOutput
from knowsam.models.students import DeployedStudents, Students


class Supervised(SSLMethod):
    """Cross-entropy + Dice on the labelled images: mean over the students, plus the fusion head if there is one.

    Args:
        students: the networks; trained as one optimizer group ``subnets``.
        forward_unlabelled: also show the students the strong unlabelled views, for a wrapper such as ``WithSKD``
            that teaches on them; without a wrapper they would cost time and change only batch statistics.
    """

    def __init__(self, students: Students, *, forward_unlabelled: bool = False):
        super().__init__()
        self.students = students
        self.forward_unlabelled = forward_unlabelled

    def forward(self, batch: Batch, step: int) -> StepOutput:
        """Losses ``seg_<student>`` and, with a fusion head, ``seg_fusion``."""
        images = torch.cat([batch.labelled, batch.strong]) if self.forward_unlabelled else batch.labelled
        logits = self.students(images)
        losses = supervised_terms(self.students, logits, batch.mask)
        return StepOutput(
            losses, {name: Prediction(images, x, batch.mask, name != "fusion") for name, x in logits.items()}
        )

    def trainable_groups(self) -> dict[str, list[nn.Parameter]]:
        """As the contract says: one optimizer group per name."""
        return {"subnets": list(self.students.parameters())}

    def outputs(self) -> tuple[str, ...]:
        """Names of what can be evaluated, the deployed one first."""
        return output_names(self.students)

    def predict(self, images: Tensor) -> dict[str, Tensor]:
        """(B, 3, S, S) in 0..1 -> logits (B, K, S, S) by output name."""
        return self.students(images)

    def inference_model(self) -> nn.Module:
        """Image (B, 3, S, S) in 0..1 -> logits (B, K, S, S), as deployed."""
        return DeployedStudents(self.students)

    def deployable(self) -> dict[str, nn.Module]:
        """Networks that work without SAM, by output name, the deployed one first."""
        return student_networks(self.students)


def supervised_terms(students: Students, logits: dict[str, Tensor], mask: Tensor) -> dict[str, Tensor]:
    """``seg_<name>`` on the first L images of every output: students share weight 1, the fusion head has weight 1.

    Args:
        students: whose logits these are.
        logits: (B, K, S, S) by output name, labelled images first.
        mask: (L, S, S) class ids.
    """
    share = 1.0 / len(students.names)
    return {
        f"seg_{name}": (1.0 if name == "fusion" else share) * segmentation_loss(x[: len(mask)], mask)
        for name, x in logits.items()
    }


def output_names(students: Students) -> tuple[str, ...]:
    """Every output of the students, the deployed one first."""
    return tuple(dict.fromkeys((students.deployed, *students.names)))


def student_networks(students: Students) -> dict[str, nn.Module]:
    """Each output of the students as a network (B, 3, S, S) in 0..1 -> (B, K, S, S), the deployed one first."""
    return {name: DeployedStudents(students, name) for name in output_names(students)}
