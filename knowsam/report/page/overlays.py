"""A case as a picture: truth and prediction as outlines over the image."""

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape

import numpy as np

from knowsam.palette import CLASS_COLOURS

LONGEST = 480
"""Pixels of the longer side of an embedded image; outlines keep the native resolution."""

SMALL = 160
"""Up to this side an image is stored without loss: compression would show when it is enlarged."""


@dataclass(frozen=True)
class Overlay:
    """What one run makes of one case, at native resolution.

    Attributes:
        image: uint8 (H, W, 3); of a volume, one slice.
        truth, prediction: class ids (H, W).
        place: ``slice 4 of 10`` of a volume; empty otherwise.
        spacing: (y, x) of a pixel in mm; None when unknown. Only their ratio is used.
        dice: class name -> Dice of the whole case, predicted anew; None where both sides lack the class.
    """

    image: np.ndarray
    truth: np.ndarray
    prediction: np.ndarray
    place: str
    spacing: tuple[float, float] | None
    dice: Mapping[str, float | None]


def telling_slice(truth: np.ndarray, prediction: np.ndarray) -> int:
    """The slice of a volume that shows most of the truth; most of the prediction where there is no truth.

    Args:
        truth, prediction: class ids (D, H, W).
    """
    of = truth if truth.any() else prediction
    return int((of > 0).sum((1, 2)).argmax())


def to_svg(overlay: Overlay, description: str) -> str:
    """The overlay as part of a page: the image embedded, the outlines as paths of classes ``truth`` and
    ``prediction``.

    Args:
        overlay: what to draw.
        description: plain words for readers who do not see it.
    """
    height, width = overlay.truth.shape
    ratio = overlay.spacing[0] / overlay.spacing[1] if overlay.spacing else 1.0
    tall = f"{height * ratio:.6g}"
    parts = [
        f'<svg role="img" aria-label="{escape(description)}" viewBox="0 0 {width} {tall}">',
        f'<image width="{width}" height="{tall}" preserveAspectRatio="none" href="{_embedded(overlay.image)}"/>',
    ]
    several = max(int(overlay.truth.max()), int(overlay.prediction.max()), len(overlay.dice)) > 1
    for side, labels in (("truth", overlay.truth), ("prediction", overlay.prediction)):
        for class_id in range(1, int(labels.max(initial=0)) + 1):
            path = outline(labels == class_id, ratio)
            if path:
                colour = f" c{(class_id - 1) % len(CLASS_COLOURS)}" if several else ""
                # A dark line under each keeps both visible on any image.
                parts += [f'<path class="{side} under" d="{path}"/>', f'<path class="{side}{colour}" d="{path}"/>']
    return "".join([*parts, "</svg>"])


def outline(mask: np.ndarray, ratio: float = 1.0) -> str:
    """The edges of a mask as the data of an SVG path, in native pixels; empty for an empty mask.

    The line runs through the middles of the pixels' edges, which cuts 1/8 of a pixel off each corner, and goes straight
    where it is straight; nothing else is smoothed.

    Args:
        mask: bool (H, W).
        ratio: height of a pixel over its width.
    """
    from skimage.measure import approximate_polygon, find_contours

    pieces = []
    # A border of nothing closes the outlines of what touches the edge of the image.
    for line in find_contours(np.pad(mask, 1).astype(np.uint8), 0.5):
        # Pixel (0, 0) is the square from 0 to 1, its centre at 0.5; the border shifted everything by 1.
        points = approximate_polygon(line, 0.1) - 0.5
        inside = np.clip(points, 0, mask.shape) * (ratio, 1.0)
        pieces.append("M" + "L".join(f"{round(x, 1):g} {round(y, 1):g}" for y, x in inside[:-1]) + "Z")
    return "".join(pieces)


def _embedded(image: np.ndarray) -> str:
    from PIL import Image

    picture = Image.fromarray(image)
    picture.thumbnail((LONGEST, LONGEST), Image.Resampling.LANCZOS)
    data = io.BytesIO()
    if max(picture.size) <= SMALL:
        picture.save(data, "PNG", optimize=True)
        kind = "png"
    else:
        picture.save(data, "JPEG", quality=85, optimize=True)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(data.getvalue()).decode()}"
