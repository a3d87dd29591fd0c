"""Cross pseudo supervision (arXiv:2106.01226): two networks learn from each other's argmax."""

from knowsam.losses import pseudo_label_loss
from knowsam.methods.base import StudentMethod, supervised_losses
from knowsam.needs import Needs
from knowsam.schedules import sigmoid_rampup


class CPS(StudentMethod):
    needs = Needs(students=2, strong_views=0, partial_labels=True)
    default_students = {"first": {"name": "unet"}, "second": {"name": "unet"}}

    def __init__(self, students, max_steps: int, *, weight: float = 0.1, rampup: float = 0.4):
        super().__init__(students)
        self.weight, self.rampup_steps = weight, rampup * max_steps

    def forward(self, batch, step):
        joined = batch.join(batch.weak)
        logits = self.students(joined.images)
        losses = supervised_losses(self.students, logits, batch)
        weight = self.weight * sigmoid_rampup(step, self.rampup_steps)
        first, second = self.students.names
        for name, other in ((first, second), (second, first)):
            target = joined.unlabelled(logits[other])
            losses[f"cps_{name}"] = weight * pseudo_label_loss(joined.unlabelled(logits[name]), target)
        return self.report(losses, joined, logits)
