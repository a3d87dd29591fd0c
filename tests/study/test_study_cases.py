"""Small sets that once went wrong, from ``init`` to what a network sees: as the plain set, or told."""

import os
from pathlib import Path

import numpy as np
import pytest

from knowsam import build
from knowsam.cli.main import run_command
from knowsam.config import load_config
from knowsam.data.levels import as_tensor, to_unit

ROOT = Path(__file__).resolve().parents[2]
SETS = Path(os.environ.get("KNOWSAM_CASES") or ROOT.parent / "shared" / "cases") / "sets"
pytestmark = pytest.mark.skipif(not (SETS / "plain").is_dir(), reason="the cases are not here (KNOWSAM_CASES)")


def init(tmp_path, name, *words):
    return run_command("init", [name, "--images", str(SETS / name), "--out", str(tmp_path), *words])


def source(tmp_path, name, labelled="all"):
    config = load_config(tmp_path / "experiments" / f"{name}.yaml", [f"data.labelled={labelled}"] if labelled else [])
    return build.build_source(config)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    assert init(folder, "plain") == 0
    return source(folder, "plain")


def every(source):
    return [*source.train_ids(), *source.eval_ids("val"), *source.eval_ids("test")]


def number(case_id):
    return int("".join(filter(str.isdigit, case_id)))


def shown(source, case_id):
    return to_unit(as_tensor(source.image(case_id))).numpy()


@pytest.mark.parametrize("name", ["palette_mixed", "palette_white_first", "bmp2", "gif_masks"])
def test_another_way_to_write_it_is_the_same_set(tmp_path, plain, name):
    assert init(tmp_path, name) == 0
    other = source(tmp_path, name)
    assert other.train_ids() and other.eval_ids("test")
    by_number = {number(i): i for i in every(plain)}
    for case_id in every(other):
        own = by_number[number(case_id)]
        if own in plain.splits.readable_masks:
            np.testing.assert_array_equal(other.mask(case_id), plain.mask(own), err_msg=case_id)
        alike = np.corrcoef(shown(other, case_id).ravel(), shown(plain, own).ravel())[0, 1]
        assert alike > 0.99, case_id
    assert run_command("check", [str(tmp_path / "experiments" / f"{name}.yaml")]) == 0


@pytest.mark.parametrize("name", ["exif_180", "exif_rot90"])
def test_masks_lie_on_the_objects_of_turned_pictures_and_the_rule_is_said(tmp_path, capsys, name):
    assert init(tmp_path, name) == 0
    assert "20 of 20 images have an EXIF orientation" in (said := "".join(capsys.readouterr()))
    assert "each as its own tag says and as viewers show them" in said
    objects_are_bright(source(tmp_path, name))


def test_float64_tiff_is_read_with_a_stated_rule(tmp_path):
    assert init(tmp_path, "float64") == 0
    objects_are_bright(source(tmp_path, "float64"))


def objects_are_bright(source):
    for case_id in every(source):
        image, inside = shown(source, case_id).mean(-1), source.mask(case_id) > 0
        assert image[inside].mean() - image[~inside].mean() > 0.05, case_id


def test_an_ignored_value_is_no_class(tmp_path, capsys):
    assert init(tmp_path, "ignore255") == 0
    assert "255 (in 20 of 20 masks) is taken for pixels where nothing is known and ignored" in capsys.readouterr().out
    found = source(tmp_path, "ignore255")
    assert found.num_classes == 3
    assert {int(v) for i in found.eval_ids("test") for v in np.unique(found.mask(i))} <= {0, 1, 2, 255}


def test_instances_are_asked_about_and_may_be_one_class(tmp_path, capsys):
    assert init(tmp_path, "instances_60") == 65
    assert "these seem to be instances, not 61 classes" in capsys.readouterr().err
    assert init(tmp_path, "instances_60", "--classes", "background,nucleus") == 0
    found = source(tmp_path, "instances_60")
    assert {int(v) for i in found.eval_ids("test") for v in np.unique(found.mask(i))} == {0, 1}


def test_one_label_is_refused_with_what_is_needed(tmp_path, capsys):
    assert init(tmp_path, "one_label") == 65
    assert "1 of 20 images have a mask that can be used; needed are 2" in capsys.readouterr().err


def test_labelled_and_unlabelled_in_folders_of_their_own(tmp_path):
    assert init(tmp_path, "separate") == 0
    found = source(tmp_path, "separate", labelled=None)
    assert len(found.train_ids()) > len(found.labelled_ids()) > 0
