"""URPC (arXiv:2012.07042): predictions of several scales agree, less where they are uncertain."""

import torch
import torch.nn.functional as F

from knowsam.methods.base import StudentMethod, supervised_loss
from knowsam.needs import Needs
from knowsam.schedules import sigmoid_rampup


class URPC(StudentMethod):
    needs = Needs(students=1, strong_views=0, features=True, auxiliary=True, partial_labels=True)
    default_students = {"unet": {"name": "unet", "deep_supervision": True}}

    def __init__(self, students, max_steps: int, *, weight: float = 0.1, rampup: float = 0.4):
        super().__init__(students)
        self.weight, self.rampup_steps = weight, rampup * max_steps

    def forward(self, batch, step):
        (name,) = self.students.names
        student = self.students.subnets[name]
        joined = batch.join(batch.weak)
        features = student.encode(joined.images)
        scales = {name: student.decode(features), **student.auxiliary(features)}
        scales = {key: F.interpolate(x, size=joined.images.shape[2:]) for key, x in scales.items()}
        losses = {f"seg_{key}": supervised_loss(x, batch) / len(scales) for key, x in scales.items()}
        logs = torch.stack([joined.unlabelled(x).float().log_softmax(1) for x in scales.values()])  # (N, U, K, *S)
        mean = logs.exp().mean(0).detach()
        uncertainty = (mean * (mean.clamp(min=1e-8).log() - logs)).sum(2, keepdim=True)  # (N, U, 1, *S), KL
        sure = torch.exp(-uncertainty)
        agreement = (sure * (logs.exp() - mean).square()).mean() / sure.mean() + uncertainty.mean()
        losses["pyramid"] = self.weight * sigmoid_rampup(step, self.rampup_steps) * agreement
        return self.report(losses, joined, {name: scales[name]})
