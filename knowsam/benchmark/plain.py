"""The plain baseline: the same step on segment-anything's own computations, for honest ratios.

What it does not do: fused attention, windows without padding, all classes in one decoder pass, channels-last students,
fused optimizers, rectifiers in place, dropout masks from plain bits, masks of the labelled images alone where only they
are trained. Method, losses, adapters, prompt generator, data and loop are knowsam's own, so both do the same work.
"""

import inspect
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from knowsam.benchmark.workload import Workload
from knowsam.engine.optim import ScheduledOptimizer
from knowsam.methods.base import SSLMethod
from knowsam.models.dropout import Dropout
from knowsam.models.sam import Embedding, SamGuide, build_sam_guide
from knowsam.models.sam.encoder import SamBlock, SamImageEncoder
from knowsam.models.sam.mask_decoder import Masks, SamMaskDecoder
from knowsam.models.sam.official import Attention, window_partition, window_unpartition
from knowsam.models.students import Students, lay_out


class PlainBlock(SamBlock):
    """segment-anything's block: padded windows, attention with an explicit bias; and the adapters."""

    attention_type = Attention

    def attention(self, x: Tensor) -> Tensor:
        """norm1, padding to whole windows, attention, adapter, back to the grid."""
        height, width = x.shape[1:3]
        x = self.norm1(x)
        if not self.window_size:
            return self.adapt("post_attention", self.attn(x))
        x, padded = window_partition(x, self.window_size)
        x = self.adapt("post_attention", self.attn(x))
        return window_unpartition(x, self.window_size, padded, (height, width))


class PlainEncoder(SamImageEncoder):
    """segment-anything's encoder with its memory layout."""

    block_type = PlainBlock

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, dict[int, Tensor]]:
        """Normalised images (B, 3, S, S) -> image embedding (B, C, E, E)."""
        return self.through_blocks(images, self.patch_embed(images) + self.pos_embed)


class PlainDecoder(SamMaskDecoder):
    """One call per prompt, each making all four masks and their quality, as segment-anything's decoder does."""

    def forward(
        self,
        image: Tensor,
        image_pe: Tensor,
        sparse: Tensor,
        dense: Tensor,
        *,
        multimask: bool = False,
        scores: bool = True,
        features: bool = False,
    ) -> Masks:
        """As :class:`SamMaskDecoder`, for mask 0."""
        assert not (multimask or scores or features), "the baseline of a guide"
        dense = dense.expand(len(image), sparse.shape[1], -1, *image.shape[-2:])
        each = [self._one_prompt(image, image_pe, sparse[:, k], dense[:, k]) for k in range(sparse.shape[1])]
        return Masks(torch.stack(each, dim=1))

    def _one_prompt(self, image: Tensor, image_pe: Tensor, sparse: Tensor, dense: Tensor) -> Tensor:
        tokens = torch.cat([self.output_tokens().expand(len(sparse), -1, -1), sparse], dim=1)
        image = image + dense
        tokens, image_tokens = self.transformer(image, image_pe.expand_as(image), tokens)
        upscaled = self.output_upscaling(torch.unflatten(image_tokens.transpose(1, 2), 2, image.shape[-2:]))
        made = [head(tokens[:, 1 + i]) for i, head in enumerate(self.output_hypernetworks_mlps)]
        masks = torch.unflatten(torch.stack(made, dim=1) @ upscaled.flatten(2), 2, upscaled.shape[-2:])
        self.iou_prediction_head(tokens[:, 0])
        return masks[:, :1]


class PlainGuide(SamGuide):
    """Masks of all images, as published, of which the first are wanted."""

    def decode(
        self,
        embedding: Embedding,
        coarse_logits: Tensor | None = None,
        size: int | Sequence[int] | None = None,
        first: int | None = None,
    ) -> Tensor:
        """As :class:`SamGuide`."""
        return super().decode(embedding, coarse_logits, size)[:first]


def build_plain(workload: Workload) -> tuple[SSLMethod, dict[str, ScheduledOptimizer]]:
    """The workload's method on plain parts, and optimizers as torch makes them by default."""
    method = workload.make_method()
    if method.sam_teacher is not None:
        blocks = dict(workload.sam or {})
        encoder = blocks.get("encoder") or {}
        blocks["encoder"] = {**encoder, "encoder_type": PlainEncoder}
        blocks["decoder"] = PlainDecoder
        guide, _ = build_sam_guide(image_size=workload.image_size, num_classes=workload.num_classes, **blocks)
        assert isinstance(guide, SamGuide), "the plain step is one of pictures"
        guide.load_state_dict(method.sam_teacher.guide.state_dict())
        method.sam_teacher.guide = PlainGuide(
            guide.sam, guide.prompt_generator, guide.num_classes, mask_prompt=guide.mask_prompt
        )
    students = getattr(method, "students", None)
    if isinstance(students, Students):
        for name in students.names:
            students.student(name).memory_format = torch.contiguous_format
        lay_out(students, torch.contiguous_format)
        for module in students.modules():
            if isinstance(module, nn.LeakyReLU):
                module.inplace = False
            elif isinstance(module, Dropout):
                module.__class__ = nn.Dropout  # type: ignore[assignment]
    optimizers = {}
    for name, made in workload.make_optimizers(method).items():
        allowed = inspect.signature(type(made.optimizer)).parameters.keys() - {"fused", "foreach"}
        settings = {key: value for key, value in made.optimizer.defaults.items() if key in allowed}
        plain = type(made.optimizer)(made.parameters, **settings)
        optimizers[name] = ScheduledOptimizer(plain, made.lr, made.schedule, made.warmup)
    return method, optimizers
