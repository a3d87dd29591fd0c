"""Students: each network with its own normalisation and layout, and all of them as one network."""

import copy

import pytest
import torch
import torch._dynamo
from torch import nn

from knowsam import components
from knowsam.models.fusion import FusionHead
from knowsam.models.students import DeployedStudents, Student, Students
from knowsam.models.unet import UNet
from knowsam.models.vnet import VNet

CLASSES = (2, 4, 9)
SIDES = {2: (32, 48), 3: (16, 32, 16)}
dims = pytest.mark.parametrize("spatial_dims", [2, 3])
SMALL = {"channels": (4, 8), "dropout": (0.1, 0.2)}


def count(module):
    return sum(p.numel() for p in module.parameters())


def images(spatial_dims=2, batch=2, channels=3):
    return torch.rand(batch, channels, *SIDES[spatial_dims], generator=torch.Generator().manual_seed(0))


def pair(num_classes, spatial_dims=2, fusion=True, **options):
    torch.manual_seed(0)
    subnets = {
        "unet": UNet(num_classes, spatial_dims=spatial_dims, **SMALL),
        "vnet": VNet(num_classes, spatial_dims=spatial_dims, filters=2, norm="batch"),
    }
    return Students(subnets, FusionHead(num_classes, spatial_dims) if fusion else None, **options)


class Seen(nn.Conv2d):
    """Keeps what it is shown; options become attributes."""

    def __init__(self, channels=3, **declared):
        super().__init__(channels, 2, 1)
        vars(self).update(declared)

    def forward(self, x):
        self.seen = x
        return super().forward(x)


# ---------------------------------------------------------------- one student


def test_normalisation_is_the_networks_own_else_the_default():
    image = torch.tensor([0.0, 0.5, 1.0]).view(1, 3, 1, 1)
    for student, expected in (
        (Student(Seen()), [-2.0, 0.0, 2.0]),
        (Student(Seen(mean=0.0, std=0.5)), [0.0, 1.0, 2.0]),
        (Student(Seen(mean=(0.0, 0.25, 0.5), std=(1.0, 0.5, 0.25))), [0.0, 0.5, 2.0]),
        (Student(Seen(mean=0.0, std=0.5), mean=1, std=1), [-1.0, -0.5, 0.0]),
        (Student(Seen(mean=[0.0, 0.0, 1.0])), [0.0, 2.0, 0.0]),
    ):
        student(image)
        torch.testing.assert_close(student.network.seen.flatten(), torch.tensor(expected))


@dims
def test_statistics_per_channel_go_along_the_channels(spatial_dims):
    student = Student(nn.Identity(), mean=(0.0, 0.5, 1.0), std=(1.0, 0.5, 2.0))
    x = images(spatial_dims)
    expected = torch.stack([x[:, 0], (x[:, 1] - 0.5) / 0.5, (x[:, 2] - 1) / 2], 1)
    torch.testing.assert_close(student(x), expected)
    same = Student(nn.Identity(), mean=(0.3, 0.3, 0.3), std=(0.7, 0.7, 0.7))
    torch.testing.assert_close(same(x), Student(nn.Identity(), mean=0.3, std=0.7)(x))


def test_statistics_follow_the_network_and_are_no_weights():
    student = Student(Seen(), mean=(0.0, 0.5, 1.0), std=0.5)
    assert list(student.state_dict()) == ["network.weight", "network.bias"]
    moved = copy.deepcopy(student).to("meta")
    assert moved(torch.empty(1, 3, 4, 4, device="meta")).device.type == "meta"
    assert student.double()(torch.rand(1, 3, 4, 4, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("statistic", [0.5, (0.5, 0.5, 0.5)])
def test_normalised_images_equal_the_plain_formula_bit_for_bit(statistic):
    x = images()
    student = Student(nn.Identity(), mean=statistic, std=0.25)
    assert torch.equal(student(x), (x - 0.5) / 0.25)


@dims
def test_layout(spatial_dims):
    network = UNet(2, spatial_dims=spatial_dims, **SMALL)
    student = Student(network)
    expected = torch.channels_last if spatial_dims == 2 else torch.contiguous_format
    assert student.memory_format == expected
    assert network.encoder[0][0].weight.is_contiguous(memory_format=expected)
    assert student.normalise(images(spatial_dims)).is_contiguous(memory_format=expected)
    last = torch.channels_last if spatial_dims == 2 else torch.channels_last_3d
    for other in (torch.contiguous_format, last):
        student = Student(copy.deepcopy(network), memory_format=other)
        assert student.network.encoder[0][0].weight.is_contiguous(memory_format=other)
        assert student.normalise(images(spatial_dims)).is_contiguous(memory_format=other)
    assert Student(Seen(memory_format=torch.contiguous_format)).memory_format == torch.contiguous_format


def test_a_network_of_volumes_without_convolutions_takes_volumes():
    assert Student(nn.Identity())(images(3)).shape == (2, 3, *SIDES[3])


@pytest.mark.parametrize("made", [list, tuple])
def test_of_several_outputs_the_first_are_the_logits(made):
    class Deep(nn.Conv2d):
        def forward(self, x):
            logits = super().forward(x)
            return made([logits, logits[..., ::2]]) if self.training else logits

    student = Student(Deep(3, 2, 1))
    assert torch.equal(student(images()), student.eval()(images()))


def test_encode_and_decode_are_the_networks_on_normalised_images():
    network = UNet(3, **SMALL, decoders=2).eval()
    student = Student(network, mean=0.1, std=0.3)
    features = student.encode(images())
    expected = network.encode(student.normalise(images()))
    assert isinstance(features, list) and all(map(torch.equal, features, expected))
    assert torch.equal(student.decode(features), student(images()))
    logits, made = student.decode_all(features)
    assert torch.equal(logits, student(images()))
    assert torch.equal(made["decoder_2"], student.auxiliary(features)["decoder_2"])


def test_what_a_student_offers():
    plain, rich = Student(UNet(2, **SMALL)), Student(UNet(2, **SMALL, decoders=2))
    assert plain.offers("encode") and plain.offers("decode") and not plain.offers("auxiliary")
    assert rich.offers("auxiliary")
    assert not Student(Seen()).offers("encode")
    for ask in (lambda s: s.encode(images()), lambda s: s.decode([]), lambda s: s.auxiliary([])):
        with pytest.raises(ValueError, match=r"student Seen offers no \w+; .*unet"):
            ask(Student(Seen()))
    with pytest.raises(ValueError, match="student UNet offers no auxiliary; unet does with deep_supervision"):
        plain.decode_all(plain.encode(images()))


def test_both_are_asked_for_one_by_one_where_the_network_cannot_do_both():
    class Two(UNet):
        decode_all = None

    student = Student(Two(2, **SMALL, decoders=2)).eval()
    logits, made = student.decode_all(student.encode(images()))
    assert torch.equal(logits, student(images())) and list(made) == ["decoder_2"]


def test_another_kind_of_encode_is_refused():
    """MONAI's SegResNet, for one, has an ``encode`` of its own."""

    class Other(Seen):
        def encode(self, x):
            return x, [x]

    with pytest.raises(ValueError, match=r"encode of Other gives a tuple of Tensor, list; .* list of tensors"):
        Student(Other()).encode(images())


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"mean": "0.5"}, "mean must be a number, or one per channel of the images, got '0.5'"),
        ({"mean": ()}, "mean must be a number"),
        ({"std": [0.5, None]}, "std must be a number"),
        ({"mean": float("nan")}, "got nan"),
        ({"std": 0}, "std must be above 0, got 0"),
        ({"std": (0.2, -0.2, 0.2)}, "std must be above 0"),
    ],
)
def test_statistics_that_are_none(options, text):
    with pytest.raises(ValueError, match=text):
        Student(Seen(), **options)


def test_statistics_of_other_channels():
    with pytest.raises(ValueError, match=r"images \(2, 1, 32, 48\) have 1 channels, but mean is of 3: give one number"):
        Student(Seen(1), mean=(0.1, 0.2, 0.3))(images(channels=1))


@dims
@pytest.mark.parametrize("target", ["monai.networks.nets:BasicUNet", "knowsam.models.unet:UNet"])
def test_any_class_that_asks_by_name(target, spatial_dims):
    """``out_channels`` or ``num_classes``: a builder offers both."""
    facts = {"num_classes": 3, "out_channels": 3, "in_channels": 1, "spatial_dims": spatial_dims, "image_size": 32}
    options = {"features": (4, 4, 4, 4, 4, 4)} if "monai" in target else dict(SMALL)
    student = Student(components.call(components.load(target), facts, options))
    x = images(spatial_dims, channels=1)
    assert student(x).shape == (2, 3, *SIDES[spatial_dims])


# ---------------------------------------------------------------- all of them


def test_parameter_count_of_the_published_pair():
    students = Students({"unet": UNet(2), "vnet": VNet(2)}, FusionHead(2))
    assert round(count(students) / 1e6, 2) == 5.25


@dims
@pytest.mark.parametrize("num_classes", CLASSES)
@pytest.mark.parametrize("batch", [1, 3])
def test_output_shapes(num_classes, batch, spatial_dims):
    students = pair(num_classes, spatial_dims).eval()
    with torch.no_grad():
        logits = students(images(spatial_dims, batch))
    assert list(logits) == ["unet", "vnet", "fusion"]
    for x in logits.values():
        assert x.shape == (batch, num_classes, *SIDES[spatial_dims])
        assert x.isfinite().all()


@dims
@pytest.mark.parametrize("num_classes", CLASSES)
def test_fused_loss_reaches_both_students_and_every_parameter(num_classes, spatial_dims):
    students = pair(num_classes, spatial_dims)
    students(images(spatial_dims))["fusion"].square().mean().backward()
    missed = [name for name, p in students.named_parameters() if p.grad is None]
    assert not missed
    for part in (*students.subnets.values(), students.fusion_head):
        assert sum(p.grad.abs().sum() for p in part.parameters()) > 0


def test_the_path_of_the_pair_is_the_plain_one_bit_for_bit():
    """Normalise once, channels last, both networks, fusion head: as it was before students were wrapped."""
    students = pair(3)
    unet, vnet, head = (
        copy.deepcopy(x) for x in (*(s.network for s in students.subnets.values()), students.fusion_head)
    )
    torch.manual_seed(1)
    logits = students(images())
    torch.manual_seed(1)
    x = ((images() - 0.5) / 0.25).contiguous(memory_format=torch.channels_last)
    first, second = unet(x), vnet(x)
    expected = {"unet": first, "vnet": second, "fusion": head(first, second)}
    assert all(torch.equal(logits[name], expected[name]) for name in expected)
    sum(x.square().mean() for x in logits.values()).backward()
    sum(x.square().mean() for x in expected.values()).backward()
    plain = {
        **{f"subnets.unet.network.{n}": p for n, p in unet.named_parameters()},
        **{f"subnets.vnet.network.{n}": p for n, p in vnet.named_parameters()},
        **{f"fusion_head.{n}": p for n, p in head.named_parameters()},
    }
    named = dict(students.named_parameters())
    assert set(named) == set(plain)
    assert all(torch.equal(p.grad, plain[name].grad) for name, p in named.items())


def test_weights_of_before_students_were_wrapped_fit_by_name():
    students = pair(3)
    state = students.state_dict()
    old = {name.replace(".network.", "."): tensor for name, tensor in state.items()}
    assert "subnets.unet.encoder.0.0.weight" in old and "subnets.vnet.stem.0.weight" in old
    new = {
        f"{'.'.join(parts[:2])}.network.{'.'.join(parts[2:])}" if parts[0] == "subnets" else name: tensor
        for name, tensor in old.items()
        if (parts := name.split("."))
    }
    torch.manual_seed(9)
    other = pair(3, mean=0.0)
    other.load_state_dict(new)
    assert list(new) == list(state) and all(torch.equal(t, state[n]) for n, t in other.state_dict().items())


def test_each_student_keeps_its_own_unless_all_are_asked():
    made = {"a": Seen(mean=0.0, std=1.0), "b": Student(Seen(), mean=(0.1, 0.2, 0.3))}
    own = Students(made)
    assert own.normalisation() == {"a": {"mean": 0.0, "std": 1.0}, "b": {"mean": (0.1, 0.2, 0.3), "std": 0.25}}
    assert own.student("b") is made["b"]
    common = Students(made, mean=0.5, memory_format=torch.contiguous_format)
    assert common.normalisation() == {"a": {"mean": 0.5, "std": 1.0}, "b": {"mean": 0.5, "std": 0.25}}
    assert {common.student(name).memory_format for name in "ab"} == {torch.contiguous_format}
    assert common.student("b").network is made["b"].network and made["b"].mean == (0.1, 0.2, 0.3)
    assert Students({"a": Seen(), "b": Seen()}).normalisation() == {"mean": 0.5, "std": 0.25}


def test_names_deployed_and_outputs():
    students = pair(2).eval()
    assert (students.names, students.deployed) == (("unet", "vnet"), "fusion")
    assert students.outputs == ("fusion", "unet", "vnet")
    alone = Students({"only": nn.Conv2d(3, 2, 1)})
    assert (alone.names, alone.deployed, alone.outputs) == (("only",), "only", ("only",))
    assert pair(2, fusion=False).outputs == ("unet", "vnet")
    assert students.size_divisor == 16 and alone.size_divisor == 1
    assert Students({"a": Seen(size_divisor=6), "b": Seen(size_divisor=4)}).size_divisor == 12


@dims
def test_the_network_of_one_output(spatial_dims):
    students = pair(2, spatial_dims).eval()
    x = images(spatial_dims)
    with torch.no_grad():
        logits = students(x)
        for name in (None, "fusion", "unet", "vnet"):
            network = students.network(name).eval()
            assert isinstance(network, DeployedStudents) and torch.equal(network(x), logits[name or "fusion"])
            where = network.undecided(x, 1e9)
            assert where.shape == (2, *SIDES[spatial_dims]) and where.dtype == torch.bool
            assert bool(where.all()) == (name in (None, "fusion")) == bool(where.any())
    deployed = students.network("vnet")
    assert all(key.startswith("students.subnets.vnet.network.") for key in deployed.state_dict())
    assert next(deployed.parameters()) is next(students.subnets["vnet"].parameters())
    assert deployed.students.student("vnet") is students.student("vnet")


def test_a_fusion_head_of_ones_own_is_never_undecided():
    class Mean(nn.Module):
        def forward(self, first, second):
            return (first + second) / 2

    students = Students({"a": Seen(), "b": Seen()}, Mean())
    assert not students.network().undecided(images(), 1e9).any()


@dims
def test_decoding_what_was_encoded_is_the_forward_fusion_too(spatial_dims):
    students = pair(3, spatial_dims).eval()
    x = images(spatial_dims)
    features = students.encode(x)
    logits, decoded = students(x), students.decode(features)
    assert list(features) == ["unet", "vnet"] and list(decoded) == list(logits)
    assert all(torch.equal(decoded[name], logits[name]) for name in logits)
    alone = students.decode({"vnet": [2 * feature for feature in features["vnet"]]})
    assert list(alone) == ["vnet"] and not torch.equal(alone["vnet"], logits["vnet"])


def test_auxiliary_by_name():
    students = Students({"one": UNet(2, **SMALL, decoders=2), "two": UNet(2, **SMALL, decoders=3)}).eval()
    features = students.encode(images())
    made = students.auxiliary(features)
    assert {name: list(x) for name, x in made.items()} == {"one": ["decoder_2"], "two": ["decoder_2", "decoder_3"]}
    logits, same = students.decode_all(features)
    assert all(torch.equal(logits[name], x) for name, x in students(images()).items())
    assert all(torch.equal(same[name][key], x) for name, each in made.items() for key, x in each.items())
    assert list(students.auxiliary({"two": features["two"]})) == ["two"]


def test_what_students_lack_is_said_with_who_has_it():
    students = Students({"unet": UNet(2, **SMALL), "plain": Seen()})
    students.require()
    expected = r"student plain \(Seen\) offers no encode; of the students here unet offers it; by name unet, vnet, "
    for ask in (lambda: students.require("encode"), lambda: students.encode(images())):
        with pytest.raises(ValueError, match=expected):
            ask()
    with pytest.raises(ValueError, match=r"plain \(Seen\) offers no decode"):
        students.decode({})
    with pytest.raises(ValueError, match=r"unet \(UNet\), plain \(Seen\) offers no auxiliary; by name unet does with"):
        students.require("auxiliary")
    with pytest.raises(ValueError, match="offers no auxiliary"):
        students.auxiliary({"unet": []})
    pair(2).require("encode", "decode")


@dims
def test_compiled_without_a_graph_break(spatial_dims):
    torch._dynamo.reset()
    students = pair(2, spatial_dims, mean=(0.1, 0.2, 0.3)).eval()
    expected = students(images(spatial_dims))
    compiled = torch.compile(students, backend="eager", fullgraph=True)(images(spatial_dims))
    assert all(torch.equal(compiled[name], x) for name, x in expected.items())


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Students({}), "at least one student"),
        (lambda: Students({"fusion": nn.Identity()}), "none of them called 'fusion'"),
        (lambda: Students({"a": nn.Identity()}, FusionHead(2)), "exactly 2 students, got 1: a"),
        (lambda: Students({n: nn.Identity() for n in "abc"}, FusionHead(2)), "got 3: a, b, c"),
        (lambda: pair(2).network("unte"), "there is no output 'unte'; there are fusion, unet, vnet"),
        (lambda: pair(2, fusion=False).network("fusion"), "there is no output 'fusion'; there are unet, vnet"),
    ],
)
def test_refusals(make, text):
    with pytest.raises(ValueError, match=text):
        make()
