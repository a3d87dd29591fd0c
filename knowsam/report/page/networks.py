"""The networks of a run, as a page asks for them. What opens checkpoints, and knows configurations, stays outside."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from knowsam.data.source import Source

if TYPE_CHECKING:
    import torch

    from knowsam.methods.base import SSLMethod


@dataclass(frozen=True)
class Networks:
    """The networks of one checkpoint, and how to show them a case.

    Attributes:
        path: of the checkpoint.
        step: optimizer updates done; None of a converted checkpoint, of whose training nothing is known.
        method: with the checkpoint's weights, on the CPU.
        open_source: list of labelled cases, or None for the run's own -> the run's data, of which the training masks
            of that list may be read.
        class_names: of the K - 1 foreground classes.
        sight: how the networks see a case: arguments of ``inference.predict.segment``.
        batch_size: images or slices at a time.
        autocast: dtype to compute in; None for that of the weights.
    """

    path: Path
    step: int | None
    method: "SSLMethod"
    open_source: Callable[[str | None], Source]
    class_names: Sequence[str]
    sight: Mapping[str, Any]
    batch_size: int
    autocast: "torch.dtype | None"


class OpenNetworks(Protocol):
    """How the page comes to the networks of a run."""

    def __call__(self, folder: str, checkpoint: Literal["best", "last"]) -> Networks:
        """Read ``best.pt`` or ``last.pt`` of a run folder.

        Raises:
            NotFoundError: there is none.
            CheckpointError: damaged, or of a version with other networks.
            ConfigError: a stored configuration that this version does not accept.
        """
