"""The masks of unlabelled images reach nothing: scrambled or deleted, they leave every trained bit as it was."""

import shutil

import numpy as np
import pytest
from PIL import Image

from knowsam.components import METHODS
from knowsam.data.builtin import BuiltIn

SKD = "skd={weight: 1.0, rampup: 0.0}"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Three datasets of PNG files that differ in the unlabelled masks alone, and their split lists."""
    top = tmp_path_factory.mktemp("firewall")
    source = BuiltIn("all", train=8, val=2, test=1, size=64)
    train, val, test = source.train_ids(), source.eval_ids("val"), source.eval_ids("test")
    labelled, unlabelled = train[:3], train[3:]
    splits = top / "splits"
    splits.mkdir()
    for name, ids in (("train", train), ("val", val), ("test", test), ("labelled_3", labelled)):
        (splits / f"{name}.txt").write_text("".join(f"{i}\n" for i in ids))
    noise = np.random.default_rng(0)
    for variant in ("intact", "scrambled", "deleted"):
        for part in ("images", "masks"):
            (top / variant / part).mkdir(parents=True)
        for case in (*train, *val, *test):
            Image.fromarray(source.image(case)).save(top / variant / "images" / f"{case}.png")
            if case in unlabelled and variant == "deleted":
                continue
            mask = source.mask(case) * 255
            if case in unlabelled and variant == "scrambled":
                mask = noise.integers(0, 256, mask.shape).astype(np.uint8)  # values that no label table knows
            Image.fromarray(mask).save(top / variant / "masks" / f"{case}.png")
    return top


def train(lab, folders, run, variant: str, *words: str) -> dict:
    source = f"{{name: image_folder, root: {folders / variant}}}"
    data = (
        f"data.source={source}",
        f"data.splits={folders / 'splits'}",
        "data.labelled=labelled_3",
        "data.labels={0: 0, 1: 255}",
        f"data.cache={run}-cache",
    )
    assert lab.train(run, *data, "train.max_steps=2", "train.validate_every=2", "optim.subnets.lr=3e-2", *words) == 0
    return lab.outcome(run)


@pytest.mark.parametrize("words", [*((f"method.name={name}",) for name in METHODS), ("method.name=supervised", SKD)])
def test_unlabelled_masks_reach_nothing(lab, folders, tmp_path, words):
    words = (*words, "method.mix.start=0.0") if words == ("method.name=knowsam",) else words
    intact = train(lab, folders, tmp_path / "intact", "intact", *words)
    for variant in ("scrambled", "deleted"):
        changed = train(lab, folders, tmp_path / variant, variant, *words)
        assert lab.differences(intact, changed) == []


def test_the_comparison_can_fail(lab, folders, tmp_path):
    """One labelled mask changed: the weights differ."""
    words = ("method.name=supervised", "data.unlabelled_batch=0", "fusion=null")
    intact = train(lab, folders, tmp_path / "intact", "intact", *words)
    shutil.copytree(folders / "intact", tmp_path / "data" / "other")
    path = tmp_path / "data" / "other" / "masks" / "train_0000.png"
    Image.fromarray(255 - np.asarray(Image.open(path))).save(path)
    (tmp_path / "data" / "splits").symlink_to(folders / "splits")
    other = train(lab, tmp_path / "data", tmp_path / "other", "other", *words)
    assert any(name.startswith("last.method") for name in lab.differences(intact, other))


def test_the_source_refuses(folders):
    from knowsam.data.folder import ImageFolder
    from knowsam.data.splits import load_splits
    from knowsam.errors import DataError

    splits = load_splits(folders / "splits", "labelled_3")
    source = ImageFolder(root=folders / "intact", splits=splits, num_classes=2)
    for read in (source.mask, source.mask_fingerprint):
        with pytest.raises(DataError):
            read("train_0005")
