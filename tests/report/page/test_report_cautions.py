"""What could mislead the reader of a page is said on it, once, and of the right runs; a good run has no warnings."""

from dataclasses import replace

import pytest
from report_pages import log, overlay, records_of, shown, training
from report_runs import LAST, scores, write_run

from knowsam.errors import DataError
from knowsam.report.page.cautions import cautions, changed_predictions
from knowsam.report.page.panels import plan_panels
from knowsam.report.page.pictures import Pictures
from knowsam.report.page.record import scored_runs
from knowsam.report.page.write import main_outputs, write_page


def warnings(*arguments, split="test"):
    records = records_of(*arguments, split=split)
    return "\n".join(cautions(records, main_outputs(records, None)))


def test_a_good_run_has_no_warnings(tmp_path):
    run = training(write_run(tmp_path / "run", scores(1), config="method.name=mean_teacher sam.weights=x.pth"))
    assert warnings(run) == "" and "Before you read on" not in shown(run).text


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"checkpoint": LAST}, "The scores are of the last step's weights (last.pt, step 600), which no validation"),
        ({"checkpoint": None}, "The scores do not say which weights they are of"),
        ({"split": "val"}, "These are scores on val, which also chose the weights: they are too good."),
        ({"state": "interrupted"}, "Not finished: interrupted at step 600 of 600."),
        ({"state": "failed", "code": 79}, "Not finished: failed at step 600 of 600 (said on the console)."),
        ({"config": "sam.tuning.name=adapter published_code=true"}, "behaves as the published code in every row"),
    ],
)
def test_warnings(tmp_path, changes, sentence):
    run = training(write_run(tmp_path / "run", scores(1), **changes))
    assert sentence in warnings(run, split=changes.get("split", "test"))


def test_more_warnings(tmp_path):
    run = training(write_run(tmp_path / "run", scores(1)), best=600)
    assert "Before you read on" in shown(run).text
    text = warnings(run)
    assert "scores are of step 400, but the best validation Dice is now that of step 600" in text
    assert "best validation Dice is that of the last validation" in text
    assert "SAM started from random weights" in text
    log(run, {"step": 1, "kind": "train", "loss": None, "seg": 1.0})
    assert "1 logged value was not finite" in warnings(run)
    (run / "metrics.jsonl").unlink()
    assert "Nothing was logged, so there are no curves." in warnings(run)


def test_a_run_that_is_not_scored_has_curves_all_the_same(tmp_path):
    run = training(write_run(tmp_path / "run", None, state="running"))
    page_ = shown(run)
    assert "No scores on test. Score it: knowsam evaluate run" in page_.text and "Validation Dice" in page_.text
    assert "scores" not in page_.ids and page_.table("at a glance")[1][7] == "-"
    files = write_page(tmp_path / "x.html", records_of(run), {}, Pictures())
    assert [file.name for file in files] == ["x.html"]


def test_scored_and_unscored_together(tmp_path):
    a, b = write_run(tmp_path / "a", scores(1)), write_run(tmp_path / "b", None, seed=1)
    page_ = shown(a, b)
    assert [row[0] for row in page_.table("at a glance")[1:]] == ["a", "b"]
    assert len(page_.table("mean ± sd over cases")) == 2


def test_runs_that_differ_in_what_they_were_measured_on(tmp_path):
    a = write_run(tmp_path / "a", scores(1), splits={"sha256": {"train.txt": "a" * 64, "test.txt": "b" * 64}})
    other = {f"d{i}": 0.5 for i in range(5)}
    b = write_run(tmp_path / "b", other, splits={"sha256": {"train.txt": "c" * 64, "test.txt": "d" * 64}}, seed=1)
    text = warnings(a, b)
    assert "The runs differ in their splits, so their scores are not comparable as they stand: test cases: 12 (" in text
    assert "training list: aaaaaaaa for" in text
    c = write_run(tmp_path / "c", None, splits={"sha256": {"train.txt": "e" * 64}}, seed=2)
    assert "c: other cases than the other runs: train.txt." in warnings(a, c)
    d = write_run(tmp_path / "d", scores(1), checkpoint=LAST, config="train.max_steps=300", seed=3)
    text = warnings(a, d)
    assert "differ in their budget" in text and "differ in their checkpoint" in text
    records = records_of(a, b)
    panels = plan_panels(scored_runs(records), main_outputs(records, None), 1)
    assert {panel.case[0] for panel in panels if panel.run == "a"} == {"c"}
    assert {panel.case[0] for panel in panels if panel.run == "b"} == {"d"}


def test_the_same_warning_stands_once(tmp_path):
    runs = [write_run(tmp_path / f"r{i}", scores(i), seed=i, checkpoint=None) for i in range(3)]
    assert warnings(*runs).count("do not say which weights") == 1
    runs[0] = write_run(tmp_path / "good", scores(0))
    assert "r1, r2: the scores do not say" in warnings(*runs)


def test_runs_of_different_classes_are_refused(tmp_path):
    a, b = write_run(tmp_path / "a", {"x": scores(1)}), write_run(tmp_path / "b", {"y": scores(1)}, seed=1)
    with pytest.raises(DataError, match=r"no table in common: classes: x for .* and y for"):
        main_outputs(records_of(a, b), None)


def test_weights_that_no_longer_give_the_scores(tmp_path):
    run = write_run(tmp_path / "run", {"class 0": scores(1)})
    scored = scores(1)["c00"]
    for dice, expected in ((scored, 0), (scored + 0.2, 1)):
        overlays = {"c00": replace(overlay(), dice={"class 0": dice})}
        found = changed_predictions(records_of(run)[0].scores, "fusion", overlays)
        assert len(found) == expected and all("predicted anew, do not have the Dice of the scores" in x for x in found)
