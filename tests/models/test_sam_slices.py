"""A guide of volumes: every slice as the guide of images has it."""

import pytest
import torch
from sam_lab import randomise

from knowsam.models.sam import SliceWise, build_sam_guide


@pytest.fixture(scope="module")
def guide():
    torch.manual_seed(0)
    return randomise(build_sam_guide("vit_tiny", image_size=64, num_classes=3)[0])


@torch.no_grad()
@pytest.mark.parametrize("channels", [1, 3])
def test_every_slice_is_an_image(guide, channels):
    volumes, coarse = torch.rand(2, channels, 5, 64, 64), torch.randn(2, 3, 5, 32, 32)
    found = SliceWise(guide)(volumes, coarse)
    assert found.shape == (2, 3, 5, 64, 64)
    for b in range(2):
        for d in range(5):
            alone = guide(volumes[b : b + 1, :, d], coarse[b : b + 1, :, d])
            torch.testing.assert_close(found[b : b + 1, :, d], alone, rtol=0, atol=1e-4)


@torch.no_grad()
def test_the_same_face(guide):
    volumes, coarse = torch.rand(2, 1, 5, 64, 64), torch.randn(2, 3, 5, 64, 64)
    slices = SliceWise(guide)
    embedding = slices.encode(volumes)
    assert embedding.image.shape == (10, 64, 4, 4) and embedding.depth == 5 and len(embedding) == 2
    whole = slices(volumes, coarse)
    assert torch.equal(slices.decode(embedding, coarse, volumes.shape[2:]), whole)
    assert torch.equal(slices.decode(embedding, coarse), whole)
    torch.testing.assert_close(slices.decode(embedding, coarse, 64, first=1), whole[:1], rtol=0, atol=1e-4)
    assert slices.decode(embedding, None, (30, 50)).shape == (2, 3, 5, 30, 50)
    assert slices.decode(embedding, None, (5, 30, 50), first=0).shape == (0, 3, 5, 30, 50)
    joined = slices.encode(volumes[:1]).joined(slices.encode(volumes[1:]))
    torch.testing.assert_close(joined.image, embedding.image, rtol=0, atol=1e-4)
    assert slices.num_classes == 3 and slices.sam is guide.sam and slices.compilable() == guide.compilable()


def test_prompts_are_made_of_all_slices():
    """Their batch norms see the whole batch, decoded or not."""
    guide, _ = build_sam_guide("vit_tiny", image_size=64, num_classes=2)
    slices = SliceWise(guide).train()
    generator, embedding = guide.prompt_generator, slices.encode(torch.rand(2, 1, 3, 64, 64))
    seen = []
    generator.register_forward_hook(lambda _, args, out: seen.append(len(args[0])))
    slices.decode(embedding, None, first=1).sum().backward()
    assert seen == [6]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda s: s(torch.rand(1, 3, 64, 64)), r"volumes are \(1, 3, 64, 64\); expected \(B, C, D, S, S\)"),
        (lambda s: s(torch.rand(1, 3, 4, 64, 64), torch.rand(1, 3, 5, 8, 8)), r"\(B, K, D, h, w\) with D = 4"),
        (lambda s: s(torch.rand(1, 3, 4, 64, 64), torch.rand(1, 3, 8, 8)), r"\(B, K, D, h, w\) with D = 4"),
        (lambda s: s.decode(s.encode(torch.rand(1, 3, 4, 64, 64)), size=(5, 64, 64)), "volumes 4 slices deep"),
        (lambda s: s(torch.rand(1, 2, 4, 64, 64)), "SAM takes 3 channels, or 1"),
    ],
)
def test_refusals(guide, call, words):
    with pytest.raises(ValueError, match=words):
        call(SliceWise(guide))
