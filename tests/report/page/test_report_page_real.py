"""The page of a real, tiny run: pictures of what its networks predict, what it cost, its pseudo-labels over time."""

import re
import shutil

import pytest
from browser import CHROMIUM, Browser
from report_pages import Page

from knowsam.cli.main import run_command
from knowsam.engine.checkpoint import load_checkpoint, save_checkpoint


@pytest.fixture(scope="module")
def run(lab, tmp_path_factory):
    folder = tmp_path_factory.mktemp("real") / "run"
    options = ("train.validate_every=2", "train.snapshot_every=1", "train.max_steps=4", "optim.subnets.lr=3e-2")
    assert lab.train(folder, *options, "--stop-at", "2") == 0
    assert lab.train(folder, *options, "--evaluate") == 0
    return folder


@pytest.fixture(scope="module")
def page(run, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "page.html"
    options = ("--cases", "1", "--pseudo-labels", "--pseudo-cases", "2", "-o", str(path))
    assert run_command("report", [str(run), *options]) == 0
    return path


def test_snapshots_hold_the_deployed_networks(lab, run):
    files = sorted(run.glob("snapshots/*"))
    assert [file.name for file in files] == [f"step_000000{step}.pt" for step in (1, 2, 3, 4)]
    last = load_checkpoint(files[-1])
    assert last["step"] == 4 and not any("sam" in name for name in last["deployed"])
    whole = lab.last(run)["method"]
    for name, value in last["deployed"].items():
        assert value.equal(whole[name]), "those of the step, under the names of the method"


def test_what_it_cost_is_counted_over_the_interruption(run):
    from knowsam.engine.log import read_metrics

    costs = [record for record in read_metrics(run / "metrics.jsonl") if record["kind"] == "cost"]
    assert [record["step"] for record in costs] == [2, 4]
    assert costs[1]["seconds"] > costs[0]["seconds"] > costs[0]["seconds_validation"] > 0
    assert costs[1]["seconds_validation"] > costs[0]["seconds_validation"]
    assert costs[1]["seconds"] > sum(v for k, v in costs[1].items() if k.startswith("seconds_"))
    assert costs[1]["peak_host_mib"] > 10


def test_the_page_has_everything(run, page):
    text = page.read_text()
    found = Page(text)
    assert found.asked == [] and str(run.parent) not in text
    assert "No pictures" not in found.text and "predicted anew, do not have" not in found.text
    assert text.count("data:image/png;base64,") == 2, "two test cases: best and worst"
    assert "SAM (vit_tiny) starts from RANDOM weights" in found.text
    head, row = found.table("time (h:mm:ss)")
    assert dict(zip(head, row, strict=True))["in all"] != "-"


def test_pseudo_labels_are_those_of_unlabelled_cases(lab, run, page):
    rows = Page(page.read_text()).table("unlabelled training cases")
    weights = [row[0] for row in rows[1:]]
    best = load_checkpoint(run / "best.pt")["step"]
    assert [int(row[3]) for row in rows[1:]] == sorted(int(row[3]) for row in rows[1:])
    assert "snapshots/step_0000001.pt" in weights and weights.count("snapshots/step_0000001.pt") == 1
    assert {row[1] for row in rows[1:] if row[0] == "best.pt"} == {"fusion", "unet", "vnet", "sam"}
    assert {int(row[3]) for row in rows[1:] if row[0] == "best.pt"} == {best}
    assert all(row[4].endswith("of 2") for row in rows[1:])
    assert "2 of 6 unlabelled training cases of the list 'all', evenly spaced" in Page(page.read_text()).text


def test_pictures_come_from_the_weights_that_were_scored(run, tmp_path):
    other = tmp_path / "run"
    shutil.copytree(run, other)
    state = load_checkpoint(other / "best.pt")
    last = [name for name in state["method"] if ".fusion_head.head." in name]  # negated, the classes change sides
    method = {name: -value if name in last else value for name, value in state["method"].items()}
    save_checkpoint(other / "best.pt", state | {"method": method}, keep_previous=False)
    assert run_command("report", [str(other), "--cases", "1"]) == 0
    assert "predicted anew, do not have the Dice of the scores" in (other / "report.html").read_text()
    (other / "best.pt").write_bytes(b"x")
    assert run_command("report", [str(other), "--cases", "1", "--pseudo-labels"]) == 0
    text = Page((other / "report.html").read_text()).text
    assert re.search(r"No pictures. …/best.pt: not a knowsam checkpoint", text) and "Not measured. …/best.pt" in text


def test_lists_without_unlabelled_masks_are_said(run, tmp_path):
    path = tmp_path / "x.html"
    options = ("--cases", "0", "--pseudo-labels", "--pseudo-masks", "labelled_10pct", "-o", str(path))
    assert run_command("report", [str(run), *options]) == 0
    text = Page(path.read_text()).text
    assert "Not measured. the list 'labelled_10pct' holds no case that was unlabelled in this run." in text
    assert "No pictures. None were asked for (--cases 0)." in text


def test_a_block_that_there_usually_is_none_of_is_a_changed_setting(lab, tmp_path):
    run = tmp_path / "taught"
    assert lab.train(run, "method.name=mean_teacher", "skd={weight: 1.0}", "train.max_steps=1") == 0
    assert run_command("report", [str(run), "--cases", "0"]) == 0
    text = (run / "report.html").read_text()
    changed = text[text.index("settings other than the defaults") :]
    assert "skd.weight" in changed[: changed.index("</table>")]


# ---------------------------------------------------------------- in a browser


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_a_browser_finds_nothing_wrong(page, tmp_path):
    with Browser(tmp_path / "profile") as browser:
        for width in (1280, 400):
            browser.emulate(width)
            browser.open(page)
            assert browser.value("document.documentElement.scrollWidth") <= width, "only tables scroll, in their boxes"
        assert browser.value("document.querySelectorAll('figure svg').length") > 10
        assert browser.value("[...document.querySelectorAll('.panels image')].every(i => i.getBBox().width > 0)")
        light = browser.value("getComputedStyle(document.body).backgroundColor")
        browser.emulate(400, dark=True)
        assert browser.value("getComputedStyle(document.body).backgroundColor") != light
        assert browser.value("getComputedStyle(document.querySelector('.truth')).display") != "none"
        browser.value("document.querySelector('#show-truth').click()")
        assert browser.value("getComputedStyle(document.querySelector('.truth')).display") == "none"
        browser.value("document.querySelector('.copy').open = true; document.querySelector('.copy button').click()")
        browser.value("new Promise(done => setTimeout(done, 50))")
        assert browser.value("document.querySelector('.copy button').textContent") in ("copied", "selected")
        browser.pdf(tmp_path / "page.pdf")
        assert browser.value("document.querySelectorAll('details:not(.copy):not([open])').length") == 0
        assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")
        assert browser.errors() == [] and set(browser.requests()) == {page.as_uri()}
