"""A guide of volumes: every slice as the guide of images has it, or some of them."""

import pytest
import torch
from sam_lab import randomise
from torch import nn

from knowsam.losses import IGNORE, sam_distillation_loss, segmentation_loss
from knowsam.models.sam import Embedding, SamGuide, SliceWiseGuide, build_sam_guide, slicewise
from knowsam.models.sam.slicewise import evenly


@pytest.fixture(scope="module")
def guide():
    torch.manual_seed(0)
    return randomise(build_sam_guide("vit_tiny", image_size=64, num_classes=3)[0])


class Stub(nn.Module):
    """The face of a guide in one line of arithmetic: logits are the image's mean times k, plus the coarse logits'."""

    num_classes, image_size = 2, 8

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor([1.0, 2.0]))
        self.seen = []

    def encode(self, images):
        self.seen.append(images)
        return Embedding(images.mean((1, 2, 3)).view(-1, 1, 1, 1))

    def decode(self, embedding, coarse_logits=None, size=None, first=None):
        logits = embedding.image * self.factor.view(1, 2, 1, 1)
        if coarse_logits is not None:
            logits = logits + coarse_logits.mean((2, 3), keepdim=True)
        return logits[:first].expand(-1, -1, *size)


@torch.no_grad()
@pytest.mark.parametrize("channels", [1, 3])
def test_every_slice_is_an_image(guide, channels):
    volumes, coarse = torch.rand(2, channels, 5, 64, 64), torch.randn(2, 3, 5, 32, 32)
    found = SliceWiseGuide(guide)(volumes, coarse)
    assert found.shape == (2, 3, 5, 64, 64)
    for b in range(2):
        for d in range(5):
            alone = guide(volumes[b : b + 1, :, d], coarse[b : b + 1, :, d])
            torch.testing.assert_close(found[b : b + 1, :, d], alone, rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("prompted", [True, False])
@pytest.mark.parametrize("train", [True, False])
def test_volumes_of_one_slice_are_images(prompted, train):
    images, coarse = torch.rand(2, 3, 64, 64), torch.randn(2, 3, 16, 16) if prompted else None
    found = []
    for volumes in (False, True):
        torch.manual_seed(0)
        guide = randomise(build_sam_guide("vit_tiny", image_size=64, num_classes=3)[0]).train(train)
        if volumes:
            logits = SliceWiseGuide(guide, slices=1).train(train)(
                images[:, :, None], None if coarse is None else coarse[:, :, None]
            )
            found.append(logits[:, :, 0])
        else:
            found.append(guide(images, coarse))
    assert torch.equal(*found)


@torch.no_grad()
def test_the_same_face(guide):
    volumes, coarse = torch.rand(2, 1, 5, 64, 64), torch.randn(2, 3, 5, 64, 64)
    slices = SliceWiseGuide(guide)
    embedding = slices.encode(volumes)
    assert embedding.image.shape == (10, 64, 4, 4) and embedding.depth == 5 and len(embedding) == 2
    whole = slices(volumes, coarse)
    assert torch.equal(slices.decode(embedding, coarse, volumes.shape[2:]), whole)
    assert torch.equal(slices.decode(embedding, coarse), whole)
    torch.testing.assert_close(slices.decode(embedding, coarse, 64, first=1), whole[:1], rtol=0, atol=1e-4)
    assert slices.decode(embedding, None, (30, 50)).shape == (2, 3, 5, 30, 50)
    assert slices.decode(embedding, None, (5, 30, 50), first=0).shape == (0, 3, 5, 30, 50)
    joined = slices.encode(volumes[:1]).joined(slices.encode(volumes[1:]))
    torch.testing.assert_close(joined.image, embedding.image, rtol=0, atol=1e-4)
    assert slices.num_classes == 3 and slices.sam is guide.sam and slices.compilable() == guide.compilable()
    assert slices.valid(embedding) is None, "everywhere"


def test_prompts_are_made_of_all_slices():
    """Their batch norms see the whole batch, decoded or not."""
    guide, _ = build_sam_guide("vit_tiny", image_size=64, num_classes=2)
    slices = SliceWiseGuide(guide).train()
    generator, embedding = guide.prompt_generator, slices.encode(torch.rand(2, 1, 3, 64, 64))
    seen = []
    generator.register_forward_hook(lambda _, args, out: seen.append(len(args[0])))
    slices.decode(embedding, None, first=1).sum().backward()
    assert seen == [6]


@torch.no_grad()
@pytest.mark.parametrize("shape", [(40, 64), (80, 112), (128, 128)])
def test_slices_of_another_size_are_resized(guide, shape):
    volumes, coarse = torch.rand(1, 1, 3, *shape), torch.randn(1, 3, 3, *shape)
    slices = SliceWiseGuide(guide)
    found = slices(volumes, coarse)
    assert found.shape == (1, 3, 3, *shape)
    small = nn.functional.interpolate(volumes[0].transpose(0, 1), (64, 64), mode="bilinear", antialias=True)
    wanted = guide.decode(guide.encode(small), coarse[0].transpose(0, 1), shape)
    torch.testing.assert_close(found[0].transpose(0, 1), wanted, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("first", [None, 0, 1])
def test_few_at_a_time_changes_nothing_where_nothing_is_learned(guide, first, monkeypatch):
    volumes, coarse = torch.rand(2, 1, 5, 64, 64), torch.randn(2, 3, 5, 16, 16)
    slices, seen = SliceWiseGuide(guide).eval(), []
    together = slices.decode(slices.encode(volumes), coarse, first=first)
    monkeypatch.setattr(slicewise, "AT_ONCE", 4)
    hook = guide.sam.image_encoder.register_forward_hook(lambda _, args, out: seen.append(len(args[0])))
    apart = slices.decode(slices.encode(volumes), coarse, first=first)
    hook.remove()
    assert seen == [4, 4, 2]
    torch.testing.assert_close(apart, together, rtol=0, atol=1e-4)


# ---------------------------------------------------------------- some of the slices


@pytest.mark.parametrize("depth, count", [(90, 10), (10, 9), (7, 3), (5, 5), (4, 1)])
def test_slices_are_drawn_evenly_and_each_is_as_likely(depth, count):
    torch.manual_seed(0)
    drawn = evenly(4000, depth, count)
    assert drawn.shape == (4000, count) and drawn.min() >= 0 and drawn.max() < depth
    apart = drawn.diff(dim=1)
    assert ((apart >= depth // count) & (apart <= -(-depth // count))).all()
    share = torch.bincount(drawn.flatten(), minlength=depth) / 4000
    torch.testing.assert_close(share, torch.full((depth,), count / depth), atol=0.05, rtol=0)


def test_which_slices_is_a_function_of_torch_s_random_state():
    stub, volumes = SliceWiseGuide(Stub(), slices=3), torch.rand(2, 1, 30, 8, 8)
    torch.manual_seed(5)
    first, other = stub.encode(volumes).chosen, stub.encode(volumes).chosen
    torch.manual_seed(5)
    assert torch.equal(first, stub.encode(volumes).chosen) and not torch.equal(first, other)
    assert not torch.equal(first[0], first[1]), "each volume has its own"


def test_some_slices_are_asked_and_the_others_are_left_out():
    stub = Stub()
    slices, volumes, coarse = SliceWiseGuide(stub, slices=3), torch.rand(2, 1, 7, 8, 8), torch.randn(2, 2, 7, 4, 4)
    embedding = slices.encode(volumes)
    assert embedding.chosen.shape == (2, 3) and len(embedding) == 2 and len(embedding.image) == 6
    logits, valid = slices.decode(embedding, coarse), slices.valid(embedding)
    assert logits.shape == (2, 2, 7, 8, 8) and valid.shape == (2, 7, 8, 8) and valid.dtype == torch.bool
    for b in range(2):
        asked = embedding.chosen[b].tolist()
        for d in range(7):
            assert valid[b, d].all() if d in asked else not valid[b, d].any()
            mean = volumes[b, :, d].mean() * stub.factor + coarse[b, :, d].mean((1, 2))
            wanted = mean if d in asked else torch.zeros(2)
            torch.testing.assert_close(logits[b, :, d], wanted[:, None, None].expand(-1, 8, 8))
    first = slices.decode(embedding, coarse, first=1)
    assert torch.equal(first, logits[:1])


@torch.no_grad()
def test_what_is_asked_is_what_all_slices_would_say(guide):
    volumes, coarse = torch.rand(2, 1, 6, 64, 64), torch.randn(2, 3, 6, 16, 16)
    some = SliceWiseGuide(guide, slices=2)
    some.training = True  # the guide itself stays in eval mode: its batch norms would see other slices
    embedding = some.encode(volumes)
    whole, valid = SliceWiseGuide(guide)(volumes, coarse), some.valid(embedding)[:, None].expand(-1, 3, -1, -1, -1)
    logits = some.decode(embedding, coarse)
    torch.testing.assert_close(logits[valid], whole[valid], rtol=0, atol=1e-4)
    assert not logits[~valid].any() and valid.float().mean() == pytest.approx(1 / 3)


def test_eval_mode_asks_for_all():
    slices, volumes = SliceWiseGuide(Stub(), slices=2), torch.rand(2, 1, 5, 8, 8)
    drawn = slices.train().encode(volumes)
    everything = slices.eval().encode(volumes)
    assert everything.chosen is None and len(everything.image) == 10 and slices.valid(everything) is None
    # An embedding of train mode keeps its slices, whoever decodes it: the teacher does so in eval mode.
    assert not slices.decode(drawn.detach()).flatten(3).any(3).all() and not slices.valid(drawn).all()
    assert slices.train().encode(volumes[:, :, :2]).chosen is None  # there are no more


def test_embeddings_of_some_slices_are_cut_and_joined():
    slices, volumes = SliceWiseGuide(Stub(), slices=2), torch.rand(3, 1, 9, 8, 8)
    whole = slices.encode(volumes)
    again = whole[:1].joined(whole[1:])
    assert torch.equal(again.chosen, whole.chosen) and torch.equal(again.image, whole.image)
    assert again.shape == (9, 8, 8) and len(whole[1:]) == 2 and len(whole[1:].image) == 4
    assert torch.equal(slices.decode(again), slices.decode(whole))
    with torch.no_grad():
        rest = slices.encode(volumes[1:])
    mixed = slices.encode(volumes[:1]).joined(rest)
    assert torch.equal(slices.valid(mixed)[1:], slices.valid(rest))


@pytest.mark.parametrize("count", [None, 2])
def test_one_backward_reaches_every_trainable_parameter_and_nothing_else(count):
    torch.manual_seed(0)
    guide, _ = build_sam_guide(
        "vit_tiny", image_size=64, num_classes=3, tuning={"name": "adapter"}, train=["tuning", "prompt"]
    )
    slices = SliceWiseGuide(guide, slices=count).train()
    volumes, coarse = torch.rand(2, 1, 4, 48, 80), torch.randn(2, 3, 4, 16, 16, requires_grad=True)
    embedding = slices.encode(volumes)
    mask = torch.randint(3, (2, 4, 48, 80))
    segmentation_loss(slices.decode(embedding, coarse), mask, valid=slices.valid(embedding)).backward()
    for name, parameter in slices.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None), name
    assert any(parameter.grad.any() for parameter in slices.parameters() if parameter.requires_grad)
    assert coarse.grad is None


def test_losses_leave_out_what_sam_was_not_asked():
    """By ``valid``: the student's slices that SAM said nothing of get no gradient, and SAM's loss is of the others."""
    stub, student = Stub(), torch.randn(2, 2, 7, 8, 8, requires_grad=True)
    slices, mask = SliceWiseGuide(stub, slices=3), torch.randint(2, (2, 7, 8, 8))
    embedding = slices.encode(torch.rand(2, 1, 7, 8, 8))
    logits, valid = slices.decode(embedding), slices.valid(embedding)
    sam_distillation_loss(student, logits, valid=valid).backward()
    touched = student.grad.abs().amax((1, 3, 4)) > 0  # (B, D)
    assert torch.equal(touched, valid[..., 0, 0]) and stub.factor.grad is None
    loss = segmentation_loss(logits, mask, valid=valid)
    ignored = mask.masked_fill(~valid, IGNORE)
    torch.testing.assert_close(loss, segmentation_loss(logits, ignored))


def test_its_parts_are_the_guide_s():
    """What is new, and so saved, is found inside of it as it is inside of a guide."""
    from knowsam.models.sam import trained_state

    guide, _ = build_sam_guide("vit_tiny", image_size=64, tuning={"name": "adapter"}, train=["tuning", "prompt"])
    inside = {f"guide.{name}" for name in trained_state(guide)}
    assert set(trained_state(SliceWiseGuide(guide))) == inside and isinstance(guide, SamGuide)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda s: s(torch.rand(1, 3, 64, 64)), r"volumes are \(1, 3, 64, 64\); expected \(B, C, D, H, W\)"),
        (lambda s: s(torch.rand(1, 3, 4, 64, 64), torch.rand(1, 3, 5, 8, 8)), r"\(B, K, D, h, w\) with D = 4"),
        (lambda s: s(torch.rand(1, 3, 4, 64, 64), torch.rand(1, 3, 8, 8)), r"\(B, K, D, h, w\) with D = 4"),
        (lambda s: s.decode(s.encode(torch.rand(1, 3, 4, 64, 64)), size=(5, 64, 64)), "volumes 4 slices deep"),
        (lambda s: s(torch.rand(1, 2, 4, 64, 64)), "SAM takes 3 channels, or 1"),
        (lambda s: SliceWiseGuide(s.guide, slices=0), "slices is 0; allowed is a number from 1, or None"),
    ],
)
def test_refusals(guide, call, words):
    with pytest.raises(ValueError, match=words):
        call(SliceWiseGuide(guide))
