"""Tables and numbers as text: two decimals, and every character that a format would take for its own escaped."""

import pytest

from knowsam.report.numbers import exact, mean_sd, metric_name, number
from knowsam.report.table import Table, latex_text, markdown_text, to_csv, to_latex, to_markdown


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
    assert mean_sd("dice", 0.5, 0.021) == "50.00 ± 2.10" and mean_sd("dice", 0.5, None) == "50.00"
    assert metric_name("dice", "px") == "Dice % ↑" and metric_name("hd95", "mm", arrow=False) == "HD95 mm"
    assert [exact(value) for value in (None, 1 / 3, 12, 1e-7)] == ["", "0.3333333333", "12", "1e-07"]
