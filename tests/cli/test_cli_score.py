"""Post-processing, subgroups, ensembles, other data and masks of another tool, as a user types it."""

import csv
import json

import numpy as np
import pytest
import yaml
from PIL import Image

from knowsam import build
from knowsam.cli.main import run_command
from knowsam.config import load_config


def run(*words):
    return run_command(words[0], [str(word) for word in words[1:]])


def evaluate(*words):
    return run("evaluate", *words, "--device", "cpu")


def scores_of(folder, stem="test"):
    return json.loads((folder / "evaluation" / f"{stem}.json").read_text())


@pytest.fixture(scope="module")
def folds(lab, tmp_path_factory):
    """Two supervised runs that differ in their seed."""
    top = tmp_path_factory.mktemp("folds")
    for seed in (0, 1):
        words = ("train.max_steps=2", "method.name=supervised", "data.unlabelled_batch=0", f"train.seed={seed}")
        assert lab.train(top / f"fold_{seed}", *words) == 0
    return [top / "fold_0", top / "fold_1"]


# ---------------------------------------------------------------- post-processing


def test_auto_is_chosen_on_validation_once_and_kept(folds, capsys):
    fold = folds[0]
    assert evaluate(fold, "--postprocess", "auto") == 0
    assert "(chosen on 2 val cases: Dice" in capsys.readouterr().out
    kept = json.loads((fold / "postprocess.json").read_text())
    assert kept["split"] == "val" and kept["checkpoint"] == {"file": "best.pt", "step": 2}
    tried = kept["outputs"]["fusion"]["tried"]
    assert tried[0]["spec"] is None and kept["outputs"]["fusion"]["dice"] == max(item["dice"] for item in tried)
    applied = scores_of(fold)["postprocess"]
    assert applied == {"asked": "auto", "applied": {name: kept["outputs"][name]["spec"] for name in applied["applied"]}}
    # What is kept decides the next time: nothing is tried again.
    for about in kept["outputs"].values():
        about["spec"] = {"name": "fill_holes"}
    (fold / "postprocess.json").write_text(json.dumps(kept))
    assert evaluate(fold, "--postprocess", "auto") == 0
    assert "post-processing of fusion: holes filled" in capsys.readouterr().out
    # Other weights choose for themselves.
    assert evaluate(fold, "--postprocess", "auto", "--checkpoint", "last") == 0
    assert json.loads((fold / "postprocess.json").read_text())["checkpoint"]["file"] == "last.pt"


def test_a_step_by_name_and_none(folds, capsys):
    plain, other = folds[1], {"name": "remove_small", "size": 10_000}
    assert evaluate(plain) == 0 and "postprocess" not in scores_of(plain)
    assert evaluate(plain, "--postprocess", "largest") == 0
    assert scores_of(plain)["postprocess"]["asked"] == {"name": "largest"}
    assert evaluate(plain, "--postprocess", "{name: remove_small, size: 10000}") == 0
    assert scores_of(plain)["postprocess"]["asked"] == other
    assert scores_of(plain)["summary"]["fusion"]["lesion"]["false_positive"] == 0, "nothing is as large"
    assert scores_of(plain)["summary"]["fusion"]["lesion"]["ok"] == 0
    assert evaluate(plain, "--postprocess", "none") == 0 and "postprocess" not in scores_of(plain)
    capsys.readouterr()
    assert evaluate(plain, "--postprocess", "{name: bigest}") == 2
    assert "no step 'bigest'; there are largest, remove_small, fill_holes" in capsys.readouterr().err


def test_the_experiment_says_what_is_done(lab, tmp_path, capsys):
    words = (
        "train.max_steps=1",
        "method.name=supervised",
        "data.unlabelled_batch=0",
        "evaluate.postprocess={name: largest}",
    )
    assert lab.train(tmp_path / "run", *words, "--evaluate") == 0
    assert scores_of(tmp_path / "run")["postprocess"]["asked"] == {"name": "largest"}
    capsys.readouterr()
    assert lab.train(tmp_path / "run", *words, "--evaluate") == 0
    assert "is scored already" in capsys.readouterr().out
    assert lab.train(tmp_path / "run", *words[:3], "--evaluate") == 0, "a change of it changes no weight"
    assert "postprocess" not in scores_of(tmp_path / "run")
    assert lab.train(tmp_path / "no", "evaluate.postprocess={name: largest, size: 3}") == 78
    assert "evaluate.postprocess" in capsys.readouterr().err and not (tmp_path / "no").exists()


# ---------------------------------------------------------------- subgroups, ensembles, other data


def test_subgroups_of_a_table(folds, tmp_path, capsys):
    (tmp_path / "sites.csv").write_text("id,site\ntest_0000,Oslo\ntest_0001,Bergen\n")
    assert evaluate(folds[0], "--by", f"{tmp_path}/sites.csv:site") == 0
    assert "by site" in capsys.readouterr().out
    record = scores_of(folds[0])["subgroups"]
    assert list(record["groups"]) == ["Bergen", "Oslo"] and record["without"] == 0
    with open(folds[0] / "evaluation" / "test_cases.csv", newline="") as file:
        assert {row["case"]: row["group"] for row in csv.DictReader(file)} == {
            "test_0000": "Oslo",
            "test_0001": "Bergen",
        }
    assert evaluate(folds[0], "--by", "site") == 66
    assert "Allowed: folder, domain, FILE.csv:COLUMN" in capsys.readouterr().err


def test_folds_are_scored_as_one(folds, tmp_path, capsys):
    out = folds[0].parent / "ensemble_of_2"
    assert evaluate(*folds) == 0 and evaluate(*folds, "--ensemble") == 0
    scores = scores_of(out)
    assert scores["checkpoint"]["runs"] == ["fold_0", "fold_1"] and scores["outputs"] == scores_of(folds[0])["outputs"]
    capsys.readouterr()
    assert run("compare", *folds, out, "-o", tmp_path / "cmp") == 0
    assert "supervised, ensemble of 2" in capsys.readouterr().out
    assert run("report", out, "--cases", "1", "-o", tmp_path / "page.html") == 0
    assert "mean of the probabilities of 2 runs" in (tmp_path / "page.html").read_text()
    assert "no one checkpoint" in (tmp_path / "page.html").read_text()


def test_an_ensemble_of_one_run_twice_is_that_run(folds, tmp_path):
    import shutil

    twin = shutil.copytree(folds[0], tmp_path / "twin")
    assert evaluate(folds[0]) == 0 and evaluate(folds[0], twin, "--ensemble", "-o", tmp_path / "both") == 0
    assert scores_of(tmp_path / "both")["summary"] == scores_of(folds[0])["summary"]


def test_mistakes_of_ensembles(lab, folds, tmp_path, capsys):
    assert evaluate(folds[0], "--ensemble") == 78
    assert "an ensemble needs at least two" in capsys.readouterr().err
    assert evaluate(*folds, "-o", tmp_path / "x") == 78
    assert "-o goes with --ensemble" in capsys.readouterr().err
    assert evaluate(*folds, "--ensemble", "-o", folds[1]) == 73
    assert "holds a training" in capsys.readouterr().err
    small = ("train.max_steps=1", "method.name=supervised", "data.unlabelled_batch=0", "data.image_size=32")
    assert lab.train(tmp_path / "small", *small) == 0
    assert evaluate(folds[0], tmp_path / "small", "--ensemble") == 78
    assert "the runs are no ensemble: data.image_size is 64" in capsys.readouterr().err


def test_scores_on_other_data_stand_in_compare_and_report(folds, tmp_path, capsys):
    other = tmp_path / "other.yaml"
    other.write_text("name: abroad\ndata: {source: {name: builtin, seed: 9, train: 4, val: 1, test: 3, size: 80}}\n")
    assert evaluate(*folds, "--data", other) == 0
    assert "abroad test: 3 cases" in capsys.readouterr().out
    assert scores_of(folds[0], "abroad_test")["dataset"] == "abroad"
    assert evaluate(*folds) == 0
    assert run("compare", *folds, "-o", tmp_path / "cmp") == 0
    assert ", on abroad:" in capsys.readouterr().out
    assert run("compare", *folds, "--data", "own") == 0
    assert "abroad" not in capsys.readouterr().out
    assert run("compare", *folds, "--data", "nowhere") == 66
    assert run("report", folds[0], "--cases", "0", "-o", tmp_path / "page.html") == 0
    assert "fold_0 on abroad" in (tmp_path / "page.html").read_text()


# ---------------------------------------------------------------- masks of another tool


@pytest.fixture
def study(lab, tmp_path):
    """The tiny experiment, and a folder of masks: the truth, moved down by three rows."""
    source = build.build_source(load_config(lab.experiment))
    folder = tmp_path / "nnunet"
    folder.mkdir()
    for case in source.eval_ids("test"):
        Image.fromarray(np.roll(source.mask(case), 3, axis=0)).save(folder / f"{case}.png")
    return lab.experiment, folder, source


def test_masks_are_scored_by_the_same_rules(study, tmp_path, capsys, monkeypatch):
    from knowsam.metrics import case_metrics

    monkeypatch.chdir(tmp_path)
    experiment, folder, source = study
    assert run("score", folder, "--experiment", experiment) == 0
    scores = scores_of(tmp_path / "runs" / "tiny" / "nnunet")
    expected = []
    for case in source.eval_ids("test"):
        truth = source.mask(case)
        expected += case_metrics(np.roll(truth, 3, axis=0), truth, num_classes=2)
    kept = [record.dice for record in expected if record.status != "empty_both"]
    assert scores["summary"]["nnunet"]["lesion"]["dice"]["mean"] == pytest.approx(np.mean(kept))
    assert scores["outputs"] == ["nnunet"] and scores["checkpoint"]["kind"] == "masks"


def test_masks_are_compared_with_runs(study, folds, tmp_path, capsys):
    experiment, folder, _ = study
    out = tmp_path / "scored"
    assert run("score", folder, "--experiment", experiment, "--name", "nnU-Net", "-o", out) == 0
    assert evaluate(*folds) == 0
    capsys.readouterr()
    assert run("compare", *folds, out, "-o", tmp_path / "cmp") == 0
    text = capsys.readouterr().out
    assert "nnU-Net" in text and "Masks of another tool, scored as they are: 'nnU-Net'." in " ".join(text.split())
    assert run("report", folds[0], out, "--cases", "0", "-o", tmp_path / "page.html") == 0
    page = (tmp_path / "page.html").read_text()
    assert "nnU-Net" in page and "masks of another tool, scored as they are" in page and ">0 of 4<" not in page
    assert yaml.safe_load((out / "config.yaml").read_text())["method"] == {"name": "nnU-Net"}
    assert run("score", folder, "--experiment", experiment, "-o", out) == 0, "scores of this kind are replaced"
    assert run("score", folder, "--experiment", experiment, "-o", folds[0]) == 73


def test_mistakes_of_score(study, tmp_path, capsys):
    experiment, folder, source = study
    first, second = source.eval_ids("test")
    (folder / f"{second}.png").rename(folder / f"{second}_pred.png")
    assert run("score", folder, "--experiment", experiment, "-o", tmp_path / "o") == 65
    text = capsys.readouterr().err
    assert f"1 of 2 test cases have no mask in {folder}: {second}" in text and "--suffix" in text
    (folder / f"{first}.png").rename(folder / f"{first}_pred.png")
    assert run("score", folder, "--experiment", experiment, "-o", tmp_path / "o", "--suffix", "_pred") == 0
    Image.fromarray(np.full((9, 9), 1, np.uint8)).save(folder / f"{first}_pred.png")
    assert run("score", folder, "--experiment", experiment, "-o", tmp_path / "o", "--suffix", "_pred") == 65
    assert "is (9, 9), the mask of case" in capsys.readouterr().err
    Image.fromarray(np.full_like(source.mask(first), 7)).save(folder / f"{first}_pred.png")
    assert run("score", folder, "--experiment", experiment, "-o", tmp_path / "o", "--suffix", "_pred") == 65
    assert "mask values 7" in (text := capsys.readouterr().err) and "--values ids" in text
    assert run("score", tmp_path / "nowhere", "--experiment", experiment) == 66
