"""``knowsam compare`` as a user types it, on hand-made runs and on real ones."""

import json
from pathlib import Path

import pytest
from report_runs import LAST, write_run, write_sweep

from knowsam.cli.main import run_command

ROOT = Path(__file__).resolve().parents[2]


def compare(*arguments) -> int:
    return run_command("compare", [str(argument) for argument in arguments])


def dice(lift=0.0):
    return {f"c{i}": 0.3 + 0.05 * i + lift * (1 + 0.1 * i) for i in range(8)}


@pytest.fixture
def runs(tmp_path):
    for seed in (0, 1):
        write_run(tmp_path / f"full_{seed}", dice(0.1 + seed / 50), seed=seed, outputs={"sam": dice(0.05)})
        write_run(tmp_path / f"plain_{seed}", dice(seed / 50), seed=seed, config="method.name=supervised")
    return tmp_path


def test_the_table_and_what_it_means(runs, capsys):
    assert compare(f"full={runs}/full_*", f"plain={runs}/plain_*", "--baseline", "plain") == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines if line.startswith((" plain", " full"))]
    # 0.3 .. 0.65 has the mean 0.475; the lift is 1.35 times its size on average.
    assert rows[0][:6] == ["plain", "(baseline)", "2", "48.85", "±", "1.91"]
    assert rows[1][:5] == ["full", "2", "62.35", "±", "1.91"] and rows[1][-5:] == [
        "+13.50",
        "±",
        "0.00",
        "0.008",
        "+1.00",
    ]
    text = " ".join(lines)
    assert "'plain' (named by --baseline)" in text and "best.pt, chosen by: validation Dice of fusion" in text
    assert "-o FOLDER" in text and not (runs / "comparison").exists()


def test_options(runs, capsys):
    arguments = (f"a={runs}/full_0", "--output", "sam", "--metric", "hd95,dice", "--metric", "dice", "-o", runs / "out")
    assert compare(*arguments) == 0
    text = capsys.readouterr().out
    assert "HD95 px ↓" in text and text.index("HD95") < text.index("Dice") and "Output: sam." in text
    assert sorted(p.name for p in (runs / "out").iterdir()) == [f"comparison.{e}" for e in ("csv", "html", "md", "tex")]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--metric", "dise"), 2, "allowed, comma-separated: dice, iou, hd95, asd, nsd"),
        (("--allow", "everything"), 2, "splits, rules, budget, checkpoint"),
        (("--split", "train"), 2, "invalid choice"),
        (("--baseline", "nobody"), 78, "there is no setting 'nobody'"),
        (("--output", "sam"), 78, "no scores of output 'sam'"),
        (("--split", "val"), 66, "no scores on val"),
    ],
)
def test_mistakes(runs, capsys, arguments, code, message):
    assert compare(runs / "full_0", runs / "plain_0", *arguments) == code
    text = capsys.readouterr()
    assert message in text.err and text.out == ""


def test_a_mixture_is_refused_and_allowed(runs, capsys):
    write_run(runs / "short", dice(), config="train.max_steps=300 method.name=supervised", checkpoint=LAST)
    assert compare(runs / "full_0", runs / "short") == 65
    text = capsys.readouterr().err
    assert "budget: train.max_steps: 600 for " in text and "checkpoint: scored: best on val for" in text
    assert "--allow budget,checkpoint" in text
    assert compare(runs / "full_0", runs / "short", "--allow", "budget,checkpoint") == 0
    assert capsys.readouterr().out.count("Mixed because it was asked for") == 2
    assert compare(runs / "full_0", runs / "short", "--allow", "budget", "--allow", "checkpoint") == 0


def test_a_sweep_has_a_place_for_its_comparison(tmp_path, capsys):
    trials = [{"setting": "full"}, {"setting": "less"}, {"setting": "less", "seed": 1, "state": "failed"}]
    trials[2] |= {"exit_code": 79, "message": f"a loss in {tmp_path}"}
    folders = write_sweep(tmp_path / "sweep", trials, baseline="less")
    write_run(folders[0], dice(0.1))
    write_run(folders[1], dice(), config="method.name=supervised")
    assert compare(tmp_path / "sweep") == 0
    text = capsys.readouterr().out
    assert "1 of 2 runs of 'less' failed (seed 1, exit 79: numeric)" in text and f"a loss in {tmp_path}" in text
    out = tmp_path / "sweep" / "comparison"
    assert (out / "comparison.html").exists() and (out / "differences_dice.svg").exists()
    assert not any(str(tmp_path).encode() in file.read_bytes() for file in out.iterdir())


def test_the_file_of_a_sweep_is_no_folder(tmp_path, capsys):
    (tmp_path / "ablation.yaml").write_text("base: x.yaml")
    assert compare(tmp_path / "ablation.yaml") == 78
    assert "runs/sweeps/ablation" in capsys.readouterr().err


def test_real_runs(lab, tmp_path, capsys):
    """Train, evaluate, compare; and the scores say which checkpoint they are of."""
    arguments = ("train.max_steps=2", "train.validate_every=1", "data.unlabelled_batch=0", "method.name=supervised")
    for seed in (1, 2):
        assert lab.train(tmp_path / f"run_{seed}", *arguments, f"train.seed={seed}") == 0
        assert run_command("evaluate", [str(tmp_path / f"run_{seed}"), "--device", "cpu"]) == 0
    scores = json.loads((tmp_path / "run_1" / "evaluation" / "test.json").read_text())
    best = max(record["dice_fusion"] for record in lab.metrics(tmp_path / "run_1") if record["kind"] == "val")
    assert scores["checkpoint"] == {
        "file": "best.pt",
        "step": scores["checkpoint"]["step"],
        "outputs": ["fusion", "unet", "vnet"],
        "chosen_by": "validation Dice of fusion, mean over classes",
        "split": "val",
        "value": pytest.approx(best),
    }
    assert scores["checkpoint"]["step"] in (1, 2)
    capsys.readouterr()
    assert compare(tmp_path / "run_1", tmp_path / "run_2", "-o", tmp_path / "out") == 0
    text = capsys.readouterr().out
    mean = scores["summary"]["fusion"]["mean"]["dice"]["mean"]
    assert "supervised" in text and "2 test cases" in text and "best.pt" in text
    assert f"{mean:.10g}" in (tmp_path / "out" / "comparison.csv").read_text()
    assert run_command("evaluate", [str(tmp_path / "run_2"), "--device", "cpu", "--checkpoint", "last"]) == 0
    scores = json.loads((tmp_path / "run_2" / "evaluation" / "test.json").read_text())
    assert scores["checkpoint"] == {
        "file": "last.pt",
        "step": 2,
        "outputs": ["fusion", "unet", "vnet"],
        "chosen_by": "last step",
        "split": None,
        "value": None,
    }
    assert compare(tmp_path / "run_1", tmp_path / "run_2") == 65
    assert "best on val for 'supervised' seed 1 and last step for 'supervised' seed 2" in capsys.readouterr().err
