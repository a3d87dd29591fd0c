"""A run of two data sets: trains, resumes bit for bit, is scored by domain; images in tiles, letterboxed images."""

import json

import pytest

from knowsam.cli.main import run_command

TWO = (
    "data.sources={"
    "clinic: {source: {name: builtin, train: 10, val: 2, test: 2, size: 64}, labelled: labelled_50pct, weight: 1}, "
    "ward: {source: {name: builtin, train: 6, val: 2, test: 2, size: 48}, labelled: labelled_50pct, weight: 2}}"
)


@pytest.mark.parametrize("words", [("method.name=supervised",), ()], ids=["supervised", "knowsam"])
def test_two_data_sets(lab, tmp_path, words):
    assert lab.train(tmp_path / "whole", TWO, *words) == 0
    assert lab.train(tmp_path / "run", TWO, *words, "--stop-at", "2") == 0
    assert lab.train(tmp_path / "run", TWO, *words) == 0
    assert lab.differences(lab.outcome(tmp_path / "whole"), lab.outcome(tmp_path / "run")) == []
    assert run_command("evaluate", [str(tmp_path / "run")]) == 0
    scores = json.loads((tmp_path / "run" / "evaluation" / "test.json").read_text())
    assert scores["subgroups"]["by"] == "domain" and set(scores["subgroups"]["groups"]) == {"clinic", "ward"}
    assert lab.train(tmp_path / "run", TWO.replace("weight: 2", "weight: 3"), *words) == 73, "another experiment"


@pytest.mark.parametrize(
    ("block", "says"),
    [
        ("{a: {source: {name: builtin}}}", "holds 1 data sets"),
        ("{a: {source: {name: builtin}}, b: {root: x}}", "data.sources.b"),
        ("{a: {source: {name: builtin}}, b/c: {source: {name: builtin}}}", "has no '/'"),
        ("{a: {source: {name: builtin}, image_size: 3}, b: {source: {name: builtin}}}", "is not a key of a data set"),
        ("{a: {source: {name: builtn}}, b: {source: {name: builtin}}}", "builtn"),
    ],
)
def test_blocks_without_sense(lab, tmp_path, capsys, block, says):
    assert lab.train(tmp_path / "run", f"data.sources={block}") == 78
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ("data.patch_size=[48,32]", "evaluate.overlap=0.25"),
        ("data.fit=letterbox",),
        ("data.intensity={name: zscore, scope: dataset}",),
    ],
    ids=["tiles", "letterbox", "intensity of the data set"],
)
def test_other_ways_to_see_a_picture_resume_and_are_predicted_alike(lab, tmp_path, words):
    source = "data.source={name: builtin, train: 12, val: 2, test: 2, size: 80}"
    assert lab.train(tmp_path / "whole", source, "method.name=supervised", *words) == 0
    assert lab.train(tmp_path / "run", source, "method.name=supervised", *words, "--stop-at", "2") == 0
    assert lab.train(tmp_path / "run", source, "method.name=supervised", *words) == 0
    assert lab.differences(lab.outcome(tmp_path / "whole"), lab.outcome(tmp_path / "run")) == []
    assert run_command("evaluate", [str(tmp_path / "run")]) == 0

    import numpy as np
    from PIL import Image

    import knowsam

    run = knowsam.load_run(tmp_path / "run")
    picture = np.random.default_rng(0).integers(0, 256, (70, 100, 3), np.uint8)
    Image.fromarray(picture).save(tmp_path / "a.png")
    assert run_command("predict", [str(tmp_path / "run"), str(tmp_path / "a.png"), "-o", str(tmp_path / "out")]) == 0
    mask = np.asarray(Image.open(tmp_path / "out" / "masks" / "a.png"))
    assert mask.shape == (70, 100)
    np.testing.assert_array_equal(mask, run.predict(picture))
