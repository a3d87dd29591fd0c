"""The files: escapes, self-contained page, and the same bytes for the same runs wherever they lie."""

import csv
import io
import re
import shutil

import pytest
from report_pages import Page
from report_runs import write_run, write_sweep

from knowsam.cli.reading import reader
from knowsam.errors import StorageError
from knowsam.report.compare.collect import collect
from knowsam.report.compare.comparison import compare
from knowsam.report.compare.statistics import Spread
from knowsam.report.compare.tables import probability, spread_text
from knowsam.report.compare.write import write

NASTY = r"50% & $x_1$ #{a}~^\ <b>|*`"


def lesions(lift):
    return {f"c{i}": min(1.0, 0.3 + 0.05 * i + lift * (1 + 0.1 * i)) for i in range(8)}


@pytest.fixture
def sweep(tmp_path):
    """Two experiments, one with label fractions and two classes; names that every format must escape."""
    trials = [{"setting": s, "experiment": "one", "seed": n} for s in ("full", NASTY) for n in (0, 1)]
    trials += [{"setting": f"m, {p} %", "experiment": "two <&>", "seed": n} for p in (10, 20) for n in (0, 1)]
    trials += [{"setting": "gone", "experiment": "one", "state": "failed", "exit_code": 79, "message": str(tmp_path)}]
    for i, trial in enumerate(trials):
        trial["folder"] = f"trials/{i}"
    folders = write_sweep(tmp_path / "sweep", trials, baseline="full", name="a <sweep> & more")
    for i, (folder, trial) in enumerate(zip(folders, trials, strict=True)):
        if trial["setting"] == "gone":
            continue
        dice = lesions(0.02 * i)
        if trial["experiment"] == "one":
            write_run(folder, dice, seed=trial["seed"], config="" if trial["setting"] == "full" else "train.threads=1")
        else:
            config = f"data.labelled=labelled_{trial['setting'][3:5]}pct"
            write_run(folder, {"liver": dice, "lesion": lesions(0)}, seed=trial["seed"], config=config)
    return tmp_path / "sweep"


def written(sweep, out):
    files = write(compare(collect([str(sweep)], reader("test"))), out)
    return {path.name: path.read_bytes() for path in files}


def test_spreads_and_probabilities_as_text():
    assert spread_text("dice", Spread(0.5, 0.021, 3)) == "50.00 ± 2.10"
    assert spread_text("hd95", Spread(0.5, None, 1), signed=True) == "+0.50" and spread_text("dice", None) == "-"
    assert [probability(p) for p in (None, 0.0004, 0.0314, 1.0)] == ["-", "< 0.001", "0.031", "1.000"]


def test_all_files_and_all_numbers(sweep, tmp_path):
    files = written(sweep, tmp_path / "out")
    assert list(files)[:4] == [f"comparison.{ending}" for ending in ("md", "tex", "csv", "html")]
    plots = [name for name in files if name.endswith(".svg")]
    assert "one_differences_dice.svg" in plots and "two_label_efficiency_hd95.svg" in plots and len(plots) == 10
    markdown = files["comparison.md"].decode()
    assert "(one_differences_dice.svg)" in markdown and "| **full (baseline)** | **2** |" in markdown
    assert "1 of 1 run of 'gone' failed (seed 0, exit 79: numeric): it has no row." in markdown
    assert "best.pt, chosen by: validation Dice of fusion, mean over classes; step 400" in markdown
    records = list(csv.DictReader(io.StringIO(files["comparison.csv"].decode())))
    # Settings x metrics, then x classes and their mean. Every case shows every structure: no image specificity.
    assert len(records) == 2 * 9 + 2 * 3 * 9
    assert [r["p"] for r in records if r["metric"] in ("recall", "image_sensitivity")] == [""] * 16
    first = records[5]
    assert (
        first["setting"] == NASTY and first["metric"] == "dice" and first["n_cases"] == "8" and first["p_is"] == "exact"
    )
    ours = [sum(lesions(0.02 * i).values()) / 8 for i in (2, 3)]
    assert float(first["mean"]) == pytest.approx(sum(ours) / 2, rel=1e-9) and first["labelled_cases"] == "16"
    assert float(first["p"]) == pytest.approx(2 / 2**8) and float(first["effect_r"]) == 1
    assert {record["class"] for record in records[10:]} == {"mean", "liver", "lesion"} and records[0][
        "class"
    ] == "lesion"


def test_equal_runs_give_equal_bytes_wherever_they_lie(sweep, tmp_path):
    files = written(sweep, tmp_path / "out")
    assert written(sweep, tmp_path / "again") == files
    shutil.copytree(sweep, tmp_path / "far" / "away")
    assert written(tmp_path / "far" / "away", tmp_path / "other") == files
    assert not [name for name, data in files.items() if str(tmp_path).encode() in data]


def test_the_page_stands_alone(sweep, tmp_path):
    text = written(sweep, tmp_path / "out")["comparison.html"].decode()
    page = Page(text)
    assert page.asked == [] and not re.search("<(script|img|image)", text)
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)", text)
    assert text.count("<svg ") == 10 and 'role="img" aria-label="Dice %: difference to &#x27;full&#x27;' in text
    assert NASTY in page.text and "a <sweep> & more" in page.text and "two <&>" in page.text
    assert len(page.ids) == len(set(page.ids))
    for reference in set(re.findall(r"(?:href=\"|url\()#([^\")]+)", text)):
        assert reference in page.ids


def test_a_folder_that_cannot_be_made(sweep, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot make"):
        written(sweep, tmp_path / "file" / "out")
