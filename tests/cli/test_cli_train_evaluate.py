"""The commands train and evaluate as a user types them, and every shipped experiment."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import h5py
import nibabel
import numpy as np
import pytest
import torch

from knowsam import build
from knowsam.cli.main import run_command
from knowsam.config import load_config, to_yaml
from knowsam.data.seeds import derive_seed

ROOT = Path(__file__).resolve().parents[2]
EXPERIMENTS = sorted(p for p in (ROOT / "experiments").rglob("*.yaml") if p.parent.name != "sweeps")
METRICS = ("dice", "iou", "hd95", "asd", "nsd")


def train(*words: str) -> int:
    return run_command("train", [str(word) for word in words])


# ---------------------------------------------------------------- looking without training


def test_print_config_can_be_read_back(lab, tmp_path, capsys):
    assert train(lab.experiment, "--print-config", "train.seed=5", "optim.subnets.lr=0.125") == 0
    text = capsys.readouterr().out
    (tmp_path / "again.yaml").write_text(text)
    config = load_config(tmp_path / "again.yaml")
    assert config.train.seed == 5 and config.optim["subnets"]["lr"] == 0.125
    assert to_yaml(config) == text


def test_dry_run_shows_what_would_be_trained(lab, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert train(lab.experiment, "method.name=knowsam", "--dry-run", f"run={tmp_path / 'run'}") == 0
    text = capsys.readouterr().out
    for piece in ("labelled", "(2, 3, 64, 64)", "(2, 64, 64)", "int64", "logits of fusion", "(4, 2, 64, 64)"):
        assert piece in text, piece
    for term in ("seg_fusion", "skd_unet", "consistency_vnet", "sam"):
        assert term in text, term
    for piece in ("parameters", "trainable", "prompt_generator", "fusion_head"):
        assert piece in text, piece
    assert "train 12 cases (6 labelled), val 2, test 2; evaluated outputs: fusion, unet, vnet, sam" in text
    assert "RANDOM weights" in text
    assert list(tmp_path.iterdir()) == []  # nothing is written


def test_dry_run_says_what_the_experiment_names_without_effect(capsys):
    experiment = ROOT / "experiments" / "quickstart.yaml"
    assert train(experiment, "method.name=supervised", "--dry-run") == 0
    assert "note: students.vnet has no effect: supervised trains unet" in capsys.readouterr().out


def test_one_batch_is_overfitted(lab, capsys):
    words = ("method.name=supervised", "fusion=null", "optim.subnets.lr=1e-2")
    student = "students.unet={name: vnet, filters: 4, norm: batch}"
    assert train(lab.experiment, "--overfit-one-batch", "60", *words, student) == 0
    assert float(capsys.readouterr().out.rpartition(": ")[2]) > 0.85


def test_a_batch_that_is_not_learned_is_said(lab, capsys):
    assert train(lab.experiment, "method.name=supervised", "--overfit-one-batch", "1") == 79
    assert "one batch could not be learned in 1 steps" in capsys.readouterr().err


@pytest.mark.parametrize("words", [("--overfit-one-batch", "0"), ("--overfit-one-batch", "-3"), ("--stop-at", "-1")])
def test_impossible_counts_are_refused(lab, tmp_path, capsys, words):
    assert train(lab.experiment, f"run={tmp_path / 'run'}", *words) == 2
    assert words[0] in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_help_imports_no_torch():
    code = (
        "import runpy, sys; sys.argv = ['train.py', '--help']\n"
        "try: runpy.run_path('tools/train.py', run_name='__main__')\n"
        "except SystemExit as stop: assert not stop.code\n"
        "heavy = {'torch', 'numpy', 'monai', 'kornia'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "--overfit-one-batch" in done.stdout and "key=value" in done.stdout


# ---------------------------------------------------------------- mistakes


def test_a_missing_experiment_names_the_nearest(lab, capsys):
    assert train(lab.experiment.with_name("tinny.yaml")) == 66
    text = capsys.readouterr().err
    assert "there is no experiment file" in text and f"did you mean {lab.experiment}" in text


def test_absent_data_say_where_to_get_them(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("KNOWSAM_DATA", str(tmp_path))
    experiment = ROOT / "experiments" / "kvasir_10pct_small.yaml"
    words = ("data.source.root=not_there", f"run={tmp_path / 'run'}", "train.device=cpu")
    assert train(experiment, *words) == 66
    text = capsys.readouterr().err
    obtain = load_config(experiment).data.obtain
    assert "Kvasir" in obtain and f"hint: {obtain}" in text
    assert str(tmp_path / "not_there") in text


def test_all_mistakes_come_at_once(lab, tmp_path, capsys):
    words = ("train.max_step=3", "optim.subnets.lrr=1", "method.name=knowsan", "data.image_size=50", "nonsense")
    assert train(lab.experiment, f"run={tmp_path / 'run'}", *words) == 78
    text = capsys.readouterr().err
    assert text.startswith("error[config]: 5 problems") and "Traceback" not in text
    for piece in (
        "did you mean 'max_steps'",
        "did you mean 'lr'",
        "did you mean 'knowsam'",
        "divisible by 16",
        "nonsense",
    ):
        assert piece in text, piece


def test_a_source_with_a_word_of_the_experiment_in_it_is_replaced_whole(lab):
    """The built-in source has an argument ``train``, as the experiment has a section."""
    config = load_config(lab.experiment, ["data.source={name: image_folder, root: x}", "data.splits=y"])
    assert config.data.source == {"name": "image_folder", "root": "x"}


# ---------------------------------------------------------------- evaluate


@pytest.fixture(scope="module")
def runs(lab, tmp_path_factory):
    """A KnowSAM run and a supervised one."""
    top = tmp_path_factory.mktemp("runs")
    assert lab.train(top / "full", "train.max_steps=2") == 0
    assert lab.train(top / "base", "train.max_steps=2", "method.name=supervised", "data.unlabelled_batch=0") == 0
    return top / "full", top / "base"


def evaluate(*words) -> int:
    return run_command("evaluate", [*map(str, words), "--device", "cpu"])


@pytest.mark.parametrize("split", ["test", "val"])
def test_evaluate_writes_every_output(runs, capsys, split):
    run = runs[0]
    words = () if split == "test" else ("--split", "val")
    assert evaluate(run, *words) == 0
    text = capsys.readouterr().out
    outputs = ["fusion", "unet", "vnet", "sam"]
    assert all(output in text for output in outputs)
    with open(run / "evaluation" / f"{split}_cases.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {(r["case"], r["output"]) for r in rows} == {(f"{split}_000{i}", o) for i in (0, 1) for o in outputs}
    with open(run / "evaluation" / f"{split}_summary.csv", newline="") as file:
        summary = list(csv.DictReader(file))
    assert list(dict.fromkeys(r["output"] for r in summary)) == outputs
    scores = json.loads((run / "evaluation" / f"{split}.json").read_text())
    assert (scores["split"], scores["num_cases"], scores["outputs"]) == (split, 2, outputs)
    assert scores["class_names"] == ["lesion"]
    assert set(scores["summary"]["sam"]["lesion"]) >= set(METRICS)


def test_the_score_of_val_is_the_one_that_chose_the_checkpoint(lab, runs, capsys):
    from knowsam.engine.checkpoint import load_checkpoint

    run = runs[0]
    assert evaluate(run, "--split", "val") == 0
    scores = json.loads((run / "evaluation" / "val.json").read_text())
    best = load_checkpoint(run / "best.pt")["best"]["dice"]
    assert scores["summary"]["fusion"]["mean"]["dice"]["mean"] == pytest.approx(best, abs=1e-6)


def test_two_runs_are_compared(runs, monkeypatch, capsys):
    monkeypatch.chdir(runs[0].parent)
    assert evaluate("full", "base", "--checkpoint", "last") == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split()[:2] for line in lines if line.split()[:1] in (["full"], ["base"])]
    assert rows == [["full", "fusion"], ["base", "fusion"]]  # the deployed output first
    assert any("Dice" in line and "run" in line for line in lines)
    assert (runs[1] / "evaluation" / "test.json").exists()


def test_one_output_alone(runs, capsys):
    assert evaluate(runs[0], "--outputs", "sam,fusion") == 0
    scores = json.loads((runs[0] / "evaluation" / "test.json").read_text())
    assert sorted(scores["outputs"]) == ["fusion", "sam"]


def test_evaluate_on_the_data_of_another_experiment(lab, runs, tmp_path, capsys):
    other = tmp_path / "other.yaml"
    other.write_text("name: elsewhere\ndata: {source: {name: builtin, seed: 9, train: 4, val: 1, test: 3, size: 80}}\n")
    assert evaluate(runs[1], "--dataset", other) == 0
    scores = json.loads((runs[1] / "evaluation" / "elsewhere_test.json").read_text())
    assert (scores["num_cases"], scores["outputs"]) == (3, ["fusion", "unet", "vnet"])


def test_mistakes_of_evaluate(lab, runs, tmp_path, capsys):
    assert evaluate(tmp_path / "nowhere") == 66
    assert "no run in" in capsys.readouterr().err
    assert evaluate(runs[0], "--outputs", "fusion,teacher") == 78
    assert "no output teacher; the method has fusion, unet, vnet, sam" in capsys.readouterr().err
    assert evaluate(runs[0], "--split", "train") == 2
    started = tmp_path / "started"
    started.mkdir()
    (started / "config.yaml").write_text((runs[1] / "config.yaml").read_text())
    assert evaluate(started) == 66
    assert "has no best.pt yet" in capsys.readouterr().err
    more = tmp_path / "three.yaml"
    more.write_text("data: {classes: [background, lesion, other], source: {name: builtin, test: 1}}\n")
    assert evaluate(runs[1], "--dataset", more) == 78
    assert "classes" in capsys.readouterr().err


# ---------------------------------------------------------------- shipped experiments


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda p: str(p.relative_to(ROOT / "experiments")))
def test_shipped_experiment_loads(path):
    config = load_config(path)
    assert path.parent.name == "base" or config.name == path.stem
    assert load_config(path, ["train.seed=3"]).train.seed == 3
    if config.data.splits:
        folder = ROOT / config.data.splits
        assert folder.is_dir()
        if config.data.source["name"] != "builtin":
            assert config.data.obtain
    if path.parent.name != "base" and config.data.splits and (folder / "train.txt").exists():
        assert (folder / f"{config.data.labelled}.txt").is_file()


def few_volumes(config, folder):
    """Volumes of the first cases of an experiment's lists, in its layout and with its raw labels; words to use them."""
    data = config.data
    lists = ROOT / str(data.splits)
    parts = {name: (lists / f"{name}.txt").read_text().split() for name in ("train", "val", "test", data.labelled)}
    # Those with labels first, in whatever order the lists are.
    parts["train"] = [*parts[data.labelled][:2], *sorted(set(parts["train"]) - set(parts[data.labelled]))[:2]]
    parts = {name: ids[: {"train": 4, data.labelled: 2}.get(name, 1)] for name, ids in parts.items()}
    (folder / "lists").mkdir()
    for name, ids in parts.items():
        (folder / "lists" / f"{name}.txt").write_text("".join(f"{case}\n" for case in ids))
    rng = np.random.default_rng(0)
    for case in sorted({case for ids in parts.values() for case in ids}):
        mask = np.zeros((18, 20, 22), np.uint8)
        for number in range(1, config.num_classes):  # cubes beside each other
            raw = number if data.labels is None else data.labels[number]
            mask[4:14, 4:14, 4 * number : 4 * number + 4] = max(raw) if isinstance(raw, list) else raw
        write_volume(config, folder / "data", case, (rng.normal(mask, 0.2) * 100).astype(np.float32), mask)
    return [
        f"data.splits={folder / 'lists'}",
        "data.patch_size=[16, 16, 16]",
        "data.workers=0",
        "sam.slices=2",
    ]


def write_volume(config, top, case, image, mask):
    """A volume (z, y, x) and its labels: one h5 file where they share it, else two NIfTI files."""
    source, place = config.data.source, top / config.data.source["root"]
    stem = f"{case}{source.get('image_suffix', '')}"
    if source["mask_dir"] is None:
        file = place / source["image_dir"] / f"{stem}.h5"
        file.parent.mkdir(parents=True, exist_ok=True)
        with h5py.File(file, "w") as stored:
            for key, values in (("image", image), ("label", mask)):
                # Where slices are said to lie along x, the last axis, the file holds (H, W, D) or (W, H, D).
                along_x = config.data.reading.get("slice_axis", 2) == 0
                stored[key] = values.transpose(2, 1, 0) if along_x else values
        return
    for name, values in (("image_dir", image), ("mask_dir", mask)):
        file = place / source[name] / f"{stem}.nii.gz"
        file.parent.mkdir(parents=True, exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(values.transpose(2, 1, 0), np.eye(4)), file)


@pytest.mark.parametrize(
    "path", [p for p in EXPERIMENTS if p.parent.name != "base"], ids=lambda p: str(p.relative_to(ROOT / "experiments"))
)
def test_shipped_experiment_runs_tiny(path, tmp_path, monkeypatch, capsys):
    """A step before and a step after mixing begins, on generated images, with its own method and classes.

    One on volumes reads files that lie and are labelled as it says, and is trained by the command for a step; on the
    CPU not in bf16.
    """
    first = load_config(path)
    if first.spatial_dims == 3:
        monkeypatch.setenv("KNOWSAM_DATA", str(tmp_path / "data"))
        words = few_volumes(first, tmp_path)
    else:
        words = ["data.source={name: builtin, train: 8, val: 1, test: 1, size: 64}", "data.labelled=labelled_50pct"]
    words += [
        "data.image_size=64",
        "data.labelled_batch=2",
        f"data.unlabelled_batch={min(2, first.data.unlabelled_batch)}",
        "sam.encoder={name: vit_tiny}",
        "sam.weights=null",
        "train.max_steps=10",
    ]
    for name, block in first.students.items():
        words += {"unet": [f"students.{name}.channels=[4, 8]", f"students.{name}.dropout=[0.1, 0.1]"]}.get(
            block["name"], []
        )
        words += {"vnet": [f"students.{name}.filters=2"]}.get(block["name"], [])
    config = load_config(path, words)
    streams = build.build_streams(config, build.build_source(config))
    method = build.build_method(config).method.train()
    optimizers = build.build_optimizers(config, method)
    batch = build.build_augmenter(config)(streams[0], seed=derive_seed(0, "augment", 0, 0))
    assert batch.mask.max() < config.num_classes
    for step in (0, 9):
        out = method(batch, step)
        total = torch.stack([term.float() for term in out.losses.values()]).sum()
        assert torch.isfinite(total)
    total.backward()
    reached = {name: [p.grad is not None for p in item.parameters] for name, item in optimizers.items()}
    assert all(all(flags) for flags in reached.values()), reached
    if first.spatial_dims == 3:
        last = ("train.max_steps=1", "train.device=cpu", "train.tensorboard=false", f"run={tmp_path / 'run'}")
        if first.train.precision == "bf16":
            assert train(path, *words, *last) == 78
            text = capsys.readouterr().err
            assert "wrong gradients on the CPU" in text and "train.precision=fp32" in text
        assert train(path, *words, *last, "train.precision=fp32") == 0
        assert (tmp_path / "run" / "best.pt").is_file()
