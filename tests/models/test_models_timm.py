"""Encoders of timm under a U-Net decoder. Without timm only what is said about its absence is tested."""

import contextlib
import copy
import importlib
import importlib.util
import sys

import pytest
import torch

from knowsam import components
from knowsam.errors import CheckpointError, ConfigError, NotFoundError
from knowsam.models import timm_unet
from knowsam.models.students import Student
from knowsam.models.timm_unet import Decoder, Pyramid

SIDE = 64
CNNS = ("resnet18", "convnext_atto", "vgg11_bn", "mobilenetv3_small_050")
VITS = ("vit_tiny_patch16_224", "vit_small_patch14_dinov2", "vit_small_patch16_dinov3")
ENCODERS = (*CNNS, "swin_tiny_patch4_window7_224", *VITS)
_KEPT = []


@pytest.fixture(scope="module")
def timm():
    """timm, where it is installed; also beside a torchvision that was built for another torch."""
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed")
    with contextlib.suppress(RuntimeError):
        return importlib.import_module("timm")
    for name in [n for n in sys.modules if n.split(".")[0] in ("timm", "torchvision")]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "DEF")  # what its compiled part would declare
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _KEPT.append(library)
    return importlib.import_module("timm")


def make(encoder, num_classes=3, in_channels=3, **options):
    """As a builder does it: by name, with the facts that it asks for."""
    facts = {"num_classes": num_classes, "in_channels": in_channels, "spatial_dims": 2, "image_size": SIDE}
    torch.manual_seed(0)
    target = components.load(components.STUDENTS["timm_unet"])
    small = {"channels": (4, 8, 8, 8, 8), "pyramid_channels": 8}
    return components.call(target, facts, {"encoder": encoder, **small, **options})


def images(channels=3, batch=2):
    return torch.rand(batch, channels, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("encoder", ENCODERS)
def test_logits_gradients_and_features(timm, encoder):
    network = make(encoder, num_classes=4, in_channels=1)
    student = Student(network)
    logits = student(images(1))
    assert logits.shape == (2, 4, SIDE, SIDE)
    logits.square().mean().backward()
    assert [n for n, p in network.named_parameters() if p.grad is None] == []  # DDP would stop there
    student.eval()
    features = student.encode(images(1))
    assert torch.equal(student.decode(features), student(images(1)))
    strides = [SIDE // feature.shape[2] for feature in features]
    assert strides == sorted(set(strides)) and max(strides) == student.size_divisor == 32
    assert all(feature.shape[2:] == (SIDE // s, SIDE // s) for feature, s in zip(features, strides, strict=True))


@pytest.mark.parametrize("encoder", VITS)
def test_a_plain_vit_gets_a_pyramid_over_four_of_its_blocks(timm, encoder):
    network = make(encoder).eval()
    assert network.features.feature_info.reduction() == [network.patch] * 4 and network.cell == 16
    assert [SIDE // f.shape[2] for f in network.encode(images())] == [4, 8, 16, 32]
    seen = []
    network.features.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[-1]))
    network(images())
    assert seen == [SIDE // 16 * network.patch]  # 14 pixels a patch: 56 of 64, as many tokens


def test_normalisation_is_the_encoders(timm):
    assert make("resnet18").mean == pytest.approx((0.485, 0.456, 0.406))
    assert make("resnet18").std == pytest.approx((0.229, 0.224, 0.225))
    assert make("vit_tiny_patch16_224").mean == (0.5, 0.5, 0.5)
    assert make("resnet18", in_channels=1).mean == pytest.approx((0.485 + 0.456 + 0.406) / 3)
    assert make("resnet18", mean=0.5, std=(0.1, 0.2, 0.3)).std == (0.1, 0.2, 0.3)
    assert Student(make("resnet18")).mean == pytest.approx((0.485, 0.456, 0.406))


# ---------------------------------------------------------------- weights


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_weights_of_a_file_are_all_in_their_places(timm, encoder, suffix, tmp_path):
    torch.manual_seed(1)
    size = {"img_size": SIDE // 16 * 14 if "patch14" in encoder else SIDE} if encoder in ENCODERS[4:] else {}
    official = timm.create_model(encoder, num_classes=7, **size)
    for tensor in official.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.1, 0.2)  # no tensor as it is made
    path = tmp_path / f"{encoder}.{suffix}"
    if suffix == "pth":
        torch.save({"state_dict": official.state_dict()}, path)
    else:
        importlib.import_module("safetensors.torch").save_file(official.state_dict(), path)
    network = make(encoder, weights=str(path))
    expected = {(t.shape, t.double().sum().item()) for t in official.state_dict().values()}
    own = network.features.state_dict()
    assert own and all((t.shape, t.double().sum().item()) in expected for t in own.values())


def test_weights_of_another_size_are_resampled_and_those_of_three_channels_fit_one(timm, tmp_path):
    torch.manual_seed(1)
    official = timm.create_model("vit_small_patch14_dinov2", num_classes=0)  # of 518 pixels
    torch.save(official.state_dict() | {"mask_token": torch.zeros(1, 384)}, tmp_path / "vit.pth")  # as its authors do
    network = make("vit_small_patch14_dinov2", in_channels=1, weights=str(tmp_path / "vit.pth"))
    own, given = network.features.model, official
    assert own.pos_embed.shape == (1, 1 + 4 * 4, 384) and given.pos_embed.shape == (1, 1 + 37 * 37, 384)
    assert own.pos_embed.mean().item() == pytest.approx(given.pos_embed.mean().item(), abs=1e-3)
    assert torch.equal(own.blocks[3].attn.qkv.weight, given.blocks[3].attn.qkv.weight)
    torch.testing.assert_close(own.patch_embed.proj.weight, given.patch_embed.proj.weight.sum(1, keepdim=True))


def test_the_students_decoder_starts_alike_with_and_without_weights(timm, tmp_path):
    torch.save(timm.create_model("resnet18", num_classes=0).state_dict(), tmp_path / "r.pth")
    with_file, without = make("resnet18", weights=str(tmp_path / "r.pth")), make("resnet18")
    for name, tensor in without.decoder.state_dict().items():
        assert torch.equal(tensor, with_file.decoder.state_dict()[name])


def test_files_that_do_not_fit(timm, tmp_path):
    torch.save(timm.create_model("resnet34", num_classes=0).state_dict(), tmp_path / "r34.pth")
    with pytest.raises(CheckpointError, match=r"does not hold the weights of ConvNeXt: \d+ of \d+ tensors are missing"):
        make("convnext_atto", weights=str(tmp_path / "r34.pth"))
    state = timm.create_model("resnet18", num_classes=0).state_dict()
    state["layer1.0.conv1.weight"] = torch.zeros(3, 64, 3, 3)
    torch.save(state, tmp_path / "r18.pth")
    with pytest.raises(CheckpointError, match=r"1 of 120 .*layer1.0.conv1.weight \(is \(3, 64, 3, 3\), should be"):
        make("resnet18", weights=str(tmp_path / "r18.pth"))
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(CheckpointError, match="cannot be read as weights of timm"):
        make("resnet18", weights=str(tmp_path / "text.pth"))
    with pytest.raises(NotFoundError, match="are not there"):
        make("resnet18", weights=str(tmp_path / "nowhere.pth"))


def test_it_asks_no_network(timm, monkeypatch):
    import socket

    def refuse(*_):
        raise AssertionError("asks the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    make("resnet18")


# ---------------------------------------------------------------- refusals


def test_refusals(timm):
    for options, text in (
        ({"encoder": "resnet_18"}, "timm has no encoder 'resnet_18'"),
        ({"encoder": "dinov2"}, "there are .*dinov2"),
        ({"encoder": "resnet18", "spatial_dims": 3}, "encoders of timm are 2-D, got spatial_dims = 3"),
        ({"encoder": "resnet18", "channels": ()}, "channels needs at least one width"),
        ({"encoder": "vit_tiny_patch16_224", "image_size": None}, "image_size must be given"),
    ):
        with pytest.raises(ValueError, match=text):
            make(**{"image_size": SIDE, **options})


def test_without_timm_the_message_says_what_to_install(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(timm_unet.importlib, "import_module", missing)
    with pytest.raises(ConfigError, match="student timm_unet needs timm: No module named 'timm'") as caught:
        timm_unet.TimmUNet(2)
    assert "knowsam[encoders]" in caught.value.hint


def test_a_torchvision_of_another_torch_is_named(monkeypatch):
    def broken(name):
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(timm_unet.importlib, "import_module", broken)
    with pytest.raises(ConfigError, match="cannot be imported: operator torchvision::nms") as caught:
        timm_unet.TimmUNet(2)
    assert "torchvision" in caught.value.hint


# ---------------------------------------------------------------- parts that need no timm


@pytest.mark.parametrize("widths", [{2: 3, 4: 5, 8: 6}, {4: 5, 8: 6}, {1: 2, 2: 3, 4: 5}, {16: 4}, {1: 3}])
def test_decoder_over_any_strides(widths):
    decoder = Decoder(widths, (4, 6, 8), 3)
    leaves = [torch.rand(2, c, 32 // s, 64 // s, requires_grad=True) for s, c in sorted(widths.items())]
    logits = decoder(leaves)
    assert logits.shape == (2, 3, 32, 64)
    logits.square().mean().backward()
    assert all(leaf.grad.abs().sum() > 0 for leaf in leaves)
    assert all(p.grad is not None for p in decoder.parameters())
    assert copy.deepcopy(decoder).eval()(leaves).shape == logits.shape


def test_pyramid():
    made = Pyramid((5, 6, 7, 8), 4)([torch.rand(1, c, 8, 8) for c in (5, 6, 7, 8)])
    assert [tuple(x.shape) for x in made] == [(1, 4, 32, 32), (1, 4, 16, 16), (1, 4, 8, 8), (1, 4, 4, 4)]
