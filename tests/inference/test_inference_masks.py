"""Masks of another tool: which file is whose, and what is in it."""

import numpy as np
import pytest
from PIL import Image

from knowsam.errors import DataError, NotFoundError
from knowsam.inference.ensemble import Ensemble
from knowsam.inference.masks import find_masks, read_raw
from knowsam.io import Reading

MASK = np.arange(12, dtype=np.uint8).reshape(3, 4) % 3


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")


def test_ids_are_found_by_path_or_by_their_last_part(tmp_path):
    touch(tmp_path, "north/a.png", "b.nii.gz", "c.d.h5", "notes.txt", "more.png")
    found = find_masks(tmp_path, ["north/a", "south/b", "c.d", "e"])
    names = {case: path.relative_to(tmp_path).as_posix() for case, path in found.paths.items()}
    assert names == {"north/a": "north/a.png", "south/b": "b.nii.gz", "c.d": "c.d.h5"}
    assert (found.missing, found.strangers) == (["e"], ["more.png"])


def test_what_might_be_two_things_is_refused(tmp_path):
    touch(tmp_path, "a.png")
    with pytest.raises(DataError, match="may be the mask of north/a or of south/a"):
        find_masks(tmp_path, ["north/a", "south/a"])
    touch(tmp_path, "a.tif")
    with pytest.raises(DataError, match="case a has 2 masks"):
        find_masks(tmp_path, ["a"])
    with pytest.raises(NotFoundError):
        find_masks(tmp_path / "nowhere", ["a"])


def test_suffixes(tmp_path):
    touch(tmp_path, "a_pred.png", "a.png")
    found = find_masks(tmp_path, ["a"], suffix="_pred")
    assert found.paths["a"].name == "a_pred.png" and found.strangers == []


@pytest.mark.parametrize("name", ["m.png", "m.npy", "m.npz", "m.h5", "m.nii.gz"])
def test_every_kind_gives_the_values_that_were_written(tmp_path, name):
    path = tmp_path / name
    volume = np.stack([MASK, MASK.T.reshape(3, 4)])
    expected = volume
    if name == "m.png":
        Image.fromarray(MASK).save(path)
        expected = MASK
    elif name == "m.npy":
        np.save(path, volume)
    elif name == "m.npz":
        np.savez(path, anything=volume)
    elif name == "m.h5":
        import h5py

        with h5py.File(path, "w") as file:
            file["image"], file["label"] = volume * 0.5, volume
    else:
        import nibabel

        nibabel.save(nibabel.Nifti1Image(volume.transpose(2, 1, 0), np.eye(4)), path)
    assert np.array_equal(read_raw(path), expected)


def test_what_is_no_mask_is_refused(tmp_path):
    np.savez(tmp_path / "two.npz", a=MASK, b=MASK)
    with pytest.raises(DataError, match="holds a, b; one array"):
        read_raw(tmp_path / "two.npz")
    np.save(tmp_path / "half.npy", MASK + 0.5)
    with pytest.raises(DataError, match="not whole numbers"):
        read_raw(tmp_path / "half.npy")
    kinds = {"x.h5": "an HDF5", "x.nii.gz": "a NIfTI volume", "x.npz": "an npz", "x.npy": "an npy"}
    for name, kind in kinds.items():
        (tmp_path / name).write_bytes(b"nothing of the kind")
        with pytest.raises(DataError, match=f"not {kind}.* that can be read"):
            read_raw(tmp_path / name)


def test_a_link_to_another_file_is_refused(tmp_path):
    import h5py

    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["secret"] = MASK
    with h5py.File(tmp_path / "m.h5", "w") as file:
        file["label"] = h5py.ExternalLink(str(tmp_path / "other.h5"), "secret")
    with pytest.raises(DataError, match="is a link to another place; this is refused"):
        read_raw(tmp_path / "m.h5")


@pytest.mark.parametrize("name", ["m.npy", "m.npz", "m.h5", "m.nii.gz"])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_masks_are_read_by_the_rules_of_their_images(tmp_path, name, axis):
    import h5py
    import nibabel

    zyx = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    path = tmp_path / name
    if name == "m.npy":
        np.save(path, zyx)
    elif name == "m.npz":
        np.savez(path, mine=zyx, label=zyx + 1)
    elif name == "m.h5":
        with h5py.File(path, "w") as file:
            file["mine"], file["label"] = zyx, zyx + 1
    else:
        nibabel.save(nibabel.Nifti1Image(zyx.transpose(2, 1, 0), np.eye(4)), path)
    found = read_raw(path, Reading(slice_axis=axis, mask_key="mine"))
    assert found.shape[0] == zyx.shape[2 - axis]
    assert np.array_equal(found, np.moveaxis(zyx, 2 - axis, 0))


def test_an_ensemble_averages_probabilities_not_logits():
    import torch

    class Fixed(torch.nn.Module):
        def __init__(self, *probabilities):
            super().__init__()
            self.logits = torch.tensor(probabilities).log().view(1, -1, 1, 1)

        def predict(self, images):
            return {"fusion": self.logits.expand(len(images), -1, 2, 2), "other": self.logits}

    ensemble = Ensemble([Fixed(0.6, 0.4), Fixed(0.55, 0.45), Fixed(0.01, 0.99)], ["fusion"])
    out = ensemble.predict(torch.zeros(3, 3, 2, 2))
    assert list(out) == ["fusion"] and out["fusion"].shape == (3, 2, 2, 2)
    mean = (0.6 + 0.55 + 0.01) / 3
    assert torch.allclose(out["fusion"].exp()[0, :, 0, 0], torch.tensor([mean, 1 - mean]))
