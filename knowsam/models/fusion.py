"""Fusion head (KnowSAM's hybrid aggregation module): two students' logits -> one."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from knowsam.losses.entropy import entropy_map
from knowsam.models.concatenation import concatenate


def _branch(in_channels: int, hidden: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, hidden, 3, padding=1, bias=False),
        nn.BatchNorm2d(hidden),
        nn.LeakyReLU(0.2, inplace=True),
        nn.Conv2d(hidden, out_channels, 1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.LeakyReLU(0.2, inplace=True),
    )


class FusionHead(nn.Module):
    """Merges the logits, certainties and agreement of a pair of students into fused logits.

    Three branches: (a) agreement, 1 where both argmaxes say the same about class k, (b) the two certainties
    1 - entropy / log K, (c) both logits. Inputs are not detached, so the fused loss also trains both students.
    The last layer is linear: batch norm and a rectifier on logits, as published, cap what they can say.

    Args:
        num_classes: K, background included.
    Source:
        arXiv:2412.13742 (HAM); 40.5 k parameters for K = 2.
    """

    def __init__(self, num_classes: int):
        super().__init__()
        self.num_classes = num_classes
        self.agreement = _branch(num_classes, 16, 16)
        self.certainty = _branch(2, 16, 16)
        self.logits = _branch(2 * num_classes, 16, 32)
        self.merge = nn.Sequential(
            nn.Conv2d(64, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.LeakyReLU(0.2, inplace=True)
        )
        self.head = nn.Conv2d(64, num_classes, 3, padding=1)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Two logits (B, K, S, S) -> fused logits (B, K, S, S)."""
        agreement = self.agreement_map(first, second)  # (B, K, S, S), no gradient
        certainty = torch.stack([self.certainty_map(first), self.certainty_map(second)], dim=1).to(first.dtype)
        x = concatenate(
            [self.agreement(agreement), self.certainty(certainty), self.logits(torch.cat([first, second], 1))]
        )
        return self.head(self.merge(x))  # (B, 64, S, S) -> (B, K, S, S)

    def agreement_map(self, first: Tensor, second: Tensor) -> Tensor:
        """1 where both argmaxes of two logits (B, K, S, S) say the same about class k, else 0: (B, K, S, S)."""
        classes = torch.arange(self.num_classes, device=first.device).view(-1, 1, 1)  # (K, 1, 1)
        votes = [x.argmax(1, keepdim=True) == classes for x in (first, second)]  # (B, K, S, S) each
        return (votes[0] == votes[1]).to(first.dtype)

    def certainty_map(self, logits: Tensor) -> Tensor:
        """1 - entropy / log K of logits (B, K, S, S): (B, S, S) in 0..1."""
        return 1 - entropy_map(logits)

    def undecided(self, first: Tensor, second: Tensor, margin: float) -> Tensor:
        """Where the fused logits may jump for a change of ``margin`` in two logits (B, K, S, S): bool (B, S, S).

        Agreement is a step function of the logits: rounding decides a tie between a student's two best classes.
        """
        ties = self.ties(first, margin) | self.ties(second, margin)
        # Three convolutions of 3 x 3 lie between agreement and answer.
        return F.max_pool2d(ties[:, None].float(), 7, stride=1, padding=3)[:, 0] > 0

    def ties(self, logits: Tensor, margin: float) -> Tensor:
        """Where a change of ``margin`` in logits (B, K, S, S) may change what `agreement_map` sees: bool (B, S, S)."""
        best = logits.topk(2, dim=1).values
        return best[:, 0] - best[:, 1] < margin
