"""The lists in data_splits/, and the real folders they name where this machine has them."""

import csv
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

from knowsam.cli.main import run_command
from knowsam.data.cache import build_cache
from knowsam.data.folder import ImageFolder
from knowsam.data.h5 import H5Slices
from knowsam.data.labels import LabelTable
from knowsam.data.splits import load_splits
from knowsam.errors import NotFoundError

ROOT = Path(__file__).resolve().parents[2]
LISTS = ROOT / "data_splits"
DATA = Path(os.environ.get("KNOWSAM_DATA") or ROOT.parent / "shared" / "data")
BINARY = LabelTable({0: 0, 1: 255}, 2)
PERCENTS = {f"labelled_{p}pct": p for p in (1, 5, 10, 20, 30)}

# data set: label lists from small to large, group_regex, counts of train, val, test
SHIPPED = {
    "kvasir_seg": (list(PERCENTS), None, (799, 100, 100)),
    "dsb2018": (list(PERCENTS), None, (465, 67, 132)),
    "acdc": (["labelled_3cases", "labelled_7cases", "labelled_14cases"], r"^(patient\d+)", (1312, 20, 40)),
    "hippocampus": ([f"labelled_{n}cases" for n in (5, 10, 20, 50)], None, (200, 20, 40)),
    "brats19": (["labelled_25cases", "labelled_50cases"], None, (250, 25, 60)),
    "pancreas": (["labelled_6cases", "labelled_12cases"], None, (56, 6, 18)),
    "la": (["labelled_4cases", "labelled_8cases", "labelled_16cases"], None, (72, 8, 20)),
    "polyp_external": ([], None, (0, 0, 60)),
}
NOT_DRAWN = {"brats19", "pancreas"}  # published lists, taken as they are


def real(name):
    if not (DATA / name).is_dir():
        pytest.skip(f"data set {name} is not here (set KNOWSAM_DATA to the folder that holds it)")
    return DATA / name


def patients(ids):
    return {i.split("_")[0] for i in ids}


@pytest.mark.parametrize("name", SHIPPED)
def test_lists(name):
    label_names, regex, counts = SHIPPED[name]
    smaller = set()
    for label_name in label_names or ["labelled_10pct"]:
        splits = load_splits(LISTS / name, label_name, group_regex=regex)  # disjoint, groups on one side
        assert (len(splits.train), len(splits.val), len(splits.test)) == counts
        assert smaller <= set(splits.labelled) <= set(splits.train)
        smaller = set(splits.labelled)
        if label_name in PERCENTS:
            assert len(splits.labelled) == round(len(splits.train) * PERCENTS[label_name] / 100)
    for path in (LISTS / name).glob("*.txt"):
        lines = path.read_bytes().decode().split("\n")
        assert lines.pop() == "" and lines == sorted(set(lines)) and all(lines), path
    assert {p.stem for p in (LISTS / name).glob("labelled_*") if "_draw" not in p.stem} == set(label_names)


def test_isic_has_instructions_only():
    assert [p.name for p in (LISTS / "isic2018").iterdir()] == ["README.md"]
    with pytest.raises(NotFoundError):
        load_splits(LISTS / "isic2018")


@pytest.mark.parametrize(("cases", "slices"), [(3, 68), (7, 136), (14, 256)])
def test_acdc_labels_are_whole_patients(cases, slices):
    splits = load_splits(LISTS / "acdc", f"labelled_{cases}cases")
    labelled = patients(splits.labelled)
    assert len(splits.labelled) == slices and len(labelled) == cases
    assert set(splits.labelled) == {i for i in splits.train if i.split("_")[0] in labelled}


def test_acdc_twins_are_on_one_side():
    splits = load_splits(LISTS / "acdc", "labelled_14cases")
    sides = [s for s in ("train", "val", "test") if patients(getattr(splits, s)) & {"patient074", "patient076"}]
    assert sides == ["train"]


def test_kvasir_near_duplicate_is_out():
    splits = load_splits(LISTS / "kvasir_seg")
    assert "kvasir_test_0016" in splits.test and "kvasir_train_0222" not in splits.train


def test_no_machine_path_in_the_lists():
    for path in LISTS.rglob("*"):
        if path.is_file():
            assert not re.search(r"(^|[\s\"'(`])/(home|work|tmp|mnt)/", path.read_text(encoding="utf-8")), path


def test_lists_can_be_drawn_again(tmp_path):
    there = [name for name in SHIPPED if name not in {"la", *NOT_DRAWN} and real(name)]
    subprocess.run([sys.executable, LISTS / "draw.py", DATA, tmp_path], check=True, stdout=subprocess.DEVNULL)
    drawn = {p.relative_to(tmp_path): p.read_bytes() for p in tmp_path.rglob("*.txt")}
    wanted = {p.relative_to(LISTS): p.read_bytes() for name in there for p in (LISTS / name).glob("*.txt")}
    assert drawn == {path: content for path, content in wanted.items() if "_draw" not in path.stem}


def test_the_lists_of_la_can_be_drawn_again(tmp_path):
    """From UA-MT's lists, whose training list is in alphabetical order."""
    splits = load_splits(LISTS / "la", "labelled_8cases")
    (tmp_path / "data" / "la").mkdir(parents=True)
    for name, ids in (("train", [*splits.train, *splits.val]), ("test", splits.test)):
        (tmp_path / "data" / "la" / f"{name}.list").write_text("\n".join(sorted(ids)) + "\n")
    words = [sys.executable, LISTS / "draw.py", tmp_path / "data", tmp_path]
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    drawn = {p.name: p.read_bytes() for p in (tmp_path / "la").glob("*.txt")}
    assert drawn == {p.name: p.read_bytes() for p in (LISTS / "la").glob("*.txt")}


def test_label_draws_of_kvasir():
    for percent, count in ((5, 40), (10, 80)):
        lists = [load_splits(LISTS / "kvasir_seg", f"labelled_{percent}pct_draw{n}").labelled for n in range(5)]
        assert {len(ids) for ids in lists} == {count} and len(set(lists)) == 5
    inner, outer = (load_splits(LISTS / "kvasir_seg", f"labelled_{p}pct_draw3").labelled for p in (5, 10))
    assert set(inner) < set(outer)


def test_label_draws_can_be_drawn_again(tmp_path):
    root, lists = real("kvasir_seg"), tmp_path / "lists"
    shutil.copytree(LISTS / "kvasir_seg", lists, ignore=shutil.ignore_patterns("*_draw*"))
    words = ["--images", str(root), "--out", str(lists), "--labelled", "5", "10", "--label-seed", "0..4"]
    assert run_command("splits", words) == 0
    shipped = {p.name: p.read_bytes() for p in (LISTS / "kvasir_seg").glob("*_draw*.txt")}
    assert {p.name: p.read_bytes() for p in lists.glob("*_draw*.txt")} == shipped


@pytest.mark.parametrize("name", ["kvasir_seg", "dsb2018", "polyp_external"])
def test_real_folder(name, tmp_path):
    root = real(name)
    label_names, _, _ = SHIPPED[name]
    splits = load_splits(LISTS / name, label_names[0] if label_names else "labelled_10pct")
    source = ImageFolder(root=root, splits=splits, num_classes=2, label_table=BINARY)
    for case_id in [*source.labelled_ids(), *source.eval_ids("test")[:10]]:
        image, mask = source.image(case_id), source.mask(case_id)
        assert image.shape == (*mask.shape, 3) and mask.max() <= 1
    if source.labelled_ids():
        cache = build_cache(source, source.labelled_ids(), image_size=64, masks=True, folder=tmp_path)
        assert cache.images.shape[1:] == (3, 64, 64) and 0 < cache.masks[:].mean() < 1

    with open(root / "index.csv", newline="", encoding="utf-8") as file:
        group_of = {r["name"]: r["near_duplicate_group"] for r in csv.DictReader(file)}
    sides = {}
    for side in ("train", "val", "test"):
        for case_id in getattr(splits, side):
            if group_of[case_id] != "-1":
                assert sides.setdefault(group_of[case_id], side) == side, case_id


def test_real_acdc(tmp_path):
    root = real("acdc")
    splits = load_splits(LISTS / "acdc", "labelled_7cases", group_regex=r"^(patient\d+)")
    assert {p.stem for p in (root / "slices").glob("*.jpg")} == set(splits.train)
    assert {p.stem for p in (root / "volumes").glob("*.h5")} == {*splits.val, *splits.test}

    # as its unpack.py does, for a few cases
    few = type(splits)(train=splits.labelled[:6], labelled=splits.labelled[:3], val=splits.val[:1])
    (tmp_path / "data" / "slices").mkdir(parents=True)
    for case_id in few.train:
        with h5py.File(tmp_path / "data" / "slices" / f"{case_id}.h5", "w") as file:
            file["image"] = np.float32(Image.open(root / "slices" / f"{case_id}.jpg")) / 255
            file["label"] = np.asarray(Image.open(root / "masks" / f"{case_id}.png"))
    (volume,) = few.val
    with h5py.File(root / "volumes" / f"{volume}.h5") as packed, h5py.File(tmp_path / f"data/{volume}.h5", "w") as file:
        file["image"], file["label"] = np.float32(packed["image"][()]) / 255, packed["label"][()]
    source = H5Slices(root=tmp_path, splits=few, num_classes=4)
    assert source.image(volume).shape == (*source.mask(volume).shape, 3) and source.mask(volume).max() == 3
    for case_id in few.train:  # 8 bits through float and back, as levels of 16 bits
        stored = np.asarray(Image.open(root / "slices" / f"{case_id}.jpg"))
        np.testing.assert_array_equal(source.image(case_id)[..., 0], stored.astype(np.uint16) * 257)
    cache = build_cache(source, source.labelled_ids(), image_size=32, masks=True, folder=tmp_path / "cache")
    assert cache.masks.shape == (3, 32, 32) and cache.masks[:].max() <= 3
