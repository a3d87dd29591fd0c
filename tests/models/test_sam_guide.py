"""The guide: what is trainable, what gradient flows where, counts, adapters, prompts, sizes."""

import pytest
import torch
from sam_lab import OFFICIAL_TINY
from torch import nn

from knowsam.models.sam import PromptGenerator, Prompts, SamGuide, build_sam_guide
from knowsam.models.tuning import Adapter, add_adapters

ADAPTER = {"name": "adapter"}
TUNED = ["tuning", "prompt"]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def count(module: nn.Module, needle: str = "") -> int:
    return sum(p.numel() for n, p in module.named_parameters() if needle in n)


def meta_guide(encoder="vit_b", **options) -> SamGuide:
    with torch.device("meta"):
        return build_sam_guide(encoder, **options)[0]


def inputs(batch: int, num_classes: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(batch, 3, size, size, generator=generator)
    return images, torch.randn(batch, num_classes, size, size, generator=generator)


# --- counts, official size, no memory ---


@pytest.mark.parametrize(("encoder", "expected"), [("vit_b", 93_735_472), ("vit_h", 641_090_608)])
def test_official_counts(encoder, expected):
    assert count(meta_guide(encoder, image_size=1024).sam) == expected


def test_published_counts():
    """KnowSAM's table: 115.65 M, of which 22.0 M trainable, from our parts and what we leave out."""
    guide = meta_guide(image_size=1024, tuning=ADAPTER, prompt={"sparse": True, "dense": False, "tokens": 2})
    encoder_adapters = count(guide.sam.image_encoder, ".adapters.")
    decoder_adapters = count(guide.sam.mask_decoder, "adapters.")
    sparse_head = count(guide.prompt_generator)
    assert encoder_adapters == 24 * (2 * 768 * 192 + 768 + 192) == 7_100_928
    one_decoder_adapter = 2 * 256 * 64 + 256 + 64
    assert decoder_adapters == 5 * one_decoder_adapter == 165_440
    assert sparse_head == 11_156_992

    dead = encoder_adapters // 2 + one_decoder_adapter  # depth adapters in every block, one decoder adapter
    assert dead == 3_550_464 + 33_088
    trainable = encoder_adapters + decoder_adapters + sparse_head + dead
    assert round(trainable / 1e6, 1) == 22.0
    relative_positions = count(guide.sam.image_encoder, "rel_pos")  # the published code has none
    total = 93_735_472 - relative_positions + trainable
    assert round(total / 1e6, 2) == 115.65


def test_dense_head_is_light():
    assert count(PromptGenerator(2, sparse=False)) < 100_000


@pytest.mark.parametrize(("encoder", "limit"), [("vit_tiny", 2_000_000), ("vit_small", 6_000_000)])
def test_small_sizes_are_small_throughout(encoder, limit):
    guide = meta_guide(encoder, image_size=64, num_classes=2, tuning=ADAPTER)
    assert count(guide) < limit
    parts = guide.sam.image_encoder, guide.sam.mask_decoder, guide.prompt_generator
    assert max(map(count, parts)) < 0.7 * count(guide)  # none makes up for the others


def test_a_small_encoder_with_official_channels_has_official_parts():
    small, official = meta_guide(OFFICIAL_TINY, image_size=64), meta_guide("vit_b", image_size=64)
    for part in ("prompt_encoder", "mask_decoder"):
        assert count(getattr(small.sam, part)) == count(getattr(official.sam, part))
    assert count(small.prompt_generator) == count(official.prompt_generator)


# --- freezing and flow ---


@pytest.mark.parametrize(
    ("num_classes", "train", "mask_prompt"),
    [(2, "all", True), (3, TUNED, True), (4, "all", True), (2, TUNED, False), (3, "all", False)],
)
def test_one_backward_reaches_every_trainable_parameter(num_classes, train, mask_prompt):
    guide, _ = build_sam_guide(
        "vit_tiny", image_size=64, num_classes=num_classes, tuning=ADAPTER, mask_prompt=mask_prompt, train=train
    )
    images, coarse = inputs(2, num_classes, 64)
    guide(images, coarse if mask_prompt else None).sum().backward()
    without = [n for n, p in guide.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []
    assert all(p.grad.isfinite().all() for p in guide.parameters() if p.requires_grad)
    with_gradient = [n for n, p in guide.named_parameters() if not p.requires_grad and p.grad is not None]
    assert with_gradient == []


@pytest.mark.parametrize("prompt", [{"sparse": False}, {"dense": False}, {"sparse": False, "dense": False}])
def test_prompt_switches_leave_nothing_unused(prompt):
    guide, _ = build_sam_guide("vit_tiny", image_size=64, prompt=prompt)
    guide(*inputs(2, 2, 64)).sum().backward()
    assert [n for n, p in guide.named_parameters() if p.requires_grad and p.grad is None] == []


def test_a_step_moves_what_is_tuned_and_nothing_else():
    tuning = {**ADAPTER, "zero_init": False}
    guide, _ = build_sam_guide("vit_tiny", image_size=64, num_classes=3, tuning=tuning, train=TUNED)
    images, coarse = inputs(2, 3, 64)
    before = {name: p.detach().clone() for name, p in guide.named_parameters()}
    optimizer = torch.optim.SGD([p for p in guide.parameters() if p.requires_grad], lr=1.0)
    guide(images, coarse)[:, 0].square().mean().backward()
    zero = [n for n, p in guide.named_parameters() if p.requires_grad and not p.grad.any() and "adapters" in n]
    assert zero == []
    optimizer.step()
    for name, parameter in guide.named_parameters():
        tuned = ".adapters." in name or name.startswith("prompt_generator.")
        assert parameter.requires_grad == tuned, name
        if not tuned:
            assert torch.equal(parameter, before[name]), name


def test_mask_prompt_carries_no_gradient_but_matters():
    guide, _ = build_sam_guide("vit_tiny", image_size=64)
    guide.eval()
    images, coarse = inputs(1, 2, 64)
    coarse.requires_grad_()
    logits = guide(images, coarse)
    logits.sum().backward()
    assert coarse.grad is None
    assert not torch.equal(logits, guide(images, coarse + 5))
    assert not torch.equal(logits, guide(images))
    ablated, _ = build_sam_guide("vit_tiny", image_size=64, mask_prompt=False)
    ablated.eval()
    assert torch.equal(ablated(images, coarse), ablated(images))


# --- adapters ---


@torch.no_grad()
def test_zero_initialised_adapters_change_nothing():
    guide, _ = build_sam_guide("vit_tiny", image_size=64)
    guide.eval()
    batch = inputs(2, 2, 64)
    before = guide(*batch)
    add_adapters(guide.sam.image_encoder, guide.sam.mask_decoder)
    assert (guide(*batch) - before).abs().max() < 1e-6
    for module in guide.modules():
        if isinstance(module, Adapter):
            nn.init.normal_(module.fc2.weight, std=0.1)
    assert (guide(*batch) - before).abs().max() > 1e-3


def test_adapters_sit_where_they_should():
    """By hand: what each place sees, how often, and with what scale."""
    guide, _ = build_sam_guide(
        "vit_tiny", image_size=64, num_classes=3, tuning={**ADAPTER, "ratio": 0.5, "scale": 0.25}
    )
    block = guide.sam.image_encoder.blocks[0]  # a windowed block: no padding of the 4 x 4 tokens to 14 x 14 is computed
    (serial,), (parallel,) = block.attached("post_attention"), block.attached("parallel_mlp")
    assert (serial.skip, serial.scale, serial.fc1.out_features) == (True, 1.0, 48)
    assert (parallel.skip, parallel.scale) == (False, 0.25)
    seen: dict[nn.Module, list] = {m: [] for m in guide.modules() if isinstance(m, Adapter)}
    for module, shapes in seen.items():
        module.register_forward_hook(lambda m, args, out, shapes=shapes: shapes.append(tuple(args[0].shape)))
    guide(*inputs(2, 3, 64))
    assert seen[serial] == [(2, 4, 4, 96)] and seen[parallel] == [(2, 4, 4, 96)]
    assert seen[guide.sam.image_encoder.blocks[1].adapters["post_attention"][0]] == [(2, 4, 4, 96)]
    tokens, image = (6, 7, 64), (6, 16, 64)
    for layer in guide.sam.mask_decoder.transformer.layers:
        assert seen[layer.adapters["post_attention"][0]] == [tokens, tokens, image]
        assert seen[layer.adapters["parallel_mlp"][0]] == [tokens]
    assert seen[guide.sam.mask_decoder.transformer.adapters["post_attention"][0]] == [tokens]
    assert all(seen.values())  # none that never runs


@torch.no_grad()
def test_adapter_formula():
    serial, parallel = Adapter(6, 2, skip=True, zero_init=False), Adapter(6, 2, scale=0.5, zero_init=False)
    x = torch.randn(3, 6)
    for module, skip, scale in ((serial, 1, 1), (parallel, 0, 0.5)):
        hidden = nn.functional.gelu(x @ module.fc1.weight.T + module.fc1.bias)
        expected = skip * x + scale * (hidden @ module.fc2.weight.T + module.fc2.bias)
        assert torch.allclose(module(x), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "present", "absent"),
    [
        ({"encoder_adapters": False}, "mask_decoder", "image_encoder"),
        ({"decoder_adapters": False}, "image_encoder", "mask_decoder"),
    ],
)
def test_adapters_of_one_side(options, present, absent):
    guide = meta_guide("vit_tiny", tuning={**ADAPTER, **options})
    assert count(getattr(guide.sam, present), "adapters.") and not count(getattr(guide.sam, absent), "adapters.")


# --- decoding ---


@torch.no_grad()
def test_all_classes_at_once_equal_one_by_one():
    guide, _ = build_sam_guide("vit_tiny", image_size=64, num_classes=3)
    guide.eval()
    images, coarse = inputs(2, 3, 64)
    together = guide(images, coarse)
    embedding = guide.encode(images)
    made = guide.prompt_generator(embedding.image)
    for k in range(3):
        one = slice(k, k + 1)
        prompts = Prompts(sparse=made.sparse[:, one], dense=made.dense[:, one], masks=coarse[:, one])
        alone = guide.sam.decode(embedding, prompts, 64)
        torch.testing.assert_close(together[:, one], alone.logits[:, :, 0], rtol=0, atol=1e-5)
    assert not torch.allclose(together[:, 0], together[:, 1])


@torch.no_grad()
def test_encode_then_decode_is_forward():
    guide, _ = build_sam_guide("vit_tiny", image_size=64)
    guide.eval()
    images, coarse = inputs(2, 2, 64)
    embedding = guide.encode(images)
    assert embedding.image.shape == (2, 64, 4, 4)
    assert torch.equal(guide.decode(embedding, coarse), guide(images, coarse))
    assert guide.decode(embedding, size=(30, 50)).shape == (2, 2, 30, 50)
    assert guide.decode(embedding, coarse, size=40).shape == (2, 2, 40, 40)
    for first in (1, 0):  # the first images only; there may be none
        found = guide.decode(embedding, coarse, first=first)
        torch.testing.assert_close(found, guide(images, coarse)[:first], rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_mask_embedding_is_what_is_decoded():
    guide, _ = build_sam_guide("vit_tiny", image_size=64)
    guide.eval()
    images, coarse = inputs(2, 2, 64)
    embedding = guide.encode(images)
    embedded = guide.embed_masks(embedding, coarse)
    assert embedded.shape == (2, 2, 64, 4, 4)
    made = guide.prompt_generator(embedding.image)
    no_mask = guide.embed_masks(embedding, None)
    assert no_mask.shape == (1, 1, 64, 1, 1)
    prompts = Prompts(sparse=made.sparse, dense=made.dense + embedded - no_mask)
    torch.testing.assert_close(
        guide.sam.decode(embedding, prompts).logits.squeeze(2), guide(images, coarse), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("size", [32, 80, 144])
def test_sizes(size):
    guide, _ = build_sam_guide("vit_tiny", image_size=size, tuning=ADAPTER)
    images, coarse = inputs(1, 2, size)  # a single image, BatchNorm in train mode
    for mask in (coarse[..., : size // 2], None):
        logits = guide(images, mask)
        assert logits.shape == (1, 2, size, size) and logits.isfinite().all()


def test_bfloat16_autocast_is_finite_and_close():
    guide, _ = build_sam_guide("vit_tiny", image_size=64, tuning=ADAPTER)
    guide.prompt_generator.eval()
    images, coarse = inputs(2, 2, 64)
    with torch.autocast("cpu", torch.bfloat16):
        logits = guide(images, coarse)
    assert logits.dtype == torch.float32 and logits.isfinite().all()
    logits.sum().backward()
    assert all(p.grad.isfinite().all() for p in guide.parameters() if p.requires_grad)
    exact = guide(images, coarse)
    assert (logits - exact).abs().max() < 0.1 * exact.abs().max()


# --- prompt generator ---


@pytest.mark.parametrize("grid", [2, 4, 5, 16])
@pytest.mark.parametrize(("sparse", "dense"), [(True, True), (True, False), (False, True), (False, False)])
def test_prompt_shapes(grid, sparse, dense):
    generator = PromptGenerator(3, embed_dim=16, tokens=5, sparse=sparse, dense=dense, dense_width=8)
    made = generator(torch.randn(1, 16, grid, grid))
    tokens, maps = made.sparse, made.dense
    assert made.count == 3 and tokens.shape == (1, 3, 5 if sparse else 0, 16)
    if dense:
        assert maps.shape == (1, 3, 16, grid, grid) and not maps.any()  # zero at the start
    else:
        assert maps is None


def test_sparse_head_pools_twice_at_sixteen():
    generator = PromptGenerator(1, embed_dim=8, dense=False)
    sides = []
    for conv in generator.sparse_heads[0].convs:
        conv.register_forward_hook(lambda m, args, out: sides.append(out.shape[-1]))
    generator(torch.randn(2, 8, 16, 16))
    assert sides == [16, 8, 8, 4]


# --- prompts of one's own ---


class Corners(nn.Module):
    """Every class by a box of the whole image and a point."""

    def __init__(self, num_classes, side):
        super().__init__()
        self.num_classes, self.side = num_classes, side

    def forward(self, image_embedding):
        shape = len(image_embedding), self.num_classes
        points = torch.full((*shape, 1, 2), self.side / 2)
        boxes = torch.tensor([0.0, 0, self.side - 1, self.side - 1]).expand(*shape, 4)
        return Prompts(points=points, labels=torch.ones(shape)[..., None], boxes=boxes)


def test_a_generator_may_give_points_and_boxes():
    guide, _ = build_sam_guide("vit_tiny", image_size=64)
    whole = SamGuide(guide.sam, Corners(3, 64), 3, freeze=False)
    images, coarse = inputs(2, 3, 64)
    assert whole(images, coarse).shape == (2, 3, 64, 64)


@pytest.mark.parametrize(
    ("made", "error", "words"),
    [
        ((None, None), TypeError, "gave a tuple; a prompt generator gives Prompts"),
        (Prompts(sparse=torch.zeros(1, 3, 2, 64)), ValueError, "gave 3 prompts an image; there are 2 classes"),
    ],
)
def test_a_generator_that_gives_something_else(made, error, words):
    guide, _ = build_sam_guide("vit_tiny", image_size=64)
    guide.prompt_generator.forward = lambda image: made
    with pytest.raises(error, match=words):
        guide(*inputs(1, 2, 64))


def test_shapes_that_do_not_fit():
    guide, _ = build_sam_guide("vit_tiny", image_size=64)
    images, coarse = inputs(2, 2, 64)
    with pytest.raises(ValueError, match=r"expected \(B, K, h, w\) with B = 2, K = 2"):
        guide(images, coarse[:, :1])
    with pytest.raises(ValueError, match="built for 3"):
        SamGuide(guide.sam, PromptGenerator(3), 2)
    with pytest.raises(ValueError, match="num_classes is 0"):
        SamGuide(guide.sam, PromptGenerator(3), 0)


def test_parts_compile_without_a_break():
    guide, _ = build_sam_guide("vit_tiny", image_size=64, tuning=ADAPTER)
    images, coarse = inputs(2, 2, 64)
    guide.eval()
    expected = guide(images, coarse)
    for part in guide.compilable():
        part.compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(guide(images, coarse), expected)
