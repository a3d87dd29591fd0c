"""Every shipped sweep expands to trials that the configuration accepts, and each has a form for 2 cores."""

from pathlib import Path

import pytest

from knowsam.config import parse_config
from knowsam.config.identity import config_changes
from knowsam.sweep.spec import load_sweep

FOLDER = Path(__file__).resolve().parents[2] / "experiments" / "sweeps"
SWEEPS = sorted(FOLDER.glob("*.yaml"))
PARTS = {
    "no co-training": ["method.consistency.weight: not given -> 0.0"],
    "no SKD": ["method.skd.weight: not given -> 0.0"],
    "no feedback": ["sam.mask_prompt: not given -> False"],
    "no UGDA": ["method.mix.start: 0.5 -> not given", "method.mix: not given -> None"],
    "sparse prompts only": ["sam.prompt.sparse: not given -> True", "sam.prompt.dense: not given -> False"],
    "dense prompts only": ["sam.prompt.sparse: not given -> False", "sam.prompt.dense: not given -> True"],
    "no learned prompts": ["sam.prompt.sparse: not given -> False", "sam.prompt.dense: not given -> False"],
    "no encoder adapters": ["sam.tuning.encoder_adapters: not given -> False"],
    "no decoder adapters": ["sam.tuning.decoder_adapters: not given -> False"],
}
SUPERVISED = ("supervised, same networks", "supervised, one U-Net")


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
    assert full.method["mix"] == {"start": 0.5} and full.sam["tuning"]["name"] == "adapter" and full.skd is None
    assert set(trials) == {"full", *PARTS, *SUPERVISED}
    for part, changed in PARTS.items():
        assert len(trials[part].overrides) == 2, f"{part}: one setting and the seed"
        config = parse_config(trials[part].config, part)
        # The same but for what the row is called by, so that the difference is this part's.
        assert config_changes(trials["full"].config, config) == changed


def test_the_supervised_rows_have_the_networks_that_they_are_called_by():
    for name in ("skd_ablation", "skd_ablation_small"):
        trials = {t.setting: t for t in load_sweep(FOLDER / f"{name}.yaml").trials}
        full, same, one = (parse_config(trials[part].config, part) for part in ("full", *SUPERVISED))
        assert same.method == one.method == {"name": "supervised"}
        assert (same.students, same.fusion) == (full.students, full.fusion)
        assert (one.students, one.fusion) == ({"unet": full.students["unet"]}, None)
        assert not same.uses_sam and not one.uses_sam
