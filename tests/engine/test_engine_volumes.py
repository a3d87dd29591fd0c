"""Volumes end to end: files in any orientation, crops, 3-D students, SAM slice by slice, scores in mm, masks back."""

import csv
import json

import nibabel
import numpy as np
import pytest
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform

from knowsam.cli.main import run_command

SPACING = (2.0, 1.5, 1.0)  # of x, y, z
ORIENTATIONS = ("RAS", "LPS", "SAR")
EXPERIMENT = """
name: volumes
data:
  source: {name: volumes, root: ROOT, image_dir: imagesTr, mask_dir: labelsTr}
  splits: ROOT
  classes: [background, ball, core]
  labelled: labelled_2cases
  channels: 1
  intensity: {name: zscore, scope: case}
  patch_size: [16, 16, 32]
  image_size: 64
  labelled_batch: 1
  unlabelled_batch: 1
students:
  unet: {name: unet, channels: [2, 4], dropout: [0.1, 0.2]}
  vnet: {name: vnet, filters: 2, norm: batch}
fusion: {name: ham, width: 4}
sam:
  encoder: {name: vit_tiny}
  tuning: [{name: adapter, ratio: 0.1}]
  prompt: {name: learned, sparse: false}
  slices: 3
method: {name: knowsam}
optim: {subnets: {name: adamw, lr: 3e-3}, sam: {name: adam, lr: 1e-3}}
train: {max_steps: 4, seed: 1, device: cpu, validate_every: 4, checkpoint_every: 4, log_every: 1, tensorboard: false}
evaluate: {batch_size: 2}
"""


def volume(seed):
    """A ball with a core in noise, axes x, y, z; sides that are unlike, some smaller than a patch."""
    rng = np.random.default_rng(seed)
    shape = rng.integers(14, 30, 3)
    centre, place = shape / 2 + rng.uniform(-2, 2, 3), np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    distance = np.linalg.norm((place - centre) * SPACING, axis=-1)
    label = (distance < 9).astype(np.uint8) + (distance < 4)
    return (300.0 * label + rng.normal(0, 60, shape)).astype(np.int16), label.astype(np.uint8)


def save(path, values, orientation):
    image = nibabel.Nifti1Image(values, np.diag([*SPACING, 1]))
    turn = ornt_transform(io_orientation(image.affine), axcodes2ornt(orientation))
    nibabel.save(image.as_reoriented(turn), path)


@pytest.fixture(scope="module")
def clinic(tmp_path_factory):
    """Nine volumes, three orientations; a file of the experiment."""
    root = tmp_path_factory.mktemp("clinic")
    for name in ("imagesTr", "labelsTr"):
        (root / name).mkdir()
    for n in range(9):
        for folder, values in zip(("imagesTr", "labelsTr"), volume(n), strict=True):
            save(root / folder / f"case{n}.nii.gz", values, ORIENTATIONS[n % 3])
    lists = {"train": range(5), "labelled_2cases": range(2), "val": [5], "test": range(6, 9)}
    for name, numbers in lists.items():
        (root / f"{name}.txt").write_text("".join(f"case{n}\n" for n in numbers))
    (root / "volumes.yaml").write_text(EXPERIMENT.replace("ROOT", str(root)))
    return root


def train(clinic, run, *words):
    return run_command("train", [str(clinic / "volumes.yaml"), f"run={run}", *words])


@pytest.mark.parametrize(
    "words",
    [("method.name=supervised",), ("method.name=mean_teacher",), (), ("method.name=mean_teacher", "skd={weight: 1.0}")],
    ids=["supervised", "mean teacher", "knowsam", "mean teacher + skd"],
)
def test_a_run_on_volumes_resumes_bit_for_bit_and_is_scored_in_mm(clinic, lab, tmp_path, words):
    assert train(clinic, tmp_path / "whole", *words) == 0
    assert train(clinic, tmp_path / "run", *words, "--stop-at", "2") == 0
    assert train(clinic, tmp_path / "run", *words) == 0
    assert lab.differences(lab.outcome(tmp_path / "whole"), lab.outcome(tmp_path / "run")) == []
    assert run_command("evaluate", [str(tmp_path / "run")]) == 0
    folder = tmp_path / "run" / "evaluation"
    assert json.loads((folder / "test.json").read_text())["unit"] == "mm"
    with open(folder / "test_cases.csv", newline="") as file:
        assert {row["case"] for row in csv.DictReader(file)} == {"case6", "case7", "case8"}


@pytest.fixture(scope="module")
def trained(clinic, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "run"
    assert train(clinic, run, "method.name=supervised", "train.max_steps=30", "train.validate_every=30") == 0
    return run


def test_masks_lie_in_each_file_s_own_geometry_whatever_its_orientation(clinic, trained, tmp_path):
    values, _ = volume(6)
    for orientation in ORIENTATIONS:
        save(tmp_path / f"{orientation}.nii.gz", values, orientation)
    import h5py

    with h5py.File(tmp_path / "array.h5", "w") as file:
        file["image"] = values.transpose(2, 1, 0)
    assert run_command("predict", [str(trained), str(tmp_path), "-o", str(tmp_path / "out")]) == 0
    with h5py.File(tmp_path / "out" / "masks" / "array.h5") as file:
        wanted = file["label"][()].transpose(2, 1, 0)
    assert 0 < (wanted > 0).mean() < 1
    for orientation in ORIENTATIONS:
        image = nibabel.load(tmp_path / f"{orientation}.nii.gz")
        mask = nibabel.load(tmp_path / "out" / "masks" / f"{orientation}.nii.gz")
        np.testing.assert_array_equal(mask.affine, image.affine)
        assert nibabel.aff2axcodes(mask.affine) == tuple(orientation)
        np.testing.assert_array_equal(np.asarray(nibabel.as_closest_canonical(mask).dataobj), wanted)


def test_orientations_and_kinds_of_file_are_one_input(clinic, tmp_path):
    import h5py

    from knowsam import io
    from knowsam.data.case import Case
    from knowsam.data.intensity import Preparation, ZScore
    from knowsam.data.levels import as_tensor, to_unit

    values, _ = volume(3)
    for orientation in ORIENTATIONS:
        save(tmp_path / f"{orientation}.nii", values, orientation)
    with h5py.File(tmp_path / "array.h5", "w") as file:
        file["image"] = values.transpose(2, 1, 0)
    seen = []
    for name in ("array.h5", *(f"{orientation}.nii" for orientation in ORIENTATIONS)):
        stored = io.read_image(tmp_path / name)
        assert stored.spacing == (None if name == "array.h5" else (1.0, 1.5, 2.0))
        seen.append(
            to_unit(
                as_tensor(Preparation(ZScore(), channels=1)(Case(stored.array, full_range=stored.full_range)))
            ).numpy()
        )
    for other in seen[1:]:
        np.testing.assert_allclose(other, seen[0], atol=1e-6)


def test_a_picture_among_volumes_and_a_volume_among_pictures_are_refused(clinic, tmp_path, capsys):
    assert train(clinic, tmp_path / "run", "data.patch_size=[32, 32]", "method.name=supervised") == 65
    said = capsys.readouterr().err
    assert "is a volume of" in said and "Set data.patch_size=[D, H, W]" in said
    assert train(clinic, tmp_path / "run", "data.patch_size=[15, 16, 16]", "method.name=supervised") == 78
    assert "data.patch_size must be divisible by 16" in capsys.readouterr().err


def test_sam_is_asked_for_some_slices_and_the_others_teach_nothing(clinic, tmp_path):
    from knowsam import build
    from knowsam.config import load_config

    config = load_config(clinic / "volumes.yaml", ["skd={weight: 1.0}", "method.name=mean_teacher"])
    source = build.build_source(config)
    build.fit_preparation(source)
    streams = build.build_streams(config, source)
    batch = build.build_augmenter(config)(streams[0], seed=0)
    method = build.build_method(config).method.train()
    said = method.sam_teacher(batch, batch.weak.new_zeros(2, 3, 16, 16, 32))
    asked = said.asked.flatten(2).any(2).sum(1)
    assert asked.tolist() == [3, 3], "3 of 16 slices of every volume"
    assert (said.logits.movedim(1, -1)[~said.asked] == 0).all() and (said.confidence[~said.asked] == -1).all()


@pytest.mark.parametrize("axis", [0, 2])
def test_masks_of_another_tool_are_read_by_the_experiment_s_rules(clinic, tmp_path, axis):
    import yaml

    experiment = yaml.safe_load((clinic / "volumes.yaml").read_text())
    experiment["data"]["reading"] = {"slice_axis": axis}
    (tmp_path / "turned.yaml").write_text(yaml.safe_dump(experiment))
    words = [str(clinic / "labelsTr"), "--experiment", str(tmp_path / "turned.yaml"), "-o", str(tmp_path / "out")]
    assert run_command("score", words) == 0
    summary = json.loads((tmp_path / "out" / "evaluation" / "test.json").read_text())["summary"]["labelsTr"]
    assert [summary[name]["dice"]["mean"] for name in ("ball", "core")] == [1.0, 1.0]
    assert summary["ball"]["hd95"]["mean"] == 0.0
