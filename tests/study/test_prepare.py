"""Public data sets, made up in the layouts of their official downloads, become lists and experiments."""

import os
import shutil
import tarfile
import zipfile
from pathlib import Path

import h5py
import nibabel
import nrrd
import numpy as np
import pytest
import yaml
from PIL import Image

from knowsam import build
from knowsam.config import REPOSITORY, load_config
from knowsam.data.builtin import render
from knowsam.data.splits import load_splits
from knowsam.errors import DataError, ExistsError, NotFoundError
from knowsam.study.prepare import DATASETS, prepare


def picture(path, n, *, size=32):
    image, mask = render(np.random.default_rng(n), size, 2)
    mask[:4, :8] = 1
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, quality=95)
    return mask * 255


def saved(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def kvasir(top, count=30):
    """As kvasir-seg.zip: JPEG masks, whose edges are soft."""
    for n in range(count):
        mask = picture(top / "Kvasir-SEG" / "images" / f"cju{n:04d}.jpg", n)
        saved(top / "Kvasir-SEG" / "masks" / f"cju{n:04d}.jpg", mask)
    (top / "Kvasir-SEG" / "kavsir_bboxes.json").write_text("{}")
    return top


def isic(top, splits=("Training", "Validation", "Test"), count=8):
    """As the six zip files of ISIC 2018 unpack."""
    for k, split in enumerate(splits):
        for n in range(count):
            name = f"ISIC_{k}{n:06d}"
            mask = picture(top / f"ISIC2018_Task1-2_{split}_Input" / f"{name}.jpg", 100 * k + n)
            saved(top / f"ISIC2018_Task1_{split}_GroundTruth" / f"{name}_segmentation.png", mask)
        (top / f"ISIC2018_Task1-2_{split}_Input" / "ATTRIBUTION.txt").write_text("x")
    return top


def busi(top, count=10):
    """As Dataset_BUSI.zip; one image has two tumours in two masks."""
    for k, kind in enumerate(("benign", "malignant", "normal")):
        for n in range(1, count + 1):
            stem = top / "Dataset_BUSI_with_GT" / kind / f"{kind} ({n})"
            mask = picture(Path(f"{stem}.png"), 100 * k + n)
            mask = mask * 0 if kind == "normal" else mask
            saved(Path(f"{stem}_mask.png"), mask)
    second = np.zeros((32, 32), np.uint8)
    second[24:30, 24:30] = 255
    saved(top / "Dataset_BUSI_with_GT" / "benign" / "benign (4)_mask_1.png", second)
    return top


def pack(folder, path):
    """The folder as an archive, by the archive's extension."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as opened:
            for file in files:
                opened.write(file, file.relative_to(folder).as_posix())
    else:
        with tarfile.open(path, "w:*" if path.suffix == ".tar" else "w:gz") as opened:
            for file in files:
                opened.add(file, file.relative_to(folder).as_posix())
    return path


def cases_of(experiment, *words):
    """Every image and every mask that may be read, by the source that training would use."""
    config = load_config(experiment, list(words))
    source = build.build_source(config)
    ids = [*source.labelled_ids(), *source.eval_ids("val"), *source.eval_ids("test")]
    return config, source, {i: (source.image(i), source.mask(i)) for i in ids}


def test_kvasir_from_its_zip_and_again(tmp_path):
    path = pack(kvasir(tmp_path / "made"), tmp_path / "kvasir-seg.zip")
    made = prepare("kvasir", path, tmp_path / "out")
    config, source, cases = cases_of(made.experiment, "data.labelled=labelled_max")
    assert config.data.classes == ["background", "polyp"] and config.data.label_threshold == 127
    assert source.root == tmp_path / "out" / "data" / "kvasir" / "Kvasir-SEG" and len(cases) == 30
    assert any("30 images can be used; published are 1000" in warning for warning in made.warnings)
    assert any("61 files" in note and "just unpacked" in note for note in made.notes)
    with pytest.raises(ExistsError):
        prepare("kvasir", path, tmp_path / "out")
    again = prepare("kvasir", path, tmp_path / "out", force=True)
    assert any("unpacked before" in note for note in again.notes)


def test_kvasir_in_a_folder_is_used_where_it_lies(tmp_path):
    made = prepare("kvasir", kvasir(tmp_path / "made"), tmp_path / "out")
    assert cases_of(made.experiment)[1].root == tmp_path / "made" / "Kvasir-SEG"
    assert not (tmp_path / "out" / "data").exists()


def test_the_copy_of_kvasir_that_the_lists_name_gets_these_lists(tmp_path):
    lists = REPOSITORY / "data_splits" / "kvasir_seg"
    shipped = load_splits(lists)
    image = tmp_path / "one.png"
    picture(image, 0)
    for kind in ("images", "masks"):
        (tmp_path / "set" / kind).mkdir(parents=True)
        for i in (*shipped.train, *shipped.val, *shipped.test):
            (tmp_path / "set" / kind / f"{i}.png").hardlink_to(image)
    made = prepare("kvasir", tmp_path / "set", tmp_path / "out")
    config = load_config(made.experiment)
    assert made.lists == lists and config.data.labelled == "labelled_10pct"
    assert len(build.build_source(config).labelled_ids()) == 80 and not (tmp_path / "out" / "data_splits").exists()


def test_isic_from_its_six_zip_files(tmp_path):
    made_up = isic(tmp_path / "made")
    (tmp_path / "zips").mkdir()
    for folder in sorted(made_up.iterdir()):
        (tmp_path / "one" / folder.name).parent.mkdir(exist_ok=True)
        folder.rename(tmp_path / "one" / folder.name)
        pack(tmp_path / "one", tmp_path / "zips" / f"{folder.name}.zip")
        (tmp_path / "one" / folder.name).rename(folder)
    made = prepare("isic2018", tmp_path / "zips", tmp_path / "out")
    config, source, cases = cases_of(made.experiment, "data.labelled=labelled_max")
    assert [len(source.train_ids()), len(source.eval_ids("val")), len(source.eval_ids("test"))] == [8, 8, 8]
    assert config.data.classes == ["background", "lesion"] and len(cases) == 24
    assert all(i.startswith("train/ISIC_0") for i in source.train_ids())
    assert not any("missing" in warning for warning in made.warnings)


def test_isic_without_its_test_set(tmp_path):
    made = prepare("isic2018", isic(tmp_path / "made", ("Training", "Validation"), 12), tmp_path / "out")
    missing = [warning for warning in made.warnings if warning.startswith("missing")]
    assert len(missing) == 2 and "Test_Input" in missing[0] and "Test_GroundTruth" in missing[1]
    assert len(cases_of(made.experiment)[1].eval_ids("val")) == 12
    for path in (tmp_path / "made" / "ISIC2018_Task1_Training_GroundTruth").iterdir():
        path.unlink()
    (tmp_path / "made" / "ISIC2018_Task1_Training_GroundTruth").rmdir()
    with pytest.raises(DataError, match=r"missing: ISIC2018_Task1\.\.\._Training_GroundTruth") as caught:
        prepare("isic2018", tmp_path / "made", tmp_path / "out", force=True)
    assert "ISIC2018_Task1-2_Validation_Input/ 12 .jpg, 1 .txt" in str(caught.value)


def test_busi_merges_its_masks(tmp_path):
    path = pack(busi(tmp_path / "made"), tmp_path / "Dataset_BUSI.tar.gz")
    made = prepare("busi", path, tmp_path / "out")
    lists = made.lists.glob("*.txt")
    assert any("benign/benign (4)" in p.read_text().splitlines() for p in lists)
    config, _, cases = cases_of(made.experiment, "data.labelled=labelled_max")
    assert config.data.source["merge_masks"] is True and len(cases) == 30
    first, second = (
        np.array(Image.open(tmp_path / "made" / "Dataset_BUSI_with_GT" / "benign" / f"benign (4)_mask{end}.png")) > 0
        for end in ("", "_1")
    )
    np.testing.assert_array_equal(cases["benign/benign (4)"][1], first | second)
    assert not cases["normal/normal (1)"][1].any()


def acdc_lists():
    """Volume of the published lists -> its number of slices; of val and test 6."""
    splits = load_splits(REPOSITORY / "data_splits" / "acdc", "labelled_7cases")
    volumes = dict.fromkeys((*splits.val, *splits.test), 6)
    for case_id in splits.train:
        volume, _, number = case_id.partition("_slice_")
        volumes[volume] = max(volumes.get(volume, 0), int(number))
    return splits, volumes


def acdc(top, leave_out=()):
    """As ACDC.zip's training folder. The first frame in time is end diastole, but of patient090."""
    rng = np.random.default_rng(0)
    frames = {}
    for volume, slices in acdc_lists()[1].items():
        patient = volume.partition("_")[0]
        if patient in leave_out:
            continue
        diastole, systole = (11, 4) if patient == "patient090" else (1, 12)
        number = diastole if volume.endswith("frame01") else systole
        folder = top / "training" / patient
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "Info.cfg").write_text(f"ED: {diastole}\nES: {systole}\nGroup: DCM\nHeight: 184.0\n")
        image = rng.integers(3, 900, (7, 5, slices), np.int16)  # (x, y, z)
        mask = rng.integers(0, 4, image.shape, np.uint8)
        affine = np.diag([-1.5, -1.25, 10, 1])
        for array, end in ((image, ""), (mask, "_gt")):
            file = nibabel.Nifti1Image(array, affine)
            nibabel.save(file, folder / f"{patient}_frame{number:02d}{end}.nii.gz")
        frames[volume] = (image, mask)
    return frames


@pytest.fixture(scope="module")
def heart(tmp_path_factory):
    """The download, its arrays, and what is made of it; tests leave it as it is, or mend it."""
    top = tmp_path_factory.mktemp("heart")
    frames = acdc(top / "made")
    return top, frames, prepare("acdc", top / "made", top / "out")


def test_acdc_as_the_field_has_it(heart):
    _, frames, made = heart
    assert made.warnings == [] and made.lists == REPOSITORY / "data_splits" / "acdc"
    config, source, cases = cases_of(made.experiment)
    splits, _ = acdc_lists()
    assert config.data.labelled == "labelled_7cases" and source.train_ids() == list(splits.train)
    for case_id, (image, mask) in list(cases.items())[::40]:
        volume, _, number = case_id.partition("_slice_")
        values, labels = (array.T for array in frames[volume])  # (z, y, x)
        scaled = (values - values.min()) / (values.max() - values.min())
        if number:
            scaled, labels = scaled[int(number) - 1], labels[int(number) - 1]
        np.testing.assert_array_equal(mask, labels)
        np.testing.assert_array_equal(image[..., 0], np.rint(scaled.astype(np.float32).astype(np.float64) * 65535))
    with h5py.File(source.image_path(splits.test[0])) as file:
        assert file["image"].attrs["spacing"].tolist() == [10, 1.25, 1.5] and file["image"].dtype == np.float32


def test_the_first_frame_is_end_diastole_also_where_it_comes_later(heart):
    top, frames, _ = heart
    path = top / "out" / "data" / "acdc" / "data" / "slices" / "patient090_frame01_slice_1.h5"
    with h5py.File(path) as file:
        np.testing.assert_array_equal(file["label"], frames["patient090_frame01"][1].T[0])


def test_acdc_goes_on_where_it_stopped(heart):
    top, _, _ = heart
    files = sorted((top / "out" / "data" / "acdc" / "data").rglob("*.h5"))
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}
    gone = [path for path in files if path.name.startswith(("patient001_frame01", "patient003_frame02"))]
    for path in gone:
        path.unlink()
    prepare("acdc", top / "made", top / "out", force=True)
    assert len(gone) > 5
    for path, (content, time) in before.items():
        assert path.read_bytes() == content and (path.stat().st_mtime_ns == time) == (path not in gone)


def test_what_acdc_lacks_is_named(heart, tmp_path):
    top, _, _ = heart
    shutil.copytree(top / "made", tmp_path / "part", copy_function=os.link)
    for patient in ("patient001", "patient003"):
        shutil.rmtree(tmp_path / "part" / "training" / patient)
    (tmp_path / "part" / "training" / "patient002" / "patient002_frame12_gt.nii.gz").unlink()
    (tmp_path / "part" / "training" / "patient004" / "Info.cfg").unlink()
    with pytest.raises(DataError, match="4 parts of the download are missing") as caught:
        prepare("acdc", tmp_path / "part", tmp_path / "out")
    for text in ("patient001", "patient003", "patient002_frame12_gt.nii.gz", "patient004/Info.cfg with ED and ES"):
        assert text in str(caught.value)
    assert "--allow-missing" in caught.value.hint and not (tmp_path / "out").exists()
    shutil.copytree(top / "out" / "data", tmp_path / "out" / "data", copy_function=os.link)  # spares the conversion
    made = prepare("acdc", tmp_path / "part", tmp_path / "out", allow_missing=True)
    source = cases_of(made.experiment)[1]
    listed = {*source.train_ids(), *source.eval_ids("val"), *source.eval_ids("test")}
    assert not any(i.startswith(("patient001", "patient003", "patient004")) for i in listed)
    assert "patient002_frame01" in listed and "patient002_frame02" not in listed
    assert "no longer comparable" in made.warnings[0]


def atrium(top, kind, ids):
    """Challenge cases as the organisers' NRRD, or as UA-MT's HDF5; arrays are (x, y, z)."""
    rng = np.random.default_rng(0)
    arrays = {}
    for case_id in ids:
        folder = top / "Training Set" / case_id
        folder.mkdir(parents=True)
        image, mask = rng.integers(0, 256, (6, 5, 4), np.uint8), rng.integers(0, 2, (6, 5, 4), np.uint8)
        arrays[case_id] = image, mask
        if kind == "nrrd":
            header = {
                "space": "left-posterior-superior",
                "space directions": np.diag([0.625, 0.625, 1.25]),
                "space origin": [10.0, 20.0, 30.0],
            }
            nrrd.write(str(folder / "lgemri.nrrd"), image, header)
            nrrd.write(str(folder / "laendo.nrrd"), mask * 255, header)
        else:
            with h5py.File(folder / "mri_norm2.h5", "w") as file:
                file["image"], file["label"] = image.astype(np.float32), mask
    return arrays


@pytest.mark.parametrize("kind", ["nrrd", "h5"])
def test_la_as_volumes_in_their_own_geometry(tmp_path, kind):
    splits = load_splits(REPOSITORY / "data_splits" / "la", "labelled_8cases")
    ids = [*splits.train, *splits.val, *splits.test]
    arrays = atrium(tmp_path / "made", kind, [*ids, "SOMEONEOFTHETESTSET0"])
    made = prepare("la", tmp_path / "made", tmp_path / "out")
    data = tmp_path / "out" / "data" / "la"
    assert sorted(p.name for p in (data / "images").iterdir()) == sorted(f"{i}.nii.gz" for i in ids)
    for case_id in ids[::30]:
        image, mask = (nibabel.load(data / folder / f"{case_id}.nii.gz") for folder in ("images", "labels"))
        np.testing.assert_array_equal(np.asarray(image.dataobj), arrays[case_id][0])
        np.testing.assert_array_equal(np.asarray(mask.dataobj), arrays[case_id][1])
        spacing = [0.625, 0.625, 1.25 if kind == "nrrd" else 0.625]
        np.testing.assert_allclose(image.header.get_zooms(), spacing)
        corner = [-10, -20, 30] if kind == "nrrd" else [0, 0, 0]
        np.testing.assert_allclose(image.affine[:3, 3], corner)
        np.testing.assert_allclose(mask.affine, image.affine)
        if kind == "nrrd":
            assert nibabel.aff2axcodes(image.affine) == ("L", "P", "S")
    values = yaml.safe_load(made.experiment.read_text())
    assert values["data"]["patch_size"] == [32, 64, 64] and values["data"]["labelled"] == "labelled_8cases"
    assert any("1 further cases" in note for note in made.notes)
    assert any("cut out around the true mask" in note for note in made.notes) == (kind == "h5")
    before = {path: path.stat().st_mtime_ns for path in data.rglob("*.gz")}
    prepare("la", tmp_path / "made", tmp_path / "out", force=True)
    assert {path: path.stat().st_mtime_ns for path in data.rglob("*.gz")} == before


def test_what_la_lacks_is_named(tmp_path):
    splits = load_splits(REPOSITORY / "data_splits" / "la", "labelled_8cases")
    atrium(tmp_path / "made", "h5", [*splits.train, *splits.val])
    with pytest.raises(DataError, match="20 cases of the published lists are missing"):
        prepare("la", tmp_path / "made", tmp_path / "out")
    made = prepare("la", tmp_path / "made", tmp_path / "out", allow_missing=True)
    assert load_splits(made.lists, "labelled_8cases").test == ()


@pytest.mark.parametrize("name", DATASETS)
def test_another_folder_is_told_from_the_download(tmp_path, name):
    picture(tmp_path / "other" / "pictures" / "a.png", 0)
    with pytest.raises(DataError, match="is not the download") as caught:
        prepare(name, tmp_path / "other", tmp_path / "out")
    assert "pictures/ 1 .png" in str(caught.value) and DATASETS[name].wants in caught.value.hint
    with pytest.raises(NotFoundError, match="does not exist") as caught:
        prepare(name, tmp_path / "none.zip", tmp_path / "out")
    assert DATASETS[name].where in caught.value.hint
    assert not (tmp_path / "out" / "experiments").exists()
