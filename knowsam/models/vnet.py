"""V-Net student, for images and for volumes."""

import itertools
from collections.abc import Callable, Sequence
from typing import Literal

from torch import Tensor, nn

from knowsam.models.layers import Layers, layers

NORMS: dict[str, Callable[[Layers, int], nn.Module]] = {
    "none": lambda layer, channels: nn.Identity(),
    "batch": lambda layer, channels: layer.batch_norm(channels),
    "instance": lambda layer, channels: layer.instance_norm(channels, affine=True),
}


class VNet(nn.Module):
    """V-Net; 3.27 M parameters for K = 2 and no norm in 2-D.

    The skip added at a level is the output of that level's *down* convolution (at full resolution, of the first
    block), as in the published code of KnowSAM.

    Args:
        num_classes: K, background included.
        in_channels: channels of the image.
        spatial_dims: 2 for images, 3 for volumes.
        filters: width at full resolution, doubled at each of four levels; S must be divisible by 16.
        norm: ``none`` (published; needs thousands of steps), ``batch`` or ``instance``.
    Raises:
        ValueError: an unknown norm, or no filters.
    Source:
        arXiv:1606.04797, arXiv:2412.13742.
    """

    depths = (1, 2, 3, 3, 3)
    size_divisor = 16

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 3,
        spatial_dims: int = 2,
        *,
        filters: int = 16,
        norm: Literal["none", "batch", "instance"] = "none",
    ):
        super().__init__()
        if norm not in NORMS:
            raise ValueError(f"norm must be one of {sorted(NORMS)}, got {norm!r}")
        if filters < 1:
            raise ValueError(f"filters must be at least 1, got {filters}")
        layer = layers(spatial_dims)

        def unit(conv: nn.Module, channels: int) -> list[nn.Module]:
            return [conv, NORMS[norm](layer, channels), nn.ReLU(inplace=True)]

        def block(channels: int, depth: int, first: int | None = None) -> nn.Sequential:
            """``depth`` times 3x3(x3) convolution, norm, ReLU, on ``first`` channels if not on ``channels``."""
            wide = [first or channels, *[channels] * (depth - 1)]
            convs = (layer.conv(width, channels, 3, padding=1) for width in wide)
            return nn.Sequential(*itertools.chain.from_iterable(unit(conv, channels) for conv in convs))

        widths = [filters * 2**level for level in range(5)]
        self.stem = block(widths[0], self.depths[0], in_channels)
        self.down = nn.ModuleList(
            nn.Sequential(*unit(layer.conv(i, o, 2, stride=2), o)) for i, o in itertools.pairwise(widths)
        )
        self.encoder = nn.ModuleList(block(w, depth) for w, depth in zip(widths[1:], self.depths[1:], strict=True))
        self.up = nn.ModuleList(
            nn.Sequential(*unit(layer.transposed_conv(i, o, 2, stride=2), o))
            for i, o in itertools.pairwise(reversed(widths))
        )
        self.decoder = nn.ModuleList(
            block(w, depth) for w, depth in zip(widths[-2::-1], self.depths[-2::-1], strict=True)
        )
        self.head = layer.conv(filters, num_classes, 1)
        for module in self.modules():
            if isinstance(module, (layer.conv, layer.transposed_conv)):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *S) -> logits (B, K, *S)."""
        return self.decode(self.encode(x))

    def encode(self, x: Tensor) -> list[Tensor]:
        """(B, C, *S) -> features (B, filters * 2^i, *S / 2^i), fine to coarse: the skips, and the deepest block's."""
        x = self.stem(x)
        features = [x]
        for down, block in zip(self.down, self.encoder, strict=True):
            features.append(down(x))
            # The blocks' ReLU works in place on its own convolution's output, so the skip stays as it is.
            x = block(features[-1])
        return [*features[:-1], x]  # the deepest level has no skip

    def decode(self, features: Sequence[Tensor]) -> Tensor:
        """Features of :meth:`encode` -> logits (B, K, *S)."""
        *skips, x = features
        for up, block, skip in zip(self.up, self.decoder, reversed(skips), strict=True):
            x = block(up(x) + skip)
        logits: Tensor = self.head(x)
        return logits
