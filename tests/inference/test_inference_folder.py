"""Many files in, a folder of answers out."""

import os
import threading

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

from knowsam import files as knowsam_files
from knowsam.data.intensity import Preparation
from knowsam.errors import ConfigError, DataError, NumericError, StorageError
from knowsam.inference.files import find_inputs
from knowsam.inference.folder import Wanted, predict_files, to_values
from knowsam.inference.overlay import draw_outlines, draw_sheet
from knowsam.io import Reading
from knowsam.palette import class_colour

CLASSES = ["background", "dim", "bright"]
SETTINGS = {"image_size": 32, "batch_size": 4, "device": "cpu", "preparation": Preparation()}
ALL = {"probabilities": True, "uncertainty": True, "overlays": True}


def by_brightness(x):
    """Below 1/3 background, above 2/3 class 2."""
    red = x[:, :1]
    return {"fusion": torch.cat([-red * 6, -2 * torch.ones_like(red), red * 6 - 6], 1)}


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "in" / "sub").mkdir(parents=True)
    for n, size in enumerate([(40, 50), (33, 21), (32, 32), (64, 30), (20, 90)]):
        picture = np.kron(rng.integers(0, 3, (4, 4)), np.ones((30, 30)))[: size[0], : size[1]] * 127
        Image.fromarray(picture.astype(np.uint8)).save(tmp_path / "in" / ("sub" if n > 2 else "") / f"{n}.png")
    return tmp_path


def predict(folder, *, predict_fn=by_brightness, out="out", wanted=None, **more):
    files = find_inputs(folder / "in", Reading())
    return predict_files(predict_fn, files, folder / out, wanted or Wanted(CLASSES), **SETTINGS, **more)


def tree(path):
    return sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file())


def content(path):
    return {name: (path / name).read_bytes() for name in tree(path)}


def test_masks_in_the_tree_of_the_input(folder):
    outcome = predict(folder)
    assert (outcome.done, outcome.skipped, outcome.failed, outcome.left) == (5, 0, [], 0)
    assert tree(folder / "out") == ["masks/0.png", "masks/1.png", "masks/2.png", "masks/sub/3.png", "masks/sub/4.png"]
    for name in ("0", "2", "sub/4"):
        picture = np.asarray(Image.open(folder / "in" / f"{name}.png"))
        mask = np.asarray(Image.open(folder / "out" / "masks" / f"{name}.png"))
        assert mask.dtype == np.uint8 and mask.shape == picture.shape
        assert (mask == picture // 127).mean() > (0.99 if name == "2" else 0.85)  # blurred by resizing, but for one


def test_everything_beside_the_masks(folder):
    predict(folder, wanted=Wanted(CLASSES, **ALL))
    names = tree(folder / "out")
    assert len(names) == 20
    assert [n for n in names if "sub/3" in n] == [
        "masks/sub/3.png",
        "overlays/sub/3.png",
        "probabilities/sub/3.npz",
        "uncertainty/sub/3.png",
    ]
    mask = np.asarray(Image.open(folder / "out" / "masks" / "0.png"))
    with np.load(folder / "out" / "probabilities" / "0.npz") as archive:
        assert (archive["probabilities"].argmax(0) == mask).all()
    picture = np.asarray(Image.open(folder / "in" / "0.png").convert("RGB"))
    overlay = np.asarray(Image.open(folder / "out" / "overlays" / "0.png"))
    assert (overlay == draw_outlines(picture, mask)).all() and (overlay != picture).any()


def test_the_same_call_goes_on_where_another_stopped(folder):
    asked = []

    def stop():
        asked.append(1)
        return len(asked) > 3

    first = predict(folder, stop=stop)
    assert (first.done, first.left) == (3, 2) and len(tree(folder / "out")) == 3
    stamps = {p: p.stat().st_mtime_ns for p in (folder / "out" / "masks").rglob("*.png")}
    second = predict(folder)
    assert (second.done, second.skipped) == (2, 3)
    assert all(p.stat().st_mtime_ns == stamp for p, stamp in stamps.items())
    predict(folder, out="at_once")
    assert content(folder / "out") == content(folder / "at_once")


def test_answers_that_are_not_all_there_are_made_again(folder):
    predict(folder)
    outcome = predict(folder, wanted=Wanted(CLASSES, overlays=True))
    assert (outcome.done, outcome.skipped) == (5, 0)
    (folder / "out" / "masks" / "1.png").unlink()
    outcome = predict(folder, wanted=Wanted(CLASSES, overlays=True))
    assert (outcome.done, outcome.skipped) == (1, 4)


def test_overwriting_when_asked(folder):
    predict(folder)
    (folder / "out" / "masks" / "1.png").write_bytes(b"old")
    assert predict(folder).skipped == 5 and (folder / "out" / "masks" / "1.png").read_bytes() == b"old"
    assert predict(folder, overwrite=True).done == 5
    assert np.asarray(Image.open(folder / "out" / "masks" / "1.png")).shape == (33, 21)


def test_bad_files_do_not_stop_the_rest(folder):
    (folder / "in" / "00.png").write_bytes(b"")
    (folder / "in" / "sub" / "5.jpg").write_bytes(b"<html>")
    outcome = predict(folder)
    assert outcome.done == 5
    assert {file.name: type(error) for file, error in outcome.failed} == {"00.png": DataError, "sub/5.jpg": DataError}
    assert "empty" in str(outcome.failed[0][1]) and "HTML" in str(outcome.failed[1][1])
    assert len(tree(folder / "out")) == 5


@pytest.mark.parametrize("name", ["x.dcm", "x.tif", "x.nii.gz", "x.h5", "x.npz", "x.png"])
@pytest.mark.parametrize("content", [b"", b"II*\0nonsense", b"nonsense"])
def test_a_damaged_file_of_any_kind_is_its_own_failure(folder, name, content):
    """Of some kinds the prediction's extension is in the file's content: a damaged one fails before it is read."""
    (folder / "in" / name).write_bytes(content)
    outcome = predict(folder)
    assert outcome.done == 5 and [file.name for file, _ in outcome.failed] == [name]
    assert name in str(outcome.failed[0][1])


def test_each_file_is_looked_into_once_before_the_work(folder, monkeypatch):
    predict(folder)
    from knowsam.inference.files import InputFile

    asked = []
    extension = InputFile.extension
    monkeypatch.setattr(InputFile, "extension", lambda self, kind: asked.append(self.name) or extension(self, kind))
    assert predict(folder).skipped == 5
    assert len(asked) == 5 and len(set(asked)) == 5


def test_a_nan_is_its_file_s_alone(folder):
    Image.fromarray(np.full((32, 32), 254, np.uint8)).save(folder / "in" / "nan.png")

    def predict_fn(x):
        bad = (x.amin((1, 2, 3)) > 0.99)[:, None, None, None]
        return {"fusion": by_brightness(x)["fusion"].masked_fill(bad, torch.nan)}

    outcome = predict(folder, predict_fn=predict_fn)
    assert outcome.done == 5 and [(f.name, type(e)) for f, e in outcome.failed] == [("nan.png", NumericError)]


def test_files_that_would_share_a_mask_are_refused(folder):
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(folder / "in" / "0.bmp")
    outcome = predict(folder)
    assert [file.name for file, _ in outcome.failed] == ["0.bmp", "0.png"] and outcome.done == 4
    assert not (folder / "out" / "masks" / "0.png").exists()


def test_no_answer_of_any_kind_is_shared(folder):
    with h5py.File(folder / "in" / "0.h5", "w") as file:  # its mask is masks/0.h5, but its overlay overlays/0.png
        file["image"] = np.zeros((30, 40), np.uint8)
    outcome = predict(folder, wanted=Wanted(CLASSES, overlays=True))
    assert outcome.done == 4 and sorted(file.name for file, _ in outcome.failed) == ["0.h5", "0.png"]
    assert "overlays/0.png" in str(outcome.failed[0][1])
    assert predict(folder, out="masks alone").done == 6


def test_answers_beside_the_questions_are_no_questions(folder):
    for done, skipped in ((5, 0), (0, 5)):
        files = find_inputs(folder / "in", Reading(), beside=folder / "in")
        outcome = predict_files(by_brightness, files, folder / "in", Wanted(CLASSES, overlays=True), **SETTINGS)
        assert (outcome.done, outcome.skipped) == (done, skipped)
    assert len(tree(folder / "in")) == 15


def test_a_full_disk_ends_the_work_and_loses_nothing(folder, monkeypatch):
    """Of the third file on; what is there then is whole, and the same call goes on from it."""
    real, written = os.replace, []

    def replace(source, target):
        if "masks" in str(target):
            written.append(target)
            if len(written) > 2:
                raise OSError(28, "No space left on device")
        return real(source, target)

    monkeypatch.setattr(knowsam_files.os, "replace", replace)
    before = threading.active_count()
    with pytest.raises(StorageError, match="No space left"):
        predict(folder, workers=1)
    assert threading.active_count() == before
    assert len(tree(folder / "out")) == 2
    monkeypatch.undo()
    outcome = predict(folder)
    assert (outcome.done, outcome.skipped) == (3, 2)
    predict(folder, out="at_once")
    assert content(folder / "out") == content(folder / "at_once")


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_change_no_byte(folder, workers):
    predict(folder, wanted=Wanted(CLASSES, **ALL), workers=workers)
    predict(folder, wanted=Wanted(CLASSES, **ALL), workers=2, out="other")
    for name, data in content(folder / "out").items():
        if name.endswith(".npz"):  # its entries bear the time
            with np.load(folder / "out" / name) as one, np.load(folder / "other" / name) as other:
                assert (one["probabilities"] == other["probabilities"]).all()
        else:
            assert (folder / "other" / name).read_bytes() == data


def test_progress_counts_what_is_to_do(folder):
    (folder / "in" / "bad.png").write_bytes(b"x")
    told = []
    predict(folder, progress=lambda *numbers: told.append(numbers))
    assert told == [(n, 6) for n in range(1, 7)]


# ---------------------------------------------------------------- label values


@pytest.mark.parametrize(
    ("values", "dtype"),
    [([0, 100, 255], np.uint8), ([7, 0, 300], np.uint16), ([(0, 0, 0), (255, 0, 9), (1, 2, 3)], np.uint8)],
)
def test_masks_in_the_values_of_training(folder, values, dtype):
    predict(folder)
    predict(folder, out="values", wanted=Wanted(CLASSES, values))
    ids = np.asarray(Image.open(folder / "out" / "masks" / "0.png"))
    mask = np.asarray(Image.open(folder / "values" / "masks" / "0.png"))
    assert len(np.unique(ids)) == 3
    assert (mask == np.array(values)[ids]).all()
    assert mask.dtype == dtype
    assert to_values(ids, None) is ids


def test_colours_fit_pictures_only(folder):
    (folder / "in" / "v.h5").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"v\.h5: the label values are colours"):
        predict(folder, wanted=Wanted(CLASSES, [(0, 0, 0), (1, 1, 1), (2, 2, 2)]))
    assert not (folder / "out").exists()


# ---------------------------------------------------------------- overlays


def test_outlines_lie_inside_their_class():
    labels = np.zeros((30, 40), np.uint8)
    labels[5:15, 5:20], labels[5:15, 20:30] = 1, 2
    image = np.full((30, 40, 3), 7, np.uint8)
    drawn = draw_outlines(image, labels)
    changed = (drawn != image).any(-1)
    assert (labels[changed] > 0).all()
    assert not changed[6:14, 6:19].any() and not changed[6:14, 21:29].any()
    assert (drawn[5, 5:20] == class_colour(1)).all() and (drawn[5, 20:30] == class_colour(2)).all()
    assert (drawn[5:15, 19] == class_colour(1)).all() and (drawn[5:15, 20] == class_colour(2)).all()
    assert (image == 7).all()


def test_the_edge_of_a_picture_is_no_outline():
    labels = np.ones((12, 12), np.uint8)
    image = np.zeros((12, 12, 3), np.uint8)
    assert (draw_outlines(image, labels) == 0).all()


@pytest.mark.parametrize(("depth", "size"), [(1, (20, 30)), (10, (256, 216)), (100, (300, 600))])
def test_a_sheet_holds_the_slices(depth, size):
    volume = np.zeros((depth, *size, 3), np.uint8)
    volume[:] = np.arange(depth)[:, None, None, None] + 1
    sheet = draw_sheet(volume, np.zeros((depth, *size), np.uint8))
    height, width = (min(s, round(s * 256 / max(256, *size))) for s in size)
    assert sheet.shape[0] % height == 0 and sheet.shape[1] % width == 0
    shown = set(np.unique(sheet)) - {0}
    assert len(shown) == min(depth, 64) and {1, depth} <= shown


def test_overlays_need_the_image(folder, tmp_path):
    from knowsam.inference.folder import write_prediction
    from knowsam.inference.predict import Segmentation

    file = find_inputs(folder, Reading())[0]
    wanted = Wanted(CLASSES, overlays=True)
    with pytest.raises(ValueError, match="overlays are drawn on the image"):
        write_prediction(file, None, Segmentation(np.zeros((4, 4), np.uint8)), tmp_path / "out", wanted)
    assert not (tmp_path / "out").exists()
