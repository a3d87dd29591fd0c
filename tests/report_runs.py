"""Run folders as train and evaluate leave them, made by hand: scores are what the test says. And their comparison."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from knowsam.cli.reading import reader
from knowsam.config import parse_config, to_yaml
from knowsam.engine.scores import Evaluation
from knowsam.metrics import METRIC_NAMES
from knowsam.report.compare.collect import collect
from knowsam.report.compare.comparison import compare

BEST = {
    "file": "best.pt",
    "step": 400,
    "chosen_by": "validation Dice of fusion, mean over classes",
    "split": "val",
    "value": 0.71,
}
LAST = {"file": "last.pt", "step": 600, "chosen_by": "last step", "split": None, "value": None}

CONFIG = """
name: hand
data: {source: {name: builtin}, labelled: labelled_10pct, image_size: 64}
train: {max_steps: 600}
"""

CASES = [f"c{i:02d}" for i in range(12)]
SUPERVISED = "method.name=supervised"


def row(case, dice, *, output="fusion", class_name="lesion", status="ok"):
    """One scored case; the other metrics follow from Dice. A Dice of None is empty on both sides."""
    if dice is None:
        dice, status = 1.0, "empty_both"
    scores = {"dice": dice, "iou": dice / (2 - dice), "hd95": 20 * (1 - dice), "asd": 5 * (1 - dice), "nsd": dice**2}
    scores |= {"precision": dice**0.5, "recall": dice**1.5, "specificity": 0.9 + dice / 10}
    return {"case": case, "output": output, "class": class_name, "status": status} | {
        k: float(v) for k, v in scores.items()
    }


def rows_of(dice, *, output="fusion"):
    """Rows of ``{case: Dice}``, or of ``{class: {case: Dice}}``."""
    classes = dice if all(isinstance(value, dict) for value in dice.values()) else {"lesion": dice}
    return [
        row(case, v, output=output, class_name=name) for name, cases in classes.items() for case, v in cases.items()
    ]


def write_run(
    folder,
    dice,
    *,
    seed=0,
    config="",
    split="test",
    checkpoint=BEST,
    state="complete",
    code=None,
    outputs=None,
    splits=None,
    world_size=1,
    others=None,
    **scores,
):
    """A run folder.

    Args:
        folder: where.
        dice: ``{case: Dice}`` or ``{class: {case: Dice}}`` of the output ``fusion``; None for a run without scores.
        seed, config: of the run; ``config`` is over ``CONFIG``, as ``key=value`` with blanks between.
        split, checkpoint: of the scores.
        state, code: of ``status.json``.
        outputs: more outputs, ``{name: dice}``; they come after ``fusion``.
        splits: over ``splits.json``.
        world_size: of the training.
        others: scores on other data, ``{name: dice}`` of the output ``fusion``.
        scores: over the attributes of ``Evaluation``.
    """
    folder = Path(folder)
    folder.mkdir(parents=True)
    text = to_yaml(_configured(config, seed))
    (folder / "config.yaml").write_text(text)
    labelled = {"labelled_10pct": 16, "labelled_20pct": 32, "labelled_40pct": 64}.get(_labelled(text), 16)
    record = {
        "labelled": [f"train_{i:04d}" for i in range(labelled)],
        "train_cases": 160,
        "source": "BuiltIn(num_classes=2, size=96, seed=0)",
        "sha256": {},
    } | (splits or {})
    (folder / "splits.json").write_text(json.dumps(record))
    (folder / "environment.json").write_text(json.dumps({"world_size": str(world_size)}))
    status = {"state": state, "step": 600} | ({} if code is None else {"code": code, "reason": "said on the console"})
    (folder / "status.json").write_text(json.dumps(status))
    if dice is not None:
        named = {"fusion": dice, **(outputs or {})}
        rows = [item for output, values in named.items() for item in rows_of(values, output=output)]
        classes = tuple(dict.fromkeys(item["class"] for item in rows))
        result = Evaluation(rows, split, tuple(named), classes, "px", checkpoint=checkpoint)
        replace(result, **scores).write(folder / "evaluation", split)
    for name, values in (others or {}).items():
        rows = rows_of(values)
        classes = tuple(dict.fromkeys(item["class"] for item in rows))
        result = Evaluation(rows, split, ("fusion",), classes, "px", checkpoint=checkpoint, dataset=name)
        result.write(folder / "evaluation", f"{name}_{split}")
    return folder


def _configured(overrides, seed):
    from omegaconf import OmegaConf

    base = OmegaConf.create(CONFIG)
    dotted = OmegaConf.from_dotlist([*overrides.split(), f"train.seed={seed}"])
    return parse_config(OmegaConf.to_yaml(OmegaConf.merge(base, dotted)), "hand.yaml")


def _labelled(text):
    return next(line.split(": ")[1] for line in text.splitlines() if line.strip().startswith("labelled:"))


def write_sweep(folder, trials, *, baseline=None, name="hand_sweep"):
    """A sweep's folder: ``trials`` are dicts over the defaults below; run folders are the caller's."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    items = []
    for i, trial in enumerate(trials):
        item = {"key": f"{i:010x}", "setting": "full", "experiment": "hand", "seed": 0, "state": "complete"}
        item |= {"message": None, "exit_code": None, "overrides": {}} | trial
        item.setdefault("folder", f"trials/{item['experiment']}_{item['setting']}_seed{item['seed']}".replace(" ", "_"))
        items.append(item)
    record = {"format": 1, "name": name, "baseline": baseline, "trials": items}
    (folder / "trials.json").write_text(json.dumps(record))
    return [folder / item["folder"] for item in items]


def scores(seed, lift=0.0, n=12):
    """Dice of the cases c00 .. ; every case differs between seeds and lifts."""
    rng = np.random.default_rng(seed)
    return dict(
        zip(CASES, np.clip(rng.uniform(0.3, 0.8, n) + lift * rng.uniform(0.5, 1.5, n), 0, 1).tolist(), strict=False)
    )


def compared(runs, split="test", **options):
    return compare(collect([str(run) for run in runs], reader(split)), **options)


def one_set(runs, **options):
    (tables,) = compared(runs, **options).sets
    return tables


def pair(tmp_path, ours, theirs, **changes):
    """A baseline ``base`` and a setting ``ours``, one run each; ``changes`` are of the setting's run."""
    return [
        f"base={write_run(tmp_path / 'b', theirs, config=SUPERVISED)}",
        f"ours={write_run(tmp_path / 'a', ours, **changes)}",
    ]


assert set(METRIC_NAMES) == set(row("a", 1.0)) - {"case", "output", "class", "status"}, "row() gives exactly these"
