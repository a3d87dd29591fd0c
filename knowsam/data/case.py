"""What a data set gives of one image or volume, as its file holds it."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Case:
    """One image or volume before any rule of intensity or size.

    Attributes:
        image: (C, *S) as stored; S is (H, W), or (D, H, W) of a volume in canonical orientation.
        spacing: mm along each axis of S; None when unknown.
        full_range: the values that are black and white, where the file's format says; None: it does not.
        display: float32 0..1, shaped as ``image``, where the format says otherwise than by two numbers how the image is
            to be seen (a DICOM VOI LUT); None else.
        domain: data set that it comes from, where an experiment has several.
    """

    image: np.ndarray
    spacing: tuple[float, ...] | None = None
    full_range: tuple[float, float] | None = None
    display: np.ndarray | None = None
    domain: str | None = None
