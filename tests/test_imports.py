"""Arrows point one way: what each room of the house may import. And help needs no torch."""

import ast
import json
import re
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
    "digest": ((), ()),
    "schedules": ((), ()),
    "text": ((), ()),
    "palette": ((), ()),
    "signals": ((), ()),
    "files": (("errors",), ()),
    "mixing": ((), ("torch",)),
    "losses": ((), ("torch", "monai")),
    "pretrained": (("components", "errors", "files", "text"), ()),
    "models": (
        ("components", "losses.entropy", "errors", "pretrained"),
        ("torch", "segment_anything", "monai", "timm", "safetensors"),
    ),
    "metrics": (("errors",), ("numpy", "scipy", "monai", "torch")),
    "io": (("errors",), ("numpy", "PIL", "tifffile", "imagecodecs", "h5py", "nibabel", "pydicom")),
    "data": (
        ("io", "errors", "files", "palette"),
        ("torch", "numpy", "scipy", "h5py", "skimage", "PIL", "kornia", "imageio", "tifffile"),
    ),
    "methods": (("losses", "models", "mixing", "schedules", "data.batch", "needs", "errors"), ("torch",)),
    "inference": (
        ("data", "io", "errors", "files", "losses.entropy", "palette", "text"),
        ("torch", "numpy", "scipy", "monai", "PIL", "h5py", "nibabel", "pydicom", "onnx", "onnxruntime"),
    ),
    "engine": (
        (
            "methods.base",
            "methods.contract",
            "losses",
            "data",
            "digest",
            "metrics",
            "inference",
            "schedules",
            "errors",
            "files",
            "palette",
            "signals",
            "text",
        ),
        ("torch", "numpy", "scipy", "rich", "tensorboard", "PIL"),
    ),
    "report": (
        (
            "data.source",
            "data.intensity",
            "data.sizing",
            "io",
            "engine",
            "errors",
            "files",
            "inference.predict",
            "inference.postprocess",
            "metrics",
            "palette",
            "text",
        ),
        ("numpy", "scipy", "jinja2", "matplotlib", "PIL", "skimage"),
    ),
    "compat": (
        ("components", "methods", "models", "losses", "data.batch", "engine.optim", "errors", "needs"),
        ("torch",),
    ),
    "components": (("errors", "needs", "text"), ()),
    "config": (
        ("components", "compat.rows", "data.builtin", "digest", "errors", "inference.postprocess", "needs", "text"),
        ("omegaconf", "yaml"),
    ),
    "study": (("config", "data", "io", "errors", "files"), ("numpy", "yaml")),
    "doctor": (("config", "errors", "pretrained"), ()),
    "sweep": (
        ("components", "config", "errors", "files", "signals", "text"),
        ("optuna", "submitit", "ray"),
    ),
    "build": (
        (
            *("components", "config", "data", "io", "inference.inferers", "engine", "errors", "methods", "models"),
            *("compat", "pretrained", "text"),
        ),
        ("torch", "numpy"),
    ),
    "runs": (("build", "config", "data", "io", "engine", "errors", "inference", "methods"), ("torch", "numpy")),
    "api": (("cli", "config", "runs"), ()),
    "benchmark": (
        ("data", "io", "engine", "inference", "methods", "models"),
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
            "inference",
            "io",
            "losses",
            "methods",
            "metrics",
            "pretrained",
            "report",
            "runs",
            "signals",
            "study",
            "sweep",
            "text",
        ),
        ("torch", "numpy", "rich", "yaml"),
    ),
    "__main__": (("cli",), ()),
    "__init__": (("api", "runs"), ()),
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
    # sweep expands and compares experiments, study writes them, doctor looks for what the shipped ones name; runs reads
    # those of runs, and api one for the command line
    users = {"build", "cli", "config", "sweep", "study", "doctor", "runs", "api"}
    for path in FILES:
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for module, line in imports(path):
            if within(module, ("knowsam.config", "omegaconf")):
                assert room in users, f"{path}:{line}: below build.py everything takes plain arguments"
            if within(module, ("knowsam.build",)):
                assert room in ("cli", "runs"), f"{path}:{line}: only what begins or opens a run calls build"


# Class or function -> its parameter or field that is a Config all the same.
KEEPERS = {("runs", "LoadedRun"): "config"}  # for the command line, which hands it to build


def takers(path):
    """(function or class, parameter or field, line) of everything in a file that takes a Config."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            a = node.args
            taken = [(x.arg, x.annotation) for x in (*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg) if x]
        elif isinstance(node, ast.ClassDef):  # a field is an argument of the constructor that a dataclass has
            taken = [(x.target.id, x.annotation) for x in node.body if isinstance(x, ast.AnnAssign)]
        else:
            continue
        for name, annotation in taken:
            kind = ast.unparse(annotation).strip("'") if annotation else "Any"
            anything = {"Any", "object"} & {part.strip() for part in kind.split("|")}
            if (anything and name in ("config", "configs")) or re.search(r"\b(Data|Train|Evaluate)?Config\b", kind):
                yield getattr(node, "name", "lambda"), name, node.lineno


def test_no_function_below_build_takes_a_config():
    for path in FILES:
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if room not in ("build", "cli", "config"):
            for owner, name, line in takers(path):
                assert KEEPERS.get((room, owner)) == name, (
                    f"{path}:{line}: {owner} takes a Config as {name!r}; give it what it needs of it: plain values, "
                    "objects that build made, or what makes them"
                )


def test_the_test_sees_functions_that_take_a_config(tmp_path):
    file = tmp_path / "x.py"
    file.write_text(
        "from knowsam.config import Config, TrainConfig\n"
        "def a(config): ...\n"
        "def b(x: 'Config | None' = None): ...\n"
        "class C:\n    kept: TrainConfig\n    text: str\n"
        "    def d(self, *, config: Any): ...\n"
        "    async def e(self, *rest: list[Config]): ...\n"
        "f = lambda config: 0\n"
        "def g(use: Callable[[Config], float]): ...\n"
        "def fine(config: str, configs: dict[str, int], error: ConfigError) -> Config: ...\n"
    )
    assert sorted((owner, name) for owner, name, _ in takers(file)) == [
        ("C", "kept"),
        ("a", "config"),
        ("b", "x"),
        ("d", "config"),
        ("e", "rest"),
        ("g", "use"),
        ("lambda", "config"),
    ]


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
        ["prepare", "--help"],
        ["index", "--help"],
        ["score", "--help"],
        ["cache", "--help"],
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
