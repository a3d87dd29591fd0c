"""The record of a sweep: a torn journal loses nothing, no trial is claimed twice, an edited sweep keeps its results.

K2, K4 and K5 of the project's list of faults.
"""

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from sweep_stubs import Bench

from knowsam.errors import ConfigError, NotFoundError, StorageError
from knowsam.sweep.journal import cut_torn_line
from knowsam.sweep.locks import FileLock
from knowsam.sweep.spec import Search, Sweep, Trial
from knowsam.sweep.status import summary
from knowsam.sweep.store import Store, write_text

LR = "optim.subnets.lr"
RANGE = {"low": 0.001, "high": 0.1}
DONE = {"exit_code": 0, "message": None, "dice": 0.5}


def made(folder: Path, count: int, **more) -> Sweep:
    """A sweep of so many trials that no experiment stands behind: their keys are k0, k1, ..."""
    trials = [Trial(f"k{i}", f"s{i}", "base", 0, {"a.b": i}, f"name: s{i}\n") for i in range(count)]
    return Sweep(name="made", folder=folder, trials=trials, **more)


def states(store: Store) -> dict[str, str]:
    return {item["key"]: item["state"] for item in store.trials()}


@pytest.fixture
def start():
    """Starts Python programs; none outlives the test."""
    running = []

    def start(lines: str, *words) -> subprocess.Popen:
        command = [sys.executable, "-c", textwrap.dedent(lines), *map(str, words)]
        running.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        return running[-1]

    yield start
    for process in running:
        process.kill()
        process.communicate()


# ---------------------------------------------------------------- enrolling


def test_a_new_sweep(tmp_path):
    sweep = made(tmp_path / "s", 3, baseline="s1", time_limit=5.0, command=["true"])
    store = Store.enrol(sweep)
    assert states(store) == {"k0": "waiting", "k1": "waiting", "k2": "waiting"}
    assert store.left() == 3 and not store.held()
    assert (tmp_path / "s/configs/k1.yaml").read_text() == "name: s1\n"
    record = json.loads((tmp_path / "s/trials.json").read_text())
    assert (record["name"], record["baseline"], len(record["trials"])) == ("made", "s1", 3)
    assert record["trials"][2] == {
        "key": "k2",
        "setting": "s2",
        "experiment": "base",
        "seed": 0,
        "folder": "trials/s2_seed0_k2",
        "overrides": {"a.b": 2},
        "state": "waiting",
        "message": None,
        "exit_code": None,
        "value": None,
    }
    plan = Store(tmp_path / "s").plan
    assert (plan["time_limit"], plan["command"], plan["retries"], plan["search"]) == (5.0, ["true"], 2, None)


def test_a_folder_without_a_sweep(tmp_path):
    with pytest.raises(NotFoundError, match="holds no sweep"):
        Store(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_the_folder_of_another_sweep_is_refused(tmp_path):
    sweep = made(tmp_path / "s", 1)
    base = tmp_path / "base.yaml"
    base.write_text("name: dummy\n")
    search = replace(sweep, trials=[], search=Search({"a.b": [1, 2]}), base=str(base))
    Store.enrol(sweep)
    before = (tmp_path / "s/plan.json").read_bytes()
    for other, text in (
        (replace(sweep, name="other"), "holds the sweep 'made'"),
        (replace(sweep, storage="sqlite:///x.db"), "holds the sweep 'made'"),
        (search, "was made by a list of trials"),
    ):
        with pytest.raises(ConfigError, match=text):
            Store.enrol(other)
    assert (tmp_path / "s/plan.json").read_bytes() == before
    Store.enrol(replace(search, folder=tmp_path / "t"))
    Store.enrol(replace(search, folder=tmp_path / "t", search=Search({"a.b": [1, 2]}, trials=50)))  # may go on longer
    for other in (
        replace(sweep, folder=tmp_path / "t"),
        replace(search, folder=tmp_path / "t", search=Search({"a.b": [1, 3]})),
    ):
        with pytest.raises(ConfigError, match="was made by a search over other ranges"):
            Store.enrol(other)
    with pytest.raises(ConfigError, match=r"around other settings:\n  train\.max_steps: 1000 -> 7"):
        Store.enrol(replace(search, folder=tmp_path / "t", overrides={"train.max_steps": 7}))


def test_files_that_cannot_be_read_or_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot make"):
        Store.enrol(made(tmp_path / "file" / "s", 1))
    Store.enrol(made(tmp_path / "s", 1))
    for text, message in (("{", "cannot be read"), ("[]", "not of format 1"), ('{"format": 2}', "not of format 1")):
        (tmp_path / "s/plan.json").write_text(text)
        with pytest.raises(StorageError, match=message):
            Store(tmp_path / "s")
    with pytest.raises(StorageError, match="cannot write"):
        write_text(tmp_path / "nowhere" / "x", "text")
    with pytest.raises(StorageError, match="cannot write"):
        FileLock(tmp_path / "nowhere" / "x").acquire()


def test_storage_that_cannot_be_opened(tmp_path):
    for url in ("nonsense://x", f"sqlite:///{tmp_path}/nowhere/study.db", "no url"):
        with pytest.raises(ConfigError, match=f"storage {url} cannot be opened"):
            Store.enrol(made(tmp_path / url.partition(":")[0], 1, storage=url))


def test_two_who_enrol_at_once_add_each_trial_once(tmp_path, start):
    program = """
        import sys
        from pathlib import Path
        sys.path.insert(0, sys.argv[1])
        from test_sweep_store import made, Store
        sweep = made(Path(sys.argv[2]), int(sys.argv[3]))
        print("ready", flush=True)
        sys.stdin.readline()
        Store.enrol(sweep)
        """
    running = [start(program, Path(__file__).parent, tmp_path / "s", count) for count in (20, 20, 25, 15)]
    assert [process.stdout.readline() for process in running] == ["ready\n"] * 4
    for process in running:
        process.stdin.write("\n")
        process.stdin.flush()
    assert [process.wait(120) for process in running] == [0] * 4
    store = Store.enrol(made(tmp_path / "s", 25))
    keys = [trial.user_attrs["key"] for trial in store.study.get_trials()]
    assert Counter(keys) == {f"k{i}": 1 for i in range(25)}


# ---------------------------------------------------------------- claiming


def test_claims_come_in_the_order_of_the_plan_and_are_kept_from_others(tmp_path):
    store = Store.enrol(made(tmp_path, 3))
    other = Store(tmp_path)
    first, second = store.claim(), other.claim()
    assert (first.item["key"], second.item["key"]) == ("k0", "k1")
    assert not first.resumed and store.held() and other.held()
    first.finish("complete", **DONE)
    second.release()
    again = store.claim()
    assert again.item["key"] == "k1" and again.resumed
    last = other.claim()
    assert last.item["key"] == "k2" and not last.resumed
    assert store.claim() is None and other.claim() is None
    again.finish("failed", exit_code=79, message="not finite", dice=None)
    last.finish("complete", exit_code=0, message=None, dice=None)
    assert states(other) == {"k0": "complete", "k1": "failed", "k2": "complete"}
    assert other.left() == 0 and not other.held() and other.claim() is None
    assert [item["value"] for item in store.trials()] == [0.5, None, None]


def test_claims_to_skip(tmp_path):
    store = Store.enrol(made(tmp_path, 3))
    assert store.claim(skip={"k0", "k1"}).item["key"] == "k2"
    assert store.claim(skip={"k0", "k1"}) is None


def test_the_claim_of_a_killed_process_is_free(tmp_path, start):
    Store.enrol(made(tmp_path, 1))
    program = """
        import sys, time
        from knowsam.sweep.store import Store
        claim = Store(sys.argv[1]).claim()
        print(claim.item["key"], flush=True)
        time.sleep(600)
        """
    process = start(program, tmp_path)
    assert process.stdout.readline() == "k0\n"
    store = Store(tmp_path)
    assert store.claim() is None and store.held() and store.interrupted() == set()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert store.interrupted() == {"k0"}
    assert not store.held() and states(store) == {"k0": "running"} and store.left() == 1
    claim = store.claim()
    assert claim.item["key"] == "k0" and claim.resumed


@pytest.mark.parametrize("kind", ["list", "search"])
def test_what_ends_between_the_look_and_the_lock_is_not_claimed(tmp_path, monkeypatch, kind):
    bench = Bench(tmp_path)
    parts = {"train.max_steps": [1, 2, 3]}
    store = Store.enrol(bench.load(grid=parts) if kind == "list" else bench.load(search={"space": {LR: RANGE}}))
    ending = Store(bench.folder).claim()
    look = store.study.get_trials

    def look_too_early(**options):
        found = copy.deepcopy(look(**options))
        if ending.lock.handle is not None:
            ending.finish("complete", **DONE)
        return found

    monkeypatch.setattr(store.study, "get_trials", look_too_early)
    claim = store.claim()
    assert (ending.number, claim.number, claim.resumed) == (0, 1, False)
    assert claim.item["key"] != ending.item["key"]


CLAIMER = """
    import os, sys
    from pathlib import Path
    from knowsam.sweep.store import Store
    folder, marks, times = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    store = Store(folder)
    print("ready", flush=True)
    sys.stdin.readline()
    while (claim := store.claim()) is not None:
        key = claim.item["key"]
        mark = os.open(marks / key, os.O_CREAT | os.O_EXCL)  # fails if another process is at it
        os.close(mark)
        with open(marks / f"{key}.count", "a+b") as count:
            count.write(b".")
            done = count.tell() >= times
        os.unlink(marks / key)
        print(key, done, flush=True)
        if done:
            claim.finish("complete", exit_code=0, message=None, dice=0.5)
        else:
            claim.release()  # as if it had been interrupted
    """


def compete(folder: Path, start, *, trials: int, processes: int, times: int) -> None:
    """Each trial is interrupted ``times - 1`` times; nobody may be at the same one with another, or too often."""
    store = Store.enrol(made(folder / "s", trials))
    (folder / "marks").mkdir()
    running = [start(CLAIMER, folder / "s", folder / "marks", times) for _ in range(processes)]
    assert [process.stdout.readline() for process in running] == ["ready\n"] * processes
    for process in running:
        process.stdin.write("\n")
        process.stdin.flush()
    said = [process.communicate(timeout=600)[0].splitlines() for process in running]
    assert [process.returncode for process in running] == [0] * processes
    claims = Counter(line for lines in said for line in lines)
    assert claims == {f"k{i} {done}": times - 1 if not done else 1 for i in range(trials) for done in (False, True)}
    assert min(map(len, said)) > 0, "all had some"
    assert set(states(store).values()) == {"complete"} and store.left() == 0
    assert len(store.study.get_trials()) == trials


def test_a_thousand_claims_by_eight_processes(tmp_path, start):
    compete(tmp_path, start, trials=250, processes=8, times=4)


@pytest.mark.slow
def test_ten_thousand_claims_by_eight_processes(tmp_path, start):
    compete(tmp_path, start, trials=500, processes=8, times=20)


# ---------------------------------------------------------------- a torn journal


def test_cut_torn_line(tmp_path):
    path = tmp_path / "journal"
    for before, after in (
        (b"", b""),
        (b"{", b""),
        (b"a\n", b"a\n"),
        (b"a\nb", b"a\n"),
        (b"a\n" + b"b" * 10_000, b"a\n"),
        (b"x" * 4095 + b"\n" + b"y" * 4096, b"x" * 4095 + b"\n"),
        (b"x" * 9000, b""),
    ):
        path.write_bytes(before)
        cut_torn_line(path)
        assert path.read_bytes() == after


def test_a_journal_cut_at_any_byte_loses_only_what_was_cut(tmp_path, monkeypatch):
    """K2: at every byte of the last three lines. Afterwards trials are added and run, and all can still be read."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # no power fails here, and the disk may be slow
    whole = tmp_path / "whole"
    store = Store.enrol(made(whole, 3))
    store.claim().finish("complete", **DONE)
    claim = store.claim()
    claim.note(seconds=2.5)
    claim.finish("failed", exit_code=79, message="not finite", dice=None)
    data = (whole / "journal.log").read_bytes()
    lines = data.splitlines(keepends=True)
    # The last lines say: seconds, outcome, failed.
    assert json.loads(lines[-1])["state"] == 3 and "seconds" in json.loads(lines[-3])["user_attr"]
    longer = made(whole, 4)
    torn = tmp_path / "torn"
    for size in range(len(data) - sum(map(len, lines[-3:])), len(data) + 1):
        shutil.rmtree(torn, ignore_errors=True)
        for name in ("configs", "locks", "logs", "trials"):
            (torn / name).mkdir(parents=True)
        shutil.copy(whole / "plan.json", torn)
        (torn / "journal.log").write_bytes(data[:size])
        kept = data[: data[:size].rfind(b"\n") + 1]

        store = Store.enrol(replace(longer, folder=torn))
        journal = (torn / "journal.log").read_bytes()
        assert journal.startswith(kept), size
        assert all(json.loads(line) for line in journal.splitlines()), size
        ended = "failed" if size == len(data) else "running"
        assert states(store) == {"k0": "complete", "k1": ended, "k2": "waiting", "k3": "waiting"}, size
        if size % 16 == 0 or size == len(data):
            while (claim := store.claim()) is not None:
                claim.finish("complete", **DONE)
            read = Store(torn)
            expected = "failed" if size == len(data) else "complete"
            assert states(read) == {"k0": "complete", "k1": expected, "k2": "complete", "k3": "complete"}, size


@pytest.mark.parametrize("length", [1, 40, -1])
def test_others_go_on_when_a_writer_dies_in_the_middle_of_a_line(tmp_path, length):
    """A process that has the journal open reads on correctly behind the repaired place."""
    store, other = Store.enrol(made(tmp_path, 3)), Store(tmp_path)
    store.claim().finish("complete", **DONE)
    assert states(other)["k0"] == "complete"
    line = (tmp_path / "journal.log").read_bytes().splitlines(keepends=True)[-1]
    with open(tmp_path / "journal.log", "ab") as journal:
        journal.write(line[:length])
    assert states(other)["k0"] == "complete"  # a reader alone
    other.claim().finish("complete", **DONE)
    store.claim().finish("complete", **DONE)
    for reader in (store, other, Store(tmp_path)):
        assert states(reader) == {"k0": "complete", "k1": "complete", "k2": "complete"}


# ---------------------------------------------------------------- an edited sweep file


def test_editing_the_sweep(tmp_path):
    """K4: what is added runs, what is finished stays, what is removed is retired, and comes back."""
    bench = Bench(tmp_path)
    parts = {name: {"train.max_steps": steps} for name, steps in (("a", 1), ("b", 2), ("c", 3), ("d", 4))}

    def enrol(*names: str, **renamed: str) -> Store:
        part = {name: parts[name] for name in names} | {new: parts[old] for new, old in renamed.items()}
        return Store.enrol(bench.load(list=part))

    running = enrol("a", "b").claim()
    store = enrol("a", "b", "c")
    assert bench.states() == {"a": "running", "b": "waiting", "c": "waiting"}
    running.release()
    folders = {item["setting"]: item["folder"] for item in store.trials()}
    claim = store.claim()
    assert claim.item["setting"] == "a" and claim.resumed
    claim.finish("complete", **DONE)
    store.claim().finish("failed", exit_code=1, message="broken", dice=None)

    # a is renamed, b and c are gone, d is new.
    store = enrol("d", first="a")
    assert bench.states() == {"first": "complete", "d": "waiting", "b": "retired", "c": "retired"}
    first = next(item for item in store.trials() if item["setting"] == "first")
    assert (first["folder"], first["value"], first["exit_code"]) == (folders["a"], 0.5, 0)
    assert first["overrides"] == {"train.max_steps": 1, "train.seed": 0}
    retired = {item["setting"]: item for item in store.trials() if item["state"] == "retired"}
    assert retired["b"]["folder"] == folders["b"] and retired["b"]["message"] == "broken"
    assert retired["b"]["overrides"] == {"train.max_steps": 2, "train.seed": 0}
    assert summary(store) == (
        "bench: 1 complete, 1 left, 2 retired (no longer in the sweep file; their runs are kept)",
        75,
    )
    assert store.claim().item["setting"] == "d" and store.claim() is None, "the retired are not run"

    # Removed, and back under another name: the run folder and the result are found again.
    enrol("b", "d")
    assert bench.states() == {"b": "failed", "d": "running", "a": "retired", "c": "retired"}
    store = enrol(third="a", fourth="c")
    items = {item["setting"]: item for item in store.trials()}
    assert (items["third"]["state"], items["third"]["folder"]) == ("complete", folders["a"])
    assert (items["fourth"]["state"], items["fourth"]["folder"]) == ("waiting", folders["c"])
    assert len(store.study.get_trials()) == 4
    assert summary(store)[1] == 75


def test_settings_of_the_sweep_itself_may_change(tmp_path):
    bench = Bench(tmp_path)
    Store.enrol(bench.load(grid={"train.max_steps": [1, 2]}, time_limit=5, retries=1)).claim().finish(
        "complete", **DONE
    )
    store = Store.enrol(
        bench.load(
            "other",
            grid={"train.max_steps": [1, 2]},
            time_limit=9,
            retries=0,
            launcher={"workers": 4},
            overrides={"train.log_every": 3},
            baseline="max_steps=1",
        )
    )
    assert bench.states() == {"max_steps=1": "complete", "max_steps=2": "waiting"}
    assert (store.plan["time_limit"], store.plan["retries"], store.plan["baseline"]) == (9, 0, "max_steps=1")
    assert store.plan["command"][-1] == "other" and store.plan["launcher"] == {"name": "local", "workers": 4}


def test_failed_trials_get_another_try_only_when_asked(tmp_path):
    sweep = made(tmp_path, 3)
    store = Store.enrol(sweep)
    store.claim().finish("failed", exit_code=1, message="broken", dice=None)
    store.claim().finish("complete", **DONE)
    assert states(Store.enrol(sweep)) == {"k0": "failed", "k1": "complete", "k2": "waiting"}
    store = Store.enrol(sweep, retry_failed=True)
    assert states(store) == {"k0": "waiting", "k1": "complete", "k2": "waiting"}
    assert store.trials()[0]["message"] is None
    claim = store.claim()
    assert claim.item["key"] == "k0" and not claim.resumed
    claim.finish("complete", **DONE)
    assert states(Store.enrol(sweep, retry_failed=True)) == {"k0": "complete", "k1": "complete", "k2": "waiting"}
    assert len(store.trials()) == 3 and len(json.loads((tmp_path / "trials.json").read_text())["trials"]) == 3


def test_a_database_instead_of_the_journal(tmp_path):
    url = f"sqlite:///{tmp_path}/study.db"
    store = Store.enrol(made(tmp_path / "s", 2, storage=url))
    store.claim().finish("complete", **DONE)
    again = Store.enrol(made(tmp_path / "s", 3, storage=url))
    assert states(again) == {"k0": "complete", "k1": "waiting", "k2": "waiting"}
    assert not (tmp_path / "s/journal.log").exists()


# ---------------------------------------------------------------- in words


def test_summary(tmp_path):
    store = Store.enrol(made(tmp_path, 5))
    assert summary(store) == ("made: 0 complete, 5 left", 75)
    for code, message in ((79, "not finite"), (79, "also"), (-9, "killed"), (None, "never began")):
        store.claim().finish("failed", exit_code=code, message=message, dice=None)
    assert summary(store)[1] == 75
    store.claim().finish("complete", **DONE)
    text, code = summary(store)
    assert code == 1
    assert text.splitlines() == [
        "made: 1 complete, 1 failed (signal 9), 2 failed (exit 79), 1 failed (no exit code)",
        "  failed: s0, seed 0: not finite (logs/k0.log)",
        "  failed: s1, seed 0: also (logs/k1.log)",
        "  failed: s2, seed 0: killed (logs/k2.log)",
        "  failed: s3, seed 0: never began (logs/k3.log)",
    ]
    store = Store.enrol(made(tmp_path, 5), retry_failed=True)
    while (claim := store.claim()) is not None:
        claim.finish("complete", **DONE)
    assert summary(store) == ("made: 5 complete", 0)


def test_progress(tmp_path):
    from knowsam.sweep.status import progress

    store = Store.enrol(made(tmp_path, 4))
    assert progress(store) == "[0/4]"
    for seconds in (100, 200):
        claim = store.claim()
        claim.note(seconds=seconds)
        claim.finish("complete", **DONE)
    assert progress(store) == "[2/4, about 0:05:00 left]"
    store.claim()
    store.claim()
    assert progress(store) == "[2/4, about 0:02:30 left]", "two run at a time"
