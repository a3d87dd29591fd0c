"""The commands ``splits`` and ``check``, and what ``train`` does of the latter."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from knowsam.cli.main import run_command
from knowsam.data.builtin import render

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def data(tmp_path):
    """16 cases of 8 patients; a table says whose they are."""
    rows = ["file,who"]
    for n in range(16):
        image, mask = render(np.random.default_rng(n), 40, 2)
        mask[:3, :3] = 1
        for kind, array in (("images", image), ("masks", mask)):
            (tmp_path / "data" / kind).mkdir(exist_ok=True, parents=True)
            Image.fromarray(array).save(tmp_path / "data" / kind / f"case_{n:02d}.png")
        rows.append(f"case_{n:02d}.png,{n % 8}")
    (tmp_path / "who.csv").write_text("\n".join(rows) + "\n")
    return tmp_path / "data"


def splits(data, *words):
    return run_command("splits", ["--images", str(data), "--out", str(data.parent / "lists"), *words])


@pytest.fixture
def experiment(data, lab):
    """Words of the tiny experiment on these data."""
    assert splits(data, "--labelled", "30", "--test", "20", "--val", "20") == 0
    source = f"data.source={{name: image_folder, root: {data}}}"
    lists = [f"data.splits={data.parent / 'lists'}", "data.labelled=labelled_30pct"]
    return [str(lab.experiment), source, *lists, "method={name: supervised}"]


def test_splits_by_a_table(data, capsys):
    table = ["--groups", str(data.parent / "who.csv"), "--id-column", "file", "--group-column", "who"]
    assert splits(data, *table, "--labelled", "1groups") == 0
    folder = data.parent / "lists"
    who = dict(line.split(",") for line in (folder / "groups.csv").read_text().splitlines()[1:])
    assert len(who) == 16
    sides = {}
    for name in ("train", "val", "test"):
        for case_id in (folder / f"{name}.txt").read_text().split():
            assert sides.setdefault(who[case_id], name) == name
    summary = (folder / "summary.md").read_text()
    assert "--groups" in summary and "--seed 0" in summary and "sha256" in summary
    assert "groups" in capsys.readouterr().out
    # once more: the same lists; another seed: refused, unless forced
    assert splits(data, *table, "--labelled", "1groups") == 0
    assert "nothing was written" in capsys.readouterr().out
    assert splits(data, *table, "--labelled", "1groups", "--seed", "1") == 73
    assert splits(data, *table, "--labelled", "1groups", "--seed", "1", "--force") == 0


def test_a_good_study_passes(experiment, tmp_path, capsys):
    report, picture = tmp_path / "new" / "check.json", tmp_path / "new" / "preview.png"
    assert run_command("check", [*experiment, "--json", str(report), "--preview", str(picture)]) == 0
    told = capsys.readouterr().out
    assert "0 errors" in told and "fit to train on: knowsam train" in told and "masks that may be read" in told
    found = json.loads(report.read_text())
    assert found["fit"] and found["errors"] == [] and found["classes"]["labelled"]["masks_read"] == 3
    assert found["classes"]["test"]["cases_with_class"] == {"background": 3, "lesion": 3}
    assert 0 < found["classes"]["val"]["pixel_share"]["lesion"] < 1
    assert Image.open(picture).format == "PNG"
    assert run_command("check", [*experiment, "--quick"]) == 0


def test_errors_are_printed_written_and_counted(experiment, data, tmp_path, capsys):
    names = {name: (data.parent / "lists" / f"{name}.txt").read_text().split() for name in ("val", "test")}
    (data / "masks" / f"{names['val'][0]}.png").unlink()
    (data / "images" / f"{names['test'][0]}.png").write_bytes(b"")
    report = tmp_path / "check.json"
    assert run_command("check", [*experiment, "--json", str(report), "--preview", str(tmp_path / "p.png")]) == 65
    told = capsys.readouterr().out
    assert "error: missing mask (1)" in told and "error: image cannot be read (1)" in told and "0 bytes" in told
    assert "mend the errors" in told and (tmp_path / "p.png").exists()
    assert [fault["kind"] for fault in json.loads(report.read_text())["errors"]] == [
        "missing mask",
        "image cannot be read",
    ]


def test_findings_of_a_kind_are_cut_short_on_the_screen_only(experiment, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("knowsam.cli.check._SHOWN", 2)
    for path in (data / "images").iterdir():
        path.write_bytes(b"")
    assert (
        run_command("check", [*experiment, "--json", str(tmp_path / "c.json"), "--preview", str(tmp_path / "p.png")])
        == 65
    )
    told = capsys.readouterr().out
    assert "... and 14 more" in told and told.count("0 bytes") == 2 and "no preview" in told
    assert len(json.loads((tmp_path / "c.json").read_text())["errors"]) == 16
    assert run_command("check", [*experiment, "--all"]) == 65
    assert capsys.readouterr().out.count("0 bytes") == 16


def test_training_refuses_a_leak_before_it_begins(experiment, data, tmp_path, capsys, lab):
    test = (data.parent / "lists" / "test.txt").read_text().split()[0]
    train = (data.parent / "lists" / "train.txt").read_text().split()[0]
    shutil.copy(data / "images" / f"{test}.png", data / "images" / f"{train}.png")
    words = experiment[1:]
    assert lab.train(tmp_path / "run", *words) == 65
    assert f"train {train} = test {test}" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert run_command("check", [*experiment, "--quick"]) == 65


def test_refusals(experiment, data, tmp_path, capsys):
    assert run_command("check", [*experiment, "--quick", "--json", "x.json"]) == 78
    assert run_command("check", [*experiment, "data.source.root=nowhere"]) == 66
    assert run_command("check", [*experiment, "data.splits=nowhere"]) == 66
    assert run_command("check", [str(tmp_path / "none.yaml")]) == 66
    assert run_command("check", [*experiment, "--json", str(data / "images" / "case_00.png" / "x.json")]) == 74
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("name", ["init", "check_data", "make_splits"])
def test_tools(name):
    words = [sys.executable, str(ROOT / "tools" / f"{name}.py"), "--help"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert f"tools/{name}.py" in done.stdout and "exit codes" in done.stdout
