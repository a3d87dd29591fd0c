"""The command ``prepare``, from an archive to a check that passes."""

import zipfile

import numpy as np
from PIL import Image

from knowsam.cli.main import run_command
from knowsam.config import load_config
from knowsam.data.builtin import render


def download(tmp_path, count=30):
    with zipfile.ZipFile(tmp_path / "kvasir-seg.zip", "w") as opened:
        for n in range(count):
            image, mask = render(np.random.default_rng(n), 32, 2)
            mask[:4, :8] = 1
            for kind, array in (("images", image), ("masks", mask * 255)):
                Image.fromarray(array).save(tmp_path / "one.png")
                opened.write(tmp_path / "one.png", f"Kvasir-SEG/{kind}/c{n:03d}.png")
        opened.writestr("Kvasir-SEG/licence.pdf", b"x")
    return str(tmp_path / "kvasir-seg.zip")


def test_from_a_download_to_a_check(tmp_path, capsys):
    path, out = download(tmp_path), tmp_path / "out"
    assert run_command("prepare", ["kvasir", path, "--out", str(out), "--recipe", "small"]) == 0
    told = capsys.readouterr()
    assert "kvasir-seg.zip: 60 files in" in told.out and "passed over: 1 .pdf" in told.out
    assert "30 images can be used; published are 1000" in told.err and "polyp %" in told.out
    experiment = out / "experiments" / "kvasir.yaml"
    assert load_config(experiment).data.classes == ["background", "polyp"]
    summary = (out / "data_splits" / "kvasir" / "summary.md").read_text()
    assert f"knowsam prepare kvasir {path} --out {out} --recipe small --seed 0" in summary
    assert run_command("check", [str(experiment), "data.labelled=labelled_max"]) == 0
    assert run_command("prepare", ["kvasir", path, "--out", str(out)]) == 73
    assert "--force" in capsys.readouterr().err
    assert run_command("prepare", ["kvasir", path, "--out", str(out), "--force"]) == 0
    assert "unpacked before" in capsys.readouterr().out


def test_mistakes_are_one_line_and_a_hint(tmp_path, capsys):
    path = download(tmp_path, 3)
    for words, code, says in (
        (["kvasir", str(tmp_path / "none.zip")], 66, "datasets.simula.no"),
        (["busi", path], 65, "BUSI has benign/"),
        (["acdc", path], 65, "no patientNNN_frameNN.nii.gz"),
        (["coco", path], 2, "invalid choice: 'coco'"),
    ):
        assert run_command("prepare", [*words, "--out", str(tmp_path / "out")]) == code
        told = capsys.readouterr().err
        assert says in told and "Traceback" not in told
    assert not (tmp_path / "out" / "experiments").exists()
