"""A search draws the same settings from the same results, whoever is killed, and counts every draw once."""

import json
import os
import subprocess
import sys
import textwrap
from collections import Counter

import pytest
from optuna import pruners, samplers
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from sweep_stubs import Bench

from knowsam.cli.main import run_command
from knowsam.sweep import worker
from knowsam.sweep.search import ask, distributions, make_pruner, make_sampler, setting_text
from knowsam.sweep.spec import Search
from knowsam.sweep.status import best_item, summary
from knowsam.sweep.store import Store
from knowsam.sweep.worker import validation_dice, work

LR = "optim.subnets.lr"
SPACE = {LR: {"low": 1e-5, "high": 0.1, "log": True}, "method.name": ["knowsam", "mean_teacher"]}
# Its Dice is best at a learning rate of 0.01, and a little better for mean_teacher.
PEAK = """
import math
text = open(config).read()
rate = float(text.partition("  subnets:")[2].partition("lr: ")[2].split()[0])
dice = 0.9 - 0.1 * abs(math.log10(rate) + 2) + 0.01 * ("name: mean_teacher" in text)
tell("ran")
validation(10, dice - 0.1)
validation(20, round(dice, 6))
"""


@pytest.fixture
def bench(tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "POLL", 0.02)
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # no power fails here, and the disk may be slow
    bench = Bench(tmp_path)
    bench.program(PEAK)
    return bench


def quiet(line: str) -> None:
    pass


def drawn(store: Store) -> list[dict]:
    return [trial.params for trial in store.study.get_trials()]


# ---------------------------------------------------------------- translation


def test_distributions():
    assert distributions(
        {
            "a": ["x", None, 1.5, True],
            "b": {"low": 1, "high": 9},
            "c": {"low": 1, "high": 9, "step": 2},
            "d": {"low": 1, "high": 64, "log": True},
            "e": {"low": 0.0, "high": 1},
            "f": {"low": 0, "high": 1, "step": 0.25},
            "g": {"low": 1e-5, "high": 0.1, "log": True},
        }
    ) == {
        "a": CategoricalDistribution(["x", None, 1.5, True]),
        "b": IntDistribution(1, 9),
        "c": IntDistribution(1, 9, step=2),
        "d": IntDistribution(1, 64, log=True),
        "e": FloatDistribution(0.0, 1.0),
        "f": FloatDistribution(0.0, 1.0, step=0.25),
        "g": FloatDistribution(1e-5, 0.1, log=True),
    }


def test_setting_text():
    params = {
        LR: 0.001318256,
        "train.tensorboard": True,
        "method.name": "knowsam",
        "train.max_steps": 1000,
        "skd": None,
    }
    assert setting_text(params) == "lr=0.001318, tensorboard=true, name=knowsam, max_steps=1000, skd=none"
    assert setting_text({LR: 1e-05}) == "lr=1e-05"


@pytest.mark.parametrize(
    ("name", "kind"),
    [("tpe", samplers.TPESampler), ("random", samplers.RandomSampler), ("qmc", samplers.QMCSampler)],
)
def test_samplers(name, kind):
    assert type(make_sampler(Search(SPACE, sampler=name), 3)) is kind


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("none", pruners.NopPruner),
        ("median", pruners.MedianPruner),
        ("asha", pruners.SuccessiveHalvingPruner),
        ("hyperband", pruners.HyperbandPruner),
    ],
)
def test_pruners(name, kind):
    for steps in (0, 100):
        assert type(make_pruner(Search(SPACE, pruner=name, warmup_steps=steps, startup_trials=0))) is kind


# ---------------------------------------------------------------- a whole search


def test_a_search(bench, capsys):
    search = {"space": SPACE, "trials": 6, "pruner": "none", "startup_trials": 3}
    file = bench.write(search=search, overrides={"train.clip_norm": 1.5}, seeds=[4], launcher={"workers": 2})
    assert run_command("sweep", [str(file)]) == 0
    store = Store(bench.folder)
    items = store.trials()
    assert len(items) == len({item["key"] for item in items}) == len(bench.told()) == 6
    assert {item["state"] for item in items} == {"complete"} and store.left() == 0
    for item in items:
        params = {key: item["overrides"][key] for key in SPACE}
        assert item["overrides"] == params
        assert 1e-5 <= params[LR] <= 0.1
        assert (item["setting"], item["seed"]) == (setting_text(params), 4)
        config = (bench.folder / "configs" / f"{item['key']}.yaml").read_text()
        assert "clip_norm: 1.5" in config and "seed: 4" in config
        assert item["value"] == validation_dice(bench.folder / item["folder"])[-1][1]
    best = best_item(items)
    assert best["value"] == max(item["value"] for item in items) == store.study.best_value
    said = capsys.readouterr().out
    assert said.splitlines()[-1].startswith(f"  best validation Dice {100 * best['value']:.2f} %: ")
    assert f"{LR}={best['overrides'][LR]}" in said and "next: knowsam compare" not in said

    assert run_command("sweep", [str(file)]) == 0
    assert len(bench.told()) == 6, "nothing is left"
    bench.write(search={**search, "trials": 8}, overrides={"train.clip_norm": 1.5}, seeds=[4])
    assert run_command("sweep", [str(file)]) == 0
    assert len(bench.told()) == 8, "two more"


def test_failed_trials_of_a_search_are_tried_again(bench, capsys):
    search = {"space": {**SPACE, "data.image_size": [64, 40]}, "trials": 5, "sampler": "random", "seed": 3}
    file = bench.write(search=search, seeds=[4], retries=0)
    bench.program("import sys\nsys.exit(3)")
    assert run_command("sweep", [str(file)]) == 1
    before = Store(bench.folder).trials()
    impossible = [item for item in before if not item["folder"]]
    assert {item["state"] for item in before} == {"failed"} and 0 < len(impossible) < 5

    bench.program(PEAK)
    assert run_command("sweep", [str(file)]) == 1
    assert bench.told() == [], "nothing is left to do"
    assert run_command("sweep", [str(file), "--retry-failed"]) == 1
    assert len(bench.told()) == 5 - len(impossible)
    after = Store(bench.folder).trials()
    assert {item["key"]: item["overrides"] for item in after} == {item["key"]: item["overrides"] for item in before}
    assert [item for item in after if item["state"] == "failed"] == impossible
    assert run_command("sweep", [str(file), "--retry-failed"]) == 1
    assert len(bench.told()) == 5 - len(impossible), "what is complete stays so"
    said = capsys.readouterr().out
    assert f"bench: {5 - len(impossible)} complete, {len(impossible)} failed (exit 78)" in said


def test_dry_run_and_status(bench, capsys):
    file = bench.write(search={"space": SPACE, "trials": 3}, seeds=[4])
    assert run_command("sweep", [str(file), "--dry-run", "--no-timing"]) == 0
    assert "bench: 3 trials" in capsys.readouterr().out and not bench.folder.exists()
    Store.enrol(bench.load(search={"space": SPACE, "trials": 3}, seeds=[4]))
    assert work(bench.folder, max_trials=1, say=quiet) == 1
    assert run_command("sweep", ["status", str(bench.folder)]) == 75
    assert "bench: 1 complete, 2 left" in capsys.readouterr().out


@pytest.mark.parametrize("sampler", ["tpe", "random", "qmc"])
@pytest.mark.usefixtures("bench")
def test_draws_depend_on_the_seed_and_the_results_alone(tmp_path, sampler):
    """Straight through, or with a new process after each trial; not with another seed."""
    if sampler == "qmc":
        pytest.importorskip("scipy")
    trials = 12 if sampler == "tpe" else 4  # TPE draws its first ten at random
    found = []
    for name, seed in (("straight", 1), ("piecewise", 1), ("other", 2)):
        bench = Bench(tmp_path, name)
        bench.program(PEAK)
        Store.enrol(bench.load(search={"space": SPACE, "trials": trials, "sampler": sampler, "seed": seed}))
        while work(bench.folder, max_trials=1 if name == "piecewise" else None, say=quiet):
            pass
        found.append(drawn(Store(bench.folder)))
    assert [len(params) for params in found] == [trials] * 3
    assert found[0] == found[1] != found[2]
    assert len({params[LR] for params in found[0]}) == trials


@pytest.mark.usefixtures("bench")
def test_tpe_looks_at_the_results(tmp_path):
    """The same draws at first; others once the results differ."""
    found = []
    for name, program in (("low", PEAK), ("high", PEAK.replace("+ 2)", "+ 4)"))):
        bench = Bench(tmp_path, name)
        bench.program(program)
        Store.enrol(bench.load(search={"space": SPACE, "trials": 13}))
        work(bench.folder, say=quiet)
        found.append(drawn(Store(bench.folder)))
    assert found[0][:10] == found[1][:10] and found[0] != found[1]


# ---------------------------------------------------------------- draws that cannot or need not be run


def test_impossible_settings_are_failed_and_counted(bench):
    search = {"space": {"data.image_size": {"low": 32, "high": 40}}, "trials": 9, "sampler": "random"}
    Store.enrol(bench.load(search=search))
    bench.program("tell('ran')")
    work(bench.folder, say=quiet)
    store = Store(bench.folder)
    items = store.trials()
    assert len(items) == 9 and store.left() == 0
    bad = [item for item in items if item["overrides"]["data.image_size"] % 16]
    assert len(bad) >= 5, "of nine sizes one is divisible by 16"
    for item in bad:
        assert (item["state"], item["exit_code"]) == ("failed", 78)
        assert "data.image_size: must be at least 32 and divisible by 16, got" in item["message"]
    assert summary(store)[1] == 1
    assert len(bench.told()) == len({item["overrides"]["data.image_size"] for item in items if item not in bad})


def test_settings_drawn_before_are_not_run_again(bench):
    Store.enrol(bench.load(search={"space": {"method.name": ["knowsam", "supervised"]}, "trials": 8}))
    work(bench.folder, say=quiet)
    store = Store(bench.folder)
    items = store.trials()
    assert len(items) == 8 and store.left() == 0
    keys = Counter(item["key"] for item in items)
    assert Counter(key for key, _ in bench.told()) == dict.fromkeys(keys, 1)
    seen = {}
    for item in items:
        assert item["state"] == "complete"
        if item["key"] in seen:
            assert item["message"] == "the same settings as an earlier trial, which is complete"
            assert (item["value"], item["folder"]) == (seen[item["key"]]["value"], seen[item["key"]]["folder"])
        seen.setdefault(item["key"], item)


def test_settings_drawn_before_that_failed_or_run_now(bench):
    store = Store.enrol(bench.load(search={"space": {"method.name": ["knowsam"]}, "trials": 3}))
    claim = store.claim()
    assert Store(bench.folder).claim() is None, "all further draws are the same, and it is being run"
    assert [it["state"] for it in store.trials()] == ["running", "pruned", "pruned"]
    assert store.trials()[1]["message"] == "the same settings as an earlier trial, which is running"
    claim.finish("failed", exit_code=1, message="broken", dice=None)
    assert store.left() == 0 and summary(store)[1] == 1


def test_a_trial_without_validation_counts(bench):
    bench.program("tell('ran')")
    Store.enrol(bench.load(search={"space": SPACE, "trials": 3}))
    assert work(bench.folder, say=quiet) == 3
    store = Store(bench.folder)
    assert [(it["state"], it["value"]) for it in store.trials()] == [("complete", None)] * 3
    assert best_item(store.trials()) is None and summary(store) == ("bench: 3 complete", 0)


# ---------------------------------------------------------------- pruning


# The first three are good; the fourth falls behind and waits to be ended.
FALLS = """
number = sum(1 for _ in open(ledger)) if os.path.exists(ledger) else 0
tell("start")
for step in (10, 20, 30):
    validation(step, (80 + number) / 100 if number < 3 else 0.2)
if number >= 3:
    while not stop:
        time.sleep(0.01)
    sys.exit(75)
"""


@pytest.mark.parametrize("pruner", ["median", "asha"])
def test_what_falls_behind_is_ended(bench, pruner):
    bench.program(FALLS)
    search = {"space": SPACE, "trials": 4, "sampler": "random", "pruner": pruner, "startup_trials": 3}
    Store.enrol(bench.load(search=search))
    assert work(bench.folder, say=quiet) == 4
    store = Store(bench.folder)
    items = store.trials()
    assert [it["state"] for it in items] == ["complete"] * 3 + ["pruned"]
    assert [it["value"] for it in items] == [0.8, 0.81, 0.82, 0.2]
    assert (items[3]["exit_code"], items[3]["message"]) == (75, "validation Dice fell behind the other trials")
    assert summary(store)[0].splitlines()[0] == "bench: 3 complete, 1 pruned" and summary(store)[1] == 0
    assert best_item(items)["value"] == 0.82
    # However quickly a trial ended, the study knows all of its validations.
    reported = [trial.intermediate_values for trial in store.study.get_trials()]
    assert reported[:3] == [dict.fromkeys((10, 20, 30), (80 + i) / 100) for i in range(3)]
    assert reported[3].items() <= dict.fromkeys((10, 20, 30), 0.2).items() and reported[3]
    assert work(bench.folder, say=quiet) == 0 and len(bench.told()) == 4


@pytest.mark.parametrize(
    "options",
    [
        {"pruner": "none"},
        {"pruner": "median", "startup_trials": 4},
        {"pruner": "median", "startup_trials": 0, "warmup_steps": 31},
        {"pruner": "asha", "warmup_steps": 31},
        {"pruner": "hyperband", "warmup_steps": 31},
    ],
)
def test_what_may_not_be_ended_yet_is_not(bench, options):
    bench.program(
        FALLS.replace("while not stop:", "for _ in range(20):").replace("exit(75)", "exit(75 if stop else 0)")
    )
    Store.enrol(bench.load(search={"space": SPACE, "trials": 4, "sampler": "random", **options}))
    assert work(bench.folder, say=quiet) == 4
    assert [it["state"] for it in Store(bench.folder).trials()] == ["complete"] * 4


def test_validation_dice(tmp_path):
    assert validation_dice(tmp_path) == []
    records = [
        {"step": 1, "kind": "train", "loss": 1.0, "dice_loss": 0.9},
        {"step": 2, "kind": "val", "dice_fusion": 0.25, "dice_unet": 0.75},
        {"step": 3, "kind": "val", "dice_fusion": None},  # it was not a number
        {"step": 4, "kind": "val"},
        {"kind": "val", "dice_fusion": 0.5},
        [],
        {"step": 5, "kind": "val", "dice_teacher": 1},
    ]
    text = "\n".join(map(json.dumps, records)) + '\n{"step": 6, "kind": "val", "dice_te'
    (tmp_path / "metrics.jsonl").write_text(text)
    assert validation_dice(tmp_path) == [(2, 0.25), (5, 1.0)]
    assert worker.best_dice(tmp_path) == 1.0


# ---------------------------------------------------------------- several workers, and those that are killed


def test_a_drawn_trial_outlives_its_worker(bench):
    sweep = bench.load(search={"space": SPACE, "trials": 2})
    Store.enrol(sweep)
    program = "import os, sys; from knowsam.sweep.store import Store; Store(sys.argv[1]).claim(); os._exit(9)"
    assert subprocess.run([sys.executable, "-c", program, str(bench.folder)]).returncode == 9
    store = Store(bench.folder)
    first = store.trials()[0]
    assert first["state"] == "running" and not store.held()
    claim = store.claim()
    assert claim.resumed and claim.number == 0
    assert {key: claim.item[key] for key in ("key", "folder", "setting", "seed")} == {
        key: first[key] for key in ("key", "folder", "setting", "seed")
    }
    assert (bench.folder / "configs" / f"{claim.item['key']}.yaml").is_file()
    claim.release()
    assert work(bench.folder, say=quiet) == 2
    assert len(store.trials()) == 2 and len(bench.told()) == 2


def test_a_draw_that_was_not_written_down_is_made_again(bench):
    search = {"space": SPACE, "trials": 2}
    store = Store.enrol(bench.load(search=search))
    lost = ask(store.study, Search(**search), 0)  # and then its process died
    assert store.trials() == [] and store.left() == 2
    assert work(bench.folder, say=quiet) == 2
    numbers = [(t.number, t.state.name, "folder" in t.user_attrs) for t in store.study.get_trials()]
    assert numbers == [(0, "FAIL", False), (1, "COMPLETE", True), (2, "COMPLETE", True)]
    assert lost.number == 0 and len(store.trials()) == 2 and summary(store)[1] == 0


def test_workers_draw_one_after_the_other(bench):
    """Four processes draw as fast as they can: no number twice, none too many."""
    Store.enrol(bench.load(search={"space": SPACE, "trials": 24, "sampler": "random"}))
    program = """
        import sys
        from knowsam.sweep.store import Store
        store = Store(sys.argv[1])
        while (claim := store.claim()) is not None:
            print(claim.number, claim.resumed, flush=True)
            claim.finish("complete", exit_code=0, message=None, dice=0.5)
        """
    command = [sys.executable, "-c", textwrap.dedent(program), str(bench.folder)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    said = [line for process in running for line in process.communicate(timeout=300)[0].splitlines()]
    assert [process.returncode for process in running] == [0] * 4
    assert sorted(said) == sorted(f"{number} False" for number in range(24))
    store = Store(bench.folder)
    assert len(store.study.get_trials()) == 24 and store.left() == 0
    # Each draw is a function of its number, so the order in which they came does not matter.
    straight = Bench(bench.root, "straight")
    alone = Store.enrol(straight.load(search={"space": SPACE, "trials": 24, "sampler": "random"}))
    while (claim := alone.claim()) is not None:
        claim.finish("complete", exit_code=0, message=None, dice=0.5)
    assert drawn(store) == drawn(alone)
