"""SAM as teacher (SKD): asked once a step, learns from the labelled images, teaches by logits without gradient."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from knowsam.data.batch import Batch
from knowsam.errors import ContractError
from knowsam.methods.base import Prediction, Taught, certain_pixels, check_range, known_pixels, supervised_loss
from knowsam.methods.modes import evaluating, has_modes
from knowsam.schedules import sigmoid_rampup

if TYPE_CHECKING:
    from knowsam.models.sam import Embedding


@dataclass(frozen=True)
class SkdOptions:
    """How SAM teaches.

    Attributes:
        weight: factor of the distillation at the end of its ramp, shared by the students.
        temperature: T > 0.
        rampup: length of the sigmoid ramp as a fraction of the run; 0 teaches at full weight from the start.
        confidence_threshold: least probability of SAM's argmax for a pixel to be taught, 0..1; 0 teaches all.
        teacher_mode: ``eval`` (no dropout, averaged batch statistics while teaching) or ``train`` (as published: the
            very logits that are trained).
        view: which view of an unlabelled image SAM sees: ``weak``, or ``strong`` as the students do (published).
        gradient: which images SAM's encoder keeps a graph of. SAM's loss is of the labelled ones; the others reach it
            through the batch statistics of the prompt generator only. ``all`` keeps that; ``labelled`` leaves it out
            and saves half of the encoder's backward pass. A teacher in ``train`` mode keeps all.
    Raises:
        ValueError: a value outside what is stated.
    """

    weight: float = 1.0
    temperature: float = 10.0
    rampup: float = 0.4
    confidence_threshold: float = 0.0
    teacher_mode: Literal["eval", "train"] = "eval"
    view: Literal["weak", "strong"] = "weak"
    gradient: Literal["all", "labelled"] = "all"

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ValueError(f"temperature must be > 0, got {self.temperature}")
        for name, allowed in (
            ("teacher_mode", ("eval", "train")),
            ("view", ("weak", "strong")),
            ("gradient", ("all", "labelled")),
        ):
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {value!r}")
        check_range(0, 1, confidence_threshold=self.confidence_threshold)
        check_range(0, float("inf"), weight=self.weight, rampup=self.rampup)


class Guide(Protocol):
    """What a teacher asks of SAM besides its forward, as ``models.sam.SamGuide`` and ``SliceWiseGuide`` have it."""

    def encode(self, images: Tensor) -> "Embedding":
        """Images (B, C, *S) in 0..1 -> what ``decode`` takes; may be cut and joined by images."""

    def decode(
        self,
        embedding: "Embedding",
        coarse_logits: Tensor | None = None,
        size: Sequence[int] | None = None,
        first: int | None = None,
    ) -> Tensor:
        """Class logits (B, K, *size), prompted with coarse logits; those of the ``first`` images alone if given."""


class SamOutput(NamedTuple):
    """What SAM said of a step's images.

    Attributes:
        loss: SAM's own supervised loss on the labelled images, scalar with gradient; 0 where L is 0.
        logits: (L + U, K, *S), without gradient.
        confidence: (L + U, *S), probability of its argmax; -1 where it was not asked.
        label: (L + U, *S), its argmax.
        known: bool (L + U, *S), False at ignored pixels: nothing is taught there.
        prediction: the same for pictures, with the images that it saw.
        asked: bool (L + U, *S), where a guide that looks at some slices of volumes was asked; None: everywhere.
    """

    loss: Tensor
    logits: Tensor
    confidence: Tensor
    label: Tensor
    known: Tensor
    prediction: Prediction
    asked: Tensor | None = None


class Lesson(NamedTuple):
    """One student's share of the distillation: ``weight * distillation(logits, target, temperature, valid)``."""

    student: str
    logits: Tensor
    target: Tensor
    valid: Tensor
    weight: float


class SamTeacher(nn.Module):
    """SAM with prompts of its own, as a method's teacher; trained as optimizer group ``sam``.

    Args:
        guide: (images, coarse_logits) -> logits, and a :class:`Guide`; ``models.sam.SamGuide``.
        max_steps: length of the run, for the ramp.
        options: how it teaches.
    Source:
        arXiv:2412.13742.
    """

    def __init__(self, guide: nn.Module, max_steps: int, options: SkdOptions | None = None):
        super().__init__()
        self.guide = guide
        self.options = options or SkdOptions()
        self.rampup_steps = self.options.rampup * max_steps
        # Its modules are looked at once: a transformer computes alike in both modes, so one pass serves both.
        self._encodes_twice = has_modes(getattr(guide, "image_encoder", guide))

    def forward(self, batch: Batch, prompt: Tensor) -> SamOutput:
        """Ask SAM for the images of a step, once.

        Args:
            batch: of the step.
            prompt: (L + U, K, *S) logits that it is prompted with; detached here.
        """
        joined = batch.join(batch.strong[0] if self.options.view == "strong" else batch.weak)
        images, labelled, prompt = joined.images, joined.count, prompt.detach()
        if self.options.teacher_mode == "train":
            learned, learned_at = self._ask(images, prompt)
            logits, asked = learned.detach(), learned_at
        else:
            learned, learned_at, logits, asked = self._ask_twice(images, prompt, labelled)
        confidence, label = logits.float().softmax(1).max(1)
        if asked is not None:
            confidence = confidence.masked_fill(~asked, -1)  # logits of 0 are no opinion: below any threshold
        prediction = Prediction(images, logits, batch.mask, certain_pixels(batch))
        loss = supervised_loss(learned, batch, valid=None if learned_at is None else learned_at[:labelled])
        return SamOutput(loss, logits, confidence, label, known_pixels(joined), prediction, asked)

    def _ask(self, images: Tensor, prompt: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits, and where the guide was asked; None: everywhere."""
        where = getattr(self.guide, "valid", None)
        if where is None:
            logits: Tensor = self.guide(images, prompt)
            return logits, None
        guide, size = cast(Guide, self.guide), images.shape[2:]
        embedding = guide.encode(images)
        return guide.decode(embedding, prompt, size), where(embedding, size)

    def _ask_twice(
        self, images: Tensor, prompt: Tensor, labelled: int
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """Logits (L, K, *S) that learn, and logits (L + U, K, *S) of eval mode; encoded once where that is the same.

        After each comes where the guide was asked; None: everywhere.
        """
        where = getattr(self.guide, "valid", lambda embedding, size: None)
        guide, size = cast(Guide, self.guide), images.shape[2:]
        if self.options.gradient == "labelled" and 0 < labelled < len(images):
            with torch.no_grad():
                rest = guide.encode(images[labelled:])
            embedding = guide.encode(images[:labelled]).joined(rest)
        else:
            embedding = guide.encode(images)
        learned = guide.decode(embedding, prompt, size, first=labelled)
        with evaluating(self.guide), torch.no_grad():
            constant = guide.encode(images) if self._encodes_twice else embedding.detach()
            logits = guide.decode(constant, prompt, size)
        return learned, where(embedding, size), logits, where(constant, size)

    def ramp(self, step: int) -> float:
        """Weight of the distillation at update ``step``."""
        return self.options.weight * sigmoid_rampup(step, self.rampup_steps)

    def lessons(self, said: SamOutput, taught: Mapping[str, Taught], step: int) -> Iterator[Lesson]:
        """What each student is to be distilled from; pixels that are ignored in a mask are left out.

        Raises:
            ContractError: SAM's logits do not fit a student's, as reported.
        """
        share = self.ramp(step) / max(1, len(taught))
        sure = said.confidence >= self.options.confidence_threshold  # (L + U, *S)
        labelled = len(said.prediction.mask)
        rows = {"joined": slice(None), "labelled": slice(labelled), "unlabelled": slice(labelled, None)}
        for name, student in taught.items():
            target, known = said.logits[rows[student.view]], said.known[rows[student.view]]
            if said.asked is not None:
                known = known & said.asked[rows[student.view]]
            valid = sure[rows[student.view]] & known
            if student.transform is not None:
                as_logits = known.unsqueeze(1).to(target.dtype).expand_as(target)
                target = student.transform(target)
                valid = target.float().softmax(1).amax(1) >= self.options.confidence_threshold
                # An interpolation that reaches into an ignored pixel knows nothing either.
                valid = valid & (student.transform(as_logits).amin(1) > 0.999)
            if student.valid is not None:
                valid = valid & student.valid
            if target.shape != student.logits.shape:
                raise ContractError(
                    f"{name} is reported as taught with logits {tuple(student.logits.shape)}, but SAM's logits of view "
                    f"{student.view!r}{' after transform' if student.transform else ''} are {tuple(target.shape)}",
                    hint="Taught needs the view that the logits are of, and a transform that does to SAM's logits what "
                    "was done to the images.",
                )
            yield Lesson(name, student.logits, target, valid, share)

    def compilable(self) -> list[nn.Module]:
        """Parts whose own forward runs at every step."""
        parts = getattr(self.guide, "compilable", None)
        return list(parts()) if callable(parts) else []
