"""An interrupted run ends as the uninterrupted one does, bit for bit; what must not be resumed is refused."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
import yaml

from knowsam.cli.main import run_command
from knowsam.engine import checkpoint, saving
from knowsam.errors import StorageError

# A learning rate at which the best checkpoint changes in the second half.
STEPS = ("train.max_steps=12", "train.validate_every=2", "optim.subnets.lr=3e-2")
VNET = "students.unet={name: vnet, filters: 2, norm: batch}"
METHODS = {
    "knowsam": ("method={name: knowsam, mix: {start: 0.5}}", *STEPS),  # mixing starts after the interruption
    "mean_teacher": ("method={name: mean_teacher}", "fusion=null", VNET, *STEPS),
}


@pytest.fixture(scope="module")
def straight(lab, tmp_path_factory):
    """Outcome of the uninterrupted run of a method, trained once."""
    done = {}

    def outcome(method: str) -> dict:
        if method not in done:
            run = tmp_path_factory.mktemp(method) / "run"
            assert lab.train(run, *METHODS[method]) == 0
            done[method] = lab.outcome(run)
        return done[method]

    return outcome


@pytest.mark.parametrize("method", METHODS)
def test_six_and_six_equal_twelve(lab, straight, tmp_path, capsys, method):
    run = tmp_path / "run"
    assert lab.train(run, *METHODS[method], "--stop-at", "6") == 0
    assert lab.last(run)["step"] == 6
    assert lab.train(run, *METHODS[method]) == 0
    assert f"resuming {run} after step 6" in capsys.readouterr().out
    whole = straight(method)
    assert lab.differences(whole, lab.outcome(run)) == []
    # The comparison is not of empty things: every step is logged, and all that moves is in the checkpoint.
    assert [r["step"] for r in whole["metrics"] if r["kind"] == "train"] == list(range(1, 13))
    assert sum(key.startswith("last.optimizers.subnets.state") for key in whole) > 50
    assert any("num_batches_tracked" in key for key in whole)
    if method == "mean_teacher":
        assert any(key.startswith("last.method.teacher") for key in whole)
    else:
        with_mix = [r["step"] for r in whole["metrics"] if "mix_seg_fusion" in r]
        assert with_mix == list(range(8, 13))


@pytest.mark.parametrize(
    ("first", "second"),
    [(0, 2), pytest.param(2, 2, marks=pytest.mark.slow), pytest.param(2, 0, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("method", ["mean_teacher", pytest.param("knowsam", marks=pytest.mark.slow)])
def test_the_number_of_workers_changes_nothing(lab, straight, tmp_path, method, first, second):
    run = tmp_path / "run"
    assert lab.train(run, *METHODS[method], f"data.workers={first}", "--stop-at", "6") == 0
    assert lab.train(run, *METHODS[method], f"data.workers={second}") == 0
    assert lab.differences(straight(method), lab.outcome(run)) == []


@pytest.mark.parametrize(
    ("place", "step"),
    [
        ("rename", 8),
        pytest.param("best.pt", 2, marks=pytest.mark.slow),
        pytest.param("last.pt", 8, marks=pytest.mark.slow),
        pytest.param("validation", 8, marks=pytest.mark.slow),
        pytest.param("after_step", 7, marks=pytest.mark.slow),
    ],
)
def test_a_crash_anywhere_is_made_good(lab, straight, tmp_path, monkeypatch, place, step):
    """Stops dead where metrics, best.pt and last.pt are written one after the other."""
    run = tmp_path / "run"
    words = (*METHODS["mean_teacher"], f"train.checkpoint_every={1 if step == 2 else 4}")
    with monkeypatch.context() as patch:
        crash(patch, place, step)
        with pytest.raises(_Crash):
            lab.train(run, *words)
    # best.pt is written after last.pt of the same step, so it never belongs to a past that is gone.
    saved = lab.last(run)["step"]
    assert saved == step if place == "best.pt" else 4 <= saved < step
    assert lab.best_step(run) <= saved
    assert lab.train(run, *words) == 0
    assert lab.differences(straight("mean_teacher"), lab.outcome(run)) == []


class _Crash(BaseException):
    """Like a kill: no handler for mistakes sees it."""


def crash(patch, place: str, at: int) -> None:
    from knowsam.methods.mean_teacher import MeanTeacher

    save, moved, predict, replaced = checkpoint.save_checkpoint, MeanTeacher.after_step, MeanTeacher.predict, os.replace
    done = [0]

    def after_step(self, step):
        done[0] = step + 1
        if place == "after_step" and done[0] == at:
            raise _Crash
        return moved(self, step)

    def save_checkpoint(path, state, **options):
        if state["step"] == at and path.name == place:
            raise _Crash
        return save(path, state, **options)

    def replace(source, target):
        if place == "rename" and done[0] == at and str(target).endswith("last.pt"):
            raise _Crash
        return replaced(source, target)

    def predict_or_crash(self, images):
        if place == "validation" and done[0] == at:
            raise _Crash
        return predict(self, images)

    patch.setattr(MeanTeacher, "after_step", after_step)
    patch.setattr(MeanTeacher, "predict", predict_or_crash)
    patch.setattr(saving, "save_checkpoint", save_checkpoint)
    patch.setattr(os, "replace", replace)


@pytest.mark.slow
def test_full_disk_ends_with_the_old_checkpoint(lab, straight, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    save = checkpoint.save_checkpoint

    def full(path, state, **options):
        if state["step"] == 8:
            raise StorageError(f"cannot write {path}: No space left on device")
        return save(path, state, **options)

    with monkeypatch.context() as patch:
        patch.setattr(saving, "save_checkpoint", full)
        assert lab.train(run, *METHODS["mean_teacher"]) == 74
    assert "error[storage]" in capsys.readouterr().err
    assert 4 <= lab.last(run)["step"] < 8
    assert lab.train(run, *METHODS["mean_teacher"]) == 0
    assert lab.differences(straight("mean_teacher"), lab.outcome(run)) == []


@pytest.mark.parametrize(
    "name", ["SIGTERM", *(pytest.param(other, marks=pytest.mark.slow) for other in ("SIGUSR1", "SIGINT"))]
)
def test_a_signal_saves_and_ends(lab, straight, tmp_path, monkeypatch, capsys, name):
    from knowsam.engine.runfolder import RunFolder
    from knowsam.methods.mean_teacher import MeanTeacher

    run = tmp_path / "run"
    before = signal.getsignal(getattr(signal, name))
    moved = MeanTeacher.after_step

    def after_step(self, step):
        if step == 4:
            os.kill(os.getpid(), getattr(signal, name))
        return moved(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(MeanTeacher, "after_step", after_step)
        assert lab.train(run, *METHODS["mean_teacher"]) == 75
    assert signal.getsignal(getattr(signal, name)) is before
    said = capsys.readouterr().err
    assert f"stopped by {name} after step 5" in said and "The same command goes on" in said
    assert RunFolder(run, create=False).read_status()["state"] == "interrupted"
    assert lab.last(run)["step"] == 5
    assert lab.train(run, *METHODS["mean_teacher"]) == 0
    assert lab.differences(straight("mean_teacher"), lab.outcome(run)) == []


def test_a_signal_in_the_last_step_lets_the_run_finish(lab, tmp_path, monkeypatch):
    from knowsam.methods.mean_teacher import MeanTeacher

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(MeanTeacher, "after_step", lambda self, step: os.kill(os.getpid(), signal.SIGTERM))
        assert lab.train(run, "method.name=mean_teacher", "train.max_steps=1") == 0
    assert lab.last(run)["step"] == 1


def contents(run) -> dict:
    """Bytes and times of every file but the lock, which names the last process."""
    files = [p for p in run.rglob("*") if p.is_file() and p.name != ".lock"]
    return {str(p.relative_to(run)): (p.stat().st_mtime_ns, p.read_bytes()) for p in files}


def test_a_finished_run_is_left_alone(lab, tmp_path, capsys):
    run = tmp_path / "run"
    words = ("method.name=mean_teacher", "train.max_steps=2")
    assert lab.train(run, *words) == 0
    before = contents(run)
    capsys.readouterr()
    assert lab.train(run, *words) == 0
    assert f"{run} is already complete at step 2" in capsys.readouterr().out
    assert contents(run) == before


def test_a_finished_run_without_its_last_state_is_left_alone(lab, tmp_path, capsys):
    # As a sweep with `keep: best` leaves it, or a user who is short of disk.
    run = tmp_path / "run"
    words = ("method.name=mean_teacher", "train.max_steps=2")
    assert lab.train(run, *words) == 0
    (run / "last.pt").unlink()
    before = contents(run)
    capsys.readouterr()
    assert lab.train(run, *words) == 0
    assert f"{run} is already complete at step 2" in capsys.readouterr().out
    assert lab.train(run, *words, "train.max_steps=5") == 73
    assert "train.max_steps: 2 -> 5" in capsys.readouterr().err
    assert contents(run) == before
    assert run_command("evaluate", [str(run)]) == 0


def test_other_settings_are_refused_or_accepted(lab, tmp_path, capsys):
    run = tmp_path / "run"
    words = ("method.name=mean_teacher", "train.max_steps=3")
    assert lab.train(run, *words, "--stop-at", "1") == 0
    before = contents(run)
    for change, line in (
        ("optim.subnets.lr=0.5", "optim.subnets.lr: 0.003 -> 0.5"),
        ("train.max_steps=5", "train.max_steps: 3 -> 5"),
        ("train.seed=7", "train.seed: 1 -> 7"),
        ("data.source.train=10", "data.source.train: 12 -> 10"),
        ("method.ema_decay=0.5", "method.ema_decay: not given -> 0.5"),
        ("fusion=null", "fusion"),
        ("skd={weight: 1.0}", "skd.weight: not given -> 1.0"),
        ("method.name=supervised", "method.name: 'mean_teacher' -> 'supervised'"),
    ):
        capsys.readouterr()
        assert lab.train(run, *words, change) == 73, change
        said = capsys.readouterr().err
        assert "error[run folder]" in said and "run=" in said
        assert line in said
        assert len([text for text in said.splitlines() if " -> " in text]) <= 2, said
    assert contents(run) == before
    cosmetic = ("train.log_every=2", "train.checkpoint_every=1", "evaluate.batch_size=1", "data.obtain=elsewhere")
    assert lab.train(run, *words, *cosmetic) == 0
    assert lab.last(run)["step"] == 3


def test_a_setting_that_came_later_has_its_default(lab, tmp_path, capsys):
    run, words = tmp_path / "run", ("method.name=supervised", "train.max_steps=3")
    assert lab.train(run, *words, "--stop-at", "1") == 0
    state = lab.last(run)
    values = yaml.safe_load(state["config"])
    del values["train"]["gradient_exchange"], values["published_code"]
    checkpoint.save_checkpoint(run / "last.pt", {**state, "config": yaml.safe_dump(values)})
    assert lab.train(run, *words, "train.gradient_exchange=bf16") == 73
    assert "train.gradient_exchange: 'fp32' -> 'bf16'" in capsys.readouterr().err
    assert lab.train(run, *words) == 0


def test_a_second_process_is_kept_out(lab, tmp_path, capsys):
    from knowsam.engine.runfolder import RunFolder

    with RunFolder(tmp_path / "run"):
        assert lab.train(tmp_path / "run", "method.name=mean_teacher", "train.max_steps=1") == 73
    assert f"locked by pid {os.getpid()}" in capsys.readouterr().err


def test_strangers_files_are_not_touched(lab, tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("years of work")
    assert lab.train(tmp_path, "method.name=mean_teacher") == 73
    assert "thesis.tex" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_complete_run_keeps_one_full_state(lab, tmp_path):
    run, words = tmp_path / "run", [*METHODS["mean_teacher"], "train.checkpoint_every=1", "train.max_steps=3"]
    assert lab.train(run, *words, "--stop-at", "2") == 0
    assert {path.name for path in run.glob("last*.pt")} == {"last.pt", "last.prev.pt"}
    assert lab.train(run, *words) == 0
    assert {path.name for path in run.glob("last*.pt")} == {"last.pt"}


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["bit", "truncated"])
def test_a_damaged_checkpoint_falls_back(lab, straight, tmp_path, capsys, damage):
    run = tmp_path / "run"
    assert lab.train(run, *METHODS["mean_teacher"], "--stop-at", "9") == 0
    data = bytearray((run / "last.pt").read_bytes())
    data[len(data) // 2] ^= 16
    (run / "last.pt").write_bytes(data[: len(data) // 2] if damage == "truncated" else data)
    assert lab.train(run, *METHODS["mean_teacher"]) == 0
    assert "using last.prev.pt" in capsys.readouterr().err
    assert lab.differences(straight("mean_teacher"), lab.outcome(run)) == []


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("method", METHODS)
def test_kill_nine_at_random_moments(lab, straight, tmp_path, method, workers):
    run = tmp_path / "run"
    words = [*METHODS[method], f"data.workers={workers}", "train.checkpoint_every=3"]
    command = [sys.executable, str(lab.root / "tools" / "train.py"), *lab.words(run, *words)]
    moments = random.Random(f"{method}{workers}")
    for least in (1, 6):  # records of the metrics that must be there, then a random moment
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while len(lab.metrics(run)) < least and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.4))
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert subprocess.run(command, stdout=subprocess.DEVNULL).returncode == 0
    assert lab.differences(straight(method), lab.outcome(run)) == []
