"""Ignored pixels teach nothing, in any term of any method; and masks that label some classes only.

Networks here look at one pixel at a time: what lies under an ignored pixel can reach a term by that pixel alone.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from methods_stubs import CONV, MAX_STEPS, SIDE, make_batch, make_method
from torch import nn

from knowsam import components
from knowsam.errors import ContractError
from knowsam.losses import IGNORE, partial_segmentation_loss, segmentation_loss
from knowsam.methods.base import (
    Prediction,
    SSLMethod,
    StepOutput,
    Taught,
    certain_pixels,
    classes_by_pixel,
    known_pixels,
    supervised_loss,
)
from knowsam.methods.contract import check_output
from knowsam.methods.sam_teacher import SkdOptions
from knowsam.methods.with_skd import WithSKD
from knowsam.models.sam import Embedding, Sam, SamGuide, build_sam_guide
from knowsam.models.students import Students

LATE = MAX_STEPS - 1
OUTSIDE = Path(__file__).resolve().parents[1] / "outside"
LAB = {"bcp": "BCP", "cps": "CPS", "dan": "DAN", "fixmatch": "FixMatch", "unimatch": "UniMatch", "urpc": "URPC"}
OWN = list(components.METHODS)
CASES = [(name, skd) for name in (*OWN, *LAB) for skd in (False, True) if not (skd and name == "knowsam")]
every_method = pytest.mark.parametrize(("name", "skd"), CASES, ids=[n + ("+skd" if s else "") for n, s in CASES])
every_k = pytest.mark.parametrize("num_classes", [2, 4, 9])
every_dims = pytest.mark.parametrize("dims", [2, 3])


@pytest.fixture(scope="module", autouse=True)
def outside_lab():
    """The package of methods on the Python path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(OUTSIDE))
        yield


class PixelNet(nn.Module):
    """A student with features and a second output."""

    auxiliary_outputs = ("coarse",)

    def __init__(self, num_classes, dims):
        super().__init__()
        self.first, self.last, self.other = (
            CONV[dims](3, 6, 1),
            CONV[dims](6, num_classes, 1),
            CONV[dims](6, num_classes, 1),
        )

    def encode(self, images):
        return [self.first(images).tanh()]

    def decode(self, features):
        return 3 * self.last(features[0])

    def auxiliary(self, features):
        return {"coarse": self.other(features[0])}

    def forward(self, images):
        return self.decode(self.encode(images))


class PixelFusion(nn.Module):
    def __init__(self, num_classes, dims):
        super().__init__()
        self.merge = CONV[dims](2 * num_classes, num_classes, 1)

    def forward(self, first, second):
        return self.merge(torch.cat([first, second], 1))


class PixelGuide(nn.Module):
    def __init__(self, num_classes, dims):
        super().__init__()
        self.image_encoder, self.decoder = CONV[dims](3, 5, 1), CONV[dims](5 + num_classes, num_classes, 1)

    def encode(self, images):
        return Embedding(self.image_encoder(images))

    def decode(self, embedding, coarse_logits=None, size=None, first=None):
        return 3 * self.decoder(torch.cat([embedding.image, coarse_logits], 1)[:first])

    def forward(self, images, coarse_logits=None):
        return self.decode(self.encode(images), coarse_logits)


def make(name, num_classes, dims, skd):
    """A method on pixel networks, whatever it needs."""
    torch.manual_seed(0)
    target = components.METHODS.get(name) or f"outside_lab.{name}:{LAB[name]}"
    method_class = components.load(target)
    needs, guide = method_class.needs, PixelGuide(num_classes, dims)
    names = ("first", "second")[: needs.students or 1]
    students = {student: PixelNet(num_classes, dims) for student in names}
    fusion = PixelFusion(num_classes, dims) if needs.fusion else None
    offered = {
        "students": Students(students, fusion) if fusion is not None else Students(students),
        "sam_guide": guide,
        "max_steps": MAX_STEPS,
        "num_classes": num_classes,
        "in_channels": 3,
        "spatial_dims": dims,
    }
    method = components.call(method_class, offered, {"confidence_threshold": 0.0} if "match" in name else {})
    method = WithSKD(method, guide, MAX_STEPS, SkdOptions(rampup=0.0)) if skd else method
    return method.train(), needs


def some_ignored(batch, share=0.3, seed=3):
    """The batch with part of its masks ignored."""
    generator = torch.Generator().manual_seed(seed)
    masks = [batch.mask] if batch.second is None else [batch.mask, batch.second.mask]
    masks = [m.masked_fill(torch.rand(m.shape, generator=generator) < share, IGNORE) for m in masks]
    second = None if batch.second is None else batch.second._replace(mask=masks[1])
    return replace(batch, mask=masks[0], second=second)


def other_below(batch, where=IGNORE, seed=4):
    """The batch with other images wherever a mask has this id."""
    generator = torch.Generator().manual_seed(seed)

    def change(images, mask):
        return torch.where((mask == where)[:, None], torch.rand(images.shape, generator=generator), images)

    return replace(
        batch,
        labelled=(changed := change(batch.labelled, batch.mask)),
        plain=None if batch.plain is None else changed,
        second=None
        if batch.second is None
        else batch.second._replace(images=change(batch.second.images, batch.second.mask)),
    )


def step(method, batch):
    """Terms by name, and gradients by parameter, of one step."""
    method.zero_grad(set_to_none=True)
    torch.manual_seed(7)
    losses = method(batch, LATE).losses
    sum(losses.values()).backward()
    gradients = {n: p.grad.clone() for n, p in method.named_parameters() if p.grad is not None}
    return {name: value.detach() for name, value in losses.items()}, gradients


def without_discriminator(values):
    # It judges whole predictions, and by no label: what it sees of an image cannot have holes that give it away.
    return {name: value for name, value in values.items() if "discriminator" not in name}


@every_method
@every_k
@every_dims
def test_what_lies_under_ignored_pixels_changes_no_term_and_no_gradient(name, skd, num_classes, dims):
    method, needs = make(name, num_classes, dims, skd)
    batch = some_ignored(make_batch(num_classes, side=SIDE if dims == 2 else 8, dims=dims, needs=needs))
    losses, gradients = map(without_discriminator, step(method, batch))
    assert all(value.isfinite() for value in losses.values())
    for found, expected in zip(step(method, other_below(batch)), (losses, gradients), strict=True):
        found = without_discriminator(found)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, msg=lambda text, key=key: f"{key}: {text}")
    # Elsewhere, it does: a class that counts.
    changed, _ = step(method, other_below(batch, where=1))
    assert any(not torch.allclose(changed[key], losses[key]) for key in losses)


@every_method
@every_dims
def test_nothing_but_ignored_pixels_is_no_supervision(name, skd, dims):
    method, needs = make(name, 3, dims, skd)
    batch = make_batch(3, side=8, dims=dims, needs=needs)
    second = None if batch.second is None else batch.second._replace(mask=torch.full_like(batch.mask, IGNORE))
    batch = replace(batch, mask=torch.full_like(batch.mask, IGNORE), second=second)
    losses, gradients = step(method, batch)
    assert all(value.isfinite() for value in (*losses.values(), *gradients.values()) if value.ndim == 0)
    assert all(value.isfinite().all() for value in gradients.values())
    for term, value in losses.items():
        if term.startswith(("seg_", "sam")):
            assert value == 0, term
    if name == "supervised" and not skd:
        assert gradients and all((g == 0).all() for g in gradients.values())


@every_method
@every_dims
def test_a_batch_without_labelled_images(name, skd, dims):
    method, needs = make(name, 3, dims, skd)
    losses, gradients = step(method, make_batch(3, labelled=0, side=8, dims=dims, needs=needs))
    assert losses and all(value.isfinite() for value in losses.values())
    assert all(value.isfinite().all() for value in gradients.values())
    for term, value in losses.items():
        if term.startswith(("seg_", "sam")):
            assert value == 0, term


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("gradient", ["all", "labelled"])
def test_real_networks_without_labelled_images(name, gradient):
    torch.manual_seed(0)
    guide = build_sam_guide("vit_tiny", image_size=64, num_classes=3, tuning={"name": "adapter"})[0]
    options = {"gradient": gradient}
    if name == "knowsam":
        method = make_method(name, 3, guide=guide, skd=options)
    else:
        method = make_method(name, 3, guide=guide, skd=True, skd_options=options)
    losses, gradients = step(method.train(), make_batch(3, labelled=0, unlabelled=2, side=64))
    assert all(value.isfinite() for value in losses.values()) and losses["sam"] == 0
    assert all(value.isfinite().all() for value in gradients.values())


@pytest.mark.parametrize("name", ["cpcsam", "semisam"])
@pytest.mark.parametrize("num_classes", [2, 4, 9])
def test_sams_own_masks_get_no_gradient_at_ignored_pixels(name, num_classes, monkeypatch):
    """SAM looks at whole images: what its terms say of its masks, pixel by pixel."""
    torch.manual_seed(0)
    guide = build_sam_guide(
        "vit_tiny", image_size=64, num_classes=num_classes, tuning={"name": "adapter"}, freeze=False
    )
    guide = guide[0]
    method_class = components.load(f"outside_lab.{name}:{'CPCSAM' if name == 'cpcsam' else 'SemiSAM'}")
    students = Students({"unet": PixelNet(num_classes, 2)})
    offered = {"students": students, "sam": guide.sam, "sam_guide": guide, "num_classes": num_classes, "max_steps": 100}
    method = components.call(method_class, offered, {}).train()
    made = []

    def recording(cls, call):
        original = getattr(cls, call)

        def record(self, *args, **kwargs):
            out = original(self, *args, **kwargs)
            logits = out if isinstance(out, torch.Tensor) else out.logits
            logits.retain_grad()
            made.append(logits)
            return out

        monkeypatch.setattr(cls, call, record)

    recording(*((SamGuide, "decode") if name == "cpcsam" else (Sam, "forward")))
    batch = some_ignored(make_batch(num_classes, labelled=2, unlabelled=1, side=64, needs=method_class.needs))
    sum(method(batch, LATE).losses.values()).backward()
    assert made
    for logits in made:
        gradient = logits.grad[:2].flatten(1, -3).abs().sum(1)  # (L, H, W)
        assert (gradient[batch.mask == IGNORE] == 0).all() and (gradient[batch.mask != IGNORE] > 0).any()


class Turning(SSLMethod):
    """A student of turned images, which SAM teaches by its own logits, turned likewise."""

    def __init__(self, turn):
        super().__init__()
        torch.manual_seed(0)
        self.students, self.turn = Students({"unet": PixelNet(2, 2)}), turn

    def forward(self, batch, step):
        images = batch.join(batch.weak).images
        logits = self.students(self.turn(images))["unet"]
        supervised = segmentation_loss(self.students(batch.labelled)["unet"], batch.mask)
        return StepOutput({"seg": supervised}, taught={"unet": Taught(logits, "joined", self.turn)})

    def networks(self):
        return {"unet": self.students.network("unet")}

    def trainable_groups(self):
        return {"subnets": list(self.students.parameters()), **super().trainable_groups()}


@pytest.mark.parametrize(
    "turn", [lambda x: x.rot90(1, (-2, -1)), lambda x: x.roll(1, 0), lambda x: x.lerp(x.roll(1, -1), 0.25)]
)
def test_ignored_pixels_follow_what_a_method_did_to_the_images(turn):
    method = WithSKD(Turning(turn), PixelGuide(2, 2), MAX_STEPS, SkdOptions(rampup=0.0)).train()
    batch = some_ignored(make_batch(2))
    found, expected = (step(method, shown)[0]["skd_unet"] for shown in (batch, other_below(batch)))
    torch.testing.assert_close(found, expected)


def test_known_pixels():
    batch = some_ignored(make_batch(3))
    known = known_pixels(batch.join(batch.weak))
    assert known.shape == (5, SIDE, SIDE) and known[2:].all() and torch.equal(known[:2], batch.mask != IGNORE)


def test_mixed_ignored_pixels_are_marked_as_not_counted():
    method, needs = make("knowsam", 3, 2, False)
    mix = method(some_ignored(make_batch(3, needs=needs)), LATE).views.mix
    assert (mix.label == IGNORE).any() and torch.equal(mix.valid, mix.label != IGNORE)


# ---------------------------------------------------------------- sources that label some classes only

PARTIAL = [(name, skd) for name, skd in CASES if name != "bcp"]  # which says nothing of partial labels
every_partial = pytest.mark.parametrize(("name", "skd"), PARTIAL, ids=[n + ("+skd" if s else "") for n, s in PARTIAL])


@every_partial
@every_k
@every_dims
def test_whole_masks_are_a_special_case_of_partial_ones(name, skd, num_classes, dims):
    method, needs = make(name, num_classes, dims, skd)
    batch = some_ignored(make_batch(num_classes, side=8, dims=dims, needs=needs))
    every = torch.ones(len(batch.mask), num_classes, dtype=torch.bool)
    expected, found = step(method, batch), step(method, replace(batch, valid_classes=every))
    for of, at in zip(found, expected, strict=True):
        for key, value in at.items():
            torch.testing.assert_close(of[key], value, msg=lambda text, key=key: f"{key}: {text}")


@every_partial
@every_k
@every_dims
def test_an_unlabelled_class_is_background_or_itself(name, skd, num_classes, dims):
    """A mask has the unlabelled class as background, or by its own id: the same terms. Not so if it is labelled."""
    method, needs = make(name, num_classes, dims, skd)
    batch = make_batch(num_classes, side=8, dims=dims, needs=needs)
    classes = torch.ones(len(batch.mask), num_classes, dtype=torch.bool)
    classes[0, 1] = False
    mask = batch.mask.clone()
    mask[0] = mask[0].masked_fill(mask[0] == 1, 0)
    by_id, as_background = (step(method, replace(batch, mask=m, valid_classes=classes))[0] for m in (batch.mask, mask))
    for term, value in by_id.items():
        torch.testing.assert_close(as_background[term], value, msg=lambda text, term=term: f"{term}: {text}")
    whole = step(method, replace(batch, mask=mask))[0]
    assert all(not torch.allclose(whole[term], by_id[term]) for term in whole if "seg_" in term or term == "sam")


def test_mixed_images_keep_the_classes_of_each_pixels_source():
    method, needs = make("knowsam", 4, 2, False)
    batch = make_batch(4, 2, 2, needs=needs)
    batch = replace(batch, valid_classes=torch.tensor([[True, False, True, False], [True] * 4]))
    out = method(batch, LATE)
    mix = out.views.mix
    came_from = torch.where(mix.other, torch.tensor([2, 3, 0, 1]).view(4, 1, 1), torch.arange(4).view(4, 1, 1))
    classes = torch.cat([batch.valid_classes, torch.ones(2, 4, dtype=torch.bool)])[came_from].movedim(-1, 1)
    expected = partial_segmentation_loss(mix.logits, mix.label, classes, valid=mix.valid)
    torch.testing.assert_close(out.losses["mix_seg_fusion"].detach(), expected)
    everywhere = classes_by_pixel(batch.join(batch.weak))
    assert everywhere.shape == (4, 4, SIDE, SIDE) and everywhere[2:].all() and not everywhere[0, 1].any()


def test_only_what_is_certain_is_judged():
    batch = make_batch(3)
    assert certain_pixels(batch) is None
    batch = replace(batch, valid_classes=torch.tensor([[True, True, False], [False, True, True]]))
    certain = certain_pixels(batch)
    assert torch.equal(certain[0], batch.mask[0] > 0) and certain[1].all()
    method, _ = make("supervised", 3, 2, False)
    assert all(torch.equal(p.valid, certain) for p in method(batch, 0).predictions.values())


def test_supervised_loss_takes_the_first_rows():
    batch, logits = some_ignored(make_batch(3)), torch.randn(5, 3, SIDE, SIDE)
    expected = segmentation_loss(logits[:2], batch.mask)
    assert torch.equal(supervised_loss(logits, batch), expected)
    assert torch.equal(supervised_loss(logits[:2], batch.join(batch.weak)), expected)


@pytest.mark.parametrize("skd", [False, True])
def test_a_method_that_knows_no_partial_labels_is_refused(skd):
    method, needs = make("bcp", 3, 2, skd)
    batch = make_batch(3, needs=needs)
    out = method(batch, 0)
    check_output(method, out, batch)
    batch = replace(batch, valid_classes=torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(ContractError, match="BCP takes every mask for complete") as caught:
        check_output(method, out, batch)
    assert "partial_labels=True" in caught.value.hint
    own, needs = make("mean_teacher", 3, 2, skd)
    batch = replace(make_batch(3, needs=needs), valid_classes=batch.valid_classes)
    check_output(own, own(batch, 0), batch)


def test_pictures_show_no_class_at_ignored_pixels(monkeypatch):
    from knowsam.engine import pictures

    batch = some_ignored(make_batch(3))
    logits = torch.randn(2, 3, SIDE, SIDE)
    mask = batch.mask.clone()  # not the batch's own: drawn with its own label
    out = StepOutput({}, {"mixed": Prediction(batch.labelled, logits, mask)})
    seen, panel = [], pictures.Panel

    def record(caption, image, label=None, **options):
        seen.append((caption, label))
        return panel(caption, image, label, **options)

    monkeypatch.setattr(pictures, "Panel", record)
    pictures.draw_step(batch, out, class_names=["a", "b", "c"])
    labels = [label for caption, label in seen if caption in ("label", "truth")]
    assert labels and all((label != IGNORE).all() and (label == -1).any() for label in labels)
