"""A folder is read and divided from plain options, without a command line."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from knowsam.config import load_config
from knowsam.data.builtin import render
from knowsam.data.make_splits import Amount
from knowsam.data.splits import load_splits
from knowsam.errors import ConfigError, DataError, ExistsError
from knowsam.study.experiment import experiment_places, experiment_text, write_experiment
from knowsam.study.lists import list_table, study_files, write_study_lists
from knowsam.study.read import StudyOptions, read_study


@pytest.fixture
def options(tmp_path):
    """20 images of 10 patients; all but the last two have a mask, which holds 0 and 255."""
    for n in range(20):
        image, mask = render(np.random.default_rng(n), 32, 2)
        mask[:4, :8] = 1
        for kind, array in (("images", image), ("masks", mask * 255)):
            (tmp_path / "data" / kind).mkdir(parents=True, exist_ok=True)
            if kind == "images" or n < 18:
                Image.fromarray(array).save(tmp_path / "data" / kind / f"p{n // 2}_{n}.png")
    return StudyOptions(tmp_path / "data", group_regex=r"^(p\d+)")


def test_read_and_divided(options):
    seen = []
    study = read_study(options, lambda done, total: seen.append((done, total)))
    assert seen[-1] == (20, 20) and len(seen) == 20
    assert (study.classes.labels, study.classes.threshold) == ({0: 0, 1: 255}, None)
    assert study.classes.names == ["background", "foreground"] and study.classes.table.num_classes == 2
    assert study.groups["p3_7"] == "p3" and len(study.survey.cases) == 20
    lists = study.drawn.lists
    assert not set(lists["train"]) & {*lists["val"], *lists["test"]} and set(lists["labelled_max"]) < set(
        lists["train"]
    )
    columns, rows = list_table(study)
    assert columns == ["list", "cases", "groups", "background %", "foreground %"]
    table = {row[0]: row[1:] for row in rows}
    assert table["train"][2:] == ["-", "-"]  # masks that are never opened say nothing
    assert float(table["test"][2]) + float(table["test"][3]) == pytest.approx(100, abs=0.02)


def test_the_same_options_draw_the_same_lists_and_another_seed_draws_others(options, tmp_path):
    study, again = read_study(options), read_study(options)
    other = read_study(dataclasses.replace(options, seed=1))
    assert study_files(study) == study_files(again) != study_files(other)
    assert write_study_lists(study, tmp_path / "lists", command="knowsam splits ...")
    assert "    knowsam splits ...\n" in (tmp_path / "lists" / "summary.md").read_text()
    assert not write_study_lists(again, tmp_path / "lists", command="knowsam splits ...")
    with pytest.raises(ExistsError):
        write_study_lists(other, tmp_path / "lists", command="knowsam splits ...")
    assert write_study_lists(other, tmp_path / "lists", command="knowsam splits ...", force=True)


def test_an_experiment_that_loads(options, tmp_path):
    experiment, lists = experiment_places(tmp_path / "out", "mine")
    write_experiment(read_study(options), experiment, lists, command="knowsam init mine")
    config = load_config(experiment)
    assert config.name == "mine" and config.data.group_regex == options.group_regex
    assert load_splits(config.data.splits, config.data.labelled, group_regex=config.data.group_regex).labelled
    with pytest.raises(ExistsError, match="there already"):
        experiment_places(tmp_path / "out", "mine")
    assert experiment_places(tmp_path / "out", "mine", force=True) == (experiment, lists)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"classes": ["background"]}, "2 or more different names"),
        ({"classes": ["background", ""]}, "2 or more different names"),
        ({"classes": ["a", "b", "a"]}, "2 or more different names"),
        ({"classes": ["background", "mean"]}, "none of them 'mean'"),
        ({"labels": {0: 0}}, "needed are 2 or more"),
        ({"groups": "table.csv"}, "exclude each other"),
    ],
)
def test_options_that_cannot_be_meant_are_refused_before_anything_is_read(options, change, says):
    with pytest.raises(ConfigError, match=says):
        dataclasses.replace(options, **change)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"classes": ["background", "a", "b"]}, ConfigError, "names 3 classes, but there are 2"),
        ({"labels": {0: 0, 2: 255}}, ConfigError, r"needed are 0\.\.1"),
        ({"group_regex": "^x"}, DataError, "20 of 20 images have no group by '\\^x'"),
        ({"labelled": [Amount(100, "cases")]}, DataError, "needs 100 cases"),
    ],
)
def test_a_folder_that_does_not_fit_the_options_is_refused(options, change, error, says):
    with pytest.raises(error, match=says):
        read_study(dataclasses.replace(options, **change))


def test_ignored_pixels_are_in_the_experiment_and_in_no_class(options, tmp_path):
    for path in sorted((tmp_path / "data" / "masks").iterdir()):
        mask = np.array(Image.open(path)) // 255
        mask[16:] = 255
        Image.fromarray(mask).save(path)
    for given in (dataclasses.replace(options, ignore=255), dataclasses.replace(options, classes=["nothing", "blob"])):
        study = read_study(given)
        assert (study.classes.ignore, study.classes.labels, study.classes.table.num_classes) == (255, None, 2)
        text = experiment_text(study, tmp_path / "x.yaml", tmp_path / "lists")
        assert "  ignore: 255   # " in text
        test = {row[0]: row[1:] for row in list_table(study)[1]}["test"]
        assert float(test[2]) + float(test[3]) == pytest.approx(100, abs=0.02)
    third = read_study(dataclasses.replace(options, classes=["nothing", "blob", "void"]))
    assert third.classes.ignore is None and third.classes.table.num_classes == 3
