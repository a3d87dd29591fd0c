"""The contract between a semi-supervised method and the training loop."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

from torch import Tensor, nn

from knowsam.data.batch import Batch


@dataclass
class Prediction:
    """What one student did in this step, for whoever wraps the method (``WithSKD``).

    Attributes:
        images: (B, 3, S, S) the images the student saw, labelled first.
        logits: (B, K, S, S) its answer, with gradient.
        mask: (L, S, S) class ids of the first L images.
    """

    images: Tensor
    logits: Tensor
    mask: Tensor


@dataclass
class StepOutput:
    """Result of one forward pass of a method.

    Attributes:
        losses: weighted scalar terms by name; their sum is minimised.
        predictions: per student.
        monitors: scalars that are only logged.
    """

    losses: dict[str, Tensor]
    predictions: dict[str, Prediction] = field(default_factory=dict)
    monitors: dict[str, Tensor] = field(default_factory=dict)


class SSLMethod(nn.Module, ABC):
    """A method owns its networks and turns a batch into named loss terms. Concrete methods are final: wrap them.

    Everything that a method trains must be reached by its loss at *every* step (weigh a term by 0 rather than skip it,
    freeze what no loss touches), so that DDP around the whole method finds no unused parameter.
    """

    @abstractmethod
    def forward(self, batch: Batch, step: int) -> StepOutput:
        """Losses of one batch; ``step`` counts optimizer updates from 0."""

    @abstractmethod
    def trainable_groups(self) -> dict[str, list[nn.Parameter]]:
        """One optimizer per name, for example ``subnets`` and ``sam``; each parameter in one group only."""

    def after_step(self, step: int) -> None:
        """Called after the optimizers' update, for example to move an EMA teacher."""

    @abstractmethod
    def outputs(self) -> tuple[str, ...]:
        """Names of what can be evaluated; the deployed output comes first."""

    @abstractmethod
    def predict(self, images: Tensor) -> dict[str, Tensor]:
        """(B, 3, S, S) in 0..1 -> logits (B, K, S, S) by output name. The caller sets eval mode and no_grad."""

    @abstractmethod
    def inference_model(self) -> nn.Module:
        """Image (B, 3, S, S) in 0..1 -> logits (B, K, S, S): what is deployed and exported."""
