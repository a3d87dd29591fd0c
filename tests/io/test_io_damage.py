"""Files with bytes changed at random: read, or refused by one error in one line that names the file. Nothing else."""

import h5py
import numpy as np
import pytest
import tifffile
from PIL import Image

from knowsam.errors import DataError
from knowsam.io import header, read_image, read_mask

nibabel = pytest.importorskip("nibabel")

RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (32, 40, 3), np.uint8)
GREY = COLOUR[..., 0]
STACK = np.stack([GREY] * 3)


def h5(path):
    with h5py.File(path, "w") as file:
        file.create_dataset("image", data=GREY, compression="gzip")
        file["label"] = GREY


WRITERS = {
    "a.png": lambda p: Image.fromarray(COLOUR).save(p),
    "palette.png": lambda p: Image.fromarray(COLOUR).convert("P").save(p),
    "a.jpg": lambda p: Image.fromarray(COLOUR).save(p),
    "a.bmp": lambda p: Image.fromarray(GREY).save(p),
    "a.gif": lambda p: Image.fromarray(COLOUR).save(p),
    "a.webp": lambda p: Image.fromarray(COLOUR).save(p),
    "tiles.tif": lambda p: tifffile.imwrite(p, COLOUR, photometric="rgb", compression="lzw", tile=(16, 16)),
    "imagej.tif": lambda p: tifffile.imwrite(
        p, STACK, imagej=True, metadata={"axes": "ZYX", "unit": "mm", "spacing": 2}
    ),
    "ome.tif": lambda p: tifffile.imwrite(p, STACK, ome=True, metadata={"axes": "ZYX"}),
    "a.nii": lambda p: nibabel.save(nibabel.Nifti1Image(STACK, np.eye(4)), p),
    "a.nii.gz": lambda p: nibabel.save(nibabel.Nifti1Image(STACK, np.eye(4)), p),
    "a.h5": h5,
    "a.npz": lambda p: np.savez_compressed(p, image=GREY, label=GREY),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", WRITERS)
def test_flipped_bytes(tmp_path, name):
    path = tmp_path / name
    WRITERS[name](path)
    content, random, refused = path.read_bytes(), np.random.default_rng(1), 0
    for n in range(120):
        broken = bytearray(content)
        for _ in range(random.integers(1, 6)):
            broken[random.integers(0, min(len(broken), 600 if n % 2 else 1 << 20))] = random.integers(256)
        path.write_bytes(broken)
        for read in (read_image, read_mask, header):
            try:
                read(path)
            except DataError as error:
                refused += 1
                assert name in str(error) and "\n" not in str(error)
    assert refused


@pytest.mark.parametrize("name", WRITERS)
def test_whole_files_are_read(tmp_path, name):
    WRITERS[name](tmp_path / name)
    assert read_image(tmp_path / name).array.size % GREY.size == 0
