"""Sweeps of programs that take milliseconds: what a trial does is a few lines in a file, not a training."""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from knowsam.sweep.spec import Sweep, load_sweep

BASE = "name: dummy\n"  # the defaults; no trial here ever builds it
BEGIN = """
import fcntl, json, os, signal, sys, time
config, run, ledger = sys.argv[1:4]
setting, _, key = os.path.basename(run).rpartition("_")
setting = setting.rpartition("_seed")[0]
stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
signal.alarm(600)  # whatever the test does, nothing stays behind
os.makedirs(run, exist_ok=True)

def tell(word):
    handle = os.open(ledger, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(handle, f"{key} {word}\\n".encode())  # one write: lines of several processes don't mix
    os.close(handle)

def read(name, default):
    try:
        return json.load(open(os.path.join(run, name)))
    except FileNotFoundError:
        return default

def save(name, value):
    path = os.path.join(run, name)
    with open(path + ".tmp", "w") as file:
        json.dump(value, file)
    os.replace(path + ".tmp", path)

def validation(step, dice):
    with open(os.path.join(run, "metrics.jsonl"), "a") as file:
        file.write(json.dumps({"step": step, "kind": "val", "dice_fusion": dice, "dice_unet": 0.99}) + "\\n")
"""
# As a training: a checkpoint after each step, 75 when it is asked to end, nothing to do when it is complete.
TRAIN = """
steps, pause = int(sys.argv[4]), float(sys.argv[5])
lock = open(os.path.join(run, "lock"), "w")
try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
except OSError:
    tell("overlap")
    sys.exit(70)
done = read("step", 0)
if done < steps:
    tell(f"start {done}")
    while done < steps:
        if stop:
            tell(f"stop {done}")
            sys.exit(75)
        time.sleep(pause)
        done += 1
        if done == steps:
            validation(done, round(0.5 + int(key[:4], 16) / 2**18, 6))
        save("step", done)
    tell("finish")
"""


class Bench:
    """A folder with a base experiment, a sweep file, a program for its trials and the ledger that they write.

    Args:
        root: where all of it goes.
        name: of the sweep and of its folder.
    """

    def __init__(self, root: Path, name: str = "bench"):
        self.root = root
        self.file = root / f"{name}.yaml"
        self.folder = root / name
        self.ledger = root / f"{name}.ledger"
        (root / "base.yaml").write_text(BASE)
        self.program("tell('ran')")

    def program(self, lines: str) -> None:
        """What a trial does; ``config``, ``run``, ``setting``, ``key``, ``tell`` and so on are at hand."""
        (self.root / "program.py").write_text(BEGIN + lines + "\n")

    def write(self, *words: Any, **keys: Any) -> Path:
        """The sweep file: keys over the base, the folder and the program with ``words`` behind the ledger."""
        # Without site-packages, so that the program starts in 20 ms.
        command = [sys.executable, "-IS", str(self.root / "program.py"), "{config}", "{run}", str(self.ledger)]
        values = {"base": "base.yaml", "folder": str(self.folder), "command": [*command, *map(str, words)], **keys}
        self.file.write_text(yaml.safe_dump(values, sort_keys=False))
        return self.file

    def load(self, *words: Any, **keys: Any) -> Sweep:
        return load_sweep(self.write(*words, **keys))

    def told(self) -> list[tuple[str, str]]:
        """(key, word) of every line of the ledger."""
        lines = self.ledger.read_text().splitlines() if self.ledger.exists() else []
        return [(key, word) for key, _, word in (line.partition(" ") for line in lines)]

    def exported(self) -> dict[str, Any]:
        return json.loads((self.folder / "trials.json").read_text())

    def states(self) -> dict[str, str]:
        """Setting -> state, of the exported record."""
        return {item["setting"]: item["state"] for item in self.exported()["trials"]}


def until(true: Callable[[], Any], seconds: float = 120.0) -> bool:
    """Wait for it; False when the generous limit is over."""
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def children(parent: int) -> list[int]:
    """Processes that it started and that are alive."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                state, above = Path("/proc", entry, "stat").read_text().rpartition(")")[2].split()[:2]
            except OSError:  # it has just ended
                continue
            if int(above) == parent and state != "Z":
                found.append(int(entry))
    return sorted(found)
