"""For all tests: one thread, a throw-away cache, and ``lab``, a tiny experiment that is trained in this process."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; the machine's cores are shared
os.environ.setdefault("MKL_NUM_THREADS", "1")

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Dropout, batch statistics, adapters and every kind of prompt but the large sparse heads, in 0.6 M parameters.
EXPERIMENT = """
name: tiny
data:
  source: {name: builtin, train: 12, val: 2, test: 2, size: 64}
  labelled: labelled_50pct
  image_size: 64
  labelled_batch: 2
  unlabelled_batch: 2
students:
  unet: {name: unet, channels: [4, 8], dropout: [0.1, 0.2]}
  vnet: {name: vnet, filters: 2, norm: batch}
fusion: {name: ham}
sam:
  encoder: {name: vit_tiny}
  tuning: [{name: adapter, ratio: 0.1}]
  prompt: {name: learned, sparse: false}
  train: [tuning, prompt]
method: {name: knowsam}
optim:
  subnets: {name: adamw, lr: 3e-3}
  sam: {name: adam, lr: 1e-3}
train:
  max_steps: 4
  seed: 1
  device: cpu
  validate_every: 4
  checkpoint_every: 4
  log_every: 1
  tensorboard: false
  pictures_every: 0
"""


@pytest.fixture(scope="session", autouse=True)
def _quiet_machine(tmp_path_factory):
    """No test reads or fills the user's cache; ``KNOWSAM_DATA`` of the user is not seen."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KNOWSAM_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.delenv("KNOWSAM_DATA", raising=False)
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            patch.delenv(name, raising=False)
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(1)
        yield


@pytest.fixture(autouse=True)
def _forget_modules(tmp_path_factory):
    """Modules that a test wrote are not imported for the next test, which may write others of the same name."""
    yield
    base = str(tmp_path_factory.getbasetemp())
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None) or "").startswith(base):
            del sys.modules[name]


class Lab:
    """The tiny experiment: run it, read what it left, compare."""

    root = ROOT

    def __init__(self, folder: Path):
        self.experiment = folder / "tiny.yaml"
        self.experiment.write_text(EXPERIMENT, encoding="utf-8")

    def words(self, run, *more: str) -> list[str]:
        """Words after ``knowsam train``."""
        return [str(self.experiment), f"run={run}", *more]

    def train(self, run, *more: str) -> int:
        """``knowsam train`` in this process; its exit code."""
        from knowsam.cli.main import run_command

        return run_command("train", self.words(run, *more))

    @staticmethod
    def last(run) -> dict:
        from knowsam.engine.checkpoint import load_checkpoint

        return load_checkpoint(Path(run) / "last.pt", fall_back=False)

    @staticmethod
    def best_step(run) -> int:
        """Step of ``best.pt``; -1 if there is none."""
        from knowsam.engine.checkpoint import load_checkpoint

        path = Path(run) / "best.pt"
        return load_checkpoint(path, fall_back=False)["step"] if path.exists() else -1

    @staticmethod
    def metrics(run) -> list[dict]:
        """Records without what depends on the clock."""
        from knowsam.engine.log import read_metrics

        records = read_metrics(Path(run) / "metrics.jsonl")
        return [{k: v for k, v in r.items() if k != "images_per_second"} for r in records if r["kind"] != "cost"]

    def outcome(self, run) -> dict:
        """All that a run decides, flat by name: both checkpoints and the metrics, without paths and versions."""
        from knowsam.engine.checkpoint import load_checkpoint

        found = {"metrics": self.metrics(run)}
        for name in ("last", "best"):
            state = load_checkpoint(Path(run) / f"{name}.pt", fall_back=False)
            # Of this process, not of the run: which modules of the tests happened to be imported.
            found |= flat({k: v for k, v in state.items() if k not in ("config", "environment", "code")}, name)
        return found

    @staticmethod
    def differences(first: dict, second: dict) -> list[str]:
        """Names whose values differ in any bit, or that one side lacks."""
        import torch

        def same(a, b) -> bool:
            if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
                return a.dtype == b.dtype and torch.equal(a, b)
            return type(a) is type(b) and a == b

        return [k for k in {**first, **second} if k not in first or k not in second or not same(first[k], second[k])]


def flat(value, name: str) -> dict:
    """Nested dictionaries and lists as one dictionary of dotted names."""
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in flat(item, f"{name}.{key}").items()}
    if isinstance(value, list | tuple):
        return {k: v for i, item in enumerate(value) for k, v in flat(item, f"{name}.{i}").items()}
    return {name: value}


@pytest.fixture(scope="session")
def lab(tmp_path_factory) -> Lab:
    return Lab(tmp_path_factory.mktemp("lab"))
