"""Arrows point one way: what each room of the house may import. And help needs no torch."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "knowsam"

# Room or module of knowsam -> (what of knowsam it may import, which of the big libraries it may import).
# A room may always import itself and `knowsam` (the version).
ALLOWED = {
    "errors": ((), ()),
    "needs": ((), ()),
    "schedules": ((), ()),
    "text": ((), ()),
    "palette": ((), ()),
    "signals": ((), ()),
    "files": (("errors",), ()),
    "mixing": ((), ("torch",)),
    "losses": ((), ("torch", "monai")),
    "pretrained": (("components", "errors", "files", "text"), ()),
    "models": (("losses.entropy", "errors", "pretrained"), ("torch", "segment_anything")),
    "metrics": (("errors",), ("numpy", "scipy", "monai", "torch")),
    "data": (
        ("errors", "files", "palette"),
        ("torch", "numpy", "scipy", "h5py", "skimage", "PIL", "kornia", "imageio", "tifffile"),
    ),
    "methods": (("losses", "models", "mixing", "schedules", "data.batch"), ("torch",)),
    "inference": (
        ("data.source", "data.readers", "data.h5", "errors", "files", "losses.entropy", "palette"),
        ("torch", "numpy", "scipy", "monai", "PIL", "h5py", "nibabel", "pydicom", "onnx", "onnxruntime"),
    ),
    "engine": (
        ("methods.base", "data", "metrics", "inference", "schedules", "errors", "files", "palette", "signals", "text"),
        ("torch", "numpy", "scipy", "rich", "tensorboard", "PIL"),
    ),
    "report": (
        ("data.source", "engine", "errors", "files", "inference.predict", "metrics", "palette", "text"),
        ("numpy", "scipy", "jinja2", "matplotlib", "PIL", "skimage"),
    ),
    "compat": (("methods", "models", "losses", "data.batch", "engine.optim", "errors"), ("torch",)),
    "components": (("errors", "needs"), ()),
    "config": (("components", "compat.rows", "errors", "text"), ("omegaconf", "yaml")),
    "identity": (("config", "data.builtin", "errors"), ("yaml",)),
    "study": (("config", "data", "errors", "files"), ("numpy", "yaml")),
    "doctor": (("config", "errors", "pretrained"), ()),
    "sweep": (
        ("components", "config", "errors", "files", "identity", "signals", "text"),
        ("optuna", "submitit", "ray"),
    ),
    "build": (
        ("components", "config", "data", "engine", "errors", "methods", "models", "compat", "pretrained"),
        ("torch", "numpy"),
    ),
    "benchmark": (
        ("build", "config", "data", "engine", "errors", "inference", "methods", "models"),
        ("torch", "numpy", "PIL"),
    ),
    "cli": (
        (
            "benchmark",
            "build",
            "compat",
            "components",
            "config",
            "data",
            "doctor",
            "engine",
            "errors",
            "files",
            "identity",
            "inference",
            "losses",
            "methods",
            "metrics",
            "pretrained",
            "report",
            "signals",
            "study",
            "sweep",
            "text",
        ),
        ("torch", "numpy", "rich", "yaml"),
    ),
    "__main__": (("cli",), ()),
    "__init__": ((), ()),
}
BIG = {library for _, libraries in ALLOWED.values() for library in libraries} | {"torchvision", "timm", "pandas", "cv2"}
FILES = sorted(PACKAGE.rglob("*.py"))


def imports(path):
    """(module, line) of every import, also those inside functions, but not those for type checkers only."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    checked = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in checked:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute here"
            for alias in node.names:  # `from knowsam import build` imports knowsam.build
                nested = (
                    node.module == "knowsam"
                    or (PACKAGE.parent / Path(*node.module.split("."), f"{alias.name}.py")).exists()
                )
                yield (f"{node.module}.{alias.name}" if nested else node.module), node.lineno


def within(module, allowed):
    return any(module == a or module.startswith(f"{a}.") for a in allowed)


@pytest.mark.parametrize("path", FILES, ids=[str(p.relative_to(PACKAGE)) for p in FILES])
def test_arrows_point_one_way(path):
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert room in ALLOWED, f"{room} is a new room: say here what it may import"
    own, libraries = ALLOWED[room]
    for module, line in imports(path):
        head, _, rest = module.partition(".")
        if head == "knowsam" and rest and not rest.startswith("__"):
            assert within(rest, (room, *own)), f"{path}:{line}: {room} may not import {module}"
        elif head in BIG:
            assert head in libraries, f"{path}:{line}: {room} may not import {module}"


def test_the_config_stops_at_build():
    # identity and sweep compare and expand experiments, study writes them, doctor looks for what they name;
    # benchmark runs them, in processes of its own
    users = {"build", "cli", "config", "identity", "sweep", "study", "doctor", "benchmark"}
    for path in FILES:
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for module, line in imports(path):
            if within(module, ("knowsam.config", "omegaconf")):
                assert room in users, f"{path}:{line}: below build.py everything takes plain arguments"
            if within(module, ("knowsam.build",)):
                assert room in ("cli", "benchmark"), f"{path}:{line}: only the command line calls build"


def test_the_command_line_stops_at_cli():
    for path in FILES:
        if path.relative_to(PACKAGE).parts[0] != "cli":
            for module, line in imports(path):
                assert module != "argparse", f"{path}:{line}: below cli options are dataclasses and keyword arguments"


def test_the_test_sees_imports(tmp_path):
    file = tmp_path / "x.py"
    file.write_text(
        "import torch.nn as nn\nfrom knowsam import build\ndef f():\n    from knowsam.data import cache\n"
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import timm\n"
    )
    found = {module for module, _ in imports(file)}
    assert found == {"torch.nn", "knowsam.build", "knowsam.data.cache", "typing"}
    assert not within("knowsam.databank", ("knowsam.data",))


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["--version"],
        ["train", "--help"],
        ["evaluate", "--help"],
        ["sweep", "--help"],
        ["compare", "--help"],
        ["report", "--help"],
        ["convert", "--help"],
        ["init", "--help"],
        ["check", "--help"],
        ["splits", "--help"],
        ["weights", "--help"],
        ["weights", "list"],
        ["doctor", "--help"],
        ["completion", "--help"],
        ["completion", "bash"],
        ["predict", "--help"],
        ["export", "--help"],
        ["train", "EXPERIMENT", "--print-config"],
    ],
)
def test_help_and_print_config_import_nothing_slow(words, tmp_path):
    experiment = tmp_path / "x.yaml"
    experiment.write_text(
        "method: {name: supervised}\nskd: {weight: 2.0}\nstudents: {a: {name: unet}, b: {name: vnet}}"
    )
    words = [str(experiment) if w == "EXPERIMENT" else w for w in words]
    code = (
        "import json, sys\nfrom knowsam.cli.main import main\n"
        f"code = main({words!r})\n"
        "slow = {'torch', 'numpy', 'monai', 'scipy', 'skimage', 'h5py', 'segment_anything'} & set(sys.modules)\n"
        "print('\\n' + json.dumps([code, sorted(slow)]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [0, []]
    assert len(done.stdout) > 12
