"""Any encoder of timm under a U-Net decoder, for images. Needs the extra ``encoders``."""

import importlib
import inspect
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from knowsam.errors import CheckpointError, ConfigError, NotFoundError
from knowsam.models.concatenation import concatenate
from knowsam.models.unet import ConvBlock

INSTALL = "pip install 'knowsam[encoders]'"


class TimmUNet(nn.Module):
    """An encoder of timm (``features_only``) under a U-Net decoder; 14.2 M parameters with ResNet-18 and K = 2.

    Encoders whose features all have one stride, such as the ViTs of DINOv2 and DINOv3, get a small feature pyramid over
    four of their blocks. Where a patch is no power of two (14 pixels), images are resized so that the tokens' grid is
    that of the next one (16).

    Args:
        num_classes: K, background included.
        in_channels: channels of the image; weights of the first convolution are summed or repeated to fit.
        spatial_dims: 2, as timm's encoders are.
        image_size: S, or (H, W); needed by encoders of a fixed size, such as ViTs and Swin transformers.
        encoder: timm's name of it, such as ``resnet34``, ``convnext_tiny`` or ``vit_small_patch14_dinov2``.
        weights: file of its weights, in timm's form or one that timm converts; random if None. Nothing is downloaded.
        channels: width of the decoder at strides 1, 2, 4, ..., the last one for all coarser.
        pyramid_channels: width of the pyramid's features.
        mean, std: what images (0..1) are normalised with; what the encoder's published weights want (mostly ImageNet's)
            if None, averaged over the channels for other than three of them.
    Raises:
        ConfigError: timm is not installed, or cannot be imported.
        NotFoundError: no such file of weights.
        CheckpointError: a file that does not hold this encoder's weights.
        ValueError: no such encoder, or one that cannot be used like this.
    Source:
        arXiv:1505.04597 (U-Net), arXiv:2203.16527 (a pyramid on a plain ViT).
    """

    mean: float | tuple[float, ...]
    std: float | tuple[float, ...]

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 3,
        spatial_dims: int = 2,
        image_size: int | tuple[int, ...] | None = None,
        *,
        encoder: str = "resnet18",
        weights: str | None = None,
        channels: tuple[int, ...] = (16, 32, 64, 128, 256),
        pyramid_channels: int = 128,
        mean: float | tuple[float, ...] | None = None,
        std: float | tuple[float, ...] | None = None,
    ):
        super().__init__()
        if spatial_dims != 2:
            raise ValueError(f"encoders of timm are 2-D, got spatial_dims = {spatial_dims}")
        if not channels:
            raise ValueError("channels needs at least one width, got none")
        timm = _timm()
        published = timm.models.get_pretrained_cfg(encoder)
        if published is None:
            near = ", ".join(timm.list_models(f"*{encoder.partition('.')[0]}*")[:5])
            raise ValueError(f"timm has no encoder {encoder!r}; " + (f"there are {near}" if near else "see its list"))
        self.mean, self.std = (
            _statistic(getattr(published, name), in_channels) if given is None else given
            for name, given in (("mean", mean), ("std", std))
        )
        arguments: dict[str, Any] = {"pretrained": False, "in_chans": in_channels}
        with torch.device("meta"):  # its shape alone
            outline = timm.create_model(encoder, num_classes=0, **arguments)
        strides = [info["reduction"] for info in outline.feature_info]
        flat = len(set(strides)) == 1
        # A patch of 14 pixels stands for one of 16.
        self.patch = strides[0] if flat else 1
        self.cell = 2 ** (self.patch - 1).bit_length() if flat else 1
        if flat and (len(strides) < 4 or self.cell < 4):
            raise ValueError(
                f"encoder {encoder!r} has {len(strides)} features of stride {strides[0]}; "
                "a pyramid needs 4 of stride 4 at least"
            )
        if published.fixed_input_size:
            if image_size is None:
                raise ValueError(f"encoder {encoder!r} is of a fixed size: image_size must be given")
            sides = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
            arguments["img_size"] = self._resized(sides)
        picked = [(i + 1) * len(strides) // 4 - 1 for i in range(4)]  # blocks 3, 6, 9 and 12 of 12
        chosen = {"out_indices": picked} if flat else {}
        self.features = timm.create_model(encoder, features_only=True, **arguments, **chosen)
        if weights is not None:
            with torch.device("meta"):
                outline = timm.create_model(encoder, num_classes=0, **arguments)
            load_encoder(self.features, outline, weights, timm)
        widths = list(self.features.feature_info.channels())
        strides = list(self.features.feature_info.reduction())
        self.pyramid = Pyramid(widths, pyramid_channels) if flat else None
        if flat:
            widths, strides = [pyramid_channels] * 4, [self.cell // 4, self.cell // 2, self.cell, 2 * self.cell]
        if any(stride & (stride - 1) for stride in strides):
            raise ValueError(f"encoder {encoder!r} has features of strides {strides}; they must be powers of two")
        self.levels = {stride: i for i, stride in enumerate(strides)}  # of several of one stride, the deepest
        self.size_divisor = max(strides)
        self.decoder = Decoder({stride: widths[i] for stride, i in self.levels.items()}, channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> logits (B, K, H, W)."""
        return self.decode(self.encode(x))

    def encode(self, x: Tensor) -> list[Tensor]:
        """(B, C, H, W) -> features (B, C_i, H / stride_i, W / stride_i), fine to coarse."""
        if self.patch != self.cell:
            x = F.interpolate(x, size=self._resized(x.shape[2:]), mode="bilinear", align_corners=False)
        features = self.features(x)
        if getattr(self.features, "output_fmt", None) == "NHWC":
            features = [feature.permute(0, 3, 1, 2) for feature in features]
        if self.pyramid is not None:
            features = self.pyramid(features)
        return [features[self.levels[stride]] for stride in sorted(self.levels)]

    def decode(self, features: Sequence[Tensor]) -> Tensor:
        """Features of :meth:`encode` -> logits (B, K, H, W)."""
        logits: Tensor = self.decoder(features)
        return logits

    def _resized(self, sides: Sequence[int]) -> tuple[int, ...]:
        """Sides of an image at which its tokens' grid is that of a patch of ``cell`` pixels."""
        return tuple(side // self.cell * self.patch for side in sides)


class Pyramid(nn.Module):
    """Four features of one stride t -> features of strides t / 4, t / 2, t and 2 t.

    Args:
        in_channels: width of each, in the order of the encoder's blocks.
        width: of what is made of them.
    """

    def __init__(self, in_channels: Sequence[int], width: int):
        super().__init__()
        first, second, third, fourth = in_channels
        self.levels = nn.ModuleList(
            [
                nn.Sequential(
                    nn.ConvTranspose2d(first, width, 2, stride=2),
                    nn.BatchNorm2d(width),
                    nn.GELU(),
                    nn.ConvTranspose2d(width, width, 2, stride=2),
                ),
                nn.ConvTranspose2d(second, width, 2, stride=2),
                nn.Conv2d(third, width, 1),
                nn.Conv2d(fourth, width, 2, stride=2),
            ]
        )

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Four features (B, C_i, E, E) -> (B, width, ...), fine to coarse."""
        return [level(feature) for level, feature in zip(self.levels, features, strict=True)]


class Decoder(nn.Module):
    """Features of any of the strides 1, 2, 4, ..., fine to coarse -> logits (B, K, H, W).

    Args:
        widths: channels of the features by their stride.
        channels: of the decoder at strides 1, 2, 4, ..., the last one for all coarser.
        num_classes: K.
    """

    def __init__(self, widths: Mapping[int, int], channels: Sequence[int], num_classes: int):
        super().__init__()
        depth = max(widths).bit_length() - 1
        own = [channels[min(level, len(channels) - 1)] for level in range(depth)]
        below = [*own[1:], widths[max(widths)]] if own else []
        self.skips = [2**level in widths for level in reversed(range(depth))]  # coarse to fine, as what follows
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(i, o, 2, stride=2) for i, o in zip(below[::-1], own[::-1], strict=True)
        )
        self.blocks = nn.ModuleList(ConvBlock(own[i] + widths.get(2**i, 0), own[i]) for i in reversed(range(depth)))
        self.head = nn.Conv2d(own[0] if own else widths[1], num_classes, 3, padding=1)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Features, fine to coarse -> logits (B, K, H, W)."""
        *skips, x = features
        for up, block, has_skip in zip(self.up, self.blocks, self.skips, strict=True):
            x = up(x)
            x = block(concatenate([skips.pop(), x]) if has_skip else x)
        logits: Tensor = self.head(x)
        return logits


def load_encoder(features: nn.Module, outline: nn.Module, path: str | Path, timm: Any) -> None:
    """Load an encoder's weights from a file, in place.

    Args:
        features: the encoder as ``features_only`` makes it, whose names differ from the file's in their dots.
        outline: the encoder as it is, by whose shapes timm converts the file.
        path: a file of ``torch.save`` or safetensors.
        timm: the module.
    Raises:
        NotFoundError: no such file.
        CheckpointError: it cannot be read, or lacks some of the encoder's tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise NotFoundError(f"the encoder's weights {str(path)!r} are not there")
    try:
        state = timm.models.load_state_dict(str(path))
        module = sys.modules[type(outline).__module__]
        convert = getattr(module, "checkpoint_filter_fn", None) or getattr(module, "_filter_fn", None)
        if convert is not None:  # some take the state alone
            state = convert(*(state, outline)[: len(inspect.signature(convert).parameters)])
    except Exception as error:  # whatever a file that is none of weights makes of torch's and timm's readers
        raise CheckpointError(f"{path} cannot be read as weights of timm: {error}") from error
    by_name = {_flat(name): tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}
    own = features.state_dict()
    found, missing = {}, []
    for name, tensor in own.items():
        given = by_name.get(_flat(name))
        if given is not None and given.ndim == 4 and given.shape[1] != tensor.shape[1]:
            given = _first_convolution(given, tensor, timm)
        if given is not None and given.shape == tensor.shape:
            found[name] = given
        elif not name.endswith("num_batches_tracked"):
            shape = "" if given is None else f" (is {tuple(given.shape)}, should be {tuple(tensor.shape)})"
            missing.append(name + shape)
    if missing:
        more = f", ... ({len(missing) - 3} more)" if len(missing) > 3 else ""
        raise CheckpointError(
            f"{path} does not hold the weights of {type(outline).__name__}: {len(missing)} of {len(own)} tensors are "
            f"missing or of another shape: {', '.join(missing[:3])}{more}",
            hint="Give the file of this very encoder, as timm or its authors publish it.",
        )
    features.load_state_dict(found, strict=False)  # every name is accounted for above


def _first_convolution(given: Tensor, own: Tensor, timm: Any) -> Tensor:
    """A first convolution's weights for other channels of the image than three."""
    if given.shape[1] != 3 or given.shape[2:] != own.shape[2:]:
        return given
    adapted: Tensor = timm.models.adapt_input_conv(own.shape[1], given)
    return adapted


def _flat(name: str) -> str:
    """A tensor's name without what ``features_only`` changes in it."""
    return re.sub(r"^(model|body)\.", "", name).replace(".", "_")


def _statistic(values: Sequence[float], in_channels: int) -> float | tuple[float, ...]:
    return tuple(values) if len(values) == in_channels else sum(values) / len(values)


def _timm() -> Any:
    try:
        return importlib.import_module("timm")
    except ImportError as error:
        raise ConfigError(f"student timm_unet needs timm: {error}", hint=INSTALL) from error
    except RuntimeError as error:  # what torchvision raises beside a torch that it was not built for
        raise ConfigError(
            f"student timm_unet needs timm, which cannot be imported: {error}",
            hint="It imports torchvision; install the build of torchvision that belongs to your torch.",
        ) from error
