"""Scores of a split against plain numpy, and the files they are kept in."""

import csv
import inspect
import io
import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console

from knowsam.data.levels import to_unit
from knowsam.engine.evaluate import choose_postprocess, evaluate, score, validate
from knowsam.engine.score_tables import comparison_table, error_table, score_table, subgroup_table
from knowsam.engine.scores import Evaluation, image_level, load_evaluation
from knowsam.errors import DataError, NotFoundError, NumericError, StorageError
from knowsam.inference.inferers import Inferer
from knowsam.metrics import METRIC_NAMES, METRIC_RULES, STATUSES

SIZE = 24


class Drawn:
    """Cases whose image *is* what `read_off` will predict; the masks stand beside it."""

    def __init__(self, cases, num_classes, spacing=None):
        self.cases, self.num_classes, self._spacing, self.splits = cases, num_classes, spacing or {}, []

    def eval_ids(self, split):
        self.splits.append(split)
        return sorted(self.cases)

    def image(self, case_id):
        return np.repeat(self.cases[case_id][0][..., None] * np.uint8(10), 3, axis=-1)

    def mask(self, case_id):
        return self.cases[case_id][1]

    def spacing(self, case_id):
        return self._spacing.get(case_id)


def read_off(num_classes):
    """Logits that give back the class painted into the image; a second output that says background everywhere."""

    def predict(x):
        classes = (x[:, :1] * 25.5).round()  # (B, 1, S, S)
        logits = -(classes - torch.arange(num_classes).view(1, -1, 1, 1)).abs()
        return {"fusion": logits, "nothing": torch.eye(num_classes)[0].view(1, -1, 1, 1).expand_as(logits)}

    return predict


def blank():
    return np.zeros((SIZE, SIZE), np.uint8)


def square(top, left, side, value=1, on=None):
    mask = blank() if on is None else on.copy()
    mask[top : top + side, left : left + side] = value
    return mask


class Whole(Inferer):
    """The network sees pictures, and slices of volumes, at their own size."""

    def batch(self, predict_fn, images):
        if images.ndim == 4:
            return predict_fn(to_unit(images))
        [volume] = images
        return {name: x.movedim(0, 1)[None] for name, x in predict_fn(to_unit(volume.movedim(1, 0))).items()}


SETTINGS = {"image_size": SIZE, "batch_size": 3, "device": "cpu", "inferer": Whole()}


def two_class_source(**kwargs):
    return Drawn(
        {
            "a": (square(2, 2, 4), square(2, 4, 4)),  # Dice 0.5
            "b": (square(2, 2, 4), square(2, 2, 4)),  # Dice 1
            "c": (blank(), square(2, 2, 4)),  # missed
            "d": (square(2, 2, 4), blank()),  # false positive
            "e": (blank(), blank()),  # empty in both
        },
        2,
        **kwargs,
    )


def three_class_source():
    both = square(10, 10, 5, 2, on=square(2, 2, 4))
    return Drawn(
        {
            "a": (square(10, 10, 5, 2, on=square(2, 4, 4)), both),
            "b": (both, both),
            "c": (square(2, 2, 4), square(2, 2, 4)),  # class 2 empty in both
            "d": (blank(), square(2, 2, 4)),  # class 1 missed, class 2 empty in both
        },
        3,
    )


def shown(table, width=160):
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    return console.file.getvalue()


def test_rows_and_statuses():
    result = evaluate(read_off(2), two_class_source(), "val", **SETTINGS)
    fusion = [row for row in result.rows if row["output"] == "fusion"]
    assert [row["case"] for row in fusion] == list("abcde") == result.cases
    assert [row["status"] for row in fusion] == ["ok", "ok", "missed", "false_positive", "empty_both"]
    assert [row["dice"] for row in fusion] == [0.5, 1, 0, 0, 1]
    diagonal = math.hypot(SIZE, SIZE)
    assert [row["hd95"] for row in fusion][1:] == pytest.approx([0, diagonal, diagonal, 0])
    assert set(fusion[0]) == {"case", "output", "class", "status", *METRIC_NAMES}
    assert result.outputs == ("fusion", "nothing") and result.unit == "px" and result.class_names == ("class 1",)


@pytest.mark.parametrize("empty", ["exclude", "include"])
def test_summary_against_numpy(empty):
    result = evaluate(read_off(2), two_class_source(), "test", empty=empty, **SETTINGS)
    scores = [0.5, 1, 0, 0] + ([1] if empty == "include" else [])
    got = result.summary()["fusion"]["class 1"]
    assert got["dice"] == pytest.approx({"mean": np.mean(scores), "sd": np.std(scores, ddof=1)})
    assert (got["n"], got["cases"]) == (len(scores), 5)
    assert {s: got[s] for s in STATUSES} == {"ok": 2, "empty_both": 1, "missed": 1, "false_positive": 1}
    kept = [r for r in result.rows if r["output"] == "fusion" and (empty == "include" or r["status"] != "empty_both")]
    for metric in METRIC_NAMES:
        values = [row[metric] for row in kept]
        assert got[metric] == pytest.approx({"mean": np.mean(values), "sd": np.std(values, ddof=1)})
    assert result.dice() == result.dice("fusion") == pytest.approx(np.mean(scores))


def test_predicting_nothing_never_scores_better_than_predicting():
    """The trap of dropped NaN: HD95 of the model that finds nothing must not be the smaller one."""
    summary = evaluate(read_off(2), two_class_source(), "val", **SETTINGS).summary()
    nothing, fusion = summary["nothing"]["class 1"], summary["fusion"]["class 1"]
    assert nothing["missed"] == 3 and nothing["hd95"]["mean"] == pytest.approx(math.hypot(SIZE, SIZE))
    assert nothing["hd95"]["mean"] > fusion["hd95"]["mean"] and nothing["dice"]["mean"] == 0


def test_mean_over_classes():
    result = evaluate(read_off(3), three_class_source(), "val", class_names=["liver", "lesion"], **SETTINGS)
    summary = result.summary()["fusion"]
    one, two = [0.5, 1, 1, 0], [1, 1]  # class 2 is empty in both in c and d
    assert summary["liver"]["dice"]["mean"] == pytest.approx(np.mean(one)) and summary["lesion"]["n"] == 2
    mean = summary["mean"]
    assert mean["dice"]["mean"] == pytest.approx((np.mean(one) + np.mean(two)) / 2) == result.dice("fusion")
    assert mean["dice"]["sd"] == pytest.approx(np.std([0.75, 1, 1, 0], ddof=1))  # of the cases' own means
    assert (mean["n"], mean["cases"], mean["classes"], mean["empty_both"], mean["missed"]) == (4, 4, 2, 2, 1)


def test_a_class_that_no_case_holds_is_left_out_and_told():
    source = Drawn({"a": (square(2, 2, 4), square(2, 2, 4))}, 3)
    summary = evaluate(read_off(3), source, "val", outputs=["fusion"], **SETTINGS).summary()["fusion"]
    assert summary["class 2"]["dice"] == {"mean": None, "sd": None} and summary["class 2"]["n"] == 0
    assert summary["mean"]["dice"] == {"mean": 1.0, "sd": None} and summary["mean"]["classes"] == 1


def test_one_case_has_no_sd_and_no_nan(tmp_path):
    source = Drawn({"only": (square(2, 2, 4), square(2, 2, 4))}, 2)
    result = evaluate(read_off(2), source, "val", **SETTINGS)
    assert result.summary()["fusion"]["class 1"]["dice"] == {"mean": 1.0, "sd": None}
    result.write(tmp_path, "one")
    text = shown(score_table(result))
    assert "100.00" in text and "100.00 ±" not in text and "nan" not in text


def test_volumes_and_millimetres():
    volume = np.stack([blank(), square(3, 3, 5), square(3, 3, 5), blank()])
    moved = np.roll(volume, 1, axis=0)
    source = Drawn({"v": (moved, volume)}, 2, spacing={"v": (10.0, 0.5, 0.5)})
    result = evaluate(read_off(2), source, "test", **SETTINGS)
    row = result.rows[0]
    assert result.unit == "mm" and row["hd95"] == pytest.approx(10.0) and row["dice"] == 0.5
    in_pixels = evaluate(read_off(2), source, "test", spacing=None, **SETTINGS)
    assert in_pixels.unit == "px" and in_pixels.rows[0]["hd95"] == pytest.approx(1.0)
    given = evaluate(read_off(2), source, "test", spacing=(2.0, 1.0, 1.0), **SETTINGS)
    assert given.unit == "mm" and given.rows[0]["hd95"] == pytest.approx(2.0)


def test_millimetres_and_pixels_do_not_mix():
    source = two_class_source(spacing={"a": (1.0, 1.0)})
    with pytest.raises(DataError, match="4 of 5 cases have no spacing, 'b' for one"):
        evaluate(read_off(2), source, "val", **SETTINGS)
    assert evaluate(read_off(2), source, "val", spacing=None, **SETTINGS).unit == "px"
    assert evaluate(read_off(2), source, "val", distances=False, **SETTINGS).dice() == 0.375


def test_validation_is_overlap_on_val_and_nothing_else(monkeypatch):
    monkeypatch.setattr("knowsam.metrics.segmentation._surface_metrics", None)  # calling it would fail
    source = two_class_source()
    result = validate(read_off(2), source, **SETTINGS)
    assert source.splits == ["val"] and result.split == "val" and not result.distances
    assert result.dice() == pytest.approx(0.375)
    assert all(row["hd95"] is row["asd"] is row["nsd"] is None for row in result.rows)
    assert "split" not in inspect.signature(validate).parameters
    with pytest.raises(TypeError, match="split"):
        validate(read_off(2), source, split="test", **SETTINGS)


def test_validation_without_foreground_cannot_choose():
    source = Drawn({"a": (square(2, 2, 4), blank()), "b": (blank(), blank())}, 2)
    with pytest.raises(DataError, match="none of the 2 validation masks"):
        validate(read_off(2), source, **SETTINGS)
    empty = evaluate(read_off(2), source, "test", outputs=["nothing"], **SETTINGS)
    with pytest.raises(ValueError, match="there is no Dice"):
        empty.dice()


def test_progress():
    calls = []
    evaluate(read_off(2), two_class_source(), "val", progress=lambda *c: calls.append(c), **SETTINGS)
    assert calls == [(i, 5) for i in range(1, 6)]


def test_files_are_written_and_read_again(tmp_path):
    result = evaluate(read_off(3), three_class_source(), "val", **SETTINGS)
    paths = result.write(tmp_path / "new" / "folder", "val")
    assert [p.name for p in paths] == ["val_cases.csv", "val_summary.csv", "val.json"]
    assert sorted(p.name for p in paths[0].parent.iterdir()) == sorted(p.name for p in paths)  # nothing left beside

    cases = list(csv.DictReader(paths[0].open(encoding="utf-8")))
    assert len(cases) == len(result.rows) == 4 * 2 * 2
    for read, row in zip(cases, result.rows, strict=True):
        assert (read["case"], read["class"], read["status"]) == (row["case"], row["class"], row["status"])
        assert float(read["dice"]) == pytest.approx(row["dice"], abs=5e-5)
        assert float(read["hd95"]) == pytest.approx(row["hd95"], abs=5e-5)

    lines = list(csv.DictReader(paths[1].open(encoding="utf-8")))
    assert [(r["output"], r["class"]) for r in lines] == [
        (output, name) for output in ("fusion", "nothing") for name in ("class 1", "class 2", "mean")
    ]
    assert lines[2]["dice_mean"] == f"{result.dice('fusion'):.4f}" and lines[0]["n"] == "4"

    loaded = load_evaluation(paths[2])
    assert loaded == result.to_dict() == json.loads(paths[2].read_text(encoding="utf-8"))
    assert (loaded["unit"], loaded["split"], loaded["num_cases"]) == ("px", "val", 4)
    assert loaded["metric_rules"] == METRIC_RULES and loaded["empty"] == "exclude" and loaded["nsd_tolerance"] == 2.0
    assert loaded["summary"]["fusion"]["mean"]["dice"]["mean"] == result.dice("fusion")


def test_files_without_distances(tmp_path):
    paths = validate(read_off(2), two_class_source(), **SETTINGS).write(tmp_path, "v")
    assert next(csv.DictReader(paths[0].open()))["hd95"] == ""
    assert "hd95_mean" not in next(csv.DictReader(paths[1].open()))


@pytest.mark.parametrize("case_id", ["=1+1", "+x", "-2", "@sum", "\tx"])
def test_no_formulas_in_csv(case_id, tmp_path):
    source = Drawn({case_id: (blank(), square(2, 2, 4))}, 2)
    result = evaluate(read_off(2), source, "val", class_names=["=cmd()"], **SETTINGS)
    cases, summary, whole = result.write(tmp_path, "x")
    row = next(csv.DictReader(cases.open(newline="")))
    assert row["case"] == "'" + case_id and row["class"] == "'=cmd()"
    assert next(csv.DictReader(summary.open()))["class"] == "'=cmd()"
    assert load_evaluation(whole)["class_names"] == ["=cmd()"]  # JSON runs nothing, so names stay as they are
    assert result.rows[0]["case"] == case_id


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    result = evaluate(read_off(2), two_class_source(), "val", **SETTINGS)
    (tmp_path / "x_cases.csv").write_text("old")

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StorageError, match="No space left"):
        result.write(tmp_path, "x")
    assert [p.name for p in tmp_path.iterdir()] == ["x_cases.csv"]
    assert (tmp_path / "x_cases.csv").read_text() == "old"


def test_console_table():
    text = shown(score_table(evaluate(read_off(2), two_class_source(), "test", class_names=["a[b]c"], **SETTINGS)))
    assert "test: 5 cases" in text and "distances in px" in text
    assert "fusion: 1 missed, 1 false positive, 1 empty in both" in text
    nothing = next(line for line in text.splitlines() if "nothing" in line).split()
    assert nothing[2] == "3/5" and nothing[-1] == "3/0/2"
    assert (
        "37.50 ±47.87" in text
        and "4/5" in text
        and "a[b]c" in text
        and "left out of the means" in " ".join(text.split())
    )


def test_a_narrow_console_cuts_no_digit():
    result = evaluate(read_off(3), three_class_source(), "test", **SETTINGS)
    for table in (score_table(result), comparison_table({"knowsam, 10 % of ISIC": result, "supervised": result})):
        text = shown(table, width=80)
        assert "…" not in text and max(map(len, text.splitlines())) <= 80
        assert all(number in text for number in ("81.25", "±47.32", "33.94", "±16.81", "1/0/2"))


def test_comparison_of_objects_dicts_and_files(tmp_path):
    source = two_class_source()
    ours = evaluate(read_off(2), source, "test", outputs=["fusion"], **SETTINGS)
    base = evaluate(read_off(2), source, "test", outputs=["nothing"], **SETTINGS)
    path = base.write(tmp_path, "base")[2]
    texts = {
        shown(comparison_table({"KnowSAM [10 %]": ours, "supervised": other})) for other in (base, base.to_dict(), path)
    }
    assert len(texts) == 1
    text = texts.pop()
    assert "KnowSAM [10 %]" in text and "supervised" in text and "37.50 ±47.87" in text and "0.00 ±0.00" in text
    assert "test: 5 cases" in text
    quick = evaluate(read_off(2), source, "test", outputs=["fusion"], distances=False, **SETTINGS)
    assert " - " in shown(comparison_table({"a": quick, "b": base}))


def changed(result, **kwargs):
    return result.to_dict() | kwargs


@pytest.mark.parametrize(
    "change",
    [
        {"metric_rules": "other-7"},
        {"empty": "include"},
        {"split": "val"},
        {"unit": "mm"},
        {"nsd_tolerance": 1.0},
        {"cases_sha256": "0"},
        {"class_names": ["x"]},
    ],
)
def test_comparison_refuses_to_mix(change):
    result = evaluate(read_off(2), two_class_source(), "test", **SETTINGS)
    comparison_table({"a": result, "b": result})
    with pytest.raises(DataError, match=f"their {next(iter(change))} differs"):
        comparison_table({"a": result, "b": changed(result, **change)})


def test_loading_what_is_not_there(tmp_path):
    with pytest.raises(NotFoundError):
        load_evaluation(tmp_path / "none.json")
    for text in ("", "[]", '{"format": 99, "summary": {}}'):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(DataError):
            load_evaluation(tmp_path / "x.json")
    with pytest.raises(ValueError, match="nothing to compare"):
        comparison_table({})


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"split": "train"}, ValueError, "allowed: 'val', 'test'"),
        ({"empty": "skip"}, ValueError, "'exclude', 'include'"),
        ({"outputs": ["sam"]}, ValueError, "no output 'sam'"),
        ({"class_names": ["a", "b"]}, ValueError, "1 different names"),
        ({"class_names": ["mean"]}, ValueError, "none of them 'mean'"),
        ({"spacing": "mm"}, ValueError, "allowed: 'source'"),
        ({"spacing": (1.0, 1.0, 1.0)}, DataError, "case 'a', output 'fusion' cannot be scored"),
        ({"method_predict": read_off(4)}, ValueError, "K 2 with the background"),
        ({"method_predict": lambda x: {"out": x[:, :2] / 0}}, NumericError, "not finite"),
        ({"source": Drawn({}, 2)}, DataError, "holds no case"),
        ({"source": Drawn({"a": (blank(), blank()[1:])}, 2)}, DataError, "native resolution"),
        ({"source": Drawn({"a": (blank(), square(0, 0, 2, 7))}, 2)}, DataError, "target holds class ids 0 to 7"),
    ],
)
def test_refusals(kwargs, error, message):
    good = {"method_predict": read_off(2), "source": two_class_source(), "split": "val"} | SETTINGS
    with pytest.raises(error, match=message):
        evaluate(**(good | kwargs))


def test_the_module_is_back_in_training_mode_when_scoring_fails():
    class Method(torch.nn.Module):
        def predict(self, x):
            assert not self.training
            return read_off(2)(x)

    method = Method()
    with pytest.raises(DataError):
        evaluate(method.predict, Drawn({"a": (blank(), blank()[1:])}, 2), "val", **SETTINGS)
    assert method.training


def test_evaluation_is_plain_data():
    row = {"case": "a", "output": "o", "class": "c", "status": "ok"} | dict.fromkeys(METRIC_NAMES, 0.5)
    result = Evaluation([row], "val", ("o",), ("c",), "px")
    assert result.dice() == 0.5
    with pytest.raises(ValueError, match="no output 'x'; allowed: 'o'"):
        result.dice("x")


# ---------------------------------------------------------------- rates, ignored pixels, post-processing, subgroups


def test_image_level_rates_follow_from_the_counts(tmp_path):
    result = evaluate(read_off(2), two_class_source(), "test", **SETTINGS)
    row = result.summary()["fusion"]["class 1"]
    # Of a, b, c, which show it, c is missed; of d, e, which do not, d has a false one.
    assert (row["image_sensitivity"], row["image_specificity"]) == (2 / 3, 1 / 2)
    assert result.summary()["nothing"]["class 1"]["image_sensitivity"] == 0
    text = shown(error_table(result))
    assert "66.7 (2/3)" in text and "50.0 (1/2)" in text and "100.0 (2/2)" in text
    # Files that were written before these numbers were kept give them, too.
    old = {
        name: {key: value for key, value in one.items() if not key.startswith("image_")}
        for name, one in result.summary()["fusion"].items()
    }
    assert image_level(old, "class 1") == (2 / 3, 1 / 2)
    summary = next(csv.DictReader(result.write(tmp_path, "x")[1].open()))
    assert (summary["image_sensitivity"], summary["recall_mean"]) == ("0.6667", f"{row['recall']['mean']:.4f}")


def test_image_level_rates_of_several_classes_are_their_mean():
    rows = evaluate(read_off(3), three_class_source(), "test", **SETTINGS).summary()["fusion"]
    assert rows["class 2"]["image_sensitivity"] == 1 and rows["class 1"]["image_sensitivity"] == 3 / 4
    assert rows["class 1"]["image_specificity"] is None  # every case shows it
    assert rows["mean"]["image_sensitivity"] == 7 / 8 and rows["mean"]["image_specificity"] == 1


def test_new_columns_stand_behind_the_old_ones(tmp_path):
    cases, summary, _ = evaluate(read_off(2), two_class_source(), "test", **SETTINGS).write(tmp_path, "x")
    old = "case,output,class,dice,iou,hd95,asd,nsd,status"
    assert cases.read_text().splitlines()[0] == f"{old},precision,recall,specificity"
    old = "output,class,dice_mean,dice_sd,iou_mean,iou_sd,hd95_mean,hd95_sd,asd_mean,asd_sd,nsd_mean,nsd_sd"
    assert summary.read_text().startswith(f"{old},n,cases,ok,empty_both,missed,false_positive,precision_mean")


def test_ignored_pixels_are_left_out_and_counted():
    truth = square(2, 2, 4)
    truth[:, 12:] = 255
    source = Drawn({"a": (square(2, 2, 4, on=square(2, 14, 6)), truth), "b": (square(2, 2, 4), square(2, 2, 4))}, 2)
    result = evaluate(read_off(2), source, "val", **SETTINGS)
    assert [row["dice"] for row in result.rows if row["output"] == "fusion"] == [1, 1]
    assert result.ignored == {"cases": 1, "share": 0.25} and result.to_dict()["ignored"] == result.ignored
    assert "1 case with ignored pixels (25 % of all), left out" in " ".join(shown(score_table(result)).split())
    nothing_known = Drawn({"a": (truth, np.full_like(truth, 255))}, 2)
    with pytest.raises(DataError, match=r"case 'a', output 'fusion' cannot be scored: every pixel .* \(ignored\)"):
        evaluate(read_off(2), nothing_known, "val", **SETTINGS)


def crumbs():
    """A square each, and specks that no truth has: the network's mistakes on both splits."""
    specked = square(20, 20, 1, on=square(15, 3, 1, on=square(2, 2, 6)))
    return Drawn({"a": (specked, square(2, 2, 6)), "b": (square(21, 3, 1, on=square(9, 9, 5)), square(9, 9, 5))}, 2)


def test_postprocessing_is_chosen_on_validation_alone_and_applied_before_scoring(monkeypatch):
    source, read = crumbs(), []
    mask_of = source.mask
    monkeypatch.setattr(source, "mask", lambda case_id: read.append(case_id) or mask_of(case_id))
    how = {key: value for key, value in SETTINGS.items() if key != "class_names"}
    choice = choose_postprocess(read_off(2), source, **how)
    assert source.splits == ["val"], "no other split is asked for"
    assert read == ["a", "b"], "each mask is read once, however many candidates there are"
    fusion = choice["fusion"]
    assert fusion["spec"] == {"name": "remove_small", "size": 0.05, "unit": "share"} and fusion["dice"] == 1
    assert fusion["tried"][0]["spec"] is None and fusion["tried"][0]["dice"] < 1
    assert choice["nothing"]["spec"] is None, "where nothing helps, nothing is done"
    plain = evaluate(read_off(2), source, "test", **SETTINGS)
    treated = evaluate(read_off(2), source, "test", postprocess={"fusion": fusion["spec"]}, **SETTINGS)
    assert plain.dice() == pytest.approx(fusion["tried"][0]["dice"]) and treated.dice() == 1
    assert plain.summary()["nothing"] == treated.summary()["nothing"]


def test_small_objects_in_mm_use_the_spacing_of_each_case():
    cases = {"a": (square(15, 3, 2, on=square(2, 2, 6)), square(2, 2, 6)), "b": (square(2, 2, 6), square(2, 2, 6))}
    source = Drawn(cases, 2, spacing={"a": (0.5, 0.5), "b": (0.1, 0.1)})
    spec = {"fusion": {"name": "remove_small", "size": 0.3, "unit": "mm"}}
    # 4 pixels of 0.25 mm^2 stay in a, 36 of 0.01 mm^2 in b too; at 2 mm^2 a loses its speck and b everything.
    assert [r["dice"] for r in evaluate(read_off(2), source, "val", postprocess=spec, **SETTINGS).rows[::2]] == [
        72 / 76,
        1,
    ]
    spec["fusion"]["size"] = 2
    assert [r["dice"] for r in evaluate(read_off(2), source, "val", postprocess=spec, **SETTINGS).rows[::2]] == [1, 0]
    with pytest.raises(DataError, match="spacing of this case is not known"):
        evaluate(read_off(2), crumbs(), "val", postprocess=spec, **SETTINGS)


def test_subgroups_are_scored_apart(tmp_path):
    result = evaluate(read_off(2), two_class_source(), "test", **SETTINGS)
    groups = {"a": "north", "b": "north", "c": "south", "d": "south"}
    result = replace(result, groups=groups, grouped_by="site")
    found = result.subgroups()
    assert {name: group.dice() for name, group in found.items()} == {"north": 0.75, "south": 0.0}
    record = result.to_dict()["subgroups"]
    assert (record["by"], record["without"], record["groups"]["south"]["num_cases"]) == ("site", 1, 2)
    assert record["groups"]["north"]["summary"]["fusion"]["mean"]["dice"]["mean"] == 0.75
    text = shown(subgroup_table(result))
    assert "fusion by site" in text and "1 case in no subgroup" in text
    assert next(line for line in text.splitlines() if "mean of these" in line).split()[3:5] == ["2", "37.50"]
    assert {row["case"]: row["group"] for row in csv.DictReader(result.write(tmp_path, "x")[0].open())} == {
        **groups,
        "e": "",
    }


def test_every_table_fits_80_columns():
    result = replace(
        evaluate(read_off(3), three_class_source(), "test", **SETTINGS),
        groups={"a": "hospital of the north", "b": "south"},
        grouped_by="site",
    )
    for table in (score_table(result), error_table(result), subgroup_table(result)):
        text, wide = shown(table, width=80), shown(table, width=200)
        assert "…" not in text and max(map(len, text.splitlines())) <= 80
        # Folding is no loss: every number of the wide table is in the narrow one.
        assert sorted(re.findall(r"[±(]?[\d./]+[\d)]", text)) == sorted(re.findall(r"[±(]?[\d./]+[\d)]", wide))


def test_masks_of_anyone_are_scored_as_predictions_are():
    source = two_class_source()
    scores = score(((case, {"tool": pair[0]}) for case, pair in source.cases.items()), source, list("abcde"), "test")
    ours = evaluate(read_off(2), source, "test", outputs=["fusion"], **SETTINGS)
    assert [row | {"output": "fusion"} for row in scores.rows] == ours.rows
