"""Precision, recall and specificity by hand, and pixels of which nothing is known: left out, of distances too."""

import math

import numpy as np
import pytest

from knowsam.metrics import IGNORE_ID, case_metrics


def blank(*shape):
    return np.zeros(shape, np.uint8)


def box(shape, *slices, value=1):
    mask = blank(*shape)
    mask[slices] = value
    return mask


RATES = ("precision", "recall", "specificity")


@pytest.mark.parametrize(
    ("name", "prediction", "target", "expected"),
    [
        # 8 of the 12 predicted pixels are right, of 16 true ones; 84 pixels are background, 4 of them called lesion.
        (
            "2-D",
            box((10, 10), slice(0, 3), slice(0, 4)),
            box((10, 10), slice(1, 5), slice(0, 4)),
            (8 / 12, 8 / 16, 80 / 84),
        ),
        ("3-D", box((2, 4, 4), 0, slice(0, 2)), box((2, 4, 4), slice(0, 2), 0), (4 / 8, 4 / 8, 20 / 24)),
        ("same", box((4, 4), 1), box((4, 4), 1), (1, 1, 1)),
        ("missed", blank(4, 4), box((4, 4), 1), (0, 0, 1)),
        ("false positive", box((4, 4), 1), blank(4, 4), (0, 0, 12 / 16)),
        ("empty in both", blank(4, 4), blank(4, 4), (1, 1, 1)),
        ("no other pixel", box((4, 4), 1), box((4, 4), slice(None)), (1, 4 / 16, 1)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_rates_by_hand(name, prediction, target, expected):
    (got,) = case_metrics(prediction, target, num_classes=2)
    assert tuple(getattr(got, rate) for rate in RATES) == pytest.approx(expected)


def test_rates_of_several_classes_against_counting():
    rng = np.random.default_rng(0)
    prediction, target = rng.integers(0, 4, (2, 5, 6, 7)).astype(np.uint8)
    for got in case_metrics(prediction, target, num_classes=4, distances=False):
        p, t = prediction == got.class_id, target == got.class_id
        assert got.precision == pytest.approx((p & t).sum() / p.sum())
        assert got.recall == pytest.approx((p & t).sum() / t.sum())
        assert got.specificity == pytest.approx((~p & ~t).sum() / (~t).sum())


# ---------------------------------------------------------------- ignored pixels


def known_edges(mask, ignored):
    """Known pixels of a mask that have a known face neighbour, or the outside of the image, not in the mask."""
    found = []
    for place in map(tuple, np.argwhere(mask & ~ignored)):
        for axis in range(mask.ndim):
            for step in (-1, 1):
                other = tuple(v + step * (i == axis) for i, v in enumerate(place))
                inside = all(0 <= v < n for v, n in zip(other, mask.shape, strict=True))
                if not inside or (not mask[other] and not ignored[other]):
                    found.append(place)
    return np.array(sorted(set(found)), float).reshape(-1, mask.ndim)


def surfaces(prediction, target, ignored, spacing):
    a, b = known_edges(prediction, ignored) * spacing, known_edges(target, ignored) * spacing
    table = np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1))
    forth, back = table.min(1), table.min(0)
    pooled = np.concatenate([forth, back])
    return max(np.percentile(forth, 95), np.percentile(back, 95)), pooled.mean(), (pooled <= 1.5 + 1e-6).mean()


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("shape", [(14, 17), (5, 8, 9)])
def test_ignored_pixels_against_brute_force(shape, seed):
    rng = np.random.default_rng(seed)
    prediction = (rng.random(shape) < 0.5).astype(np.uint8) * rng.integers(1, 3, shape).astype(np.uint8)
    target = (rng.random(shape) < 0.5).astype(np.uint8) * rng.integers(1, 3, shape).astype(np.uint8)
    ignored = rng.random(shape) < 0.2
    spacing = rng.uniform(0.5, 2.0, len(shape))
    masked = np.where(ignored, IGNORE_ID, target).astype(np.uint8)
    got = case_metrics(prediction, masked, num_classes=3, spacing=spacing, nsd_tolerance=1.5)
    # Overlap and rates: as of the known pixels in a row, whatever their places.
    rows = case_metrics(prediction[~ignored][None], target[~ignored][None], num_classes=3, distances=False)
    for one, row in zip(got, rows, strict=True):
        names = ("status", "dice", "iou", *RATES)
        assert [getattr(one, name) for name in names] == [getattr(row, name) for name in names]
        p, t = prediction == one.class_id, target == one.class_id
        assert (one.hd95, one.asd, one.nsd) == pytest.approx(surfaces(p, t, ignored, spacing), rel=1e-5)


def test_what_is_predicted_where_nothing_is_known_changes_nothing():
    rng = np.random.default_rng(1)
    target = box((16, 16), slice(4, 12), slice(4, 12))
    target[:, 9:] = IGNORE_ID
    prediction = box((16, 16), slice(5, 12), slice(3, 16))
    expected = case_metrics(prediction, target, num_classes=3)
    prediction[:, 9:] = rng.integers(0, 3, (16, 7))
    assert case_metrics(prediction, target, num_classes=3) == expected


def test_the_border_of_what_is_known_is_no_edge():
    """The truth goes on into the unknown: a prediction that stops or goes on there is equally right."""
    target = box((12, 12), slice(3, 9), slice(0, 6))
    target[:, 6:] = IGNORE_ID
    for prediction in (box((12, 12), slice(3, 9), slice(0, 6)), box((12, 12), slice(3, 9), slice(0, 12))):
        (got,) = case_metrics(prediction, target, num_classes=2)
        assert (got.dice, got.hd95, got.asd, got.nsd) == (1, 0, 0, 1)
    # One row lower: the lower edges differ, the right ends are no part of it.
    (got,) = case_metrics(box((12, 12), slice(3, 10), slice(0, 6)), target, num_classes=2)
    assert got.hd95 == 1


def test_a_structure_that_only_touches_ignored_pixels_still_has_a_surface():
    target = box((11, 11), slice(4, 7), slice(4, 7))
    ring = box((11, 11), slice(3, 8), slice(3, 8)).astype(bool) & (target == 0)
    target[ring] = IGNORE_ID
    (same,) = case_metrics(box((11, 11), slice(4, 7), slice(4, 7)), target, num_classes=2)
    assert (same.hd95, same.nsd) == (0, 1)
    (moved,) = case_metrics(box((11, 11), 5, slice(5, 7)), target, num_classes=2)
    assert moved.status == "ok" and 0 < moved.hd95 < math.hypot(11, 11)


def test_a_structure_of_ignored_pixels_alone_is_absent():
    prediction = box((6, 6), 2)
    assert case_metrics(prediction, prediction * IGNORE_ID, num_classes=2)[0].status == "empty_both"
    target = blank(6, 6)
    target[4] = IGNORE_ID
    assert case_metrics(prediction, target, num_classes=2)[0].status == "false_positive"


def test_ignored_pixels_far_away_change_no_distance():
    prediction, target = box((20, 20), slice(2, 6), slice(2, 7)), box((20, 20), slice(3, 8), slice(2, 6))
    (before,) = case_metrics(prediction, target, num_classes=2)
    target[15:] = IGNORE_ID
    (after,) = case_metrics(prediction, target, num_classes=2)
    names = ("dice", "iou", "hd95", "asd", "nsd", "precision", "recall")
    assert [getattr(before, name) for name in names] == [getattr(after, name) for name in names]
    assert after.specificity < before.specificity  # fewer pixels are background


def test_256_classes_leave_no_value_to_be_ignored():
    mask = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert all(record.dice == 1 for record in case_metrics(mask, mask, num_classes=256, distances=False))
