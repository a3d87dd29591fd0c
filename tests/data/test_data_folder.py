import os
import shutil

import numpy as np
import pytest
from PIL import Image

from knowsam.data.cache import build_cache
from knowsam.data.folder import ImageFolder
from knowsam.data.labels import LabelTable
from knowsam.data.source import Source
from knowsam.data.splits import Splits
from knowsam.errors import ConfigError, DataError, NotFoundError

SPLITS = Splits(train=("a", "b", "sub/c"), labelled=("a",), val=("v",), test=("t",))
TABLE = LabelTable({0: 0, 1: 255}, 2)


@pytest.fixture
def root(tmp_path):
    rng = np.random.default_rng(0)
    for n, case_id in enumerate(("a", "b", "sub/c", "v", "t")):
        for folder in ("images", "masks"):
            (tmp_path / folder / case_id).parent.mkdir(parents=True, exist_ok=True)
        image = rng.integers(0, 256, (10, 12, 3), np.uint8)
        Image.fromarray(image).save(tmp_path / "images" / f"{case_id}.{'bmp' if n % 2 else 'png'}")
        Image.fromarray(np.uint8(image[..., 0] > 99) * 255).save(tmp_path / "masks" / f"{case_id}.png")
    return tmp_path


def folder(root, splits=SPLITS, **options):
    return ImageFolder(root=root, splits=splits, **{"num_classes": 2, "label_table": TABLE, **options})


def test_source(root):
    source = folder(root, spacing=(0.5, 0.25))
    assert isinstance(source, Source)
    assert source.train_ids() == ["a", "b", "sub/c"] and source.labelled_ids() == ["a"]
    assert source.eval_ids("val") == ["v"] and source.eval_ids("test") == ["t"]
    assert source.spacing("a") == (0.5, 0.25) and folder(root).spacing("a") is None
    for case_id in ("a", "v", "t"):
        image, mask = source.image(case_id), source.mask(case_id)
        assert image.shape == (10, 12, 3) and mask.shape == (10, 12) and mask.dtype == np.uint8
        np.testing.assert_array_equal(mask, image[..., 0] > 99)
    with pytest.raises(ValueError, match="'train'"):
        source.eval_ids("train")


def test_firewall(root):
    source = folder(root)
    for case_id in ("b", "sub/c"):
        assert (root / "masks" / f"{case_id}.png").is_file()
        with pytest.raises(DataError, match="unlabelled training case"):
            source.mask(case_id)
        with pytest.raises(DataError, match="unlabelled training case"):
            source.mask_fingerprint(case_id)
    with pytest.raises(DataError, match="none of the split lists"):
        source.mask("stranger")
    with pytest.raises(DataError, match="none of the split lists"):
        source.image("stranger")


def test_unlabelled_masks_need_not_exist(root, tmp_path):
    for case_id in ("b", "sub/c"):
        (root / "masks" / f"{case_id}.png").unlink()
    source = folder(root)
    shutil.rmtree(root / "masks")  # the image cache touches none, not even the labelled one
    cache = build_cache(source, source.train_ids(), image_size=8, masks=False, folder=tmp_path / "cache")
    assert cache.masks is None and cache.images.shape == (3, 3, 8, 8)


def test_ignored_files(root):
    for name in (".hidden.png", "Thumbs.db", "__MACOSX/._a.png", "extra.png", "readme.txt"):
        path = root / "images" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
    assert folder(root).train_ids() == ["a", "b", "sub/c"]


def test_missing_images_and_masks(root):
    (root / "images" / "b.bmp").unlink()
    with pytest.raises(DataError, match=r"train\.txt: 'b' is not in"):
        folder(root)
    ids = tuple(f"case{n:02d}" for n in range(12))
    for case_id in ids:
        (root / "images" / f"{case_id}.png").touch()
    with pytest.raises(DataError, match=r"12 of 12 .* have no mask .*case00, .*case09, \.\.\."):
        folder(root, Splits(test=ids))


def test_two_files_of_one_id(root):
    (root / "images" / "a.jpg").touch()
    with pytest.raises(DataError, match=r"a\.jpg and .*a\.png"):
        folder(root)
    (root / "images" / "a.jpg").unlink()
    (root / "masks" / "a.tif").touch()
    with pytest.raises(DataError, match=r"a\.png and .*a\.tif"):
        folder(root)


def test_mask_size_and_values(root):
    Image.new("L", (12, 9)).save(root / "masks" / "a.png")
    with pytest.raises(DataError, match="mask is 9 x 12, the image 10 x 12"):
        folder(root).mask("a")
    with pytest.raises(DataError, match=r"v\.png: mask values 255"):
        folder(root, label_table=None).mask("v")


def test_mask_suffix_in_one_folder(root):
    for path in (root / "masks").glob("*.png"):
        path.rename(root / "images" / f"{path.stem}_mask.png")
    (root / "masks" / "sub").rename(root / "unused")
    source = folder(root, mask_dir="images", mask_suffix="_mask")
    assert source.mask("a").shape == (10, 12)
    with pytest.raises(ConfigError, match="mask_suffix"):
        folder(root, mask_dir="images")


def test_image_suffix(root):
    """The layout of nnU-Net: ``x_0000.png`` and ``x.png``."""
    for path in list((root / "images").rglob("*.*")):
        path.rename(path.with_name(f"{path.stem}_0000{path.suffix}"))
    (root / "images" / "_0000.png").touch()  # no id is left of this name
    source = folder(root, image_suffix="_0000")
    assert source.train_ids() == ["a", "b", "sub/c"] and source.mask("a").shape == (10, 12)
    assert source.image_path("sub/c").stem == "c_0000"
    with pytest.raises(DataError, match="'a' is not in"):
        folder(root)


def test_both_suffixes_in_one_folder(root):
    for path in [path for path in (root / "images").glob("*.*")]:
        path.rename(path.with_name(f"{path.stem}_image{path.suffix}"))
    for path in (root / "masks").glob("*.png"):
        path.rename(root / "images" / f"{path.stem}_mask.png")
    splits = Splits(train=("a", "b"), labelled=("a",), val=("v",), test=("t",))
    source = folder(root, splits, image_dir="images", mask_dir="images", image_suffix="_image", mask_suffix="_mask")
    assert source.image("b").shape == (10, 12, 3) and source.mask("t").shape == (10, 12)
    with pytest.raises(ConfigError, match="suffixes are equal"):
        folder(root, splits, mask_dir="images", image_suffix="_x", mask_suffix="_x")


def test_faults_name_every_case(root):
    (root / "images" / "a.jpg").touch()
    with pytest.raises(DataError) as caught:
        folder(root)
    assert [(fault.kind, fault.cases) for fault in caught.value.faults] == [("several images", ("a",))]
    (root / "images" / "a.jpg").unlink()
    for name in ("a", "t"):
        (root / "masks" / f"{name}.png").unlink()
    with pytest.raises(DataError) as caught:
        folder(root)
    assert [(fault.kind, fault.cases) for fault in caught.value.faults] == [
        ("missing mask", ("a",)),
        ("missing mask", ("t",)),
    ]
    (root / "images" / "v.bmp").unlink()
    with pytest.raises(DataError) as caught:
        folder(root)
    assert [(fault.kind, fault.cases) for fault in caught.value.faults] == [("missing image", ("v",))]


def test_size_and_values_are_told_together(root):
    Image.new("L", (12, 9), 3).save(root / "masks" / "a.png")
    with pytest.raises(DataError, match="9 x 12, the image 10 x 12") as caught:
        folder(root).mask("a")
    assert [fault.kind for fault in caught.value.faults] == ["mask of another size", "mask value without a class"]


def test_wrong_settings(root):
    with pytest.raises(NotFoundError, match="nowhere"):
        folder(root / "nowhere")
    with pytest.raises(NotFoundError, match="pictures"):
        folder(root, image_dir="pictures")
    with pytest.raises(ConfigError, match="2 classes, the dataset 3"):
        folder(root, num_classes=3)
    for spacing in ((1.0,), (1.0, 0.0), (1.0, 1.0, 1.0), 1.0, ("x", "y")):
        with pytest.raises(ConfigError, match=r"\(y, x\)"):
            folder(root, spacing=spacing)


def test_fingerprints_follow_content(root):
    source = folder(root)
    image, mask = source.fingerprint("a"), source.mask_fingerprint("a")
    assert source.fingerprint("a") == image and image != source.fingerprint("b")
    Image.new("L", (12, 10)).save(root / "masks" / "a.png")
    assert source.fingerprint("a") == image and source.mask_fingerprint("a") != mask
    content = bytearray((root / "images" / "a.png").read_bytes())
    content[-1] ^= 1  # same size, written within the same moment
    (root / "images" / "a.png").write_bytes(content)
    assert source.fingerprint("a") != image


def test_a_vanished_file_is_named(root):
    source = folder(root)
    os.unlink(root / "images" / "a.png")
    for ask in (source.image, source.fingerprint):
        with pytest.raises(NotFoundError, match=r"a\.png"):
            ask("a")


def two_parts(root):
    """a has two masks, one of which is a's first rows."""
    whole = np.array(Image.open(root / "masks" / "a.png"))
    for name, rows in (("a.png", slice(0, 6)), ("a_1.png", slice(4, 10))):
        part = np.zeros_like(whole)
        part[rows] = whole[rows]
        Image.fromarray(part).save(root / "masks" / name)
    return whole > 0


def test_several_masks_are_refused_until_they_are_merged(root):
    whole = two_parts(root)
    with pytest.raises(DataError, match="1 of 3 masks are several files") as caught:
        folder(root)
    assert [(fault.kind, fault.cases) for fault in caught.value.faults] == [("several masks", ("a",))]
    assert "merge_masks=true" in caught.value.hint
    source = folder(root, merge_masks=True)
    assert [path.name for path in source.mask_paths("a")] == ["a.png", "a_1.png"]
    np.testing.assert_array_equal(source.mask("a"), whole)
    before = source.mask_fingerprint("a")
    Image.new("L", (12, 10)).save(root / "masks" / "a_1.png")
    assert folder(root, merge_masks=True).mask_fingerprint("a") != before


def test_merged_masks_stay_behind_the_firewall(root):
    Image.new("L", (12, 10)).save(root / "masks" / "b_1.png")
    source = folder(root)  # nobody may read the masks of b, however many there are
    with pytest.raises(DataError, match="unlabelled training case"):
        source.mask_paths("b")


def test_masks_with_two_classes_at_one_pixel_cannot_be_merged(root):
    two_parts(root)
    Image.fromarray(np.full((10, 12), 128, np.uint8)).save(root / "masks" / "a_1.png")
    table = LabelTable({0: 0, 1: 255, 2: 128}, 3)
    with pytest.raises(DataError, match=r"a: \d+ pixels have several classes \(1, 2\)"):
        folder(root, merge_masks=True, label_table=table, num_classes=3).mask("a")


def test_folders_of_folders(root):
    for case_id in ("a", "v", "t"):
        for kind in ("images", "masks"):
            (root / "site" / case_id / kind).mkdir(parents=True)
            for path in (root / kind).glob(f"{case_id}.*"):
                shutil.move(path, root / "site" / case_id / kind / f"1{path.suffix}")
    splits = Splits(train=("a/1", "more/b", "more/sub/c"), labelled=("a/1",), val=("v/1",), test=("t/1",))
    images = {".": "site/*/images", "more": "images"}
    source = folder(root, splits, image_dir=images, mask_dir="site/*/masks")
    np.testing.assert_array_equal(source.mask("v/1"), source.image("v/1")[..., 0] > 99)
    assert source.image_path("more/sub/c") == root / "images" / "sub" / "c.png"
    splits = Splits(train=("gone/1",), labelled=("gone/1",))
    with pytest.raises(DataError, match="gone/1"):
        folder(root, splits, image_dir=images, mask_dir="site/*/masks")
    with pytest.raises(ConfigError, match="mask_suffix must tell masks apart"):
        folder(root, image_dir=images, mask_dir={"more": "images"})
