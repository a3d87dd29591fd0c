"""The files: escapes, self-contained page, and the same bytes for the same runs wherever they lie."""

import csv
import io
import re
import shutil
from html.parser import HTMLParser

import pytest
from report_runs import write_run, write_sweep

from knowsam.cli.compare import reader
from knowsam.errors import StorageError
from knowsam.report.collect import collect
from knowsam.report.comparison import compare
from knowsam.report.markup import latex_text, markdown_text, to_csv, to_latex, to_markdown
from knowsam.report.statistics import Spread
from knowsam.report.tables import Table, mean_sd, number, probability
from knowsam.report.write import write

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


# ---------------------------------------------------------------- pieces


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("50% & $x_1$", r"50\% \& \$x\_1\$"),
        (r"#{a}~^\ ", r"\#\{a\}\textasciitilde{}\textasciicircum{}\textbackslash{}"),
        ('a < b > c | "d"', r"a \textless{} b \textgreater{} c \textbar{} ''d''"),
        ("1.0 ± 2.0 Δ ↑ ↓", r"1.0 $\pm$ 2.0 $\Delta$ $\uparrow$ $\downarrow$"),
        ("two\nlines", "two lines"),
    ],
)
def test_latex_escapes(text, shown):
    assert latex_text(text) == shown.rstrip()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a|b*c`d<e[f]\\", r"a\|b\*c\`d\<e\[f\]" + r"\\"),
        ("data.labelled=labelled_5pct", "data.labelled=labelled_5pct"),
        ("_lead_ x_", r"\_lead\_ x\_"),
        ("two\nlines", "two lines"),
    ],
)
def test_markdown_escapes(text, shown):
    assert markdown_text(text) == shown


def test_latex_table():
    table = Table(
        "results", "a & b", ["setting", "Δ"], [["no_SKD", "-1.50 ± 0.20"], ["x-1", "+2.00"]], strong=frozenset({1})
    )
    text = to_latex(table, ["50 %."])
    assert r"\caption{a \& b.}" in text and r"\begin{tabular}{@{}lr@{}}" in text
    assert r"no\_SKD & $-$1.50 $\pm$ 0.20 \\" in text and r"\textbf{x-1} & \textbf{+2.00} \\" in text
    rules = [line.strip() for line in text.splitlines() if "rule" in line]
    assert rules == [r"\toprule", r"\midrule", r"\bottomrule"] and "50 \\%.}" in text
    assert to_markdown(table).splitlines()[2:] == [
        "| setting | Δ |",
        "| --- | ---: |",
        "| no_SKD | -1.50 ± 0.20 |",
        "| **x-1** | **+2.00** |",
    ]


def test_csv_runs_no_formula():
    text = to_csv([{"a": "=cmd()", "b": "-1.5"}, {"a": "@x", "b": "1e-05"}])
    assert text.splitlines() == ["a,b", "'=cmd(),-1.5", "'@x,1e-05"]


def test_numbers():
    assert number("dice", 0.70361) == "70.36" and number("hd95", 12.3456) == "12.35" and number("asd", None) == "-"
    assert number("nsd", -0.00001, signed=True) == "0.00" and number("iou", 0.01, signed=True) == "+1.00"
    assert mean_sd("dice", Spread(0.5, 0.021, 3)) == "50.00 ± 2.10" and mean_sd("dice", Spread(0.5, None, 1)) == "50.00"
    assert [probability(p) for p in (None, 0.0004, 0.0314, 1.0)] == ["-", "< 0.001", "0.031", "1.000"]


# ---------------------------------------------------------------- files


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
    assert len(records) == 2 * 5 + 2 * 3 * 5  # settings x metrics, then x classes and their mean
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


class Page(HTMLParser):
    """Tags left open, and everything that would make a browser fetch something."""

    VOID = ("meta", "br", "link", "img")

    def __init__(self):
        super().__init__()
        self.open, self.fetched, self.text, self.ids = [], [], "", []

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)
        if tag in ("script", "link", "img", "iframe", "object", "image"):
            self.fetched.append(tag)
        self.fetched += [v for k, v in attrs if k in ("src", "href", "xlink:href") and not v.startswith("#")]
        self.ids += [v for k, v in attrs if k == "id"]

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_stands_alone(sweep, tmp_path):
    text = written(sweep, tmp_path / "out")["comparison.html"].decode()
    page = Page()
    page.feed(text)
    assert page.open == [] and page.fetched == []
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
