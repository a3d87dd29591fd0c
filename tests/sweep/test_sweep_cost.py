"""What a sweep is said to cost: trials counted, steps timed once a setting, problems kept apart."""

import pytest
from sweep_stubs import Bench

from knowsam.cli.main import run_command
from knowsam.config import parse_config
from knowsam.errors import NotFoundError
from knowsam.sweep.cost import sweep_cost


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path)


def test_every_setting_is_timed_once_and_counts_for_all_its_seeds(bench):
    sweep = bench.load(grid={"train.max_steps": [10, 30]}, seeds=[4, 5])
    asked = []

    def seconds(experiment):
        train = parse_config(experiment, "asked").train
        asked.append((train.max_steps, train.seed))
        return 0.5

    cost = sweep_cost(sweep, seconds)
    assert asked == [(10, 4), (30, 4)]
    assert [(item.setting, item.seeds, item.steps, item.run_seconds) for item in cost.settings] == [
        ("max_steps=10", [4, 5], 10, 5.0),
        ("max_steps=30", [4, 5], 30, 15.0),
    ]
    assert [key for item in cost.settings for key in item.keys] == [trial.key for trial in sweep.trials]
    assert (cost.trials, cost.seconds, cost.unknown) == (4, 40.0, {})


def test_a_search_is_timed_at_its_first_point(bench):
    sweep = bench.load(search={"space": {"train.max_steps": {"low": 10, "high": 20}}, "trials": 7}, seeds=[3])
    asked = []
    cost = sweep_cost(sweep, lambda experiment: asked.append(experiment) or 2.0)
    assert [parse_config(text, "asked").train.max_steps for text in asked] == [10]
    (item,) = cost.settings
    assert (item.experiment, item.setting, item.seeds, item.keys) == ("search", "its first point", [3], [])
    assert (cost.trials, cost.seconds) == (7, 7 * 10 * 2.0)


def test_what_cannot_be_built_is_of_unknown_cost(bench):
    sweep = bench.load(grid={"train.max_steps": [10, 30]})

    def seconds(experiment):
        if "max_steps: 30" in experiment:
            raise NotFoundError("no data here")
        return 1.0

    cost = sweep_cost(sweep, seconds)
    assert [item.run_seconds for item in cost.settings] == [10.0, None]
    assert cost.seconds == 10.0 and cost.unknown == {"no data here": ["base, max_steps=30"]}


@pytest.mark.parametrize("timing", [True, False])
def test_nothing_is_timed_unless_asked(bench, capsys, monkeypatch, timing):
    def seconds(workload, threads):
        assert timing and threads == 2 and workload.options.max_steps == 40
        return 0.25

    monkeypatch.setattr("knowsam.benchmark.step.step_seconds", seconds)
    file = bench.write(grid={"train.max_steps": [40]}, launcher={"threads": 2})
    assert run_command("sweep", [str(file), "--dry-run", *([] if timing else ["--no-timing"])]) == 0
    said = capsys.readouterr().out
    assert ("expected: 0:00:10 of training steps" in said) == timing and ("0.250" in said) == timing
