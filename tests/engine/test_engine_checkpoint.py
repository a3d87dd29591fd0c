"""A checkpoint is the new one or the old one, and never silently a damaged one; a run folder has one writer."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from knowsam.engine import checkpoint
from knowsam.engine.checkpoint import (
    check_state,
    environment_changes,
    environment_fingerprint,
    load_checkpoint,
    save_checkpoint,
)
from knowsam.engine.runfolder import RunFolder
from knowsam.errors import CheckpointError, NotFoundError, NumericError, RunFolderError, StorageError


def _state(step: int) -> dict:
    return {"step": step, "weights": torch.full((50, 20), float(step)), "best": {"dice": 0.5, "names": ["a", None]}}


def _names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_round_trip_of_modules_optimizers_and_random_state(tmp_path):
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    state = {"model": model.state_dict(), "optimizers": {"a": optimizer.state_dict()}, "rng": torch.get_rng_state()}
    save_checkpoint(tmp_path / "last.pt", state)
    loaded = load_checkpoint(tmp_path / "last.pt")
    torch.testing.assert_close(loaded["model"], dict(model.state_dict()), rtol=0, atol=0)
    torch.optim.AdamW(model.parameters()).load_state_dict(loaded["optimizers"]["a"])
    assert torch.equal(loaded["rng"], state["rng"])
    assert torch.load(tmp_path / "last.pt", weights_only=True)["state"]["rng"].dtype == torch.uint8


def test_the_checkpoint_before_it_is_kept(tmp_path):
    for step in (1, 2, 3):
        save_checkpoint(tmp_path / "last.pt", _state(step))
    assert _names(tmp_path) == ["last.prev.pt", "last.pt"]
    assert load_checkpoint(tmp_path / "last.prev.pt")["step"] == 2
    save_checkpoint(tmp_path / "best.pt", _state(1), keep_previous=False)
    save_checkpoint(tmp_path / "best.pt", _state(2), keep_previous=False)
    assert "best.prev.pt" not in _names(tmp_path)


def test_without_hard_links(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    for step in (1, 2):
        save_checkpoint(tmp_path / "last.pt", _state(step))
    assert (load_checkpoint(tmp_path / "last.pt")["step"], load_checkpoint(tmp_path / "last.prev.pt")["step"]) == (2, 1)


@pytest.mark.parametrize("call", ["replace", "fsync"])
@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()])
def test_failure_at_any_call_leaves_the_old_one(tmp_path, monkeypatch, call, error):
    save_checkpoint(tmp_path / "last.pt", _state(1))
    save_checkpoint(tmp_path / "last.pt", _state(2))
    real, calls = getattr(os, call), []
    for failing in range(2):
        calls.clear()

        def maybe(*args, failing=failing):
            calls.append(args)
            if len(calls) > failing:
                raise error
            return real(*args)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, maybe)
            expected = StorageError if isinstance(error, OSError) else KeyboardInterrupt
            with pytest.raises(expected):
                save_checkpoint(tmp_path / "last.pt", _state(3))
        # The sync of the folder comes after the rename: then the new one is there, and whole.
        assert load_checkpoint(tmp_path / "last.pt")["step"] in ((2, 3) if call == "fsync" else (2,))
        assert [name for name in _names(tmp_path) if name.endswith(".tmp")] == []
    save_checkpoint(tmp_path / "last.pt", _state(4))
    assert load_checkpoint(tmp_path / "last.pt")["step"] == 4


def test_full_disk_says_how_much_was_needed(tmp_path):
    save_checkpoint(tmp_path / "last.pt", _state(1))
    big = {"weights": torch.zeros(1_000_000)}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        with pytest.raises(StorageError, match=r"last\.pt.*needs 4\.0 MB; .* free"):
            save_checkpoint(tmp_path / "last.pt", big)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert _names(tmp_path) == ["last.pt"]
    assert load_checkpoint(tmp_path / "last.pt")["step"] == 1


def test_killed_at_every_step_of_the_protocol(tmp_path):
    """A child of this process dies without clean-up at the n-th system call of the protocol, for all n."""
    path = tmp_path / "last.pt"
    save_checkpoint(path, _state(1))
    save_checkpoint(path, _state(2))
    survived = False
    for death in range(20):
        child = os.fork()
        if child == 0:
            count = 0

            def die(real):
                def call(*args, **kwargs):
                    nonlocal count
                    if count == death:  # noqa: B023 - the child sees one value only
                        os._exit(9)
                    count += 1
                    return real(*args, **kwargs)

                return call

            for name in ("fsync", "link", "replace", "unlink"):
                setattr(os, name, die(getattr(os, name)))
            save_checkpoint(path, _state(3))
            os._exit(0)
        survived = os.waitpid(child, 0)[1] == 0
        assert load_checkpoint(path, fall_back=False)["step"] in (2, 3)
        if survived:
            break
        save_checkpoint(path, _state(2))
    assert survived and death >= 4
    assert load_checkpoint(path)["step"] == 3


def test_every_flipped_bit_is_found(tmp_path):
    path = tmp_path / "last.pt"
    save_checkpoint(path, _state(1))
    good = path.read_bytes()
    offsets = {*range(0, len(good), len(good) // 40), *range(len(good) - 90, len(good))}
    for offset in offsets:
        bad = bytearray(good)
        bad[offset] ^= 1 << (offset % 8)
        path.write_bytes(bad)
        with pytest.raises(CheckpointError, match=r"last\.pt"):
            load_checkpoint(path)


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (lambda good: b"", "empty"),
        (lambda good: good[: len(good) // 2], "truncated"),
        (lambda good: good[:-1], "at its end"),
        (lambda good: b"hello", "not a knowsam checkpoint"),
    ],
)
def test_damaged_and_foreign_files_are_named(tmp_path, content, cause):
    path = tmp_path / "last.pt"
    save_checkpoint(path, _state(1))
    path.write_bytes(content(path.read_bytes()))
    with pytest.raises(CheckpointError, match=rf"last\.pt: .*{cause}"):
        load_checkpoint(path)


def test_torch_file_of_another_program(tmp_path):
    torch.save({"weights": torch.zeros(2)}, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match="no digest"):
        load_checkpoint(tmp_path / "weights.pth")


def test_damaged_last_falls_back_with_one_warning(tmp_path, capsys):
    path = tmp_path / "last.pt"
    save_checkpoint(path, _state(1))
    save_checkpoint(path, _state(2))
    path.write_bytes(path.read_bytes()[:-200])
    assert load_checkpoint(path)["step"] == 1
    assert capsys.readouterr().err.count("warning:") == 1
    with pytest.raises(CheckpointError):
        load_checkpoint(path, fall_back=False)
    # The next save must not put the damaged file in the place of the good one.
    save_checkpoint(path, _state(3))
    assert load_checkpoint(tmp_path / "last.prev.pt")["step"] == 1
    for name in ("last.pt", "last.prev.pt"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"(?s)last\.pt.*last\.prev\.pt"):
        load_checkpoint(path)


def test_missing_files(tmp_path, capsys):
    with pytest.raises(NotFoundError, match="no checkpoint"):
        load_checkpoint(tmp_path / "last.pt")
    save_checkpoint(tmp_path / "last.prev.pt", _state(1))
    assert load_checkpoint(tmp_path / "last.pt")["step"] == 1
    assert "missing" in capsys.readouterr().err


def test_newer_schema_is_refused_even_with_a_predecessor(tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "last.pt", _state(1))
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "SCHEMA_VERSION", 99)
        save_checkpoint(tmp_path / "last.pt", _state(2))
    with pytest.raises(CheckpointError, match="schema 99"):
        load_checkpoint(tmp_path / "last.pt")


def test_a_checkpoint_of_before_is_refused_naming_its_version(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "SCHEMA_VERSION", 1)
        patch.setattr(checkpoint.knowsam, "__version__", "0.1.0")
        save_checkpoint(tmp_path / "last.pt", _state(2))
    with pytest.raises(CheckpointError, match=r"written by knowsam 0\.1\.0 .checkpoint schema 1.") as caught:
        load_checkpoint(tmp_path / "last.pt")
    assert "Use knowsam 0.1.0 for this run" in caught.value.hint


@pytest.mark.parametrize(
    ("value", "place"),
    [
        ({"best": {"dice": np.float64(0.5)}}, r"state\['best'\]\['dice'\]: numpy.float64"),
        ({"rng": (1, np.zeros(2))}, r"state\['rng'\]\[1\]: numpy.ndarray"),
        ({"path": Path("x")}, r"state\['path'\]"),
        ({(1, 2): 3}, "key of type builtins.tuple"),
    ],
)
def test_what_would_not_load_again_is_refused(tmp_path, value, place):
    with pytest.raises(TypeError, match=place):
        check_state(value)
    with pytest.raises(TypeError):
        save_checkpoint(tmp_path / "last.pt", value)
    assert _names(tmp_path) == []


def test_weights_that_are_not_finite_are_refused(tmp_path):
    save_checkpoint(tmp_path / "last.pt", _state(1))
    bad = {"method": {"conv.weight": torch.tensor([1.0, float("nan")])}}
    with pytest.raises(NumericError, match=r"method\.conv\.weight"):
        save_checkpoint(tmp_path / "last.pt", bad)
    assert load_checkpoint(tmp_path / "last.pt")["step"] == 1


def test_environment_is_plain_text_and_compared():
    now = environment_fingerprint()
    assert all(isinstance(value, str) for value in now.values())
    json.dumps(now)
    assert environment_changes(now, now) == []
    assert environment_changes({**now, "threads": "64"}, now) == [f"threads: 64 -> {now['threads']}"]


@pytest.mark.parametrize(
    ("status", "dirty"),
    [
        ("", "no"),
        ("?? experiments/mine.yaml\n?? data_splits/mine/train.txt\n", "no"),  # settings and lists are kept with the run
        ("?? knowsam/methods/mine.py\n", "yes"),
        (" M experiments/quickstart.yaml\n", "yes"),
    ],
)
def test_new_lists_and_settings_do_not_change_the_code(monkeypatch, status, dirty):
    monkeypatch.setattr(checkpoint, "_git", lambda word, *words: status if word == "status" else "a" * 40)
    assert environment_fingerprint()["git_dirty"] == dirty


def test_fingerprint_without_git(monkeypatch):
    def absent(*_, **__):
        raise FileNotFoundError("git")

    monkeypatch.setattr(checkpoint.subprocess, "run", absent)
    assert environment_fingerprint()["git_commit"] == ""


def test_run_folder_describes_itself(tmp_path):
    folder = RunFolder(tmp_path / "a" / "run")
    assert not RunFolder.exists(folder) and not folder.resumable and not folder.read_status()
    folder.describe("seed: 1\n", ["seed=1"], {"torch": "2"}, {"train": "abc"})
    folder.status("complete", 7, code=0)
    assert RunFolder.exists(folder) and folder.read_status()["state"] == "complete"
    assert folder.read_status()["step"] == 7
    assert RunFolder(folder.path, create=False).read_json(folder.splits) == {"train": "abc"}
    save_checkpoint(folder.last, _state(7))
    assert folder.resumable
    folder.status_file.write_text('{"state": "com')
    assert folder.read_status() == {}


def test_run_folder_refusals(tmp_path):
    with pytest.raises(NotFoundError):
        RunFolder(tmp_path / "absent", create=False)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunFolderError, match=r"notes\.txt"):
        RunFolder(tmp_path)
    with pytest.raises(RunFolderError, match="cannot write into"):
        RunFolder(tmp_path / "notes.txt" / "run")


def test_status_that_cannot_be_written_is_a_warning(tmp_path, capsys):
    folder = RunFolder(tmp_path / "run")
    (folder.path).rmdir()
    folder.status("running", 1)
    assert "warning: cannot write" in capsys.readouterr().err


def test_error_report(tmp_path):
    try:
        raise ValueError("naïve")
    except ValueError as error:
        name = RunFolder(tmp_path).write_error(error)
    assert "Traceback" in name.read_text() and name.name.endswith("-rank0.txt")


def test_lock_dies_with_its_process_and_not_with_its_workers(tmp_path):
    """Another process holds the lock, forks a worker that outlives it, and is killed."""
    holder = (
        "import os, sys, time\n"
        "from knowsam.engine.runfolder import RunFolder\n"
        f"RunFolder({str(tmp_path)!r}).lock()\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    print(os.getpid(), flush=True)\n"  # from here: until it runs, it has not let go of the lock
        "    os.close(1)\n"
        "time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", holder], stdout=subprocess.PIPE, text=True)
    worker = int(process.stdout.readline())
    try:
        folder = RunFolder(tmp_path)
        with pytest.raises(RunFolderError, match=rf"locked by pid {process.pid} on \S+ since \d{{4}}-"):
            folder.lock()
        process.kill()
        process.wait()
        with folder, pytest.raises(RunFolderError, match=f"pid {os.getpid()}"):
            RunFolder(tmp_path).lock()
        RunFolder(tmp_path).lock()
    finally:
        os.kill(worker, signal.SIGKILL)
        process.kill()
        process.wait()
        process.stdout.close()


def test_lock_race_has_one_winner(tmp_path):
    """Ten processes, released together, ask for the same folder."""
    RunFolder(tmp_path)
    start, go = os.pipe()
    children = []
    for _ in range(10):
        child = os.fork()
        if child == 0:
            os.close(go)
            os.read(start, 1)  # end of file when the parent closes its end
            try:
                RunFolder(tmp_path).lock()
                signal.pause()
            except RunFolderError:
                os._exit(73)
            except BaseException:
                os._exit(1)
        children.append(child)
    os.close(start)
    os.close(go)
    codes = [os.waitstatus_to_exitcode(os.waitpid(-1, 0)[1]) for _ in range(9)]
    for child in children:
        try:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        except (ProcessLookupError, ChildProcessError):
            continue
    assert codes == [73] * 9


def test_only_rank_zero_locks(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    RunFolder(tmp_path).lock()
    assert not (tmp_path / ".lock").exists()
