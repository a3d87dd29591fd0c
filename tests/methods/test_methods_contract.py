"""What every entry of METHODS keeps, with and without SKD around it."""

import copy
from dataclasses import replace

import pytest
import torch
from methods_stubs import MAX_STEPS, SIDE, make_batch, make_method, net
from torch import nn

from knowsam import components
from knowsam.methods.base import SSLMethod
from knowsam.methods.contract import check_output
from knowsam.methods.ema import EmaTeacher
from knowsam.methods.with_skd import WithSKD
from knowsam.models.fusion import FusionHead
from knowsam.models.sam import SliceWiseGuide, build_sam_guide
from knowsam.models.students import Students
from knowsam.models.unet import UNet

LATE = MAX_STEPS - 1
WITH_SAM = {name for name, target in components.METHODS.items() if components.needs(target).sam}
CASES = [(name, skd) for name in components.METHODS for skd in (False, True) if not (skd and name in WITH_SAM)]
IDS = [name + ("+skd" if skd else "") for name, skd in CASES]
every_method = pytest.mark.parametrize(("name", "skd"), CASES, ids=IDS)
every_k = pytest.mark.parametrize("num_classes", [2, 4, 9])
every_dims = pytest.mark.parametrize("dims", [2, 3])


def state_of(module):
    return {key: value.clone() for key, value in module.state_dict().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def check_one_step(method, batch, step):
    """Terms finite, every trainable parameter in one group and reached; returns the terms' names."""
    assert isinstance(method, SSLMethod)
    groups = method.trainable_groups()
    grouped = [p for parameters in groups.values() for p in parameters]
    assert len({id(p) for p in grouped}) == len(grouped), "a parameter is in two groups"
    trainable = {n: p for n, p in method.named_parameters() if p.requires_grad}
    assert {id(p) for p in trainable.values()} == {id(p) for p in grouped}
    assert all(groups.values()), "an optimizer refuses an empty group"

    method.zero_grad(set_to_none=True)
    out = method(batch, step)
    check_output(method, out, batch)
    assert out.losses
    for term, value in out.losses.items():
        assert value.shape == () and value.dtype == torch.float32 and value.isfinite(), term
        assert value.requires_grad, f"{term} trains nothing"
    for value in out.monitors.values():
        assert value.shape == () and value.isfinite() and not value.requires_grad
    sum(out.losses.values()).backward()
    missed = [n for n, p in trainable.items() if p.grad is None]
    assert not missed, f"no gradient at step {step}: {missed}"
    assert all(p.grad.isfinite().all() for p in trainable.values())
    assert all(p.grad is None for p in method.parameters() if not p.requires_grad)
    for prediction in out.predictions.values():
        assert prediction.logits.shape[0] == prediction.images.shape[0]
        assert prediction.logits.requires_grad
        assert torch.equal(prediction.mask, batch.mask)
        assert torch.equal(prediction.images[: len(batch.mask)], batch.labelled)
    return set(out.losses)


@every_method
@every_k
@every_dims
@pytest.mark.parametrize("fusion", [True, False])
def test_terms_are_finite_and_reach_every_trainable_parameter(name, skd, num_classes, dims, fusion):
    if name == "knowsam" and not fusion:
        with pytest.raises(ValueError, match="co-trains 2 students with a fusion head"):
            make_method(name, num_classes, fusion=False)
        return
    side = SIDE if dims == 2 else 8
    method = make_method(name, num_classes, skd=skd, fusion=fusion, dims=dims).train()
    early = check_one_step(method, make_batch(num_classes, side=side, dims=dims), 0)
    late = check_one_step(method, make_batch(num_classes, side=side, dims=dims, seed=2), LATE)
    assert early <= late
    if name == "knowsam":
        assert {t for t in late if t.startswith("mix_")} == late - early != set()


@every_method
@pytest.mark.parametrize("sizes", [(1, 1), (3, 1), (1, 4)])
def test_any_batch_sizes(name, skd, sizes):
    check_one_step(make_method(name, 3, skd=skd).train(), make_batch(3, *sizes), LATE)


@every_method
def test_labelled_images_without_a_lesion(name, skd):
    batch = make_batch(4)
    batch.mask.zero_()
    check_one_step(make_method(name, 4, skd=skd).train(), batch, LATE)


@every_method
def test_finite_under_bfloat16(name, skd):
    method = make_method(name, 3, skd=skd).train()
    with torch.autocast("cpu", torch.bfloat16):
        check_one_step(method, make_batch(3), LATE)


@every_method
def test_only_after_step_moves_a_teacher(name, skd):
    """Nothing outside the groups moves in forward, backward or the optimizer's step, and no buffer of a teacher."""
    method = make_method(name, 3, skd=skd, dropout=0.3).train()
    own = method.method if skd else method
    teacher = next((m for m in own.modules() if isinstance(m, EmaTeacher)), None)
    frozen_before = state_of(teacher) if teacher is not None else {}
    optimizers = [torch.optim.SGD(p, 0.5) for p in method.trainable_groups().values()]
    for step in range(2):
        sum(method(make_batch(3, seed=step), step).losses.values()).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert teacher is None or equal(frozen_before, state_of(teacher))
    students = state_of(own.students)
    method.after_step(1)
    assert equal(students, state_of(own.students))
    if teacher is not None:
        assert not equal(frozen_before, state_of(teacher))
        assert not any(m.training for m in teacher.modules())


@every_method
def test_train_and_eval_switch_students(name, skd):
    method = make_method(name, 2, skd=skd)
    own = method.method if skd else method
    for mode in (True, False, True):
        assert method.train(mode) is method
        assert all(m.training is mode for m in own.students.modules())
    check_one_step(method, make_batch(2), 0)
    assert all(m.training for m in own.students.modules()), "forward left the students in another mode"
    sam = [] if method.sam_teacher is None else list(method.sam_teacher.modules())
    assert all(m.training for m in sam), "forward left SAM in another mode"
    assert bool(sam) == (skd or name in WITH_SAM)


@every_method
def test_same_weights_and_draws_give_the_same_losses(name, skd):
    results = []
    for _ in range(2):
        method = make_method(name, 3, skd=skd, dropout=0.3).train()
        torch.manual_seed(5)
        results.append(method(make_batch(3), LATE).losses)
    assert equal(*results)


@every_method
@every_k
def test_state_round_trip(name, skd, num_classes):
    method = make_method(name, num_classes, skd=skd).train()
    for step in range(2):
        method(make_batch(num_classes), step)
        with torch.no_grad():
            for parameters in method.trainable_groups().values():
                for p in parameters:
                    p.add_(0.1)
        method.after_step(step)
    other = make_method(name, num_classes, skd=skd, seed=9).train()
    other.load_state_dict(copy.deepcopy(method.state_dict()))
    assert equal(state_of(method), state_of(other))
    losses = []
    for m in (method, other):
        torch.manual_seed(0)
        losses.append(m(make_batch(num_classes), LATE).losses)
    assert equal(*losses)
    with torch.no_grad():
        images = make_batch(num_classes).labelled
        assert equal(method.eval().predict(images), other.eval().predict(images))


@every_method
@every_k
@pytest.mark.parametrize("fusion", [True, False])
def test_predict_and_inference_model(name, skd, num_classes, fusion):
    if name == "knowsam" and not fusion:
        return
    method = make_method(name, num_classes, skd=skd, fusion=fusion)
    method(make_batch(num_classes), 0)
    method.after_step(0)
    method.eval()
    images = make_batch(num_classes, labelled=3).labelled
    with torch.no_grad():
        logits = method.predict(images)
        deployed = method.inference_model().eval()(images)
    assert set(method.outputs()) == set(logits)
    assert len(set(method.outputs())) == len(method.outputs())
    for output, x in logits.items():
        assert x.shape == (3, num_classes, SIDE, SIDE) and x.isfinite().all(), output
    assert torch.equal(deployed, logits[method.outputs()[0]])
    assert not any("sam_teacher" in n for n, _ in method.inference_model().named_parameters()), "SAM is not deployed"
    assert ("sam" in logits) == (skd or name in WITH_SAM)
    networks = method.networks()
    assert list(networks) == [output for output in method.outputs() if output != "sam"]
    with torch.no_grad():
        for output, network in networks.items():
            assert torch.equal(network.eval()(images), logits[output]), output
            assert not any("sam_teacher" in n for n, _ in network.named_parameters())


def real_guide(num_classes, **options):
    torch.manual_seed(0)
    return build_sam_guide("vit_tiny", image_size=64, num_classes=num_classes, tuning={"name": "adapter"}, **options)[0]


@pytest.mark.parametrize(("name", "skd"), [("knowsam", False), ("supervised", True)])
@pytest.mark.parametrize("train", ["all", ["tuning", "prompt"]])
def test_with_the_real_sam(name, skd, train):
    guide = real_guide(3, train=train)
    method = make_method(name, 3, skd=skd, guide=guide).train()
    check_one_step(method, make_batch(3, 1, 1, side=64), 0)
    counters = {n: int(b) for n, b in guide.named_buffers() if n.endswith("num_batches_tracked")}
    assert counters and set(counters.values()) == {1}, "the teacher's pass must not move SAM's batch statistics"
    check_one_step(method, make_batch(3, 1, 2, side=64), LATE)
    with torch.no_grad():
        logits = method.eval().predict(torch.rand(1, 3, 64, 64))
    assert logits["sam"].shape == (1, 3, 64, 64)


def test_published_teacher_mode_with_the_real_sam():
    method = make_method("knowsam", 2, guide=real_guide(2), skd={"teacher_mode": "train", "view": "strong"}).train()
    check_one_step(method, make_batch(2, 1, 1, side=64), LATE)


def test_a_method_is_abstract_until_it_is_whole():
    class Half(SSLMethod):
        def forward(self, batch, step):
            return None

    with pytest.raises(TypeError, match="abstract"):
        Half()
    assert issubclass(SSLMethod, nn.Module)


@every_method
def test_volumes_with_real_networks(name, skd):
    """3-D U-Net, V-Net and fusion head, and SAM slice by slice."""
    torch.manual_seed(0)
    students = {"unet": UNet(3, spatial_dims=3, channels=(4, 8), dropout=(0.0, 0.1)), "vnet": net(3, dims=3)}
    guide = SliceWiseGuide(real_guide(3))
    offered = {
        "students": Students(students, FusionHead(3, spatial_dims=3)),
        "sam_guide": guide,
        "max_steps": MAX_STEPS,
    }
    method = components.call(components.load(components.METHODS[name]), offered, {})
    method = WithSKD(method, guide, MAX_STEPS) if skd else method
    batch = make_batch(3, 1, 1, side=64, dims=3)
    batch = replace(
        batch,
        labelled=batch.labelled[:, :, :4],
        mask=batch.mask[:, :4],
        weak=batch.weak[:, :, :4],
        strong=(batch.strong[0][:, :, :4],),
    )
    check_one_step(method.train(), batch, LATE)
    with torch.no_grad():
        for logits in method.eval().predict(batch.weak).values():
            assert logits.shape == (1, 3, 4, 64, 64)
