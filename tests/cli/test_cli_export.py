"""The command export as a user types it, on a tiny run."""

import hashlib
import json

import pytest
import torch

from knowsam.cli.main import run_command
from knowsam.inference import export as exporting
from knowsam.runs import load_run


@pytest.fixture(scope="module")
def run(lab, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert lab.train(folder, "train.max_steps=2", "data.labels={0: 0, 1: [255, 254]}") == 0
    return folder


def export(*words) -> int:
    return run_command("export", list(map(str, words)))


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_a_file_its_description_and_its_example(run, tmp_path, capsys):
    file = tmp_path / "net.pt"
    assert export(run, "--format", "torchscript", "-o", file, "--example", "--gives", "logits") == 0
    text = capsys.readouterr().out
    assert (
        "largest difference from the run's network: " in text and "(B, 3, H, W) in 0..1 -> logits (B, 2, H, W)" in text
    )
    assert names(tmp_path) == ["net.pt", "net.pt.json", "net_torchscript_example.py"]
    beside = json.loads((tmp_path / "net.pt.json").read_text())
    extra = {"knowsam.json": ""}
    network = torch.jit.load(file, _extra_files=extra)
    inside = json.loads(extra["knowsam.json"])
    assert {key: beside[key] for key in inside} == inside
    assert set(beside) - set(inside) == {"file", "sha256", "parity"}
    assert beside["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert beside["parity"]["largest_difference"] <= beside["parity"]["tolerance"] == 1e-4
    assert (inside["classes"], inside["label_values"], inside["image_size"]) == (["background", "lesion"], [0, 255], 64)
    assert (inside["output"], inside["answer"]["name"], inside["run"]) == ("fusion", "logits", "tiny")
    assert inside["normalisation_inside"] == {"mean": 0.5, "std": 0.25}
    assert inside["checkpoint"]["file"] == "best.pt" and inside["versions"]["torch"] == torch.__version__
    assert str(run) not in (tmp_path / "net.pt.json").read_text()
    x = torch.rand(3, 3, 48, 80)
    with torch.no_grad():
        torch.testing.assert_close(network(x), load_run(str(run)).network()[1](x), atol=1e-4, rtol=0)


@pytest.mark.parametrize("words", [("--output", "unet"), ("--output", "vnet", "--checkpoint", "last")])
def test_a_student_of_a_checkpoint(run, tmp_path, words):
    file = tmp_path / "net.pt"
    assert export(run, "--format", "torchscript", "-o", file, *words) == 0
    about = json.loads((tmp_path / "net.pt.json").read_text())
    checkpoint = "last" if "last" in words else "best"
    assert about["output"] == words[1] and about["checkpoint"]["file"] == f"{checkpoint}.pt"
    x = torch.rand(1, 3, 64, 32)
    with torch.no_grad():
        wanted = load_run(str(run), checkpoint).network(words[1])[1](x).softmax(1)
        torch.testing.assert_close(torch.jit.load(file)(x), wanted, atol=1e-4, rtol=0)


def test_what_is_there_is_not_lost(run, tmp_path, capsys):
    file = tmp_path / "net.pt"
    file.write_bytes(b"mine")
    assert export(run, "--format", "torchscript", "-o", file) == 73
    assert file.read_bytes() == b"mine" and "there already" in capsys.readouterr().err
    assert export(run, "--format", "torchscript", "-o", file, "--force", "--output", "unet") == 0
    assert names(tmp_path) == ["net.pt", "net.pt.json"] and len(file.read_bytes()) > 1000


def test_nothing_is_left_of_a_file_that_is_refused(run, tmp_path, monkeypatch, capsys):
    real = exporting.load_exported
    monkeypatch.setattr(exporting, "load_exported", lambda *a: lambda x: real(*a)(x) + 1e-3)
    assert export(run, "--format", "torchscript", "-o", tmp_path / "net.pt", "--output", "unet", "--example") == 79
    assert "nothing was written" in capsys.readouterr().err and names(tmp_path) == []


def test_mistakes(run, tmp_path, monkeypatch, capsys):
    words = ("--format", "torchscript", "-o", tmp_path / "net.pt")
    assert export(tmp_path / "nowhere", *words) == 66
    assert export(run, *words, "--output", "sam") == 78
    assert "SAM is not deployed" in capsys.readouterr().err
    assert export(run, "--format", "torchscript", "-o", tmp_path / "no" / "net.pt") == 66
    assert "there is no folder" in capsys.readouterr().err
    assert export(run, "--format", "onxx", "-o", tmp_path / "net") == 2
    monkeypatch.setattr(exporting.importlib.util, "find_spec", lambda name: None)
    assert export(run, "--format", "onnx", "-o", tmp_path / "net.onnx") == 78
    text = capsys.readouterr().err
    assert "--format onnx needs onnx, onnxscript, onnxruntime" in text and "knowsam[export]" in text
    assert names(tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize("file_format", ["onnx", "pt2"])
@pytest.mark.parametrize("rows", ["false", "true"])
def test_the_other_formats_also_of_the_published_networks(lab, tmp_path, file_format, rows):
    if file_format == "onnx":
        pytest.importorskip("onnxscript")
    assert lab.train(tmp_path / "run", "train.max_steps=200", f"published_code={rows}", "method.mix=null") == 0
    (tmp_path / "out").mkdir()
    file = tmp_path / "out" / f"net.{file_format}"
    assert export(tmp_path / "run", "--format", file_format, "-o", file, "--example") == 0
    assert names(tmp_path / "out") == [f"net.{file_format}", f"net.{file_format}.json", f"net_{file_format}_example.py"]
    about = json.loads((tmp_path / "out" / f"net.{file_format}.json").read_text())
    assert about["normalisation_inside"]["mean"] == (0.0 if rows == "true" else 0.5)
