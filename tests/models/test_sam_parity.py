"""Without tunings, our SAM is segment-anything's: same keys, same numbers on shared random weights."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from sam_lab import (
    OFFICIAL_TINY,
    TOLERANCE,
    VIT_SMALL,
    VIT_TINY,
    Official,
    official_decoder,
    official_encoder,
    randomise,
    worst,
)
from torch import nn

import knowsam
from knowsam.models.sam import Prompts, SamImageEncoder, SamMaskDecoder, build_sam, build_sam_guide
from knowsam.models.sam.official import window_partition, window_unpartition

SIZES = {"tiny": VIT_TINY, "small": VIT_SMALL}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("image_size", [48, 128, 320])
@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_encoder_equals_official(size, image_size):
    theirs = randomise(official_encoder(image_size, **SIZES[size]))
    ours = SamImageEncoder(image_size=image_size, **SIZES[size]).eval()
    ours.load_state_dict(theirs.state_dict())  # strict: the same keys and shapes
    images = torch.randn(2, 3, image_size, image_size)
    assert worst(ours(images), theirs(images)) < TOLERANCE


@pytest.mark.parametrize("multimask", [False, True])
@pytest.mark.parametrize(("grid", "tokens"), [(4, 0), (8, 2), (20, 2)])
@torch.no_grad()
def test_batched_decoder_equals_official_one_by_one(grid, tokens, multimask):
    theirs = randomise(official_decoder())
    ours = SamMaskDecoder().eval()
    ours.load_state_dict(theirs.state_dict())
    image = torch.randn(2, 256, grid, grid)
    positions = torch.randn(1, 256, grid, grid)
    sparse, dense = torch.randn(2, 3, tokens, 256), torch.randn(2, 3, 256, grid, grid)
    count = 3 if multimask else 1
    expected, scores = torch.empty(2, 3, count, 4 * grid, 4 * grid), torch.empty(2, 3, count)
    for b in range(2):
        for k in range(3):
            masks, score = theirs(
                image_embeddings=image[b : b + 1],
                image_pe=positions,
                sparse_prompt_embeddings=sparse[b, k : k + 1],
                dense_prompt_embeddings=dense[b, k : k + 1],
                multimask_output=multimask,
            )
            expected[b, k], scores[b, k] = masks[0], score[0]
    found = ours(image, positions, sparse, dense, multimask=multimask)
    assert worst(found.low_res, expected) < TOLERANCE
    assert worst(found.iou, scores) < TOLERANCE


def points(n, prompts=3, batch=2, side=64, padding=False):
    generator = torch.Generator().manual_seed(n)
    labels = torch.randint(0, 2, (batch, prompts, n), generator=generator)
    if padding:
        labels[0, 1, -1] = -1
    return {"points": side * torch.rand(batch, prompts, n, 2, generator=generator), "labels": labels}


BOXES = {"boxes": torch.tensor([[[3.0, 5, 40, 50], [0, 0, 63, 63], [10, 20, 30.5, 40.25]]] * 2)}
MASKS = {"masks": 4 * torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))}
PROMPTS = {
    "one point": points(1),
    "points": points(4),
    "padded points": points(3, padding=True),
    "boxes": BOXES,
    "points and boxes": points(2) | BOXES,
    "masks": MASKS,
    "points, boxes and masks": points(2) | BOXES | MASKS,
    "one prompt of many": {"boxes": BOXES["boxes"][:, :1]},
    "nothing": {},
}


@pytest.mark.parametrize("multimask", [False, True])
@pytest.mark.parametrize("kind", PROMPTS)
@torch.no_grad()
def test_prompts_equal_official(kind, multimask):
    """Two images with as many prompts each, in one pass here and one image after the other there."""
    sam, _ = build_sam(OFFICIAL_TINY, image_size=64)
    randomise(sam)
    prompts = Prompts(**PROMPTS[kind])
    embedding = sam.encode(torch.rand(2, 3, 64, 64))
    low, scores = Official(sam, 64).masks(embedding.image, prompts, multimask)
    ours = sam.decode(embedding, prompts, multimask=multimask)
    assert worst(ours.low_res, low) < TOLERANCE
    assert worst(ours.iou, scores) < TOLERANCE
    full = nn.functional.interpolate(low.flatten(1, 2), size=(64, 64), mode="bilinear").unflatten(1, low.shape[1:3])
    assert worst(ours.logits, full) < TOLERANCE
    assert low.shape[1] == prompts.count and low.std() > 0.1


@torch.no_grad()
def test_tokens_and_dense_prompts_of_ones_own_go_where_official_ones_do():
    sam, _ = build_sam("vit_tiny", image_size=64)
    randomise(sam)
    own = {"sparse": torch.randn(2, 3, 2, 64), "dense": torch.randn(2, 3, 64, 4, 4)}
    prompts = Prompts(**points(2), **MASKS, **own)
    embedding = sam.encode(torch.rand(2, 3, 64, 64))
    low, _ = Official(sam, 64, heads=2, mlp_dim=512).masks(embedding.image, prompts, False)
    assert worst(sam.decode(embedding, prompts).low_res, low) < TOLERANCE


@pytest.mark.parametrize(
    ("encoder", "sizes", "image_size", "batch"),
    [
        (OFFICIAL_TINY, VIT_TINY, 128, 2),
        ({"name": "vit_small", "out_channels": 256}, VIT_SMALL, 320, 1),
        ("vit_b", {"width": 768, "depth": 12, "heads": 12, "global_blocks": (2, 5, 8, 11)}, 256, 1),
    ],
)
@torch.no_grad()
def test_guide_equals_official_parts(encoder, sizes, image_size, batch):
    guide, _ = build_sam_guide(encoder, image_size=image_size, num_classes=2)
    randomise(guide)
    theirs = official_encoder(image_size, **sizes).eval()
    theirs.load_state_dict(guide.sam.image_encoder.state_dict())

    images = torch.rand(batch, 3, image_size, image_size)
    coarse = 3 * torch.randn(batch, 2, image_size // 4, image_size // 4)  # the mask encoder's own size
    mean, std = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])
    embedding = theirs((255 * images - mean.view(3, 1, 1)) / std.view(3, 1, 1))
    assert worst(guide.encode(images).image, embedding) < TOLERANCE

    prompts = guide.prompt_generator(embedding)
    prompts.masks = coarse
    low, _ = Official(guide.sam, image_size).masks(embedding, prompts, False)
    expected = nn.functional.interpolate(low[:, :, 0], size=(image_size, image_size), mode="bilinear")
    assert worst(guide(images, coarse), expected) < TOLERANCE


@pytest.mark.parametrize("image_size", [96, 240])  # one part of a window; a whole window and three parts of windows
def test_gradients_equal_official(image_size):
    theirs = randomise(official_encoder(image_size, **VIT_TINY))
    ours = SamImageEncoder(image_size=image_size, **VIT_TINY)
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
    encoder = SamImageEncoder(image_size=image_size, use_rel_pos=use_rel_pos, **VIT_TINY)
    block = randomise(encoder).blocks[0]
    block.attn.attach("qkv", randomise(nn.Linear(96, 288), seed=1))  # with a bias, so that it moves padding
    x = torch.randn(2, image_size // 16, image_size // 16, 96)
    windows, padded = window_partition(x, 14)
    expected = window_unpartition(block.attn(windows), 14, padded, x.shape[1:3])
    assert worst(block.attn(x, 14), expected) < 1e-5


def test_checkpointing_changes_nothing():
    plain = randomise(SamImageEncoder(image_size=64, **VIT_TINY))
    saving = SamImageEncoder(image_size=64, checkpointing=True, **VIT_TINY)
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
    encoder = SamImageEncoder(image_size=64, **VIT_TINY)
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
