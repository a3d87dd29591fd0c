"""Without adapters, our SAM is segment-anything's: same keys, same numbers on shared random weights."""

import os
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import knowsam
from knowsam.models.sam import VARIANTS, SamImageEncoder, SamMaskDecoder, build_sam_guide
from knowsam.models.sam.official import (
    ImageEncoderViT,
    MaskDecoder,
    PromptEncoder,
    TwoWayTransformer,
    window_partition,
    window_unpartition,
)

TOLERANCE = 1e-4


def official_encoder(image_size: int, width: int, depth: int, heads: int, global_blocks) -> nn.Module:
    return ImageEncoderViT(
        img_size=image_size,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        out_chans=256,
        use_rel_pos=True,
        window_size=14,
        global_attn_indexes=tuple(global_blocks),
    )


def official_decoder() -> nn.Module:
    return MaskDecoder(
        transformer_dim=256, transformer=TwoWayTransformer(depth=2, embedding_dim=256, num_heads=8, mlp_dim=2048)
    )


def official_prompt_encoder(image_size: int) -> nn.Module:
    grid = (image_size // 16, image_size // 16)
    return PromptEncoder(256, grid, (image_size, image_size), 16)


@torch.no_grad()
def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Leave nothing at a zero or one that would hide a missing term."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        std = 0.5 if "pos" in name else 0.3 if parameter.ndim == 1 else 0.0
        parameter.add_(std * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def worst(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert ours.shape == theirs.shape
    return (ours - theirs).abs().max().item()


@pytest.mark.parametrize("image_size", [48, 128, 320])
@pytest.mark.parametrize("variant", ["tiny", "small"])
@torch.no_grad()
def test_encoder_equals_official(variant, image_size):
    theirs = randomise(official_encoder(image_size, **VARIANTS[variant]))
    ours = SamImageEncoder(image_size=image_size, **VARIANTS[variant]).eval()
    ours.load_state_dict(theirs.state_dict())  # strict: the same keys and shapes
    images = torch.randn(2, 3, image_size, image_size)
    assert worst(ours(images), theirs(images)) < TOLERANCE


@pytest.mark.parametrize(("grid", "tokens"), [(4, 0), (8, 2), (20, 2)])
@torch.no_grad()
def test_batched_decoder_equals_official_one_by_one(grid, tokens):
    theirs = randomise(official_decoder())
    ours = SamMaskDecoder().eval()
    ours.load_state_dict(theirs.state_dict())
    image = torch.randn(2, 256, grid, grid)
    positions = torch.randn(1, 256, grid, grid)
    sparse, dense = torch.randn(2, 3, tokens, 256), torch.randn(2, 3, 256, grid, grid)
    expected = torch.empty(2, 3, 4 * grid, 4 * grid)
    for b in range(2):
        for k in range(3):
            masks, _ = theirs(
                image_embeddings=image[b : b + 1],
                image_pe=positions,
                sparse_prompt_embeddings=sparse[b, k : k + 1],
                dense_prompt_embeddings=dense[b, k : k + 1],
                multimask_output=False,
            )
            expected[b, k] = masks[0, 0]
    assert worst(ours(image, positions, sparse, dense), expected) < TOLERANCE


@pytest.mark.parametrize(("variant", "image_size", "batch"), [("tiny", 128, 2), ("small", 320, 1), ("vit_b", 256, 1)])
@torch.no_grad()
def test_guide_equals_official_parts(variant, image_size, batch):
    guide, _ = build_sam_guide(variant, image_size, num_classes=2)
    randomise(guide)
    encoder = official_encoder(image_size, **VARIANTS[variant]).eval()
    prompt_encoder = official_prompt_encoder(image_size).eval()
    decoder = official_decoder().eval()
    encoder.load_state_dict(guide.image_encoder.state_dict())
    prompt_encoder.load_state_dict(guide.prompt_encoder.state_dict())
    decoder.load_state_dict(guide.mask_decoder.state_dict())

    images = torch.rand(batch, 3, image_size, image_size)
    coarse = 3 * torch.randn(batch, 2, image_size // 4, image_size // 4)  # the mask encoder's own size
    mean, std = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])
    embedding = encoder((255 * images - mean.view(3, 1, 1)) / std.view(3, 1, 1))
    assert worst(guide.encode(images), embedding) < TOLERANCE

    sparse, extra = guide.prompt_generator(embedding)
    low_resolution = torch.empty(batch, 2, image_size // 4, image_size // 4)
    for b in range(batch):
        for k in range(2):
            _, dense = prompt_encoder(points=None, boxes=None, masks=coarse[b : b + 1, k : k + 1])
            masks, _ = decoder(
                image_embeddings=embedding[b : b + 1],
                image_pe=prompt_encoder.get_dense_pe(),
                sparse_prompt_embeddings=sparse[b, k : k + 1],
                dense_prompt_embeddings=dense + extra[b, k],
                multimask_output=False,
            )
            low_resolution[b, k] = masks[0, 0]
    expected = nn.functional.interpolate(low_resolution, size=(image_size, image_size), mode="bilinear")
    assert worst(guide(images, coarse), expected) < TOLERANCE


@pytest.mark.parametrize("image_size", [96, 240])  # one part of a window; a whole window and three parts of windows
def test_gradients_equal_official(image_size):
    theirs = randomise(official_encoder(image_size, **VARIANTS["tiny"]))
    ours = SamImageEncoder(image_size=image_size, **VARIANTS["tiny"])
    ours.load_state_dict(theirs.state_dict())
    images, weight = torch.randn(1, 3, image_size, image_size), torch.randn(1, 256, image_size // 16, image_size // 16)
    for model in (ours, theirs):
        (model(images) * weight).mean().backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert torch.allclose(parameter.grad, expected[name].grad, atol=1e-5, rtol=1e-3), name


@pytest.mark.parametrize("use_rel_pos", [True, False])
@pytest.mark.parametrize("image_size", [64, 256, 320])
@torch.no_grad()
def test_windows_without_padding_equal_padded_ones(image_size, use_rel_pos):
    """Padding is one key here; segment-anything computes each place of it. A qkv hook acts on padding too."""
    encoder = SamImageEncoder(image_size=image_size, use_rel_pos=use_rel_pos, **VARIANTS["tiny"])
    block = randomise(encoder).blocks[0]
    block.attn.attach("qkv", randomise(nn.Linear(96, 288), seed=1))  # with a bias, so that it moves padding
    x = torch.randn(2, image_size // 16, image_size // 16, 96)
    windows, padded = window_partition(x, 14)
    expected = window_unpartition(block.attn(windows), 14, padded, x.shape[1:3])
    assert worst(block.attn(x, 14), expected) < 1e-5


def test_checkpointing_changes_nothing():
    plain = randomise(SamImageEncoder(image_size=64, **VARIANTS["tiny"]))
    saving = SamImageEncoder(image_size=64, checkpointing=True, **VARIANTS["tiny"])
    saving.load_state_dict(plain.state_dict())
    images = torch.randn(2, 3, 64, 64)
    for model in (plain, saving):
        model(images).square().mean().backward()
    for (name, one), other in zip(plain.named_parameters(), saving.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad), name


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"image_size": 100}, "multiple of 16"),
        ({"image_size": 0}, "multiple of 16"),
        ({"width": 100, "heads": 3}, "heads"),
        ({"depth": 4, "global_blocks": (5,)}, "global_blocks"),
        ({"window": 0}, "window"),
    ],
)
def test_encoder_refuses(options, word):
    with torch.device("meta"), pytest.raises(ValueError, match=word):
        SamImageEncoder(**{"depth": 4, "global_blocks": (1, 3), **options})


def test_encoder_refuses_other_size():
    encoder = SamImageEncoder(image_size=64, **VARIANTS["tiny"])
    with pytest.raises(ValueError, match="built for"):
        encoder(torch.zeros(1, 3, 96, 96))


def test_import_survives_a_torchvision_of_another_torch(tmp_path):
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    script = """
        import pickle, sys
        from knowsam.models.sam.official import LayerNorm2d, MaskDecoder
        assert "torchvision" not in sys.modules
        assert "segment_anything" in sys.modules
        import segment_anything
        assert segment_anything.modeling.MaskDecoder is MaskDecoder
        assert type(pickle.loads(pickle.dumps(LayerNorm2d(4)))) is LayerNorm2d
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env={"PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(knowsam.__file__).parents[1])])},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
