"""The published code's fusion head."""

from torch import Tensor, nn

from knowsam.compat.losses import entropy_map_nats
from knowsam.models.fusion import FusionHead


class PublishedFusionHead(FusionHead):
    """Our fusion head with any of the published code's peculiarities.

    Args:
        num_classes: K, background included.
        xor: agreement of class k is 1 - XOR of the two probabilities of k cut at 0.5, so that two students that both
            give every class less than 0.5 agree, whatever their argmaxes.
        entropy_nats: certainty is 1 - entropy in nats, below 0 for K > 2.
        rectified: fused logits pass batch norm and LeakyReLU(0.2), after a convolution without bias.
    """

    def __init__(self, num_classes: int, *, xor: bool = True, entropy_nats: bool = True, rectified: bool = True):
        super().__init__(num_classes)
        self.xor = xor
        self.entropy_nats = entropy_nats
        if rectified:
            self.head = nn.Sequential(
                nn.Conv2d(64, num_classes, 3, padding=1, bias=False), nn.BatchNorm2d(num_classes), nn.LeakyReLU(0.2)
            )

    def agreement_map(self, first: Tensor, second: Tensor) -> Tensor:
        """Where two logits (B, K, S, S) agree per class: (B, K, S, S) of 0 and 1."""
        if not self.xor:
            return super().agreement_map(first, second)
        above = [x.float().softmax(1) > 0.5 for x in (first, second)]
        return (above[0] == above[1]).to(first.dtype)

    def ties(self, logits: Tensor, margin: float) -> Tensor:
        """Where a change of ``margin`` in logits (B, K, S, S) may change what `agreement_map` sees: bool (B, S, S)."""
        if not self.xor:
            return super().ties(logits, margin)
        return ((logits.float().softmax(1) - 0.5).abs() < margin).any(1)

    def certainty_map(self, logits: Tensor) -> Tensor:
        """How sure logits (B, K, S, S) are: (B, S, S)."""
        return 1 - entropy_map_nats(logits) if self.entropy_nats else super().certainty_map(logits)
