"""The published SAM: blocks against hand-written passes, official tensors it drops, what it trains and starts from."""

import pytest
import torch
import torch.nn.functional as F
from compat_lab import keyed, small_config

from knowsam import build
from knowsam.compat.sam import PaddedFirstBlock, PaddedFirstEncoder, mask_decoder, sam_blocks
from knowsam.errors import CheckpointError
from knowsam.models.sam import build_sam
from knowsam.models.sam.encoder import SamBlock
from knowsam.models.sam.mask_decoder import SamMaskDecoder
from knowsam.models.tuning.adapter import Adapter

MLPS = "mask_decoder.transformer.layers"


def fill(module):
    module.load_state_dict({key: keyed(key, tensor) for key, tensor in module.state_dict().items()})
    return module.eval()


@torch.no_grad()
def test_windows_are_padded_before_the_norm():
    """16 tokens a side in windows of 14: 12 rows and columns of zeros, each normalised to the norm's bias."""
    torch.manual_seed(0)
    block = PaddedFirstBlock(32, 2, window_size=14, grid_size=16, use_rel_pos=False)
    block.attach("post_attention", Adapter(32, 8, skip=True, zero_init=False))
    fill(block)
    x = torch.randn(2, 16, 16, 32)
    padded = F.pad(x, (0, 0, 0, 12, 0, 12))  # (2, 28, 28, 32)
    expected = torch.zeros_like(padded)
    for top in (0, 14):
        for left in (0, 14):
            tokens = F.layer_norm(
                padded[:, top : top + 14, left : left + 14], (32,), block.norm1.weight, block.norm1.bias, 1e-6
            )
            q, k, v = block.attn.qkv(tokens.flatten(1, 2)).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
            attended = ((q @ k.transpose(-2, -1)) * 16**-0.5).softmax(-1) @ v
            attended = block.attn.proj(attended.transpose(1, 2).flatten(2)).unflatten(1, (14, 14))
            (adapter,) = block.attached("post_attention")
            expected[:, top : top + 14, left : left + 14] = attended + adapter.fc2(F.gelu(adapter.fc1(attended)))
    torch.testing.assert_close(block.attention(x), expected[:, :16, :16], rtol=1e-5, atol=1e-5)
    ours = fill(SamBlock(32, 2, window_size=14, grid_size=16, use_rel_pos=False))
    assert (
        fill(PaddedFirstBlock(32, 2, window_size=14, grid_size=16, use_rel_pos=False))(x) - ours(x)
    ).abs().max() > 0.01


@torch.no_grad()
def test_a_block_that_sees_all_tokens_is_the_same():
    x = torch.randn(1, 8, 8, 32)
    blocks = [fill(kind(32, 2, window_size=0, grid_size=8)) for kind in (SamBlock, PaddedFirstBlock)]
    torch.testing.assert_close(blocks[0](x), blocks[1](x), rtol=0, atol=0)


@torch.no_grad()
def test_decoder_equals_a_hand_written_pass():
    """Both blocks, the positions that stay in the second, one adapter for three attentions, the last one twice."""
    torch.manual_seed(0)
    decoder = mask_decoder(first_residual=True, positions_stay=True, adapter_twice=True, freeze_mlps=True)
    transformer = decoder.transformer
    for block in transformer.layers:
        block.attach("post_attention", Adapter(256, 64, skip=True, zero_init=False))
        block.attach("parallel_mlp", Adapter(256, 64, scale=0.5, zero_init=False))
    transformer.attach("post_attention", Adapter(256, 64, skip=True, zero_init=False))
    fill(decoder)
    image, image_pe, start = torch.randn(2, 256, 4, 4), torch.randn(2, 256, 4, 4), torch.randn(2, 7, 256)

    def serial(adapter, x):
        return x + adapter.fc2(F.gelu(adapter.fc1(x)))

    keys, key_pe, tokens = image.flatten(2).transpose(1, 2), image_pe.flatten(2).transpose(1, 2), start
    for index, block in enumerate(transformer.layers):
        (same,), (beside,) = block.attached("post_attention"), block.attached("parallel_mlp")
        tokens = tokens if index == 0 else tokens + start
        tokens = block.norm1(tokens + serial(same, block.self_attn(q=tokens, k=tokens, v=tokens)))
        found = block.cross_attn_token_to_image(q=tokens + start, k=keys + key_pe, v=keys)
        tokens = block.norm2(tokens + serial(same, found))
        mlp = block.mlp.lin2(F.relu(block.mlp.lin1(tokens)))
        tokens = block.norm3(tokens + mlp + 0.5 * beside.fc2(F.gelu(beside.fc1(tokens))))
        found = block.cross_attn_image_to_token(q=keys + key_pe, k=tokens + start, v=tokens)
        keys = block.norm4(keys + serial(same, found))
    (last,) = transformer.attached("post_attention")
    found = transformer.final_attn_token_to_image(q=tokens + start, k=keys + key_pe, v=keys)
    tokens = serial(last, transformer.norm_final_attn(tokens + serial(last, found)))

    ours, ours_keys = transformer(image, image_pe, start)
    torch.testing.assert_close(ours, tokens, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours_keys, keys, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_decoder_without_its_peculiarities_is_ours():
    published = fill(mask_decoder())
    ours = fill(SamMaskDecoder())
    inputs = (
        torch.randn(2, 256, 4, 4),
        torch.randn(1, 256, 4, 4),
        torch.randn(2, 3, 2, 256),
        torch.randn(2, 3, 256, 4, 4),
    )
    torch.testing.assert_close(published(*inputs).low_res, ours(*inputs).low_res, rtol=0, atol=0)


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """A file of segment-anything's format for the tiny encoder, all values by name."""
    with torch.device("meta"):
        sam, _ = build_sam({"name": "vit_tiny", "out_channels": 256}, image_size=1024)
    path = tmp_path_factory.mktemp("official") / "sam.pth"
    state = {key: keyed(key, torch.empty(t.shape)) for key, t in sam.state_dict().items()}
    torch.save(state, path)
    return path, state


def guide_of(published_code, path):
    config = small_config(published_code)
    config.sam |= {"weights": str(path), "prompt": {"sparse": False}}
    built = build.build_method(config)
    return built.method.sam_teacher.guide, built.load_report


def test_official_tensors_that_are_dropped(official):
    """24 + 8 for ViT-B's 12 blocks; 8 + 8 for the 4 blocks here."""
    path, state = official
    guide, report = guide_of(True, path)
    dropped = [key for key in state if "rel_pos" in key or (key.startswith(MLPS) and ".mlp." in key)]
    assert sorted(report.omitted) == sorted(dropped) and len(dropped) == 16
    assert not report.missing and not report.unexpected
    assert "left out" in str(report) and "16" in str(report)
    own = guide.sam.state_dict()
    assert not any("rel_pos" in key for key in own)
    for key in state:
        if key in own and key not in dropped and "pos_embed" not in key:
            assert torch.equal(own[key], state[key]), key
    mlp = f"{MLPS}.0.mlp.lin1.weight"
    assert not torch.equal(own[mlp], state[mlp]) and own[mlp].abs().sum() > 0
    assert not set(report.declared_new) & set(dropped)


@pytest.mark.parametrize("row", ["no_relative_positions", "random_decoder_mlps"])
def test_each_drops_its_own(official, row):
    path, state = official
    guide, report = guide_of([row], path)
    assert {("rel_pos" in key) for key in report.omitted} == {row == "no_relative_positions"}
    assert len(report.omitted) == 8
    mlp = f"{MLPS}.1.mlp.lin2.bias"
    assert torch.equal(guide.sam.state_dict()[mlp], state[mlp]) == (row != "random_decoder_mlps")


def test_default_loads_everything(official):
    path, state = official
    _, report = guide_of(False, path)
    assert not report.omitted and len(report.loaded) + len(report.resized) == len(state)


def test_what_was_not_declared_still_stops(official, tmp_path):
    _, state = official
    torch.save({key: t for key, t in state.items() if "neck" not in key}, tmp_path / "sam.pth")
    with pytest.raises(CheckpointError, match=r"missing: image_encoder\.neck"):
        guide_of(True, tmp_path / "sam.pth")


def test_decoder_mlps_stay_frozen_even_where_all_is_trained():
    for published_code, trains in ((["random_decoder_mlps"], False), (False, True)):
        config = small_config(published_code)
        config.sam |= {"train": "all", "prompt": {"sparse": False}}
        sam = build.build_method(config).method.sam_teacher.guide.sam
        parameters = [p for name, p in sam.named_parameters() if name.startswith(MLPS) and ".mlp." in name]
        assert len(parameters) == 8 and all(p.requires_grad == trains for p in parameters)


def test_adapters_start_at_random():
    for published_code, zero in ((["random_adapters"], False), (False, True)):
        config = small_config(published_code)
        config.sam |= {"prompt": {"sparse": False}}
        state = build.build_method(config).method.sam_teacher.guide.state_dict()
        last = [tensor for key, tensor in state.items() if ".adapters." in key and ".fc2." in key]
        assert len(last) == 2 * (2 * 4 + 5) and all((tensor.abs().sum() == 0) == zero for tensor in last)


def test_no_rows_change_nothing_of_the_assembly():
    block = {"encoder": {"name": "vit_b"}, "tuning": [{"name": "adapter"}], "train": "auto"}
    assert sam_blocks((), block) == block


def test_rows_as_blocks():
    """Each of the experiment's words stays; names given alone, one tuning alone and defaults are understood."""
    block = {"encoder": {"name": "vit_l", "checkpointing": True}, "prompt": {"tokens": 3}, "tuning": "adapter"}
    rows = ("windows_padded_first", "no_dense_prompt", "random_adapters", "decoder_positions_stay")
    assert sam_blocks(rows, block) == {
        "encoder": {"name": "vit_l", "checkpointing": True, "encoder_type": PaddedFirstEncoder},
        "prompt": {"name": "learned", "tokens": 3, "dense": False},
        "tuning": [{"name": "adapter", "zero_init": False}],
        "decoder": {"name": mask_decoder, "positions_stay": True},
    }
    assert block["tuning"] == "adapter" and block["prompt"] == {"tokens": 3}
    assert sam_blocks(["no_relative_positions"], {})["encoder"] == {"name": "vit_b", "use_rel_pos": False}
    other = [{"name": "lab:lora", "rank": 2}, {"name": "adapter"}]
    assert sam_blocks(["random_adapters"], {"tuning": other})["tuning"][0] == other[0]
    with pytest.raises(ValueError, match=r"SAM's own mask decoder; sam.decoder is 'lab:Decoder'"):
        sam_blocks(["decoder_adapter_twice"], {"decoder": {"name": "lab:Decoder"}})
