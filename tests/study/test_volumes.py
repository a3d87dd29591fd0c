"""A folder of NIfTI volumes is read and divided, and its experiment says how to train on it."""

import json

import nibabel
import numpy as np
import pytest
import yaml

from knowsam.errors import DataError
from knowsam.study.experiment import experiment_text
from knowsam.study.read import StudyOptions, read_study
from knowsam.study.volumes import named_classes


def save(path, array, spacing=(0.5, 0.75, 2.0)):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, np.diag([*spacing, 1.0])), path)


def make(top, images, masks, count, *, start=0, ending="_0000", low=0):
    """Volumes of 30 x 22 x 20 (x, y, z) with two classes; ``low`` is the value of air."""
    for n in range(start, start + count):
        rng = np.random.default_rng(n)
        image = (rng.random((30, 22, 20)) * 500 + low).astype(np.int16)
        image[:, :, 8:12] += np.int16(100 * (n % 7))
        mask = np.zeros(image.shape, np.uint8)
        mask[4:12, 4 : 10 + n % 5, 5:9], mask[16:20, 4:9, 5:9] = 1, 2
        save(top / images / f"case_{n:03d}{ending}.nii.gz", image)
        if masks:
            save(top / masks / f"case_{n:03d}.nii.gz", mask)


@pytest.fixture
def decathlon(tmp_path):
    """As nnU-Net and the Decathlon have it, with a labelled test set."""
    make(tmp_path / "Task", "imagesTr", "labelsTr", 14)
    make(tmp_path / "Task", "imagesTs", "labelsTs", 4, start=14)
    labels = {"background": 0, "liver": 1, "tumour": 2}
    (tmp_path / "Task" / "dataset.json").write_text(json.dumps({"labels": labels, "channel_names": {"0": "MRI"}}))
    return tmp_path / "Task"


def settings(study, tmp_path, recipe="small"):
    return yaml.safe_load(experiment_text(study, tmp_path / "out" / "x.yaml", tmp_path / "lists", recipe))


def test_a_decathlon_task(decathlon, tmp_path):
    study = read_study(StudyOptions(decathlon))
    lists = study.drawn.lists
    assert lists["test"] == [f"test/case_{n:03d}" for n in range(14, 18)]
    assert len(lists["val"]) == 1 and len(lists["train"]) == 13 and study.classes.names[1:] == ["liver", "tumour"]
    assert study.layout.image_suffix == "_0000" and study.classes.labels is None
    data = settings(study, tmp_path)["data"]
    assert data["source"] == {
        "name": "volumes",
        "root": str(decathlon),
        "image_dir": {"train": "imagesTr", "test": "imagesTs"},
        "mask_dir": {"train": "labelsTr", "test": "labelsTs"},
        "image_suffix": "_0000",
    }
    assert data["patch_size"] == [16, 16, 32] and data["channels"] == 1  # D, H, W = 20, 22, 30
    assert data["intensity"] == {"name": "zscore", "scope": "case"}
    assert any("20 x 22 x 30 voxels" in note and "2 x 0.75 x 0.5 mm" in note for note in study.notes)
    assert any("a patient of its own" in warning for warning in study.warnings)


def test_ct_is_told_by_its_air_and_unlabelled_volumes_train(tmp_path):
    make(tmp_path / "ct", "images", "labels", 10, ending="", low=-1024)
    make(tmp_path / "ct", "unlabelled", None, 5, start=10, ending="", low=-1024)
    study = read_study(StudyOptions(tmp_path / "ct", classes=["background", "liver", "tumour"]))
    assert {f"unlabelled/case_{n:03d}" for n in range(10, 15)} <= set(study.drawn.lists["train"])
    values = settings(study, tmp_path)
    assert values["data"]["intensity"] == {"name": "percentile", "scope": "dataset"}
    assert any("Hounsfield" in note and "window" in note for note in study.notes)
    assert values["students"]["vnet"] == {"filters": 4, "norm": "batch"} and values["train"]["seed"] == 0


def test_volumes_that_cannot_be_used_are_told(tmp_path):
    make(tmp_path / "set", "images", "labels", 12, ending="")
    folder = tmp_path / "set"
    (folder / "images" / "case_000.nii.gz").write_bytes(b"no gzip")
    save(folder / "images" / "case_001.nii.gz", np.zeros((30, 22, 20, 2), np.int16))
    save(folder / "labels" / "case_002.nii.gz", np.zeros((30, 22, 19), np.uint8))
    save(folder / "labels" / "case_003.nii.gz", np.full((30, 22, 20), 0.5, np.float32))
    save(folder / "images" / "case_004.nii.gz", np.full((30, 22, 20), np.nan, np.float32))
    study = read_study(StudyOptions(folder))
    told = {fault.cases[0]: fault.text for fault in study.survey.faults}
    assert set(told) == {f"case_{n:03d}" for n in range(5)}
    assert "damaged" in told["case_000"] and "three axes" in told["case_001"] and "NaN" in told["case_004"]
    assert "19 x 22 x 30, the image 20 x 22 x 30" in told["case_002"] and "whole numbers" in told["case_003"]
    assert "case_002" in study.drawn.lists["train"] and "case_002" not in study.drawn.lists["labelled_max"]


def test_nothing_but_broken_volumes(tmp_path):
    make(tmp_path, "images", "labels", 2, ending="")
    for path in (tmp_path / "images").iterdir():
        path.write_bytes(b"")
    with pytest.raises(DataError, match="no volume can be read"):
        read_study(StudyOptions(tmp_path))


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ({"0": "background", "1": "edema"}, ["background", "edema"]),
        ({"background": 0, "edema": 1, "core": 2}, ["background", "edema", "core"]),
        ({"background": 0, "whole": [1, 2], "core": 2}, None),  # regions of nnU-Net are no classes
        ({"0": "background", "2": "edema"}, None),
        ({"0": "same", "1": "same"}, None),
        (["background"], None),
    ],
)
def test_names_of_classes(tmp_path, labels, names):
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": labels}))
    assert named_classes(tmp_path) == names == named_classes(tmp_path / "imagesTr")
