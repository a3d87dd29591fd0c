"""Pictures to the square that a network sees, and predictions back to the picture's own size."""

from typing import Literal

import numpy as np
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from knowsam.data.labels import IGNORE_ID
from knowsam.errors import ConfigError

Mode = Literal["squash", "letterbox"]
MODES: tuple[Mode, ...] = ("squash", "letterbox")


class Fit:
    """How images come to S x S.

    ``squash`` stretches both sides to S. ``letterbox`` keeps the shape: the longer side becomes S, the rest is black
    and belongs to no class (``IGNORE_ID`` in the mask), half of it on either side.

    Args:
        size: S, pixels.
        mode: squash or letterbox.
    Raises:
        ConfigError: another mode.
    """

    def __init__(self, size: int, mode: str = "squash"):
        if mode not in MODES:
            raise ConfigError(f"data.fit is {mode!r}; allowed are {', '.join(MODES)}")
        self.size, self.mode = size, mode

    def box(self, height: int, width: int) -> tuple[int, int, int, int]:
        """(top, left, height, width) of the picture inside the square."""
        if self.mode == "squash":
            return 0, 0, self.size, self.size
        longer = max(height, width)
        h, w = (max(1, round(n * self.size / longer)) for n in (height, width))
        return (self.size - h) // 2, (self.size - w) // 2, h, w

    def image(self, levels: np.ndarray) -> np.ndarray:
        """Levels (H, W, C) -> (S, S, C), same type; bilinear, low-pass filtered where it shrinks."""
        top, left, h, w = self.box(*levels.shape[:2])
        small = resize_levels(levels, (h, w))
        if (h, w) == (self.size, self.size):
            return small
        square = np.zeros((self.size, self.size, levels.shape[2]), levels.dtype)
        square[top : top + h, left : left + w] = small
        return square

    def mask(self, mask: np.ndarray) -> np.ndarray:
        """uint8 (H, W) -> (S, S), nearest neighbour at pixel centres."""
        top, left, h, w = self.box(*mask.shape)
        small = resize_ids(mask, (h, w))
        if (h, w) == (self.size, self.size):
            return small
        square = np.full((self.size, self.size), IGNORE_ID, mask.dtype)
        square[top : top + h, left : left + w] = small
        return square

    def back(self, logits: Tensor, height: int, width: int) -> Tensor:
        """Logits (K, h, w) of the square -> (K, H, W) of the picture; bilinear, as labels enlarged have steps."""
        if self.mode == "letterbox" and height != width:
            top, left, h, w = self.box(height, width)
            scale = logits.shape[-1] / self.size
            if scale != 1:
                logits = F.interpolate(logits[None], size=(self.size, self.size), mode="bilinear", align_corners=False)[
                    0
                ]
            logits = logits[:, top : top + h, left : left + w]
        if tuple(logits.shape[-2:]) == (height, width):
            return logits
        return F.interpolate(logits[None], size=(height, width), mode="bilinear", align_corners=False)[0]


def resize_levels(levels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 or uint16 (H, W, C) -> (h, w, C), bilinear, low-pass filtered where it shrinks; itself if that size."""
    height, width = size
    if levels.shape[:2] == size:
        return levels
    if levels.dtype == np.uint8 and levels.shape[2] == 3:
        return np.asarray(Image.fromarray(levels).resize((width, height), Image.Resampling.BILINEAR))
    white = np.iinfo(levels.dtype).max
    planes = [
        np.asarray(
            Image.fromarray(np.ascontiguousarray(levels[..., c]).astype(np.float32)).resize(
                (width, height), Image.Resampling.BILINEAR
            )
        )
        for c in range(levels.shape[2])
    ]
    return np.rint(np.clip(np.stack(planes, axis=-1), 0, white)).astype(levels.dtype)


def resize_ids(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 (H, W) -> (h, w), nearest neighbour at pixel centres; itself if that size."""
    height, width = size
    if mask.shape == size:
        return mask
    return np.asarray(Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST))
