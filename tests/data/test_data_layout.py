import re

import numpy as np
import pytest

from knowsam.data.layout import ANY_NAME, case_files, find_layout, merge_masks
from knowsam.errors import DataError, NotFoundError


def make(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")  # no file is opened
    return folder


def seen(layout):
    return sorted(layout.image_files()), sorted(layout.mask_files())


@pytest.mark.parametrize(
    ("names", "start", "suffixes", "ids"),
    [
        (["images/a.png", "images/b.jpg", "masks/a.tif", "masks/b.png"], "", ("", ""), "a b"),
        (["Images/a.png", "Labels/a.png"], "", ("", ""), "a"),
        (["images/a.png", "masks/a.png"], "images", ("", ""), "a"),
        (["pics/a.png", "annotations/a_mask.png"], "pics", ("", "_mask"), "a"),
        (["images/ISIC_1.jpg", "masks/ISIC_1_segmentation.png"], "", ("", "_segmentation"), "ISIC_1"),
        (["images/1.png", "images/10.png", "masks/1.png", "masks/10.png"], "", ("", ""), "1 10"),
        (["images/1.png", "images/10.png", "masks/1_m.png", "masks/10_m.png"], "", ("", "_m"), "1 10"),
        (["images/i1.png", "masks/i1mask.png"], "", ("", "mask"), "i1"),
        (["imagesTr/c_1_0000.png", "labelsTr/c_1.png"], "imagesTr", ("_0000", ""), "c_1"),
        (["a.png", "a_mask.png", "b.png", "b_mask.png"], "", ("", "_mask"), "a b"),
        (["a_image.png", "a_mask.png"], "", ("_image", "_mask"), "a"),
        (["a_img.png", "a-GT.bmp"], "", ("_img", "-GT"), "a"),
        (["a.png", "masks/a.png"], "", ("", ""), "a"),
        (["images/p1/a.png", "masks/p1/a_seg.png"], "", ("", "_seg"), "p1/a"),
    ],
)
def test_layouts(tmp_path, names, start, suffixes, ids):
    layout = find_layout(make(tmp_path, *names) / start)
    assert (layout.image_suffix, layout.mask_suffix) == suffixes
    assert seen(layout) == (ids.split(), ids.split())


def test_images_without_a_mask_and_masks_without_an_image(tmp_path):
    make(tmp_path, "images/a.png", "images/b.png", "images/c.png", "masks/a_mask.png", "masks/z_mask.png")
    assert seen(find_layout(tmp_path)) == (["a", "b", "c"], ["a", "z"])


def test_folders_far_apart(tmp_path):
    layout = find_layout(make(tmp_path / "x", "a.png"), make(tmp_path / "y" / "deep", "a.png"))
    assert layout.root == tmp_path and seen(layout) == (["a"], ["a"])


def test_given_suffixes_are_kept(tmp_path):
    make(tmp_path, "images/a.png", "masks/a_1.png", "masks/a_2.png", "masks/a.png")
    assert find_layout(tmp_path).mask_suffix == ""
    layout = find_layout(tmp_path, mask_suffix="_2")
    assert [path.name for path in layout.mask_files()["a"]] == ["a_2.png"]


def test_no_masks(tmp_path):
    assert find_layout(make(tmp_path, "a.png", "b.png")).masks is None


def test_numbered_masks_are_neither_images_nor_whole_masks(tmp_path):
    layout = find_layout(make(tmp_path, "a.png", "a_mask.png", "a_mask_1.png", "b (2).png", "b (2)_mask.png"))
    assert seen(layout) == (["a", "b (2)"], ["a", "b (2)"])
    assert {i: [p.name for p in paths] for i, paths in layout.further_masks().items()} == {"a": ["a_mask_1.png"]}


def test_other_kinds_are_counted_once(tmp_path):
    layout = find_layout(make(tmp_path, "a.png", "masks/a.png", "masks/b.jp2", "c.nii.gz", "notes.txt"))
    assert layout.other_files() == {".jp2": 1, ".nii.gz": 1}


def test_refusals(tmp_path):
    with pytest.raises(NotFoundError, match="nowhere"):
        find_layout(tmp_path / "nowhere")
    make(tmp_path, "images/img1.png", "masks/gt1.png", "empty/notes.txt")
    with pytest.raises(NotFoundError, match="no picture"):
        find_layout(tmp_path / "empty", tmp_path / "masks")
    with pytest.raises(NotFoundError, match="folder of masks"):
        find_layout(tmp_path / "images", tmp_path / "none")
    with pytest.raises(DataError, match="images are called img1; masks gt1"):
        find_layout(tmp_path)
    with pytest.raises(DataError, match="ends in '_m'"):
        find_layout(tmp_path / "images", tmp_path / "images", mask_suffix="_m")


@pytest.mark.parametrize(
    ("names", "images", "masks", "ids", "splits"),
    [
        # by class, as BUSI's mirrors have it; a class without masks is no obstacle
        (
            ["benign/images/a.png", "benign/mask/a.png", "malignant/images/a.png", "malignant/mask/a.png"],
            "*/images",
            "*/mask",
            "benign/a malignant/a",
            {},
        ),
        (
            ["benign/images/a.png", "benign/mask/a.png", "normal/images/a.png"],
            "*/images",
            "*/mask",
            "benign/a normal/a",
            {},
        ),
        (
            [f"{s}/{k}/1.png" for s in ("train", "validation", "test") for k in ("images", "labels")],
            "*/images",
            "*/labels",
            "test/1 train/1 validation/1",
            {"train": "train", "validation": "val", "test": "test"},
        ),
        (
            [f"{s}/{c}/{k}/1.png" for s in ("Train", "Valid") for c in "xy" for k in ("images", "masks")],
            "*/*/images",
            "*/*/masks",
            "Train/x/1 Train/y/1 Valid/x/1 Valid/y/1",
            {"Train": "train", "Valid": "val"},
        ),
        (
            ["train/imgs/1.png", "train/masks/1.png", "test/images/1.png", "test/gt/1.png"],
            {"train": "train/imgs", "test": "test/images"},
            {"train": "train/masks", "test": "test/gt"},
            "test/1 train/1",
            {"train": "train", "test": "test"},
        ),
        (
            ["images/train/1.png", "images/val/2.png", "masks/train/1.png", "masks/val/2.png"],
            "images",
            "masks",
            "train/1 val/2",
            {"train": "train", "val": "val"},
        ),
        (
            ["imagesTr/a_0000.png", "labelsTr/a.png", "imagesTs/b_0000.png", "labelsTs/b.png"],
            {"train": "imagesTr", "test": "imagesTs"},
            {"train": "labelsTr", "test": "labelsTs"},
            "test/b train/a",
            {"train": "train", "test": "test"},
        ),
        (
            [
                *["Training_Input/I_1.jpg", "T1_Training_GroundTruth/I_1_segmentation.png"],
                *["Test_Input/I_2.jpg", "T1_Test_GroundTruth/I_2_segmentation.png"],
            ],
            {"train": "Training_Input", "test": "Test_Input"},
            {"train": "T1_Training_GroundTruth", "test": "T1_Test_GroundTruth"},
            "test/I_2 train/I_1",
            {"train": "train", "test": "test"},
        ),
        (["train/1.png", "train_masks/1_mask.png"], "train", "train_masks", "1", {}),
        (
            ["train/a.png", "train/a_mask.png", "test/b.png", "test/b_mask.png", "unlabelled/c.png"],
            ".",
            ".",
            "test/b train/a unlabelled/c",
            {"train": "train", "test": "test", "unlabelled": "train"},
        ),
    ],
)
def test_trees(tmp_path, names, images, masks, ids, splits):
    layout = find_layout(make(tmp_path, *names))
    assert (layout.root, layout.images, layout.masks) == (tmp_path, images, masks)
    assert sorted(layout.image_files()) == ids.split() and dict(layout.split_of) == splits
    masked = {name for name in ids.split() if not name.startswith(("normal", "unlabelled"))}
    assert set(layout.mask_files()) == masked


@pytest.mark.parametrize(
    ("names", "images", "masks", "ids"),
    [
        (
            ["labelled/images/1.png", "labelled/masks/1.png", "unlabelled/1.png"],
            "labelled/images",
            "labelled/masks",
            "1",
        ),
        (["labeled/1.png", "labeled/1_gt.png", "unlabeled/images/1.png"], "labeled", "labeled", "1"),
        (["images/1.png", "masks/1.png", "unlabelled/1.png"], "images", "masks", "1"),
        (["benign/images/1.png", "benign/masks/1.png", "unlabelled/1.png"], "*/images", "*/masks", "benign/1"),
    ],
)
def test_unlabelled_images_of_the_same_names_are_others(tmp_path, names, images, masks, ids):
    layout = find_layout(make(tmp_path, *names))
    (more,) = [folder for start, folder in layout.images.items() if start == "unlabelled"]
    assert layout.images == {".": images, "unlabelled": more} and layout.mask_files().keys() == {ids}
    assert sorted(layout.image_files()) == sorted([ids, "unlabelled/1"])
    assert layout.image_files()["unlabelled/1"] == [tmp_path / more / "1.png"]


def test_unlabelled_images_elsewhere(tmp_path):
    make(tmp_path, "study/images/a.png", "study/masks/a.png", "more/b.png")
    layout = find_layout(tmp_path / "study", unlabelled=tmp_path / "more")
    assert layout.root == tmp_path and layout.masks == "study/masks"
    assert sorted(layout.image_files()) == ["a", "unlabelled/b"]
    with pytest.raises(NotFoundError, match=r"unlabelled images .*nowhere"):
        find_layout(tmp_path / "study", unlabelled=tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("names", "suffixes", "parts"),
    [
        (["a.png", "a_mask.png", "a_mask_1.png", "a_mask_2.png"], ("", "_mask"), "a_mask a_mask_1 a_mask_2"),
        (["images/a.png", "masks/a_mask_1.png", "masks/a_mask_2.png"], ("", "_mask"), "a_mask_1 a_mask_2"),
        (["images/a.png", "masks/a.png", "masks/a_1.png", "masks/a (2).png"], ("", ""), "a a_1 a (2)"),
        (
            ["images/b (1).png", "masks/b (1)_mask.png", "masks/b (1)_mask_1.png"],
            ("", "_mask"),
            "b (1)_mask b (1)_mask_1",
        ),
        (
            ["images/a_training.png", "images/b_training.png", "masks/a_manual1.png", "masks/b_manual1.png"],
            ("_training", "_manual1"),
            "a_manual1",
        ),
        (["images/10.png", "images/1.png", "masks/1.png", "masks/10.png", "masks/1_10.png"], ("", ""), "1 1_10"),
    ],
)
def test_several_masks_of_one_image(tmp_path, names, suffixes, parts):
    layout = find_layout(make(tmp_path, *names))
    assert (layout.image_suffix, layout.mask_suffix) == suffixes
    case = min(layout.image_files())
    files = layout.mask_files().get(case, []) + layout.further_masks().get(case, [])
    assert [path.stem for path in files] == re.findall(r"\w+(?: \(\d\)\w*)?", parts)


def test_one_image_in_its_folder_has_all_masks_of_it(tmp_path):
    """As the Data Science Bowl of 2018 comes: a folder of each case, with one mask of each nucleus."""
    make(tmp_path, "a1/images/a1.png", "a1/masks/0c.png", "a1/masks/9f.png", "b2/images/b2.png", "b2/masks/77.png")
    layout = find_layout(tmp_path)
    assert layout.mask_suffix == ANY_NAME and layout.mask_files() == {}
    parts = {i: [path.stem for path in files] for i, files in layout.further_masks().items()}
    assert parts == {"a1/a1": ["0c", "9f"], "b2/b2": ["77"]}
    make(tmp_path, "a1/images/a1_too.png")
    with pytest.raises(DataError, match="no mask fits an image"):
        find_layout(tmp_path)
    with pytest.raises(DataError, match="not alone in its own"):
        find_layout(tmp_path, mask_suffix=ANY_NAME).further_masks()


def test_a_number_is_no_part_where_an_image_has_it(tmp_path):
    layout = find_layout(make(tmp_path, "images/a.png", "images/a_1.png", "masks/a.png", "masks/a_1.png"))
    assert seen(layout) == (["a", "a_1"], ["a", "a_1"]) and layout.further_masks() == {}


def test_masks_among_the_images_are_no_images(tmp_path):
    make(tmp_path, "images/a.png", "images/a_mask.png", "images/b_mask.png", "masks/a.png", "masks/b_mask.png")
    layout = find_layout(tmp_path)
    assert sorted(layout.image_files()) == ["a", "b_mask"]
    assert [path.name for path in layout.masks_among_images()] == ["a_mask.png"]


def test_what_was_seen_is_said(tmp_path):
    make(tmp_path, "images/a.jpg", "masks/a.jp2", "masks/b.jp2", "volumes/c.nii.gz")
    with pytest.raises(DataError, match=r"masks are 2 \.jp2") as caught:
        find_layout(tmp_path)
    assert "  masks/ 2 .jp2" in str(caught.value) and "  volumes/ 1 .nii.gz" in str(caught.value)
    assert "save them as PNG" in caught.value.hint
    with pytest.raises(NotFoundError, match=r"volumes: *|1 \.nii\.gz") as caught:
        find_layout(tmp_path / "volumes")
    assert "{class}/images" in caught.value.hint


def test_merged_masks():
    first, second = np.zeros((2, 3, 4), np.uint8)
    first[0, :2], second[0, 1:], first[2, 0], second[2, 0] = 1, 1, 255, 255
    second[1, 0] = 2
    merged = merge_masks([first, second, np.zeros_like(first)])
    assert merged.tolist() == [[1, 1, 1, 1], [2, 0, 0, 0], [255, 0, 0, 0]] and merged.dtype == np.uint8
    first[1, 1], second[1, 1] = 255, 1  # a class that one of them knows
    assert merge_masks([first, second])[1, 1] == 1 == merge_masks([second, first])[1, 1]
    assert first[0].tolist() == [1, 1, 0, 0]  # untouched
    second[0, 0] = 2
    with pytest.raises(DataError, match=r"1 pixels have several classes \(1, 2\)"):
        merge_masks([first, second])
    with pytest.raises(DataError, match="one size"):
        merge_masks([first, second.T])


def test_stars_without_a_folder(tmp_path):
    make(tmp_path, "a/pics/1.png")
    assert sorted(case_files(tmp_path, "*/pics")) == ["a/1"]
    assert sorted(case_files(tmp_path, {".": "a/pics", "more": "a*/pics"})) == ["1", "more/a/1"]
    with pytest.raises(NotFoundError, match=r"no folder \*/images"):
        case_files(tmp_path, "*/images")
