"""The guide: what is trainable, what gradient flows where, counts, adapters, prompts, sizes."""

import pytest
import torch
from torch import nn

from knowsam.models.sam import PromptGenerator, SamGuide, build_sam_guide
from knowsam.models.sam.official import PromptEncoder
from knowsam.models.tuning import Adapter, add_adapters

ADAPTER = {"name": "adapter"}
PARTS = ("image_encoder", "prompt_encoder", "mask_decoder")


def count(module: nn.Module, needle: str = "", trainable: bool = False) -> int:
    return sum(p.numel() for n, p in module.named_parameters() if needle in n and (p.requires_grad or not trainable))


def meta_guide(variant: str = "vit_b", **options) -> SamGuide:
    with torch.device("meta"):
        return build_sam_guide(variant, **options)[0]


def inputs(batch: int, num_classes: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(batch, 3, size, size, generator=generator)
    return images, torch.randn(batch, num_classes, size, size, generator=generator)


# --- counts, official size, no memory ---


@pytest.mark.parametrize(("variant", "expected"), [("vit_b", 93_735_472), ("vit_h", 641_090_608)])
def test_official_counts(variant, expected):
    guide = meta_guide(variant, image_size=1024)
    assert sum(count(getattr(guide, part)) for part in PARTS) == expected


def test_published_counts():
    """KnowSAM's table: 115.65 M, of which 22.0 M trainable, from our parts and what we leave out."""
    guide = meta_guide(image_size=1024, tuning=ADAPTER, prompt={"sparse": True, "dense": False, "tokens": 2})
    encoder_adapters = count(guide.image_encoder, ".adapters.")
    decoder_adapters = count(guide.mask_decoder, "adapters.")
    sparse_head = count(guide.prompt_generator)
    assert encoder_adapters == 24 * (2 * 768 * 192 + 768 + 192) == 7_100_928
    one_decoder_adapter = 2 * 256 * 64 + 256 + 64
    assert decoder_adapters == 5 * one_decoder_adapter == 165_440
    assert sparse_head == 11_156_992

    dead = encoder_adapters // 2 + one_decoder_adapter  # depth adapters in every block, one decoder adapter
    assert dead == 3_550_464 + 33_088
    trainable = encoder_adapters + decoder_adapters + sparse_head + dead
    assert round(trainable / 1e6, 1) == 22.0
    relative_positions = count(guide.image_encoder, "rel_pos")  # the published code has none
    total = 93_735_472 - relative_positions + trainable
    assert round(total / 1e6, 2) == 115.65


def test_dense_head_is_light():
    assert count(PromptGenerator(2, sparse=False)) < 100_000


# --- freezing and flow ---


@pytest.mark.parametrize(
    ("num_classes", "train", "mask_prompt"),
    [(2, "all", True), (3, "tuned", True), (4, "all", True), (2, "tuned", False), (3, "all", False)],
)
def test_one_backward_reaches_every_trainable_parameter(num_classes, train, mask_prompt):
    guide, _ = build_sam_guide("tiny", 64, num_classes, tuning=ADAPTER, mask_prompt=mask_prompt, train=train)
    images, coarse = inputs(2, num_classes, 64)
    guide(images, coarse if mask_prompt else None).sum().backward()
    without = [n for n, p in guide.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []
    assert all(p.grad.isfinite().all() for p in guide.parameters() if p.requires_grad)
    with_gradient = [n for n, p in guide.named_parameters() if not p.requires_grad and p.grad is not None]
    assert with_gradient == []


@pytest.mark.parametrize("prompt", [{"sparse": False}, {"dense": False}, {"sparse": False, "dense": False}])
def test_prompt_switches_leave_nothing_unused(prompt):
    guide, _ = build_sam_guide("tiny", 64, 2, prompt=prompt)
    guide(*inputs(2, 2, 64)).sum().backward()
    assert [n for n, p in guide.named_parameters() if p.requires_grad and p.grad is None] == []


def test_a_step_moves_what_is_tuned_and_nothing_else():
    guide, _ = build_sam_guide("tiny", 64, 3, tuning={**ADAPTER, "zero_init": False}, train="tuned")
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


def test_auto_trains_all_of_a_random_sam_and_the_tuned_part_of_a_loaded_one(tmp_path):
    path = tmp_path / "sam.pth"
    random, _ = build_sam_guide("tiny", 64, prompt={"sparse": False, "dense": False})
    assert random.image_encoder.patch_embed.proj.weight.requires_grad
    torch.save(random.state_dict(), path)
    loaded, _ = build_sam_guide("tiny", 64, weights=path, tuning=ADAPTER)
    names = [n for n, p in loaded.named_parameters() if p.requires_grad]
    assert names and all(".adapters." in n or n.startswith("prompt_generator.") for n in names)
    whole, _ = build_sam_guide("tiny", 64, weights=path, train="all")
    assert whole.image_encoder.patch_embed.proj.weight.requires_grad
    with pytest.warns(UserWarning, match="nothing of SAM is trainable"):
        build_sam_guide("tiny", 64, weights=path, prompt={"sparse": False, "dense": False})


def test_mask_prompt_carries_no_gradient_but_matters():
    guide, _ = build_sam_guide("tiny", 64, 2)
    guide.eval()
    images, coarse = inputs(1, 2, 64)
    coarse.requires_grad_()
    logits = guide(images, coarse)
    logits.sum().backward()
    assert coarse.grad is None
    assert not torch.equal(logits, guide(images, coarse + 5))
    assert not torch.equal(logits, guide(images))
    ablated, _ = build_sam_guide("tiny", 64, 2, mask_prompt=False)
    ablated.eval()
    assert torch.equal(ablated(images, coarse), ablated(images))


# --- adapters ---


@torch.no_grad()
def test_zero_initialised_adapters_change_nothing():
    guide, _ = build_sam_guide("tiny", 64, 2)
    guide.eval()
    batch = inputs(2, 2, 64)
    before = guide(*batch)
    add_adapters(guide.image_encoder, guide.mask_decoder)
    assert (guide(*batch) - before).abs().max() < 1e-6
    for module in guide.modules():
        if isinstance(module, Adapter):
            nn.init.normal_(module.fc2.weight, std=0.1)
    assert (guide(*batch) - before).abs().max() > 1e-3


def test_adapters_sit_where_they_should():
    """By hand: what each place sees, how often, and with what scale."""
    guide, _ = build_sam_guide("tiny", 64, 3, tuning={**ADAPTER, "ratio": 0.5, "scale": 0.25})
    block = guide.image_encoder.blocks[0]  # a windowed block: no padding of the 4 x 4 tokens to 14 x 14 is computed
    serial, parallel = block.adapters["post_attention"], block.adapters["parallel_mlp"]
    assert (serial.skip, serial.scale, serial.fc1.out_features) == (True, 1.0, 48)
    assert (parallel.skip, parallel.scale) == (False, 0.25)
    seen: dict[nn.Module, list] = {m: [] for m in guide.modules() if isinstance(m, Adapter)}
    for module, shapes in seen.items():
        module.register_forward_hook(lambda m, args, out, shapes=shapes: shapes.append(tuple(args[0].shape)))
    guide(*inputs(2, 3, 64))
    assert seen[serial] == [(2, 4, 4, 96)] and seen[parallel] == [(2, 4, 4, 96)]
    assert seen[guide.image_encoder.blocks[1].adapters["post_attention"]] == [(2, 4, 4, 96)]
    tokens, image = (6, 7, 256), (6, 16, 256)
    for layer in guide.mask_decoder.transformer.layers:
        assert seen[layer.adapters["post_attention"]] == [tokens, tokens, image]
        assert seen[layer.adapters["parallel_mlp"]] == [tokens]
    assert seen[guide.mask_decoder.transformer.adapters["post_attention"]] == [tokens]
    assert all(seen.values())  # none that never runs


@torch.no_grad()
def test_adapter_formula():
    serial, parallel = Adapter(6, 2, skip=True, zero_init=False), Adapter(6, 2, scale=0.5, zero_init=False)
    x = torch.randn(3, 6)
    for module, skip, scale in ((serial, 1, 1), (parallel, 0, 0.5)):
        hidden = nn.functional.gelu(x @ module.fc1.weight.T + module.fc1.bias)
        expected = skip * x + scale * (hidden @ module.fc2.weight.T + module.fc2.bias)
        assert torch.allclose(module(x), expected, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("hook", ["pre_block", "post_block"])
def test_outer_block_hooks(hook):
    guide, _ = build_sam_guide("tiny", 64, 2)
    block = guide.image_encoder.blocks[0].eval()
    x = torch.randn(1, 4, 4, 96)
    expected = block(2 * x) if hook == "pre_block" else 2 * block(x)
    block.attach(hook, DoubleIt())
    assert torch.equal(block(x), expected)


class DoubleIt(nn.Module):
    def forward(self, x):
        return 2 * x


@torch.no_grad()
def test_qkv_hook_adds_to_the_projection():
    guide, _ = build_sam_guide("tiny", 64, 2)
    attention = guide.image_encoder.blocks[1].attn
    x, delta = torch.randn(1, 4, 4, 96), nn.Linear(96, 288, bias=False)
    attention.attach("qkv", delta)
    tuned = attention(x)
    del attention.adapters["qkv"]
    attention.qkv.weight += delta.weight
    assert torch.allclose(tuned, attention(x), atol=1e-5)


def test_hooks_refuse():
    guide, _ = build_sam_guide("tiny", 64, 2, tuning=ADAPTER)
    with pytest.raises(ValueError, match="taken by a Adapter"):
        add_adapters(guide.image_encoder, guide.mask_decoder)
    with pytest.raises(ValueError, match="no hook 'elsewhere'; it has pre_block"):
        guide.image_encoder.blocks[0].attach("elsewhere", nn.Identity())


@pytest.mark.parametrize(
    ("options", "present", "absent"),
    [
        ({"encoder_adapters": False}, "mask_decoder", "image_encoder"),
        ({"decoder_adapters": False}, "image_encoder", "mask_decoder"),
    ],
)
def test_adapters_of_one_side(options, present, absent):
    guide = meta_guide("tiny", tuning={**ADAPTER, **options})
    assert count(getattr(guide, present), "adapters.") and not count(getattr(guide, absent), "adapters.")


# --- decoding ---


@torch.no_grad()
def test_all_classes_at_once_equal_one_by_one():
    guide, _ = build_sam_guide("tiny", 64, 3)
    guide.eval()
    images, coarse = inputs(2, 3, 64)
    together = guide(images, coarse)
    embedding = guide.encode(images)
    sparse, dense = guide.prompt_generator(embedding)
    masks = guide.embed_masks(embedding, coarse)
    for k in range(3):
        one = slice(k, k + 1)
        low = guide.mask_decoder(embedding, guide.positions(), sparse[:, one], (masks + dense)[:, one])
        alone = nn.functional.interpolate(low, size=(64, 64), mode="bilinear")
        assert torch.allclose(together[:, one], alone, atol=1e-5)
    assert not torch.allclose(together[:, 0], together[:, 1])


@torch.no_grad()
def test_encode_then_decode_is_forward():
    guide, _ = build_sam_guide("tiny", 64, 2)
    guide.eval()
    images, coarse = inputs(2, 2, 64)
    embedding = guide.encode(images)
    assert embedding.shape == (2, 256, 4, 4)
    assert torch.equal(guide.decode(embedding, coarse), guide(images, coarse))
    assert guide.decode(embedding, size=(30, 50)).shape == (2, 2, 30, 50)
    assert guide.decode(embedding, coarse, size=40).shape == (2, 2, 40, 40)


@pytest.mark.parametrize("size", [32, 80, 144])
def test_sizes(size):
    guide, _ = build_sam_guide("tiny", size, 2, tuning=ADAPTER)
    images, coarse = inputs(1, 2, size)  # a single image, BatchNorm in train mode
    for mask in (coarse[..., : size // 2], None):
        logits = guide(images, mask)
        assert logits.shape == (1, 2, size, size) and logits.isfinite().all()


def test_bfloat16_autocast_is_finite_and_close():
    guide, _ = build_sam_guide("tiny", 64, 2, tuning=ADAPTER)
    guide.prompt_generator.eval()
    images, coarse = inputs(2, 2, 64)
    with torch.autocast("cpu", torch.bfloat16):
        logits = guide(images, coarse)
        assert guide.positions().dtype == torch.float32
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
    tokens, maps = generator(torch.randn(1, 16, grid, grid))
    assert tokens.shape == (1, 3, 5 if sparse else 0, 16)
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


# --- refusals ---


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"variant": "vit_x"}, "unknown variant 'vit_x'; there are vit_b, vit_l, vit_h, tiny, small"),
        ({"image_size": 250}, "multiple of 16"),
        ({"num_classes": 0}, "num_classes is 0"),
        ({"train": "some"}, "allowed: auto, all, tuned"),
        ({"tuning": {"name": "lorra"}}, "unknown tuning 'lorra'"),
        ({"tuning": {"ratio": 0.5}}, "unknown tuning None"),
        ({"tuning": {"name": "adapter", "ratoi": 0.5}}, "has no parameter 'ratoi'; did you mean 'ratio'"),
        ({"tuning": {"name": "adapter", "ratio": 0}}, "ratio is 0"),
        ({"tuning": {"name": "adapter", "encoder_adapters": False, "decoder_adapters": False}}, "both off"),
        ({"prompt": {"token": 2}}, "did you mean 'tokens'"),
        ({"prompt": {"tokens": 0}}, "tokens 0"),
        ({"prompt": {"dropout": 1.0}}, "dropout is 1.0"),
        ({"prompt": {"sparse": False, "dense": False}, "mask_prompt": False}, "same logits"),
        ({"pixel_mean": (0.0, 0.0)}, "three in all"),
        ({"pixel_std": (1.0, 0.0, 1.0)}, "must be above 0"),
    ],
)
def test_impossible_values(options, words):
    with pytest.raises(ValueError, match=words):
        meta_guide(**{"variant": "tiny", "image_size": 64, **options})


def test_shapes_that_do_not_fit():
    guide, _ = build_sam_guide("tiny", 64, 2)
    images, coarse = inputs(2, 2, 64)
    with pytest.raises(ValueError, match=r"expected \(B, K, h, w\) with B = 2, K = 2"):
        guide(images, coarse[:, :1])
    with pytest.raises(ValueError, match="built for 3"):
        SamGuide(
            guide.image_encoder, PromptEncoder(256, (4, 4), (64, 64), 16), guide.mask_decoder, PromptGenerator(3), 2
        )
