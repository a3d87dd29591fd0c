"""The command ``index``: a folder or an experiment in, one file out that trainings map."""

import re
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

from knowsam.cli.main import run_command
from knowsam.data.builtin import render
from knowsam.data.index import Index
from knowsam.data.make_index import find_index, h5_places, image_folder_places

ROOT = Path(__file__).resolve().parents[2]
PATIENT = r"^(p\d)"


@pytest.fixture
def study(tmp_path, monkeypatch, lab):
    """12 cases of 6 patients, lists over them, and the words of an experiment."""
    monkeypatch.setenv("KNOWSAM_CACHE", str(tmp_path / "cache"))
    names = [f"p{n // 2}_{n:02d}" for n in range(12)]
    for n, name in enumerate(names):
        image, mask = render(np.random.default_rng(n), 32, 2)
        for kind, array in (("images", image), ("masks", mask)):
            (tmp_path / "data" / kind).mkdir(exist_ok=True, parents=True)
            Image.fromarray(array).save(tmp_path / "data" / kind / f"{name}.png")
    (tmp_path / "lists").mkdir()
    parts = {"train": names[:8], "labelled_50pct": names[:4], "val": names[8:10], "test": names[10:]}
    for name, ids in parts.items():
        (tmp_path / "lists" / f"{name}.txt").write_text("".join(f"{i}\n" for i in ids))
    source = f"data.source={{name: image_folder, root: {tmp_path / 'data'}}}"
    lists = [f"data.splits={tmp_path / 'lists'}", "data.labelled=labelled_50pct", f"data.group_regex={PATIENT}"]
    return [str(lab.experiment), source, *lists]


def test_an_experiment(study, tmp_path, capsys):
    assert run_command("index", [*study, "--digests", "--masks"]) == 0
    told = capsys.readouterr().out
    assert "12 cases" in told and "24 files read, 0 known" in told
    assert "8 train, 4 labelled, 2 val, 2 test; every case is there" in told
    index = find_index(tmp_path / "data", image_folder_places())
    assert index.group("p5_10") == "p5" and index.mask_range("p0_00")[1] <= 1 and index.digest("p0_00")
    assert len(list(Path(f"{index.path}.lists").glob("*.npy"))) == 4  # the first training finds them translated
    # again without options: brought up to date, not made poorer
    Image.fromarray(np.zeros((32, 32), np.uint8)).save(tmp_path / "data" / "images" / "p9_99.png")
    assert run_command("index", study) == 0
    assert "1 files read, 24 known from before" in capsys.readouterr().out
    assert find_index(tmp_path / "data", image_folder_places()).digest("p9_99")


def test_a_folder(study, tmp_path, capsys):
    out = tmp_path / "new" / "my.index"
    (tmp_path / "who.csv").write_text("id,group\np0_00,Anna\n")
    words = ["--out", str(out), "--groups", str(tmp_path / "who.csv"), "--domain-regex", "_(0)"]
    assert run_command("index", [str(tmp_path / "data"), *words]) == 0
    seen = capsys.readouterr()
    assert "11 of 12 cases have no group, such as p0_01" in seen.out + seen.err
    index = Index(out)
    assert (index.group("p0_00"), index.group("p0_01"), index.domain("p0_01")) == ("Anna", None, "0")
    assert index.masks["p5_11"] == tmp_path / "data" / "masks" / "p5_11.png"
    (tmp_path / "data" / "masks").rename(tmp_path / "data" / "truth")
    assert run_command("index", [str(tmp_path / "data"), "--out", str(out)]) == 66
    told = capsys.readouterr().err
    assert "no folder 'masks'; folders in it: images, truth" in told and "--mask-dir DIR" in told
    assert run_command("index", [str(tmp_path / "data"), "--out", str(out), "--mask-dir", "truth"]) == 0
    assert len(Index(out).masks) == 12


def test_the_example_of_the_page(study, tmp_path, monkeypatch, capsys):
    page = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"(?ms)^```python\n(.*?)^```", page)
    monkeypatch.chdir(tmp_path)
    assert run_command("index", [*study, "--out", "study.index"]) == 0
    block = block.replace("data_splits/my_study", "lists").replace("labelled_10pct", "labelled_50pct")
    capsys.readouterr()
    exec(compile(block, "scale.md", "exec"), {})
    told = capsys.readouterr().out.splitlines()
    assert told == ["8 p0_00 False", f"{tmp_path / 'data' / 'images' / 'p0_00.png'} p0 []", "[]"]


def test_check_tells_what_has_changed(study, tmp_path, capsys):
    assert run_command("index", [*study, "--check"]) == 66
    assert run_command("index", study) == 0
    assert run_command("index", [*study, "--check"]) == 0
    assert "up to date: 12 cases" in capsys.readouterr().out
    (tmp_path / "data" / "masks" / "p0_00.png").write_bytes(b"")
    assert run_command("index", [*study, "--check"]) == 65
    told = capsys.readouterr().out
    assert "p0_00: written over or gone since" in told and "is stale: 1 changes" in told
    assert run_command("index", study) == 0 and run_command("index", [*study, "--check"]) == 0


def test_lists_that_do_not_fit_are_told(study, tmp_path, capsys):
    (tmp_path / "lists" / "val.txt").write_text("p4_08\np4_9\n")
    assert run_command("index", study) == 65
    assert "val.txt:2: 'p4_9' is not in" in (told := capsys.readouterr().err) and "nearest is 'p4_09'" in told


def test_slices_and_volumes(tmp_path, monkeypatch, lab):
    monkeypatch.setenv("KNOWSAM_CACHE", str(tmp_path / "cache"))
    for name in ("data/slices/p1_slice_0.h5", "data/slices/p1_slice_1.h5", "data/p2.h5"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        with h5py.File(tmp_path / name, "w") as file:
            file["image"] = np.zeros((4, 4))
    for name, ids in {"train": "p1_slice_0\np1_slice_1\n", "labelled_50pct": "p1_slice_1\n", "test": "p2\n"}.items():
        (tmp_path / f"{name}.txt").write_text(ids)
    source = [f"data.source={{name: h5_slices, root: {tmp_path}}}", f"data.splits={tmp_path}"]
    assert run_command("index", [str(lab.experiment), *source]) == 0
    assert list(find_index(tmp_path, h5_places())) == ["p1_slice_0", "p1_slice_1", "p2"]
    assert run_command("index", [str(lab.experiment), *source, "--masks"]) == 78


def test_refusals(study, tmp_path, capsys, lab):
    assert run_command("index", [str(lab.experiment)]) == 78  # built-in data have no files
    assert run_command("index", [str(tmp_path / "none.yaml")]) == 66
    assert run_command("index", [str(tmp_path / "data"), "data.labelled=all"]) == 78
    assert run_command("index", [*study, "data.source.root=nowhere"]) == 66
    assert run_command("index", [*study, "--mask-dir", "truth"]) == 78
    assert run_command("index", [*study, "--group-regex", "("]) == 78
    assert run_command("index", [*study, "--group-regex", "x", "--groups", "y"]) == 78
    assert run_command("index", [*study, "--groups", "none.csv"]) == 66
    assert run_command("index", [*study, "--out", str(tmp_path / "data" / "images" / "p0_00.png" / "x")]) == 74
    assert "Traceback" not in capsys.readouterr().err


def test_tool():
    words = [sys.executable, str(ROOT / "tools" / "index.py"), "--help"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert "tools/index.py" in done.stdout and "exit codes" in done.stdout
