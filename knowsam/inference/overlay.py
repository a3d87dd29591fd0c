"""A prediction drawn on its image: the outline of every class, the image untouched elsewhere."""

import math

import numpy as np
from PIL import Image

from knowsam.palette import CLASS_COLOURS

_COLOURS = np.array(CLASS_COLOURS, dtype=np.uint8)

MOST_TILES = 64
"""Slices of a volume that are shown; spread over it if it has more."""

LONGEST = 256
"""Pixels of the longer side of a slice."""


def draw_outlines(image: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Outline the classes on a picture. The line lies inside the class, so that touching classes both keep theirs.

    Args:
        image: uint8 (H, W, 3).
        labels: class ids (H, W); 0 is background.
    Returns:
        uint8 (H, W, 3); the line is a 300th of the longer side wide, at least one pixel.
    """
    from scipy.ndimage import grey_dilation, grey_erosion

    # A pixel within the line's width of another class; what lies outside the picture is no class.
    reach = 2 * max(1, round(max(labels.shape) / 300)) + 1
    apart = grey_dilation(labels, reach, mode="nearest") != grey_erosion(labels, reach, mode="nearest")
    line = apart & (labels > 0)
    drawn = image.copy()
    drawn[line] = _COLOURS[(labels[line].astype(int) - 1) % len(_COLOURS)]
    return drawn


def draw_sheet(volume: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Slices of a volume side by side, from left to right and top to bottom, with their outlines.

    Args:
        volume: uint8 (D, H, W, 3).
        labels: class ids (D, H, W).
    Returns:
        uint8 (rows * h, columns * w, 3) with h, w at most ``LONGEST``.
    """
    depth, height, width = labels.shape
    shown = np.unique(np.linspace(0, depth - 1, min(depth, MOST_TILES)).round().astype(int))
    scale = min(1.0, LONGEST / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    columns = min(len(shown), math.ceil(math.sqrt(len(shown) * size[1] / size[0])))
    rows = math.ceil(len(shown) / columns)
    sheet = np.zeros((rows * size[1], columns * size[0], 3), np.uint8)
    for place, n in enumerate(shown):
        tile = Image.fromarray(volume[n]).resize(size, Image.Resampling.BILINEAR)
        small = Image.fromarray(labels[n]).resize(size, Image.Resampling.NEAREST)
        y, x = place // columns * size[1], place % columns * size[0]
        sheet[y : y + size[1], x : x + size[0]] = draw_outlines(np.asarray(tile), np.asarray(small))
    return sheet
