"""The supervised baseline: the same students, labelled images only."""

from knowsam.data.batch import Batch
from knowsam.methods.base import StepOutput, StudentMethod, supervised_losses
from knowsam.needs import Needs


class Supervised(StudentMethod):
    """Cross-entropy + Dice on the labelled images: mean over the students, plus the fusion head if there is one.

    Unlabelled images, which it is given where SAM teaches, are shown to the students (strong view) and take part in
    batch statistics; no loss of its own is of them.

    Args:
        students: the networks; trained as one optimizer group ``subnets``.
    """

    needs = Needs(unlabelled=False, partial_labels=True)

    def forward(self, batch: Batch, step: int) -> StepOutput:
        """Losses ``seg_<student>`` and, with a fusion head, ``seg_fusion``."""
        joined = batch.join(batch.strong[0])
        logits = self.students(joined.images)  # (L + U, K, *S) each
        return self.report(supervised_losses(self.students, logits, batch), joined, logits)
