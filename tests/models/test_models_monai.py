"""Networks of MONAI as students: they compute what MONAI's own classes compute, and offer their features."""

import copy
import importlib.util

import pytest
import torch
import torch.nn.functional as F
from monai.networks.nets.dynunet import DynUNet
from monai.networks.nets.segresnet import SegResNet
from monai.networks.nets.swin_unetr import SwinUNETR

from knowsam import components
from knowsam.errors import ConfigError
from knowsam.models import monai_networks
from knowsam.models.students import Student, Students

SIDES = {2: (32, 64), 3: (32, 64, 32)}
NAMES = ("dynunet", "segresnet", "swin_unetr")
SMALL = {
    "dynunet": {"filters": (8, 16, 16, 24)},
    "segresnet": {"filters": 8, "blocks_down": (1, 1, 2), "blocks_up": (1, 1)},
    "swin_unetr": {"feature_size": 12, "depths": (1, 1, 1, 1), "window_size": 4},
}
# MONAI's class and arguments for the same.
OFFICIAL = {
    "dynunet": lambda **facts: DynUNet(
        kernel_size=[3] * 4, strides=[1, 2, 2, 2], upsample_kernel_size=[2] * 3, filters=[8, 16, 16, 24], **facts
    ),
    "segresnet": lambda **facts: SegResNet(init_filters=8, blocks_down=(1, 1, 2), blocks_up=(1, 1), **facts),
    "swin_unetr": lambda **facts: SwinUNETR(feature_size=12, depths=(1, 1, 1, 1), window_size=4, **facts),
}
needs_einops = pytest.mark.skipif(importlib.util.find_spec("einops") is None, reason="einops is not installed")
every = pytest.mark.parametrize("name", [*NAMES[:2], pytest.param("swin_unetr", marks=needs_einops)])
dims = pytest.mark.parametrize("spatial_dims", [2, 3])


def make(name, num_classes=3, in_channels=1, spatial_dims=2, **options):
    """As a builder does it: by name, with the facts that it asks for."""
    facts = {"num_classes": num_classes, "in_channels": in_channels, "spatial_dims": spatial_dims, "image_size": 64}
    torch.manual_seed(0)
    return components.call(components.load(components.STUDENTS[name]), facts, SMALL[name] | options)


def images(spatial_dims, batch=1, channels=1):
    return torch.rand(batch, channels, *SIDES[spatial_dims], generator=torch.Generator().manual_seed(0))


@every
@dims
@pytest.mark.parametrize("num_classes", [2, 4, 9])
def test_logits_gradients_and_the_divisor(name, spatial_dims, num_classes):
    network = make(name, num_classes, spatial_dims=spatial_dims)
    logits = network(images(spatial_dims))
    assert logits.shape == (1, num_classes, *SIDES[spatial_dims])
    logits.square().mean().backward()
    assert [n for n, p in network.named_parameters() if p.grad is None] == []  # DDP would stop there
    assert all(side % network.size_divisor == 0 for side in SIDES[spatial_dims])


@every
@dims
def test_they_compute_what_monais_own_compute(name, spatial_dims):
    official = OFFICIAL[name](spatial_dims=spatial_dims, in_channels=1, out_channels=3).eval()
    network = make(name, spatial_dims=spatial_dims).eval()
    own = network.state_dict()
    weights = official.state_dict()
    network.load_state_dict({key: weights[key] for key in own})
    x = images(spatial_dims, batch=2)
    torch.testing.assert_close(network(x), official(x))
    left = {key.split(".")[0] for key in weights if key not in own}
    assert left == ({"skip_layers"} if name == "dynunet" else set())


@every
@dims
def test_decoding_what_was_encoded_is_the_forward(name, spatial_dims):
    student = Student(make(name, spatial_dims=spatial_dims).eval())
    assert student.offers("encode") and student.offers("decode") and not student.offers("auxiliary")
    x = images(spatial_dims)
    features = student.encode(x)
    assert torch.equal(student.decode(features), student(x))
    for level, feature in enumerate(features):
        assert feature.shape[2:] == tuple(side // 2**level for side in SIDES[spatial_dims])
    assert 2 ** (len(features) - 1) == student.size_divisor
    leaves = [feature.detach().requires_grad_() for feature in features]
    student.decode(leaves).square().mean().backward()
    assert all(leaf.grad.abs().sum() > 0 for leaf in leaves)


@dims
def test_deep_supervision_of_dynunet_is_monais(spatial_dims):
    facts = {"spatial_dims": spatial_dims, "in_channels": 1, "out_channels": 3}
    official = OFFICIAL["dynunet"](deep_supervision=True, deep_supr_num=2, **facts).train()
    network = make("dynunet", spatial_dims=spatial_dims, deep_supervision=True).train()
    weights = official.state_dict()
    network.load_state_dict({key: weights[key] for key in network.state_dict()})
    x = images(spatial_dims)
    expected = official(x).unbind(1)  # all brought to one size
    features = network.encode(x)
    made = network.auxiliary(features)
    assert tuple(made) == network.auxiliary_outputs == ("scale_2", "scale_4")
    for scale, (name, logits), large in zip((2, 4), made.items(), expected[1:], strict=True):
        assert logits.shape == (1, 3, *(side // scale for side in SIDES[spatial_dims])), name
        torch.testing.assert_close(F.interpolate(logits, SIDES[spatial_dims]), large)
    torch.testing.assert_close(network(x), expected[0])
    logits, same = network.decode_all(features)
    assert torch.equal(logits, network.decode(features)) and all(torch.equal(same[k], x) for k, x in made.items())
    (logits.sum() + sum(x.sum() for x in same.values())).backward()
    assert [n for n, p in network.named_parameters() if p.grad is None] == []


@every
def test_every_weight_has_one_name(name):
    """MONAI's DynUNet saves each of its blocks twice; an averaged teacher would move them twice."""
    network = make(name)
    pointers = [tensor.data_ptr() for tensor in network.state_dict().values()]
    assert len(set(pointers)) == len(pointers)
    copied = copy.deepcopy(network).eval()
    assert torch.equal(copied(images(2)), network.eval()(images(2)))


def test_as_a_pair_of_unlike_students():
    students = Students({"a": make("dynunet"), "b": make("segresnet")}).eval()
    assert students.size_divisor == 8
    features = students.encode(images(2))
    assert all(torch.equal(x, students(images(2))[name]) for name, x in students.decode(features).items())


def test_parameter_counts_of_the_defaults():
    counts = {name: sum(p.numel() for p in getattr(monai_networks, name)(2).parameters()) for name in NAMES[:2]}
    assert counts == {"dynunet": 1_942_354, "segresnet": 1_576_690}


@needs_einops
def test_parameter_count_of_swin_unetr():
    assert sum(p.numel() for p in monai_networks.swin_unetr(2).parameters()) == 6_302_900


@pytest.mark.parametrize("norm", ["instance", "batch", "group"])
def test_norms(norm):
    for name in NAMES[:2]:
        kinds = {type(module).__name__ for module in make(name, norm=norm).modules()}
        assert kinds & {"InstanceNorm2d", "BatchNorm2d", "GroupNorm"} == {
            {"instance": "InstanceNorm2d", "batch": "BatchNorm2d", "group": "GroupNorm"}[norm]
        }


def test_dropout_is_there_when_asked_for():
    for name in NAMES[:2]:
        network, x = make(name, dropout=0.5), images(2)
        assert not torch.equal(network(x), network(x))


def test_without_einops_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="swin_unetr needs einops") as caught:
        monai_networks.swin_unetr(2)
    assert "knowsam[encoders]" in caught.value.hint


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("dynunet", {"filters": (8, 16)}, r"filters needs at least 3 levels, got \[8, 16\]"),
        ("dynunet", {"norm": "layer"}, r"norm must be one of \['batch', 'group', 'instance'\], got 'layer'"),
        ("segresnet", {"blocks_up": (1,)}, "blocks_up needs one level fewer than blocks_down, got 1 and 3"),
    ],
)
def test_refusals(name, options, text):
    with pytest.raises(ValueError, match=text):
        make(name, **options)
