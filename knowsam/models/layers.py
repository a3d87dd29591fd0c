"""Torch's layers by the number of spatial dimensions."""

from typing import NamedTuple

from torch import nn


class Layers(NamedTuple):
    """Layer classes of images or of volumes; *S is (H, W) or (D, H, W)."""

    conv: type[nn.Conv2d | nn.Conv3d]
    transposed_conv: type[nn.ConvTranspose2d | nn.ConvTranspose3d]
    batch_norm: type[nn.BatchNorm2d | nn.BatchNorm3d]
    instance_norm: type[nn.InstanceNorm2d | nn.InstanceNorm3d]
    max_pool: type[nn.MaxPool2d | nn.MaxPool3d]


LAYERS = {
    2: Layers(nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d, nn.InstanceNorm2d, nn.MaxPool2d),
    3: Layers(nn.Conv3d, nn.ConvTranspose3d, nn.BatchNorm3d, nn.InstanceNorm3d, nn.MaxPool3d),
}


def layers(spatial_dims: int) -> Layers:
    """The layers of ``spatial_dims`` dimensions.

    Raises:
        ValueError: neither 2 nor 3.
    """
    if spatial_dims not in LAYERS:
        raise ValueError(f"spatial_dims must be 2 (images) or 3 (volumes), got {spatial_dims!r}")
    return LAYERS[spatial_dims]
