"""What the page says of rates, subgroups, other data and missed structures; and that its tables fit a small screen."""

import pytest
from browser import CHROMIUM, Browser
from report_pages import records_of, shown
from report_runs import CASES, SUPERVISED, scores, write_run

from knowsam.report.page.panels import choose_cases
from knowsam.report.page.pictures import Pictures
from knowsam.report.page.record import scored_runs
from knowsam.report.page.score_tables import worst_cases
from knowsam.report.page.write import main_outputs, write_page


def test_rates_stand_in_a_table_of_their_own(tmp_path):
    page = shown(write_run(tmp_path / "run", scores(1) | {"c00": None, "c01": None}))
    head, row = page.table("pixels and structures found")
    assert head[2:] == [
        "precision % ↑",
        "recall % ↑",
        "specificity % ↑",
        "image sensitivity % ↑",
        "image specificity % ↑",
    ]
    assert row[5:] == ["100.00 (10 of 10)", "100.00 (2 of 2)"]
    assert page.table("12 test cases, mean ± sd over cases")[0][3:8] == [
        "Dice % ↑",
        "IoU % ↑",
        "HD95 px ↓",
        "ASD px ↓",
        "NSD % ↑",
    ]


def test_subgroups_and_other_data(tmp_path):
    groups = {case: "north" if i < 4 else "south" for i, case in enumerate(CASES[:11])}
    a = write_run(tmp_path / "a", scores(1), groups=groups, grouped_by="site", others={"etis": {"x": 0.5, "y": 0.7}})
    b = write_run(tmp_path / "b", scores(2), config=SUPERVISED)
    page = shown(a, b)
    rows = page.table("scores by site")
    assert [row[:3] for row in rows[1:]] == [["a", "north", "4"], ["a", "south", "7"]]
    north = sum(list(scores(1).values())[:4]) / 4
    assert rows[1][3].startswith(f"{100 * north:.2f} ±")
    assert any("1 cases of a in none" in caption for caption in page.tables)
    assert page.table("test of other data")[1][:4] == ["a on etis", "fusion", "2", "60.00 ± 14.14"]
    assert not any("other data" in caption for caption in shown(b).tables)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Twenty cases of two classes; c00 and c01 miss one and are good in the other, most are bad in both."""
    import report_runs

    first = {f"c{i:02d}": 0.95 - 0.01 * i for i in range(20)}
    second = dict(first) | {"c00": 0.0, "c01": 0.0}

    def row(case, value, **more):
        return real(case, value, **more, status="missed" if value == 0 else "ok")

    real = report_runs.row
    monkeypatch.setattr(report_runs, "row", row)
    first |= {f"c{i:02d}": 0.2 for i in range(5, 20)}
    second |= {f"c{i:02d}": 0.2 for i in range(5, 20)}
    return write_run(tmp_path / "run", {"liver": first, "tumour": second})


def test_missed_structures_are_among_the_worst(run):
    (scored,) = scored_runs(records_of(run))
    table = worst_cases(scored, "fusion", count=10)
    assert (
        "the 10 lowest Dice of fusion, and 2 of 2 others that miss a structure; 2 of 20 cases miss one" in table.title
    )
    assert [row[0] for row in table.rows[10:]] == ["c01", "c00"]
    assert [row[-1] for row in table.rows[9:]] == ["-", "tumour missed", "tumour missed"]
    (none,) = {row[-1] for row in worst_cases(scored, "fusion", count=10).rows[:10]}
    assert none == "-"


def test_missed_structures_are_pictured(run):
    (scored,) = scored_runs(records_of(run))
    picks = choose_cases([scored], ["fusion"], 2)
    assert [pick.case for pick in picks if pick.why == "a structure is missed"] == ["c01", "c00"]
    assert len({pick.case for pick in picks}) == len(picks)


def test_no_miss_is_said_too(tmp_path):
    (scored,) = scored_runs(records_of(write_run(tmp_path / "run", scores(1))))
    assert worst_cases(scored, "fusion").title.endswith("; no case misses a structure")
    assert {pick.why for pick in choose_cases([scored], ["fusion"], 2)} == {"best", "median", "worst"}


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_every_table_fits_1280_pixels(tmp_path):
    from report_runs import compared

    from knowsam.report.compare.write import write

    wide = {"a structure with a long name": scores(1), "tumour": scores(2), "oedema": scores(3)}
    runs = [
        write_run(
            tmp_path / f"{name}_labelled_10pct_seed{seed}", wide, seed=seed, config=config, others={"etis": scores(4)}
        )
        for name, config in (("knowsam_with_adapters", "train.clip_norm=1.0"), ("supervised", SUPERVISED))
        for seed in (0, 1)
    ]
    records = records_of(*runs)
    pages = [write_page(tmp_path / "page.html", records, main_outputs(records, None), Pictures())[0]]
    pages += [file for file in write(compared(runs), tmp_path / "out") if file.suffix == ".html"]
    script = """JSON.stringify([...document.querySelectorAll(".scroll")].filter(s => s.scrollWidth > s.clientWidth)
        .map(s => s.getAttribute("aria-label")))"""
    with Browser(tmp_path / "profile") as browser:
        browser.emulate(1280)
        for page in pages:
            browser.open(page)
            browser.value("document.querySelectorAll('details').forEach(d => d.open = true)")
            assert browser.value("document.querySelectorAll('.scroll').length") > 8
            assert browser.value(script) == "[]", page.name
