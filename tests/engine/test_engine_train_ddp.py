"""Two gloo processes under torchrun: replicas end equal, mistakes are told once, another world size is refused.

Starting two processes costs seconds, so one launch trains several experiments one after the other.
"""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

LAUNCHED = """
import json, os, sys

sys.path.insert(0, sys.argv[1])
from knowsam.cli import main as cli
from knowsam.engine import distributed

cli.RANK_ZERO_HEAD_START = 0.0
teardown, distributed.teardown = distributed.teardown, lambda: None  # joined once, for every experiment
compare = distributed.replicas_equal
compared = []


def replicas_equal(module, **options):
    found = compare(module, **options)
    compared.append(found)
    # Each rank has its own batch statistics until DDP sends rank 0's; all other buffers are equal.
    apart = {name.rpartition(".")[2] for name in compare(module, buffers=True)}
    assert apart <= {"running_mean", "running_var"}, apart
    return found


distributed.replicas_equal = replicas_equal
record = {}
for name, words in json.load(open(sys.argv[2])).items():
    compared.clear()
    print(f"--- {name}", file=sys.stderr, flush=True)
    code = cli.run_command("train", words)
    record[name] = {"code": code, "compared": list(compared)}
with open(f"{sys.argv[2]}.rank{os.environ['RANK']}", "w") as file:
    json.dump(record, file)
teardown()
"""

POISON = """
import math, os, signal

from knowsam.methods.mean_teacher import MeanTeacher


class Poison(MeanTeacher):
    def __init__(self, students, max_steps: int):
        super().__init__(students, max_steps)

    def forward(self, batch, step):
        out = super().forward(batch, step)
        if step == 1 and os.environ["RANK"] == "1":
            out.losses["bad"] = out.losses["seg_unet"] * math.nan
        return out


class Signalled(MeanTeacher):
    def __init__(self, students, max_steps: int):
        super().__init__(students, max_steps)

    def after_step(self, step):
        super().after_step(step)
        if step == 2 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
"""


def torchrun(*words: str, paths: str = "") -> subprocess.CompletedProcess:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    return subprocess.run([*launch, *words], capture_output=True, text=True, env=environment, timeout=540)


@pytest.fixture(scope="module")
def launched(lab, tmp_path_factory):
    """Folder of the runs, what each rank recorded, and what was said."""
    top = tmp_path_factory.mktemp("ddp")
    (top / "launched.py").write_text(LAUNCHED)
    (top / "poisoned_method.py").write_text(POISON)
    (top / "strange").mkdir()
    (top / "strange" / "notes.txt").write_text("not a run")
    steps = ("train.max_steps=4", "train.checkpoint_every=2", "train.validate_every=2")
    plans = {
        "knowsam": lab.words(top / "knowsam", *steps, "method.mix.start=0.25"),
        "bf16": lab.words(top / "bf16", *steps, "method.mix.start=0.25", "train.gradient_exchange=bf16"),
        "skd": lab.words(
            *(top / "skd", *steps, "method.name=mean_teacher", "skd={weight: 1.0}"),
            *("train.accumulate=2", "train.precision=bf16"),
        ),
        "strange": lab.words(top / "strange", *steps),
        "no_data": lab.words(top / "no_data", "data.source.train=1"),
        "poison": lab.words(top / "poison", *steps, "method={name: 'poisoned_method:Poison'}"),
        "signal": lab.words(top / "signal", *steps, "method={name: 'poisoned_method:Signalled'}"),
    }
    (top / "plans.json").write_text(json.dumps(plans))
    done = torchrun(str(top / "launched.py"), str(lab.root), str(top / "plans.json"), paths=str(top))
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads((top / f"plans.json.rank{rank}").read_text()) for rank in (0, 1)]
    return top, ranks, done


@pytest.mark.parametrize("name", ["knowsam", "bf16", "skd"])
def test_replicas_end_equal(lab, launched, name):
    top, ranks, done = launched
    for record in ranks:
        assert record[name] == {"code": 0, "compared": [[], []]}  # at steps 2 and 4
    state = lab.last(top / name)
    assert state["step"] == 4 and state["world_size"] == 2
    assert [r["step"] for r in lab.metrics(top / name) if r["kind"] == "train"] == [1, 2, 3, 4]
    assert done.stdout.count(f"finished {top / name} at step 4") == 1
    assert "unused" not in done.stderr and "Traceback" not in done.stderr and "Warning" not in done.stderr


def test_gradients_exchanged_in_bf16_are_rounded_ones(lab, launched):
    top, _, _ = launched
    exact, rounded = (
        {r["step"]: r for r in lab.metrics(top / name) if r["kind"] == "train"} for name in ("knowsam", "bf16")
    )
    assert exact[1]["loss"] == rounded[1]["loss"]
    assert exact[1]["grad_norm_subnets"] != rounded[1]["grad_norm_subnets"]
    assert exact[1]["grad_norm_subnets"] == pytest.approx(rounded[1]["grad_norm_subnets"], rel=1e-2)
    assert exact[4]["loss"] == pytest.approx(rounded[4]["loss"], rel=0.05)


def test_what_rank_zero_finds_is_told_once_and_nobody_waits(launched):
    _, ranks, done = launched
    assert [record["strange"]["code"] for record in ranks] == [73, 73]
    assert done.stderr.count("is not empty and holds no run") == 1
    assert [record["no_data"]["code"] for record in ranks] == [65, 65]
    assert done.stderr.count("error[data]") == 1


def test_a_loss_of_one_rank_that_is_not_finite_stops_both(lab, launched):
    top, ranks, done = launched
    assert [record["poison"]["code"] for record in ranks] == [79, 79]
    assert "not finite: bad" in done.stderr
    assert not (top / "poison" / "last.pt").exists()
    (path,) = (top / "poison" / "errors").glob("nonfinite-*.json")
    assert path.name == "nonfinite-step1-rank1.json"
    assert len(json.loads(path.read_text())["cases"]["unlabelled"]) == 2


def test_a_signal_to_one_rank_stops_both_after_the_same_step(lab, launched):
    top, ranks, done = launched
    assert [record["signal"]["code"] for record in ranks] == [75, 75]
    assert lab.last(top / "signal")["step"] == 3
    assert done.stderr.count("stopped by a signal to another rank after step 3; the checkpoint is saved") == 1
    assert done.stderr.count("the checkpoint is saved") == 1


def test_another_number_of_processes_is_refused(lab, launched, capsys):
    top, _, _ = launched
    words = ("train.max_steps=4", "train.checkpoint_every=2", "train.validate_every=2", "method.mix.start=0.25")
    assert lab.train(top / "knowsam", *words) == 78
    text = capsys.readouterr().err
    assert "trained by 2 process" in text and "this is 1" in text


def test_a_mistake_is_told_once(lab, tmp_path):
    tool = str(lab.root / "tools" / "train.py")
    done = torchrun(tool, *lab.words(tmp_path / "run", "optim.subnets.lrr=1"))
    assert done.returncode != 0
    assert done.stderr.count("has no parameter 'lrr'; did you mean 'lr'?") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_two_processes_resume_bit_for_bit(lab, tmp_path):
    tool = str(lab.root / "tools" / "train.py")
    words = ("train.max_steps=6", "train.validate_every=2", "method.mix.start=0.25")
    for run, more in (("straight", ()), ("resumed", ("--stop-at", "3")), ("resumed", ())):
        done = torchrun(tool, *lab.words(tmp_path / run, *words, *more))
        assert done.returncode == 0, done.stderr[-3000:]
    assert lab.differences(lab.outcome(tmp_path / "straight"), lab.outcome(tmp_path / "resumed")) == []


@pytest.mark.slow
def test_a_signal_to_the_launcher_saves(lab, tmp_path):
    tool = str(lab.root / "tools" / "train.py")
    run = tmp_path / "run"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    words = lab.words(run, "method.name=mean_teacher", "train.max_steps=2000", "train.validate_every=1000")
    process = subprocess.Popen([*launch, tool, *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while len(lab.metrics(run)) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, text = process.communicate(timeout=120)
    assert text.count("the checkpoint is saved") == 1
    step = lab.last(run)["step"]
    assert f"after step {step}" in text
    assert json.loads((run / "status.json").read_text())["state"] == "interrupted"
