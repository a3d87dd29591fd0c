"""The contract between a semi-supervised method and the training loop.

A method is a forward: what follows from its networks (outputs, prediction, what is deployed, compiled and optimised) is
derived here, once.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from knowsam.data.batch import Batch, Joined
from knowsam.losses import IGNORE, partial_segmentation_loss
from knowsam.methods.ema import EmaTeacher
from knowsam.models.students import Students
from knowsam.needs import Needs

if TYPE_CHECKING:
    from knowsam.methods.sam_teacher import SamTeacher


@dataclass
class Prediction:
    """What one network predicted in this step: for pictures, label statistics and warnings.

    Attributes:
        images: (B, C, *S) what it saw.
        logits: (B, K, *S).
        mask: (L, *S) class ids of the first L of these images; L may be 0.
        valid: bool (L, *S), where ``mask`` is true; everywhere if None.
    """

    images: Tensor
    logits: Tensor
    mask: Tensor
    valid: Tensor | None = None


@dataclass
class Taught:
    """A student's logits that SAM may teach, and how they lie to the images that SAM sees.

    Attributes:
        logits: (B, K, *S), with gradient.
        view: of which of the step's images: ``joined`` (labelled, then unlabelled), ``labelled`` or ``unlabelled``.
        transform: carries SAM's logits of these images, (rows, K, *S), to where ``logits`` are: what the method did to
            the images between (mixing, copy-paste, rotation, a choice of rows); None if nothing.
        valid: bool (B, *S), pixels that may be taught; all if None.
    """

    logits: Tensor
    view: Literal["joined", "labelled", "unlabelled"] = "joined"
    transform: Callable[[Tensor], Tensor] | None = None
    valid: Tensor | None = None


@dataclass
class Mix:
    """Images made of parts of others, and what was learned from them.

    Attributes:
        images: (M, C, *S) in 0..1.
        label: (M, *S) class ids.
        other: bool (M, *S), pixels that came from the other image.
        valid: bool (M, *S), pixels whose label counted.
        logits: (M, K, *S) of the output that is deployed.
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
        teachers: predictions of who taught the students, by name.
        uncertainty: (L + U, *S) as the method itself uses it; None if it uses none.
        mix: None if nothing was mixed in this step.
    """

    teachers: dict[str, Prediction] = field(default_factory=dict)
    uncertainty: Tensor | None = None
    mix: Mix | None = None


@dataclass
class StepOutput:
    """Result of one forward pass of a method.

    Attributes:
        losses: weighted scalar terms by name; their sum is minimised.
        predictions: by name, the deployed output last if there is a choice.
        taught: what SAM may teach, by student; needed for ``+ SKD`` alone.
        prompt: (L + U, K, *S) logits that prompt SAM, of the unmixed images; where None, SAM's teacher asks the
            deployed network for them.
        monitors: scalars that are only logged.
        views: for pictures.
        carry: handed to the next update from the same batch as ``Batch.carried``; detached.
        constant: names of loss terms that have no gradient on purpose.
    """

    losses: dict[str, Tensor]
    predictions: dict[str, Prediction] = field(default_factory=dict)
    taught: dict[str, Taught] = field(default_factory=dict)
    prompt: Tensor | None = None
    monitors: dict[str, Tensor] = field(default_factory=dict)
    views: Views = field(default_factory=Views)
    carry: Any = None
    constant: frozenset[str] = frozenset()


Restart = Literal["students", "teacher", "optimizer", "schedule"]


@dataclass(frozen=True)
class Phase:
    """A part of a run.

    Attributes:
        name: for messages and the log.
        start: its first update; the first phase starts at 0.
        restart: what starts anew at its first update. ``students``: initial weights; ``teacher``: every ``EmaTeacher``
            becomes a copy of what it averages (after the students); ``optimizer``: momenta are forgotten;
            ``schedule``: learning rates run over this phase as over a run of its own.
    """

    name: str
    start: int
    restart: tuple[Restart, ...] = ()


class SSLMethod(nn.Module, ABC):
    """A method owns its networks and turns a batch into named loss terms. Concrete methods are final: wrap them.

    Everything that a method trains must be reached by its loss at *every* step of a phase (weigh a term by 0 rather
    than skip it, freeze what no loss touches, let a group that holds still be reached all the same), so that DDP around
    the whole method finds no unused parameter. The loop checks it in the first step, ``knowsam check-method`` in all.

    Attributes:
        needs: what it wants of an experiment; a literal, see ``Needs``.
        default_students: the ``students`` block where an experiment names none; a literal.
        default_fusion: the ``fusion`` block likewise; None for none.
        default_optim: ``optim`` blocks of its own parameter groups, by name; a literal.
        updates_per_batch: updates made from one batch; what an update hands on is ``StepOutput.carry``.
        sam_teacher: SAM as teacher, where the method has one.
    """

    needs: ClassVar[Needs] = Needs()
    default_students: ClassVar[Mapping[str, Any]] = {"unet": {"name": "unet"}}
    default_fusion: ClassVar[Mapping[str, Any] | None] = None
    default_optim: ClassVar[Mapping[str, Any]] = {}
    updates_per_batch: int = 1
    sam_teacher: "SamTeacher | None"

    def __init__(self) -> None:
        super().__init__()
        self.sam_teacher = None

    @abstractmethod
    def forward(self, batch: Batch, step: int) -> StepOutput:
        """Losses of one batch; ``step`` counts optimizer updates from 0."""

    @abstractmethod
    def networks(self) -> dict[str, nn.Module]:
        """What can be deployed, by output name, the deployed one first.

        Each is a network: images (B, C, *S) in 0..1 -> logits (B, K, *S), and needs no SAM unless SAM is what is
        deployed.
        """

    def trainable_groups(self) -> dict[str, list[nn.Parameter]]:
        """One optimizer per name, for example ``subnets`` and ``sam``; each parameter in one group only."""
        return {} if self.sam_teacher is None else {"sam": trained(self.sam_teacher)}

    def after_step(self, step: int) -> None:
        """Called after the optimizers' update, for example to move an EMA teacher."""

    def holds_still(self, step: int) -> frozenset[str]:
        """Parameter groups that update ``step`` leaves as they are, with their momenta; none."""
        return frozenset()

    def phases(self) -> tuple[Phase, ...]:
        """Parts of the run, in order; one without a name if there is nothing to restart."""
        return (Phase("", 0),)

    def restart(self, what: str, initial: Mapping[str, Tensor]) -> None:
        """Start something anew at the border of a phase.

        Args:
            what: ``students`` or ``teacher``; the loop itself restarts optimizers and schedules.
            initial: the method's state before its first update.
        """
        if what == "students":
            own = self.state_dict()
            for key in [key for key in own if "students" in key.split(".")[:2]]:
                own[key].copy_(initial[key])
        elif what == "teacher":
            for module in self.modules():
                if isinstance(module, EmaTeacher):
                    module.reset()

    # ------------------------------------------------------------ derived

    def outputs(self) -> tuple[str, ...]:
        """Names of what can be evaluated, the deployed one first; ``sam`` last where SAM teaches."""
        return (*self.networks(), *(() if self.sam_teacher is None else ("sam",)))

    def inference_model(self) -> nn.Module:
        """Image (B, C, *S) in 0..1 -> logits (B, K, *S): what is deployed and exported."""
        return next(iter(self.networks().values()))

    def prompting_output(self) -> str:
        """Which output's logits prompt SAM when the method predicts: the deployed one."""
        return next(iter(self.networks()))

    def predict(self, images: Tensor) -> dict[str, Tensor]:
        """(B, C, *S) in 0..1 -> logits (B, K, *S) by output name. The caller sets eval mode and no_grad."""
        logits = self.predict_networks(images)
        if self.sam_teacher is not None:
            logits["sam"] = self.sam_teacher.guide(images, logits[self.prompting_output()])
        return logits

    def predict_networks(self, images: Tensor) -> dict[str, Tensor]:
        """As :meth:`predict`, of all that works without SAM."""
        return {name: network(images) for name, network in self.networks().items()}

    def predict_deployed(self, images: Tensor) -> dict[str, Tensor]:
        """As :meth:`predict`, for the deployed output alone, and without running anything else (SAM, for one)."""
        name, network = next(iter(self.networks().items()))
        return {name: network(images)}

    def parts(self) -> dict[str, str]:
        """Part that another run may begin from -> prefix of its tensors in the method's state.

        ``students``, and ``sam``: SAM's own networks and tunings, without the prompt generator.
        """
        from knowsam.models.sam import Sam  # loads segment-anything, which a method without SAM never needs

        kinds: dict[str, type[nn.Module]] = {"students": Students, "sam": Sam}
        found: dict[str, str] = {}
        for name, module in self.named_modules():
            for part, kind in kinds.items():
                # The first in the method's order: an averaged copy comes after what it averages.
                if isinstance(module, kind) and part not in found:
                    found[part] = f"{name}."
        return found

    def compilable(self) -> list[nn.Module]:
        """Networks whose own forward runs at every step: what ``train.compile`` compiles."""
        found: list[nn.Module] = []
        for child in self.children():
            parts = getattr(child, "compilable", None)
            found += parts() if callable(parts) else [child]
        return found


class StudentMethod(SSLMethod):
    """A method that trains students, as optimizer group ``subnets``.

    Args:
        students: the networks.
    """

    def __init__(self, students: Students) -> None:
        super().__init__()
        self.students = students

    def trainable_groups(self) -> dict[str, list[nn.Parameter]]:
        """``subnets``, and ``sam`` where SAM teaches."""
        return {"subnets": trained(self.students), **super().trainable_groups()}

    def networks(self) -> dict[str, nn.Module]:
        """Every output of the students, the deployed one first."""
        return {name: self.students.network(name) for name in self.students.outputs}

    def predict_networks(self, images: Tensor) -> dict[str, Tensor]:
        """(B, C, *S) in 0..1 -> logits (B, K, *S) by output name; the students run once for all their outputs."""
        own: dict[str, Tensor] = self.students(images)
        return {name: own[name] if name in own else network(images) for name, network in self.networks().items()}

    def report(
        self,
        losses: dict[str, Tensor],
        joined: Joined,
        logits: Mapping[str, Tensor],
        *,
        monitors: dict[str, Tensor] | None = None,
        views: Views | None = None,
    ) -> StepOutput:
        """A step whose students saw labelled and unlabelled images together.

        Args:
            losses: weighted scalar terms by name.
            joined: what the students saw.
            logits: (L + U, K, *S) by output, of ``students(joined.images)``.
            monitors, views: as in ``StepOutput``.
        """
        certain = certain_pixels(joined)
        return StepOutput(
            losses,
            {name: Prediction(joined.images, x, joined.mask, certain) for name, x in logits.items()},
            {name: Taught(logits[name]) for name in self.students.names},
            logits[self.students.deployed].detach(),
            monitors or {},
            views or Views(),
        )


def supervised_loss(logits: Tensor, labels: Batch | Joined, *, valid: Tensor | None = None) -> Tensor:
    """Cross-entropy + Dice of a step's labelled images: pixels of id ``IGNORE`` and unlabelled classes teach nothing.

    Args:
        logits: (B, K, *S), the L labelled images first.
        labels: the batch, or what it was joined to; its mask (L, *S) and ``valid_classes``.
        valid: bool (L, *S), pixels that count; all but the ignored if None.
    Returns:
        Scalar; 0 where no pixel counts.
    """
    return partial_segmentation_loss(logits[: len(labels.mask)], labels.mask, labels.valid_classes, valid=valid)


def supervised_losses(
    students: Students, logits: Mapping[str, Tensor], labels: Batch | Joined | Tensor, *, valid: Tensor | None = None
) -> dict[str, Tensor]:
    """``seg_<name>`` on the first L images of every output: students share weight 1, a fusion head has weight 1.

    Args:
        students: whose logits these are.
        logits: (B, K, *S) by output name, labelled images first.
        labels: the batch, or what it was joined to; or a mask (L, *S) that labels every class.
        valid: bool (L, *S), where the mask is true; everywhere but at ignored pixels if None.
    """
    share = 1.0 / len(students.names)
    mask, classes = (labels, None) if isinstance(labels, Tensor) else (labels.mask, labels.valid_classes)
    return {
        f"seg_{name}": (share if name in students.names else 1.0)
        * partial_segmentation_loss(x[: len(mask)], mask, classes, valid=valid)
        for name, x in logits.items()
    }


def known_pixels(joined: Joined) -> Tensor:
    """Where a step's images are to teach anything: False at the labelled images' ignored pixels.

    Args:
        joined: labelled images, then unlabelled ones, of which every pixel counts.
    Returns:
        bool (L + U, *S), the ``valid`` of agreement, entropy and distillation losses on these images.
    """
    images = joined.images
    rest = torch.ones(len(images) - joined.count, *images.shape[2:], dtype=torch.bool, device=images.device)
    return torch.cat([joined.mask != IGNORE, rest])


def classes_by_pixel(joined: Joined) -> Tensor | None:
    """``valid_classes`` of every pixel, for images that are mixed: bool (L + U, K, *S), True for unlabelled images.

    None where every source labels all classes.
    """
    if joined.valid_classes is None:
        return None
    (count, classes), size = joined.valid_classes.shape, joined.images.shape[2:]
    labelled = joined.valid_classes.view(count, classes, *(1,) * len(size)).expand(-1, -1, *size)
    return torch.cat([labelled, labelled.new_ones(len(joined.images) - count, classes, *size)])


def certain_pixels(labels: Batch | Joined) -> Tensor | None:
    """Where a mask says one class: not at the background of a source that labels some classes only.

    Returns:
        bool (L, *S), ``Prediction.valid``; None where every source labels all classes.
    """
    if labels.valid_classes is None:
        return None
    whole = labels.valid_classes[:, 1:].all(1)
    return (labels.mask > 0) | whole.view(-1, *(1,) * (labels.mask.ndim - 1))


def trained(module: nn.Module) -> list[nn.Parameter]:
    """The parameters of a module that are not frozen."""
    return [p for p in module.parameters() if p.requires_grad]


def frozen_call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Call a module as it is, with gradients to its inputs and none to its parameters.

    For a term that is to fool a discriminator, while another term of the same sum trains it. Under DDP the module is
    still reached by the term that trains it.
    """
    from torch.func import functional_call

    return functional_call(module, {name: p.detach() for name, p in module.named_parameters()}, args, kwargs)


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
