"""DAN (Zhang et al., MICCAI 2017): a discriminator tells labelled from unlabelled predictions; the student fools it."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from knowsam.methods.base import StudentMethod, frozen_call, supervised_losses
from knowsam.needs import Needs


class DAN(StudentMethod):
    needs = Needs(students=1, strong_views=0, partial_labels=True)
    default_optim = {"discriminator": {"name": "adam", "lr": 1e-4, "betas": [0.9, 0.99]}}

    def __init__(self, students, num_classes: int, in_channels: int, spatial_dims: int, *, weight: float = 0.1):
        super().__init__(students)
        self.weight = weight
        conv = nn.Conv2d if spatial_dims == 2 else nn.Conv3d
        widths = (num_classes + in_channels, 16, 32)
        blocks = [nn.Sequential(conv(i, o, 4, 2, 1), nn.LeakyReLU(0.2)) for i, o in pairwise(widths)]
        self.discriminator = nn.Sequential(*blocks, conv(widths[-1], 1, 1))

    def trainable_groups(self):
        return {**super().trainable_groups(), "discriminator": list(self.discriminator.parameters())}

    def forward(self, batch, step):
        (name,) = self.students.names
        joined = batch.join(batch.weak)
        logits = self.students(joined.images)
        seen = torch.cat([logits[name].softmax(1), joined.images], 1)
        labelled = torch.ones(len(seen), device=seen.device)
        labelled[joined.count :] = 0
        losses = supervised_losses(self.students, logits, batch)
        fooled = frozen_call(self.discriminator, joined.unlabelled(seen)).flatten(1).mean(1).float()
        losses["fool"] = self.weight * F.binary_cross_entropy_with_logits(fooled, torch.ones_like(fooled))
        judged = self.discriminator(seen.detach()).flatten(1).mean(1).float()
        losses["discriminator"] = F.binary_cross_entropy_with_logits(judged, labelled)
        return self.report(losses, joined, logits)
