"""What the loop does of the contract: first-step checks, phases, groups that hold still, several updates of a batch."""

import importlib
import itertools

import pytest
import torch

from knowsam.methods.base import Phase
from knowsam.methods.contract import check_phases

METHODS = '''
import torch
from torch import nn

from knowsam.losses import segmentation_loss
from knowsam.methods.base import Phase, Prediction, SSLMethod, StepOutput, StudentMethod
from knowsam.methods.ema import EmaTeacher
from knowsam.needs import Needs


class Plain(StudentMethod):
    needs = Needs(students=1)
    seen = []

    def __init__(self, students):
        super().__init__(students)
        self.extra = nn.Parameter(torch.zeros(3))

    def trainable_groups(self):
        return {**super().trainable_groups(), "extra": [self.extra]}

    default_optim = {"extra": {"name": "sgd", "lr": 1.0, "momentum": 0.0, "weight_decay": 0.0, "schedule": "constant"}}

    def loss(self, batch):
        joined = batch.join(batch.weak)
        logits = self.students(joined.images)
        return joined, logits, {"seg": segmentation_loss(joined.labelled(logits["unet"]), batch.mask)}

    def forward(self, batch, step):
        joined, logits, losses = self.loss(batch)
        losses["extra"] = (self.extra * batch.labelled.mean((0, 2, 3))).sum()
        return self.report(losses, joined, logits)


class Unreached(Plain):
    def forward(self, batch, step):
        return self.report(*reversed_(self.loss(batch)))


def reversed_(parts):
    joined, logits, losses = parts
    return losses, joined, logits


class Detached(Plain):
    def forward(self, batch, step):
        out = super().forward(batch, step)
        out.losses["dead"] = out.losses["seg"].detach()
        return out


class Number(Plain):
    def forward(self, batch, step):
        out = super().forward(batch, step)
        out.losses["zero"] = 0.0
        return out


class Map(Plain):
    def forward(self, batch, step):
        out = super().forward(batch, step)
        out.losses["map"] = out.predictions["unet"].logits
        return out


class Losses(Plain):
    def forward(self, batch, step):
        return super().forward(batch, step).losses


class Ungrouped(Plain):
    def trainable_groups(self):
        return StudentMethod.trainable_groups(self)


class Twice(Plain):
    def trainable_groups(self):
        return {**super().trainable_groups(), "extra": [self.extra, next(self.students.parameters())]}


class WrongRows(Plain):
    def forward(self, batch, step):
        out = super().forward(batch, step)
        out.predictions["unet"].images = batch.labelled
        return out


class Later(Plain):
    """A term that is there in the first step only."""

    def forward(self, batch, step):
        return super().forward(batch, step) if step == 0 else self.report(*reversed_(self.loss(batch)))


class Still(Plain):
    def holds_still(self, step):
        return frozenset({"extra"}) if step % 2 else frozenset()


class StillTypo(Plain):
    def holds_still(self, step):
        return frozenset({"extras"})


class Phased(Plain):
    """Restarts everything at step 3."""

    def __init__(self, students):
        super().__init__(students)
        self.teacher = EmaTeacher(students, 0.5)

    def phases(self):
        return Phase("first", 0), Phase("second", 3, ("students", "teacher", "optimizer", "schedule"))

    def forward(self, batch, step):
        if step in (0, 3):
            weights = [p.detach().clone() for p in self.students.parameters()]
            averaged = [p.detach().clone() for p in self.teacher.average.parameters()]
            self.seen.append((step, weights, averaged))
        return super().forward(batch, step)

    def after_step(self, step):
        self.teacher.update(step)


class Backwards(Plain):
    def phases(self):
        return Phase("late", 2), Phase("early", 0)


class Rounds(Plain):
    """Three updates of each batch; what is carried is how often it was seen."""

    updates_per_batch = 3

    def forward(self, batch, step):
        self.seen.append((step, batch.round, batch.carried, float(batch.labelled.sum()), float(torch.rand(()))))
        out = super().forward(batch, step)
        out.carry = (batch.carried or 0) + 1
        return out
'''
numbers = itertools.count()
ONE = ("students={unet: {name: unet, channels: [4, 8], dropout: [0.1, 0.1]}}", "fusion=null")


@pytest.fixture
def methods(tmp_path, monkeypatch):
    """The module, and its name."""
    name = f"contract_methods_{next(numbers)}"
    (tmp_path / f"{name}.py").write_text(METHODS)
    monkeypatch.syspath_prepend(tmp_path)
    return importlib.import_module(name), name


def train(lab, run, name, method, *more):
    return lab.train(run, f"method={{name: '{name}:{method}'}}", *ONE, "optim.subnets.schedule=linear", *more)


# ---------------------------------------------------------------- told in the first step


@pytest.mark.parametrize(
    ("method", "says", "advises"),
    [
        ("Unreached", "no loss term reaches extra", "weigh its term by 0"),
        ("Detached", "loss term 'dead' has no gradient, so it trains nothing", "monitors"),
        ("Number", "loss term 'zero' is float 0.0; wanted is a scalar tensor", "0 * its formula"),
        ("Map", "loss term 'map' is a tensor of shape (4, 2, 64, 64); wanted is a scalar", "Average over pixels"),
        ("Losses", "forward returned dict; wanted is a StepOutput", "docs/extending.md"),
        ("Ungrouped", "in no parameter group: extra", "trainable_groups"),
        ("Twice", "in more than one parameter group: students.", ""),
        ("WrongRows", "do not fit the images (2, 3, 64, 64) that it saw", ""),
        ("StillTypo", "holds_still(0) names extras; its groups are subnets, extra", ""),
        ("Backwards", "phases start at [2, 0]; wanted are rising steps", ""),
    ],
)
def test_a_method_that_does_not_keep_the_contract_is_told_what_it_wants(
    lab, methods, tmp_path, capsys, method, says, advises
):
    _, name = methods
    assert train(lab, tmp_path / "run", name, method) == 70
    said = capsys.readouterr().err
    assert said.startswith(f"error[method]: {method}") and says in said and advises in said
    assert "Traceback" not in said
    assert not (tmp_path / "run" / "last.pt").exists()


@pytest.mark.parametrize(
    ("method", "says"),
    [("Unreached", "no loss term reaches extra"), ("Detached", "'dead' has no gradient"), ("Twice", "more than one")],
)
def test_check_method_says_it_before_a_run(methods, capsys, method, says):
    from knowsam.cli.main import run_command

    assert run_command("check-method", [f"{methods[1]}:{method}", "--classes", "3", *ONE, "--image-size", "32"]) == 70
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("method", ["Plain", "Still", "Phased", "Rounds"])
def test_check_method_tries_every_phase_and_round(methods, capsys, method):
    from knowsam.cli.main import run_command

    words = [f"{methods[1]}:{method}", "--classes", "2", "--skd", *ONE, "--image-size", "32"]
    assert run_command("check-method", words) == 0
    said = capsys.readouterr().out
    assert said.count("keeps the contract at step 0") == 2 and "skd_unet" in said
    assert ("step 3 (second)" in said) is (method == "Phased")


def test_a_group_has_the_optimizer_that_its_method_declares(lab, methods, tmp_path):
    run = tmp_path / "run"
    assert train(lab, run, methods[1], "Plain", "train.max_steps=2") == 0
    assert "name: sgd" in (run / "config.yaml").read_text().partition("extra:")[2][:40]
    assert {r["lr_extra"] for r in lab.metrics(run) if r["kind"] == "train"} == {1.0}
    assert train(lab, tmp_path / "other", methods[1], "Plain", "optim.extra.lr=0.5", "train.max_steps=2") == 0
    assert {r["lr_extra"] for r in lab.metrics(tmp_path / "other") if r["kind"] == "train"} == {0.5}


def test_blocks_that_nothing_uses_are_said_and_refuse_nothing(lab, methods, tmp_path, capsys):
    """So a sweep over methods may hold the optimizer of one of them."""
    words = ("method.name=supervised", "optim.extra={name: adam, lr: 0.1}", "train.max_steps=1")
    assert lab.train(tmp_path / "run", *words) == 0
    said = capsys.readouterr().out
    assert "note: optim.sam, optim.extra has no effect: the method trains subnets" in said


# ---------------------------------------------------------------- groups, phases, rounds


def test_a_group_that_holds_still_is_left_as_it_is(lab, methods, tmp_path):
    run = tmp_path / "run"
    assert train(lab, run, methods[1], "Still", "train.max_steps=4", "train.checkpoint_every=1") == 0
    moved = {r["step"]: "grad_norm_extra" in r for r in lab.metrics(run) if r["kind"] == "train"}
    assert moved == {1: True, 2: False, 3: True, 4: False}
    norms = {r["step"]: r["param_norm_extra"] for r in lab.metrics(run) if r["kind"] == "train"}
    assert norms[1] == norms[2] < norms[3] == norms[4]


@pytest.mark.parametrize("stop", ["2", "3", "4"])
def test_what_a_phase_restarts_and_that_resuming_does_it_once(lab, methods, tmp_path, stop):
    module, name = methods
    words = ("train.max_steps=6", "train.validate_every=3", "train.checkpoint_every=6")
    assert train(lab, tmp_path / "whole", name, "Phased", *words) == 0
    (_, initial, _averaged), (_, again, averaged_again) = module.Plain.seen
    assert all(torch.equal(a, b) for a, b in zip(initial, again, strict=True)), "students begin anew"
    assert all(torch.equal(a, b) for a, b in zip(averaged_again, again, strict=True)), "so does the teacher"
    rates = [r["lr_subnets"] for r in lab.metrics(tmp_path / "whole") if r["kind"] == "train"]
    assert rates == pytest.approx([3e-3, 2e-3, 1e-3] * 2)
    states = lab.last(tmp_path / "whole")["optimizers"]["subnets"]["state"].values()
    assert {int(x["step"]) for x in states} == {3}

    assert train(lab, tmp_path / "run", name, "Phased", *words, "--stop-at", stop) == 0
    assert train(lab, tmp_path / "run", name, "Phased", *words) == 0
    assert lab.differences(lab.outcome(tmp_path / "whole"), lab.outcome(tmp_path / "run")) == []


def test_a_phase_of_no_length_is_left_out():
    class Empty:
        def phases(self):
            return Phase("pretrain", 0), Phase("begin", 0, ("teacher",)), Phase("main", 5), Phase("end", 5)

    assert [(phase.name, phase.start) for phase in check_phases(Empty())] == [("begin", 0), ("end", 5)]


def test_several_updates_of_one_batch_and_resuming_between_batches(lab, methods, tmp_path):
    module, name = methods
    words = ("train.max_steps=9", "train.validate_every=4", "train.checkpoint_every=2")
    assert train(lab, tmp_path / "whole", name, "Rounds", *words) == 0
    seen = module.Plain.seen
    assert [(step, round_) for step, round_, *_ in seen] == [(s, s % 3) for s in range(9)]
    assert [carried for _, _, carried, _, _ in seen] == [None, 1, 2] * 3
    images = [total for *_, total, _ in seen]
    assert images[0] == images[1] == images[2] != images[3] == images[4]
    assert len({draw for *_, draw in seen}) == 9, "each update draws anew"
    assert [r["step"] for r in lab.metrics(tmp_path / "whole") if r["kind"] == "val"] == [6, 9]

    assert train(lab, tmp_path / "run", name, "Rounds", *words, "--stop-at", "6") == 0
    assert lab.last(tmp_path / "run")["step"] == 6
    assert train(lab, tmp_path / "run", name, "Rounds", *words) == 0
    assert lab.differences(lab.outcome(tmp_path / "whole"), lab.outcome(tmp_path / "run")) == []
    assert train(lab, tmp_path / "odd", name, "Rounds", "train.max_steps=10") == 78
    assert train(lab, tmp_path / "acc", name, "Rounds", *words, "train.accumulate=2") == 0


# ---------------------------------------------------------------- code of the user's own


def test_code_of_ones_own_is_kept_and_compared(lab, tmp_path, monkeypatch, capsys):
    """What the method imports counts too; a resumed run with other code is refused unless it is accepted."""
    import subprocess
    import sys

    folder, run = tmp_path / "lab", tmp_path / "run"
    folder.mkdir()
    (folder / "own_terms.py").write_text("WEIGHT = 1.0\n")
    (folder / "own_method.py").write_text(
        "from own_terms import WEIGHT\n"
        "from knowsam.methods.supervised import Supervised\n"
        "class Mine(Supervised):\n"
        "    def forward(self, batch, step):\n"
        "        out = super().forward(batch, step)\n"
        "        out.losses = {name: WEIGHT * term for name, term in out.losses.items()}\n"
        "        return out\n"
    )

    def start(*more):
        words = [*lab.words(run, "method={name: 'own_method:Mine'}", *ONE, "train.max_steps=4"), *more]
        environment = {**__import__("os").environ, "PYTHONPATH": str(folder)}
        command = [sys.executable, str(lab.root / "tools" / "train.py"), *words]
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200, check=False)

    assert start("--stop-at", "2").returncode == 0
    assert sorted(path.name for path in (run / "code").iterdir()) == ["own_method.py", "own_terms.py"]
    assert set(lab.last(run)["code"]) == {"own_method", "own_terms"}
    (folder / "own_terms.py").write_text("WEIGHT = 2.0\n")
    refused = start()
    assert refused.returncode == 65
    assert f"code that {run} runs has changed since step 2: own_terms" in refused.stderr
    assert "--accept-code" in refused.stderr and lab.last(run)["step"] == 2
    accepted = start("--accept-code")
    assert accepted.returncode == 0 and "warning: code that" in accepted.stderr and lab.last(run)["step"] == 4
    assert (run / "code" / "own_terms.py").read_text() == "WEIGHT = 1.0\n"
    assert (run / "code" / "own_terms.2.py").read_text() == "WEIGHT = 2.0\n"


# ---------------------------------------------------------------- beginning from parts of other runs


def test_a_run_begins_from_parts_of_another(lab, tmp_path, capsys):
    parent, child = tmp_path / "parent", tmp_path / "child"
    assert lab.train(parent, "train.max_steps=2") == 0
    words = (
        f"init=[{{from: {parent}, part: students, checkpoint: last}}, {{from: {parent}, part: sam}}]",
        "train.max_steps=3",
    )
    capsys.readouterr()
    assert lab.train(child, *words, "method.name=mean_teacher", "skd={weight: 1.0}", "--stop-at", "1") == 0
    said = capsys.readouterr().out
    assert f"students begins from {parent}, last.pt of step 2" in said and f"SAM begins from {parent}, best.pt" in said

    from knowsam import build
    from knowsam.config import load_config

    arguments = (*words, "method.name=mean_teacher", "skd={weight: 1.0}")
    built = build.build_method(load_config(lab.experiment, list(arguments)))
    before, after = lab.last(parent)["method"], built.method.state_dict()
    for key, tensor in before.items():
        if key.startswith("students."):
            assert torch.equal(after[f"method.{key}"], tensor)
            assert torch.equal(after[f"method.teacher.average.{key.removeprefix('students.')}"], tensor), "a copy"
    lineage = lab.last(child)["lineage"]
    assert [(a["part"], a["file"], a["step"]) for a in lineage] == [("students", "last.pt", 2), ("sam", "best.pt", 2)]
    assert len({a["sha256"] for a in lineage}) == 2 and all(len(a["sha256"]) == 64 for a in lineage)


def test_lineage_is_part_of_a_runs_identity(lab, tmp_path, capsys):
    from knowsam.config import load_config
    from knowsam.config.identity import experiment_key

    parent, child = tmp_path / "parent", tmp_path / "child"
    assert lab.train(parent, "train.max_steps=2") == 0
    words = (f"init={{from: {parent}, part: students}}", "train.max_steps=3")
    assert lab.train(child, *words, "--stop-at", "1") == 0
    key = experiment_key(load_config(lab.experiment, list(words)))
    import shutil

    shutil.rmtree(parent)
    assert lab.train(parent, "train.max_steps=2", "train.seed=7") == 0
    assert experiment_key(load_config(lab.experiment, list(words))) != key
    capsys.readouterr()
    assert lab.train(child, *words) == 65
    assert "init students" in capsys.readouterr().err
    shutil.rmtree(parent)
    assert lab.train(child, *words) == 0, "the run holds what it began from, so its parent may be gone"


@pytest.mark.parametrize(
    ("block", "more", "code", "says"),
    [
        ("{from: PARENT, part: students}", ("students.unet.channels=[8,16]",), 80, "does not fit this experiment's"),
        ("{from: PARENT, part: sam}", ("method.name=supervised",), 78, "this experiment builds no sam"),
        ("{from: PARENT/none, part: students}", (), 66, "no run in"),
    ],
)
def test_parts_that_cannot_be_had(lab, tmp_path, capsys, block, more, code, says):
    parent = tmp_path / "parent"
    assert lab.train(parent, "train.max_steps=1") == 0
    capsys.readouterr()
    assert lab.train(tmp_path / "child", f"init={block.replace('PARENT', str(parent))}", *more) == code
    assert says in capsys.readouterr().err
    assert not (tmp_path / "child" / "last.pt").exists()
