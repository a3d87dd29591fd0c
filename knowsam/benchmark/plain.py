"""The plain baseline: the same step on segment-anything's own computations, for honest ratios.

What it does not do: fused attention, windows without padding, all classes in one decoder pass, channels-last students,
fused optimizers, rectifiers in place, dropout masks from plain bits, masks of the labelled images alone where only they
are trained. Method, losses, adapters, prompt generator, data and loop are knowsam's own, so both do the same work.
"""

import inspect

import torch
from torch import Tensor, nn

from knowsam.config import Config
from knowsam.models.dropout import Dropout
from knowsam.models.sam.encoder import SamBlock, SamImageEncoder
from knowsam.models.sam.mask_decoder import SamMaskDecoder
from knowsam.models.sam.official import Attention, window_partition, window_unpartition


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

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images (B, 3, S, S) -> image embedding (B, 256, E, E)."""
        x = self.patch_embed(images) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.neck(x.permute(0, 3, 1, 2))


class PlainDecoder(SamMaskDecoder):
    """One call per class, each making all four masks and their quality, as segment-anything's decoder does."""

    def forward(self, image_embedding: Tensor, image_pe: Tensor, sparse: Tensor, dense: Tensor) -> Tensor:
        """As :class:`SamMaskDecoder`: (B, K, 4E, 4E) logits."""
        dense = dense.expand(len(image_embedding), sparse.shape[1], -1, *image_embedding.shape[-2:])
        return torch.cat(
            [self._one_class(image_embedding, image_pe, sparse[:, k], dense[:, k]) for k in range(sparse.shape[1])], 1
        )

    def _one_class(self, image_embedding: Tensor, image_pe: Tensor, sparse: Tensor, dense: Tensor) -> Tensor:
        own = torch.cat([self.iou_token.weight, self.mask_tokens.weight])
        tokens = torch.cat([own.expand(len(sparse), -1, -1), sparse], dim=1)
        image = image_embedding + dense
        tokens, image_tokens = self.transformer(image, image_pe.expand_as(image), tokens)
        upscaled = self.output_upscaling(image_tokens.transpose(1, 2).unflatten(2, image.shape[-2:]))
        made = [head(tokens[:, 1 + i]) for i, head in enumerate(self.output_hypernetworks_mlps)]
        masks = (torch.stack(made, dim=1) @ upscaled.flatten(2)).unflatten(2, upscaled.shape[-2:])
        self.iou_prediction_head(tokens[:, 0])
        return masks[:, :1]


def build_plain(config: Config) -> tuple[nn.Module, dict]:
    """The experiment's method on plain parts, and optimizers as torch makes them by default."""
    from knowsam import build
    from knowsam.engine.optim import ScheduledOptimizer
    from knowsam.models.sam import build_sam_guide

    built = build.build_method(config)
    method = built.method
    if config.uses_sam:
        guide, _ = build_sam_guide(
            image_size=config.data.image_size,
            num_classes=config.num_classes,
            **config.sam,
            encoder_type=PlainEncoder,
            decoder_type=PlainDecoder,
        )
        guide.load_state_dict(method.sam_guide.state_dict())
        decode = guide.decode
        guide.decode = lambda *args, first=None: decode(*args)[:first]  # masks of all images, as published
        method.sam_guide = guide
    if hasattr(method, "students"):
        method.students.memory_format = torch.contiguous_format
        method.students.to(memory_format=torch.contiguous_format)
        for module in method.students.modules():
            if isinstance(module, nn.LeakyReLU):
                module.inplace = False
            elif isinstance(module, Dropout):
                module.__class__ = nn.Dropout
    optimizers = {}
    for name, made in build.build_optimizers(config, method).items():
        allowed = inspect.signature(type(made.optimizer)).parameters.keys() - {"fused", "foreach"}
        settings = {key: value for key, value in made.optimizer.defaults.items() if key in allowed}
        plain = type(made.optimizer)(made.parameters, **settings)
        optimizers[name] = ScheduledOptimizer(plain, made.lr, made.schedule, made.warmup)
    return method, optimizers
