"""Fusion head (KnowSAM's hybrid aggregation module): two students' logits -> one."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from knowsam.losses.entropy import entropy_map
from knowsam.models.concatenation import concatenate
from knowsam.models.layers import Layers, layers


def _branch(layer: Layers, in_channels: int, hidden: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        layer.conv(in_channels, hidden, 3, padding=1, bias=False),
        layer.batch_norm(hidden),
        nn.LeakyReLU(0.2, inplace=True),
        layer.conv(hidden, out_channels, 1, bias=False),
        layer.batch_norm(out_channels),
        nn.LeakyReLU(0.2, inplace=True),
    )


class FusionHead(nn.Module):
    """Merges the logits, certainties and agreement of a pair of students into fused logits.

    Three branches: (a) agreement, 1 where both argmaxes say the same about class k, (b) the two certainties
    1 - entropy / log K, (c) both logits. Inputs are not detached, so the fused loss also trains both students.
    The last layer is linear: batch norm and a rectifier on logits, as published, cap what they can say.

    Args:
        num_classes: K, background included.
        spatial_dims: 2 for images, 3 for volumes.
        width: channels of the three branches together, a multiple of 4. At the images' full size they cost most of the
            head's time, which grows with the square.
    Raises:
        ValueError: width is no positive multiple of 4.
    Source:
        arXiv:2412.13742 (HAM); 40.5 k parameters for K = 2 in 2-D at its width of 64.
    """

    def __init__(self, num_classes: int, spatial_dims: int = 2, *, width: int = 64):
        super().__init__()
        if width < 4 or width % 4:
            raise ValueError(f"width is {width}; it must be a positive multiple of 4")
        quarter = width // 4
        layer = layers(spatial_dims)
        self.num_classes = num_classes
        self.agreement = _branch(layer, num_classes, quarter, quarter)
        self.certainty = _branch(layer, 2, quarter, quarter)
        self.logits = _branch(layer, 2 * num_classes, quarter, 2 * quarter)
        self.merge = nn.Sequential(
            layer.conv(width, width, 3, padding=1, bias=False), layer.batch_norm(width), nn.LeakyReLU(0.2, inplace=True)
        )
        self.head: nn.Module = layer.conv(width, num_classes, 3, padding=1)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Two logits (B, K, *S) -> fused logits (B, K, *S)."""
        agreement = self.agreement_map(first, second)  # (B, K, *S), no gradient
        certainty = torch.stack([self.certainty_map(first), self.certainty_map(second)], dim=1).to(first.dtype)
        x = concatenate(
            [self.agreement(agreement), self.certainty(certainty), self.logits(torch.cat([first, second], 1))]
        )
        fused: Tensor = self.head(self.merge(x))  # (B, width, *S) -> (B, K, *S)
        return fused

    def agreement_map(self, first: Tensor, second: Tensor) -> Tensor:
        """1 where both argmaxes of two logits (B, K, *S) say the same about class k, else 0: (B, K, *S)."""
        classes = torch.arange(self.num_classes, device=first.device).view(-1, *(1,) * (first.ndim - 2))
        votes = [x.argmax(1, keepdim=True) == classes for x in (first, second)]  # (B, K, *S) each
        return (votes[0] == votes[1]).to(first.dtype)

    def certainty_map(self, logits: Tensor) -> Tensor:
        """1 - entropy / log K of logits (B, K, *S): (B, *S) in 0..1."""
        return 1 - entropy_map(logits)

    def undecided(self, first: Tensor, second: Tensor, margin: float) -> Tensor:
        """Where the fused logits may jump for a change of ``margin`` in two logits (B, K, *S): bool (B, *S).

        Agreement is a step function of the logits: rounding decides a tie between a student's two best classes.
        """
        ties = self.ties(first, margin) | self.ties(second, margin)
        # Three convolutions of width 3 lie between agreement and fused logits.
        widen = F.max_pool2d if ties.ndim == 3 else F.max_pool3d
        return widen(ties[:, None].float(), 7, stride=1, padding=3)[:, 0] > 0

    def ties(self, logits: Tensor, margin: float) -> Tensor:
        """Where a change of ``margin`` in logits (B, K, *S) may change what `agreement_map` sees: bool (B, *S)."""
        best = logits.topk(2, dim=1).values
        return best[:, 0] - best[:, 1] < margin
