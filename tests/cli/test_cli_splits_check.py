"""The commands ``splits`` and ``check``, and what ``train`` does of the latter."""

import csv
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
from knowsam.data.splits import independent_units, load_splits
from knowsam.sweep.spec import load_sweep

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


def lines(path):
    return path.read_text().split()


def test_label_draws_leave_train_val_and_test_alone(data, capsys):
    table = ["--groups", str(data.parent / "who.csv"), "--id-column", "file", "--group-column", "who"]
    assert splits(data, *table, "--labelled", "30", "--test", "20", "--val", "20") == 0
    folder = data.parent / "lists"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    capsys.readouterr()
    assert splits(data, "--label-seed", "0..2", "5") == 0
    told = capsys.readouterr().out
    assert "4 lists written" in told and "data.labelled=labelled_30pct_draw0" in told and "with class 1" in told
    drawn = {n: lines(folder / f"labelled_30pct_draw{n}.txt") for n in (0, 1, 2, 5)}
    who = dict(line.split(",") for line in lines(folder / "groups.csv")[1:])
    for ids in drawn.values():  # whole patients, as groups.csv beside the lists has them
        assert set(ids) == {i for i in lines(folder / "train.txt") if who[i] in {who[j] for j in ids}}
    assert len(set(map(tuple, drawn.values()))) > 1
    loaded = load_splits(folder, "labelled_30pct_draw1")
    assert list(loaded.labelled) == drawn[1] and set(loaded.unlabelled) == set(loaded.train) - set(drawn[1])
    assert {name: (folder / name).read_bytes() for name in before} == before
    # again: nothing to do; another list of a name: refused, unless forced
    assert splits(data, "--label-seed", "1") == 0 and "0 lists written" in capsys.readouterr().out
    (folder / "labelled_30pct_draw1.txt").write_text(drawn[1][0] + "\n")
    assert splits(data, "--label-seed", "1") == 73
    assert splits(data, "--label-seed", "1", "--force") == 0
    assert lines(folder / "labelled_30pct_draw1.txt") == drawn[1]


def test_label_draws_from_lists_alone(data, capsys, tmp_path):
    folder = tmp_path / "slices"
    folder.mkdir()
    ids = [f"p{n}_slice_{k}" for n in range(8) for k in range(5)]
    (folder / "train.txt").write_text("".join(f"{i}\n" for i in ids))
    (folder / "labelled_2cases.txt").write_text("".join(f"{i}\n" for i in ids[:10]))  # says patients, not slices
    words = ["--out", str(folder), "--label-seed", "0", "1"]
    assert run_command("splits", words) == 78
    assert "no label list whose name says its size truly" in capsys.readouterr().err
    assert run_command("splits", [*words, "--labelled", "2groups", "--group-regex", "^(p[0-9])"]) == 0
    seen = capsys.readouterr()
    assert "not stratified" in seen.out + seen.err
    for n in (0, 1):
        drawn = lines(folder / f"labelled_2groups_draw{n}.txt")
        assert len(drawn) == 10 and len({i[:2] for i in drawn}) == 2
    assert run_command("splits", [*words, "--labelled", "2groups", "--group-regex", "^(q[0-9])"]) == 65
    # lists whose names are true need not be named
    (folder / "labelled_2groups.txt").write_text("".join(f"{i}\n" for i in ids[:10]))
    assert run_command("splits", ["--out", str(folder), "--label-seed", "2", "--group-regex", "^(p[0-9])"]) == 0
    assert len(lines(folder / "labelled_2groups_draw2.txt")) == 10
    assert not (folder / "labelled_2cases_draw2.txt").exists()


def test_folds_are_folders_of_lists(data, capsys):
    table = ["--groups", str(data.parent / "who.csv"), "--id-column", "file", "--group-column", "who"]
    out = data.parent / "lists"
    assert splits(data, *table, "--folds", "4", "--val", "15", "--labelled", "30") == 0
    assert "4 folds in" in capsys.readouterr().out
    tests = []
    for n in range(4):
        loaded = load_splits(out / f"fold{n}", "labelled_30pct")  # groups.csv is checked, too
        assert loaded.train and loaded.val and loaded.labelled
        tests += loaded.test
    assert sorted(tests) == [f"case_{n:02d}" for n in range(16)]
    assert splits(data, *table, "--folds", "4", "--val", "15", "--labelled", "30") == 0
    assert "nothing was written" in capsys.readouterr().out
    before = {path: path.read_bytes() for path in out.rglob("*.txt")}
    assert splits(data, *table, "--folds", "4", "--seed", "1") == 73
    assert splits(data, *table, "--folds", "3") == 73 and "fold3" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in out.rglob("*.txt")} == before
    assert splits(data, *table, "--folds", "4", "--seed", "1", "--force") == 0


def test_folds_over_a_fixed_test_list(data):
    assert splits(data, "--test", "25") == 0
    fixed = data.parent / "lists"
    test = lines(fixed / "test.txt")
    words = ["--images", str(data), "--out", str(data.parent / "folds"), "--folds", "3", "--fixed-test", str(fixed)]
    assert run_command("splits", words) == 0
    vals = []
    for n in range(3):
        loaded = load_splits(data.parent / "folds" / f"fold{n}", "all")
        assert list(loaded.test) == test
        vals += loaded.val
    assert sorted(vals) == sorted({f"case_{n:02d}" for n in range(16)} - set(test))


def test_near_duplicates_inside_the_test_list_are_written(data, capsys):
    assert splits(data, "--test", "40") == 0
    folder = data.parent / "lists"
    assert not (folder / "near_duplicates.csv").exists()
    assert splits(data, "--mark-duplicates") == 0 and "no near duplicates" in capsys.readouterr().out
    one, other, *_ = lines(folder / "test.txt")
    image = np.asarray(Image.open(data / "images" / f"{one}.png")).astype(int)
    Image.fromarray(np.clip(image + 4, 0, 255).astype(np.uint8)).save(data / "images" / f"{other}.png")
    assert splits(data, "--mark-duplicates") == 0
    told = capsys.readouterr().out
    assert "test: 1 sets of pictures" in told and f"{one} ~ {other}" in told
    units = independent_units(folder, lines(folder / "test.txt"))
    assert units[one] == units[other] == one
    # a drawing writes them by itself
    words = ["--images", str(data), "--test", "60", "--val", "10", "--out"]
    found = []
    for seed in range(6):
        out = data.parent / f"other{seed}"
        assert run_command("splits", [*words, str(out), "--seed", str(seed)]) == 0
        inside = [name for name in ("val", "test") if {one, other} <= set(lines(out / f"{name}.txt"))]
        assert (out / "near_duplicates.csv").exists() == bool(inside)
        found += inside
    assert found


@pytest.mark.parametrize(
    "words",
    [
        ["--label-seed", "0", "--folds", "3"],
        ["--label-seed", "-1"],
        ["--label-seed", "3..1"],
        ["--label-seed", "one"],
        ["--label-seed", "0", "--test", "30"],
        ["--folds", "3", "--test", "30"],
        ["--folds", "1"],
        ["--fixed-test", "lists"],
        ["--folds", "3", "--fixed-test", "lists", "--val", "5"],
    ],
)
def test_what_cannot_be_meant_of_draws_and_folds(data, words, capsys):
    try:
        code = splits(data, *words)
    except SystemExit as stop:
        code = stop.code
    assert code in (2, 78) and "Traceback" not in capsys.readouterr().err
    assert not (data.parent / "lists").exists()


def test_images_are_needed_but_for_label_draws(tmp_path, capsys):
    assert run_command("splits", ["--out", str(tmp_path)]) == 78
    assert "--images is needed" in capsys.readouterr().err
    assert run_command("splits", ["--out", str(tmp_path / "none"), "--label-seed", "0"]) == 66


def test_a_label_draw_goes_with_the_seed(experiment, data, tmp_path, lab, capsys):
    """One setting, as seeds are: each run trains on the draw of its seed, and they stand in one row."""
    assert splits(data, "--label-seed", "1", "2") == 0
    short = ["train.max_steps=2", "train.validate_every=2", "train.checkpoint_every=2", "data.labelled_batch=1"]
    words = [*experiment[1:], *short, "data.labelled=labelled_30pct_draw{seed}"]
    for seed in (1, 2):
        assert lab.train(tmp_path / f"run{seed}", *words, f"train.seed={seed}", "--evaluate") == 0
        used = json.loads((tmp_path / f"run{seed}" / "splits.json").read_text())
        assert used["labelled"] == lines(data.parent / "lists" / f"labelled_30pct_draw{seed}.txt")
        assert f"labelled_30pct_draw{seed}.txt" in used["sha256"]
    capsys.readouterr()
    assert run_command("compare", [str(tmp_path / "run1"), str(tmp_path / "run2"), "-o", str(tmp_path / "out")]) == 0
    with open(tmp_path / "out" / "comparison.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len({row["setting"] for row in rows}) == 1 and {row["seeds"] for row in rows} == {"1 2"}
    assert lab.train(tmp_path / "run3", *words, "train.seed=3") == 66
    assert "there are labelled_30pct, labelled_30pct_draw1, labelled_30pct_draw2" in capsys.readouterr().err


def test_a_sweep_over_draws_and_folds(experiment, data, tmp_path, lab):
    assert splits(data, "--label-seed", "0..2") == 0
    base = tmp_path / "base.yaml"
    base.write_text(
        lab.experiment.read_text().replace("source: {name: builtin, train: 12, val: 2, test: 2, size: 64}",
        f"source: {{name: image_folder, root: {data}}}\n  splits: {data.parent / 'lists'}")
    )  # fmt: skip
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text(
        f"base: {base}\nseeds: [0, 1, 2]\n"
        "grid: {data.labelled: {30 %: 'labelled_30pct_draw{seed}', all: labelled_max}}\nbaseline: 30 %\n"
    )
    trials = [trial for trial in load_sweep(sweep).trials if trial.setting == "30 %"]
    assert [trial.seed for trial in trials] == [0, 1, 2] and len({trial.key for trial in trials}) == 3
    keys = [trial.key for trial in trials]
    # the key is of the lists that are used: another draw is another experiment, and only that
    (data.parent / "lists" / "labelled_30pct_draw1.txt").write_text("case_00\n")
    again = [trial.key for trial in load_sweep(sweep).trials if trial.setting == "30 %"]
    assert [a == b for a, b in zip(keys, again, strict=True)] == [True, False, True]
    words = ["--images", str(data), "--out", str(tmp_path / "folds"), "--folds", "3", "--labelled", "30"]
    assert run_command("splits", words) == 0
    sweep.write_text(
        f"base: {base}\nseeds: [0, 1, 2]\n"
        f"overrides: {{data.splits: '{tmp_path}/folds/fold{{seed}}', data.labelled: labelled_30pct}}\n"
    )
    found = load_sweep(sweep).trials
    assert len({trial.setting for trial in found}) == 1 and len({trial.key for trial in found}) == 3
