"""SKD for any method: SAM learns from the labelled images and teaches the method's students, by composition."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from knowsam.data.batch import Batch
from knowsam.errors import ContractError
from knowsam.losses import sam_distillation_loss
from knowsam.methods.base import Phase, SSLMethod, StepOutput
from knowsam.methods.modes import evaluating
from knowsam.methods.sam_teacher import SamTeacher, SkdOptions


class WithSKD(SSLMethod):
    """Adds SAM's supervised loss and its distillation into every student; the wrapped method is not touched.

    SAM sees the weak view, once a step, and is prompted with the logits that the method reports as ``prompt``, or else
    with its deployed network's. What it may teach the method reports as ``taught``.

    Args:
        method: any method that reports ``taught``.
        sam_guide: (images, coarse_logits) -> SAM's class logits; trained as optimizer group ``sam``.
        max_steps: length of the run, for the ramp.
        options: how SAM teaches.
    Raises:
        ValueError: the method has SAM as teacher already.
    Source:
        arXiv:2412.13742 (SKD as a plug-in).
    """

    def __init__(self, method: SSLMethod, sam_guide: nn.Module, max_steps: int, options: SkdOptions | None = None):
        super().__init__()
        if method.sam_teacher is not None:
            raise ValueError(f"{type(method).__name__} distils from SAM already; leave skd out")
        self.method = method
        self.updates_per_batch = method.updates_per_batch
        self.sam_teacher = SamTeacher(sam_guide, max_steps, options)

    def forward(self, batch: Batch, step: int) -> StepOutput:
        """The method's losses, plus ``sam`` and ``skd_<student>``."""
        out: StepOutput = self.method(batch, step)
        if not out.taught:
            raise ContractError(
                f"{type(self.method).__name__} reports nothing that SAM may teach",
                hint="Return StepOutput(..., taught={name: Taught(logits)}), or use StudentMethod.report.",
            )
        teacher = self.sam_teacher
        assert teacher is not None
        said = teacher(batch, self._prompt(batch) if out.prompt is None else out.prompt)
        losses = {**out.losses, "sam" if "sam" not in out.losses else "sam_guide": said.loss}
        for lesson in teacher.lessons(said, out.taught, step):
            losses[f"skd_{lesson.student}"] = lesson.weight * sam_distillation_loss(
                lesson.logits, lesson.target, temperature=teacher.options.temperature, valid=lesson.valid
            )
        monitors = {**out.monitors, "skd_weight": torch.tensor(teacher.ramp(step))}
        views = replace(out.views, teachers={**out.views.teachers, "sam": said.prediction})
        return replace(out, losses=losses, monitors=monitors, views=views)

    def _prompt(self, batch: Batch) -> Tensor:
        """The deployed network's logits of the images that SAM sees: the method's own may be of mixed ones."""
        with torch.no_grad(), evaluating(self.method):
            images = batch.join(batch.weak).images
            return self.method.predict_networks(images)[self.method.prompting_output()]

    def after_step(self, step: int) -> None:
        """Pass the step on to the method within."""
        self.method.after_step(step)

    def holds_still(self, step: int) -> frozenset[str]:
        """As the method within."""
        return self.method.holds_still(step)

    def phases(self) -> tuple[Phase, ...]:
        """As the method within."""
        return self.method.phases()

    def trainable_groups(self) -> dict[str, list[nn.Parameter]]:
        """The method's groups and ``sam``; a SAM that the method trains itself is in one group only."""
        groups = self.method.trainable_groups()
        known = {id(p) for parameters in groups.values() for p in parameters}
        own = [p for p in super().trainable_groups()["sam"] if id(p) not in known]
        return {**groups, "sam": [*groups.get("sam", ()), *own]}

    def networks(self) -> dict[str, nn.Module]:
        """As the method within: SAM is not deployed."""
        return self.method.networks()

    def predict_networks(self, images: Tensor) -> dict[str, Tensor]:
        """As the method within."""
        return self.method.predict_networks(images)

    def prompting_output(self) -> str:
        """As the method within."""
        return self.method.prompting_output()
