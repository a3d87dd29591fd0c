"""Folders that are splits already are kept as lists."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from knowsam.data.builtin import render
from knowsam.data.make_splits import Amount
from knowsam.errors import DataError
from knowsam.study.read import StudyOptions, read_study


def make(top, folders, count, *, masks=True):
    """``count`` pictures in each folder, all different."""
    for folder in folders:
        for n in range(count):
            seed = sum(map(ord, folder)) * 1000 + n
            image, mask = render(np.random.default_rng(seed), 32, 2)
            mask[:4, :8] = 1
            for kind, array in (("images", image), ("labels", mask * 255)):
                (top / folder / kind).mkdir(parents=True, exist_ok=True)
                if kind == "images" or masks:
                    Image.fromarray(array).save(top / folder / kind / f"p{n // 2}{folder[0]}_{n}.png")
    return StudyOptions(top, labelled=[Amount(2, "cases")])


def test_three_folders_are_three_lists(tmp_path):
    study = read_study(make(tmp_path, ["train", "validation", "test"], 6))
    lists = study.drawn.lists
    assert list(lists)[:3] == ["train", "val", "test"] and len(lists["labelled_2cases"]) == 2
    for name, folder in (("train", "train"), ("val", "validation"), ("test", "test")):
        assert len(lists[name]) == 6 and all(i.startswith(f"{folder}/") for i in lists[name])
    assert any("kept as they are: train, val, test" in note for note in study.notes)
    again = read_study(dataclasses.replace(study.options, ready_splits=False))
    assert any(not i.startswith("train/") for i in again.drawn.lists["train"])


def test_a_missing_one_is_drawn_from_training(tmp_path):
    study = read_study(make(tmp_path, ["train", "test"], 10))
    lists = study.drawn.lists
    assert len(lists["val"]) == 1 and lists["val"][0].startswith("train/")
    assert len(lists["test"]) == 10 and len(lists["train"]) == 9
    assert any("there is no val, drawn from train" in note for note in study.notes)


def test_test_images_without_masks_are_never_trained_on(tmp_path):
    make(tmp_path, ["train"], 10)
    study = read_study(make(tmp_path, ["test"], 4, masks=False))
    listed = {i for ids in study.drawn.lists.values() for i in ids}
    assert not any(i.startswith("test/") for i in listed) and len(study.drawn.left_out) == 4
    assert any("4 of 4 images of test have no mask" in warning for warning in study.warnings)


def test_a_copy_across_folders_stays_in_test_only(tmp_path):
    options = make(tmp_path, ["train", "val", "test"], 6)
    copy = tmp_path / "test" / "images" / "p0t_0.png"
    for folder, name in (("train", "p1t_2"), ("val", "p1v_2")):
        Image.open(copy).save(tmp_path / folder / "images" / f"{name}.png")
    study = read_study(options)
    assert study.drawn.left_out == ["train/p1t_2", "val/p1v_2"] and "test/p0t_0" in study.drawn.lists["test"]
    assert any("2 image(s) are copies" in warning for warning in study.warnings)


def test_patients_in_two_of_the_folders_are_refused(tmp_path):
    options = make(tmp_path, ["train", "test"], 6)
    with pytest.raises(DataError, match=r"3 patient\(s\) are in more than one") as caught:
        read_study(dataclasses.replace(options, group_regex=r"/(p\d+)"))
    assert "--splits draw" in caught.value.hint
    assert read_study(dataclasses.replace(options, group_regex=r"^(\w+/p\d+)")).groups["train/p0t_0"] == "train/p0"


def test_unlabelled_images_beside_the_folders_are_trained_on_and_others_are_not(tmp_path):
    make(tmp_path, ["unlabelled", "holdout"], 3, masks=False)
    study = read_study(make(tmp_path, ["train", "test"], 6))
    train = study.drawn.lists["train"]
    assert sum(i.startswith("unlabelled/") for i in train) == 3 and not any(i.startswith("holdout/") for i in train)
    assert any("3 images are outside of the folders of splits" in warning for warning in study.warnings)
