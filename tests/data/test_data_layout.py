import pytest

from knowsam.data.layout import find_layout
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
    assert layout.root() == tmp_path and seen(layout) == (["a"], ["a"])


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
    layout = find_layout(make(tmp_path, "a.png", "masks/a.png", "masks/b.gif", "c.nii.gz", "notes.txt"))
    assert layout.other_files() == {".gif": 1, ".gz": 1}


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
