"""BCP (arXiv:2305.00673): copy-paste between labelled images first, then both ways with pseudo-labels of a teacher."""

import torch

from knowsam.losses import segmentation_loss
from knowsam.methods.base import Phase, Prediction, StepOutput, StudentMethod, Taught
from knowsam.methods.ema import EmaTeacher
from knowsam.mixing import centred_or_random_box, paste
from knowsam.needs import Needs


class BCP(StudentMethod):
    needs = Needs(students=1, strong_views=0, plain_labelled=True, second_labelled=True)

    def __init__(self, students, max_steps: int, *, pretrain: float = 0.3, decay: float = 0.99, weight: float = 0.5):
        super().__init__(students)
        self.teacher, self.weight, self.pretrain_steps = (
            EmaTeacher(students, decay),
            weight,
            round(pretrain * max_steps),
        )

    def phases(self):
        return Phase("pretrain", 0), Phase("self-training", self.pretrain_steps, ("teacher", "optimizer", "schedule"))

    def forward(self, batch, step):
        (name,) = self.students.names
        labelled, other, weight = batch.plain, batch.second, 1.0
        if step >= self.pretrain_steps:
            rows = torch.arange(len(labelled), device=labelled.device) % len(batch.weak)
            with torch.no_grad():
                other = batch.weak[rows], self.teacher(batch.weak)[name].argmax(1)[rows]
            weight = self.weight
        box = centred_or_random_box(labelled.shape[2:]).to(labelled.device).expand(len(labelled), *labelled.shape[2:])
        losses, predictions, taught = {}, {}, {}
        for way, inside in (("in", box), ("out", ~box)):  # the other image stands where `inside` is True
            images, mask = paste(labelled, other[0], inside), paste(batch.mask, other[1], inside)
            logits = self.students(images)[name]
            own, pasted = (segmentation_loss(logits, mask, valid=where) for where in (~inside, inside))
            losses[f"copy_{way}"] = own + weight * pasted
            predictions[f"{name}_{way}"] = Prediction(images, logits, mask)
            taught[f"{name}_{way}"] = Taught(logits, "labelled", valid=~inside)
        return StepOutput(losses, predictions, taught)

    def after_step(self, step):
        self.teacher.update(step)

    def networks(self):
        return {**super().networks(), "teacher": self.teacher.average.network(self.teacher.average.deployed)}
