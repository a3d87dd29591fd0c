"""What every dataset looks like to the rest of the package."""

from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray


@runtime_checkable
class Source(Protocol):
    """Cases by id: images, masks, spacing. One class per file format; the built-in dataset is one too.

    A *case* is one image (H, W) or one volume (D, H, W). ``train`` cases are always 2-D (slices of volumes).
    """

    num_classes: int

    def train_ids(self) -> list[str]:
        """Every training case, sorted, labelled or not."""

    def labelled_ids(self) -> list[str]:
        """The training cases whose masks may be read, sorted."""

    def eval_ids(self, split: str) -> list[str]:
        """Cases of ``"val"`` or ``"test"``, sorted; volumes where the format has them."""

    def image(self, case_id: str) -> NDArray[np.uint8]:
        """uint8 (H, W, 3), or (D, H, W, 3) for a volume, at native resolution."""

    def mask(self, case_id: str) -> NDArray[np.uint8]:
        """uint8 class ids (H, W) or (D, H, W). Refuses unlabelled training cases: the label firewall."""

    def spacing(self, case_id: str) -> tuple[float, ...] | None:
        """mm along each axis of ``mask``, or None when unknown."""

    def fingerprint(self, case_id: str) -> str:
        """Changes when the case's *image* content changes; never reads the mask."""

    def mask_fingerprint(self, case_id: str) -> str:
        """Changes when the mask's content changes; refuses unlabelled training cases."""
