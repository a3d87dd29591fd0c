"""UniMatch (arXiv:2208.09910): two strong views with CutMix, and dropped features of the weak one."""

import torch.nn.functional as F

from knowsam.losses import pseudo_label_loss
from knowsam.methods.base import StudentMethod, supervised_losses
from knowsam.mixing import paste, random_boxes
from knowsam.needs import Needs


class UniMatch(StudentMethod):
    needs = Needs(students=1, strong_views=2, features=True, partial_labels=True)

    def __init__(self, students, *, confidence_threshold: float = 0.95, feature_dropout: float = 0.5):
        super().__init__(students)
        self.confidence_threshold, self.feature_dropout = confidence_threshold, feature_dropout

    def forward(self, batch, step):
        (name,) = self.students.names
        student = self.students.subnets[name]
        joined = batch.join(batch.weak)
        features = student.encode(joined.images)
        logits = {name: student.decode(features)}
        losses = supervised_losses(self.students, logits, batch)
        target = joined.unlabelled(logits[name]).detach()  # (U, K, *S)
        drop = F.dropout2d if batch.weak.ndim == 4 else F.dropout3d
        dropped = student.decode([drop(joined.unlabelled(f), self.feature_dropout) for f in features])
        losses["feature"] = 0.5 * self._match(dropped, target)
        for number, strong in enumerate(batch.strong):
            boxes = random_boxes(len(strong), strong.shape[2:]).to(strong.device)  # (U, *S)
            mixed, mixed_target = (paste(x, x.flip(0), boxes) for x in (strong, target))
            losses[f"strong_{number}"] = 0.25 * self._match(student(mixed), mixed_target)
        return self.report(losses, joined, logits)

    def _match(self, logits, target):
        return pseudo_label_loss(logits, target, confidence_threshold=self.confidence_threshold)
