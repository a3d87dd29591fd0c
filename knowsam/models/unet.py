"""2-D U-Net student."""

from torch import Tensor, nn

from knowsam.models.concatenation import concatenate
from knowsam.models.dropout import Dropout


class ConvBlock(nn.Sequential):
    """Twice 3x3 convolution, batch norm, LeakyReLU(0.01), with dropout between. (B, in, H, W) -> (B, out, H, W)."""

    def __init__(self, in_channels: int, out_channels: int, dropout: float = 0.0):
        super().__init__(
            nn.Conv2d(in_channels, out_channels, 3, padding=1),
            nn.BatchNorm2d(out_channels),
            nn.LeakyReLU(inplace=True),
            Dropout(dropout),
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
            nn.BatchNorm2d(out_channels),
            nn.LeakyReLU(inplace=True),
        )


class UNet(nn.Module):
    """U-Net with transposed convolutions; 1.94 M parameters for K = 2.

    Args:
        num_classes: K, background included.
        in_channels: channels of the image.
        channels: width per level, top to bottom; S must be divisible by 2^(levels - 1).
        dropout: rate per encoder level.
    Source:
        arXiv:1505.04597, in the form common in semi-supervised segmentation and used by KnowSAM (arXiv:2412.13742).
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 3,
        channels: tuple[int, ...] = (16, 32, 64, 128, 256),
        dropout: tuple[float, ...] = (0.05, 0.1, 0.2, 0.3, 0.5),
    ):
        super().__init__()
        if len(channels) != len(dropout):
            raise ValueError(f"channels and dropout need one entry per level, got {len(channels)} and {len(dropout)}")
        if not channels or min(channels) < 1:
            raise ValueError(f"channels needs at least one level, each of at least 1, got {list(channels)}")
        self.size_divisor = 2 ** (len(channels) - 1)
        self.encoder = nn.ModuleList(
            ConvBlock(i, o, p) for i, o, p in zip((in_channels, *channels[:-1]), channels, dropout, strict=True)
        )
        self.pool = nn.MaxPool2d(2)
        up = list(zip(channels[:0:-1], channels[-2::-1], strict=True))  # (256, 128), (128, 64), ...
        self.up = nn.ModuleList(nn.ConvTranspose2d(i, o, 2, stride=2) for i, o in up)
        self.decoder = nn.ModuleList(ConvBlock(2 * o, o) for _, o in up)
        self.head = nn.Conv2d(channels[0], num_classes, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, S, S) -> logits (B, K, S, S)."""
        skips = []
        for level, block in enumerate(self.encoder):
            x = block(x if level == 0 else self.pool(x))
            skips.append(x)
        skips.pop()  # the bottom is x itself
        for up, block in zip(self.up, self.decoder, strict=True):
            x = block(concatenate([skips.pop(), up(x)]))
        return self.head(x)
