"""The command predict as a user types it, on a tiny run."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from knowsam.build import AbsentSAM
from knowsam.cli.main import run_command
from knowsam.runs import load_run

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def runs(lab, tmp_path_factory):
    """One KnowSAM run, one Mean Teacher with SKD whose masks are 0 and 255."""
    top = tmp_path_factory.mktemp("runs")
    assert lab.train(top / "knowsam", "train.max_steps=2") == 0
    words = ("method.name=mean_teacher", "skd={weight: 1.0}", "data.labels={0: 0, 1: 255}", "data.image_size=32")
    assert lab.train(top / "teacher", "train.max_steps=2", *words) == 0
    return {path.name: path for path in top.iterdir()}


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (50, 70, 3), np.uint8)).save(folder / "a.png")
    Image.fromarray(rng.integers(0, 256, (64, 64), np.uint8)).save(folder / "sub" / "b.png")
    Image.fromarray((rng.integers(0, 256, (33, 40)) * 257).astype(np.uint16)).save(folder / "sub" / "c.tif")
    return folder


def predict(*words) -> int:
    return run_command("predict", [*map(str, words), "--device", "cpu"])


def tree(path):
    return sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file() and p.name != ".lock")


def test_a_folder(runs, pictures, tmp_path, capsys):
    out = tmp_path / "out"
    assert predict(runs["knowsam"], pictures, "-o", out) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"3 written to {out}"
    assert tree(out) == ["masks/a.png", "masks/sub/b.png", "masks/sub/c.png", "predictions.json"]
    for name, size in (("a", (50, 70)), ("sub/b", (64, 64)), ("sub/c", (33, 40))):
        mask = np.asarray(Image.open(out / "masks" / f"{name}.png"))
        assert mask.shape == size and mask.dtype == np.uint8 and mask.max() <= 1
    record = json.loads((out / "predictions.json").read_text())
    assert record["settings"]["output"] == "fusion" and record["settings"]["image_size"] == 64
    assert record["checkpoint"]["file"] == "best.pt"
    assert record["files"] == {"written": 3, "there_before": 0, "not_reached": 0, "failed": {}}


def test_masks_are_those_that_evaluation_scores(lab, runs, tmp_path):
    """The built-in test images as files: same label maps as from the source, by way of the whole method with SAM."""
    from knowsam import build
    from knowsam.inference.predict import predict_cases

    loaded = load_run(str(runs["knowsam"]), sam=True)
    source = build.build_source(loaded.config)
    (tmp_path / "in").mkdir()
    for case in source.eval_ids("test"):
        Image.fromarray(source.image(case)).save(tmp_path / "in" / f"{case}.png")
    assert predict(runs["knowsam"], tmp_path / "in", "-o", tmp_path / "out", "--batch-size", 8) == 0
    settings = {"image_size": 64, "batch_size": 8, "device": "cpu", "outputs": ["fusion"]}
    for case, labels in predict_cases(loaded.method.predict, source, source.eval_ids("test"), **settings):
        assert (np.asarray(Image.open(tmp_path / "out" / "masks" / f"{case}.png")) == labels["fusion"]).all()


def test_one_file_and_all_that_there_is(runs, pictures, tmp_path):
    words = ("--probabilities", "--uncertainty", "--overlays", "--flips", "--original-labels", "--precision", "bf16")
    out = tmp_path / "out"
    assert predict(runs["teacher"], pictures / "a.png", "-o", out, *words, "--output", "teacher") == 0
    assert tree(out) == [
        "masks/a.png",
        "overlays/a.png",
        "predictions.json",
        "probabilities/a.npz",
        "uncertainty/a.png",
    ]
    mask = np.asarray(Image.open(out / "masks" / "a.png"))
    with np.load(out / "probabilities" / "a.npz") as archive:
        assert (mask == archive["probabilities"].argmax(0) * 255).all()
        assert archive["classes"].tolist() == ["background", "lesion"]
    settings = json.loads((out / "predictions.json").read_text())["settings"]
    assert (settings["label_values"], settings["flips"], settings["precision"]) == ([0, 255], True, "bf16")


@pytest.mark.parametrize("name", ["knowsam", "teacher"])
def test_outputs_without_sam_are_those_of_the_whole_method(runs, name):
    whole, lean = load_run(str(runs[name]), sam=True), load_run(str(runs[name]))
    guides = [m for m in lean.method.modules() if isinstance(m, AbsentSAM)]
    assert len(guides) == 1 and not any("sam_teacher.guide." in key for key in lean.method.state_dict())
    outputs = [o for o in whole.method.outputs() if o != "sam"]
    assert list(lean.method.networks()) == outputs
    images = torch.rand(2, 3, *2 * (whole.config.data.image_size,))
    whole.method.eval()
    with torch.no_grad():
        wanted = {o: x for o, x in whole.method.predict(images).items() if o != "sam"}
        got = {o: lean.network(o)[1](images) for o in outputs}
    assert all(torch.equal(got[o], wanted[o]) for o in outputs)
    assert lean.network()[0] == outputs[0] and not lean.network()[1].training


def test_a_method_that_looks_into_sam_gets_it(lab, tmp_path, monkeypatch):
    (tmp_path / "curious.py").write_text(
        "from knowsam.methods.knowsam import KnowSAM\n"
        "class Curious(KnowSAM):\n"
        "    def __init__(self, students, sam_guide, max_steps):\n"
        "        super().__init__(students, sam_guide, max_steps)\n"
        "        self.depth = len(sam_guide.sam.image_encoder.blocks)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert lab.train(tmp_path / "run", "train.max_steps=1", "method.name=curious:Curious") == 0
    loaded = load_run(str(tmp_path / "run"), sam=False)
    assert loaded.method.depth > 0 and list(loaded.method.networks()) == ["fusion", "unet", "vnet"]


def test_bad_files_are_told_at_the_end(runs, pictures, tmp_path, capsys):
    (pictures / "torn.png").write_bytes((pictures / "a.png").read_bytes()[:100])
    (pictures / "0.nii.gz").write_bytes(b"")
    out = tmp_path / "out"
    assert predict(runs["knowsam"], pictures, "-o", out) == 65
    said = capsys.readouterr()
    assert said.out.splitlines()[-1] == f"3 written to {out}, 2 failed"
    assert (
        "2 files failed:" in said.err
        and "torn.png: not a picture that can be read" in said.err
        and "Traceback" not in said.err
    )
    assert sorted(json.loads((out / "predictions.json").read_text())["files"]["failed"]) == ["0.nii.gz", "torn.png"]
    shutil.copy(pictures / "a.png", pictures / "torn.png")
    (pictures / "0.nii.gz").unlink()
    assert predict(runs["knowsam"], pictures, "-o", out) == 0
    assert "1 written" in capsys.readouterr().out


def test_going_on_and_starting_again(runs, pictures, tmp_path, capsys):
    out = tmp_path / "out"
    assert predict(runs["knowsam"], pictures, "-o", out) == 0
    (out / "masks" / "sub" / "b.png").unlink()
    before = (out / "masks" / "a.png").stat().st_mtime_ns
    assert predict(runs["knowsam"], pictures, "-o", out) == 0
    assert "1 written" in (text := capsys.readouterr().out) and "2 there already (--force" in text
    assert (out / "masks" / "a.png").stat().st_mtime_ns == before
    assert predict(runs["knowsam"], pictures, "-o", out, "--flips") == 73
    text = capsys.readouterr().err
    assert "predictions made otherwise" in text and "flips: False -> True" in text
    assert predict(runs["teacher"], pictures, "-o", out) == 73
    assert "weights_sha256" in capsys.readouterr().err
    assert predict(runs["knowsam"], pictures, "-o", out, "--flips", "--force") == 0
    assert (out / "masks" / "a.png").stat().st_mtime_ns != before


def test_a_first_try_that_wrote_nothing_binds_to_nothing(runs, tmp_path):
    nibabel = pytest.importorskip("nibabel")
    volume = np.random.default_rng(0).integers(0, 256, (20, 24, 3)).astype(np.int16)
    words = (runs["knowsam"], tmp_path / "v.nii.gz", "-o", tmp_path / "out")
    nibabel.save(nibabel.Nifti1Image(volume, np.diag([1, 1, 5, 1])), tmp_path / "v.nii.gz")
    assert predict(*words) == 65, "signed numbers have no black and white"
    nibabel.save(nibabel.Nifti1Image(volume.astype(np.uint8), np.diag([1, 1, 5, 1])), tmp_path / "v.nii.gz")
    assert predict(*words, "--flips", "--probabilities", "--uncertainty", "--overlays") == 0
    mask = nibabel.load(tmp_path / "out" / "masks" / "v.nii.gz")
    assert mask.shape == (20, 24, 3) and (mask.affine == np.diag([1, 1, 5, 1])).all()
    assert nibabel.load(tmp_path / "out" / "probabilities" / "v.nii.gz").shape == (20, 24, 3, 2)
    assert Image.open(tmp_path / "out" / "overlays" / "v.png").mode == "RGB"


def test_somebody_else_s_files_are_not_taken_for_answers(runs, pictures, tmp_path, capsys):
    (tmp_path / "out" / "masks").mkdir(parents=True)
    shutil.copy(pictures / "a.png", tmp_path / "out" / "masks" / "a.png")
    assert predict(runs["knowsam"], pictures, "-o", tmp_path / "out") == 73
    assert "not known to be predictions" in capsys.readouterr().err


def test_one_prediction_at_a_time(runs, pictures, tmp_path, capsys):
    from knowsam.sweep.locks import FileLock

    out = tmp_path / "out"
    out.mkdir()
    with FileLock(out / ".lock"):
        assert predict(runs["knowsam"], pictures, "-o", out) == 73
    assert "in use by another prediction" in capsys.readouterr().err
    assert predict(runs["knowsam"], pictures, "-o", out) == 0


def test_mistakes(runs, pictures, tmp_path, capsys):
    out = tmp_path / "out"
    assert predict(tmp_path / "nowhere", pictures, "-o", out) == 66
    assert predict(runs["knowsam"], pictures / "nothing.png", "-o", out) == 66
    assert predict(runs["knowsam"], pictures, "-o", out, "--output", "sam") == 78
    assert "SAM is not deployed; score it with: knowsam evaluate" in capsys.readouterr().err
    assert predict(runs["knowsam"], pictures, "-o", out, "--output", "unnet") == 78
    assert "the run has fusion, unet, vnet" in capsys.readouterr().err
    assert predict(runs["knowsam"], pictures, "-o", out, "--batch-size", "0") == 2
    assert predict(runs["knowsam"], pictures, "-o", pictures / "a.png") == 74
    (tmp_path / "empty").mkdir()
    assert predict(runs["knowsam"], tmp_path / "empty", "-o", out) == 65
    assert not out.exists()


@pytest.mark.slow
def test_an_interrupted_prediction_goes_on(runs, pictures, tmp_path):
    for n in range(300):
        shutil.copy(pictures / "a.png", pictures / f"copy{n:03d}.png")
    out = tmp_path / "out"
    words = [sys.executable, ROOT / "tools" / "predict.py", runs["knowsam"], pictures, "-o", out, "--device", "cpu"]
    process = subprocess.Popen([*words, "--batch-size", "1"], stdout=subprocess.PIPE, text=True)
    for _ in range(1200):
        if len(list(out.glob("masks/*.png"))) > 5:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 75 and "interrupted, the same command goes on" in text
    there = len(list(out.glob("masks/**/*.png")))
    assert 5 < there < 303
    assert all(Image.open(path).size for path in out.glob("masks/**/*.png"))
    assert predict(runs["knowsam"], pictures, "-o", out) == 0
    assert json.loads((out / "predictions.json").read_text())["files"]["there_before"] == there
    assert len(list(out.glob("masks/**/*.png"))) == 303
