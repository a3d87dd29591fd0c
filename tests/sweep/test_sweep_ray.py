"""Sweeps on a Ray of this machine: each trial once, and what is killed goes on where it stopped."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from sweep_stubs import TRAIN, Bench, children, until

from knowsam.errors import ConfigError
from knowsam.sweep import ray as launcher
from knowsam.sweep.store import Store
from knowsam.sweep.worker import child_environment

RAY = {"name": "ray", "workers": 2, "threads": 1}


@pytest.fixture
def bench(tmp_path):
    bench = Bench(tmp_path)
    bench.program(TRAIN)
    return bench


@pytest.fixture
def start(bench):
    """``knowsam sweep`` in a process of its own."""
    running = []

    def begin() -> subprocess.Popen:
        words = [sys.executable, "-m", "knowsam", "sweep", str(bench.file)]
        running.append(subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=child_environment(1)))
        return running[-1]

    yield begin
    for process in running:
        if process.poll() is None:
            process.kill()


def actors(driver: int) -> list[int]:
    """Ray's worker processes that run a trial, below a driver."""
    found = []
    for pid in below(driver):
        if any("program.py" in command(child) for child in children(pid)):
            found.append(pid)
    return found


def below(pid: int) -> list[int]:
    return [p for child in children(pid) for p in (child, *below(child))]


def command(pid: int) -> str:
    try:
        return Path("/proc", str(pid), "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def count(bench: Bench, word: str) -> int:
    return sum(said.startswith(word) for _, said in bench.told())


def resumed_where_they_stopped(bench: Bench) -> bool:
    """Each trial begins where it has last stopped, is finished once, and was never run by two at a time."""
    ends = {}
    for key, word in bench.told():
        what, _, step = word.partition(" ")
        if what == "start" and ends.setdefault(key, "0") != step:
            return False
        if what == "stop":
            ends[key] = step
        if what in ("finish", "overlap"):
            ends[key] = f"{ends.get(key)} {what}"
    return all(value.count("finish") == 1 and "overlap" not in value for value in ends.values())


needs_ray = pytest.mark.skipif("not __import__('importlib.util').util.find_spec('ray')", reason="ray is not installed")


@needs_ray
@pytest.mark.slow
def test_a_ray_of_this_machine_runs_each_trial_once(bench, start):
    bench.write(3, 0.01, grid={"train.max_steps": [1, 2, 3, 4]}, seeds=[0, 1], launcher=RAY)
    driver = start()
    said, _ = driver.communicate(timeout=300)
    assert driver.returncode == 0, said
    assert sorted(word for _, word in bench.told()) == ["finish"] * 8 + ["start 0"] * 8
    assert len(re.findall(r"^\[\d/8.*\] complete: max_steps=", said, re.MULTILINE)) == 8
    assert not list((bench.folder / "ray").iterdir()), "Tune's own files are removed"


@needs_ray
@pytest.mark.slow
@pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGKILL], ids=lambda n: n.name
)
def test_a_driver_that_is_told_to_end_has_its_trials_save(bench, start, number):
    bench.write(40, 0.1, grid={"train.max_steps": [1, 2, 3]}, launcher=RAY)
    driver = start()
    assert until(lambda: count(bench, "start") == 2)
    time.sleep(1.0)
    driver.send_signal(number)
    said, _ = driver.communicate(timeout=120)
    assert until(lambda: count(bench, "stop") == 2), bench.told()
    assert driver.returncode == (-9 if number == signal.SIGKILL else 75), said
    assert count(bench, "start") == 2, "no further trial is begun"
    driver = start()
    said, _ = driver.communicate(timeout=300)
    assert driver.returncode == 0, said
    assert count(bench, "start") == 5 and resumed_where_they_stopped(bench)


@needs_ray
@pytest.mark.slow
def test_a_trial_whose_slot_is_killed_goes_on_in_another(bench, start):
    bench.write(40, 0.1, grid={"train.max_steps": [1, 2, 3]}, launcher=RAY)
    driver = start()
    assert until(lambda: count(bench, "start") == 2)
    time.sleep(1.0)
    os.kill(actors(driver.pid)[0], signal.SIGKILL)
    said, _ = driver.communicate(timeout=300)
    assert driver.returncode == 0, said
    assert count(bench, "stop") == 1 and resumed_where_they_stopped(bench)


def test_without_ray_the_message_tells_how_to_get_it(bench, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match="Ray") as caught:
        launcher.launch(Store.enrol(bench.load(1, 0)), RAY)
    assert caught.value.hint == "pip install 'knowsam[sweep]'"


@needs_ray
def test_a_cluster_that_is_not_there(bench, monkeypatch):
    """Not with a real address: another test's Ray may be found, and a dead one ends the whole process."""
    import ray

    def init(**options):
        assert options["address"] == "auto"
        raise ConnectionError("no cluster was found")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(ConfigError, match="launcher ray: no cluster was found") as caught:
        launcher.launch(Store.enrol(bench.load(1, 0)), {**RAY, "address": "auto"})
    assert "ray start --head" in caught.value.hint
