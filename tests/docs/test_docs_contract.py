"""What the pages on extending say of the contract is what the code has, and does."""

import dataclasses
import re
import sys

import pytest
import torch
from docs_blocks import DOCS, first_cells, section

from knowsam import components
from knowsam.cli.main import run_command

CONTRACT = "writing_a_method.md"
EXPERIMENT = """
name: contract
data:
  source: {name: builtin, train: 12, val: 2, test: 2, size: 32}
  labelled: labelled_50pct
  image_size: 32
  labelled_batch: 2
  unlabelled_batch: 2
students: {net: {name: unet, channels: [4, 8], dropout: [0.0, 0.0]}}
sam: {encoder: {name: vit_tiny}}
optim: {subnets: {name: adamw, lr: 1e-3}, sam: {name: adam, lr: 1e-3}}
train: {max_steps: 4, device: cpu, validate_every: 4, checkpoint_every: 4, log_every: 1, tensorboard: false,
        pictures_every: 0}
"""
METHOD = """
from knowsam.methods.base import StudentMethod, supervised_losses
from knowsam.needs import Needs

class Own(StudentMethod):
    needs = Needs(students=1, strong_views=0)

    def forward(self, batch, step):
        joined = batch.join(batch.weak)
        logits = self.students(joined.images)
        return self.report(supervised_losses(self.students, logits, batch.mask), joined, logits)
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Trains a method of the user's without strong views."""
    (tmp_path / "own_method.py").write_text(METHOD)
    (tmp_path / "own.yaml").write_text(EXPERIMENT)
    monkeypatch.syspath_prepend(tmp_path)
    yield lambda run, *more: run_command(
        "train", [str(tmp_path / "own.yaml"), f"run={tmp_path / run}", "method={name: 'own_method:Own'}", *more]
    )
    sys.modules.pop("own_method", None)


def names(kind) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


def test_tables_have_every_field():
    from knowsam.data.batch import Batch
    from knowsam.methods.base import SSLMethod, StepOutput, Taught
    from knowsam.needs import Needs

    assert first_cells(section(CONTRACT, "What it needs"))[1:] == [
        *names(Needs),
        *(name for name in vars(SSLMethod) if name.startswith("default_")),
    ]
    assert first_cells(section(CONTRACT, "What it sees")) == names(Batch)
    assert sorted(first_cells(section(CONTRACT, "What it returns"))) == sorted(names(StepOutput))
    assert first_cells(section(CONTRACT, "What SAM may teach")) == names(Taught)


def test_the_table_of_restarts_is_whole():
    from typing import get_args

    from knowsam.methods.base import Restart

    shown = [name.strip('"') for name in first_cells(section(CONTRACT, "Phases"))[1:]]
    assert shown == list(get_args(Restart))


def test_what_is_handed_in_is_in_the_tables():
    rows = dict(re.findall(r"(?m)^\| `([\w.<>]+)`[^|]* \| ([^|]*) \|", section("extending.md", "What a block may set")))
    for block, kind in {
        "method": "method",
        "students.<name>": "students",
        "fusion": "fusion",
        "optim.<group>": "optim",
        "augment": "augment",
        "data.source": "source",
    }.items():
        assert set(re.findall(r"`(\w+)`", rows[block])) == components.OFFERED[kind], block
    rows = dict(re.findall(r"(?m)^\| `(\w+)` \| [^|]* \| ([^|]*) \|", section("extending_sam.md", "The block")))
    for kind in components.SAM_PARTS:
        offered = components.OFFERED[kind] - {"encoder_type"}  # the published code's, of no use to others
        assert set(re.findall(r"`(\w+)`", rows[kind])) == offered, kind


def test_shipped_names_are_in_the_tables():
    assert first_cells(section("extending.md", "A network"))[: len(components.STUDENTS)] == list(components.STUDENTS)
    rows = dict(re.findall(r"(?m)^\| `(\w+)` \| ([^|]*) \|", section("extending_sam.md", "The block")))
    for kind, (table, _) in components.SAM_PARTS.items():
        assert set(re.findall(r"`(\w+)`", rows[kind])) == set(table), kind


def test_the_table_of_settings_that_moved_is_that_of_the_program():
    from knowsam.config.checking import MOVED

    rows = re.findall(r"(?m)^\| `([\w.]+)` \| (.*?) \|$", section("from_0_1.md", "Settings that moved"))
    assert {key: now.replace("`", "") for key, now in rows} == MOVED


def test_hooks_are_in_the_table():
    from knowsam.models.sam.attention import SamAttention
    from knowsam.models.sam.encoder import SamBlock, SamImageEncoder
    from knowsam.models.sam.mask_decoder import SamTwoWayBlock, SamTwoWayTransformer

    places = (SamAttention, SamBlock, SamImageEncoder, SamTwoWayBlock, SamTwoWayTransformer)
    assert set(first_cells(section("extending_sam.md", "A tuning"))) == {hook for p in places for hook in p.HOOKS}


def test_check_method_says_what_the_page_shows(written, tmp_path, monkeypatch, capsys):
    page = (DOCS / CONTRACT).read_text(encoding="utf-8")
    (kept,) = re.findall(r"(?m)^my_lab\.bcp:BCP, K = 3: .*$", page)
    (broken,) = re.findall(r"(?m)^error\[method\].*\n.*$", page)
    assert run_command("check-method", ["my_lab.bcp:BCP", "--classes", "3", "--image-size", "32"]) == 0
    assert capsys.readouterr().out.strip() == kept
    (tmp_path / "broken_lab.py").write_text(
        "from knowsam.methods.base import StudentMethod, supervised_losses\n\n\nclass Broken(StudentMethod):\n"
        "    def forward(self, batch, step):\n"
        "        joined = batch.join(batch.weak)\n"
        "        logits = self.students(joined.images)\n"
        "        losses = supervised_losses(self.students, logits, batch.mask)\n"
        "        losses['consistency'] = logits['unet'].detach().square().mean()\n"
        "        return self.report(losses, joined, logits)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert run_command("check-method", ["broken_lab:Broken", "--image-size", "32"]) == 70
    assert capsys.readouterr().err.strip() == broken


def test_sam_may_see_the_strong_view_of_a_method_that_has_none(own, tmp_path):
    assert own("run", "skd={weight: 1.0, view: strong}", "train.max_steps=1") == 0


def test_a_run_of_an_older_version_is_refused_by_its_name(own, tmp_path, monkeypatch, capsys):
    from knowsam.engine import checkpoint

    with monkeypatch.context() as old:
        old.setattr(checkpoint, "SCHEMA_VERSION", 1)
        old.setattr(checkpoint.knowsam, "__version__", "0.1.0")
        assert own("run", "--stop-at", "2") == 0
    capsys.readouterr()
    assert own("run") == 80
    (shown,) = re.findall(r"(?m)^error\[checkpoint\].*\n.*$", (DOCS / "from_0_1.md").read_text(encoding="utf-8"))
    told = capsys.readouterr().err.strip().replace(str(tmp_path / "run" / "last.pt"), "runs/kvasir/best.pt")
    assert told == shown
    assert run_command("predict", [str(tmp_path / "run"), str(tmp_path), "-o", str(tmp_path / "out")]) != 0


def test_teachers_are_moved_as_the_page_says():
    from knowsam.methods.ema import EmaTeacher

    network = torch.nn.Sequential(torch.nn.Conv2d(1, 1, 1), torch.nn.BatchNorm2d(1), torch.nn.Dropout(0.5))
    teacher, image = EmaTeacher(network, 0.9), torch.rand(2, 1, 8, 8)
    first = teacher.train()(image)
    assert torch.equal(first, teacher(image))
    with teacher.mc_dropout():
        assert not torch.equal(teacher(image), first)
    assert torch.equal(teacher(image), first)
    network[0].weight.data.add_(1.0)
    assert torch.equal(teacher(image), first)
    teacher.reset()
    assert not torch.equal(teacher(image), first)
