"""2-D V-Net student."""

import itertools
from typing import Literal

from torch import Tensor, nn

NORMS = {"none": nn.Identity, "batch": nn.BatchNorm2d, "instance": lambda c: nn.InstanceNorm2d(c, affine=True)}


def _unit(conv: nn.Module, channels: int, norm: str) -> list[nn.Module]:
    return [conv, NORMS[norm](channels), nn.ReLU(inplace=True)]


def _block(channels: int, depth: int, norm: str, in_channels: int | None = None) -> nn.Sequential:
    """``depth`` times 3x3 convolution, norm, ReLU."""
    units: list[nn.Module] = []
    for i in range(depth):
        width = in_channels if i == 0 and in_channels else channels
        units += _unit(nn.Conv2d(width, channels, 3, padding=1), channels, norm)
    return nn.Sequential(*units)


class VNet(nn.Module):
    """V-Net in 2-D; 3.27 M parameters for K = 2 and no norm.

    The skip added at a level is the output of that level's *down* convolution (at full resolution, of the first
    block), as in the published code of KnowSAM.

    Args:
        num_classes: K, background included.
        in_channels: channels of the image.
        filters: width at full resolution, doubled at each of four levels; S must be divisible by 16.
        norm: ``none`` (published; needs thousands of steps), ``batch`` or ``instance``.
    Source:
        arXiv:1606.04797, arXiv:2412.13742.
    """

    depths = (1, 2, 3, 3, 3)
    size_divisor = 16

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 3,
        filters: int = 16,
        norm: Literal["none", "batch", "instance"] = "none",
    ):
        super().__init__()
        if norm not in NORMS:
            raise ValueError(f"norm must be one of {sorted(NORMS)}, got {norm!r}")
        if filters < 1:
            raise ValueError(f"filters must be at least 1, got {filters}")
        widths = [filters * 2**level for level in range(5)]
        self.stem = _block(widths[0], self.depths[0], norm, in_channels)
        self.down = nn.ModuleList(
            nn.Sequential(*_unit(nn.Conv2d(i, o, 2, stride=2), o, norm)) for i, o in itertools.pairwise(widths)
        )
        self.encoder = nn.ModuleList(
            _block(w, depth, norm) for w, depth in zip(widths[1:], self.depths[1:], strict=True)
        )
        self.up = nn.ModuleList(
            nn.Sequential(*_unit(nn.ConvTranspose2d(i, o, 2, stride=2), o, norm))
            for i, o in itertools.pairwise(reversed(widths))
        )
        self.decoder = nn.ModuleList(
            _block(w, depth, norm) for w, depth in zip(widths[-2::-1], self.depths[-2::-1], strict=True)
        )
        self.head = nn.Conv2d(filters, num_classes, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, S, S) -> logits (B, K, S, S)."""
        x = self.stem(x)
        skips = [x]
        for down, block in zip(self.down, self.encoder, strict=True):
            skips.append(down(x))
            # The blocks' ReLU works in place on its own convolution's output, so the skip stays as it is.
            x = block(skips[-1])
        skips.pop()  # the deepest level has no skip
        for up, block in zip(self.up, self.decoder, strict=True):
            x = block(up(x) + skips.pop())
        return self.head(x)
