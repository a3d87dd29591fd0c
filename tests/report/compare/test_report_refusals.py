"""What must not stand in one table, and what allows it."""

import json
import re

import numpy as np
import pytest
from report_runs import BEST, CASES, LAST, compared, one_set, pair, scores, write_run

from knowsam.errors import ConfigError, DataError
from knowsam.report.checks import KINDS
from knowsam.report.compare.notes import notes

LISTS = {"sha256": {"train.txt": "a" * 64, "val.txt": "b" * 64, "test.txt": "c" * 64, "labelled_10pct.txt": "d" * 64}}


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("splits", {"splits": {"source": "BuiltIn(num_classes=2, size=96, seed=1)"}}, "validation list: BuiltIn"),
        ("splits", {"splits": {"train_cases": 80}}, "number of training cases: 160 for 'base' and 80 for 'ours'"),
        ("splits", {"splits": LISTS}, "training list: BuiltIn.* for 'base' and aaaaaaaa for 'ours'"),
        ("rules", {"metric_rules": "knowsam-0"}, "metric rules: knowsam-1 for 'base' and knowsam-0 for 'ours'"),
        ("rules", {"unit": "mm"}, "unit of distances: px for 'base' and mm for 'ours'"),
        ("rules", {"nsd_tolerance": 1.0}, r"NSD tolerance: 2.0 for 'base' and 1.0 for 'ours'"),
        ("budget", {"config": "train.max_steps=300"}, "train.max_steps: 600 for 'base' and 300 for 'ours'"),
        ("budget", {"config": "data.labelled_batch=8"}, "data.labelled_batch: 4 for 'base' and 8 for 'ours'"),
        ("budget", {"config": "train.accumulate=2"}, "train.accumulate"),
        ("budget", {"config": "data.image_size=96"}, "data.image_size"),
        ("budget", {"world_size": 4}, "processes: 1 for 'base' and 4 for 'ours'"),
        ("checkpoint", {"checkpoint": LAST}, "scored: best on val for 'base' and last step for 'ours'"),
    ],
)
def test_each_refusal_and_what_allows_it(tmp_path, kind, changes, message):
    runs = pair(tmp_path, scores(0, 0.1), scores(0), **changes)
    with pytest.raises(DataError, match=message) as caught:
        compared(runs)
    assert f"--allow {kind}" in caught.value.hint
    with pytest.raises(DataError, match=message):
        compared(runs, allow=set(KINDS) - {kind})
    tables = one_set(runs, allow={kind})
    assert any(line.startswith("Mixed because it was asked for") and re.search(message, line) for line in notes(tables))


def test_other_test_cases(tmp_path):
    runs = pair(tmp_path, {case: v for case, v in scores(0, 0.1).items() if case != "c11"}, scores(0))
    with pytest.raises(DataError, match=r"splits: test cases: 12 \(.*\) for 'base' and 11 \(.*\) for 'ours'"):
        compared(runs)
    cell = one_set(runs, allow={"splits"}).rows[1].cells["mean", "dice"]
    assert sorted(cell.differences) == CASES[:-1] and cell.one_sided == (0, 1)


def test_empty_rule_and_units_that_are_not_shown(tmp_path):
    runs = pair(tmp_path, scores(0), scores(0), empty="include")
    with pytest.raises(DataError, match="cases empty on both sides: exclude for 'base' and include"):
        compared(runs)
    runs = pair(tmp_path / "u", scores(0), scores(0), unit="mm", nsd_tolerance=1.0)
    assert one_set(runs, metrics=["dice"]).metrics == ("dice",)  # where no distance is shown, its unit says nothing


def test_all_differences_come_at_once_and_classes_are_never_allowed(tmp_path):
    runs = pair(tmp_path, scores(0), scores(0), config="train.max_steps=300", checkpoint=LAST, metric_rules="x")
    with pytest.raises(DataError) as caught:
        compared(runs)
    assert all(f"  {kind}: " in str(caught.value) for kind in ("rules", "budget", "checkpoint"))
    assert "--allow rules,budget,checkpoint" in caught.value.hint
    runs = pair(tmp_path / "c", {"liver": scores(0), "lesion": scores(0)}, scores(0))
    with pytest.raises(DataError, match="no table in common: classes"):
        compared(runs, allow=set(KINDS))


def test_a_difference_within_a_setting_names_the_seed(tmp_path):
    runs = [
        write_run(tmp_path / f"{seed}", scores(seed), seed=seed, checkpoint=LAST if seed == 2 else BEST)
        for seed in range(3)
    ]
    with pytest.raises(DataError, match="best on val for 'knowsam' seed 0, 1 and last step for 'knowsam' seed 2"):
        compared(runs)


def test_label_lists_are_a_setting_and_no_split(tmp_path):
    more = {"sha256": LISTS["sha256"] | {"labelled_10pct.txt": "e" * 64}}
    runs = [write_run(tmp_path / "a", scores(0), splits=LISTS)]
    runs += [write_run(tmp_path / "b", scores(0), splits=more, config="data.labelled=labelled_20pct")]
    assert len(one_set(runs).rows) == 2


def test_old_scores_say_unknown_and_are_compared(tmp_path):
    tables = one_set(pair(tmp_path, scores(0), scores(0), checkpoint=None))
    assert any("Checkpoint of 1 of 2 runs: unknown" in line for line in notes(tables))
    assert any(
        "Checkpoint of 1 of 2 runs: best.pt, chosen by: validation Dice of fusion" in line for line in notes(tables)
    )


def test_outputs(tmp_path):
    sam = {"sam": scores(1)}
    runs = pair(tmp_path, scores(0, 0.1), scores(0), outputs=sam)
    assert [row.output for row in one_set(runs).rows] == ["fusion", "fusion"]
    with pytest.raises(ConfigError, match="1 of 2 runs have no scores of output 'sam': 'base' has fusion"):
        compared(runs, output="sam")
    alone = one_set([tmp_path / "a"], output="sam").rows[0]
    assert alone.cells["mean", "dice"].values.mean == pytest.approx(np.mean(list(scores(1).values())))


def test_a_setting_never_mixes_outputs(tmp_path):
    write_run(tmp_path / "a", scores(0))
    other = write_run(tmp_path / "b", scores(1), seed=1, outputs={"sam": scores(1)})
    path = other / "evaluation" / "test.json"
    scored = json.loads(path.read_text())
    path.write_text(json.dumps(scored | {"outputs": ["sam", "fusion"]}))
    with pytest.raises(ConfigError, match="'knowsam' would mix outputs: 'fusion', and 'sam' of seed 1"):
        compared([tmp_path / "a", other])
    assert len(one_set([tmp_path / "a", other], output="fusion").rows) == 1


def test_metrics_that_some_runs_lack(tmp_path):
    runs = pair(tmp_path, scores(0), scores(0), distances=False)
    tables = one_set(runs)
    assert tables.metrics == ("dice", "iou") and tables.left_out == ("hd95", "asd", "nsd")
    with pytest.raises(ConfigError, match="'ours' has no hd95"):
        compared(runs, metrics=["dice", "hd95"])
    assert one_set(runs, metrics=["iou"]).metrics == ("iou",)
