"""Trials that fail, hang and are killed; workers and drivers that are killed; the command line.

K1, K3 and K6 of the project's list of faults.
"""

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
from sweep_stubs import TRAIN, Bench, children, until

from knowsam.cli.main import run_command
from knowsam.signals import StopSignal
from knowsam.sweep import local, worker
from knowsam.sweep.store import Store
from knowsam.sweep.worker import work

RATES = {"train.max_steps": [1, 2, 3]}


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """Looks at a trial every 20 ms rather than every second, in this process."""
    monkeypatch.setattr(worker, "POLL", 0.02)
    return Bench(tmp_path)


def sweep(*words) -> int:
    return run_command("sweep", [str(word) for word in words])


def item(bench: Bench, setting: str) -> dict:
    return next(item for item in Store(bench.folder).trials() if item["setting"] == setting)


def gone(pid: int) -> bool:
    try:
        return Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


# ---------------------------------------------------------------- one worker


def test_a_worker_runs_all_in_order(bench):
    bench.program(TRAIN)
    Store.enrol(bench.load(2, 0, grid=RATES, seeds=[0, 1]))
    said = []
    assert work(bench.folder, say=said.append) == 6
    items = Store(bench.folder).trials()
    assert bench.told() == [(it["key"], word) for it in items for word in ("start 0", "finish")]
    assert {it["state"] for it in items} == {"complete"}
    assert len(said) == 6 and said[-1].startswith("[6/6] complete: max_steps=3, seed 1: validation Dice ")
    for it in items:
        run = bench.folder / it["folder"]
        assert it["value"] == json.loads((run / "metrics.jsonl").read_text())["dice_fusion"]
        assert (it["exit_code"], it["message"]) == (0, None) and it["seconds"] > 0
        assert (bench.folder / "configs" / f"{it['key']}.yaml").is_file()
    assert work(bench.folder, say=said.append) == 0 and len(said) == 6
    assert len(bench.told()) == 12


def test_no_more_trials_than_asked_for(bench):
    Store.enrol(bench.load(grid=RATES))
    assert work(bench.folder, max_trials=2) == 2
    assert sweep("work", bench.folder, "--trials", 1) == 0
    assert bench.states() == dict.fromkeys(("max_steps=1", "max_steps=2", "max_steps=3"), "complete")


def test_trials_json_is_as_of_the_last_trial_that_ended(bench):
    Store.enrol(bench.load(grid=RATES))
    seen = []

    def look(_):
        states = [trial["state"] for trial in json.loads((bench.folder / "trials.json").read_text())["trials"]]
        seen.append(states.count("complete"))

    assert work(bench.folder, say=look) == 3
    assert seen == [1, 2, 3]


@pytest.mark.parametrize("keep", ["all", "best"])
def test_what_a_trial_keeps(bench, keep):
    # The first one validated, the second never did, the third failed.
    bench.program(
        "files = ['last.pt'] + (['best.pt'] if 'max_steps: 2' not in open(config).read() else [])\n"
        "for name in files: open(os.path.join(run, name), 'w').close()\n"
        "sys.exit('max_steps: 3' in open(config).read())"
    )
    Store.enrol(bench.load(grid=RATES, keep=keep))
    assert work(bench.folder) == 3
    kept = {
        it["setting"]: sorted(file.name for file in (bench.folder / it["folder"]).glob("*.pt"))
        for it in Store(bench.folder).trials()
    }
    assert kept == {
        "max_steps=1": ["best.pt"] if keep == "best" else ["best.pt", "last.pt"],
        "max_steps=2": ["last.pt"],
        "max_steps=3": ["best.pt", "last.pt"],
    }


def test_a_trial_gets_its_files_and_no_terminal(bench):
    bench.program(
        "text = open(config).read()\n"
        "assert 'max_steps: 2' in text and os.path.isabs(run) and sys.stdin.read() == ''\n"
        "print('out'); print('err', file=sys.stderr)"
    )
    Store.enrol(bench.load(grid={"train.max_steps": [2]}))
    assert work(bench.folder) == 1
    it = item(bench, "max_steps=2")
    assert it["state"] == "complete", it["message"]
    assert sorted((bench.folder / "logs" / f"{it['key']}.log").read_text().split()) == ["err", "out"]


def test_the_command_of_a_trial(bench):
    plan = Store.enrol(bench.load(grid=RATES)).plan
    config, run = Path("c.yaml"), Path("/r")
    own = [sys.executable, "-m", "knowsam", "train", "c.yaml", "run=/r"]
    assert worker._command({**plan, "command": ["sh", "x={config}", "{run}/y"]}, config, run) == [
        "sh",
        "x=c.yaml",
        "/r/y",
    ]
    plan["command"] = None
    assert worker._command(plan, config, run) == [*own, "--evaluate"]
    words = worker._command({**plan, "launcher": {"gpus_per_trial": 4}}, config, run)
    assert words == [
        *own[:2],
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=4",
        *own[1:],
        "--evaluate",
    ]
    searching = worker._command({**plan, "search": {"space": {}}}, config, run)
    assert searching == own, "a search never looks at the test split"


# ---------------------------------------------------------------- trials that fail: K3


FAILING = """
tell("start")
attempts = read("attempts", 0) + 1
save("attempts", attempts)
if os.path.exists(os.path.join(os.path.dirname(ledger), "mended")):
    sys.exit(0)
if setting == "numeric":
    print("step 7\\nerror[numeric]: loss seg_unet is not finite\\nhint: Lower the learning rate.", file=sys.stderr)
    sys.exit(79)
if setting == "config":
    print("error[config]: 1 problem in the configuration:\\n  a.yaml:3 optim.lr: unknown key\\nmore")
    sys.exit(78)
if setting == "crash":
    raise RuntimeError("boom")
if setting == "silent":
    sys.exit(3)
if setting == "killed":
    print("about to die", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
if setting == "killed_once" and attempts == 1:
    os.kill(os.getpid(), signal.SIGKILL)
if setting == "requeued" and attempts == 1:
    sys.exit(75)
if setting == "segfault":
    signal.signal(signal.SIGSEGV, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGSEGV)
"""
WAYS = {
    "numeric": ("failed", 79, "error[numeric]: loss seg_unet is not finite", 1),
    "config": (
        "failed",
        78,
        "error[config]: 1 problem in the configuration: a.yaml:3 optim.lr: unknown key",
        1,
    ),
    "crash": ("failed", 1, "RuntimeError: boom", 1),
    "silent": ("failed", 3, "exit code 3", 1),
    "killed": ("failed", -9, "killed by SIGKILL (out of memory?)", 3),
    "segfault": ("failed", -11, "killed by SIGSEGV", 3),
    "killed_once": ("complete", 0, None, 2),
    "requeued": ("complete", 0, None, 2),
    "good": ("complete", 0, None, 1),
}


def test_trials_that_fail_are_recorded_and_the_others_go_on(bench, capsys):
    bench.program(FAILING)
    file = bench.write(list={name: {"train.max_steps": i + 1} for i, name in enumerate(WAYS)}, retries=2)
    from knowsam.sweep.spec import load_sweep

    Store.enrol(load_sweep(file))
    assert work(bench.folder) == len(WAYS)
    for name, (state, code, message, attempts) in WAYS.items():
        it = item(bench, name)
        assert (it["state"], it["exit_code"], it["message"]) == (state, code, message), name
        assert json.loads((bench.folder / it["folder"] / "attempts").read_text()) == attempts, name
    count = len(bench.told())

    capsys.readouterr()
    assert sweep(file) == 1, "nothing is left to do, so nothing is run"
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        "bench: 3 complete, 1 failed (signal 11), 1 failed (signal 9), 1 failed (exit 1), 1 failed (exit 3), "
        "1 failed (exit 78), 1 failed (exit 79)"
    )
    assert lines[1] == (
        "  failed: numeric, seed 0: error[numeric]: loss seg_unet is not finite "
        f"(logs/{item(bench, 'numeric')['key']}.log)"
    )
    assert len([line for line in lines if line.startswith("  failed: ")]) == 6
    assert lines[-1] == f"next: knowsam compare {bench.folder}"
    assert len(bench.told()) == count

    (bench.root / "mended").touch()
    assert sweep(file, "--retry-failed") == 0
    assert len(bench.told()) == count + 6, "only those that had failed"
    assert set(bench.states().values()) == {"complete"}
    assert "bench: 9 complete" in capsys.readouterr().out


def test_the_program_is_not_there(bench, capsys):
    file = bench.write(command=["/nowhere/train"], list={"a": {}, "b": {"train.max_steps": 2}})
    assert sweep(file) == 1
    said = capsys.readouterr()
    assert "bench: 0 complete, 2 failed (exit 127)" in said.out and "Traceback" not in said.out + said.err
    assert "failed: a, seed 0: cannot start /nowhere/train: No such file or directory" in said.out


def test_a_trial_that_always_asks_to_be_requeued_does_not_run_for_ever(bench):
    bench.program("tell('start'); sys.exit(75)")
    Store.enrol(bench.load(list={"a": {}, "b": {"train.max_steps": 2}}, retries=1))
    said = []
    assert work(bench.folder, say=said.append) == 0
    assert len(bench.told()) == 4, "two of one try and one retry"
    assert [line.partition("] ")[2].partition(":")[0] for line in said] == ["interrupted", "interrupted"]
    store = Store(bench.folder)
    assert store.left() == 2 and not store.held()


def test_a_run_folder_that_somebody_else_uses_is_left_to_later(bench):
    bench.program("tell('start'); sys.exit(73 if setting == 'a' else 0)")
    Store.enrol(bench.load(list={"a": {}, "b": {"train.max_steps": 2}}))
    assert work(bench.folder) == 1
    assert len(bench.told()) == 2
    assert item(bench, "a")["state"] == "running" and item(bench, "b")["state"] == "complete"


# ---------------------------------------------------------------- trials that hang: K6

HANG = """
import subprocess
if setting == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-IS", "-c", "import time; time.sleep(600)"])
tell(f"pids {os.getpid()} {child.pid}")
while not stop:
    time.sleep(0.01)
tell("stop")
child.kill()
sys.exit(75)
"""


def test_a_hung_trial_is_ended(bench, monkeypatch):
    """One that saves and ends when asked; and one that does not, which is killed with its children."""
    monkeypatch.setattr(worker, "GRACE", 0.5)
    bench.program(f"if setting != 'quick':\n    exec({HANG!r})")
    parts = {name: {"train.max_steps": i + 1} for i, name in enumerate(("polite", "deaf", "quick"))}
    Store.enrol(bench.load(list=parts, time_limit=2))
    try:
        assert work(bench.folder) == 3
        assert item(bench, "quick")["state"] == "complete"
        polite, deaf = item(bench, "polite"), item(bench, "deaf")
        for it, code in ((polite, 75), (deaf, -9)):
            assert (it["state"], it["exit_code"], it["message"]) == ("failed", code, "exceeded time_limit (2 s)")
            assert it["seconds"] >= 2
        told = bench.told()
        assert [key for key, word in told if word == "stop"] == [polite["key"]]
        assert [key for key, word in told if word.startswith("pids")] == [polite["key"], deaf["key"]], "no retry"
        for pid in (int(pid) for _, word in told if word.startswith("pids") for pid in word.split()[1:]):
            assert until(lambda pid=pid: gone(pid), 30)
    finally:
        for _, word in bench.told():
            for pid in word.split()[1:]:
                if not gone(int(pid)):
                    os.kill(int(pid), signal.SIGKILL)


def test_the_time_limit_counts_all_attempts(bench):
    bench.program(HANG)
    store = Store.enrol(bench.load(time_limit=500))
    claim = store.claim()
    claim.note(seconds=499.0)  # by a worker that was stopped
    claim.release()
    assert work(bench.folder) == 1
    it = item(bench, "base")
    assert it["message"] == "exceeded time_limit (500 s)" and it["seconds"] > 499
    assert store.left() == 0


# ---------------------------------------------------------------- stopping


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_ends_the_trial_and_gives_it_back(bench, name):
    bench.program(TRAIN)
    Store.enrol(bench.load(10**9, 0.01, grid=RATES))
    before = signal.getsignal(getattr(signal, name))

    def send() -> None:
        if until(bench.told):
            os.kill(os.getpid(), getattr(signal, name))

    sender = threading.Thread(target=send)
    sender.start()
    said = []
    assert work(bench.folder, say=said.append) == 0
    sender.join()
    assert signal.getsignal(getattr(signal, name)) is before
    assert len(said) == 1 and "interrupted: max_steps=1" in said[0]
    (_, begin), (_, end) = bench.told()
    assert begin == "start 0" and end.startswith("stop ")
    store = Store(bench.folder)
    assert [it["state"] for it in store.trials()] == ["running", "waiting", "waiting"]
    assert not store.held()
    bench.program(TRAIN.replace("steps, pause = ", "steps, pause = 0, 0  # "))  # the rest is short
    assert work(bench.folder) == 3


def test_a_second_ctrl_c_ends_at_once():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.name == "SIGTERM"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_outside_the_main_thread_there_are_no_signals(bench):
    """As in Ray: the worker runs all the same."""
    Store.enrol(bench.load(grid=RATES))
    ended = []
    thread = threading.Thread(target=lambda: ended.append(work(bench.folder)))
    thread.start()
    thread.join()
    assert ended == [3]


# ---------------------------------------------------------------- killed drivers and workers: K1


class Driver:
    """``knowsam sweep`` in a process of its own, with two workers."""

    def __init__(self, bench: Bench):
        self.log = open(bench.root / "driver.log", "ab")  # noqa: SIM115
        words = [sys.executable, "-m", "knowsam", "sweep", str(bench.file), "--workers", "2"]
        self.process = subprocess.Popen(words, stdout=self.log, stderr=self.log, stdin=subprocess.DEVNULL)

    def workers(self) -> list[int]:
        def is_worker(pid: int) -> bool:
            try:
                return b"\0work\0" in Path("/proc", str(pid), "cmdline").read_bytes()
            except OSError:
                return False

        return [pid for pid in children(self.process.pid) if is_worker(pid)]

    def end(self) -> None:
        self.process.kill()  # SIGKILL
        self.process.wait()
        self.log.close()


def test_a_trial_saves_and_ends_when_its_worker_or_driver_is_killed(bench):
    bench.program(TRAIN)
    bench.write(10**9, 0.01, grid=RATES)
    driver = Driver(bench)
    try:
        assert until(lambda: len(bench.told()) == 2)
        os.kill(driver.workers()[0], signal.SIGKILL)
        assert until(lambda: len(bench.told()) == 4), "one has stopped, and another worker has begun"
        first, second, *later = bench.told()
        again, stopped = sorted(later, key=lambda line: line[1])
        assert stopped[1].startswith("stop ") and stopped[0] in (first[0], second[0])
        assert again[1].startswith("start ")
        driver.process.kill()
        assert until(lambda: len(bench.told()) == 6), "both have stopped"
        assert until(lambda: not Store(bench.folder).held())
    finally:
        driver.end()
    assert sorted(word.split()[0] for _, word in bench.told()) == ["start"] * 3 + ["stop"] * 3


def torture(tmp_path: Path, *, trials: int, steps: int, kills: int, seed: int) -> int:
    """Kill drivers and workers at random moments, then let the sweep finish; the number of kills that hit."""
    keys = {"name": "torture", "grid": {"train.max_steps": list(range(1, trials + 1))}}
    bench, straight = Bench(tmp_path), Bench(tmp_path, "straight")
    bench.program(TRAIN)
    straight.write(1, 0, **keys)
    assert sweep(straight.file, "--workers", 1) == 0
    bench.write(steps, 0.05, **keys)
    luck = random.Random(seed)
    driver = Driver(bench)
    hit = 0
    try:
        for _ in range(kills):
            seen = len(bench.told())
            until(lambda seen=seen, running=driver.process: len(bench.told()) > seen or running.poll() is not None)
            time.sleep(luck.uniform(0, 0.3))
            workers = driver.workers()
            hit += driver.process.poll() is None
            if workers and luck.random() < 0.5:
                with suppress(ProcessLookupError):  # it has just ended by itself
                    os.kill(luck.choice(workers), signal.SIGKILL)
            else:
                driver.end()
                driver = Driver(bench)
        code = driver.process.wait(600)
        for _ in range(5):  # a driver may end with 75 while orphans of the one before save their checkpoints
            if code != 75:
                break
            driver.end()
            driver = Driver(bench)
            code = driver.process.wait(600)
        assert code == 0, (tmp_path / "driver.log").read_text()
    finally:
        driver.end()
    check_ledger(bench, trials)
    assert bench.exported() == straight.exported()
    assert (bench.folder / "trials.json").read_bytes() == (straight.folder / "trials.json").read_bytes()
    return hit


def check_ledger(bench: Bench, trials: int) -> None:
    """Of each trial: one at a time, every start where the one before had stopped, one finish, nothing after it."""
    told = bench.told()
    keys = dict(told)
    assert len(keys) == trials
    for key in keys:
        words = [word for other, word in told if other == key]
        assert words[-1] == "finish" and words.count("finish") == 1, words
        assert words[0] == "start 0", words
        for first, second in zip(words[0:-1:2], words[1::2], strict=True):
            assert first.startswith("start ") and (second == "finish" or second.startswith("stop ")), words
        for first, second in zip(words[1:-1:2], words[2::2], strict=True):
            assert first.replace("stop", "start") == second, words


def test_killed_drivers_and_workers_lose_and_repeat_nothing(tmp_path):
    assert torture(tmp_path, trials=12, steps=8, kills=6, seed=1) >= 4


@pytest.mark.slow
def test_fifty_kills_over_twenty_trials(tmp_path):
    assert torture(tmp_path, trials=20, steps=40, kills=50, seed=2) >= 40


def test_a_driver_that_is_asked_to_stop(bench):
    bench.program(TRAIN)
    bench.write(10**9, 0.01, grid=RATES)
    driver = Driver(bench)
    try:
        assert until(lambda: len(bench.told()) == 2)
        driver.process.send_signal(signal.SIGTERM)
        assert driver.process.wait(120) == 75
    finally:
        driver.end()
    text = (bench.root / "driver.log").read_text()
    assert "bench: 0 complete, 3 left" in text and text.endswith("The same command goes on from there.\n")
    assert sorted(word.split()[0] for _, word in bench.told()) == ["start", "start", "stop", "stop"]
    assert not Store(bench.folder).held()
    bench.write(1, 0, grid=RATES)
    assert sweep(bench.file) == 0
    assert set(bench.states().values()) == {"complete"}


# ---------------------------------------------------------------- workers of one machine


@pytest.mark.parametrize("code", ["70", "kill"])
def test_workers_that_always_die_are_not_started_for_ever(bench, monkeypatch, code):
    store = Store.enrol(bench.load(grid=RATES))
    started = []

    def start(*_):
        end = "import os; os.kill(os.getpid(), 9)" if code == "kill" else f"raise SystemExit({code})"
        started.append(subprocess.Popen([sys.executable, "-IS", "-c", end]))
        return started[-1]

    monkeypatch.setattr(local, "_start", start)
    local.launch(store, {"workers": 2})
    assert 2 <= len(started) <= 20
    assert store.left() == 3


def test_cores_are_shared(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(local, "visible_gpus", lambda: [])
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {2, 3, 5, 7}, raising=False)

    def shares(workers: int, **options):
        found = [local.environment(i, workers, options) for i in range(workers)]
        assert all("CUDA_VISIBLE_DEVICES" not in variables for variables, _ in found)
        return [(variables["OMP_NUM_THREADS"], cores) for variables, cores in found]

    assert shares(1) == [("4", {2, 3, 5, 7})]
    assert shares(2) == [("2", {2, 3}), ("2", {5, 7})]
    assert shares(3) == [("1", {2}), ("1", {3}), ("1", {5})]
    assert shares(2, threads=1) == [("1", {2}), ("1", {3})]
    assert shares(5) == [("1", None)] * 5, "more than there are cores: the system shares them"
    assert shares(2, threads=3) == [("3", None)] * 2


@pytest.mark.parametrize(
    ("visible", "workers", "per_trial", "expected"),
    [
        ("0,1,2,3", 4, None, ["0", "1", "2", "3"]),
        ("0,1,2,3", 2, 2, ["0,1", "2,3"]),
        ("4,6", 3, 1, ["4", "6", "4"]),
        ("0,1,2", 2, 2, ["0,1", "0,1"]),
        ("GPU-a,GPU-b", 2, None, ["GPU-a", "GPU-b"]),
        ("0,1", 2, 0, ["", ""]),
        ("", 2, 1, ["", ""]),
        ("-1", 2, None, ["-1", "-1"]),
    ],
)
def test_gpus_are_shared(monkeypatch, visible, workers, per_trial, expected):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    options = {} if per_trial is None else {"gpus_per_trial": per_trial}
    found = [local.environment(i, workers, options)[0]["CUDA_VISIBLE_DEVICES"] for i in range(workers)]
    assert found == expected


# ---------------------------------------------------------------- the command line


def test_status(bench, capsys):
    bench.program(TRAIN)
    Store.enrol(bench.load(1, 0, grid=RATES, seeds=[7]))
    work(bench.folder, max_trials=1)
    capsys.readouterr()
    assert sweep("status", bench.folder) == 75
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["state", "experiment", "setting", "seed", "val", "Dice", "%", "time", "run"]
    value = item(bench, "max_steps=1")["value"]
    folder = item(bench, "max_steps=1")["folder"]
    *told, duration, run = lines[1].split()
    assert told == ["complete", "base", "max_steps=1", "7", f"{100 * value:.2f}"] and run == folder
    assert re.fullmatch(r"\d:\d\d:\d\d", duration)
    assert lines[2].split()[:4] == ["waiting", "base", "max_steps=2", "7"]
    assert lines[-1] == "bench: 1 complete, 2 left"
    work(bench.folder)
    assert sweep("status", bench.folder) == 0


def test_the_whole_command_twice(bench, capfd):
    bench.program(TRAIN)
    file = bench.write(1, 0, grid=RATES, launcher={"workers": 2})
    assert sweep(file) == 0
    said = capfd.readouterr().out
    assert f"bench: 3 trials to do, 2 at a time (local); folder {bench.folder}" in said
    assert "[3/3] complete: " in said and "bench: 3 complete" in said
    count = len(bench.told())
    assert sweep(file) == 0
    said = capfd.readouterr().out
    assert "to do" not in said and said.startswith("bench: 3 complete")
    assert len(bench.told()) == count == 6


def test_dry_run_lists_and_writes_nothing(bench, capsys):
    file = bench.write(grid=RATES, seeds=[4, 5], exclude={"seed": 9})
    assert sweep(file, "--dry-run", "--no-timing") == 0
    said = capsys.readouterr().out
    assert "warning: exclude {'seed': 9} drops nothing" in said
    assert "max_steps=3" in said and f"bench: 6 trials, folder {bench.folder}" in said
    assert not bench.folder.exists() and bench.told() == []


def test_plan_only_leaves_the_work_to_others(bench, capsys):
    file = bench.write(grid=RATES)
    assert sweep(file, "--plan-only") == 0
    assert f"3 trials to do; workers join with: knowsam sweep work {bench.folder}" in capsys.readouterr().out
    assert bench.told() == [] and set(bench.states().values()) == {"waiting"}
    assert sweep("work", bench.folder) == 0
    assert len(bench.told()) == 3 and set(bench.states().values()) == {"complete"}


def test_mistakes_end_without_a_traceback(bench, capsys):
    good = bench.write(grid=RATES)
    assert sweep(good, "--dry-run", "--no-timing") == 0
    (bench.root / "typo.yaml").write_text("base: base.yaml\ngird: {}\n")
    (bench.root / "lost.yaml").write_text("base: nowhere.yaml\n")
    for words, code, text in (
        (["nowhere.yaml"], 66, "error[not found]: there is no sweep file nowhere.yaml"),
        (["work", bench.root], 66, "holds no sweep (no plan.json)"),
        (["status", bench.root], 66, "hint: Start it with: knowsam sweep SWEEP.yaml"),
        ([bench.root / "typo.yaml"], 78, "typo.yaml:2 gird: unknown key; did you mean 'grid'?"),
        ([bench.root / "lost.yaml"], 78, "there is no experiment file"),
        (["a", "b", "c"], 78, "hint: Give SWEEP.yaml, or work FOLDER, or status FOLDER."),
        ([good, "--workers", "0"], 2, "must be a whole number of at least 1, got '0'"),
        ([good, "--launcher", "pbs"], 2, "invalid choice: 'pbs'"),
        ([], 2, "the following arguments are required"),
    ):
        capsys.readouterr()
        assert sweep(*words) == code, words
        said = capsys.readouterr()
        assert text in said.err and "Traceback" not in said.err + said.out, words
    assert not bench.folder.exists()
    Store.enrol(bench.load(grid=RATES))
    bench.write(grid=RATES, name="other")
    assert sweep(bench.file) == 78
    assert "holds the sweep 'bench'" in capsys.readouterr().err
    (bench.folder / "plan.json").write_text("{")
    assert sweep("status", bench.folder) == 74


# ---------------------------------------------------------------- a real one


def test_two_real_trainings(lab, tmp_path, capfd):
    """Trained and scored by the command; a second call, and a second ``train --evaluate``, do nothing."""
    file = tmp_path / "real.yaml"
    values = {
        "base": "lone.yaml",
        "folder": str(tmp_path / "real"),
        "overrides": {"train.max_steps": 2, "train.validate_every": 1, "fusion": None},
        "list": {
            "mean teacher": {"method.name": "mean_teacher"},
            "supervised": {"method.name": "supervised"},
        },
        "seeds": [3],
        "baseline": "supervised",
        "launcher": {"workers": 1, "threads": 1},
    }
    lone = tmp_path / "lone.yaml"  # the tiny experiment with one student
    before, _, behind = lab.experiment.read_text().partition("students:")
    students = "students:\n  unet: {name: vnet, filters: 2, norm: batch}\n"
    lone.write_text(f"{before}{students}sam:{behind.partition('sam:')[2]}")
    file.write_text(json.dumps(values))
    assert sweep(file) == 0
    said = capfd.readouterr().out
    assert "[2/2] complete: supervised, seed 3: validation Dice " in said
    items = json.loads((tmp_path / "real/trials.json").read_text())["trials"]
    for it in items:
        run = tmp_path / "real" / it["folder"]
        assert lab.last(run)["step"] == 2
        scores = json.loads((run / "evaluation/test.json").read_text())
        assert scores["checkpoint"]["file"] == "best.pt" and scores["checkpoint"]["split"] == "val"
        deployed = "dice_unet" if it["setting"] == "supervised" else "dice_teacher"
        assert it["value"] == scores["checkpoint"]["value"] == max(r[deployed] for r in lab.metrics(run)[1::2])

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "real/trials").rglob("*") if path.is_file()}
    assert sweep(file) == 0
    assert "to do" not in capfd.readouterr().out
    config = tmp_path / "real/configs" / f"{items[0]['key']}.yaml"
    run = tmp_path / "real" / items[0]["folder"]
    assert run_command("train", [str(config), f"run={run}", "--evaluate"]) == 0
    said = capfd.readouterr().out
    assert "is already complete at step 2" in said
    assert f"is scored already: {run / 'evaluation/test.json'}" in said
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "real/trials").rglob("*") if path.is_file()}
    assert {p: t for p, t in after.items() if p.name != ".lock"} == {
        p: t for p, t in before.items() if p.name != ".lock"
    }
