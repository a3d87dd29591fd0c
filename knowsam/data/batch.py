"""What one training step sees."""

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Ids(NamedTuple):
    """Case ids of a batch, in the order of its rows: for caches of a teacher, memory banks and messages.

    Attributes:
        labelled: L ids.
        unlabelled: U ids.
        second: of the second labelled batch; empty if there is none.
    """

    labelled: tuple[str, ...] = ()
    unlabelled: tuple[str, ...] = ()
    second: tuple[str, ...] = ()


class Labelled(NamedTuple):
    """Images with their masks.

    Attributes:
        images: (L, C, *S) float32 in 0..1.
        mask: (L, *S) int64 class ids.
    """

    images: Tensor
    mask: Tensor


@dataclass
class Joined:
    """Labelled and unlabelled images as one batch, labelled ones first, so that nobody slices by hand.

    Attributes:
        images: (L + U, C, *S).
        count: L.
        mask: (L, *S) class ids of the labelled ones.
        valid_classes: as in :class:`Batch`.
    """

    images: Tensor
    count: int
    mask: Tensor
    valid_classes: Tensor | None = None

    def labelled(self, x: Tensor) -> Tensor:
        """The rows (L, ...) of the labelled images in anything with one row an image."""
        return x[: self.count]

    def unlabelled(self, x: Tensor) -> Tensor:
        """The rows (U, ...) of the unlabelled images in anything with one row an image."""
        return x[self.count :]


@dataclass
class Batch:
    """One step's images, already augmented and on the device. *S is (H, W), or (D, H, W) for volumes.

    What a method does not ask for in its ``needs`` is not there.

    Attributes:
        labelled: (L, C, *S) float32 in 0..1, weakly augmented.
        mask: (L, *S) int64 class ids, moved with ``labelled``; ``losses.IGNORE`` where nothing is known.
        weak: (U, C, *S) unlabelled images, weak view; U may be 0.
        strong: as many strong views as the method needs, each (U, C, *S), with the geometry of ``weak``.
        ids: of the rows.
        plain: (L, C, *S), ``labelled`` without holes and without a change of light; None if not asked for.
        second: another batch of L labelled images, drawn apart; None if not asked for.
        valid_classes: bool (L, K), which classes each image's source labels: background in ``mask`` is background or
            one of the others. None where every source labels all.
        round: which update from this batch this is, from 0; above 0 only where a method makes several.
        carried: what the update before handed on (``StepOutput.carry``); None in the first.
    """

    labelled: Tensor
    mask: Tensor
    weak: Tensor
    strong: tuple[Tensor, ...]
    ids: Ids = field(default_factory=Ids)
    plain: Tensor | None = None
    second: Labelled | None = None
    valid_classes: Tensor | None = None
    round: int = 0
    carried: Any = None

    def join(self, unlabelled: Tensor, labelled: Tensor | None = None) -> Joined:
        """Labelled images, then ``unlabelled``, as one batch for one forward pass.

        Args:
            unlabelled: (U, C, *S), for example ``batch.weak`` or ``batch.strong[0]``.
            labelled: (L, C, *S) in the place of ``batch.labelled``, such as ``batch.plain``.
        """
        first = self.labelled if labelled is None else labelled
        return Joined(torch.cat([first, unlabelled]), len(first), self.mask, self.valid_classes)

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device."""
        return replace(
            self,
            labelled=self.labelled.to(device, non_blocking=True),
            mask=self.mask.to(device, non_blocking=True),
            weak=self.weak.to(device, non_blocking=True),
            strong=tuple(view.to(device, non_blocking=True) for view in self.strong),
            plain=None if self.plain is None else self.plain.to(device, non_blocking=True),
            valid_classes=None if self.valid_classes is None else self.valid_classes.to(device, non_blocking=True),
            second=None if self.second is None else Labelled(*(x.to(device, non_blocking=True) for x in self.second)),
        )
