"""More than a run's own test split: other data, other tools, ensembles, near duplicates, warnings, rates."""

import csv
import io
import json

import pytest
from report_pages import log
from report_runs import CASES, SUPERVISED, compared, one_set, pair, scores, write_run

from knowsam.cli.reading import reader
from knowsam.errors import DataError, NotFoundError
from knowsam.report.compare import tables
from knowsam.report.compare.collect import collect
from knowsam.report.compare.comparison import compare
from knowsam.report.compare.notes import notes
from knowsam.report.compare.write import data_sets_of, html, markdown

ABROAD = {f"x{i}": v for i, v in enumerate(scores(7).values())}


def two_runs(tmp_path, **changes):
    """A baseline that was scored elsewhere with two seeds, and a setting with one of its two."""
    base = [
        write_run(tmp_path / f"b{s}", scores(s), seed=s, config=SUPERVISED, others={"etis": ABROAD}) for s in (0, 1)
    ]
    better = {case: min(1.0, value + 0.1) for case, value in ABROAD.items()}
    ours = [write_run(tmp_path / "a0", scores(0, 0.2), others={"etis": better, "cvc": ABROAD})]
    ours += [write_run(tmp_path / "a1", scores(1, 0.2), seed=1, **changes)]
    return [*(f"base={run}" for run in base), *(f"ours={run}" for run in ours)]


def test_other_data_have_tables_of_their_own_with_tests(tmp_path):
    found = compared(two_runs(tmp_path))
    assert [item.experiment for item in found.sets] == ["hand", "hand, on cvc", "hand, on etis"]
    own, cvc, etis = found.sets
    assert (own.dataset, cvc.dataset, etis.dataset) == (None, "cvc", "etis")
    assert {row.setting: row.seeds for row in etis.rows} == {"base": [0, 1], "ours": [0]}
    cell = etis.rows[1].cells["mean", "dice"]
    assert cell.test.pairs == 12 and cell.delta.n == 1 and cell.delta.mean == pytest.approx(0.1, abs=0.02)
    assert "1 of 2 runs of 'ours' not scored on etis (seed 1): its means are over 1 seed." in notes(etis)
    assert not any("not scored" in note for note in notes(own))


def test_the_data_sets_stand_beside_each_other(tmp_path):
    found = compared(two_runs(tmp_path))
    table = data_sets_of(found, found.sets[0])
    assert table.head == ["setting", "its own", "cvc", "etis", "mean of these"]
    base, ours = table.rows
    assert base[2] == base[4] == "-", "no mean where a part is missing"
    values = [float(text.split()[0]) for text in ours[1:4]]
    assert float(ours[4]) == pytest.approx(sum(values) / 3, abs=0.01)
    assert data_sets_of(found, found.sets[1]) is None
    text = markdown(found, {item.experiment: [] for item in found.sets})
    assert "| etis |" in text and "## hand, on etis" in text
    records = [record for item in found.sets for record in tables.records(item)]
    assert {record["data"] for record in records} == {"own", "cvc", "etis"}


def test_other_data_are_chosen_by_name(tmp_path):
    runs = two_runs(tmp_path)
    assert [i.experiment for i in compare(collect(runs, reader("test"), [])).sets] == ["hand"]
    assert [i.dataset for i in compare(collect(runs, reader("test"), ["etis"])).sets] == [None, "etis"]
    with pytest.raises(NotFoundError, match="no run has test scores on kvasir; there are cvc, etis"):
        collect(runs, reader("test"), ["kvasir"])


def test_a_stranger_among_the_files_of_other_data_is_refused(tmp_path):
    runs = two_runs(tmp_path)
    (tmp_path / "a0" / "evaluation" / "etis_test_cases.csv").write_text("case,output,class\n")
    with pytest.raises(DataError, match=r"etis_test_cases\.csv"):
        compared(runs)


# ---------------------------------------------------------------- without a training


def foreign(kind, **more):
    return {"kind": kind, "file": kind, "step": None, "chosen_by": "-", "split": None, "value": None, **more}


def test_masks_of_another_tool_stand_beside_runs(tmp_path):
    runs = pair(
        tmp_path,
        scores(0),
        scores(0, 0.2),
        config="method.name=mean_teacher train.max_steps=100",
        checkpoint=foreign("masks"),
    )
    found = one_set(runs)
    assert found.mixed == () and found.rows[1].cells["mean", "dice"].test.pairs == 12
    assert "Masks of another tool, scored as they are: 'ours'." in notes(found)
    assert tables.checkpoints(found).rows[1][3:6] == ["masks", "-", "-"]
    with pytest.raises(DataError, match="post-processing: none for 'base' and largest component"):
        write_run(tmp_path / "c", scores(2), postprocess={"asked": {"name": "largest"}, "applied": {"fusion": None}})
        one_set([*runs, f"c={tmp_path / 'c'}"])


def test_an_ensemble_is_called_so(tmp_path):
    run = write_run(tmp_path / "e", scores(3), checkpoint=foreign("ensemble", runs=["a", "b"]))
    status = json.loads((run / "status.json").read_text())
    (run / "status.json").write_text(json.dumps(status | {"called": "knowsam, ensemble of 2"}))
    found = one_set([str(write_run(tmp_path / "b", scores(0), config=SUPERVISED)), str(run)])
    assert [row.setting for row in found.rows][1] == "knowsam, ensemble of 2"
    assert "Means of the probabilities of several runs: 'knowsam, ensemble of 2'." in notes(found)


# ---------------------------------------------------------------- what is said


def test_what_was_done_to_predictions_is_said(tmp_path):
    largest = {"name": "largest"}
    auto = [{"asked": "auto", "applied": {"fusion": spec}} for spec in (largest, None)]
    runs = [
        f"base={write_run(tmp_path / 'b', scores(0), config=SUPERVISED, postprocess=auto[0])}",
        f"ours={write_run(tmp_path / 'a', scores(1), postprocess=auto[1])}",
    ]
    found = one_set(runs)
    assert found.mixed == (), "both were asked for the same; what was found may differ"
    (line,) = [note for note in notes(found) if note.startswith("Post-processing")]
    assert "largest component of each class (chosen on validation) for 'base'" in line
    assert "none (chosen on validation) for 'ours'" in line


def test_warnings_of_the_runs_are_repeated(tmp_path):
    base = write_run(tmp_path / "b", scores(0), config=SUPERVISED)
    behind = {case: min(1.0, value + 0.05) for case, value in scores(1).items()}
    ours = write_run(tmp_path / "a", scores(1), outputs={"unet": behind})
    log(ours, {"step": 300, "kind": "warning", "name": "stalled", "text": "validation Dice has not risen"})
    (ours / "sam_weights.txt").write_text("SAM (vit_b) starts from RANDOM weights (sam.weights is null)\n")
    (ours / "warnings.jsonl").write_text('{"text": "no labelled image shows tumour in /data/secret/list.txt"}\ntorn')
    found = one_set([f"base={base}", f"ours={ours}"])
    told = [note for note in notes(found) if note.startswith("Warning")]
    assert all("'ours' seed 0" in note for note in told) and len(told) == 4
    text = "\n".join(told)
    assert "the deployed output fusion has Dice" in text and "--output unet" in text
    assert "at step 300 of the training: validation Dice has not risen" in text
    assert "RANDOM weights" in text and "no labelled image shows tumour in …/list.txt" in text
    page = html(compared([f"base={base}", f"ours={ours}"]), {"hand": []})
    assert "RANDOM weights" in page and "/data/secret" not in page
    # Of the other output there is nothing to warn.
    other = notes(one_set([f"ours={ours}"], output="unet"))
    assert not any("the deployed output" in note for note in other)


@pytest.mark.parametrize(("points", "said"), [(3.9, False), (4.0, True)])
def test_four_points_are_enough(tmp_path, points, said):
    values = dict.fromkeys(CASES, 0.5)
    better = dict.fromkeys(CASES, 0.5 + points / 100)
    run = write_run(tmp_path / "a", values, outputs={"unet": better})
    assert any("points more" in note for note in notes(one_set([str(run)]))) == said


def test_near_duplicates_count_once_in_the_tests(tmp_path):
    alike = {case: "g1" for case in CASES[:4]} | {case: "g2" for case in CASES[4:6]}
    runs = pair(tmp_path, scores(0, 0.2), scores(0))
    for folder in ("a", "b"):
        path = tmp_path / folder / "evaluation" / "test.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"near_duplicates": alike}))
    found = one_set(runs)
    cell = found.rows[1].cells["mean", "dice"]
    assert cell.test.pairs == 12 - 3 - 1
    plain = {case: scores(0, 0.2)[case] - scores(0)[case] for case in CASES}
    assert cell.differences[CASES[0]] == pytest.approx(sum(plain[case] for case in CASES[:4]) / 4)
    assert cell.values.mean == pytest.approx(sum(scores(0, 0.2).values()) / 12), "means stay over all cases"
    assert any("Each of the 2 groups of near duplicates counts as one case" in note for note in notes(found))
    assert any("6 of the 12 test cases are near duplicates" in note for note in notes(found))


# ---------------------------------------------------------------- rates


def test_rates_have_a_table_without_tests(tmp_path):
    found = one_set(pair(tmp_path, scores(0) | {"c00": None}, scores(0, 0.2) | {"c00": None}))
    table = tables.errors(found)
    assert [name.split(" %")[0] for name in table.head[1:]] == [
        "precision",
        "recall",
        "specificity",
        "image sensitivity",
        "image specificity",
    ]
    assert table.rows[0][4:] == ["100.00", "100.00"]
    assert tables.results(found).head[1:7] == ["seeds", "Dice % ↑", "IoU % ↑", "HD95 px ↓", "ASD px ↓", "NSD % ↑"]
    asked = one_set(pair(tmp_path / "2", scores(0), scores(0, 0.2)), metrics=["recall"])
    assert asked.rows[1].cells["mean", "recall"].test.pairs == 12


def test_evaluations_without_rates_are_still_read(tmp_path):
    """As written before precision and the others were measured."""
    runs = pair(tmp_path, scores(0), scores(0, 0.2))
    new = ("precision", "recall", "specificity")
    folder = tmp_path / "b" / "evaluation"
    whole = json.loads((folder / "test.json").read_text())
    whole["metrics"] = [name for name in whole["metrics"] if name not in new]
    for classes in whole["summary"].values():
        for row in classes.values():
            for name in (*new, "image_sensitivity", "image_specificity"):
                del row[name]
    (folder / "test.json").write_text(json.dumps(whole))
    with open(folder / "test_cases.csv", newline="") as file:
        rows = [{key: value for key, value in row.items() if key not in new} for row in csv.DictReader(file)]
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    (folder / "test_cases.csv").write_text(text.getvalue())
    found = one_set(runs)
    assert found.metrics == ("dice", "iou", "hd95", "asd", "nsd") and found.left_out == ()
    old, now = tables.errors(found).rows
    assert old[1:4] == ["-", "-", "-"] and old[4] == "100.00", "counts were there, so image-level rates are"
    assert "-" not in now[1:5]
