"""How an image of any size goes through a network that was trained on one: resized, in windows, or slice by slice.

Shapes *S are (H, W) or (D, H, W), the image's own size. An image is (C, *S) float32 in 0..1, or levels (uint8 of which
255 is 1.0, uint16 or int32 of which 65535 is), which take less memory and become floats piece by piece.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from knowsam.data.levels import to_unit

PredictFn = Callable[[Tensor], dict[str, Tensor]]
"""(B, C, *S) in 0..1 -> logits (B, K, *s) by output name; ``method.predict`` is one."""

Place = tuple[slice, ...]
"""Where a part lies in *S."""

LARGE = 2**24
"""Voxels from which logits are kept in the host's memory rather than in the network's device's."""
PIECE = 2**24
"""Logits that a sliding window hands out at a time, 64 MiB, as far as slices can be so thin."""


class Inferer(ABC):
    """Calls a network on one image of any size; knows nothing of modes, autocast or devices of networks."""

    @abstractmethod
    def batch(self, predict_fn: PredictFn, images: Tensor) -> dict[str, Tensor]:
        """Logits of several images of one size.

        Args:
            predict_fn: called without gradient, perhaps several times.
            images: (B, C, *S).
        Returns:
            (B, K, *S) float32 by output name.
        """

    def parts(self, predict_fn: PredictFn, image: Tensor) -> Iterator[tuple[Place, dict[str, Tensor]]]:
        """Logits of one image, part by part, so that they need never be in memory together.

        Whoever wants labels takes each part's argmax and forgets the part.

        Args:
            predict_fn: called without gradient, perhaps several times.
            image: (C, *S).
        Yields:
            Where the part lies, and its logits (K, *s) by output name. Parts cover the image and do not overlap.
        """
        logits = self.batch(predict_fn, image[None])
        yield tuple(slice(0, side) for side in image.shape[1:]), {name: x[0] for name, x in logits.items()}

    def __call__(self, predict_fn: PredictFn, image: Tensor) -> dict[str, Tensor]:
        """Logits of one image, whole.

        Args:
            predict_fn: called without gradient, perhaps several times.
            image: (C, *S).
        Returns:
            (K, *S) float32 by output name; on the CPU where they are large.
        """
        return _joined(self.parts(predict_fn, image), image.shape[1:])


class SlidingWindow(Inferer):
    """The image at its own size, in overlapping windows of the size that the network was trained on; MONAI's.

    Windows are weighted and averaged. The image goes through in slabs, one window thick across the axis that has most
    windows: MONAI stitches the windows of a slab, and slabs are joined by the same weights. So what is held at a time
    is the logits of a slab and of its overlap with the next, not of the image. An image smaller than the window is
    padded with 0 (black) on both sides, half of what is missing on each, as ``data.patches`` does in training.

    Args:
        roi_size: the window, one side an axis.
        overlap: of neighbouring windows, fraction of a side, 0 <= overlap < 1.
        mode: ``gaussian``: weights fall off from the middle of a window; ``constant``: all alike.
        batch_size: windows at a time, >= 1; changes nothing but speed and memory.
        device: where the network lives; the image's device if None. The image itself may stay in the host's memory.
    Raises:
        ValueError: a value outside what is stated.
    """

    def __init__(
        self,
        roi_size: Sequence[int],
        overlap: float = 0.5,
        mode: Literal["gaussian", "constant"] = "gaussian",
        batch_size: int = 1,
        device: torch.device | str | None = None,
    ) -> None:
        self.roi_size = tuple(roi_size)
        if len(self.roi_size) not in (2, 3) or min(self.roi_size) < 1:
            raise ValueError(f"roi_size is {self.roi_size}; allowed are 2 or 3 sides of at least 1")
        if not 0 <= overlap < 1:
            raise ValueError(f"overlap is {overlap}; allowed is 0 <= overlap < 1")
        if mode not in ("gaussian", "constant"):
            raise ValueError(f"mode is {mode!r}; allowed: 'gaussian', 'constant'")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; at least 1 is needed")
        self.overlap, self.mode, self.batch_size = overlap, mode, batch_size
        self.device = None if device is None else torch.device(device)

    def batch(self, predict_fn: PredictFn, images: Tensor) -> dict[str, Tensor]:
        """As :meth:`Inferer.batch`."""
        return _joined(self._slabs(predict_fn, images), images.shape[2:])

    def parts(self, predict_fn: PredictFn, image: Tensor) -> Iterator[tuple[Place, dict[str, Tensor]]]:
        """As :meth:`Inferer.parts`, a slab, or thinner, at a time."""
        for place, logits in self._slabs(predict_fn, image[None]):
            yield place, {name: x[0] for name, x in logits.items()}

    def _slabs(self, predict_fn: PredictFn, images: Tensor) -> Iterator[tuple[Place, dict[str, Tensor]]]:
        from monai.data.utils import compute_importance_map

        shape, roi = tuple(images.shape[2:]), self.roi_size
        if len(shape) != len(roi):
            raise ValueError(f"the window is {roi}, one side an axis, and images are {tuple(images.shape)}: (B, C, *S)")
        axis = max(range(len(shape)), key=lambda a: shape[a] / roi[a])
        firsts = self._firsts(shape[axis], roi[axis])
        thick = min(roi[axis], shape[axis])
        network = _Stacked(predict_fn)
        weights = compute_importance_map((roi[axis],), mode=self.mode)  # (thick,), float32 in the host's memory
        carried: tuple[Tensor, Tensor] | None = None  # weighted logits, and weights, of what the next slab covers, too
        for first, following in zip(firsts, [*firsts[1:], None], strict=True):
            slab = self._stitched(network, to_unit(images.narrow(2 + axis, first, thick)), axis)
            done = thick if following is None else following - first
            if len(firsts) > 1:
                along = (-1, *(1,) * (len(shape) - 1 - axis))
                total = weights.to(slab.device, copy=True)
                slab.mul_(total.view(along))
                if carried is not None:
                    covered = len(carried[1])
                    slab.narrow(2 + axis, 0, covered).add_(carried[0])
                    total[:covered] += carried[1]
                carried = slab.narrow(2 + axis, done, thick - done).clone(), total[done:]
                slab.narrow(2 + axis, 0, done).div_(total[:done].view(along))
            piece = max(1, PIECE * thick // slab.numel())
            for begin in range(0, done, piece):
                place = [slice(0, side) for side in shape]
                place[axis] = slice(first + begin, first + min(begin + piece, done))
                # A copy: whoever holds on to a view of the slab would keep all of it beside the next one.
                yield tuple(place), network.split(slab.narrow(2 + axis, begin, min(piece, done - begin)).clone())
            del slab

    def _firsts(self, side: int, length: int) -> list[int]:
        """Where windows begin along an axis, as MONAI has it."""
        from monai.data.utils import dense_patch_slices

        step = max(1, int(length * (1 - self.overlap))) if length < side else side
        return [place[0].start for place in dense_patch_slices((side,), (min(length, side),), (step,))]

    def _stitched(self, network: "_Stacked", slab: Tensor, axis: int) -> Tensor:
        """Logits (B, outputs x K, *s) of a slab of images (B, C, *s) one window thick across ``axis``."""
        from monai.data.utils import compute_importance_map
        from monai.inferers.utils import sliding_window_inference

        device, shape = self.device or slab.device, slab.shape[2:]
        within = None
        if any(side > length for side, length in zip(shape, self.roi_size, strict=True)):
            # Axis by axis, so that it does not matter which one slabs lie across; slabs are weighed as a whole.
            within = torch.ones(self.roi_size, device=device)
            for a in set(range(len(shape))) - {axis}:
                along = compute_importance_map((self.roi_size[a],), mode=self.mode, device=device)
                within *= along.view(-1, *(1,) * (len(shape) - 1 - a))
            within = within[None, None]
        stitched = sliding_window_inference(
            slab,
            self.roi_size,
            self.batch_size,
            network,
            overlap=self.overlap,
            mode="constant",  # a single window is the network's own logits, to the bit
            roi_weight_map=within,
            sw_device=device,
            device="cpu" if math.prod(shape) >= LARGE else device,
        )
        assert isinstance(stitched, Tensor), "one tensor in, one out"
        return stitched


class SliceBySlice(Inferer):
    """A volume as the batch of its slices, for networks of images; an image as itself.

    Args:
        inferer: of a slice (C, H, W).
        batch_size: slices at a time, >= 1.
    Raises:
        ValueError: batch_size below 1.
    """

    def __init__(self, inferer: Inferer, batch_size: int = 1) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; at least 1 is needed")
        self.inferer, self.batch_size = inferer, batch_size

    def batch(self, predict_fn: PredictFn, images: Tensor) -> dict[str, Tensor]:
        """As :meth:`Inferer.batch`."""
        found = [self(predict_fn, image) for image in images]
        return {name: torch.stack([logits[name] for logits in found]) for name in found[0]}

    def parts(self, predict_fn: PredictFn, image: Tensor) -> Iterator[tuple[Place, dict[str, Tensor]]]:
        """As :meth:`Inferer.parts`, ``batch_size`` slices at a time."""
        if image.ndim == 3:
            yield from self.inferer.parts(predict_fn, image)
            return
        depth, height, width = image.shape[1:]
        for first in range(0, depth, self.batch_size):
            place = slice(first, min(first + self.batch_size, depth))
            logits = self.inferer.batch(predict_fn, image[:, place].transpose(0, 1))  # (n, K, H, W)
            yield (
                (place, slice(0, height), slice(0, width)),
                {name: x.transpose(0, 1) for name, x in logits.items()},
            )


class _Stacked:
    """A network of several outputs as one of a single tensor, so that their windows are weighed and counted once.

    Args:
        predict_fn: logits (B, K, *s) by name.
    """

    def __init__(self, predict_fn: PredictFn) -> None:
        self.predict_fn = predict_fn
        self.channels: dict[str, int] = {}

    def __call__(self, windows: Tensor) -> Tensor:
        """(B, C, *S) -> float32 (B, outputs x K, *S)."""
        logits = _predict(self.predict_fn, windows)
        self.channels = {name: x.shape[1] for name, x in logits.items()}
        # bfloat16 of autocast must not be summed: 8 bits.
        return torch.cat([_interpolate(x.float(), windows.shape[2:]) for x in logits.values()], 1)

    def split(self, stacked: Tensor) -> dict[str, Tensor]:
        """(B, outputs x K, *S) -> (B, K, *S) by name."""
        return dict(zip(self.channels, stacked.split(list(self.channels.values()), dim=1), strict=True))


def _predict(predict_fn: PredictFn, images: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        return predict_fn(images)


def _joined(parts: Iterator[tuple[Place, dict[str, Tensor]]], shape: Sequence[int]) -> dict[str, Tensor]:
    """Parts with logits (..., K, *s) -> logits (..., K, *shape) by name."""
    whole: dict[str, Tensor] = {}
    for place, logits in parts:
        for name, x in logits.items():
            lead = x.shape[: -len(shape)]
            if tuple(x.shape[-len(shape) :]) == tuple(shape):
                whole[name] = x  # the only part: nothing to copy
                continue
            if name not in whole:
                device = "cpu" if math.prod(shape) >= LARGE else x.device
                whole[name] = torch.empty(*lead, *shape, dtype=x.dtype, device=device)
            whole[name][(*(slice(0, n) for n in lead), *place)] = x
    return whole


def _interpolate(logits: Tensor, shape: Sequence[int]) -> Tensor:
    """(B, K, *s) -> (B, K, *shape), linear; the same tensor if it is so large already."""
    if tuple(logits.shape[2:]) == tuple(shape):
        return logits
    return F.interpolate(logits, tuple(shape), mode="bilinear" if len(shape) == 2 else "trilinear", align_corners=False)
