"""A deployed network as one file that runs without knowsam: ONNX, torch.export (pt2) or TorchScript.

The file takes float32 (B, C, H, W) in 0..1, or (B, C, D, H, W) for volumes, with any B and any D, H and W that are
multiples of 16 (or of what the network wants; or of one size, where it takes no other), and normalises inside.
It is checked against the network before anything is written.
"""

import contextlib
import copy
import importlib.util
import io
import json
import logging
import math
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from knowsam.errors import ConfigError, NumericError

FORMATS = ("onnx", "pt2", "torchscript")
GIVES = ("probabilities", "logits")
MULTIPLE = 16
"""H and W are multiples of it."""

SMALLEST, LARGEST = 32, 8192
"""H and W, pixels."""

TOLERANCE = 1e-4
"""Largest difference between the file's output and the network's that is accepted."""

TIE = 1e-4
"""Logits closer than this are a tie: which of them is larger may differ from one program to the next."""

MOST_TIES = 1e-3
"""Share of pixels that may differ because of ties."""

METADATA = "knowsam"
"""Key of the description inside the file; with ``.json`` where the format stores files."""


class Deployed(nn.Module):
    """What is exported: image (B, C, *S) in 0..1 -> probabilities or logits (B, K, *S).

    Args:
        network: image -> logits. May have ``undecided(images, margin)``, see ``check``.
        gives: ``probabilities`` or ``logits``.
        channels: C.
        spatial_dims: 2, or 3 for volumes.
    """

    def __init__(
        self,
        network: nn.Module,
        gives: Literal["probabilities", "logits"] = "probabilities",
        channels: int = 3,
        spatial_dims: int = 2,
    ) -> None:
        super().__init__()
        if gives not in GIVES:
            raise ValueError(f"gives must be one of {GIVES}, got {gives!r}")
        self.network = network
        self.gives = gives
        self.channels, self.spatial_dims = channels, spatial_dims
        self.image_size = fixed_side(network)
        self.multiple = multiple_of(network)

    def example(self) -> Tensor:
        """Two images of unequal sides, as an axis of length 1 or two alike would be taken for a fixed one."""
        side = self.image_size or 0
        least = -(-SMALLEST // self.multiple) * self.multiple
        sides = [side or times * least for times in (2, 3, 4)[: self.spatial_dims]]
        return torch.rand(2, self.channels, *sides)

    def forward(self, image: Tensor) -> Tensor:
        """(B, C, *S) -> (B, K, *S)."""
        logits = self.network(image)
        return logits.softmax(1) if self.gives == "probabilities" else logits


def fixed_side(network: nn.Module) -> int | None:
    """H and W, where the network takes images of one size only, as SAM does; None where it takes any."""
    side = getattr(network, "image_size", None)
    return side if isinstance(side, int) else None


def multiple_of(network: nn.Module) -> int:
    """What H and W must be multiples of."""
    divisor = getattr(network, "size_divisor", 1)
    return math.lcm(MULTIPLE, divisor if isinstance(divisor, int) else 1)


@dataclass(frozen=True)
class Parity:
    """How a file compares with the network it was made of.

    Attributes:
        largest_difference: of any number of the output, without those in ``ties``.
        ties: pixels that differ by more than ``TOLERANCE`` because two classes tie in a student there.
        pixels: how many were compared.
        checked: shapes (B, *S) of the images.
    """

    largest_difference: float
    ties: int
    pixels: int
    checked: tuple[tuple[int, ...], ...]


def export_network(
    network: nn.Module,
    file_format: str,
    description: Mapping[str, Any],
    *,
    gives: Literal["probabilities", "logits"] = "probabilities",
    image_size: int,
    channels: int = 3,
    spatial_dims: int = 2,
) -> tuple[bytes, Parity]:
    """Make the file and check it.

    Args:
        network: (B, C, *S) in 0..1 -> logits (B, K, *S); left as it is.
        file_format: one of ``FORMATS``.
        description: plain values that the file shall hold as JSON.
        gives: what the file's output is.
        image_size: S that the network was trained for; the file is checked on S x S and on other sizes.
        channels: C.
        spatial_dims: 2, or 3 for volumes, which the file takes patch by patch.
    Returns:
        The file's content, and how it compares with ``network``.
    Raises:
        ConfigError: packages that the format needs are absent, or it cannot express this network.
        NumericError: the file's outputs differ from the network's.
    """
    require(file_format)
    # Weights in the plain layout: the layout of the computation is the network's own business.
    module = Deployed(copy.deepcopy(network).cpu(), gives, channels, spatial_dims).eval()
    module.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # absent from torch's annotations
    text = json.dumps(description, indent=2)
    try:
        with torch.no_grad(), _quiet():
            content = {"onnx": _onnx, "pt2": _pt2, "torchscript": _torchscript}[file_format](module, text)
    except Exception as error:  # exporters raise whatever they meet
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        others = " or ".join(name for name in FORMATS if name != file_format)
        raise ConfigError(
            f"this network cannot be expressed as {file_format}: {first}", hint=f"Try --format {others}."
        ) from error
    return content, check(module, load_exported(content, file_format), image_size=image_size)


def require(file_format: str) -> None:
    """See to it that the packages are there.

    Raises:
        ConfigError: unknown format, or packages that are not installed.
    """
    if file_format not in FORMATS:
        raise ConfigError(f"no format {file_format!r}; there are {', '.join(FORMATS)}")
    missing = [name for name in needed_packages(file_format) if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"--format {file_format} needs {', '.join(missing)}, not installed", hint="pip install 'knowsam[export]'"
        )


def needed_packages(file_format: str) -> tuple[str, ...]:
    """What a format needs beside torch, the ``export`` extra."""
    return ("onnx", "onnxscript", "onnxruntime") if file_format == "onnx" else ()


def load_exported(content: bytes, file_format: str) -> Callable[[Tensor], Tensor]:
    """A file's content as a function (B, 3, H, W) -> (B, K, H, W), on the CPU.

    Args:
        content: the file's bytes.
        file_format: one of ``FORMATS``.
    """
    if file_format == "onnx":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        return lambda images: torch.from_numpy(session.run(None, {"image": images.numpy()})[0])
    with _quiet():
        stream = io.BytesIO(content)
        return torch.export.load(stream).module() if file_format == "pt2" else torch.jit.load(stream)


def check(module: Deployed, exported: Callable[[Tensor], Tensor], *, image_size: int) -> Parity:
    """Compare on images of several sizes and batch sizes.

    A fusion head asks whether its students agree, which is a step: where a student's two best classes tie, rounding
    decides, and no two programs round alike. Such pixels are counted instead, if the network can name them: by
    ``undecided(images, margin)`` -> bool (B, H, W).

    Args:
        module: the network as it was, in eval mode on the CPU.
        exported: the file as a function, (B, 3, H, W) -> (B, K, H, W).
        image_size: S that the network was trained for.
    Raises:
        NumericError: outputs differ by more than ``TOLERANCE``, or more than ``MOST_TIES`` of the pixels by ties.
    """
    undecided = getattr(module.network, "undecided", None)
    shapes = _shapes(module, image_size)
    largest, ties, pixels = 0.0, 0, 0
    for number, shape in enumerate(shapes):
        images = _images(shape, module.channels, seed=number)
        with torch.no_grad():
            difference = (exported(images) - module(images)).abs().amax(1)  # (B, H, W)
            jumped = (difference > TOLERANCE) & torch.isfinite(difference)
            jumped &= undecided(images, TIE) if undecided is not None and bool(jumped.any()) else False
        worst = float(difference.masked_fill(jumped, 0).max())
        largest = max(largest, worst)
        ties += int(jumped.sum())
        pixels += jumped.numel()
        if not worst <= TOLERANCE:  # nor is NaN
            raise NumericError(
                f"the exported network gives another output than the original: difference {worst:.3g} on images "
                f"{tuple(images.shape)}, allowed is {TOLERANCE:g}; nothing was written",
                hint="Try another --format, and please report it.",
            )
    if ties > MOST_TIES * pixels:
        raise NumericError(
            f"{ties} of {pixels} pixels are ties between classes and come out otherwise; nothing was written",
            hint="The network is hardly trained, or --output of a single student is the better choice.",
        )
    return Parity(largest, ties, pixels, shapes)


def _shapes(module: Deployed, image_size: int) -> tuple[tuple[int, ...], ...]:
    """(B, *S) of the images that a file is checked on."""
    axes = module.spatial_dims
    if module.image_size is not None:
        return tuple((count, *[module.image_size] * axes) for count in (1, 3))
    step = module.multiple
    least = -(-SMALLEST // step) * step
    half = max(least, image_size // 2 // step * step)
    less = max(least, image_size - step)
    if axes == 3:
        return (1, *[image_size] * 3), (2, half, image_size, less)
    return (1, image_size, image_size), (3, half, image_size), (2, image_size + step, less)


def _images(shape: tuple[int, ...], channels: int, seed: int) -> Tensor:
    """Smooth patches with noise, (B, C, *S) in 0..1."""
    count, *sides = shape
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, channels, *[8] * len(sides), generator=generator)
    mode = "bicubic" if len(sides) == 2 else "trilinear"
    smooth = F.interpolate(coarse, size=tuple(sides), mode=mode, align_corners=False)
    return (smooth + 0.05 * torch.randn(count, channels, *sides, generator=generator)).clamp(0, 1)


def _program(module: Deployed) -> torch.export.ExportedProgram:
    axes: dict[int, Any] = {0: torch.export.Dim("batch", min=1)}
    if module.image_size is None:
        step = module.multiple
        names = ("rows", "columns") if module.spatial_dims == 2 else ("slices", "rows", "columns")
        for axis, name in enumerate(names, start=2):
            axes[axis] = step * torch.export.Dim(name, min=-(-SMALLEST // step), max=LARGEST // step)
    example, shapes = module.example(), {"image": axes}
    program = torch.export.export(module, (example,), dynamic_shapes=shapes)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine, of no use elsewhere
    return program


def _onnx(module: Deployed, text: str) -> bytes:
    program = torch.onnx.export(
        _program(module), dynamo=True, verbose=False, input_names=["image"], output_names=[module.gives]
    )
    assert program is not None, "dynamo gives a program"
    program.model.metadata_props[METADATA] = text
    for node in program.model.graph:
        node.metadata_props.clear()  # how each node came about: a tenth of a small file
    return program.model_proto.SerializeToString()


def _pt2(module: Deployed, text: str) -> bytes:
    file = io.BytesIO()
    torch.export.save(_program(module), file, extra_files={f"{METADATA}.json": text})
    return file.getvalue()


def _torchscript(module: Deployed, text: str) -> bytes:
    traced = torch.jit.trace(module, module.example(), check_trace=False)
    file, kept = io.BytesIO(), io.BytesIO()
    torch.jit.save(traced, file, _extra_files={f"{METADATA}.json": text})
    with zipfile.ZipFile(file) as source, zipfile.ZipFile(kept, "w", zipfile.ZIP_STORED) as target:
        for name in source.namelist():
            if not name.endswith(".debug_pkl"):  # paths of this machine, of no use elsewhere
                target.writestr(zipfile.ZipInfo(name), source.read(name))
    return kept.getvalue()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what exporters say about themselves: deprecations, absent packages that nobody needs here."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
