"""The page about runs, on hand-made run folders: what it says is what the files hold, and it stands alone."""

import csv
import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
from report_pages import Page, log, overlay, records_of, shown, training
from report_runs import scores, write_run

from knowsam.cli.main import run_command
from knowsam.config import parse_config
from knowsam.config.checking import default_settings
from knowsam.errors import ConfigError, NotFoundError, StorageError
from knowsam.metrics import METRIC_NAMES
from knowsam.report.folders import without_places
from knowsam.report.page.history import read_history
from knowsam.report.page.panels import Panel
from knowsam.report.page.pictures import Pictures
from knowsam.report.page.write import main_outputs, page, write_page

NASTY = "50% & <b>|`\"'$x_1$"
TWO = {"liver": scores(1), "tumour": scores(2) | {"c03": None}}


# ---------------------------------------------------------------- scores


def test_the_numbers_are_those_of_the_summary(tmp_path):
    run = write_run(tmp_path / "run", TWO, outputs={"sam": {"liver": scores(3), "tumour": scores(4)}})
    rows = shown(run).table("mean ± sd over cases")
    assert rows[0] == [
        *("output", "class", "cases", "Dice % ↑", "IoU % ↑", "HD95 px ↓", "ASD px ↓", "NSD % ↑"),
        *("missed", "false", "empty"),
    ]
    with open(run / "evaluation" / "test_summary.csv", newline="") as file:
        summary = list(csv.DictReader(file))
    assert len(summary) == len(rows) - 1 == 6
    for row, scored in zip(rows[1:], summary, strict=True):
        assert row[0] == scored["output"] and row[1] == scored["class"].replace("mean", "mean over classes")
        assert row[2] == (scored["n"] if scored["n"] == scored["cases"] else f"{scored['n']} of {scored['cases']}")
        for cell, metric in zip(row[3:8], ("dice", "iou", "hd95", "asd", "nsd"), strict=True):
            factor = 1.0 if metric in ("hd95", "asd") else 100.0
            mean, sd = (float(x) for x in cell.split(" ± "))
            assert mean == pytest.approx(factor * float(scored[f"{metric}_mean"]), abs=0.0051)
            assert sd == pytest.approx(factor * float(scored[f"{metric}_sd"]), abs=0.0051)
        assert row[8:] == [scored["missed"], scored["false_positive"], scored["empty_both"]]
    assert [row[2] for row in rows if row[1] == "tumour"] == ["11 of 12", "12"]


def test_the_rule_and_the_lowest_cases_are_there(tmp_path):
    dice = {"liver": scores(1), "tumour": scores(2)}
    run = write_run(tmp_path / "run", dice)
    page_ = shown(run)
    assert "missed or false structures count as Dice 0 and the image's diagonal; empty on both sides: left out" in (
        page_.text
    )
    assert "not over seeds" in page_.text
    rows = page_.table("lowest Dice")
    means = {case: (dice["liver"][case] + dice["tumour"][case]) / 2 for case in dice["liver"]}
    assert [row[0] for row in rows[1:]] == sorted(means, key=means.get)[:10]
    assert rows[1][3] == f"{100 * min(means.values()):.2f}"


def test_runs_beside_each_other(tmp_path):
    a = write_run(tmp_path / "a", TWO, seed=0)
    b = write_run(tmp_path / "b", TWO | {"liver": scores(9, lift=0.2)}, seed=1)
    page_ = shown(f"ours={a}", f"theirs={b}")
    for name in ("mean over 2 classes", "liver", "tumour"):
        rows = page_.table(f"{name} on test")
        assert [row[0] for row in rows] == ["run", "ours", "theirs"]
        for row, folder in zip(rows[1:], (a, b), strict=True):
            found = json.loads((folder / "evaluation" / "test.json").read_text())["summary"]["fusion"]
            values = found["mean" if name.startswith("mean") else name]["dice"]
            assert row[3] == f"{100 * values['mean']:.2f} ± {100 * values['sd']:.2f}"
    assert page_.table("settings in which the runs differ") == [
        ["key", "ours", "theirs"],
        ["train.seed", "0", "1"],
    ]
    assert "Nothing here is a test" in page_.text


def test_the_tables_beside_the_page(tmp_path):
    run = write_run(tmp_path / "run", scores(1))
    records = records_of(run)
    files = write_page(tmp_path / "out" / "x.html", records, main_outputs(records, None), Pictures())
    assert [file.name for file in files] == ["x.html", "x_tables.md", "x_tables.tex", "x_tables.csv"]
    text = {file.suffix: file.read_text() for file in files}
    page_ = Page(text[".html"])
    mean = page_.table("mean ± sd over cases")[1][3]
    assert f"| **{mean}** |" in text[".md"] and mean.replace("±", r"$\pm$") in text[".tex"]
    assert mean in page_.text.partition("Markdown")[2], "the page has the same table to copy"
    rows = list(csv.DictReader(text[".csv"].splitlines()))
    exact = np.mean(list(scores(1).values()))
    assert float(rows[0]["mean"]) == pytest.approx(exact, rel=1e-9) and rows[0]["metric"] == "dice"
    assert {row["metric"] for row in rows} == {*METRIC_NAMES, "image_sensitivity"} and rows[2]["unit"] == "px"


# ---------------------------------------------------------------- the page itself


def everything(tmp_path, name="run"):
    """A run with all that there can be, and its pictures."""
    run = training(write_run(tmp_path / name, TWO, outputs={"unet": {"liver": scores(3), "tumour": scores(4)}}))
    (run / "sam_weights.txt").write_text(f"SAM weights from {tmp_path}/w/sam_vit_b.pth\n  loaded as they are 171\n")
    (run / "overrides.txt").write_text(f"run={tmp_path}/run\ntrain.seed=0\n")
    (run / "git.diff").write_text("+a\n-b\n")
    environment = {"torch": "2.13.0", "device": "cpu", "world_size": "1", "git_commit": "a" * 40, "git_dirty": "yes"}
    (run / "environment.json").write_text(json.dumps(environment))
    overlays = {(name, "c00"): overlay(classes=2), (name, "c01"): overlay(1, 2, "slice 3 of 9")}
    return run, Pictures([Panel(name, "c00", "best"), Panel(name, "c01", "worst")], overlays)


def test_nothing_is_fetched(tmp_path):
    run, pictures = everything(tmp_path)
    records = records_of(run)
    text = page(records, main_outputs(records, None), pictures)
    page_ = Page(text)
    assert page_.asked == []
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)", re.sub(r"data:image/png;base64,[\w+/=]+", "", text))
    assert len(page_.ids) == len(set(page_.ids)) and set(page_.targets) <= set(page_.ids)
    for reference in set(re.findall(r"url\(#([^\")]+)", text)):
        assert reference in page_.ids
    assert text.count('role="img"') == text.count("<svg ") and text.count("<svg ") > 12
    assert text.count("data:image/png;base64,") == 2
    assert {f"#{name}" for name in ("scores", "distributions", "cases", "curves", "pseudo", "cost")} <= {
        f"#{name}" for name in page_.ids
    }


def test_names_are_only_text(tmp_path):
    run = write_run(tmp_path / "run", {NASTY: scores(1), "x": scores(2)}, outputs={NASTY: {NASTY: scores(3), "x": {}}})
    overlays = {(NASTY, NASTY): overlay(classes=2)}
    text = page(
        records_of(f"{NASTY}={run}"),
        {NASTY: "fusion"},
        Pictures([Panel(NASTY, NASTY, "best")], overlays),
    )
    assert "<b>" not in text and NASTY in Page(text).text


def test_equal_runs_give_equal_bytes_and_name_no_folder(tmp_path):
    run, pictures = everything(tmp_path)
    shutil.copytree(tmp_path, tmp_path.parent / f"{tmp_path.name}-copy" / "deep")
    other = tmp_path.parent / f"{tmp_path.name}-copy" / "deep" / "run"
    (other / "overrides.txt").write_text(f"run={other}\ntrain.seed=0\n")
    written = []
    for folder, name in ((run, "a"), (other, "b")):
        records = records_of(folder)
        files = write_page(tmp_path / name / "x.html", records, main_outputs(records, None), pictures)
        written.append([file.read_bytes() for file in files])
    assert written[0] == written[1]
    assert not any(str(tmp_path).encode() in data for data in written[0])
    assert "SAM weights from …/sam_vit_b.pth" in written[0][0].decode()


@pytest.mark.parametrize(
    ("text", "without"),
    [
        ("/data/a/b.pth", "…/b.pth"),
        ("no /home/me/x y", "no …/x y"),
        ("a/b/c", "a/b/c"),
        ("1/2", "1/2"),
        ("https://x.org/a/b", "https://x.org/a/b"),
        (["/a/b", 3], ["…/b", 3]),
        (None, None),
    ],
)
def test_places_of_this_machine_are_left_out(text, without):
    assert without_places(text) == without


# ---------------------------------------------------------------- curves, cost, settings


def test_curves_cost_and_environment(tmp_path):
    run, _ = everything(tmp_path)
    page_ = shown(run)
    for caption in ("Validation Dice", "Loss term seg", "Loss term skd", "Learning rate", "Training images a second"):
        assert caption in page_.text
    assert "SAM's confidence on unlabelled training images" in page_.text
    assert "not everything that is shown as a loss term" not in page_.text
    head, row = page_.table("time (h:mm:ss)")
    cells = dict(zip(head, row, strict=True))
    assert cells["in all"] == "1:02:05" and cells["steps"] == "1:00:00" and cells["validation"] == "0:01:00"
    assert (
        cells["images/s (median)"] == "13.5" and cells["memory MiB"] == "2048" and cells["device memory MiB"] == "4097"
    )
    assert page_.table("at a glance")[1][-2:] == ["75.00 at 400", "1:02:05"]
    assert ["git_commit", "a" * 12] in page_.table("environment of the training")
    assert "kept in git.diff, 2 lines" in page_.text and "train.seed=0" in page_.text


@pytest.mark.parametrize("runs", [1, 2])
def test_what_the_loop_records_is_no_loss_term(tmp_path, runs):
    # Names as engine.train and engine.watch give them.
    values = {"lr_sam": 0.1, "grad_norm_sam": 2.0, "param_norm_sam": 9.0, "top_class_unet": 0.8, "top_class_truth": 0.9}
    found = [write_run(tmp_path / name, scores(1)) for name in "ab"[:runs]]
    for run in found:
        log(run, {"step": 1, "kind": "train", "loss": 0.25, "seg_unet": 0.25, "error_unet": 0.2, **values})
    text = shown(*found).text
    assert "Loss term seg" in text and text.count("Loss term") == 1
    assert "not everything that is shown as a loss term" not in text
    of = (": sam", ": unet", ": truth") if runs == 2 else ("", "", "")
    assert "Norm of the trained weights" + of[0] in text and "Labelled training pixels that are wrong" + of[1] in text
    assert "(truth: in the labelled masks)" + of[2] in text


def test_a_value_that_is_no_loss_term_is_noticed(tmp_path):
    run = write_run(tmp_path / "run", scores(1))
    log(run, {"step": 1, "kind": "train", "loss": 1.0, "seg_a": 0.25, "temperature": 9.0})
    assert "not everything that is shown as a loss term is part of the sum" in shown(run).text


def test_settings_against_the_defaults(tmp_path):
    run, _ = everything(tmp_path)
    (record,) = records_of(run)
    assert record.defaults["train.max_steps"] == 1000 and record.defaults["method.mix.grid"] == 4
    records = [replace(record, defaults={"train.max_steps": 1000, "method.mix.grid": 4})]
    page_ = Page(page(records, main_outputs(records, None), Pictures()))
    changed = {row[0]: row[1:] for row in page_.table("settings other than the defaults")}
    assert changed["train.max_steps"] == ["600", "1000"]
    all_of_them = {row[0]: row[1] for row in page_.table("all settings")[1:]}
    assert all_of_them["method.mix.grid"] == "(4)" and all_of_them["train.max_steps"] == "600"
    assert "run" not in all_of_them and "data.obtain" not in all_of_them


def test_a_method_that_is_not_installed_here_has_no_defaults(tmp_path):
    run = write_run(tmp_path / "run", scores(1))
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("  name: knowsam", "  name: my_lab.code:Mine"))
    assert records_of(run)[0].defaults == {}
    changed = [row[0] for row in shown(run).table("settings other than the defaults")]
    assert "method.name" in changed and "train.max_steps" in changed


def test_defaults_are_those_of_the_chosen_components():
    config = parse_config(
        "optim: {subnets: {name: adamw, lr: 0.5}}\nsam: {encoder: {name: vit_tiny}, tuning: {name: adapter}}", "x"
    )
    found = default_settings(config)
    # Stochastic gradient descent is the default optimizer: its momentum is no default of another one.
    assert found["optim.subnets.name"] == "sgd" and "optim.subnets.momentum" not in found
    assert found["optim.subnets.lr"] != 0.5 and found["optim.sam.lr"] == 1e-4
    assert found["train.max_steps"] == 1000 and found["sam.tuning.ratio"] == 0.25
    assert (found["sam.encoder.name"], found["sam.prompt.name"]) == (
        "vit_b",
        "learned",
    ) and "sam.tuning.name" not in found
    assert found["sam.encoder.out_channels"] == 64, "of vit_tiny, which was chosen"
    assert found["method.mix.start"] == 0.24 and found["method.mix.grid"] == 4 and found["method.skd.temperature"] == 10
    assert "method.mix" not in found and "method.students" not in found and "skd.weight" not in found


def test_what_is_off_has_no_defaults():
    found = default_settings(parse_config("method: {mix: null}", "x"))
    assert "method.skd.weight" in found and not any(key.startswith("method.mix") for key in found)
    without = default_settings(parse_config("method: {name: supervised}", "x"))
    assert "students.unet.channels" in without and not any(
        key.startswith(("sam", "skd.", "fusion.")) for key in without
    )
    assert "sam.encoder.name" in default_settings(parse_config("method: {name: supervised}\nskd: {}", "x"))


def test_split_lists(tmp_path):
    hashes = {"sha256": {"train.txt": "ab" * 32, "test.txt": "cd" * 32}}
    rows = shown(write_run(tmp_path / "run", scores(1), splits=hashes)).table("data and split lists")
    assert ["sha256 of train.txt", "abababababab"] in rows and ["labelled of them", "16"] in rows


def test_lines_of_a_log():
    history = read_history(
        [
            {"step": 1, "kind": "train", "loss": 1.0, "seg": None, "note": "text", "on": True},
            {"step": 2, "kind": "train", "loss": 0.5, "seg": 0.25},
            {"step": 2, "kind": "val", "dice_fusion": None},
            {"step": 3, "kind": "val", "dice_fusion": 0.5, "hd95": 3.0},
            {"step": 4, "kind": "val", "dice_fusion": 0.5},
            {"step": 4, "kind": "of another version"},
        ]
    )
    assert list(history.train) == ["loss", "seg"] and history.train["loss"].steps == [1, 2]
    assert history.train["seg"].finite == [0.25] and list(history.dice) == ["fusion"]
    assert history.best == (3, 0.5), "the first of equal ones chose the checkpoint"
    assert history.not_finite == 2 and history.cost == {}


# ---------------------------------------------------------------- names and refusals


def test_names(tmp_path):
    a = write_run(tmp_path / "x" / "run", scores(1))
    b = write_run(tmp_path / "y" / "run", scores(1))
    c = write_run(tmp_path / "c", scores(1), config="method.name=supervised", seed=4)
    assert [r.name for r in records_of(a)] == ["run"] and [r.name for r in records_of(f"mine={a}")] == ["mine"]
    assert [r.name for r in records_of(a, b)] == ["run (x/run)", "run (y/run)"]
    assert [r.name for r in records_of(a, c)] == ["run", "c"]
    d = write_run(tmp_path / "x" / "d", scores(1), seed=4)
    assert [r.name for r in records_of(f"mine={tmp_path}/x/*", f"other={c}")] == [
        "mine, seed 4",
        "mine, seed 0",
        "other",
    ]
    assert [r.name for r in records_of(f"m={a}", f"m={b}", d)] == ["m, seed 0 (x/run)", "m, seed 0 (y/run)", "d"]
    with pytest.raises(ConfigError, match="named twice"):
        records_of(a, f"again={a}")
    with pytest.raises(NotFoundError, match="there is no folder"):
        records_of(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--output", "teacher"), 78, "no scores of output 'teacher': 'run' has fusion"),
        (("-o", "."), 78, "is a folder"),
        (("-o", "page.pdf"), 78, "does not end in .html"),
        (("--cases", "few"), 2, "whole number of at least 0, got 'few'"),
        (("--pseudo-cases", "0"), 2, "at least 1"),
        (("--split", "train"), 2, "invalid choice"),
    ],
)
def test_mistakes(tmp_path, capsys, monkeypatch, options, code, message):
    run = write_run(tmp_path / "run", scores(1))
    monkeypatch.chdir(tmp_path)
    assert run_command("report", [str(run), *options]) == code
    text = capsys.readouterr()
    assert message in text.err and text.out == "" and not (run / "report.html").exists()


def test_damaged_scores_are_refused_and_the_old_page_stays(tmp_path, capsys):
    run = write_run(tmp_path / "run", scores(1))
    assert run_command("report", [str(run), "--cases", "0"]) == 0
    before = (run / "report.html").read_bytes()
    (run / "evaluation" / "test.json").write_text("{")
    assert run_command("report", [str(run), "--cases", "0"]) == 65
    assert "cannot read scores" in capsys.readouterr().err and (run / "report.html").read_bytes() == before


def test_a_folder_that_cannot_be_made(tmp_path):
    records = records_of(write_run(tmp_path / "run", scores(1)))
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot make"):
        write_page(tmp_path / "file" / "x.html", records, main_outputs(records, None), Pictures())


def test_without_checkpoint_the_page_says_so(tmp_path, capsys):
    run = write_run(tmp_path / "run", scores(1))
    assert run_command("report", [str(run), "--pseudo-labels", "-o", str(tmp_path / "x.html")]) == 0
    text = Page((tmp_path / "x.html").read_text()).text
    assert "No pictures. …/run has no best.pt yet." in text
    assert "Not measured. the run has neither best.pt nor last.pt." in text
    assert "no pictures" in capsys.readouterr().err
