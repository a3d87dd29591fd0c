"""What is measured: an experiment as plain values, and what makes its parts."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from knowsam.data.augment import Augmenter
    from knowsam.data.streams import TwoStreams
    from knowsam.engine.optim import ScheduledOptimizer
    from knowsam.engine.options import TrainOptions
    from knowsam.methods.base import SSLMethod


class MakeMethod(Protocol):
    """Makes the method of an experiment, on the CPU, each time the same."""

    def __call__(self, *, sam: bool = True) -> "SSLMethod":
        """``sam=False`` leaves SAM out of what is only deployed."""


@dataclass(frozen=True)
class Workload:
    """An experiment, as whoever reads configurations makes it; below, nobody does.

    Attributes:
        make_method: its method.
        make_optimizers: those of that method, one a parameter group.
        make_augmenter: what makes views of its batches.
        make_streams: its labelled and unlabelled stream; its data must be there.
        options: what the loop is to do: steps, precision, seed, ...
        num_classes: K, background included.
        image_size: S, pixels.
        labelled_batch, unlabelled_batch: L and U of one process.
        sam: SAM's blocks, as ``models.sam.build_sam_guide`` takes them; None where the method has no SAM.
        device: ``auto``, ``cpu`` or ``cuda``.
        compile: backend of torch.compile; empty for none.
        threads: of torch; 0 where the experiment leaves them open.
    """

    make_method: MakeMethod
    make_optimizers: "Callable[[SSLMethod], dict[str, ScheduledOptimizer]]"
    make_augmenter: "Callable[[], Augmenter]"
    make_streams: "Callable[[], TwoStreams]"
    options: "TrainOptions"
    num_classes: int
    image_size: int
    labelled_batch: int
    unlabelled_batch: int
    sam: Mapping[str, Any] | None = None
    device: str = "auto"
    compile: str = ""
    threads: int = 0
