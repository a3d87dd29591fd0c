import h5py
import numpy as np
import pytest

from knowsam.data.cache import build_cache
from knowsam.data.h5 import H5Slices
from knowsam.data.intensity import MinMax, Preparation
from knowsam.data.source import Source
from knowsam.data.splits import Splits
from knowsam.errors import ConfigError, DataError, NotFoundError

SPLITS = Splits(
    train=("patient001_frame01_slice_1", "patient001_frame01_slice_2"),
    labelled=("patient001_frame01_slice_1",),
    val=("patient002_frame01",),
)
LABELLED, UNLABELLED = SPLITS.train
VOLUME = SPLITS.val[0]


def write(path, image, label=None):
    with h5py.File(path, "w") as file:
        file["image"] = image
        if label is not None:
            file["label"] = label


@pytest.fixture
def root(tmp_path):
    slices = tmp_path / "data" / "slices"
    slices.mkdir(parents=True)
    ramp = np.linspace(0, 1, 20, dtype=np.float32).reshape(4, 5)
    label = np.arange(20).reshape(4, 5) % 4
    for case_id in SPLITS.train:
        write(slices / f"{case_id}.h5", ramp, label.astype(np.uint8))
    write(tmp_path / "data" / f"{VOLUME}.h5", np.stack([ramp, ramp / 2]), np.stack([label, label]).astype(np.uint8))
    return tmp_path


def source_of(root, **options):
    return H5Slices(root=root, splits=SPLITS, num_classes=4, **options)


def path_of(root, case_id):
    return root / "data" / ("slices" if "slice" in case_id else "") / f"{case_id}.h5"


def test_source(root):
    source = source_of(root)
    assert isinstance(source, Source)
    assert source.train_ids() == list(SPLITS.train) and source.labelled_ids() == [LABELLED]
    assert source.eval_ids("val") == [VOLUME] and source.eval_ids("test") == []
    image = source.image(LABELLED)
    assert image.dtype == np.uint16 and image.shape == (4, 5, 3) and image.min() == 0 and image.max() == 65535
    np.testing.assert_allclose(image[..., 0] / 65535, np.linspace(0, 1, 20).reshape(4, 5), atol=1 / 65535)
    volume = source.image(VOLUME)
    assert volume.shape == (2, 4, 5, 3)
    np.testing.assert_array_equal(volume[0], image)
    assert volume[1].max() == 32768
    assert source.mask(LABELLED).shape == (4, 5) and source.mask(VOLUME).shape == (2, 4, 5)
    assert source.mask(VOLUME).dtype == np.uint8 and source.mask(VOLUME).max() == 3


def test_slices_and_volumes_get_the_same_greys(root):
    source = source_of(root)
    source.preparation = Preparation(MinMax(scope="slice"))
    assert source.image(VOLUME)[1].max() == 65535
    np.testing.assert_array_equal(source.image(VOLUME)[0], source.image(LABELLED))
    source.preparation = Preparation(MinMax(scope="dataset"))
    source.preparation.intensity.fit(source.case(i) for i in source.train_ids())
    assert source.image(VOLUME)[1].max() == 32768
    source.preparation = Preparation(MinMax(scope="case"))
    with pytest.raises(ConfigError, match="wants whole volumes, but patient001_frame01_slice_1 is a slice"):
        source.image(LABELLED)


def test_spacing(root):
    assert source_of(root).spacing(VOLUME) is None
    source = source_of(root, spacing=(10, 1.5, 1.25))
    assert source.spacing(VOLUME) == (10, 1.5, 1.25) and source.spacing(LABELLED) == (1.5, 1.25)
    with h5py.File(source.image_path(VOLUME), "r+") as file:  # a set of slices may have slices to test on, too
        image = file["image"][0]
        del file["image"]
        file["image"] = image
    assert source_of(root, spacing=(10, 1.5, 1.25)).spacing(VOLUME) == (1.5, 1.25)


def test_firewall(root, tmp_path):
    source = source_of(root)
    for ask in (source.mask, source.mask_fingerprint):
        with pytest.raises(DataError, match="unlabelled training case"):
            ask(UNLABELLED)
    before = source.fingerprint(UNLABELLED)
    for case_id in SPLITS.train:
        with h5py.File(path_of(root, case_id), "a") as file:
            del file["label"]
    assert source.fingerprint(UNLABELLED) == before  # the image's own, though the file has changed
    build_cache(source, source.train_ids(), image_size=4, masks=False, folder=tmp_path / "cache")
    with pytest.raises(DataError, match=r"no dataset 'label'; the file holds image"):
        source.mask(LABELLED)


def test_fingerprints_follow_their_dataset(root):
    source = source_of(root)
    image, mask = source.fingerprint(LABELLED), source.mask_fingerprint(LABELLED)
    with h5py.File(path_of(root, LABELLED), "a") as file:
        file["label"][0, 0] = 3
    assert source.fingerprint(LABELLED) == image and source.mask_fingerprint(LABELLED) != mask
    with h5py.File(path_of(root, LABELLED), "a") as file:
        file["image"][0, 0] = 0.5
    assert source.fingerprint(LABELLED) != image


def external_link(path):
    write(path.with_name("other.h5"), np.zeros((4, 5), np.float32))
    with h5py.File(path, "w") as file:
        file["image"] = h5py.ExternalLink("other.h5", "/image")


def soft_link(path):
    with h5py.File(path, "w") as file:
        file["real"] = np.zeros((4, 5), np.float32)
        file["image"] = h5py.SoftLink("/real")


def virtual(path):
    layout = h5py.VirtualLayout((4, 5), "f4")
    layout[:] = h5py.VirtualSource("other.h5", "image", (4, 5))
    with h5py.File(path, "w") as file:
        file.create_virtual_dataset("image", layout)


def external_storage(path):
    with h5py.File(path, "w") as file:
        file.create_dataset("image", (4, 5), "f4", external=[(str(path.with_name("raw.bin")), 0, 80)])


def group(path):
    with h5py.File(path, "w") as file:
        file.create_group("image")


def bomb(path):
    with h5py.File(path, "w") as file:
        file.create_dataset("image", (100_000, 100_000), "f4", chunks=(1000, 1000))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (external_link, "link to another place"),
        (soft_link, "link to another place"),
        (virtual, "other files"),
        (external_storage, "other files"),
        (group, "is a group"),
        (bomb, "100000 x 100000 pixels; at most 64,000,000 are read"),
        (lambda p: write(p, np.zeros((2, 4, 5))), "is a volume of 2 x 4 x 5; this experiment trains on pictures"),
        (lambda p: write(p, np.zeros((0, 5))), "empty"),
        (lambda p: write(p, np.array([[b"x"]])), "needed are numbers"),
        (lambda p: write(p, np.full((4, 5), 7.0)), "7"),
        (lambda p: write(p, np.full((4, 5), np.nan)), "NaN"),
        (lambda p: p.write_bytes(b""), "is empty"),
        (lambda p: p.write_bytes(b"<html>"), "web page"),
        (lambda p: p.write_bytes(p.read_bytes()[:-100]), "damaged"),
    ],
)
def test_bad_files_are_named(root, spoil, message):
    path = path_of(root, LABELLED)
    spoil(path)
    with pytest.raises(DataError, match=message) as caught:
        source_of(root).image(LABELLED)
    assert path.name in str(caught.value)


def test_bad_labels(root):
    path = path_of(root, LABELLED)
    write(path, np.zeros((4, 5)), np.full((4, 5), 4, np.uint8))
    with pytest.raises(DataError, match=r"4 \(20 pixels\)"):
        source_of(root).mask(LABELLED)
    write(path, np.zeros((4, 5)), np.zeros((4, 4), np.uint8))
    with pytest.raises(DataError, match="the mask is 4 x 4, the image 4 x 5"):
        source_of(root).mask(LABELLED)
    write(path, np.zeros((4, 5)), np.ones((4, 5), np.float64))
    assert source_of(root).mask(LABELLED).dtype == np.uint8


def test_missing_things(root):
    with pytest.raises(NotFoundError, match="nowhere"):
        source_of(root / "nowhere")
    path_of(root, VOLUME).rename(root / "data" / "patient002_frame02.h5")
    with pytest.raises(DataError, match=r"val\.txt: 'patient002_frame01' is not in .*nearest is 'patient002_frame02'"):
        source_of(root)
