"""The contract between a semi-supervised method and the training loop."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from knowsam.data.batch import Batch


@dataclass
class Prediction:
    """What one student did in this step, for whoever wraps the method (``WithSKD``).

    Attributes:
        images: (B, 3, S, S) the images the student saw, labelled first.
        logits: (B, K, S, S) its answer, with gradient.
        mask: (L, S, S) class ids of the first L images.
        distil: whether a teacher should teach this output; not a fusion head, which learns from the students' answers.
    """

    images: Tensor
    logits: Tensor
    mask: Tensor
    distil: bool = True


@dataclass
class Mix:
    """Images made of parts of others, and what was learned from them.

    Attributes:
        images: (M, 3, S, S) in 0..1.
        label: (M, S, S) class ids.
        other: bool (M, S, S), pixels that came from the other image.
        valid: bool (M, S, S), pixels whose label counted.
        logits: (M, K, S, S), the answer of the output that is deployed.
    """

    images: Tensor
    label: Tensor
    other: Tensor
    valid: Tensor
    logits: Tensor


@dataclass
class Views:
    """What a person may want to see of a step besides the predictions (``engine/pictures.py`` draws it).

    Tensors that the step computed anyway: handing them out costs nothing and changes nothing, as nobody writes to them.

    Attributes:
        teachers: logits of who taught the students, by name: (L + U, K, S, S), labelled first, or (U, K, S, S).
        uncertainty: (L + U, S, S) as the method itself uses it; None if it uses none.
        mix: None if nothing was mixed in this step.
    """

    teachers: dict[str, Tensor] = field(default_factory=dict)
    uncertainty: Tensor | None = None
    mix: Mix | None = None


@dataclass
class StepOutput:
    """Result of one forward pass of a method.

    Attributes:
        losses: weighted scalar terms by name; their sum is minimised.
        predictions: per student.
        monitors: scalars that are only logged.
        views: for pictures; a method that says nothing gets pictures of its predictions.
    """

    losses: dict[str, Tensor]
    predictions: dict[str, Prediction] = field(default_factory=dict)
    monitors: dict[str, Tensor] = field(default_factory=dict)
    views: Views = field(default_factory=Views)


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

    def prompting_output(self) -> str:
        """Which output's logits prompt SAM when it is asked for this method's students: the deployed one."""
        return self.outputs()[0]

    def predict_deployed(self, images: Tensor) -> dict[str, Tensor]:
        """As :meth:`predict`, for the deployed output alone, and without running anything else (SAM, for one)."""
        return {self.outputs()[0]: self.inference_model()(images)}

    def compilable(self) -> list[nn.Module]:
        """Networks whose own forward runs at every step: what ``train.compile`` compiles."""
        guide = getattr(self, "sam_guide", None)
        found = [getattr(self, "students", None)]
        found += [getattr(guide, name, None) for name in ("image_encoder", "prompt_generator", "mask_decoder")]
        return [part for part in found if isinstance(part, nn.Module)]

    @abstractmethod
    def inference_model(self) -> nn.Module:
        """Image (B, 3, S, S) in 0..1 -> logits (B, K, S, S): what is deployed and exported."""

    def deployable(self) -> dict[str, nn.Module]:
        """Everything that works without SAM, by output name, the deployed one first; each as `inference_model`."""
        return {self.outputs()[0]: self.inference_model()}


def check_range(low: float, high: float, **values: float) -> None:
    """Refuse settings outside low..high.

    Raises:
        ValueError: names each.
    """
    wrong = [
        f"{name} must be in {low:g}..{high:g}, got {value}"
        for name, value in values.items()
        if not low <= value <= high
    ]
    if wrong:
        raise ValueError("; ".join(wrong))


def ask_sam(
    guide: nn.Module,
    images: Tensor,
    coarse_logits: Tensor,
    teacher_mode: str,
    labelled: int | None = None,
    gradient: str = "all",
) -> tuple[Tensor, Tensor]:
    """SAM's logits to be trained, and its logits as a constant teacher. The images are encoded once.

    Args:
        guide: (images, coarse_logits) -> logits; with ``encode`` and ``decode`` if ``teacher_mode`` is ``eval``.
        images: (B, 3, S, S) in 0..1.
        coarse_logits: (B, K, S, S), prompt SAM.
        teacher_mode: ``eval``: the teacher answers without dropout and with averaged statistics; ``train``: it gives
            the very logits that are trained (the published form).
        labelled: L, how many images, the first ones, SAM learns from; all if None.
        gradient: of which images the encoder keeps a graph with an ``eval`` teacher: ``all``, or ``labelled``. What the
            others add to the encoder's gradient comes through the batch statistics of the prompt generator alone.
    Returns:
        Logits (L, K, S, S) with gradient, or (B, K, S, S) with a ``train`` teacher; and (B, K, S, S) without.
    """
    if teacher_mode == "train":
        sam_logits = guide(images, coarse_logits)
        return sam_logits, sam_logits.detach()
    size = images.shape[-2:]
    embedding = guide.encode(images[:labelled] if gradient == "labelled" else images)
    if len(embedding) < len(images):
        with torch.no_grad():
            constant = guide.encode(images[labelled:])
        embedding = torch.cat([embedding, constant])
    sam_logits = guide.decode(embedding, coarse_logits, size, first=labelled)
    training = guide.training
    guide.eval()
    with torch.no_grad():
        teacher_logits = guide.decode(embedding.detach(), coarse_logits, size)
    guide.train(training)
    return sam_logits, teacher_logits
