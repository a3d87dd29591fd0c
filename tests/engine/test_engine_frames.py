"""From the command to the formula there is little to read past: five frames of ours, in five files."""

import json
import subprocess
import sys

import pytest

TRACED = """
import json, runpy, sys

root, out = sys.argv[1], sys.argv[2]
sys.argv = [f"{root}/tools/train.py", *sys.argv[3:]]
found = []


def watch(frame, event, argument):
    if event == "call" and frame.f_code.co_name == "sam_distillation_loss" and not found:
        while frame is not None:
            name = frame.f_code.co_filename
            if name.startswith((f"{root}/tools", f"{root}/knowsam")):
                found.append((name[len(root) + 1 :], frame.f_code.co_name))
            frame = frame.f_back
        json.dump(found[::-1], open(out, "w"))


sys.setprofile(watch)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize(
    ("more", "method"),
    [((), "knowsam"), (("method={name: mean_teacher}", "skd={weight: 1.0}"), "with_skd")],
)
def test_from_the_command_to_the_formula(lab, tmp_path, more, method):
    words = lab.words(tmp_path / "run", "train.max_steps=1", "train.validate_every=1", *more)
    command = [sys.executable, "-c", TRACED, str(lab.root), str(tmp_path / "frames.json"), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    frames = [tuple(frame) for frame in json.loads((tmp_path / "frames.json").read_text())]
    assert frames == [
        ("tools/train.py", "<module>"),
        ("knowsam/cli/train.py", "run"),
        ("knowsam/engine/train.py", "train"),
        (f"knowsam/methods/{method}.py", "forward"),
        ("knowsam/losses/distillation.py", "sam_distillation_loss"),
    ]


def test_the_loop_is_read_on_two_screens(lab):
    import ast

    tree = ast.parse((lab.root / "knowsam" / "engine" / "train.py").read_text())
    (loop,) = [node for node in ast.walk(tree) if isinstance(node, ast.While)]
    assert loop.end_lineno - loop.lineno < 110
