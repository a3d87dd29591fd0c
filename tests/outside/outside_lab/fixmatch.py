"""FixMatch (arXiv:2001.07685): where the weak view is sure, its argmax teaches the strong view."""

import torch

from knowsam.losses import pseudo_label_loss
from knowsam.methods.base import Prediction, StudentMethod, Views, supervised_losses
from knowsam.needs import Needs


class FixMatch(StudentMethod):
    needs = Needs(students=1, partial_labels=True)

    def __init__(self, students, *, weight: float = 1.0, confidence_threshold: float = 0.95):
        super().__init__(students)
        self.weight, self.confidence_threshold = weight, confidence_threshold

    def forward(self, batch, step):
        (name,) = self.students.names
        with torch.no_grad():
            target = self.students(batch.weak)[name]  # (U, K, *S)
        joined = batch.join(batch.strong[0])
        logits = self.students(joined.images)
        losses = supervised_losses(self.students, logits, batch)
        losses["fixmatch"] = self.weight * pseudo_label_loss(
            joined.unlabelled(logits[name]), target, confidence_threshold=self.confidence_threshold
        )
        return self.report(
            losses, joined, logits, views=Views({"weak": Prediction(batch.weak, target, batch.mask[:0])})
        )
