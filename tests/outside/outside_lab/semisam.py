"""SemiSAM (arXiv:2312.06316): the student's surest point of each class asks SAM for a mask, which teaches it."""

import torch

from knowsam.losses import mse_consistency_loss
from knowsam.methods.base import StudentMethod, supervised_loss, supervised_losses, trained
from knowsam.models.sam import Prompts, freeze_unreached
from knowsam.needs import Needs


class SemiSAM(StudentMethod):
    needs = Needs(students=1, strong_views=0, sam="promptable", spatial_dims=(2,), partial_labels=True)

    def __init__(self, students, sam, *, weight: float = 0.1):
        super().__init__(students)
        self.sam, self.weight = sam, weight
        freeze_unreached(sam, points=True, boxes=False, masks=False, multimask=False, scores=False)

    def trainable_groups(self):
        return {**super().trainable_groups(), "sam": trained(self.sam)}

    def forward(self, batch, step):
        (name,) = self.students.names
        joined = batch.join(batch.weak)
        logits = self.students(joined.images)
        losses = supervised_losses(self.students, logits, batch)
        masks = self._ask(joined.images, logits[name].detach())  # (L + U, K, H, W)
        losses["sam"] = supervised_loss(masks, batch)
        losses["semisam"] = self.weight * mse_consistency_loss(
            joined.unlabelled(logits[name]), joined.unlabelled(masks).detach()
        )
        return self.report(losses, joined, logits)

    def _ask(self, images, logits):
        foreground = logits.softmax(1)[:, 1:].flatten(2)  # (B, K - 1, HW)
        best = foreground.argmax(2, keepdim=True)
        points = torch.stack([best % images.shape[-1], best // images.shape[-1]], -1).float()  # (B, K - 1, 1, 2), x y
        masks = self.sam(images, Prompts(points=points, labels=torch.ones_like(best)), scores=False).logits.squeeze(2)
        return torch.cat([torch.zeros_like(masks[:, :1]), masks], 1)  # SAM's 0 is its own border to background
