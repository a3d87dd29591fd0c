"""Sam and its prompts: what fits, what is refused, what is computed, and parts of a lab's own."""

import pytest
import torch
from sam_lab import ConvEncoder, OneTokenDecoder, randomise
from torch import nn

from knowsam.models.sam import (
    Embedding,
    Masks,
    Prompts,
    Sam,
    SamMaskDecoder,
    SamPromptEncoder,
    build_sam,
    build_sam_guide,
    freeze_unreached,
)
from knowsam.models.sam.channels import Channels
from knowsam.models.sam.sam import CHECKED_CALLS


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def sam():
    torch.manual_seed(0)
    return randomise(build_sam("vit_tiny", image_size=64)[0])


def boxes(batch=2, prompts=3):
    return Prompts(boxes=torch.tensor([8.0, 8, 40, 50]).expand(batch, prompts, 4))


# --- what comes out ---


@torch.no_grad()
@pytest.mark.parametrize(("multimask", "masks"), [(False, 1), (True, 3)])
def test_shapes(sam, multimask, masks):
    embedding = sam.encode(torch.rand(2, 3, 64, 64))
    assert embedding.image.shape == (2, 64, 4, 4) and embedding.taps == {} and len(embedding) == 2
    found = sam.decode(embedding, boxes(), multimask=multimask, features=True)
    assert found.logits.shape == (2, 3, masks, 64, 64)
    assert found.low_res.shape == (2, 3, masks, 16, 16)
    assert found.iou.shape == (2, 3, masks)
    assert found.features.shape == (2, 3, 8, 16, 16)
    assert sam.decode(embedding, boxes(), size=30).logits.shape == (2, 3, 1, 30, 30)
    assert sam.decode(embedding, boxes(), size=(30, 50)).logits.shape == (2, 3, 1, 30, 50)


@torch.no_grad()
def test_every_mask_is_a_product_with_the_features(sam):
    embedding = sam.encode(torch.rand(1, 3, 64, 64))
    found = sam.decode(embedding, boxes(1, 2), multimask=True, features=True)
    solved = torch.linalg.lstsq(found.features.flatten(3).transpose(2, 3), found.low_res.flatten(3).transpose(2, 3))
    remade = found.features.flatten(3).transpose(2, 3) @ solved.solution
    torch.testing.assert_close(remade, found.low_res.flatten(3).transpose(2, 3), rtol=1e-3, atol=1e-3)


def test_nothing_is_computed_that_was_not_asked_for(sam):
    ran = []
    hooks = [
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
        for name, module in sam.mask_decoder.named_modules()
        if name.endswith("head") or (name.startswith("output_hypernetworks_mlps.") and name.count(".") == 1)
    ]
    embedding = sam.encode(torch.rand(1, 3, 64, 64))
    found = sam.decode(embedding, boxes(1), scores=False)
    assert ran == ["output_hypernetworks_mlps.0"] and found.iou is None and found.features is None
    ran.clear()
    sam.decode(embedding, boxes(1), multimask=True)
    assert ran == [*(f"output_hypernetworks_mlps.{i}" for i in (1, 2, 3)), "iou_prediction_head"]
    for hook in hooks:
        hook.remove()


@torch.no_grad()
def test_prompts_of_an_image_do_not_see_each_other(sam):
    embedding = sam.encode(torch.rand(2, 3, 64, 64))
    points, labels = 64 * torch.rand(2, 3, 2, 2), torch.tensor([[[1, 0], [1, 1], [0, -1]]] * 2)
    together = sam.decode(embedding, Prompts(points=points, labels=labels))
    for k in range(3):
        alone = sam.decode(embedding, Prompts(points=points[:, k : k + 1], labels=labels[:, k : k + 1]))
        torch.testing.assert_close(together.logits[:, k : k + 1], alone.logits, rtol=0, atol=1e-4)
        torch.testing.assert_close(together.iou[:, k : k + 1], alone.iou, rtol=0, atol=1e-4)
    assert (together.logits[:, 0] - together.logits[:, 1]).abs().max() > 1e-3


@torch.no_grad()
def test_forward_is_encode_and_decode(sam):
    images = torch.rand(2, 3, 64, 64)
    found = sam(images, boxes(), size=32, multimask=True)
    assert torch.equal(found.logits, sam.decode(sam.encode(images), boxes(), 32, multimask=True).logits)


def test_a_mask_prompt_has_gradient_and_any_size(sam):
    masks = torch.randn(1, 2, 24, 20, requires_grad=True)
    sam.decode(sam.encode(torch.rand(1, 3, 64, 64)), Prompts(masks=masks)).logits.sum().backward()
    assert masks.grad.abs().sum() > 0


@torch.no_grad()
def test_positions_stay_exact_under_autocast(sam):
    points = Prompts(points=torch.tensor([[[[3.0, 60.0]]]]), labels=torch.ones(1, 1, 1))
    exact, _ = sam.prompt_encoder(points, 1)
    with torch.autocast("cpu", torch.bfloat16):
        assert sam.positions().dtype == torch.float32
        found, _ = sam.prompt_encoder(points, 1)
        decoded = sam.decode(sam.encode(torch.rand(1, 3, 64, 64)), points, features=True)
    assert torch.equal(found, exact)
    assert {decoded.logits.dtype, decoded.low_res.dtype, decoded.iou.dtype} == {torch.float32}


# --- prompts ---


def test_count():
    assert Prompts().count == 1
    assert boxes(2, 5).count == 5
    assert boxes(4)[1:3].boxes.shape == (2, 3, 4)


ONES = torch.ones(2, 3, 4, 2)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"boxes": torch.zeros(3, 4)}, r"boxes are \(3, 4\); expected \(B, P, 4\)"),
        ({"boxes": torch.zeros(2, 3, 5)}, r"expected \(B, P, 4\)"),
        ({"points": ONES}, "points and labels go together"),
        ({"labels": ONES[..., 0]}, "points and labels go together"),
        ({"points": ONES[..., :1], "labels": ONES[..., 0]}, r"points are \(2, 3, 4, 1\); expected \(B, P, N, 2\)"),
        ({"points": ONES, "labels": ONES[:, :, 1:, 0]}, "N differs"),
        ({"points": ONES, "labels": 2 * ONES[..., 0]}, r"labels must be 1, 0 or -1 \(padding\), got \[2.0\]"),
        ({"masks": torch.zeros(2, 16, 16)}, r"masks are \(2, 16, 16\); expected \(B, P, h, w\)"),
        ({"sparse": torch.zeros(2, 3, 64)}, r"expected \(B, P, n, C\)"),
        ({"dense": torch.zeros(2, 64, 4, 4)}, r"expected \(B, P, C, E, E\)"),
        (
            {"boxes": torch.zeros(2, 3, 4), "masks": torch.zeros(2, 2, 4, 4)},
            r"disagree about images and prompts an image \(B, P\): boxes \(2, 3\), masks \(2, 2\)",
        ),
    ],
)
def test_prompts_that_do_not_fit_each_other(given, words):
    with pytest.raises(ValueError, match=words):
        Prompts(**given)


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        (boxes(3), "boxes are for 3 images, the embedding is of 2"),
        (Prompts(sparse=torch.zeros(2, 1, 2, 256)), r"sparse are \(2, 1, 2, 256\); the embedding has 64 channels"),
        (Prompts(dense=torch.zeros(2, 1, 32, 4, 4)), r"dense are .* the embedding is \(2, 64, 4, 4\)"),
        (Prompts(dense=torch.zeros(2, 1, 64, 8, 8)), r"dense are .* the embedding is \(2, 64, 4, 4\)"),
    ],
)
def test_prompts_that_do_not_fit_the_embedding(sam, prompts, words):
    with pytest.raises(ValueError, match=words):
        sam.decode(Embedding(torch.zeros(2, 64, 4, 4)), prompts)


# --- images ---


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), r"images are uint8; .* images.float\(\) / 255"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.int64), "images are int64"),
        (255 * torch.rand(1, 3, 64, 64), r"pixel values 0\.\.255; .* divide them by 255"),
        (torch.randn(1, 3, 64, 64), r"as if they were standardised \(z-scores\)"),
        (2000 * torch.rand(1, 3, 64, 64), "cut and scale intensities"),
        (torch.full((1, 3, 64, 64), float("nan")), "images are in nan..nan"),
    ],
)
def test_images_that_are_not_in_0_to_1(images, words):
    sam, _ = build_sam("vit_tiny", image_size=64)
    with pytest.raises(ValueError, match=words):
        sam.encode(images)


def test_images_are_looked_at_in_the_first_calls_only(monkeypatch):
    sam, _ = build_sam("vit_tiny", image_size=64)
    looked = []
    monkeypatch.setattr("knowsam.models.sam.sam.check_images", lambda images: looked.append(1))
    for _ in range(5):
        sam.encode(torch.rand(1, 3, 64, 64))
    assert len(looked) == CHECKED_CALLS < 5 and sam.checked_calls == 0


def test_a_small_overshoot_is_an_interpolation():
    sam, _ = build_sam("vit_tiny", image_size=64)
    sam.encode(1.08 * torch.rand(1, 3, 64, 64).clamp(0.04, 0.96) - 0.04)


@torch.no_grad()
def test_one_channel_is_repeated(sam):
    grey = torch.rand(1, 1, 64, 64)
    assert torch.equal(sam.encode(grey).image, sam.encode(grey.repeat(1, 3, 1, 1)).image)
    with pytest.raises(ValueError, match=r"\(1, 4, 64, 64\): SAM takes 3 channels, or 1"):
        sam.encode(torch.rand(1, 4, 64, 64))


def test_other_numbers_of_channels_come_to_three_by_a_stated_rule():
    images = torch.rand(2, 5, 8, 8)
    assert torch.equal(Channels([3, 0, 4], 5)(images), images[:, [3, 0, 4]])
    learned = Channels("learned", 5)
    assert torch.allclose(learned(images), images.mean(1, keepdim=True).expand(-1, 3, -1, -1))
    learned(images).sum().backward()
    assert learned.mixture.grad.abs().min() > 0
    assert Channels()(torch.rand(2, 1, 3, 8, 8)).shape == (2, 3, 3, 8, 8), "volumes, too"
    colour = torch.rand(2, 3, 8, 8)
    assert Channels()(colour) is colour
    for rule, count, says in (
        ("repeat", 4, "choose three"),
        ("learn", 4, "allowed: repeat, learned"),
        ([0, 1, 4], 4, "numbers of 0..3"),
    ):
        with pytest.raises(ValueError, match=says):
            Channels(rule, count)


@pytest.mark.parametrize("rule", ["learned", [0, 1, 3]])
def test_a_guide_of_images_of_four_channels(rule):
    guide, report = build_sam_guide("vit_tiny", image_size=64, channels=rule, in_channels=4)
    guide(torch.rand(2, 4, 64, 64), torch.randn(2, 2, 64, 64)).sum().backward()
    new = [key for key in report.declared_new if "channels" in key]
    assert new == (["channels.mixture"] if rule == "learned" else [])
    assert all(p.grad is not None for p in guide.parameters() if p.requires_grad)


# --- parts of one's own ---


def of_parts(image_size=64, in_channels=3, decoder=None, **options):
    encoder = ConvEncoder(image_size, in_channels)
    prompt_encoder = SamPromptEncoder(embed_dim=32, grid=image_size // 8, image_size=image_size)
    return Sam(encoder, prompt_encoder, decoder or SamMaskDecoder(embed_dim=32), **options)


@torch.no_grad()
def test_the_stride_is_the_encoders():
    sam = of_parts(48)
    embedding = sam.encode(torch.rand(1, 3, 48, 48))
    assert embedding.image.shape == (1, 32, 6, 6)
    found = sam.decode(embedding, boxes(1, 2))
    assert found.low_res.shape == (1, 2, 1, 24, 24) and found.logits.shape == (1, 2, 1, 48, 48)


@torch.no_grad()
def test_other_channels_are_the_encoders_matter():
    sam = of_parts(in_channels=5, pixel_mean=[0.0] * 5, pixel_std=[255.0] * 5)
    assert sam.encode(torch.rand(1, 5, 64, 64)).image.shape == (1, 32, 8, 8)
    with pytest.raises(ValueError, match="a number per channel, 5 in all"):
        of_parts(in_channels=5)


@torch.no_grad()
def test_extra_reaches_an_encoder_that_takes_it(sam):
    early = of_parts()
    images, extra = torch.rand(1, 3, 64, 64), torch.rand(1, 1, 64, 64)
    assert not torch.equal(early.encode(images).image, early.encode(images, extra).image)
    with pytest.raises(ValueError, match=r"SamImageEncoder takes no extra input, got \(1, 1, 64, 64\)"):
        sam.encode(images, extra)


class TapDecoder(SamMaskDecoder):
    """Adds a mean of the taps that it asks for to its logits."""

    needs_taps = (4,)

    def forward(self, image, image_pe, sparse, dense, *, taps, **asked):
        masks = super().forward(image, image_pe, sparse, dense, **asked)
        masks.low_res = masks.low_res + taps[self.needs_taps[0]].mean(dim=(1, 2, 3)).view(-1, 1, 1, 1, 1)
        return masks


class BlockDecoder(TapDecoder):
    needs_taps = (1, 2)


@torch.no_grad()
def test_a_decoder_gets_the_taps_that_it_needs():
    sam = of_parts(decoder=TapDecoder(embed_dim=32)).eval()
    embedding = sam.encode(torch.rand(2, 3, 64, 64))
    assert embedding.taps.keys() == {4} and embedding.taps[4].shape == (2, 16, 16, 16)
    found = sam.decode(embedding, boxes()).low_res
    without = sam.decode(Embedding(embedding.image, {4: 0 * embedding.taps[4]}), boxes()).low_res
    torch.testing.assert_close(found - without, embedding.taps[4].mean((1, 2, 3)).view(-1, 1, 1, 1, 1).expand_as(found))

    vit, _ = build_sam("vit_tiny", BlockDecoder, image_size=64)
    assert vit.encode(torch.rand(1, 3, 64, 64)).taps.keys() == {1, 2}
    assert vit(torch.rand(1, 3, 64, 64), boxes(1)).logits.shape == (1, 3, 1, 64, 64)


def test_an_encoder_without_taps_is_refused():
    class Untapped(ConvEncoder):
        tap = property()  # no such attribute

    encoder = Untapped(64, 3)
    with pytest.raises(ValueError, match=r"TapDecoder needs taps \(4,\) of the encoder, and Untapped has no tap"):
        Sam(encoder, SamPromptEncoder(embed_dim=32, grid=8, image_size=64), TapDecoder(embed_dim=32))


class SharpDecoder(SamMaskDecoder):
    def upscale(self, masks: Masks, size):
        return nn.functional.interpolate(masks.low_res.flatten(1, 2), size=size).unflatten(1, masks.low_res.shape[1:3])


@torch.no_grad()
def test_a_decoder_may_make_the_full_logits_itself():
    sam, _ = build_sam("vit_tiny", SharpDecoder, image_size=64)
    found = sam(torch.rand(1, 3, 64, 64), boxes(1))
    assert torch.equal(found.logits, found.low_res.repeat_interleave(4, -1).repeat_interleave(4, -2))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"embed_dim": 64}, r"is for 64 channels on a grid \(8, 8\) .* the encoder makes 32 channels"),
        ({"grid": 4}, r"on a grid \(4, 4\)"),
        ({"image_size": 128}, r"of images \(128, 128\)"),
    ],
)
def test_parts_that_do_not_fit(change, words):
    prompt_encoder = SamPromptEncoder(**{"embed_dim": 32, "grid": 8, "image_size": 64, **change})
    with pytest.raises(ValueError, match=words):
        Sam(ConvEncoder(64, 3), prompt_encoder, SamMaskDecoder(embed_dim=32))


def test_an_encoder_states_its_geometry():
    with pytest.raises(ValueError, match="Conv2d states no grid: an image encoder has the whole numbers stride, grid"):
        encoder = nn.Conv2d(3, 32, 8)
        encoder.stride, encoder.out_channels = 8, 32
        Sam(encoder, SamPromptEncoder(embed_dim=32, grid=8, image_size=64), SamMaskDecoder(embed_dim=32))


def test_decoder_width():
    with pytest.raises(ValueError, match="embed_dim is 20; the decoder's upscaling needs a multiple of 8"):
        SamMaskDecoder(embed_dim=20)
    for embed_dim, heads, mlp in ((256, 8, 2048), (96, 3, 768), (64, 2, 512), (104, 2, 832), (8, 1, 64)):
        transformer = SamMaskDecoder(embed_dim=embed_dim).transformer
        assert (transformer.num_heads, transformer.mlp_dim) == (heads, mlp)


# --- what trains ---


def test_sam_freezes_nothing():
    sam, _ = build_sam("vit_tiny", image_size=64)
    assert all(p.requires_grad for p in sam.parameters())


POINTS = Prompts(points=32 * torch.ones(2, 2, 3, 2), labels=torch.ones(2, 2, 3))
MASKS = Prompts(masks=torch.randn(2, 2, 16, 16))


@pytest.mark.parametrize(
    ("use", "prompts", "asked"),
    [
        ({"points": True, "boxes": False, "masks": False}, [POINTS], {"multimask": False, "scores": True}),
        ({"points": False, "boxes": True, "masks": False}, [boxes()], {"multimask": True, "scores": True}),
        (
            {"points": True, "boxes": True, "masks": None},
            [POINTS, boxes(), MASKS],
            {"multimask": True, "scores": False},
        ),
        ({"points": False, "boxes": False, "masks": True}, [MASKS], {"multimask": False, "scores": False}),
    ],
)
@pytest.mark.parametrize("decoder", ["sam", OneTokenDecoder])
def test_only_what_is_reached_trains(decoder, use, prompts, asked):
    """With a parameter less frozen DDP would stop; with one more, something would not learn."""
    sam, _ = build_sam("vit_tiny", decoder, image_size=64)
    freeze_unreached(sam, **use, **asked)
    for kind in prompts:
        found = sam(torch.rand(2, 3, 64, 64), kind, **asked)
        (found.logits.sum() + (0 if found.iou is None else found.iou.sum())).backward()
    trains = {name for name, p in sam.named_parameters() if p.requires_grad}
    assert trains == {name for name, p in sam.named_parameters() if p.grad is not None}
    assert not all(p.requires_grad for p in sam.parameters())


def test_a_use_of_everything_freezes_nothing():
    sam, _ = build_sam("vit_tiny", image_size=64)
    freeze_unreached(sam, points=True, boxes=True, masks=None, multimask=None, scores=True)
    assert all(p.requires_grad for p in sam.parameters())


# --- embeddings ---


def test_embeddings_are_cut_and_joined():
    taps = {4: torch.arange(6.0).view(6, 1, 1, 1)}
    whole = Embedding(torch.arange(6.0, requires_grad=True).view(6, 1, 1, 1), taps)
    first, rest = whole[:2], whole[2:]
    assert len(first) == 2 and first.taps[4].flatten().tolist() == [0, 1]
    again = first.joined(rest)
    assert torch.equal(again.image, whole.image) and torch.equal(again.taps[4], taps[4])
    assert whole.detach().image.requires_grad is False and whole.image.requires_grad
    volumes = Embedding(whole.image, taps, depth=3)
    assert len(volumes) == 2 and volumes[1:].image.flatten().tolist() == [3, 4, 5] and volumes[1:].depth == 3
