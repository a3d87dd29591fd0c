"""Numbers in the loop: what is not finite stops it, accumulation, clipping, bf16, learning rates, the test split."""

import importlib
import itertools
import json
import math

import pytest
import torch

from knowsam.data.builtin import BuiltIn

STUB = '''
import torch
from torch import nn

from knowsam.methods.base import SSLMethod, StepOutput
from knowsam.needs import Needs


class Stub(SSLMethod):
    """The loss is linear in its three weights, so each gradient is the mean colour of a batch."""

    made, seen = [], []

    def __init__(self, *, poison: str = "", poison_step: int = 2):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))
        self.poison, self.poison_step = poison, poison_step
        self.made.append(self)

    def forward(self, batch, step):
        self.seen.append((step, batch.labelled.clone()))
        colour = batch.labelled.mean((0, 2, 3))
        nothing = 0.0 * self.weight.sum()
        losses = {"colour": (self.weight * colour).sum(), "fine": nothing, "bad": nothing}
        if step == self.poison_step:
            if self.poison == "grad":
                losses["bad"] = (0.0 * self.weight[0]).sqrt()
            elif self.poison:
                losses["bad"] = losses["bad"] + float(self.poison)
        return StepOutput(losses, monitors={"mean_weight": self.weight.mean()})

    def trainable_groups(self):
        return {"subnets": [self.weight]}

    def networks(self):
        return {"only": Only(self.weight)}


class Only(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    def forward(self, images):
        x = (images * self.weight.view(1, 3, 1, 1)).sum(1)
        return torch.stack([x, -x], 1)


class Alone(Stub):
    """The same, without unlabelled images."""

    needs = Needs(unlabelled=False)
'''

numbers = itertools.count()


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """The class, and the words that select it: a method from outside the package."""
    name = f"stub_method_{next(numbers)}"
    (tmp_path / f"{name}.py").write_text(STUB)
    monkeypatch.syspath_prepend(tmp_path)
    return importlib.import_module(name).Stub, f"{name}:Stub"


def sgd(lr: float = 1.0) -> str:
    return f"optim.subnets={{name: sgd, lr: {lr}, momentum: 0.0, weight_decay: 0.0, schedule: constant}}"


STILL = (  # no augmentation
    "augment={horizontal_flip: 0.0, vertical_flip: 0.0, affine: 0.0, elastic: 0.0, weak_light: 0.0, "
    "labelled_holes: 0.0, strong_light: 0.0, strong_holes: 0.0}"
)


@pytest.mark.parametrize("poison", [".nan", ".inf", "-.inf"])
def test_a_loss_that_is_not_finite_stops_before_the_update(lab, stub, tmp_path, capsys, poison):
    method, name = stub
    run = tmp_path / "run"
    value = poison.replace(".", "")
    words = (f"method={{name: '{name}', poison: '{value}'}}", sgd(), "train.checkpoint_every=1")
    assert lab.train(run, *words) == 79
    said = capsys.readouterr().err
    assert said.startswith("error[numeric]: step 2: not finite: bad; nothing was updated")
    assert "Traceback" not in said
    kept = lab.last(run)
    assert kept["step"] == 2
    assert torch.equal(kept["method"]["weight"], method.made[-1].weight)
    assert [record["step"] for record in lab.metrics(run)] == [1, 2]

    (path,) = (run / "errors").glob("nonfinite-*.json")
    assert str(path) in said
    record = json.loads(path.read_text())
    assert record["step"] == 2
    assert float(record["terms"]["bad"]) != 0.0 and float(record["terms"]["fine"]) == 0.0
    cases = BuiltIn("labelled_50pct", train=12, val=2, test=2)
    assert len(record["cases"]["labelled"]) == len(record["cases"]["unlabelled"]) == 2
    assert set(record["cases"]["labelled"]) <= set(cases.labelled_ids())
    assert set(record["cases"]["unlabelled"]) <= set(cases.train_ids()) - set(cases.labelled_ids())
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["code"], status["step"]) == ("failed", 79, 2)


def test_the_cases_named_are_those_of_the_bad_batch(lab, stub, tmp_path):
    method, name = stub
    run = tmp_path / "run"
    name = name.replace(":Stub", ":Alone")
    words = (f"method={{name: '{name}', poison: nan}}", STILL, "data.unlabelled_batch=0", "data.source.size=64")
    assert lab.train(run, *words) == 79
    (path,) = (run / "errors").glob("*.json")
    ids = json.loads(path.read_text())["cases"]["labelled"]
    source = BuiltIn("labelled_50pct", train=12, val=2, test=2, size=64)
    shown = torch.stack([torch.from_numpy(source.image(i)).permute(2, 0, 1) for i in ids]) / 255.0
    assert torch.allclose(method.seen[-1][1], shown)


def test_a_second_micro_batch_that_is_not_finite_updates_nothing(lab, stub, tmp_path, monkeypatch):
    method, name = stub
    run = tmp_path / "run"
    forward = method.forward

    def poisoned(self, batch, step):
        out = forward(self, batch, step)
        if len(self.seen) == 4:
            out.losses["bad"] = out.losses["bad"] * math.nan
        return out

    monkeypatch.setattr(method, "forward", poisoned)
    words = (f"method.name={name}", sgd(), "train.accumulate=2", "train.checkpoint_every=1")
    assert lab.train(run, *words) == 79
    assert lab.last(run)["step"] == 1
    assert torch.equal(lab.last(run)["method"]["weight"], method.made[-1].weight)


def test_weights_that_are_not_finite_are_not_saved(lab, stub, tmp_path, capsys):
    _, name = stub
    run = tmp_path / "run"
    words = (f"method={{name: '{name}', poison: grad}}", sgd(), "train.checkpoint_every=1")
    assert lab.train(run, *words) == 79
    assert "method.weight" in capsys.readouterr().err
    assert lab.last(run)["step"] == 2


def test_accumulation_is_the_mean_of_the_micro_batches(lab, stub, tmp_path):
    method, name = stub
    name = name.replace(":Stub", ":Alone")
    words = (f"method.name={name}", sgd(), STILL, "train.max_steps=3", "data.unlabelled_batch=0")
    assert lab.train(tmp_path / "two", *words, "data.labelled_batch=2", "train.accumulate=2") == 0
    two, seen = method.made[-1].weight.detach(), list(method.seen)
    assert [step for step, _ in seen] == [0, 0, 1, 1, 2, 2]
    gradients = torch.stack([images.mean((0, 2, 3)) for _, images in seen])
    assert torch.allclose(two, -(gradients.view(3, 2, 3).mean(1)).sum(0), atol=1e-6)

    # Batches follow one another in the stream, so one of four images holds the same as two of two.
    assert lab.train(tmp_path / "one", *words, "data.labelled_batch=4", "train.accumulate=1") == 0
    assert torch.allclose(two, method.made[-1].weight, atol=1e-6)


def test_resume_in_units_of_updates_with_accumulation(lab, stub, tmp_path):
    method, name = stub
    words = (f"method.name={name}", "optim.subnets.lr=0.1", "train.max_steps=4", "train.accumulate=3")
    assert lab.train(tmp_path / "straight", *words) == 0
    whole = [images for _, images in method.seen]
    method.seen.clear()
    assert lab.train(tmp_path / "resumed", *words, "--stop-at", "2") == 0
    assert lab.train(tmp_path / "resumed", *words) == 0
    assert len(whole) == len(method.seen) == 12
    assert all(torch.equal(a, b) for a, (_, b) in zip(whole, method.seen, strict=True))
    assert lab.differences(lab.outcome(tmp_path / "straight"), lab.outcome(tmp_path / "resumed")) == []


def test_clipping(lab, stub, tmp_path):
    method, name = stub
    run = tmp_path / "run"
    assert lab.train(run, f"method.name={name}", sgd(), "train.max_steps=2", "train.clip_norm=0.01") == 0
    assert method.made[-1].weight.norm().item() == pytest.approx(
        0.02, rel=0.05
    )  # two steps of one length, nearly parallel
    norms = [record["grad_norm_subnets"] for record in lab.metrics(run) if record["kind"] == "train"]
    assert norms == pytest.approx([images.mean((0, 2, 3)).norm().item() for _, images in method.seen], rel=1e-5)
    assert min(norms) > 0.1


def test_clipping_each_optimizer_of_knowsam(lab, tmp_path):
    run = tmp_path / "run"
    assert lab.train(run, "train.max_steps=2", "train.clip_norm=0.1") == 0
    for record in lab.metrics(run):
        if record["kind"] == "train":
            assert record["grad_norm_subnets"] > 0 and record["grad_norm_sam"] > 0


def test_bf16_is_finite_and_keeps_what_it_trains_in_float32(lab, tmp_path):
    run = tmp_path / "run"
    assert lab.train(run, "train.precision=bf16", "train.max_steps=3", "method.mix.start=0.0") == 0
    for record in lab.metrics(run):
        assert all(isinstance(value, int | float | str) and value == value for value in record.values()), record
    state = lab.last(run)
    halves = {name for name, x in state["method"].items() if x.dtype == torch.bfloat16}
    # what nothing trains is stored as it is used: SAM's own weights, but none of its norms, adapters or prompts
    assert "sam_teacher.guide.sam.image_encoder.blocks.0.mlp.lin1.weight" in halves
    assert not [n for n in halves if "adapters" in n or "prompt_generator" in n or "norm" in n or "students" in n]
    for name in state["optimizers"]:
        for kept in state["optimizers"][name]["state"].values():
            assert {x.dtype for x in kept.values() if torch.is_tensor(x)} == {torch.float32}


def test_bf16_keeps_an_averaged_teacher_in_float32(lab, tmp_path):
    run = tmp_path / "run"
    assert lab.train(run, "method.name=mean_teacher", "train.precision=bf16", "train.max_steps=2") == 0
    floating = {x.dtype for x in lab.last(run)["method"].values() if x.is_floating_point()}
    assert floating == {torch.float32}


def test_fp16_on_the_cpu_is_refused(lab, tmp_path, capsys):
    assert lab.train(tmp_path / "run", "train.precision=fp16") == 78
    assert "bf16" in capsys.readouterr().err


@pytest.mark.parametrize("schedule", ["linear", "polynomial", "cosine", "constant"])
def test_learning_rates(lab, stub, tmp_path, schedule):
    _, name = stub
    run = tmp_path / "run"
    optim = f"optim.subnets={{name: adamw, lr: 0.5, schedule: {schedule}, warmup: 3}}"
    assert lab.train(run, f"method.name={name}", optim, "train.max_steps=30", "train.validate_every=30") == 0
    rates = [record["lr_subnets"] for record in lab.metrics(run) if record["kind"] == "train"]
    assert len(rates) == 30 and min(rates) > 0 and max(rates) <= 0.5
    assert rates[0] < rates[1] < rates[2]
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert rates[-1] == 0.5 if schedule == "constant" else rates[-1] < 0.05 * 0.5


@pytest.mark.parametrize("words", [("method.name=knowsam",), ("method.name=mean_teacher", "skd={weight: 1.0}")])
def test_training_never_looks_at_the_test_split(lab, tmp_path, monkeypatch, words):
    def guarded(name):
        true = getattr(BuiltIn, name)

        def read(self, what):
            assert not str(what).startswith("test"), f"{name}({what!r})"
            return true(self, what)

        monkeypatch.setattr(BuiltIn, name, read)

    for name in ("eval_ids", "image", "mask", "fingerprint", "mask_fingerprint"):
        guarded(name)
    words = (*words, "train.max_steps=2", "train.validate_every=1", f"data.cache={tmp_path / 'cache'}")
    assert lab.train(tmp_path / "run", *words) == 0
