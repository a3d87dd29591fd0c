"""Hooks: where modules go, in what order, with windows, and what a second stream sees."""

import pytest
import torch
from sam_lab import VIT_TINY, randomise, worst
from torch import nn

from knowsam.models.sam import SamImageEncoder, build_sam_guide
from knowsam.models.sam.attention import SamAttention
from knowsam.models.sam.official import window_partition, window_unpartition


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def encoder():
    return randomise(SamImageEncoder(image_size=64, **VIT_TINY))


class Times(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return self.factor * x


class Plus(nn.Module):
    def forward(self, x):
        return x + 1


# --- several modules at one hook ---


@torch.no_grad()
@pytest.mark.parametrize("hook", ["pre_block", "post_block"])
def test_outer_hooks_compose_in_order(encoder, hook):
    block = encoder.blocks[0]
    x = torch.randn(1, 4, 4, 96)
    expected = block(2 * x + 1) if hook == "pre_block" else 2 * block(x) + 1
    block.attach(hook, Times(2.0))
    block.attach(hook, Plus())
    torch.testing.assert_close(block(x), expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_post_attention_composes(encoder):
    block = encoder.blocks[1]
    x = torch.randn(1, 4, 4, 96)
    before = block.attention(x)
    block.attach("post_attention", Times(3.0))
    block.attach("post_attention", Plus())
    torch.testing.assert_close(block.attention(x), 3 * before + 1, rtol=0, atol=1e-5)


@torch.no_grad()
def test_parallel_mlps_sum(encoder):
    block = encoder.blocks[1]
    x = torch.randn(1, 4, 4, 96)
    before, normed = block(x), block.norm2(x + block.attention(x))
    block.attach("parallel_mlp", Times(0.5))
    block.attach("parallel_mlp", Times(0.25))
    torch.testing.assert_close(block(x), before + 0.75 * normed, rtol=0, atol=1e-5)


@torch.no_grad()
def test_qkv_sums(encoder):
    attention = encoder.blocks[1].attn
    x = torch.randn(1, 4, 4, 96)
    deltas = [nn.Linear(96, 288, bias=False) for _ in range(2)]
    for delta in deltas:
        attention.attach("qkv", delta)
    tuned = attention(x)
    del attention.adapters["qkv"]
    attention.qkv.weight += deltas[0].weight + deltas[1].weight
    torch.testing.assert_close(tuned, attention(x), rtol=0, atol=1e-5)


def test_names_and_order(encoder):
    encoder.blocks[0].attach("post_attention", nn.Linear(96, 96))
    encoder.blocks[0].attach("post_attention", nn.Linear(96, 96, bias=False))
    encoder.blocks[0].attn.attach("qkv", nn.Linear(96, 288, bias=False))
    assert [name for name in encoder.state_dict() if "adapters" in name] == [
        "blocks.0.attn.adapters.qkv.0.weight",
        "blocks.0.adapters.post_attention.0.weight",
        "blocks.0.adapters.post_attention.0.bias",
        "blocks.0.adapters.post_attention.1.weight",
    ]


def test_decoder_hooks():
    guide, _ = build_sam_guide("vit_tiny", image_size=64)
    layer = guide.sam.mask_decoder.transformer.layers[0].eval()
    queries, keys = torch.randn(1, 5, 64), torch.randn(1, 16, 64)
    positions = torch.randn(1, 5, 64), torch.randn(1, 16, 64)
    layer.attach("parallel_mlp", Times(0.0))
    layer.attach("post_attention", Times(1.0))
    before = layer(queries, keys, *positions)
    layer.attach("parallel_mlp", Plus())
    assert worst(layer(queries, keys, *positions)[0], before[0]) > 0.1
    layer.attach("post_attention", Plus())
    assert worst(layer(queries, keys, *positions)[1], before[1]) > 0.1


@pytest.mark.parametrize(
    ("owner", "hook", "words"),
    [
        ("block", "elsewhere", "SamBlock has no hook 'elsewhere'; it has pre_block, post_attention"),
        ("attn", "pre_block", "SamAttention has no hook 'pre_block'; it has qkv, kv_tokens"),
        ("encoder", "stream", r"Identity has no start\(images, tokens\), which hook 'stream' calls"),
        ("encoder", "pre_block", "SamImageEncoder has no hook 'pre_block'; it has stream"),
    ],
)
def test_refusals(encoder, owner, hook, words):
    owners = {"block": encoder.blocks[0], "attn": encoder.blocks[0].attn, "encoder": encoder}
    with pytest.raises(ValueError, match=words):
        owners[owner].attach(hook, nn.Identity())


# --- key-value tokens ---


class Prefix(nn.Module):
    """Tokens of its own, the same for all images, or made of each image."""

    def __init__(self, heads, count, channels, of_image=False):
        super().__init__()
        self.keys = nn.Parameter(torch.randn(heads, count, channels))
        self.values = nn.Parameter(torch.randn(heads, count, channels))
        self.of_image = of_image

    def forward(self, x):
        if not self.of_image:
            return self.keys, self.values
        mean = x.mean(dim=(1, 2, 3)).view(-1, 1, 1, 1)  # (B, 1, 1, 1)
        return self.keys * mean, self.values + mean


def by_hand(attention: SamAttention, x, prefixes, window):
    """Attention with padded windows and an explicit bias, every window with the prefix of its image."""
    windows, padded = window_partition(x, window) if window else (x, x.shape[1:3])
    side = windows.shape[1:3]
    qkv = attention.qkv(windows.flatten(1, 2)).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)  # (N, heads, hw, c)
    bias = torch.zeros(*q.shape[:3], q.shape[2])
    if attention.use_rel_pos:
        place = [torch.arange(n)[:, None] - torch.arange(n)[None, :] + n - 1 for n in side]
        grid = q.unflatten(2, side)
        rows = torch.einsum("nhijc,ikc->nhijk", grid, attention.rel_pos_h[place[0]])
        columns = torch.einsum("nhijc,jkc->nhijk", grid, attention.rel_pos_w[place[1]])
        bias = (rows[..., :, None] + columns[..., None, :]).flatten(4).flatten(2, 3)
    logits = attention.scale * q @ k.transpose(-1, -2) + bias
    for prefix in prefixes:
        keys, values = prefix(x)
        many = len(windows) // len(x)
        keys, values = (t.expand(len(x), -1, -1, -1).repeat_interleave(many, 0) for t in (keys, values))
        logits = torch.cat([logits, attention.scale * q @ keys.transpose(-1, -2)], -1)
        v = torch.cat([v, values], 2)
    out = (logits.softmax(-1) @ v).transpose(1, 2).flatten(2).unflatten(1, side)
    out = attention.proj(out)
    return window_unpartition(out, window, padded, x.shape[1:3]) if window else out


@pytest.mark.parametrize("of_image", [False, True])
@pytest.mark.parametrize("use_rel_pos", [True, False])
@pytest.mark.parametrize(("image_size", "window"), [(64, 0), (64, 14), (256, 14), (320, 14)])
@torch.no_grad()
def test_key_value_tokens(image_size, window, use_rel_pos, of_image):
    """A part of a window, whole windows beside parts, the whole grid: padding and tokens take part in one softmax."""
    encoder = randomise(SamImageEncoder(image_size=image_size, use_rel_pos=use_rel_pos, **VIT_TINY))
    attention = encoder.blocks[0 if window else 1].attn
    prefixes = [Prefix(3, 2, 32, of_image), Prefix(3, 1, 32)]
    x = torch.randn(2, image_size // 16, image_size // 16, 96)
    before = attention(x, window)
    assert worst(before, by_hand(attention, x, [], window)) < 1e-5
    for prefix in prefixes:
        attention.attach("kv_tokens", prefix)
    found = attention(x, window)
    assert worst(found, by_hand(attention, x, prefixes, window)) < 1e-5
    assert worst(found, before) > 1e-3  # a hundred times the tolerance


def test_key_value_tokens_learn():
    encoder = SamImageEncoder(image_size=256, **VIT_TINY)
    prefix = Prefix(3, 2, 32)
    encoder.blocks[0].attn.attach("kv_tokens", prefix)
    encoder(torch.randn(2, 3, 256, 256)).square().mean().backward()
    assert all(p.grad.abs().sum() > 0 for p in prefix.parameters())


# --- taps ---


@torch.no_grad()
def test_taps_are_the_blocks_outputs(encoder):
    seen = {}
    for index, block in enumerate(encoder.blocks):
        block.register_forward_hook(lambda _, __, out, index=index: seen.update({index: out}))
    images = torch.randn(1, 3, 64, 64)
    plain = encoder(images)
    encoder.tap((0, 3))
    embedding, taps = encoder(images)
    assert torch.equal(embedding, plain) and taps.keys() == {0, 3}
    for index, tap in taps.items():
        assert torch.equal(tap, seen[index].permute(0, 3, 1, 2)) and tap.shape == (1, 96, 4, 4)
    encoder.tap((1, 3))
    assert encoder.taps == (0, 1, 3)
    built = SamImageEncoder(image_size=64, taps=(2,), **VIT_TINY)
    assert built(images)[1].keys() == {2}
    for wrong in ((4,), (-1,)):
        with pytest.raises(ValueError, match=r"go beyond the blocks 0..3"):
            encoder.tap(wrong)


# --- a second stream ---


class Stream(nn.Module):
    """Tokens of the reversed image through the same embedding, moved on before each block and added to the first."""

    def __init__(self, encoder):
        super().__init__()
        self.embed = [encoder.patch_embed]  # not its own parameter
        self.move = nn.Linear(96, 96)
        self.calls = []

    def start(self, images, tokens):
        assert images.shape[1:] == (3, 64, 64) and tokens.shape[1:] == (4, 4, 96)
        return self.embed[0](images.flip(-1))

    def forward(self, tokens, state, index):
        self.calls.append(index)
        state = state + self.move(state)
        return tokens + 0.1 * state, state


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_stream_has_its_turn_before_every_block_and_after_the_last(checkpointing):
    encoder = SamImageEncoder(image_size=64, checkpointing=checkpointing, **VIT_TINY)
    stream = Stream(encoder)
    encoder.attach("stream", stream)
    images = torch.randn(2, 3, 64, 64)
    found = encoder(images)

    x = encoder.patch_embed(images) + encoder.pos_embed
    other = encoder.patch_embed(images.flip(-1))
    for index in range(5):
        other = other + stream.move(other)
        x = x + 0.1 * other
        x = encoder.blocks[index](x) if index < 4 else x
    torch.testing.assert_close(found, encoder.neck(x.permute(0, 3, 1, 2)), rtol=1e-4, atol=1e-4)
    assert stream.calls == [0, 1, 2, 3, 4]
    found.sum().backward()
    assert stream.move.weight.grad.abs().sum() > 0
    assert [n for n in encoder.state_dict() if "move" in n] == [
        "adapters.stream.0.move.weight",
        "adapters.stream.0.move.bias",
    ]


@torch.no_grad()
def test_streams_keep_nothing_between_calls(encoder):
    encoder.attach("stream", Stream(encoder))
    encoder.attach("stream", Stream(encoder))
    one, other = torch.randn(1, 3, 64, 64), torch.randn(1, 3, 64, 64)
    first = encoder(one)
    encoder(other)
    assert torch.equal(encoder(one), first)
