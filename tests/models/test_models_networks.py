"""U-Net, V-Net and fusion head, for images and for volumes."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from knowsam.models.fusion import FusionHead
from knowsam.models.layers import layers
from knowsam.models.unet import UNet
from knowsam.models.vnet import VNet

CLASSES = (2, 4, 9)
SIDES = {2: (48, 32), 3: (16, 32, 16)}
dims = pytest.mark.parametrize("spatial_dims", [2, 3])
SMALL_UNET = {"channels": (4, 8, 16), "dropout": (0.0, 0.0, 0.0)}


def count(module):
    return sum(p.numel() for p in module.parameters())


def images(spatial_dims=2, batch=2, channels=3):
    return torch.rand(batch, channels, *SIDES[spatial_dims], generator=torch.Generator().manual_seed(0))


def features_of(net, x):
    """A network's features, each a leaf that collects its gradient."""
    return [feature.detach().requires_grad_() for feature in net.encode(x)]


def test_parameter_counts():
    assert [count(p) for p in (UNet(2), VNet(2), FusionHead(2))] == [1_944_322, 3_265_986, 40_546]
    volumes = [count(p) for p in (UNet(2, spatial_dims=3), VNet(2, spatial_dims=3), FusionHead(2, spatial_dims=3))]
    assert volumes == [5_649_570, 9_444_130, 118_882]


@dims
@pytest.mark.parametrize("make", [UNet, VNet])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("num_classes", CLASSES)
def test_logits_have_the_images_size(make, spatial_dims, channels, num_classes):
    small = SMALL_UNET if make is UNet else {"filters": 2, "norm": "batch"}
    net = make(num_classes, channels, spatial_dims, **small)
    x = images(spatial_dims, channels=channels)
    logits = net(x)
    assert logits.shape == (2, num_classes, *SIDES[spatial_dims]) and logits.isfinite().all()
    logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    assert all(side % net.size_divisor == 0 for side in SIDES[spatial_dims])


@dims
@pytest.mark.parametrize("make", [UNet, VNet])
def test_names_are_the_same_in_2d_and_3d(make, spatial_dims):
    shapes = {name: tensor.shape for name, tensor in make(3, spatial_dims=spatial_dims).state_dict().items()}
    flat = {name: tensor.shape for name, tensor in make(3).state_dict().items()}
    assert list(shapes) == list(flat)
    assert {s[:2] for s in shapes.values()} == {s[:2] for s in flat.values()}


@dims
@pytest.mark.parametrize("make", [UNet, VNet])
def test_decoding_what_was_encoded_is_the_forward(make, spatial_dims):
    small = {} if make is UNet else {"filters": 4}
    net = make(3, spatial_dims=spatial_dims, **small).eval()
    x = images(spatial_dims)
    features = net.encode(x)
    before = [feature.clone() for feature in features]
    assert torch.equal(net.decode(features), net(x))
    assert len(features) == 5 and all(map(torch.equal, features, before))  # decoding leaves them as they are
    for level, feature in enumerate(features):  # fine to coarse
        assert feature.shape[2:] == tuple(side // 2**level for side in SIDES[spatial_dims])
    leaves = [feature.detach().requires_grad_() for feature in features]
    net.decode(leaves).square().mean().backward()
    assert all(leaf.grad.abs().sum() > 0 for leaf in leaves)  # a method may disturb any of them


@dims
@pytest.mark.parametrize("norm", ["none", "batch", "instance"])
def test_vnet_norms(norm, spatial_dims):
    net = VNet(3, spatial_dims=spatial_dims, filters=4, norm=norm)
    kinds = {
        "none": nn.Identity,
        "batch": layers(spatial_dims).batch_norm,
        "instance": layers(spatial_dims).instance_norm,
    }
    assert isinstance(net.stem[1], kinds[norm])
    assert net(images(spatial_dims)).shape == (2, 3, *SIDES[spatial_dims])


def test_unet_of_other_depths():
    for channels, side in (((4,), 7), ((4, 8), 10), ((4, 8, 16), 36)):
        net = UNet(3, 1, channels=channels, dropout=(0.1,) * len(channels)).eval()
        assert net(torch.rand(1, 1, side, side)).shape == (1, 3, side, side)
        assert net.size_divisor == 2 ** (len(channels) - 1)


# ---------------------------------------------------------------- by hand


@dims
def test_vnet_equals_hand_written_forward(spatial_dims):
    """A skip is the output of the level's *down* convolution; at full resolution, of the first block."""
    torch.manual_seed(0)
    conv, transposed = (F.conv2d, F.conv_transpose2d) if spatial_dims == 2 else (F.conv3d, F.conv_transpose3d)
    net = VNet(3, spatial_dims=spatial_dims, filters=4)
    by_name = {n: (m.weight, m.bias) for n, m in net.named_modules() if hasattr(m, "weight")}
    used = set()

    def convolve(x, name, kind=conv, **how):
        used.add(name)
        return F.relu(kind(x, *by_name[name], **how))

    def block(x, name, depth):
        for i in range(depth):  # convolution, norm, ReLU
            x = convolve(x, f"{name}.{3 * i}", padding=1)
        return x

    skips = [block(images(spatial_dims), "stem", 1)]
    x = skips[0]
    for level, depth in enumerate((2, 3, 3, 3)):
        skips.append(convolve(x, f"down.{level}.0", stride=2))
        x = block(skips[-1], f"encoder.{level}", depth)
    for level, depth in enumerate((3, 3, 2, 1)):
        x = convolve(x, f"up.{level}.0", transposed, stride=2) + skips[3 - level]
        x = block(x, f"decoder.{level}", depth)
    expected = conv(x, *by_name["head"])
    assert used | {"head"} == set(by_name)
    torch.testing.assert_close(net(images(spatial_dims)), expected)


@dims
def test_unet_equals_hand_written_forward(spatial_dims):
    """The decoder concatenates [skip, upsampled]."""
    torch.manual_seed(0)
    conv, pool = (F.conv2d, F.max_pool2d) if spatial_dims == 2 else (F.conv3d, F.max_pool3d)
    net = UNet(3, spatial_dims=spatial_dims, **SMALL_UNET).eval()
    image = images(spatial_dims)
    x0 = net.encoder[0](image)
    x1 = net.encoder[1](pool(x0, 2))
    x2 = net.encoder[2](pool(x1, 2))
    y1 = net.decoder[0](torch.cat([x1, net.up[0](x2)], 1))
    y0 = net.decoder[1](torch.cat([x0, net.up[1](y1)], 1))
    torch.testing.assert_close(net(image), net.head(y0))
    assert all(map(torch.equal, net.encode(image), (x0, x1, x2)))
    block = net.encoder[0]
    by_hand = image
    for layer, norm in ((block[0], block[1]), (block[4], block[5])):
        by_hand = conv(by_hand, layer.weight, layer.bias, padding=1)
        by_hand = F.batch_norm(by_hand, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
        by_hand = F.leaky_relu(by_hand, 0.01)
    torch.testing.assert_close(x0, by_hand)


def test_unet_dropout_by_depth_and_none_in_the_decoder():
    net = UNet(2)
    rates = {n: m.p for n, m in net.named_modules() if isinstance(m, nn.Dropout)}
    assert [rates[f"encoder.{i}.3"] for i in range(5)] == [0.05, 0.1, 0.2, 0.3, 0.5]
    assert all(rate == 0 for name, rate in rates.items() if name.startswith("decoder"))


# ---------------------------------------------------------------- more heads and decoders


@dims
def test_unet_starts_alike_with_and_without_auxiliary_outputs(spatial_dims):
    def make(**more):
        torch.manual_seed(0)
        return UNet(3, spatial_dims=spatial_dims, **SMALL_UNET, **more)

    plain, rich = make(), make(deep_supervision=True, decoders=3)
    own = rich.state_dict()
    assert all(torch.equal(tensor, own[name]) for name, tensor in plain.state_dict().items())
    assert {name.split(".")[0] for name in own if name not in plain.state_dict()} == {"scale_heads", "more_decoders"}
    x = images(spatial_dims)
    assert torch.equal(plain.eval()(x), rich.eval()(x))
    assert plain.auxiliary_outputs == () and plain.auxiliary(plain.encode(x)) == {}


@dims
def test_deep_supervision_has_heads_at_the_coarser_levels(spatial_dims):
    net = UNet(4, spatial_dims=spatial_dims, deep_supervision=True).eval()
    features = net.encode(images(spatial_dims))
    made = net.auxiliary(features)
    assert tuple(made) == net.auxiliary_outputs == ("scale_2", "scale_4", "scale_8")
    for scale, logits in zip((2, 4, 8), made.values(), strict=True):
        assert logits.shape == (2, 4, *(side // scale for side in SIDES[spatial_dims]))
    level = features[-1]
    for step, (name, head) in enumerate(zip(("scale_8", "scale_4", "scale_2"), net.scale_heads[::-1], strict=True)):
        level = net.decoder[step](torch.cat([features[-2 - step], net.up[step](level)], 1))
        assert torch.equal(made[name], head(level))


@dims
def test_more_decoders_share_the_features_and_nothing_else(spatial_dims):
    torch.manual_seed(0)
    net = UNet(3, spatial_dims=spatial_dims, decoders=3, **SMALL_UNET).eval()
    features = features_of(net, images(spatial_dims))
    main, made = net.decode(features), net.auxiliary(features)
    assert tuple(made) == net.auxiliary_outputs == ("decoder_2", "decoder_3")
    assert all(logits.shape == main.shape and not torch.equal(logits, main) for logits in made.values())
    made["decoder_3"].sum().backward()
    reached = {name for name, p in net.named_parameters() if p.grad is not None}
    assert reached == {name for name, _ in net.named_parameters() if name.startswith("more_decoders.1.")}
    assert all(feature.grad.abs().sum() > 0 for feature in features)
    # A decoder is the first one with other weights.
    first = {
        name: tensor for name, tensor in net.state_dict().items() if name.split(".")[0] in ("up", "decoder", "head")
    }
    net.more_decoders[0].load_state_dict(first)
    assert torch.equal(net.auxiliary(features)["decoder_2"], main)


@dims
def test_all_at_once_is_each_alone_with_one_pass_through_the_decoder(spatial_dims):
    net = UNet(3, spatial_dims=spatial_dims, deep_supervision=True, decoders=2, **SMALL_UNET).eval()
    passes = []
    net.decoder[0].register_forward_hook(lambda *_: passes.append(1))
    features = net.encode(images(spatial_dims))
    logits, made = net.decode_all(features)
    assert len(passes) == 1 and tuple(made) == ("scale_2", "decoder_2")
    assert torch.equal(logits, net.decode(features))
    assert all(torch.equal(made[name], other) for name, other in net.auxiliary(features).items())
    (logits.sum() + sum(x.sum() for x in made.values())).backward()
    missed = {name.split(".")[0] for name, p in net.named_parameters() if p.grad is None}
    assert not missed


# ---------------------------------------------------------------- fusion head


@dims
@pytest.mark.parametrize("num_classes", CLASSES)
def test_agreement_map(num_classes, spatial_dims):
    """1 where both say the same about class k: whichever class it is, also where neither is above 0.5."""
    head = FusionHead(num_classes, spatial_dims)
    seen = []
    head.agreement.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    generator = torch.Generator().manual_seed(num_classes)
    size = (2, num_classes, 4, 3) if spatial_dims == 2 else (2, num_classes, 2, 4, 3)
    first, second = (0.1 * torch.randn(size, generator=generator) for _ in range(2))
    assert head(first, second).shape == size
    a, b = first.argmax(1), second.argmax(1)
    for n, k, *place in torch.cartesian_prod(*map(torch.arange, size)).tolist():
        expected = float((a[n, *place] == k) == (b[n, *place] == k))
        assert seen[0][n, k, *place] == expected
    apart = (a != b)[:, None].expand_as(seen[0])
    assert apart.any()
    per_pixel = (seen[0] == 0).sum(1)
    assert set(per_pixel.unique().tolist()) <= {0, 2}  # a disagreement concerns exactly two classes


@dims
@pytest.mark.parametrize("num_classes", CLASSES)
def test_certainty_map_is_normalised(num_classes, spatial_dims):
    head = FusionHead(num_classes, spatial_dims)
    seen = []
    head.certainty.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    size = (4,) * spatial_dims
    sure = torch.zeros(1, num_classes, *size)
    sure[:, -1] = 60.0
    head(torch.zeros(1, num_classes, *size), sure)
    torch.testing.assert_close(seen[0], torch.stack([torch.zeros(1, *size), torch.ones(1, *size)], 1))


@dims
def test_fusion_of_another_width(spatial_dims):
    """A quarter as many channels: about a sixteenth of the parameters of what sees them all."""
    head = FusionHead(3, spatial_dims, width=16)
    assert head.merge[0].weight.shape[:2] == (16, 16) and head.head.weight.shape[:2] == (3, 16)
    assert head(*torch.randn(2, 2, 3, *(4,) * spatial_dims)).shape == (2, 3, *(4,) * spatial_dims)


@dims
def test_fusion_ends_linear(spatial_dims):
    """Batch norm and a rectifier after the last convolution would cap the logits."""
    head = FusionHead(3, spatial_dims).eval()
    assert isinstance(head.head, layers(spatial_dims).conv)
    with torch.no_grad():
        head.head.bias.copy_(torch.tensor([-50.0, 0.0, 50.0]))
        fused = head(*torch.randn(2, 1, 3, *(4,) * spatial_dims))
    assert fused[:, 0].max() < -40 and fused[:, 2].min() > 40


@dims
def test_undecided_is_what_a_tie_can_reach(spatial_dims):
    """Three convolutions of width 3 carry a tie three pixels far, in every direction."""
    size = (12,) * spatial_dims
    first = torch.zeros(1, 3, *size)
    first[:, 0] = 1.0
    middle = (0, slice(None), *(6,) * spatial_dims)
    first[middle] = torch.tensor([1.0, 0.99, 0.0])
    where = FusionHead(3, spatial_dims).undecided(first, first.clone(), 0.1)
    expected = torch.zeros(1, *size, dtype=torch.bool)
    expected[0, *(slice(3, 10),) * spatial_dims] = True
    assert torch.equal(where, expected)
    assert not FusionHead(3, spatial_dims).undecided(first, first.clone(), 0.001).any()


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: VNet(2, norm="layer"), "norm must be one of .*'batch'.*got 'layer'"),
        (lambda: VNet(2, filters=0), "filters must be at least 1, got 0"),
        (lambda: UNet(2, channels=(8, 16)), "one entry per level, got 2 and 5"),
        (lambda: UNet(2, channels=(8, 16), dropout=(0.0, 0.0), deep_supervision=True), "at least 3 levels .*, got 2"),
        (lambda: UNet(2, decoders=0), "decoders must be at least 1, got 0"),
        (lambda: UNet(2, spatial_dims=1), r"spatial_dims must be 2 \(images\) or 3 \(volumes\), got 1"),
        (lambda: VNet(2, spatial_dims=4), "got 4"),
        (lambda: FusionHead(2, spatial_dims=None), "got None"),
        (lambda: FusionHead(2, width=30), "width is 30; it must be a positive multiple of 4"),
        (lambda: FusionHead(2, width=0), "width is 0"),
    ],
)
def test_refusals(make, text):
    with pytest.raises(ValueError, match=text):
        make()
