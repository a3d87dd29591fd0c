"""U-Net student, for images and for volumes."""

from collections.abc import Sequence

from torch import Tensor, nn

from knowsam.models.concatenation import concatenate
from knowsam.models.dropout import Dropout
from knowsam.models.layers import layers


class ConvBlock(nn.Sequential):
    """Twice 3x3(x3) convolution, batch norm, LeakyReLU(0.01), with dropout between. (B, in, *S) -> (B, out, *S)."""

    def __init__(self, in_channels: int, out_channels: int, dropout: float = 0.0, spatial_dims: int = 2):
        layer = layers(spatial_dims)
        super().__init__(
            layer.conv(in_channels, out_channels, 3, padding=1),
            layer.batch_norm(out_channels),
            nn.LeakyReLU(inplace=True),
            Dropout(dropout),
            layer.conv(out_channels, out_channels, 3, padding=1),
            layer.batch_norm(out_channels),
            nn.LeakyReLU(inplace=True),
        )


class UNetDecoder(nn.Module):
    """The expanding half of a U-Net: features, fine to coarse -> logits (B, K, *S)."""

    def __init__(self, num_classes: int, channels: Sequence[int], spatial_dims: int = 2):
        super().__init__()
        layer = layers(spatial_dims)
        pairs = list(zip(channels[:0:-1], channels[-2::-1], strict=True))  # (256, 128), (128, 64), ...
        self.up = nn.ModuleList(layer.transposed_conv(i, o, 2, stride=2) for i, o in pairs)
        self.decoder = nn.ModuleList(ConvBlock(2 * o, o, spatial_dims=spatial_dims) for _, o in pairs)
        self.head = layer.conv(channels[0], num_classes, 3, padding=1)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Features (B, C_i, *S / 2^i), fine to coarse -> logits (B, K, *S)."""
        logits: Tensor = self.head(ascend(features, self.up, self.decoder)[-1])
        return logits


def ascend(features: Sequence[Tensor], up: nn.ModuleList, blocks: nn.ModuleList) -> list[Tensor]:
    """Decoder levels from the coarsest feature, which is the first of them, up to the level that the blocks reach.

    Args:
        features: (B, C_i, *S / 2^i), fine to coarse.
        up: transposed convolutions, coarse to fine.
        blocks: what merges the skip and the upsampled level below, coarse to fine.
    """
    levels = [features[-1]]
    for skip, rise, block in zip(features[-2::-1][: len(up)], up, blocks, strict=True):
        levels.append(block(concatenate([skip, rise(levels[-1])])))
    return levels


class UNet(nn.Module):
    """U-Net with transposed convolutions; 1.94 M parameters for K = 2 in 2-D.

    Args:
        num_classes: K, background included.
        in_channels: channels of the image.
        spatial_dims: 2 for images, 3 for volumes.
        channels: width per level, top to bottom; S must be divisible by 2^(levels - 1).
        dropout: rate per encoder level.
        deep_supervision: heads at the decoder levels between the finest and the coarsest too, see :meth:`auxiliary`.
        decoders: how many decoders the features have; all but the first are :meth:`auxiliary`.
    Raises:
        ValueError: lists of unlike length, a level without channels, or too few levels or decoders.
    Source:
        arXiv:1505.04597, in the form common in semi-supervised segmentation and used by KnowSAM (arXiv:2412.13742).
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 3,
        spatial_dims: int = 2,
        *,
        channels: tuple[int, ...] = (16, 32, 64, 128, 256),
        dropout: tuple[float, ...] = (0.05, 0.1, 0.2, 0.3, 0.5),
        deep_supervision: bool = False,
        decoders: int = 1,
    ):
        super().__init__()
        if len(channels) != len(dropout):
            raise ValueError(f"channels and dropout need one entry per level, got {len(channels)} and {len(dropout)}")
        if not channels or min(channels) < 1:
            raise ValueError(f"channels needs at least one level, each of at least 1, got {list(channels)}")
        if deep_supervision and len(channels) < 3:
            raise ValueError(f"deep_supervision needs at least 3 levels of channels, got {len(channels)}")
        if decoders < 1:
            raise ValueError(f"decoders must be at least 1, got {decoders}")
        layer = layers(spatial_dims)
        self.size_divisor = 2 ** (len(channels) - 1)
        self.encoder = nn.ModuleList(
            ConvBlock(i, o, p, spatial_dims)
            for i, o, p in zip((in_channels, *channels[:-1]), channels, dropout, strict=True)
        )
        self.pool = layer.max_pool(2)
        first = UNetDecoder(num_classes, channels, spatial_dims)
        self.up, self.decoder, self.head = first.up, first.decoder, first.head
        # Last, so that a network with them starts as the one without them does.
        middle = channels[1:-1] if deep_supervision else ()
        self.scale_heads = nn.ModuleList(layer.conv(width, num_classes, 3, padding=1) for width in middle)
        self.more_decoders = nn.ModuleList(UNetDecoder(num_classes, channels, spatial_dims) for _ in range(1, decoders))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *S) -> logits (B, K, *S)."""
        return self.decode(self.encode(x))

    def encode(self, x: Tensor) -> list[Tensor]:
        """(B, C, *S) -> features (B, C_i, *S / 2^i) of every level, fine to coarse."""
        features: list[Tensor] = []
        for level, block in enumerate(self.encoder):
            x = block(x if level == 0 else self.pool(x))
            features.append(x)
        return features

    def decode(self, features: Sequence[Tensor]) -> Tensor:
        """Features of :meth:`encode` -> logits (B, K, *S)."""
        logits: Tensor = self.head(ascend(features, self.up, self.decoder)[-1])
        return logits

    @property
    def auxiliary_outputs(self) -> tuple[str, ...]:
        """Names of what :meth:`auxiliary` gives; empty where nothing was asked for."""
        scales = (f"scale_{2**level}" for level in range(1, len(self.scale_heads) + 1))
        return (*scales, *(f"decoder_{i}" for i in range(2, len(self.more_decoders) + 2)))

    def auxiliary(self, features: Sequence[Tensor]) -> dict[str, Tensor]:
        """Features of :meth:`encode` -> logits by name.

        ``scale_2``, ``scale_4``, ... are (B, K, *S / 2), (B, K, *S / 4), ... of the decoder's coarser levels;
        ``decoder_2``, ... are (B, K, *S) of the other decoders.
        """
        levels = ascend(features, self.up[:-1], self.decoder[:-1]) if len(self.scale_heads) else []
        return self._auxiliary(features, levels[1:])

    def decode_all(self, features: Sequence[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """:meth:`decode` and :meth:`auxiliary` at once, with one pass through the first decoder."""
        levels = ascend(features, self.up, self.decoder)
        return self.head(levels[-1]), self._auxiliary(features, levels[1:-1])

    def _auxiliary(self, features: Sequence[Tensor], levels: Sequence[Tensor]) -> dict[str, Tensor]:
        """``levels`` are those of the first decoder that have heads of their own, coarse to fine."""
        made = [head(level) for head, level in zip(self.scale_heads, reversed(levels), strict=False)]
        made += [decoder(features) for decoder in self.more_decoders]
        return dict(zip(self.auxiliary_outputs, made, strict=True))
