"""What only a CUDA device can show: python -m pytest -m gpu"""

import pytest
import torch

from knowsam.cli.main import run_command
from knowsam.data.augment import Augmenter
from knowsam.engine.checkpoint import load_checkpoint
from knowsam.models.sam import build_sam_guide

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

WORDS = [
    "train.device=cuda",
    "train.max_steps=8",
    "train.validate_every=4",
    "train.checkpoint_every=4",
    "train.log_every=1",
    "data.source={name: builtin, train: 12, val: 2, test: 2}",
    "data.labelled=labelled_50pct",
    "data.image_size=64",
    "method.mixing=true",
]


def train(run, *words):
    return run_command("train", ["experiments/quickstart.yaml", f"run={run}", *WORDS, *words])


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_every_precision_trains_and_evaluates(tmp_path, precision):
    assert train(tmp_path / "run", f"train.precision={precision}") == 0
    assert run_command("evaluate", [str(tmp_path / "run"), "--device", "cuda"]) == 0


def test_a_resumed_run_stays_close(tmp_path):
    assert train(tmp_path / "straight") == 0
    assert (
        run_command("train", ["experiments/quickstart.yaml", f"run={tmp_path / 'halves'}", *WORDS, "--stop-at", "4"])
        == 0
    )
    assert train(tmp_path / "halves") == 0
    first, second = (load_checkpoint(tmp_path / name / "last.pt")["method"] for name in ("straight", "halves"))
    for name, value in first.items():
        # Kernels that add atomically make CUDA runs differ in the last bits.
        torch.testing.assert_close(second[name].float(), value.float(), rtol=1e-2, atol=1e-2, msg=name)


def test_views_on_the_device_are_those_of_the_cpu():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8, generator=generator)
    mask = torch.randint(0, 3, (2, 64, 64), dtype=torch.uint8, generator=generator)
    raw = images[:2], mask, images[2:]
    here = Augmenter()(*raw, seed=5)
    there = Augmenter()(*(x.cuda() for x in raw), seed=5).to("cpu")
    for name in ("labelled", "weak", "strong"):
        difference = (getattr(here, name) - getattr(there, name)).abs()
        assert difference.mean() < 1e-4 and difference.median() < 1e-5
    assert (here.mask != there.mask).float().mean() < 1e-3


def test_sam_on_the_device_equals_the_cpu():
    torch.manual_seed(0)
    guide, _ = build_sam_guide("tiny", image_size=128, num_classes=3)
    guide.eval()
    images, coarse = torch.rand(2, 3, 128, 128), torch.randn(2, 3, 128, 128)
    with torch.no_grad():
        here = guide(images, coarse)
        there = guide.cuda()(images.cuda(), coarse.cuda()).cpu()
    torch.testing.assert_close(there, here, rtol=1e-3, atol=1e-3)


def test_no_step_makes_the_host_wait(tmp_path, monkeypatch):
    """Between two logs nothing synchronises: torch raises where something does."""
    from knowsam.engine import guard
    from knowsam.engine import train as loop

    watched = guard.StepGuard.watch

    def strict(self, losses, total, step, batches, optimizers):
        torch.cuda.set_sync_debug_mode("error" if 2 < step < 6 else "default")
        watched(self, losses, total, step, batches, optimizers)

    monkeypatch.setattr(loop.StepGuard, "watch", strict)
    try:
        assert train(tmp_path / "run", "train.log_every=8", "train.validate_every=8", "train.checkpoint_every=8") == 0
    finally:
        torch.cuda.set_sync_debug_mode("default")
