"""Assembly by name: tables, parts from outside, what each is offered, what trains, and what is refused."""

import textwrap

import pytest
import torch
from sam_lab import OFFICIAL_TINY, ConvEncoder, OneTokenDecoder
from torch import nn

from knowsam import components
from knowsam.models.sam import (
    Prompts,
    Sam,
    SamGuide,
    SamImageEncoder,
    build_sam,
    build_sam_guide,
    load_trained,
    trained_state,
)
from knowsam.models.tuning import Adapter, add_adapters


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def trains(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def under(names, *prefixes) -> bool:
    return bool(names) and all(name.startswith(prefixes) for name in names)


# --- names ---


@pytest.mark.parametrize("name", components.SAM_ENCODERS)
def test_every_encoder_has_a_name(name):
    with torch.device("meta"):
        sam, _ = build_sam(name, image_size=64)
    encoder = sam.image_encoder
    assert (encoder.stride, encoder.grid) == (16, 4) and encoder.out_channels == sam.mask_decoder.transformer_dim


@pytest.mark.parametrize(
    ("width", "depth", "heads", "global_blocks", "channels", "name"),
    [
        (768, 12, 12, (2, 5, 8, 11), 256, "vit_b"),
        (1024, 24, 16, (5, 11, 17, 23), 256, "vit_l"),
        (1280, 32, 16, (7, 15, 23, 31), 256, "vit_h"),
        (96, 4, 3, (1, 3), 64, "vit_tiny"),
        (192, 4, 3, (1, 3), 96, "vit_small"),
    ],
)
def test_sizes(width, depth, heads, global_blocks, channels, name):
    with torch.device("meta"):
        encoder = build_sam(name, image_size=64)[0].image_encoder
    assert (encoder.width, len(encoder.blocks), encoder.out_channels) == (width, depth, channels)
    assert {block.attn.num_heads for block in encoder.blocks} == {heads}
    assert tuple(i for i, block in enumerate(encoder.blocks) if block.window_size == 0) == global_blocks


def test_a_size_of_ones_own():
    sizes = {"width": 48, "depth": 2, "heads": 4, "global_blocks": [1], "window": 3, "out_channels": 32, "taps": [0]}
    sam, _ = build_sam({"name": "sam_vit", **sizes}, image_size=80)
    assert sam.image_encoder.width == 48 and sam.embed_dim == 32
    embedding = sam.encode(torch.rand(1, 3, 80, 80))
    assert embedding.image.shape == (1, 32, 5, 5) and embedding.taps[0].shape == (1, 48, 5, 5)


def test_a_bare_name_a_class_and_a_block_are_the_same():
    made = []
    for decoder, tuning in (
        ("sam", "adapter"),
        ({"name": "sam"}, {"name": "adapter"}),
        (components.load(components.SAM_DECODERS["sam"]), [add_adapters]),
        ({}, ({"name": add_adapters},)),
    ):
        torch.manual_seed(3)
        made.append(build_sam_guide("vit_tiny", decoder, tuning=tuning, image_size=64)[0].state_dict())
    for state in made[1:]:
        assert state.keys() == made[0].keys() and all(torch.equal(state[key], made[0][key]) for key in state)


LAB = """
import torch
from torch import nn
from knowsam.models.sam import Prompts, SamMaskDecoder
from knowsam.models.tuning import Adapter

class Encoder(nn.Module):
    stride, in_channels = 4, 2

    def __init__(self, image_size, in_channels, channels=16):
        super().__init__()
        self.grid, self.out_channels, self.seen = image_size // 4, channels, in_channels
        self.conv = nn.Conv2d(2, channels, 4, stride=4)

    def forward(self, images):
        return self.conv(images)

def decoder(embed_dim, image_size, num_classes, note):
    made = SamMaskDecoder(embed_dim=embed_dim)
    made.seen = (image_size, num_classes, note)
    return made

class Fixed(nn.Module):
    def __init__(self, num_classes, embed_dim, tokens=1):
        super().__init__()
        self.tokens = nn.Parameter(torch.zeros(num_classes, tokens, embed_dim))

    def forward(self, image):
        return Prompts(sparse=self.tokens.expand(len(image), -1, -1, -1))

def tune(sam, encoder, mask_decoder, embed_dim, hidden=4):
    assert sam.image_encoder is encoder and sam.mask_decoder is mask_decoder
    mask_decoder.transformer.attach("post_attention", Adapter(embed_dim, hidden))
"""


def test_parts_from_outside_get_what_they_ask_for(tmp_path, monkeypatch):
    (tmp_path / "sam_lab_outside.py").write_text(textwrap.dedent(LAB))
    monkeypatch.syspath_prepend(tmp_path)
    guide, report = build_sam_guide(
        {"name": "sam_lab_outside:Encoder", "channels": 24},
        {"name": "sam_lab_outside:decoder", "note": "hello"},
        {"name": "sam_lab_outside:Fixed", "tokens": 3},
        [{"name": "sam_lab_outside:tune", "hidden": 2}, "sam_lab_outside:tune"],
        image_size=32,
        num_classes=3,
        in_channels=2,
        train=["tuning", "prompt"],
        pixel_mean=[0.0, 0.0],
        pixel_std=[255.0, 255.0],
    )
    assert guide.sam.image_encoder.seen == 2 and guide.sam.mask_decoder.seen == (32, 3, "hello")
    assert guide.prompt_generator.tokens.shape == (3, 3, 24)
    hidden = [module.fc1.out_features for module in guide.sam.mask_decoder.transformer.attached("post_attention")]
    assert hidden == [2, 4]
    assert guide(torch.rand(2, 2, 32, 32), torch.randn(2, 3, 32, 32)).shape == (2, 3, 32, 32)
    assert under(trains(guide), "sam.mask_decoder.transformer.adapters.", "prompt_generator.tokens")
    assert "prompt_generator.tokens" in report.declared_new


def test_a_generator_is_as_wide_as_an_encoder_that_tells_its_width_late():
    def encoder(image_size):
        return ConvEncoder(image_size, 3, channels=40)

    guide, _ = build_sam_guide(encoder, image_size=64, prompt={"sparse": False})
    assert guide.prompt_generator.embed_dim == 40
    assert guide(torch.rand(1, 3, 64, 64)).shape == (1, 2, 64, 64)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"encoder": "vit_tinny"}, ValueError, "unknown encoder 'vit_tinny'; did you mean 'vit_tiny'"),
        (
            {"encoder": "zzz"},
            ValueError,
            "unknown encoder 'zzz'; there are vit_b, vit_l, .* and module:name of your own",
        ),
        ({"encoder": "no_such_lab:Encoder"}, ValueError, "encoder 'no_such_lab:Encoder' cannot be imported: No module"),
        ({"decoder": "knowsam.models.sam:Decoder"}, ValueError, "decoder .* cannot be imported: .* no attribute"),
        ({"encoder": {"name": "vit_tiny", "depth": 3}}, TypeError, "vit_tiny: it has no parameter 'depth'"),
        ({"image_size": 250}, ValueError, "multiple of 16"),
        ({"num_classes": 0}, ValueError, "num_classes is 0"),
        (
            {"train": "tuned"},
            ValueError,
            "allowed: auto, all, or a list of encoder, prompt_encoder, decoder, tuning, pro",
        ),
        ({"train": ["tunning"]}, ValueError, "train is .'tunning'.; allowed: auto, all"),
        ({"tuning": "lorra"}, ValueError, "unknown tuning 'lorra'"),
        ({"tuning": {"ratio": 0.5}}, ValueError, "unknown tuning None; there are adapter"),
        ({"tuning": {"name": "adapter", "ratoi": 0.5}}, TypeError, "add_adapters: it has no parameter 'ratoi'"),
        ({"tuning": {"name": "adapter", "ratio": 0}}, ValueError, "ratio is 0"),
        (
            {"tuning": {"name": "adapter", "encoder_adapters": False, "decoder_adapters": False}},
            ValueError,
            "both off",
        ),
        ({"prompt": {"token": 2}}, TypeError, "it has no parameter 'token'"),
        ({"prompt": {"tokens": 0}}, ValueError, "tokens 0"),
        ({"prompt": {"dropout": 1.0}}, ValueError, "dropout is 1.0"),
        ({"prompt": {"sparse": False, "dense": False}, "mask_prompt": False}, ValueError, "same logits"),
        ({"pixel_mean": (0.0, 0.0)}, ValueError, "3 in all"),
        ({"pixel_std": (1.0, 0.0, 1.0)}, ValueError, "must be above 0"),
    ],
)
def test_impossible_values(options, error, words):
    with torch.device("meta"), pytest.raises(error, match=words):
        build_sam_guide(**{"encoder": "vit_tiny", "image_size": 64, **options})


def test_sam_alone_has_no_prompt_to_train():
    with pytest.raises(ValueError, match=r"a list of encoder, prompt_encoder, decoder, tuning$"):
        build_sam("vit_tiny", image_size=64, train=["prompt"])


# --- random state ---


@pytest.mark.parametrize("build", [build_sam, build_sam_guide])
def test_building_leaves_the_random_state_and_follows_it(build):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, _ = build("vit_tiny", image_size=64, tuning="adapter")
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(1)
    other, _ = build("vit_tiny", image_size=64, tuning="adapter")
    torch.manual_seed(5)
    again, _ = build("vit_tiny", image_size=64, tuning="adapter")
    same = [torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True)]
    assert all(same) and not all(map(torch.equal, first.parameters(), other.parameters()))


def test_the_prompt_generator_is_drawn_first():
    """Runs that are repeated rely on the order: prompt generator, encoder, prompt encoder, decoder, tunings."""
    guide, _ = build_sam_guide(OFFICIAL_TINY, image_size=64, tuning={"name": "adapter", "zero_init": False})
    torch.manual_seed(0)
    sparse = guide.prompt_generator.sparse_heads[0].convs[0][0]
    assert torch.equal(sparse.weight, nn.Conv2d(256, 256, 3, padding=1).weight)
    torch.manual_seed(0)
    type(guide.prompt_generator)(2)
    encoder = SamImageEncoder(image_size=64, width=96, depth=4, heads=3, global_blocks=(1, 3))
    assert torch.equal(encoder.blocks[3].attn.qkv.weight, guide.sam.image_encoder.blocks[3].attn.qkv.weight)


# --- what trains ---


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """A file of segment-anything's format for a small encoder."""
    path = tmp_path_factory.mktemp("official") / "sam.pth"
    torch.save(build_sam("vit_tiny", image_size=64)[0].state_dict(), path)
    return path


def test_auto(official):
    random, _ = build_sam_guide("vit_tiny", image_size=64)
    assert "sam.image_encoder.patch_embed.proj.weight" in trains(random)
    loaded, _ = build_sam_guide("vit_tiny", image_size=64, weights=official, tuning="adapter")
    assert {name for name in trains(loaded) if not name.startswith("prompt_generator.")}
    assert trains(loaded) == {
        name for name, _ in loaded.named_parameters() if ".adapters." in name or name.startswith("prompt_generator.")
    }
    whole, _ = build_sam_guide("vit_tiny", image_size=64, weights=official, train="all")
    assert trains(whole) == trains(random)
    with pytest.warns(UserWarning, match="nothing of SAM is trainable"):
        build_sam_guide("vit_tiny", image_size=64, weights=official, prompt={"sparse": False, "dense": False})


def test_auto_of_sam_alone(official):
    assert trains(build_sam("vit_tiny", image_size=64)[0])
    assert not trains(build_sam("vit_tiny", image_size=64, weights=official)[0])
    tuned, _ = build_sam("vit_tiny", tuning="adapter", weights=official, image_size=64)
    assert trains(tuned) and all(".adapters." in name for name in trains(tuned))


@pytest.mark.parametrize(
    ("train", "prefixes"),
    [
        (["encoder"], ["sam.image_encoder."]),
        (["decoder", "prompt"], ["sam.mask_decoder.", "prompt_generator."]),
        (["prompt_encoder"], ["sam.prompt_encoder.mask_downscaling."]),
        (["tuning"], ["sam.image_encoder.blocks.", "sam.mask_decoder.transformer."]),
        ([], []),
    ],
)
def test_a_list_of_parts(train, prefixes):
    guide, _ = build_sam_guide("vit_tiny", image_size=64, tuning="adapter", train=train)
    found = trains(guide)
    assert found == {
        name
        for name in trains(build_sam_guide("vit_tiny", image_size=64, tuning="adapter")[0])
        if name.startswith(tuple(prefixes)) and (train != ["tuning"] or ".adapters." in name)
    }
    assert bool(found) == bool(train)


def test_tuning_is_what_no_official_file_holds_wherever_it_is():
    sam, _ = build_sam("vit_tiny", OneTokenDecoder, "adapter", image_size=64, train=["tuning"])
    own = {n for n in trains(sam) if ".adapters." not in n}
    assert own == {"mask_decoder.lesion_token", "mask_decoder.lesion_head.weight", "mask_decoder.lesion_head.bias"}


def test_several_tunings_are_attached_in_order():
    def wide(encoder):
        for block in encoder.blocks:
            block.attach("parallel_mlp", Adapter(encoder.width, 7))

    guide, _ = build_sam_guide("vit_tiny", image_size=64, tuning=[{"name": "adapter", "ratio": 0.5}, wide])
    hidden = [m.fc1.out_features for m in guide.sam.image_encoder.blocks[0].attached("parallel_mlp")]
    assert hidden == [48, 7]


# --- what is saved ---


def built(official, **options):
    arguments = {"weights": official, "tuning": {"name": "adapter", "zero_init": False}, "image_size": 64}
    return build_sam_guide("vit_tiny", **{**arguments, **options})[0]


def test_the_trained_part_is_all_that_is_needed(official):
    torch.manual_seed(1)
    guide = built(official)
    images, coarse = torch.rand(2, 3, 64, 64), torch.randn(2, 2, 64, 64)
    guide(images, coarse)  # moves the running statistics
    state = trained_state(guide)
    frozen = {name for name, p in guide.named_parameters() if not p.requires_grad}
    assert frozen and not frozen & set(state) and set(state) | frozen == set(guide.state_dict())
    assert sum(t.numel() for t in state.values()) < 0.7 * sum(t.numel() for t in guide.state_dict().values())

    torch.manual_seed(2)
    other = built(official)
    load_trained(other, {name: tensor.clone() for name, tensor in state.items()})
    guide.eval(), other.eval()
    assert torch.equal(guide(images, coarse), other(images, coarse))
    load_trained(other.requires_grad_(False), state)  # a frozen one may be given what was trained
    holder = nn.ModuleDict({"teacher": guide})
    assert set(trained_state(holder)) == {f"teacher.{name}" for name in state}


def test_what_is_new_is_kept_even_where_it_does_not_train(official):
    guide = built(official, train=["prompt"])
    assert any(".adapters." in name for name in trained_state(guide))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("prompt_generator.dense_head.0.weight"), "1 missing: prompt_generator.dense_head.0.weight"),
        (lambda s: s.update({"prompt_generator.extra": torch.zeros(1)}), "1 unknown: prompt_generator.extra"),
        (lambda s: s.update({"prompt_generator.dense_head.0.bias": torch.zeros(3)}), "1 of another shape"),
    ],
)
def test_a_state_that_does_not_fit(official, change, words):
    from knowsam.errors import CheckpointError

    guide = built(official)
    before = {name: tensor.clone() for name, tensor in guide.state_dict().items()}
    state = {name: tensor + 1 for name, tensor in trained_state(guide).items()}
    change(state)
    with pytest.raises(CheckpointError, match=words):
        load_trained(guide, state)
    assert all(torch.equal(before[name], tensor) for name, tensor in guide.state_dict().items())


def test_kinds():
    guide, _ = build_sam_guide("vit_tiny", image_size=64)
    sam, _ = build_sam("vit_tiny", image_size=64)
    assert isinstance(guide, SamGuide) and isinstance(sam, Sam) and isinstance(guide.sam, Sam)
    assert guide.image_encoder is guide.sam.image_encoder
    assert sam(torch.rand(1, 3, 64, 64), Prompts()).logits.shape == (1, 1, 1, 64, 64)
