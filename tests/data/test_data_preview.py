import io

import numpy as np
import pytest
import torch
from PIL import Image

from knowsam.data.augment import Augmenter
from knowsam.data.batch import Ids
from knowsam.data.preview import contour, preview
from knowsam.data.streams import RawBatch
from knowsam.palette import class_colour

MASK = np.array(
    [
        [0, 0, 0, 0, 0],
        [0, 1, 1, 1, 0],
        [0, 1, 1, 1, 2],
        [0, 1, 1, 1, 2],
        [0, 0, 0, 0, 0],
    ]
)


def test_contour():
    expected = MASK.astype(bool)
    expected[2, 2] = False  # surrounded by its own class
    np.testing.assert_array_equal(contour(MASK), expected)
    assert not contour(np.ones((4, 4), int)).any() and not contour(np.zeros((4, 4), int)).any()


@pytest.mark.parametrize(("unlabelled", "strong_views"), [(0, 1), (3, 1), (3, 2), (3, 0)])
def test_preview(unlabelled, strong_views):
    rng = np.random.default_rng(0)
    labelled, others = (rng.integers(0, 256, (n, 3, 32, 32), np.uint8) for n in (2, unlabelled))
    masks = np.zeros((2, 32, 32), np.uint8)
    masks[:, 8:20, 8:20] = 1
    images, ids, more = map(torch.from_numpy, (labelled, masks, others))
    raw = RawBatch(images, ids, more, Ids(("a", "b"), tuple("xyz"[:unlabelled])), images[:0], ids[:0])
    batch = Augmenter.off(strong_views=strong_views)(raw, seed=0)
    data = preview(
        labelled,
        masks,
        others,
        batch,
        names=["a", "b"],
        unlabelled_names=list("xyz"),
        class_names=["background", "lesion"],
    )
    sheet = np.asarray(Image.open(io.BytesIO(data)))
    columns, rows = (3, 2) if not unlabelled else (5 + strong_views, 3)
    assert sheet.shape[2] == 3 and sheet.shape[1] == columns * 232 + 8 and sheet.shape[0] > rows * 200
    outline = (sheet == class_colour(1)).all(axis=2)
    left, middle, right = (outline[: 2 * 250, k * 232 + 8 : k * 232 + 232].sum() for k in range(3))
    # one contour each: beside the image, and around the mask that moved (here: did not move) with the augmented image
    assert left < 300 and middle > 1000 and right == middle
