"""What every dataset looks like to the rest of the package."""

from abc import ABC, abstractmethod
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from knowsam.data.case import Case
from knowsam.data.intensity import Preparation


@runtime_checkable
class Source(Protocol):
    """Cases by id: images, masks, spacing. One class per file format; the built-in dataset is one too.

    A *case* is one image (H, W) or one volume (D, H, W). Where networks are 2-D, ``train`` cases are, too: pictures, or
    slices of volumes. A source from outside best derives from ``CaseSource``, which makes ``image`` of ``case``.
    """

    num_classes: int

    def train_ids(self) -> list[str]:
        """Every training case, sorted, labelled or not."""

    def labelled_ids(self) -> list[str]:
        """The training cases whose masks may be read, sorted."""

    def eval_ids(self, split: str) -> list[str]:
        """Cases of ``"val"`` or ``"test"``, sorted; volumes where the format has them."""

    def image(self, case_id: str) -> NDArray[np.uint8]:
        """Levels, uint8 (255 is 1.0) or uint16 (65535 is 1.0): (H, W, C), or (D, H, W, C) of a volume; native size."""

    def mask(self, case_id: str) -> NDArray[np.uint8]:
        """uint8 class ids (H, W) or (D, H, W), 255 where nothing is known. Refuses unlabelled training cases: the label
        firewall.
        """

    def spacing(self, case_id: str) -> tuple[float, ...] | None:
        """mm along each axis of ``mask``, or None when unknown."""

    def fingerprint(self, case_id: str) -> str:
        """Changes when the case's *image* content changes; never reads the mask."""

    def mask_fingerprint(self, case_id: str) -> str:
        """Changes when the mask's content changes; refuses unlabelled training cases."""


class CaseSource(ABC):
    """A source that gives cases as their files hold them; the experiment's preparation makes levels of them.

    Attributes:
        preparation: intensity rule and number of channels; 8-bit RGB until the experiment's is set.
    """

    preparation = Preparation()

    num_classes: int

    @abstractmethod
    def train_ids(self) -> list[str]:
        """As ``Source``; so are the other methods without more text."""

    @abstractmethod
    def labelled_ids(self) -> list[str]:
        """As ``Source``."""

    @abstractmethod
    def eval_ids(self, split: str) -> list[str]:
        """As ``Source``."""

    @abstractmethod
    def case(self, case_id: str) -> Case:
        """The case as stored."""

    @abstractmethod
    def mask(self, case_id: str) -> NDArray[np.uint8]:
        """As ``Source``."""

    @abstractmethod
    def spacing(self, case_id: str) -> tuple[float, ...] | None:
        """As ``Source``."""

    @abstractmethod
    def fingerprint(self, case_id: str) -> str:
        """As ``Source``."""

    @abstractmethod
    def mask_fingerprint(self, case_id: str) -> str:
        """As ``Source``."""

    def image(self, case_id: str) -> np.ndarray:
        """Levels (H, W, C), or (D, H, W, C) for a volume.

        Raises:
            NotFoundError, DataError: a file that cannot be read, or values that the preparation does not fit.
        """
        return self.preparation(self.case(case_id), self.where(case_id))

    def where(self, case_id: str) -> str:
        """The case in messages."""
        return case_id

    @property
    def cache_settings(self) -> tuple[object, ...]:
        """What decides about decoded images and masks beside the files."""
        return (self.preparation.key(),)
