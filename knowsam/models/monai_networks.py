"""Networks of MONAI as students: DynUNet, SegResNet and Swin UNETR, with their features.

Weights that MONAI's classes of the same arguments were saved with fit by name.
"""

import importlib.util
from collections.abc import Sequence
from typing import Any, Literal

from monai.networks.nets.dynunet import DynUNet as MonaiDynUNet
from monai.networks.nets.segresnet import SegResNet as MonaiSegResNet
from monai.networks.nets.swin_unetr import SwinUNETR as MonaiSwinUNETR
from torch import Tensor, nn

from knowsam.errors import ConfigError


def dynunet(
    num_classes: int,
    in_channels: int = 3,
    spatial_dims: int = 2,
    *,
    filters: tuple[int, ...] = (16, 32, 64, 128, 256),
    norm: Literal["instance", "batch", "group"] = "instance",
    residual: bool = False,
    dropout: float = 0.0,
    deep_supervision: bool = False,
) -> "DynUNet":
    """nnU-Net's architecture; 1.94 M parameters for K = 2 in 2-D.

    Args:
        num_classes: K, background included.
        in_channels: channels of the image.
        spatial_dims: 2 for images, 3 for volumes.
        filters: width per level, top to bottom, three levels at least; S must be divisible by 2^(levels - 1).
        norm: of every convolution; ``group`` has 8 groups, so that filters must be divisible by 8.
        residual: residual blocks in the encoder.
        dropout: rate in every block.
        deep_supervision: heads at the decoder levels between the finest and the coarsest, as ``auxiliary``.
    Raises:
        ValueError: fewer than three levels, or an unknown norm.
    Source:
        arXiv:1809.10486 (nnU-Net), in MONAI's form.
    """
    if len(filters) < 3:
        raise ValueError(f"filters needs at least 3 levels, got {list(filters)}")
    levels = len(filters)
    return DynUNet(
        spatial_dims=spatial_dims,
        in_channels=in_channels,
        out_channels=num_classes,
        kernel_size=[3] * levels,
        strides=[1] + [2] * (levels - 1),
        upsample_kernel_size=[2] * (levels - 1),
        filters=list(filters),
        dropout=dropout or None,
        norm_name=_norm(norm),
        deep_supervision=deep_supervision,
        deep_supr_num=levels - 2,
        res_block=residual,
    )


def segresnet(
    num_classes: int,
    in_channels: int = 3,
    spatial_dims: int = 2,
    *,
    filters: int = 16,
    blocks_down: tuple[int, ...] = (1, 2, 2, 4),
    blocks_up: tuple[int, ...] = (1, 1, 1),
    norm: Literal["instance", "batch", "group"] = "group",
    dropout: float = 0.0,
) -> "SegResNet":
    """Residual encoder with a light decoder; 1.6 M parameters for K = 2 in 2-D.

    Args:
        num_classes: K, background included.
        in_channels: channels of the image.
        spatial_dims: 2 for images, 3 for volumes.
        filters: width at full resolution, doubled per level; divisible by 8 with group norm.
        blocks_down: residual blocks per encoder level; S must be divisible by 2^(levels - 1).
        blocks_up: residual blocks per decoder level, coarse to fine; one level fewer.
        norm: of every convolution; ``group`` has 8 groups.
        dropout: rate after the first convolution.
    Raises:
        ValueError: decoder levels that do not go with the encoder's, or an unknown norm.
    Source:
        arXiv:1810.11654, in MONAI's form, without the variational branch.
    """
    if len(blocks_up) != len(blocks_down) - 1:
        raise ValueError(
            f"blocks_up needs one level fewer than blocks_down, got {len(blocks_up)} and {len(blocks_down)}"
        )
    return SegResNet(
        spatial_dims=spatial_dims,
        init_filters=filters,
        in_channels=in_channels,
        out_channels=num_classes,
        dropout_prob=dropout or None,
        norm=_norm(norm),
        blocks_down=tuple(blocks_down),
        blocks_up=tuple(blocks_up),
    )


def swin_unetr(
    num_classes: int,
    in_channels: int = 3,
    spatial_dims: int = 2,
    *,
    feature_size: int = 24,
    depths: tuple[int, ...] = (2, 2, 2, 2),
    num_heads: tuple[int, ...] = (3, 6, 12, 24),
    window_size: int = 7,
    dropout: float = 0.0,
    checkpointing: bool = False,
) -> "SwinUNETR":
    """Swin transformer with a convolutional decoder; 6.3 M parameters for K = 2 in 2-D. Needs the package einops.

    Args:
        num_classes: K, background included.
        in_channels: channels of the image.
        spatial_dims: 2 for images, 3 for volumes; S must be divisible by 32.
        feature_size: width at the finest level, divisible by 12.
        depths: transformer blocks per level.
        num_heads: attention heads per level.
        window_size: side of the attention's windows, in tokens.
        dropout: rate in the transformer.
        checkpointing: compute activations of the transformer anew in the backward pass, for less memory.
    Raises:
        ConfigError: einops is not installed.
        ValueError: what MONAI refuses.
    Source:
        arXiv:2201.01266, in MONAI's form.
    """
    if importlib.util.find_spec("einops") is None:
        raise ConfigError(
            "student swin_unetr needs einops, which is not installed", hint="pip install 'knowsam[encoders]'"
        )
    return SwinUNETR(
        in_channels=in_channels,
        out_channels=num_classes,
        spatial_dims=spatial_dims,
        feature_size=feature_size,
        depths=tuple(depths),
        num_heads=tuple(num_heads),
        window_size=window_size,
        drop_rate=dropout,
        use_checkpoint=checkpointing,
    )


class DynUNet(MonaiDynUNet):
    """MONAI's, with ``encode``, ``decode`` and ``auxiliary``; logits of one resolution also while it trains."""

    def __init__(self, **arguments: Any):
        super().__init__(**arguments)
        # The same blocks once more, nested: as a second name of every weight they would be averaged twice by a teacher.
        del self.skip_layers
        self.size_divisor = 2 ** (len(self.strides) - 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *S) -> logits (B, K, *S)."""
        return self.decode(self.encode(x))

    def encode(self, x: Tensor) -> list[Tensor]:
        """(B, C, *S) -> features (B, C_i, *S / 2^i) of every level, fine to coarse."""
        features: list[Tensor] = []
        for block in (self.input_block, *self.downsamples, self.bottleneck):
            x = block(x)
            features.append(x)
        return features

    def decode(self, features: Sequence[Tensor]) -> Tensor:
        """Features of :meth:`encode` -> logits (B, K, *S)."""
        logits: Tensor = self.output_block(self._ascend(features, len(self.upsamples))[-1])
        return logits

    @property
    def auxiliary_outputs(self) -> tuple[str, ...]:
        """Names of what :meth:`auxiliary` gives; empty without deep supervision."""
        return tuple(f"scale_{2**level}" for level in range(1, len(self._heads()) + 1))

    def auxiliary(self, features: Sequence[Tensor]) -> dict[str, Tensor]:
        """Features of :meth:`encode` -> ``scale_2``, ``scale_4``, ...: logits (B, K, *S / 2), (B, K, *S / 4), ..."""
        return self._auxiliary(self._ascend(features, len(self._heads()))) if self.deep_supervision else {}

    def decode_all(self, features: Sequence[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """:meth:`decode` and :meth:`auxiliary` at once, with one pass through the decoder."""
        levels = self._ascend(features, len(self.upsamples))
        return self.output_block(levels[-1]), self._auxiliary(levels[:-1])

    def _ascend(self, features: Sequence[Tensor], count: int) -> list[Tensor]:
        """The first ``count`` levels of the decoder, coarse to fine."""
        levels = [features[-1]]
        for up, skip in zip(self.upsamples[:count], features[-2::-1], strict=False):
            levels.append(up(levels[-1], skip))
        return levels[1:]

    def _heads(self) -> nn.ModuleList | tuple[()]:
        return self.deep_supervision_heads if self.deep_supervision else ()

    def _auxiliary(self, levels: Sequence[Tensor]) -> dict[str, Tensor]:
        made = (head(level) for head, level in zip(self._heads(), reversed(levels), strict=False))
        return dict(zip(self.auxiliary_outputs, made, strict=True))


class SegResNet(MonaiSegResNet):
    """MONAI's, with ``encode`` and ``decode`` as students have them."""

    def __init__(self, **arguments: Any):
        super().__init__(**arguments)
        self.size_divisor = 2 ** (len(self.blocks_down) - 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *S) -> logits (B, K, *S)."""
        return self.decode(self.encode(x))

    def encode(self, x: Tensor) -> list[Tensor]:  # type: ignore[override]
        """(B, C, *S) -> features (B, filters * 2^i, *S / 2^i) of every level, fine to coarse."""
        _, features = super().encode(x)
        return features

    def decode(self, features: Sequence[Tensor]) -> Tensor:  # type: ignore[override]
        """Features of :meth:`encode` -> logits (B, K, *S)."""
        return super().decode(features[-1], list(reversed(features)))


class SwinUNETR(MonaiSwinUNETR):
    """MONAI's, with ``encode`` and ``decode``."""

    size_divisor = 32

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *S) -> logits (B, K, *S)."""
        return self.decode(self.encode(x))

    def encode(self, x: Tensor) -> list[Tensor]:
        """(B, C, *S) -> features (B, C_i, *S / 2^i) of six levels, fine to coarse: the decoder's skips and bottom."""
        hidden = self.swinViT(x, self.normalize)  # (B, C_i, *S / 2^i), i = 1..5
        return [
            self.encoder1(x),
            self.encoder2(hidden[0]),
            self.encoder3(hidden[1]),
            self.encoder4(hidden[2]),
            hidden[3],
            self.encoder10(hidden[4]),
        ]

    def decode(self, features: Sequence[Tensor]) -> Tensor:
        """Features of :meth:`encode` -> logits (B, K, *S)."""
        *skips, x = features
        blocks = (self.decoder5, self.decoder4, self.decoder3, self.decoder2, self.decoder1)
        for block, skip in zip(blocks, reversed(skips), strict=True):
            x = block(x, skip)
        logits: Tensor = self.out(x)
        return logits


def _norm(name: str) -> tuple[str, dict[str, Any]]:
    """MONAI's name and options of a norm."""
    options: dict[str, dict[str, Any]] = {"instance": {"affine": True}, "batch": {}, "group": {"num_groups": 8}}
    if name not in options:
        raise ValueError(f"norm must be one of {sorted(options)}, got {name!r}")
    return name, options[name]
