"""Which parameters does each term reach, what is mixed with what, and what does each term weigh."""

import copy
import math
from dataclasses import replace

import methods_stubs
import pytest
import torch
from methods_stubs import MAX_STEPS, PUBLISHED, SIDE, StubGuide, make_batch, make_students, reached

from knowsam.errors import ContractError
from knowsam.losses import consistency_loss, entropy_loss, entropy_map, sam_distillation_loss, segmentation_loss
from knowsam.methods.base import SSLMethod, StepOutput, Taught
from knowsam.methods.knowsam import KnowSAM
from knowsam.methods.sam_teacher import SamTeacher, SkdOptions
from knowsam.methods.with_skd import WithSKD
from knowsam.models.sam import build_sam_guide

LATE = MAX_STEPS - 1


def make_method(name, num_classes, **options):
    """A method with the settings that the formulas below are written for, and some of them otherwise."""
    own = {key: options.pop(key) for key in ("skd", "guide", "fusion", "dims") if key in options and name != "knowsam"}
    own |= {key: options.pop(key) for key in ("guide", "dims") if key in options}
    settings = {
        key: value | options[key] if isinstance(value, dict) and isinstance(options.get(key), dict) else value
        for key, value in PUBLISHED[name].items()
    }
    settings |= {
        key: value for key, value in options.items() if not isinstance(settings.get(key), dict) or value is None
    }
    return methods_stubs.make_method(name, num_classes, skd_options=methods_stubs.SKD, **own, **settings)


CLASSES = (2, 4, 9)
UNET, VNET, SAM, ALL_THREE = {"unet"}, {"vnet"}, {"sam"}, {"unet", "vnet", "fusion_head"}

SEG = {"seg_unet": UNET, "seg_vnet": VNET, "seg_fusion": ALL_THREE}
CONSISTENCY = {"consistency_unet": UNET, "consistency_vnet": VNET}
SKD = {"sam": SAM, "skd_unet": UNET, "skd_vnet": VNET}
REACH = {
    "supervised": SEG,
    "supervised+skd": {**SEG, **SKD},
    "mean_teacher": {**SEG, **CONSISTENCY, "consistency_fusion": ALL_THREE},
    "mean_teacher+skd": {**SEG, **CONSISTENCY, "consistency_fusion": ALL_THREE, **SKD},
    "knowsam": {
        **SEG,
        **SKD,
        **CONSISTENCY,
        "entropy_unet": UNET,
        "entropy_vnet": VNET,
        "mix_seg_fusion": ALL_THREE,
        "mix_seg_unet": UNET,
        "mix_seg_vnet": VNET,
        "mix_entropy_unet": UNET,
        "mix_entropy_vnet": VNET,
        "mix_consistency_unet": UNET,
        "mix_consistency_vnet": VNET,
    },
}


@pytest.mark.parametrize("num_classes", CLASSES)
@pytest.mark.parametrize("case", REACH)
def test_reach(case, num_classes):
    name, _, skd = case.partition("+")
    method = make_method(name, num_classes, skd=bool(skd)).train()
    if name == "mean_teacher":
        method(make_batch(num_classes), 0)
    losses = method(make_batch(num_classes), LATE).losses
    assert {term: reached(method, loss) for term, loss in losses.items()} == REACH[case]


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("view", ["weak", "strong"])
def test_reach_does_not_depend_on_how_sam_teaches(mode, view):
    method = make_method("knowsam", 3, skd={"teacher_mode": mode, "view": view}).train()
    losses = method(make_batch(3), LATE).losses
    assert {term: reached(method, loss) for term, loss in losses.items()} == REACH["knowsam"]


@pytest.mark.parametrize("consistency", ["mse", "bce", "pseudo_label"])
def test_reach_of_every_mean_teacher_consistency(consistency):
    method = make_method("mean_teacher", 3, consistency=consistency).train()
    losses = method(make_batch(3), LATE).losses
    assert {term: reached(method, loss) for term, loss in losses.items()} == REACH["mean_teacher"]


def test_reach_with_the_real_sam():
    torch.manual_seed(0)
    guide, _ = build_sam_guide("vit_tiny", image_size=64, num_classes=2, tuning={"name": "adapter"})
    method = make_method("knowsam", 2, guide=guide).train()
    losses = method(make_batch(2, 1, 1, side=64), LATE).losses
    assert {term: reached(method, loss) for term, loss in losses.items()} == REACH["knowsam"]


@pytest.mark.parametrize("num_classes", CLASSES)
def test_co_training_is_symmetric(num_classes):
    """Swapping the two students swaps their terms: neither is the other's constant target."""
    method = make_method("knowsam", num_classes, mix=None).eval()
    batch = make_batch(num_classes)
    losses = method(batch, LATE).losses
    first, second = method.students.subnets["unet"], method.students.subnets["vnet"]
    method.students.subnets["unet"], method.students.subnets["vnet"] = second, first
    swapped = method(batch, LATE).losses
    for term in ("seg", "entropy", "consistency"):
        torch.testing.assert_close(losses[f"{term}_unet"], swapped[f"{term}_vnet"])
        torch.testing.assert_close(losses[f"{term}_vnet"], swapped[f"{term}_unet"])
    gradient = torch.autograd.grad(losses["consistency_unet"], list(first.parameters()), retain_graph=True)
    opposite = torch.autograd.grad(losses["consistency_vnet"], list(second.parameters()))
    for gradients in (gradient, opposite):
        assert sum(g.abs().sum() for g in gradients) > 0


# ---------------------------------------------------------------- arithmetic


def logits_of(method, batch):
    """Students' and SAM's logits as the published recipe makes them; the method must be in eval mode."""
    images = torch.cat([batch.labelled, batch.strong[0]])
    logits = method.students(images)
    shown = images if method.sam_teacher.options.view == "strong" else torch.cat([batch.labelled, batch.weak])
    return images, logits, method.sam_teacher.guide(shown, logits["fusion"])


def ramp(step, length):
    return math.exp(-5 * (1 - min(step / length, 1)) ** 2)


@pytest.mark.parametrize("num_classes", CLASSES)
@pytest.mark.parametrize("step", [0, 10, MAX_STEPS])
@pytest.mark.parametrize("view", ["weak", "strong"])
def test_weights_of_the_published_recipe(num_classes, step, view):
    """(U + V) / 2 + fusion, SAM apart; SKD 1.0, entropy 0.9, consistency 10 * 0.1 at the end of its ramp."""
    method = make_method("knowsam", num_classes, skd={"rampup": 0.0, "view": view}, mix=None).eval()
    batch = make_batch(num_classes)
    losses = method(batch, step).losses
    _, logits, sam = logits_of(method, batch)
    expected = {
        "sam": segmentation_loss(sam[:2], batch.mask),
        "seg_fusion": segmentation_loss(logits["fusion"][:2], batch.mask),
    }
    for v, other in (("unet", "vnet"), ("vnet", "unet")):
        expected[f"seg_{v}"] = segmentation_loss(logits[v][:2], batch.mask) / 2
        expected[f"skd_{v}"] = sam_distillation_loss(logits[v], sam, temperature=10.0) / 2
        expected[f"entropy_{v}"] = 0.9 * entropy_loss(logits[v]) / 2
        expected[f"consistency_{v}"] = ramp(step, MAX_STEPS) * consistency_loss(logits[v], logits[other]) / 2
    assert losses.keys() == expected.keys()
    for term, value in expected.items():
        torch.testing.assert_close(losses[term], value, msg=lambda text, t=term: f"{t}: {text}")


def test_ramps_and_factors_are_the_arguments():
    settings = {
        "skd": {"weight": 3.0, "temperature": 4.0, "rampup": 0.5},
        "entropy_weight": 0.25, "consistency": {"weight": 2.0, "rampup": 0.2}, "mix": None,
    }  # fmt: skip
    method = make_method("knowsam", 3, **settings).eval()
    batch = make_batch(3)
    _, logits, sam = logits_of(method, batch)
    for step in (0, 10, 20, 50, 90):
        out = method(batch, step)
        skd = 1.5 * ramp(step, 50) * sam_distillation_loss(logits["unet"], sam, temperature=4.0)
        torch.testing.assert_close(out.losses["skd_unet"], skd)
        torch.testing.assert_close(out.losses["entropy_unet"], 0.125 * entropy_loss(logits["unet"]))
        agreement = ramp(step, 20) * consistency_loss(logits["unet"], logits["vnet"])
        torch.testing.assert_close(out.losses["consistency_unet"], agreement)
        assert out.monitors["skd_weight"].item() == pytest.approx(3 * ramp(step, 50))
        assert out.monitors["consistency_weight"].item() == pytest.approx(2 * ramp(step, 20))


def test_skd_confidence_threshold_leaves_unsure_pixels_out():
    batch = make_batch(3)
    method = make_method("knowsam", 3, skd={"rampup": 0.0}, mix=None).eval()
    _, logits, sam = logits_of(method, batch)
    confidence = sam.softmax(1).amax(1)
    teacher, threshold = method.sam_teacher, confidence.median().item()
    teacher.options = replace(teacher.options, confidence_threshold=threshold)
    sure = confidence >= threshold
    losses = method(batch, 0).losses
    expected = 0.5 * sam_distillation_loss(logits["unet"], sam, temperature=10.0, valid=sure)
    torch.testing.assert_close(losses["skd_unet"], expected)
    teacher.options = replace(teacher.options, confidence_threshold=1.0)
    assert method(batch, 0).losses["skd_unet"].item() == 0


def test_sam_teaches_in_eval_mode_and_learns_in_train_mode():
    method = make_method("knowsam", 2, mix=None).train()
    modes = []
    teacher, guide = method.sam_teacher, method.sam_teacher.guide
    guide.prompt.register_forward_hook(lambda module, *_: modes.append((module.training, torch.is_grad_enabled())))
    tracked = guide.prompt[1].num_batches_tracked
    method(make_batch(2), 0)
    assert modes == [(True, True), (False, False)]
    assert tracked == 1 and guide.prompt.training

    modes.clear()
    teacher.options = replace(teacher.options, teacher_mode="train")
    method(make_batch(2), 0)
    assert modes == [(True, True)]


def test_sam_sees_the_view_that_was_asked_for():
    for view in ("weak", "strong"):
        method = make_method("knowsam", 2, skd={"view": view})
        seen = []
        method.sam_teacher.guide.image_encoder.register_forward_pre_hook(
            lambda _, inputs, seen=seen: seen.append(inputs[0])
        )
        batch = make_batch(2)
        method(batch, 0)
        shown = batch.weak if view == "weak" else batch.strong[0]
        assert torch.equal(torch.cat(seen), torch.cat([batch.labelled, shown]))


@pytest.mark.parametrize("modes", [False, True])
def test_what_is_asked_once_is_computed_once(modes):
    """One pass of the encoder serves learning and teaching, unless it computes otherwise in eval mode."""
    method = make_method("knowsam", 2, guide=StubGuide(2, modes=modes)).train()
    guide = method.sam_teacher.guide
    method(make_batch(2), LATE)
    assert guide.encoded == (2 if modes else 1)


def test_a_frozen_part_of_the_guide_stays_in_its_mode():
    method = make_method("knowsam", 2, guide=StubGuide(2, modes=True)).train()
    norm = method.sam_teacher.guide.image_encoder[1].eval()
    method(make_batch(2), 0)
    assert not norm.training and method.sam_teacher.guide.prompt.training


def test_one_images_teacher_does_not_depend_on_the_others():
    """With batch norm in the encoder, too: the teacher's pass is in eval mode throughout."""
    torch.manual_seed(0)
    teacher = SamTeacher(StubGuide(2, modes=True), MAX_STEPS).train()
    batch, prompt = make_batch(2), torch.randn(5, 2, SIDE, SIDE)
    changed = replace(batch, weak=torch.cat([batch.weak[:1] + 0.3, batch.weak[1:]]))
    first = copy.deepcopy(teacher)(batch, prompt).logits
    second = copy.deepcopy(teacher)(changed, prompt).logits
    # The pass that learns moved running statistics alike or not: the teacher's own statistics are what counts.
    assert not torch.equal(first[2], second[2])
    frozen = copy.deepcopy(teacher)
    frozen.guide.image_encoder[1].momentum = frozen.guide.prompt[1].momentum = 0.0
    first, second = (copy.deepcopy(frozen)(shown, prompt).logits for shown in (batch, changed))
    assert torch.equal(torch.cat([first[:2], first[3:]]), torch.cat([second[:2], second[3:]]))


# ---------------------------------------------------------------- mixing


def mix_by_loops(images, labels, sure, uncertainty, labelled, *, grid=4, cells=5, largest=True):
    """The mix, one cell after the other: image b takes its partner's pixels in its own chosen cells."""
    total, unlabelled, side = len(images), len(images) - labelled, images.shape[-1] // grid
    mixed, mixed_label, mixed_sure = images.clone(), labels.clone(), sure.clone()
    for b in range(total):
        partner = labelled + b % unlabelled if b < labelled else (b - labelled) % labelled
        scores = {}
        for row in range(grid):
            for column in range(grid):
                y, x = slice(row * side, (row + 1) * side), slice(column * side, (column + 1) * side)
                scores[row, column] = uncertainty[b, y, x].double().mean().item()
        for row, column in sorted(scores, key=scores.get, reverse=largest)[:cells]:
            y, x = slice(row * side, (row + 1) * side), slice(column * side, (column + 1) * side)
            mixed[b, :, y, x] = images[partner, :, y, x]
            mixed_label[b, y, x] = labels[partner, y, x]
            mixed_sure[b, y, x] = sure[partner, y, x]
    return mixed, mixed_label, mixed_sure


@pytest.mark.parametrize("num_classes", CLASSES)
@pytest.mark.parametrize("sizes", [(2, 2), (2, 3), (4, 1)])
@pytest.mark.parametrize("settings", [{}, {"pick": "least_uncertain"}, {"confidence_threshold": 0.5, "cells": 9}])
def test_mixed_losses_equal_a_loop_over_cells(num_classes, sizes, settings):
    method = make_method("knowsam", num_classes, mix=settings).eval()
    batch = make_batch(num_classes, *sizes)
    labelled = sizes[0]
    images, logits, sam = logits_of(method, batch)
    confidence, sam_label = sam.softmax(1).max(1)
    label = torch.cat([batch.mask, sam_label[labelled:]])
    sure = torch.cat(
        [
            torch.ones_like(batch.mask, dtype=torch.bool),
            confidence[labelled:] >= settings.get("confidence_threshold", 0),
        ]
    )
    mixed, label, sure = mix_by_loops(
        images, label, sure, entropy_map(logits["fusion"]), labelled,
        cells=settings.get("cells", 5), largest="pick" not in settings,
    )  # fmt: skip

    seen = []
    method.students.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    losses = method(batch, LATE).losses
    assert len(seen) == 2
    assert torch.equal(seen[1], mixed)

    again = method.students(mixed)
    fused_label = again["fusion"].argmax(1)[labelled:]
    weight = ramp(LATE, MAX_STEPS)
    expected = {"mix_seg_fusion": segmentation_loss(again["fusion"], label, valid=sure)}
    for v, other in (("unet", "vnet"), ("vnet", "unet")):
        expected[f"mix_seg_{v}"] = segmentation_loss(again[v], label, valid=sure) / 2
        expected[f"mix_entropy_{v}"] = 0.9 * entropy_loss(again[v]) / 2
        agreement = consistency_loss(again[v], again[other]) + segmentation_loss(again[v][labelled:], fused_label)
        expected[f"mix_consistency_{v}"] = weight * agreement / 2
    assert {t for t in losses if t.startswith("mix_")} == expected.keys()
    for term, value in expected.items():
        torch.testing.assert_close(losses[term], value, msg=lambda text, t=term: f"{t}: {text}")


def recorded_segmentation(monkeypatch):
    """(mask, valid) of every segmentation loss on mixed labels that a KnowSAM step asks for."""
    calls = []

    def record(logits, mask, valid_classes, *, valid=None):
        assert valid_classes is None
        calls.append((mask, valid))
        return segmentation_loss(logits, mask, valid=valid)

    monkeypatch.setattr("knowsam.methods.knowsam.partial_segmentation_loss", record)
    return calls


def test_mix_confidence_threshold_masks_pseudo_labels_only(monkeypatch):
    """A threshold nobody meets leaves exactly the pixels that carry a true mask."""
    method = make_method("knowsam", 3, mix={"confidence_threshold": 1.0}).eval()
    calls = recorded_segmentation(monkeypatch)
    method(make_batch(3, 2, 2), LATE)
    assert len(calls) == 3  # unet, vnet, fusion
    valid = calls[0][1]
    per_image = valid.flatten(1).float().mean(1)
    # labelled images keep 11 of 16 cells of truth, unlabelled ones receive 5
    assert per_image.tolist() == pytest.approx([11 / 16] * 2 + [5 / 16] * 2)


def test_without_threshold_every_mixed_pixel_counts(monkeypatch):
    calls = recorded_segmentation(monkeypatch)
    make_method("knowsam", 3).eval()(make_batch(3), LATE)
    assert len(calls) == 3 and all(valid.all() for _, valid in calls)


def test_true_masks_follow_their_pixels(monkeypatch):
    """Paint the class into the image: wherever a mixed pixel came from a labelled image, the label says its class."""
    method = make_method("knowsam", 4, mix={"confidence_threshold": 1.0}).eval()
    batch = make_batch(4, 3, 2)
    batch.labelled = (batch.mask[:, None].float() / 10 + 0.5).expand(-1, 3, -1, -1).contiguous()
    batch.weak = torch.zeros(2, 3, SIDE, SIDE)
    batch.strong = (batch.weak,)
    seen = []
    method.students.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    calls = recorded_segmentation(monkeypatch)
    method(batch, LATE)
    label, valid = calls[0]
    true = seen[1][:, 0] > 0.4
    assert torch.equal(valid, true)
    assert torch.equal(label[true], ((seen[1][:, 0][true] - 0.5) * 10).round().long())


@pytest.mark.parametrize("share", [0.2, 0.6, 1.0])
def test_mixing_climbs_from_its_start_to_its_weight(share):
    settings = {"start": 0.5, "weight": 1.0, "rampup": 0.0}
    step, batch = int(MAX_STEPS * (0.5 + 0.5 * share)), make_batch(2)
    method = make_method("knowsam", 2, mix=settings).eval()
    whole = {k: v.item() for k, v in method(batch, step).losses.items() if k.startswith("mix_")}
    gentle = make_method("knowsam", 2, mix=settings | {"weight": 0.4, "rampup": 0.5}).eval()
    gentle.load_state_dict(method.state_dict())
    weighed = {k: v.item() for k, v in gentle(batch, step).losses.items() if k.startswith("mix_")}
    factor = 0.4 * math.exp(-5 * (1 - (step - 0.5 * MAX_STEPS) / (0.5 * MAX_STEPS)) ** 2)
    assert whole and weighed == pytest.approx({k: factor * v for k, v in whole.items()}, rel=1e-5)


def test_when_mixing_starts():
    method = make_method("knowsam", 2, mix={"start": 0.24})

    def mixes(step):
        return any(term.startswith("mix_") for term in method(make_batch(2), step).losses)

    assert [mixes(step) for step in (0, 23, 24, 25, 99)] == [False, False, False, True, True]
    method = make_method("knowsam", 2, mix=None)
    assert not mixes(LATE)


# ---------------------------------------------------------------- the other methods' arithmetic


@pytest.mark.parametrize("num_classes", CLASSES)
def test_supervised_weights(num_classes):
    method = make_method("supervised", num_classes).eval()
    batch = make_batch(num_classes)
    logits = method.students(batch.labelled)
    losses = method(batch, 0).losses
    for name, share in (("unet", 0.5), ("vnet", 0.5), ("fusion", 1.0)):
        torch.testing.assert_close(losses[f"seg_{name}"], share * segmentation_loss(logits[name], batch.mask))


def test_supervised_shows_its_students_what_it_is_given():
    """Without SAM the experiment gives it no unlabelled images, and batch statistics are of the labelled ones."""
    batch = make_batch(2)
    alone = replace(batch, weak=batch.weak[:0], strong=(batch.strong[0][:0],))
    assert torch.equal(make_method("supervised", 2)(alone, 0).predictions["unet"].images, batch.labelled)
    taught = make_method("supervised", 2)(batch, 0)
    assert torch.equal(taught.predictions["unet"].images, torch.cat([batch.labelled, batch.strong[0]]))
    assert set(taught.losses) == {"seg_unet", "seg_vnet", "seg_fusion"}


@pytest.mark.parametrize("step", [0, 20, 80])
def test_mean_teacher_weights(step):
    """The teacher sees the weak view of the same images; 10 * ramp over 40 % of the run, shared by the outputs."""
    method = make_method("mean_teacher", 3).eval()
    with torch.no_grad():
        for p in method.teacher.parameters():
            p.mul_(1.5)
    batch = make_batch(3)
    logits = method.students(torch.cat([batch.labelled, batch.strong[0]]))
    target = method.teacher(batch.weak)["fusion"].softmax(1)
    losses = method(batch, step).losses
    for name, x in logits.items():
        expected = 10 * ramp(step, 40) / 3 * (x[2:].softmax(1) - target).square().mean()
        torch.testing.assert_close(losses[f"consistency_{name}"], expected)


def test_mean_teacher_average_includes_buffers():
    method = make_method("mean_teacher", 2, ema_decay=0.75).train()
    method(make_batch(2), 0)
    method.after_step(0)  # decay 0: a copy
    average = method.teacher.average
    for a, b in zip(average.state_dict().values(), method.students.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    before = {k: v.clone() for k, v in average.state_dict().items()}
    method(make_batch(2, seed=4), 1)
    with torch.no_grad():
        for p in method.students.parameters():
            p.add_(1.0)
    method.after_step(1)  # 1 - 1/2 < 0.75
    students = method.students.state_dict()
    assert any("running_mean" in key for key in before)
    for key, value in average.state_dict().items():
        expected = 0.5 * before[key] + 0.5 * students[key] if value.is_floating_point() else students[key]
        torch.testing.assert_close(value, expected)
    before = {k: v.clone() for k, v in average.state_dict().items()}
    method.after_step(50)
    for key, value in average.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, 0.75 * before[key] + 0.25 * students[key])


def count_encodings(guide):
    """Every image that SAM encodes, as it is encoded."""
    seen, encode = [], guide.encode
    guide.encode = lambda images: seen.append(images) or encode(images)
    return seen


@pytest.mark.parametrize("step", [0, 40])
@pytest.mark.parametrize("name", ["supervised", "mean_teacher"])
def test_with_skd_arithmetic(name, step):
    """The fused logits prompt SAM, in training as in prediction; the students are taught, the fusion head is not."""
    method = make_method(name, 3, skd=True).eval()
    batch = make_batch(3)
    images, shown = (torch.cat([batch.labelled, view]) for view in (batch.strong[0], batch.weak))
    logits, guide = method.method.students(images), method.sam_teacher.guide
    sam = guide(shown, logits["fusion"])
    seen = count_encodings(guide)
    losses = method(batch, step).losses
    torch.testing.assert_close(torch.cat(seen), shown)  # the weak view, each once, the labelled ones first
    torch.testing.assert_close(losses["sam"], segmentation_loss(sam[:2], batch.mask))
    assert {term for term in losses if term.startswith("skd_")} == {"skd_unet", "skd_vnet"}
    for student in ("unet", "vnet"):
        expected = ramp(step, 40) / 2 * sam_distillation_loss(logits[student], sam, temperature=10.0)
        torch.testing.assert_close(losses[f"skd_{student}"], expected)
    prompted = guide(images, logits["fusion"])
    torch.testing.assert_close(method.predict(images)["sam"], prompted)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_with_skd_teaches_in_the_mode_asked_for(mode):
    method = make_method("supervised", 2, skd=True)
    method.sam_teacher.options = SkdOptions(teacher_mode=mode)
    method.train()
    modes = []
    method.sam_teacher.guide.prompt.register_forward_hook(lambda module, *_: modes.append(module.training))
    method(make_batch(2), 0)
    assert modes == ([True, False] if mode == "eval" else [True])
    assert method.sam_teacher.guide.training


@pytest.mark.parametrize("prompt", [{}, {"sparse": False}])
def test_sam_learns_from_labelled_images_without_a_graph_of_the_others(prompt):
    """The same logits; the others' only way to the gradient, the prompt generator's batch statistics, is left out."""
    torch.manual_seed(0)
    tuning, prompts = {"name": "adapter", "zero_init": False}, {"name": "learned", **prompt}
    guide, _ = build_sam_guide("vit_tiny", image_size=64, num_classes=2, tuning=tuning, prompt=prompts)
    images, coarse = torch.rand(4, 3, 64, 64), torch.randn(4, 2, 64, 64)
    weights = torch.randn(2, 2, 64, 64)

    def ask(gradient):
        guide.load_state_dict(start)
        torch.manual_seed(1)  # dropout
        guide.zero_grad()
        shown = images.clone().requires_grad_()
        teacher = SamTeacher(guide.train(), MAX_STEPS, SkdOptions(gradient=gradient))
        sam_logits, learned_at, teacher_logits, asked = teacher._ask_twice(shown, coarse, 2)
        assert learned_at is None and asked is None, "pictures are asked for everywhere"
        (sam_logits * weights).sum().backward()
        gradients = {name: p.grad for name, p in guide.named_parameters() if p.grad is not None}
        return sam_logits, teacher_logits, gradients, shown.grad

    start = {name: value.clone() for name, value in guide.state_dict().items()}
    logits, teacher, gradients, by_image = ask("all")
    assert (by_image[2:].abs().max() > 0) == (not prompt)
    few_logits, few_teacher, few_gradients, by_image = ask("labelled")
    assert len(logits) == len(few_logits) == 2 and few_teacher.shape[0] == 4
    torch.testing.assert_close(few_logits, logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(few_teacher, teacher, rtol=1e-5, atol=1e-5)
    assert by_image[:2].abs().max() > 0 and by_image[2:].abs().max() == 0
    assert gradients.keys() == few_gradients.keys()
    for name, gradient in gradients.items():
        if "image_encoder" in name and not prompt:
            continue  # the batch statistics
        torch.testing.assert_close(few_gradients[name], gradient, rtol=1e-3, atol=1e-4, msg=name)


def test_with_skd_does_not_change_the_method_within():
    batch = make_batch(3)
    wrapped = make_method("mean_teacher", 3, skd=True).eval()
    inner, outer = wrapped.method(batch, 30).losses, wrapped(batch, 30).losses
    assert all(torch.equal(inner[term], outer[term]) for term in inner)
    assert wrapped.inference_model().state_dict().keys() == wrapped.method.inference_model().state_dict().keys()


class Mixing(SSLMethod):
    """A student that sees images whose lower half is the next image's, and says so."""

    def __init__(self, prompt=False, transform=True):
        super().__init__()
        self.inner = make_method("supervised", 2)
        self.prompt, self.transform = prompt, transform

    def mix(self, x):
        return torch.cat([x[..., : SIDE // 2, :], x.roll(1, 0)[..., SIDE // 2 :, :]], -2)

    def forward(self, batch, step):
        logits = self.inner.students(self.mix(batch.weak))["unet"]
        supervised = segmentation_loss(self.inner.students(batch.labelled)["unet"], batch.mask)
        plain = self.inner.students(torch.cat([batch.labelled, batch.weak]))["unet"] if self.prompt else None
        taught = Taught(logits, "unlabelled", self.mix if self.transform else None)
        return StepOutput({"seg": supervised}, taught={"unet": taught}, prompt=plain)

    def networks(self):
        return self.inner.networks()

    def trainable_groups(self):
        return self.inner.trainable_groups()


@pytest.mark.parametrize("prompt", [False, True])
def test_with_skd_teaches_mixed_images_what_sam_says_of_unmixed_ones(prompt):
    torch.manual_seed(0)
    method = WithSKD(Mixing(prompt), StubGuide(2), MAX_STEPS, SkdOptions(rampup=0.0)).eval()
    batch = make_batch(2)
    shown = torch.cat([batch.labelled, batch.weak])
    # Without a prompt of its own, SAM is prompted with the deployed network's logits.
    logits = method.method.inner.students(shown)["unet" if prompt else "fusion"]
    sam = method.method.mix(method.sam_teacher.guide(shown, logits)[2:])
    student = method.method.inner.students(method.method.mix(batch.weak))["unet"]
    expected = sam_distillation_loss(student, sam, temperature=10.0)
    torch.testing.assert_close(method(batch, 0).losses["skd_unet"], expected)


def test_taught_valid_leaves_pixels_out():
    torch.manual_seed(0)
    teacher, batch = SamTeacher(StubGuide(2), MAX_STEPS, SkdOptions(rampup=0.0)).eval(), make_batch(2)
    logits, valid = torch.randn(5, 2, SIDE, SIDE, requires_grad=True), torch.rand(5, SIDE, SIDE) < 0.5
    said = teacher(batch, logits)
    (lesson,) = teacher.lessons(said, {"unet": Taught(logits, valid=valid)}, 0)
    assert torch.equal(lesson.valid, valid)
    (lesson,) = teacher.lessons(said, {"unet": Taught(logits[:2], "labelled")}, 0)
    assert torch.equal(lesson.target, said.logits[:2]) and lesson.valid.all()


def test_logits_that_sams_do_not_fit_are_told():
    torch.manual_seed(0)
    teacher, batch = SamTeacher(StubGuide(2), MAX_STEPS), make_batch(2)
    said = teacher(batch, torch.randn(5, 2, SIDE, SIDE))
    with pytest.raises(ContractError, match=r"unet is reported as taught .*view 'joined' are \(5, 2, 16, 16\)"):
        list(teacher.lessons(said, {"unet": Taught(torch.randn(3, 2, SIDE, SIDE))}, 0))


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"skd": {"teacher_mode": "off"}}, "teacher_mode must be one of .*got 'off'"),
        ({"skd": {"view": "medium"}}, "view must be one of .*got 'medium'"),
        ({"skd": {"temperature": 0}}, "temperature must be > 0"),
        ({"consistency": {"weight": -1}}, "weight must be in 0"),
    ],
)
def test_knowsam_refuses(options, text):
    with pytest.raises(ValueError, match=text):
        make_method("knowsam", 2, **options)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"pick": "most"}, "pick must be"),
        ({"cells": 17}, "cells must be in"),
        ({"grid": 2}, "cells must be in"),
    ],
)
def test_mixing_settings_are_refused_before_the_run(options, text):
    """Not thousands of steps later, when mixing starts."""
    with pytest.raises(ValueError, match=text):
        make_method("knowsam", 2, mix=options)


def test_knowsam_needs_a_pair_and_a_fusion_head():
    with pytest.raises(ValueError, match="2 students with a fusion head, got 1"):
        KnowSAM(make_students(2, fusion=False), StubGuide(2), MAX_STEPS)


def test_mean_teacher_refuses_an_unknown_consistency():
    with pytest.raises(ValueError, match=r"consistency must be one of .*'bce'.*got 'kl'"):
        make_method("mean_teacher", 2, consistency="kl")


def test_with_skd_needs_something_to_teach():
    class Silent(Mixing):
        def forward(self, batch, step):
            return StepOutput({"seg": torch.zeros(())})

    with pytest.raises(ContractError, match="Silent reports nothing that SAM may teach"):
        WithSKD(Silent(), StubGuide(2), MAX_STEPS)(make_batch(2), 0)


def test_a_method_that_distils_is_not_taught_twice():
    with pytest.raises(ValueError, match="KnowSAM distils from SAM already"):
        WithSKD(make_method("knowsam", 2), StubGuide(2), MAX_STEPS)
