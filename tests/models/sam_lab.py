"""segment-anything's parts with the weights of ours, and small parts of one's own, as a lab would write them."""

from functools import partial

import torch
from torch import nn

from knowsam.models.sam import Masks, Prompts, Sam, SamMaskDecoder
from knowsam.models.sam.official import ImageEncoderViT, MaskDecoder, PromptEncoder, TwoWayTransformer

TOLERANCE = 1e-4
VIT_TINY = {"width": 96, "depth": 4, "heads": 3, "global_blocks": (1, 3)}
VIT_SMALL = {"width": 192, "depth": 4, "heads": 3, "global_blocks": (1, 3)}
OFFICIAL_TINY = {"name": "vit_tiny", "out_channels": 256}
"""A small encoder whose neck, and so decoder and prompts, are of official size."""


@torch.no_grad()
def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Move what starts at zero, above all positions: otherwise equality would not show a thing."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        std = 0.5 if "pos" in name else 0.3 if parameter.ndim == 1 else 0.0
        parameter.add_(std * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def worst(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert ours.shape == theirs.shape
    return (ours - theirs).abs().max().item()


def official_encoder(image_size: int, width: int, depth: int, heads: int, global_blocks, channels=256) -> nn.Module:
    return ImageEncoderViT(
        img_size=image_size,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        out_chans=channels,
        use_rel_pos=True,
        window_size=14,
        global_attn_indexes=tuple(global_blocks),
    )


def official_decoder(channels: int = 256, heads: int = 8, mlp_dim: int = 2048) -> nn.Module:
    transformer = TwoWayTransformer(depth=2, embedding_dim=channels, num_heads=heads, mlp_dim=mlp_dim)
    return MaskDecoder(transformer_dim=channels, transformer=transformer, iou_head_hidden_dim=channels)


def official_prompt_encoder(image_size: int, channels: int = 256) -> nn.Module:
    grid = (image_size // 16, image_size // 16)
    return PromptEncoder(channels, grid, (image_size, image_size), 16)


class Official:
    """segment-anything's prompt encoder and mask decoder with the weights of a SAM of ours, one image at a time."""

    def __init__(self, sam: Sam, image_size: int, **sizes):
        self.prompt_encoder = official_prompt_encoder(image_size, sam.embed_dim).eval()
        self.prompt_encoder.load_state_dict(sam.prompt_encoder.state_dict())
        self.decoder = official_decoder(sam.embed_dim, **sizes).eval()
        self.decoder.load_state_dict(sam.mask_decoder.state_dict())

    @torch.no_grad()
    def masks(self, image: torch.Tensor, prompts: Prompts, multimask: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Embedding (B, C, E, E) -> low-resolution logits (B, P, M, 4E, 4E) and scores (B, P, M)."""
        low, scores = [], []
        for b in range(len(image)):
            one = prompts[b : b + 1]
            sparse, dense = self.prompt_encoder(
                points=None if one.points is None else (one.points[0], one.labels[0]),
                boxes=None if one.boxes is None else one.boxes[0],
                masks=None if one.masks is None else one.masks[0][:, None],
            )
            if one.sparse is not None:
                sparse = torch.cat([sparse.expand(one.count, -1, -1), one.sparse[0]], 1)
            found = self.decoder(
                image_embeddings=image[b : b + 1],
                image_pe=self.prompt_encoder.get_dense_pe(),
                sparse_prompt_embeddings=sparse,
                dense_prompt_embeddings=dense if one.dense is None else dense + one.dense[0],
                multimask_output=multimask,
            )
            low.append(found[0])
            scores.append(found[1])
        return torch.stack(low), torch.stack(scores)


class OneTokenDecoder(SamMaskDecoder):
    """A decoder with one more token and head, whose mask is what it gives."""

    new_parameters = ("lesion_token", "lesion_head")

    def __init__(self, *, embed_dim: int = 256, num_classes: int = 2):
        super().__init__(embed_dim=embed_dim)
        self.num_classes = num_classes
        self.lesion_token = nn.Parameter(0.02 * torch.randn(1, embed_dim))
        self.lesion_head = nn.Linear(embed_dim, embed_dim // 8)

    def output_tokens(self):
        return torch.cat([super().output_tokens(), self.lesion_token])

    def forward(self, image, image_pe, sparse, dense, *, multimask=False, scores=True, features=False):
        tokens, upscaled = self.attend(image, image_pe, sparse, dense)
        weights = self.lesion_head(tokens[:, 5])[:, None]
        low_res = (weights @ upscaled.flatten(2)).unflatten(2, upscaled.shape[-2:])
        return Masks(low_res.unflatten(0, sparse.shape[:2]))

    def unreached(self, **_):
        yield from self.iou_prediction_head.parameters()
        yield from self.output_hypernetworks_mlps.parameters()


class ConvEncoder(nn.Module):
    """A small pyramid of stride 8, which can also look at a prompt itself."""

    def __init__(self, image_size: int, in_channels: int, channels: int = 32):
        super().__init__()
        self.stride, self.grid, self.out_channels = 8, image_size // 8, channels
        self.in_channels = in_channels
        self.fine = nn.Conv2d(in_channels + 1, 16, 4, stride=4)
        self.coarse = nn.Conv2d(16, channels, 2, stride=2)
        self.tapped = ()

    def tap(self, names):
        self.tapped = tuple(names)

    def forward(self, images, extra=None):
        extra = torch.zeros_like(images[:, :1]) if extra is None else extra
        fine = self.fine(torch.cat([images, extra], 1)).relu()
        coarse = self.coarse(fine)
        return (coarse, {4: fine}) if self.tapped else coarse
