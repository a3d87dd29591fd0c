"""U-Net, V-Net, fusion head and the pair of them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from knowsam.models.fusion import FusionHead
from knowsam.models.students import DeployedStudents, Students
from knowsam.models.unet import UNet
from knowsam.models.vnet import VNet

CLASSES = (2, 3, 4)


def count(module):
    return sum(p.numel() for p in module.parameters())


def images(batch=2, side=32, channels=3):
    return torch.rand(batch, channels, side, side, generator=torch.Generator().manual_seed(0))


def pair(num_classes, **options):
    torch.manual_seed(0)
    return Students({"unet": UNet(num_classes), "vnet": VNet(num_classes)}, FusionHead(num_classes), **options)


def test_parameter_counts():
    parts = UNet(2), VNet(2), FusionHead(2)
    assert [count(p) for p in parts] == [1_944_322, 3_265_986, 40_546]
    assert round(count(Students({"unet": parts[0], "vnet": parts[1]}, parts[2])) / 1e6, 2) == 5.25


@pytest.mark.parametrize("num_classes", CLASSES)
@pytest.mark.parametrize("batch", [1, 3])
def test_output_shapes(num_classes, batch):
    students = pair(num_classes).eval()
    with torch.no_grad():
        logits = students(images(batch, 48))
    assert list(logits) == ["unet", "vnet", "fusion"]
    for x in logits.values():
        assert x.shape == (batch, num_classes, 48, 48)
        assert x.isfinite().all()


@pytest.mark.parametrize("norm", ["none", "batch", "instance"])
@pytest.mark.parametrize("channels", [1, 3])
def test_vnet_norms_and_channels(norm, channels):
    net = VNet(3, in_channels=channels, filters=4, norm=norm).eval()
    assert net(images(1, 32, channels)).shape == (1, 3, 32, 32)


def test_unet_of_other_depth():
    net = UNet(3, in_channels=1, channels=(4, 8, 16), dropout=(0.0, 0.1, 0.2)).eval()
    assert net(images(1, 36, 1)).shape == (1, 3, 36, 36)


def test_vnet_equals_hand_written_forward():
    """A skip is the output of the level's *down* convolution; at full resolution, of the first block."""
    torch.manual_seed(0)
    net = VNet(3, filters=4)
    weights = [(m.weight, m.bias) for m in net.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]
    names = {id(m.weight): n for n, m in net.named_modules() if hasattr(m, "weight")}
    by_name = {names[id(w)]: (w, b) for w, b in weights}
    used = set()

    def convolve(x, name, kind=F.conv2d, **how):
        used.add(name)
        return F.relu(kind(x, *by_name[name], **how))

    def block(x, name, depth):
        for i in range(depth):  # convolution, norm, ReLU
            x = convolve(x, f"{name}.{3 * i}", padding=1)
        return x

    image = images(2, 32)
    skips = [block(image, "stem", 1)]
    x = skips[0]
    for level, depth in enumerate((2, 3, 3, 3)):
        skips.append(convolve(x, f"down.{level}.0", stride=2))
        x = block(skips[-1], f"encoder.{level}", depth)
    for level, depth in enumerate((3, 3, 2, 1)):
        x = convolve(x, f"up.{level}.0", F.conv_transpose2d, stride=2) + skips[3 - level]
        x = block(x, f"decoder.{level}", depth)
    expected = F.conv2d(x, *by_name["head"])
    assert used | {"head"} == set(by_name)
    torch.testing.assert_close(net(image), expected)


def test_unet_equals_hand_written_forward():
    """The decoder concatenates [skip, upsampled]."""
    torch.manual_seed(0)
    net = UNet(3, channels=(4, 8, 16), dropout=(0.0, 0.0, 0.0)).eval()
    x0 = net.encoder[0](images(2, 16))
    x1 = net.encoder[1](F.max_pool2d(x0, 2))
    x2 = net.encoder[2](F.max_pool2d(x1, 2))
    y1 = net.decoder[0](torch.cat([x1, net.up[0](x2)], 1))
    y0 = net.decoder[1](torch.cat([x0, net.up[1](y1)], 1))
    torch.testing.assert_close(net(images(2, 16)), net.head(y0))
    block = net.encoder[0]
    by_hand = images(2, 16)
    for conv, norm in ((block[0], block[1]), (block[4], block[5])):
        by_hand = F.conv2d(by_hand, conv.weight, conv.bias, padding=1)
        by_hand = F.batch_norm(by_hand, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
        by_hand = F.leaky_relu(by_hand, 0.01)
    torch.testing.assert_close(x0, by_hand)


def test_unet_dropout_by_depth_and_none_in_the_decoder():
    net = UNet(2)
    rates = {n: m.p for n, m in net.named_modules() if isinstance(m, nn.Dropout)}
    assert [rates[f"encoder.{i}.3"] for i in range(5)] == [0.05, 0.1, 0.2, 0.3, 0.5]
    assert all(rate == 0 for name, rate in rates.items() if name.startswith("decoder"))


@pytest.mark.parametrize("num_classes", CLASSES)
def test_fused_loss_reaches_both_students_and_every_parameter(num_classes):
    students = pair(num_classes)
    students(images())["fusion"].square().mean().backward()
    missed = [name for name, p in students.named_parameters() if p.grad is None]
    assert not missed
    for part in (*students.subnets.values(), students.fusion_head):
        assert sum(p.grad.abs().sum() for p in part.parameters()) > 0


@pytest.mark.parametrize("num_classes", CLASSES)
def test_agreement_map(num_classes):
    """1 where both say the same about class k: whichever class it is, also where neither is above 0.5."""
    head = FusionHead(num_classes)
    seen = []
    head.agreement.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    generator = torch.Generator().manual_seed(num_classes)
    first, second = (0.1 * torch.randn(2, num_classes, 6, 6, generator=generator) for _ in range(2))
    head(first, second)
    a, b = first.argmax(1), second.argmax(1)
    for index in torch.cartesian_prod(*map(torch.arange, (2, num_classes, 6, 6))).tolist():
        n, k, y, x = index
        expected = float((a[n, y, x] == k) == (b[n, y, x] == k))
        assert seen[0][n, k, y, x] == expected
    apart = (a != b)[:, None].expand_as(seen[0])
    assert apart.any()
    per_pixel = (seen[0] == 0).sum(1)
    assert set(per_pixel.unique().tolist()) <= {0, 2}  # a disagreement concerns exactly two classes


@pytest.mark.parametrize("num_classes", CLASSES)
def test_certainty_map_is_normalised(num_classes):
    head = FusionHead(num_classes)
    seen = []
    head.certainty.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    sure = torch.zeros(1, num_classes, 4, 4)
    sure[:, -1] = 60.0
    head(torch.zeros(1, num_classes, 4, 4), sure)
    torch.testing.assert_close(seen[0], torch.stack([torch.zeros(1, 4, 4), torch.ones(1, 4, 4)], 1))


def test_fusion_ends_linear():
    """Batch norm and a rectifier after the last convolution would cap the logits."""
    assert isinstance(FusionHead(3).head, nn.Conv2d)
    head = FusionHead(3).eval()
    with torch.no_grad():
        head.head.bias.copy_(torch.tensor([-50.0, 0.0, 50.0]))
        fused = head(*torch.randn(2, 1, 3, 4, 4))
    assert fused[:, 0].max() < -40 and fused[:, 2].min() > 40


def test_students_normalise_images():
    seen = []
    net = nn.Conv2d(3, 2, 1)
    net.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    Students({"a": net}, mean=0.5, std=0.25)(torch.tensor([0.0, 0.5, 1.0]).view(1, 3, 1, 1))
    torch.testing.assert_close(seen[0].flatten(), torch.tensor([-2.0, 0.0, 2.0]))


def test_names_and_deployed():
    students = pair(2).eval()
    assert (students.names, students.deployed) == (("unet", "vnet"), "fusion")
    alone = Students({"only": nn.Conv2d(3, 2, 1)})
    assert (alone.names, alone.deployed) == (("only",), "only")
    with torch.no_grad():
        logits = students(images())
        for name in (None, "unet", "vnet"):
            assert torch.equal(DeployedStudents(students, name).eval()(images()), logits[name or "fusion"])
    deployed = DeployedStudents(students, "vnet")
    assert all(key.startswith("students.subnets.vnet.") for key in deployed.state_dict())
    assert next(deployed.parameters()) is next(students.subnets["vnet"].parameters())


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Students({}), "at least one student"),
        (lambda: Students({"fusion": nn.Identity()}), "none of them called 'fusion'"),
        (lambda: Students({"a": nn.Identity()}, FusionHead(2)), "exactly 2 students, got 1: a"),
        (lambda: Students({n: nn.Identity() for n in "abc"}, FusionHead(2)), "got 3: a, b, c"),
        (lambda: VNet(2, norm="layer"), "norm must be one of .*'batch'.*got 'layer'"),
        (lambda: UNet(2, channels=(8, 16)), "one entry per level, got 2 and 5"),
    ],
)
def test_refusals(make, text):
    with pytest.raises(ValueError, match=text):
        make()
