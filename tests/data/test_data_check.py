import json
import shutil

import h5py
import numpy as np
import pytest
import tifffile
from PIL import Image

from knowsam.data import cache, traits
from knowsam.data.builtin import BuiltIn, render
from knowsam.data.check import check_all, check_quick
from knowsam.data.folder import ImageFolder
from knowsam.data.h5 import H5Slices
from knowsam.data.intensity import Preparation
from knowsam.data.labels import LabelTable
from knowsam.data.splits import inspect_splits
from knowsam.errors import DataError
from knowsam.io import Reading, opening

LISTS = {
    "train": [f"p{n}_t" for n in range(6)],
    "labelled_half": [f"p{n}_t" for n in range(3)],
    "val": ["p6_v", "p7_v"],
    "test": ["p8_e", "p9_e"],
}
IDS = [*LISTS["train"], *LISTS["val"], *LISTS["test"]]


class Study:
    """A good folder with lists, to be spoilt."""

    def __init__(self, path):
        self.path = path
        self.images, self.masks, self.lists = path / "images", path / "masks", path / "lists"
        for folder in (self.images, self.masks, self.lists):
            folder.mkdir()
        for n, case_id in enumerate(IDS):
            image, mask = render(np.random.default_rng(n), 48, 2)
            mask[:4, :4] = 1
            Image.fromarray(image[:, : 40 + n]).save(self.images / f"{case_id}.png")
            Image.fromarray(mask[:, : 40 + n] * 255).save(self.masks / f"{case_id}.png")
        for name in LISTS:
            self.write(name, LISTS[name])

    def write(self, name, ids):
        (self.lists / f"{name}.txt").write_text("".join(f"{i}\n" for i in ids))

    def append(self, name, case_id):
        with open(self.lists / f"{name}.txt", "a") as file:
            file.write(f"{case_id}\n")

    def build(self, splits, **options):
        table = LabelTable({0: 0, 1: 255}, 2)
        return ImageFolder(root=self.path, splits=splits, num_classes=2, label_table=table, **options)

    def source(self):
        return self.build(inspect_splits(self.lists, "labelled_half")[0])

    def check(self, **options):
        lists = inspect_splits(self.lists, "labelled_half", group_regex=r"^(p\d+)_")
        found, _ = check_all(
            self.build,
            lists,
            num_classes=2,
            class_names=["background", "lesion"],
            cache_folder=self.path / "cache",
            **options,
        )
        return found

    def quick(self):
        check_quick(self.source(), self.path / "cache")


@pytest.fixture
def study(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "_memo", cache._Memo())
    monkeypatch.setattr(cache, "_RACY_SECONDS", -1.0)  # files of this moment may be remembered
    return Study(tmp_path)


def kinds(faults):
    return sorted((fault.kind, *fault.cases) for fault in faults)


def test_a_good_study(study):
    progress = []
    found = study.check(progress=lambda done, total: progress.append((done, total)))
    assert found.errors == [] and found.warnings == []
    assert found.cases == {"train": 6, "labelled": 3, "val": 2, "test": 2}
    assert found.sizes == ((48, 40), (48, 48))
    assert progress[-1] == (10, 10)
    masks = [np.asarray(Image.open(study.masks / f"{i}.png")) > 0 for i in LISTS["labelled_half"]]
    counts = found.classes["labelled"]
    assert counts.pixels.tolist() == [sum((~m).sum() for m in masks), sum(m.sum() for m in masks)]
    assert counts.present.tolist() == [3, 3] and counts.cases == 3 and counts.empty == []
    study.quick()


def test_every_planted_fault_is_found_at_once(study):
    def spoil(case_id, **changes):
        path = study.masks / f"{case_id}.png"
        mask = np.array(Image.open(path))
        if "value" in changes:
            mask[0, :5] = changes["value"]
        Image.fromarray(mask[: changes.get("rows")]).save(path)

    (study.images / "p3_t.png").write_bytes((study.images / "p3_t.png").read_bytes()[:400])  # truncated, unlabelled
    (study.images / "p4_t.png").unlink()
    spoil("p0_t", value=7)
    spoil("p1_t", rows=30)
    (study.masks / "p2_t.png").write_bytes((study.masks / "p2_t.png").read_bytes()[:60])
    spoil("p6_v", value=9, rows=30)
    (study.masks / "p7_v.png").unlink()
    (study.images / "p7_v.png").write_bytes(b"<html>")
    Image.new("RGB", (20, 20)).save(study.images / "p8_e.jpg")
    shutil.copy(study.masks / "p9_e.png", study.masks / "p9_e.tif")
    study.append("test", "p5_t")
    study.append("val", "p8_more")
    shutil.copy(study.images / "p9_e.png", study.images / "p8_more.png")
    shutil.copy(study.masks / "p9_e.png", study.masks / "p8_more.png")
    found = study.check()
    assert kinds(found.errors) == sorted(
        [
            ("image cannot be read", "p3_t"),
            ("image cannot be read", "p7_v"),
            ("missing image", "p4_t"),
            ("missing mask", "p7_v"),
            ("mask value without a class", "p0_t"),
            ("mask of another size", "p1_t"),
            ("mask cannot be read", "p2_t"),
            ("mask value without a class", "p6_v"),
            ("mask of another size", "p6_v"),
            ("several images", "p8_e"),
            ("several masks", "p9_e"),
            ("shared case", "p5_t"),
            ("shared group", "p8_e", "p8_more"),
            ("same image in two splits", "p8_more", "p9_e"),
        ]
    )
    text = {(fault.kind, fault.cases[:1]): fault.text for fault in found.errors}
    assert "train.txt:1" in text["mask value without a class", ("p0_t",)]
    assert "7 (5 pixels)" in text["mask value without a class", ("p0_t",)]
    assert "30 x 41, the image 48 x 41" in text["mask of another size", ("p1_t",)]
    assert "val p8_more = test p9_e" in text["same image in two splits", ("p8_more",)]


def test_masks_of_unlabelled_cases_are_never_opened(study, monkeypatch):
    opened = []

    def spy(path, *arguments, **options):
        opened.append(str(path))
        return open(path, *arguments, **options)

    for module in (opening, traits, cache):
        monkeypatch.setattr(module, "open", spy, raising=False)
    for case_id in LISTS["train"][3:]:
        (study.masks / f"{case_id}.png").write_bytes(b"no picture")
    found = study.check()
    study.quick()
    assert found.errors == [] and found.warnings == []
    read = {path.removeprefix(f"{study.masks}/") for path in opened if path.startswith(str(study.masks))}
    assert read == {f"{i}.png" for i in [*LISTS["labelled_half"], *LISTS["val"], *LISTS["test"]]}
    # a case that the lists also name elsewhere stays unlabelled until the lists are mended
    opened.clear()
    study.append("test", "p3_t")
    assert ("shared case", "p3_t") in kinds(study.check().errors)
    assert f"{study.masks}/p3_t.png" not in opened


@pytest.mark.parametrize("form", ["bmp", "tif", "png"])
def test_a_re_encoded_copy_is_found(study, form):
    (study.images / "p4_t.png").unlink()
    Image.open(study.images / "p9_e.png").save(
        study.images / f"p4_t.{form}", **({"optimize": True} if form == "png" else {})
    )
    assert kinds(study.check().errors) == [("same image in two splits", "p4_t", "p9_e")]
    with pytest.raises(DataError, match="train p4_t = test p9_e"):  # remembered from the full check
        study.quick()


def test_quick_finds_copied_files_on_its_own(study):
    shutil.copy(study.images / "p9_e.png", study.images / "p4_t.png")
    shutil.copy(study.images / "p0_t.png", study.images / "p1_t.png")  # inside train: no leak
    with pytest.raises(DataError, match="train p4_t = test p9_e") as caught:
        study.quick()
    assert [fault.cases for fault in caught.value.faults] == [("p4_t", "p9_e")]


def test_quick_decodes_nothing_and_tells_equal_sizes_apart(study, monkeypatch):
    for case_id in IDS:  # one size in bytes, other pixels
        pixels = np.random.default_rng(IDS.index(case_id)).integers(0, 256, (50, 50, 3), np.uint8)
        (study.images / f"{case_id}.png").unlink()
        Image.fromarray(pixels).save(study.images / f"{case_id}.bmp")
    monkeypatch.setattr(ImageFolder, "image", lambda *_: pytest.fail("decoded"))
    monkeypatch.setattr("knowsam.data.check.file_sha256", lambda _: pytest.fail("read whole"))
    study.quick()


def test_near_duplicates_are_warnings(study):
    image = Image.open(study.images / "p9_e.png")
    image.save(study.images / "p4_t.jpg", quality=85)
    (study.images / "p4_t.png").unlink()
    found = study.check()
    assert found.errors == [] and kinds(found.warnings) == [("near duplicates in two splits", "p4_t", "p9_e")]
    assert study.check(near=False).warnings == []


@pytest.mark.parametrize("shift", [0, 5])
def test_near_duplicates_inside_the_test_list_are_told(study, shift):
    image = np.asarray(Image.open(study.images / "p8_e.png")).astype(int)
    Image.fromarray(np.clip(image + shift, 0, 255).astype(np.uint8)).save(study.images / "p9_e.png")
    shutil.copy(study.masks / "p8_e.png", study.masks / "p9_e.png")
    (fault,) = study.check().warnings
    assert (fault.kind, fault.cases) == ("near duplicates in one split", ("p8_e", "p9_e"))
    assert "test: p8_e ~ p9_e are one observation, not 2; knowsam splits --mark-duplicates" in fault.text
    (study.lists / "near_duplicates.csv").write_text("id,group\np8_e,p8_e\np9_e,p8_e\n")
    (fault,) = study.check().warnings  # still told: it says what the scores are worth
    assert fault.text == "test: p8_e ~ p9_e are one observation, not 2"
    for name in ("p0_t", "p1_t"):  # inside train they harm nothing
        Image.fromarray(np.clip(image + 9, 0, 255).astype(np.uint8)).save(study.images / f"{name}.png")
        shutil.copy(study.masks / "p8_e.png", study.masks / f"{name}.png")
    assert [fault.cases for fault in study.check().warnings if fault.kind == "near duplicates in one split"] == [
        ("p8_e", "p9_e")
    ]


def test_volumes_that_have_a_slice_in_common_are_not_one(tmp_path):
    (tmp_path / "data" / "slices").mkdir(parents=True)
    slices = [render(np.random.default_rng(n), 48, 2)[0][..., 0] / 255 for n in range(12)]
    volumes = {"v1": [0, 1, 2, 3], "v2": [3, 4, 5, 6], "v3": [7, 8, 9, 10], "v4": [8, 9, 10, 11]}
    for name, numbers in volumes.items():
        with h5py.File(tmp_path / "data" / f"{name}.h5", "w") as file:
            file["image"] = np.stack([slices[n] for n in numbers])
            file["label"] = np.ones((4, 48, 48), np.uint8) * np.arange(48, dtype=np.uint8).clip(0, 1)
    (tmp_path / "test.txt").write_text("v1\nv2\nv3\nv4\n")

    def build(splits):
        return H5Slices(root=tmp_path, splits=splits, num_classes=2)

    found, _ = check_all(
        build, inspect_splits(tmp_path), num_classes=2, class_names=["a", "b"], cache_folder=tmp_path / "cache"
    )
    told = [fault.cases for fault in found.warnings if fault.kind == "near duplicates in one split"]
    assert told == [("v3", "v4")]


def test_what_numbers_say(study):
    for case_id in LISTS["labelled_half"]:
        path = study.masks / f"{case_id}.png"
        Image.new("L", Image.open(path).size).save(path)
    path = study.masks / "p8_e.png"
    Image.new("L", Image.open(path).size).save(path)
    Image.new("RGB", Image.open(study.images / "p5_t.png").size, (9, 9, 9)).save(study.images / "p5_t.png")
    found = study.check()
    (error,) = found.errors
    assert error.kind == "class never seen" and "labelled: no pixel is lesion" in error.text
    assert kinds(found.warnings) == [
        ("empty masks", *LISTS["labelled_half"]),
        ("empty masks", "p8_e"),
        ("image of one colour", "p5_t"),
    ]


def test_lists_that_are_missing(study):
    (study.lists / "val.txt").unlink()
    (study.lists / "test.txt").unlink()
    found = study.check()
    assert kinds(found.errors) == [("empty list",)] and "validation" in found.errors[0].text
    assert kinds(found.warnings) == [("empty list",), ("files passed over",)]
    assert "4 images are in no list: p6_v" in found.warnings[0].text


def test_groups_of_a_table(study):
    rows = "".join(f"{i},{'same' if i in ('p0_t', 'p9_e') else i}\n" for i in IDS)
    (study.lists / "groups.csv").write_text(f"id,group\n{rows}")
    assert kinds(study.check().errors) == [("shared group", "p9_e", "p0_t")]
    (study.lists / "groups.csv").write_text("id,patient\n")
    with pytest.raises(DataError, match="no column 'group'"):
        study.check()


def test_the_built_in_data():
    source = BuiltIn("labelled_50pct", train=6, val=2, test=2, size=32)
    found, _ = check_all(lambda _: source, None, num_classes=2, class_names=["background", "lesion"])
    assert found.errors == [] and found.cases == {"train": 6, "labelled": 3, "val": 2, "test": 2}
    check_quick(source)


def test_a_slice_of_a_test_volume_in_train(tmp_path):
    (tmp_path / "data" / "slices").mkdir(parents=True)
    rng = np.random.default_rng(0)
    volumes = {name: rng.random((3, 24, 24)) for name in ("v", "t")}
    slices = {f"s{n}": rng.random((24, 24)) for n in range(3)} | {"s3": volumes["t"][1]}
    for folder, arrays in (("data/slices", slices), ("data", volumes)):
        for name, array in arrays.items():
            with h5py.File(tmp_path / folder / f"{name}.h5", "w") as file:
                file["image"], file["label"] = array, (array > 0.5).astype(np.uint8)
    for name, ids in {"train": slices, "labelled_1": ["s0"], "val": ["v"], "test": ["t"]}.items():
        (tmp_path / f"{name}.txt").write_text("\n".join(ids) + "\n")
    found, _ = check_all(
        lambda splits: H5Slices(root=tmp_path, splits=splits, num_classes=2),
        inspect_splits(tmp_path, "labelled_1"),
        num_classes=2,
        class_names=["background", "lesion"],
        cache_folder=tmp_path / "cache",
    )
    assert kinds(found.errors) == [("same image in two splits", "s3", "t")]
    assert found.classes["test"].pixels.sum() == 3 * 24 * 24


def test_faults_survive_json(study):
    (study.masks / "p0_t.png").unlink()
    (fault,) = study.check().errors
    assert json.loads(json.dumps(fault._asdict())) == {
        "kind": "missing mask",
        "text": fault.text,
        "cases": ["p0_t"],
    }


def test_ignored_pixels_are_no_class(study, monkeypatch):
    whole = ImageFolder.mask

    def partly(source, case_id):
        mask = whole(source, case_id)
        mask[: mask.shape[0] // 2] = 255
        if case_id == "p0_t":
            mask[:] = 255
        return mask

    monkeypatch.setattr(ImageFolder, "mask", partly)
    found = study.check()
    labelled, test = found.classes["labelled"], found.classes["test"]
    assert test.ignored == test.pixels.sum() > 0 and test.ignored_share == 0.5  # the heights are even
    assert sum(labelled.shares) == pytest.approx(1) and labelled.ignored_share > 0.5 and labelled.silent == ["p0_t"]
    assert ("masks that say nothing", "p0_t") in kinds(found.warnings) and labelled.empty == []
    assert found.to_dict(["background", "lesion"])["classes"]["test"]["ignored_share"] == 0.5


def test_what_plays_no_part_is_named(study):
    for name in ("x.jp2", "y.jp2", "z.svs"):
        (study.images / name).write_bytes(b"x")
    for name in ("p0_t_mask.png", "nobody.png", "nobody_too.png"):
        shutil.copy(study.images / "p0_t.png", study.images / name)
    shutil.copy(study.masks / "p0_t.png", study.masks / "orphan.png")
    (study.lists / "left_out.txt").write_text("# why\nnobody_too\n")
    found = study.check()
    assert found.errors == []
    told = [fault.text for fault in found.warnings if fault.kind == "files passed over"]
    assert [text.partition(" in ")[0] for text in told[:2]] == ["2 .jp2", "1 .svs"]
    assert told[2:] == [
        "1 files among the images are called like masks: p0_t_mask.png",
        "1 images are in no list: nobody",
        "1 masks have no image: orphan",
    ]


def test_how_files_are_stored_is_told(study):
    exif = Image.Exif()
    exif[0x0112] = 3
    image = Image.open(study.images / "p0_t.png")
    image.save(study.images / "p0_t.png", exif=exif)
    for case_id in ("p5_t", "p6_v"):  # a little over an eighth of what 16 bits hold
        grey = np.array(Image.open(study.images / f"{case_id}.png").convert("L")).astype(np.uint16)
        grey[0, 0] = 255
        Image.fromarray(grey * 40).save(study.images / f"{case_id}.png")

    def painted(case_id, colours):
        mask = Image.fromarray((np.array(Image.open(study.masks / f"{case_id}.png")) > 0).astype(np.uint8))
        mask.putpalette(colours)
        mask.save(study.masks / f"{case_id}.png")

    def check(**reading):
        lists = inspect_splits(study.lists, "labelled_half")
        table = LabelTable({0: 0, 1: [1, 255]}, 2)
        return check_all(
            lambda splits: ImageFolder(
                root=study.path, splits=splits, num_classes=2, label_table=table, reading=Reading(**reading)
            ),
            lists,
            num_classes=2,
            class_names=["background", "lesion"],
            cache_folder=study.path / "cache",
        )[0]

    for case_id in ("p0_t", "p8_e"):
        painted(case_id, [0] * 3 + [255, 0, 0])
    found = check()
    assert found.errors == []
    told = {fault.kind: fault.text for fault in found.warnings}
    assert "1 of 10 images have an EXIF orientation" in told["orientation tags"]
    assert "Image and mask are turned" in told["orientation tags"]
    assert "2 of 10 images hold more than 8 bits" in told["nearly black images"]
    assert "p5_t, p6_v" in told["nearly black images"] and "percentile" in told["nearly black images"]
    (tags,) = [f.text for f in check(orientation="stored").warnings if f.kind == "orientation tags"]
    assert "Neither image nor mask is turned" in tags
    painted("p8_e", [0] * 3 + [0, 255, 0])
    (error,) = check().errors
    assert error.kind == "palettes of masks"
    assert "index 1 is [255, 0, 0] in 1 (p0_t); [0, 255, 0] in 1 (p8_e)" in error.text
    assert check(palette="index").errors == []  # decided by the user
    painted("p8_e", [0] * 3 + [255] * 3)
    (error,) = check().errors
    assert "1 are read by index (p0_t), 1 by colour or grey level (p8_e)" in error.text


def test_12_bits_in_16_are_refused_with_the_way_out(study):
    grey = np.array(Image.open(study.images / "p5_t.png").convert("L")).astype(np.uint16) * 16
    Image.fromarray(grey).save(study.images / "p5_t.png")
    (error,) = study.check().errors
    assert (error.kind, error.cases) == ("image cannot be read", ("p5_t",))
    assert "of 65535" in error.text and "white: 4095" in error.text


@pytest.mark.parametrize("channels", [1, 4])
def test_pictures_of_16_bits_and_other_channels_are_compared(tmp_path, channels):
    shape = (channels, 20, 24)[channels == 1 :]
    for n, case_id in enumerate(("a", "b", "c", "d")):
        image = np.random.default_rng(n % 3).integers(0, 65536, shape, np.uint16)  # d is a
        for kind, array in (("images", image), ("masks", np.eye(20, 24, dtype=np.uint8))):
            (tmp_path / kind).mkdir(exist_ok=True)
            layout = {"photometric": "minisblack", "planarconfig": "separate" if array.ndim == 3 else None}
            tifffile.imwrite(tmp_path / kind / f"{case_id}.tif", array, **layout)
    for name, ids in {"train": "ab", "labelled_max": "a", "val": "c", "test": "d"}.items():
        (tmp_path / f"{name}.txt").write_text("".join(f"{i}\n" for i in ids))

    def build(splits):
        source = ImageFolder(root=tmp_path, splits=splits, num_classes=2)
        source.preparation = Preparation(channels=channels)
        return source

    found, _ = check_all(
        build,
        inspect_splits(tmp_path, "labelled_max"),
        num_classes=2,
        class_names=["a", "b"],
        cache_folder=tmp_path / "cache",
    )
    assert kinds(found.errors) == [("same image in two splits", "a", "d")]
