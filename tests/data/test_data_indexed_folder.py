"""A folder of images that is read over its index: the same cases and refusals, and no folder is looked through."""

import numpy as np
import pytest
from PIL import Image

from knowsam import build, io
from knowsam.cli.main import run_command
from knowsam.config import load_config
from knowsam.data import layout
from knowsam.errors import DataError

EXPERIMENT = """
name: indexed
data:
  source: {name: image_folder, root: ROOT}
  splits: ROOT/lists
  labels: {0: 0, 1: 255}
  labelled: labelled_half
  image_size: 32
"""


@pytest.fixture
def study(tmp_path, monkeypatch):
    monkeypatch.setenv("KNOWSAM_CACHE", str(tmp_path / "cache"))
    for name in ("images", "masks", "lists"):
        (tmp_path / "data" / name).mkdir(parents=True)
    for n in range(12):
        picture = np.full((8, 9, 3), 20 * n, np.uint8)
        Image.fromarray(picture).save(tmp_path / "data" / "images" / f"c{n:02d}.png")
        Image.fromarray((picture[..., 0] > 100).astype(np.uint8) * 255).save(
            tmp_path / "data" / "masks" / f"c{n:02d}.png"
        )
    lists = {"train": range(8), "labelled_half": range(4), "val": range(8, 10), "test": range(10, 12)}
    for name, cases in lists.items():
        (tmp_path / "data" / "lists" / f"{name}.txt").write_text("".join(f"c{n:02d}\n" for n in cases))
    file = tmp_path / "indexed.yaml"
    file.write_text(EXPERIMENT.replace("ROOT", str(tmp_path / "data")))
    return file


def source(study):
    return build.build_source(load_config(study))


def test_the_same_cases_without_looking_through_a_folder(study, monkeypatch):
    plain = source(study)
    assert plain.index is None
    assert run_command("index", [str(study)]) == 0
    for module in (io, layout):
        monkeypatch.setattr(module, "case_files", None, raising=False)
    monkeypatch.setattr("knowsam.data.folder.case_files", lambda *a: pytest.fail("a folder was looked through"))
    indexed = source(study)
    assert indexed.index is not None
    for ask in ("train_ids", "labelled_ids"):
        assert getattr(indexed, ask)() == getattr(plain, ask)()
    for case_id in ("c00", "c09", "c11"):
        np.testing.assert_array_equal(indexed.image(case_id), plain.image(case_id))
        np.testing.assert_array_equal(indexed.mask(case_id), plain.mask(case_id))
    assert indexed.fingerprint("c03") == plain.fingerprint("c03")
    with pytest.raises(DataError, match="unlabelled"):
        indexed.mask("c05")


def test_what_is_missing_or_has_changed_since_is_told(study):
    root = study.parent / "data"
    (root / "masks" / "c09.png").unlink()
    (root / "masks" / "c05.png").unlink()  # of an unlabelled case: not needed
    assert run_command("index", [str(study)]) == 0
    with pytest.raises(DataError, match="1 labelled, val and test cases have no mask: c09"):
        source(study)
    Image.fromarray(np.zeros((8, 9), np.uint8)).save(root / "masks" / "c09.png")
    with pytest.raises(DataError, match="is older than the files") as caught:
        source(study)
    assert "knowsam index" in caught.value.hint
    assert run_command("index", [str(study)]) == 0
    assert source(study).mask("c09").max() == 0
