"""Every shipped sweep expands to trials that the configuration accepts, and each has a form for 2 cores."""

from pathlib import Path

import pytest

from knowsam.config import parse_config
from knowsam.sweep.spec import load_sweep

FOLDER = Path(__file__).resolve().parents[2] / "experiments" / "sweeps"
SWEEPS = sorted(FOLDER.glob("*.yaml"))
PARTS = (
    "no co-training",
    "no SKD",
    "no feedback",
    "no UGDA",
    "sparse prompts only",
    "dense prompts only",
    "no learned prompts",
    "no encoder adapters",
    "no decoder adapters",
)


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_a_shipped_sweep_expands(path):
    sweep = load_sweep(path)
    assert sweep.warnings == []
    assert sweep.baseline in {trial.setting for trial in sweep.trials}
    assert len({trial.key for trial in sweep.trials}) == len(sweep.trials)


@pytest.mark.parametrize("name", ["skd_ablation", "label_fraction", "skd_on_baselines"])
def test_the_small_form_has_the_same_settings(name):
    large, small = load_sweep(FOLDER / f"{name}.yaml"), load_sweep(FOLDER / f"{name}_small.yaml")
    assert {t.setting for t in small.trials} == {t.setting for t in large.trials}
    assert len({t.seed for t in small.trials}) == 2
    for trial in small.trials:
        config = parse_config(trial.config, trial.setting)
        assert config.data.source["name"] == "builtin" and config.train.max_steps <= 300


def test_each_row_of_the_ablation_takes_one_part_away():
    trials = {t.setting: t for t in load_sweep(FOLDER / "skd_ablation_small.yaml").trials if t.seed == 0}
    full = parse_config(trials["full"].config, "full")
    assert full.method["mixing"] and full.sam["tuning"]["name"] == "adapter" and full.skd is None
    assert set(trials) == {"full", "supervised", *PARTS}
    for part in PARTS:
        assert len(trials[part].overrides) == 2, f"{part}: one setting and the seed"
