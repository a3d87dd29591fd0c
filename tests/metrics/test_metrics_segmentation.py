"""Hand-computed tables, brute force, and MONAI's own functions against `case_metrics`."""

import math
import subprocess
import sys

import numpy as np
import pytest

from knowsam.metrics import STATUSES, case_metrics, counts_in_mean
from knowsam.metrics import segmentation as module


def blank(*shape):
    return np.zeros(shape, dtype=np.uint8)


def box(shape, *slices, value=1):
    mask = blank(*shape)
    mask[slices] = value
    return mask


def disc(size, centre, radius):
    y, x = np.mgrid[:size, :size]
    return ((y - centre[0]) ** 2 + (x - centre[1]) ** 2 <= radius**2).astype(np.uint8)


def edges_by_loop(mask):
    """Pixels of a mask with a face neighbour outside the mask or outside the image."""
    found = []
    for place in np.argwhere(mask):
        for axis in range(mask.ndim):
            for step in (-1, 1):
                other = place.copy()
                other[axis] += step
                inside = 0 <= other[axis] < mask.shape[axis]
                if not inside or not mask[tuple(other)]:
                    found.append(tuple(place))
    return np.array(sorted(set(found)), dtype=float)


def surface_by_loop(prediction, target, spacing, tolerance):
    spacing = np.ones(target.ndim) if spacing is None else np.array(spacing)
    a, b = edges_by_loop(prediction) * spacing, edges_by_loop(target) * spacing
    table = np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1))
    forth, back = table.min(1), table.min(0)
    pooled = np.concatenate([forth, back])
    hd95 = max(np.percentile(forth, 95), np.percentile(back, 95))
    return hd95, pooled.mean(), (pooled <= tolerance + 1e-6).mean()


# name, prediction, target, spacing, tolerance, (dice, iou, hd95, asd, nsd)
TABLE = [
    ("same", box((9, 9), slice(2, 5), slice(2, 5)), box((9, 9), slice(2, 5), slice(2, 5)), None, 0, (1, 1, 0, 0, 1)),
    ("two pixels 3-4-5", box((9, 9), 1, 1), box((9, 9), 4, 5), None, 2, (0, 0, 5, 5, 0)),
    ("tolerance met", box((9, 9), 1, 1), box((9, 9), 4, 5), None, 5, (0, 0, 5, 5, 1)),
    ("touching pixels", box((5, 5), 2, 1), box((5, 5), 2, 2), None, 0, (0, 0, 1, 1, 0)),
    # Bars of 1 x 4, two pixels apart along the bar: 0 and 1 and 2 of four pixels have no partner.
    (
        "bar moved by 2",
        box((5, 10), 2, slice(2, 6)),
        box((5, 10), 2, slice(4, 8)),
        None,
        1,
        # directed distances (2, 1, 0, 0) both ways; the 95th percentile of four is 0.85 of the way from 1 to 2
        (0.5, 1 / 3, 1.85, 0.75, 0.75),
    ),
    (
        "pixels in mm",
        box((9, 9), 1, 1),
        box((9, 9), 4, 5),
        (2.0, 0.5),
        2,
        (0, 0, math.hypot(6, 2), math.hypot(6, 2), 0),
    ),
    ("float32 tolerance", box((1, 9), 0, 1), box((1, 9), 0, 4), (0.1, 0.1), 0.3, (0, 0, 0.3, 0.3, 1)),
    ("one slice off", box((4, 5, 5), 1, 2, 2), box((4, 5, 5), 2, 2, 2), (10.0, 1.0, 1.0), 2, (0, 0, 10, 10, 0)),
    ("one column off", box((4, 5, 5), 1, 2, 2), box((4, 5, 5), 1, 2, 3), (10.0, 1.0, 1.0), 2, (0, 0, 1, 1, 1)),
    ("whole image", np.ones((4, 4), np.uint8), np.ones((4, 4), np.uint8), None, 0, (1, 1, 0, 0, 1)),
]


@pytest.mark.parametrize(
    ("name", "prediction", "target", "spacing", "tolerance", "expected"),
    TABLE,
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_hand_computed(name, prediction, target, spacing, tolerance, expected):
    (got,) = case_metrics(prediction, target, num_classes=2, spacing=spacing, nsd_tolerance=tolerance)
    assert got.status == "ok"
    assert (got.dice, got.iou, got.hd95, got.asd, got.nsd) == pytest.approx(expected, rel=1e-6)


def test_a_disc_moved_by_60_pixels_is_60_pixels_away_not_0():
    target, prediction = disc(160, (80, 40), 20), disc(160, (80, 100), 20)
    (got,) = case_metrics(prediction, target, num_classes=2)
    # Nearest edges face each other at 20 px, the far sides lie 60 px from anything of the other disc.
    assert 50 < got.hd95 <= 60
    assert got.dice == 0 and got.nsd == 0 and 20 <= got.asd < 60


@pytest.mark.parametrize("shift", [1, 2, 3, 5])
def test_a_large_disc_moved_by_n(shift):
    target, prediction = disc(80, (40, 30), 15), disc(80, (40, 30 + shift), 15)
    (got,) = case_metrics(prediction, target, num_classes=2, nsd_tolerance=shift)
    assert shift - 0.5 <= got.hd95 <= shift  # no point is farther than the move itself
    assert 0 < got.asd < shift
    assert got.nsd == 1


@pytest.mark.parametrize(
    ("shape", "spacing"),
    [((12, 15), None), ((12, 15), (0.7, 2.5)), ((5, 9, 8), None), ((5, 9, 8), (8.0, 1.2, 0.9)), ((1, 9, 8), (3, 1, 1))],
)
@pytest.mark.parametrize("density", [0.02, 0.3, 0.8])
def test_equals_brute_force(shape, spacing, density):
    rng = np.random.default_rng(round(density * 100) + len(shape))
    for _ in range(5):
        prediction, target = ((rng.random(shape) < density).astype(np.uint8) for _ in range(2))
        if not prediction.any() or not target.any():
            continue
        (got,) = case_metrics(prediction, target, num_classes=2, spacing=spacing, nsd_tolerance=1.0)
        wanted = surface_by_loop(prediction, target, spacing, 1.0)
        assert (got.hd95, got.asd, got.nsd) == pytest.approx(wanted, rel=1e-5, abs=1e-6)
        both = (prediction & target).sum()
        assert got.dice == pytest.approx(2 * both / (prediction.sum() + target.sum()))
        assert got.iou == pytest.approx(both / (prediction | target).sum())


@pytest.mark.filterwarnings("ignore::FutureWarning")  # MONAI's functions call each other with a deprecated argument
@pytest.mark.parametrize("num_classes", [2, 3, 4])
def test_equals_monai_where_monai_has_an_answer(num_classes):
    import torch
    from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance, compute_surface_dice
    from torch.nn.functional import one_hot

    rng = np.random.default_rng(num_classes)
    target = np.kron(rng.integers(0, num_classes, (4, 5)), np.ones((6, 6))).astype(np.uint8)
    prediction = np.roll(target, (2, 1), (0, 1))
    spacing = (1.5, 0.5)
    y_pred, y = (
        one_hot(torch.from_numpy(m).long(), num_classes).permute(2, 0, 1)[None].float() for m in (prediction, target)
    )
    hd95 = compute_hausdorff_distance(y_pred, y, percentile=95, spacing=spacing)[0]
    asd = compute_average_surface_distance(y_pred, y, symmetric=True, spacing=spacing)[0]
    nsd = compute_surface_dice(y_pred, y, [2.0] * (num_classes - 1), spacing=spacing)[0]
    got = case_metrics(prediction, target, num_classes=num_classes, spacing=spacing, nsd_tolerance=2.0)
    assert [r.class_id for r in got] == list(range(1, num_classes))
    assert [r.hd95 for r in got] == pytest.approx(hd95.tolist(), rel=1e-5)
    assert [r.asd for r in got] == pytest.approx(asd.tolist(), rel=1e-5)
    assert [r.nsd for r in got] == pytest.approx(nsd.tolist(), rel=1e-5)


@pytest.mark.parametrize("at", [(0, 0), (7, 20), (36, 31)])  # in a corner, inside, in the opposite corner
def test_cropping_changes_nothing(at, monkeypatch):
    rng = np.random.default_rng(0)
    prediction, target = blank(48, 43), blank(48, 43)
    place = (slice(at[0], at[0] + 12), slice(at[1], at[1] + 12))
    prediction[place], target[place] = rng.random((2, 12, 12)) < 0.4
    cropped = case_metrics(prediction, target, num_classes=2, spacing=(0.8, 1.3))
    monkeypatch.setattr(module, "_bounding_box", lambda mask, margin: (slice(None),) * mask.ndim)
    assert case_metrics(prediction, target, num_classes=2, spacing=(0.8, 1.3)) == cropped


def test_the_box_holds_the_mask_and_its_margin():
    mask = box((10, 12, 9), slice(0, 3), slice(5, 6), slice(7, 9)).astype(bool)
    assert module._bounding_box(mask, margin=1) == (slice(0, 4), slice(4, 7), slice(6, 9))


@pytest.mark.parametrize(("spacing", "diagonal"), [(None, 50.0), ((2.0, 2.0), 100.0), ((1.0, 0.0001), 30.0)])
def test_empty_masks(spacing, diagonal):
    none, some = blank(30, 40), box((30, 40), slice(0, 2), slice(0, 2))
    table = {  # prediction, target -> status, dice = iou = nsd, hd95 = asd
        (0, 0): ("empty_both", 1, 0),
        (0, 1): ("missed", 0, diagonal),
        (1, 0): ("false_positive", 0, diagonal),
    }
    for (p, t), (status, overlap, far) in table.items():
        (got,) = case_metrics((none, some)[p], (none, some)[t], num_classes=2, spacing=spacing)
        assert got.status == status
        assert (got.dice, got.iou, got.nsd) == (overlap,) * 3
        assert (got.hd95, got.asd) == pytest.approx((far, far), rel=1e-6)


def test_missing_is_worse_than_the_worst_answer():
    target, corner = box((20, 30), 0, 0), box((20, 30), 19, 29)
    (worst,) = case_metrics(corner, target, num_classes=2, spacing=(1.0, 3.0))
    (missed,) = case_metrics(blank(20, 30), target, num_classes=2, spacing=(1.0, 3.0))
    assert missed.hd95 > worst.hd95 and missed.asd > worst.asd


def test_each_class_has_its_own_status():
    target, prediction = blank(8, 8), blank(8, 8)
    target[0, 0] = prediction[0, 0] = 1  # found
    target[2, 2] = 2  # missed
    prediction[4, 4] = 3  # invented
    got = case_metrics(prediction, target, num_classes=5)
    assert [r.status for r in got] == ["ok", "missed", "false_positive", "empty_both"]
    assert [r.dice for r in got] == [1, 0, 0, 1]
    assert all(math.isfinite(v) for r in got for v in (r.dice, r.iou, r.hd95, r.asd, r.nsd))


def test_which_cases_count():
    assert [s for s in STATUSES if not counts_in_mean(s)] == ["empty_both"]
    assert all(counts_in_mean(s, "include") for s in STATUSES)
    with pytest.raises(ValueError, match="'exclude', 'include'"):
        counts_in_mean("ok", "skip")


@pytest.mark.parametrize("shape", [(17, 23), (3, 11, 13)])
@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.uint64])
def test_overlap_without_distances(shape, dtype):
    rng = np.random.default_rng(1)
    prediction, target = rng.integers(0, 4, (2, *shape)).astype(dtype)
    quick = case_metrics(prediction, target, num_classes=4, distances=False)
    full = case_metrics(prediction, target, num_classes=4)
    assert [(r.dice, r.iou, r.status) for r in quick] == [(r.dice, r.iou, r.status) for r in full]
    assert {(r.hd95, r.asd, r.nsd) for r in quick} == {(None, None, None)}
    for record in quick:
        p, t = prediction == record.class_id, target == record.class_id
        assert record.dice == pytest.approx(2 * (p & t).sum() / (p.sum() + t.sum()))
        assert record.iou == pytest.approx((p & t).sum() / (p | t).sum())


def test_overlap_alone_does_not_import_monai():
    code = (
        "import sys, numpy as np; from knowsam.metrics import case_metrics\n"
        "case_metrics(np.eye(4, dtype=int), np.eye(4, dtype=int), num_classes=2, distances=False)\n"
        "sys.exit('monai' in sys.modules or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prediction": blank(4, 5)}, "native resolution"),
        ({"prediction": blank(4, 4).astype(float)}, "must be integers"),
        ({"prediction": np.full((4, 4), -1)}, "class ids -1 to -1; allowed: 0 to 1"),
        ({"target": np.full((4, 4), 255, np.uint8)}, r"every pixel of the target is 255 \(ignored\)"),
        ({"target": np.full((4, 4), 255, np.uint8), "ignore_id": None}, "target holds class ids 255 to 255"),
        ({"target": np.diag([0, 255, 7, 1])}, "target holds class ids 0 to 7; allowed: 0 to 1, and 255 in the target"),
        ({"num_classes": 1}, "at least 2"),
        ({"spacing": (1.0,)}, "2 positive numbers"),
        ({"spacing": (1.0, 0.0)}, "2 positive numbers"),
        ({"nsd_tolerance": -1.0}, "at least 0"),
        ({"prediction": blank(4), "target": blank(4)}, r"allowed: \(H, W\)"),
    ],
)
def test_refusals(change, message):
    good = {"prediction": blank(4, 4), "target": blank(4, 4), "num_classes": 2}
    with pytest.raises(ValueError, match=message):
        case_metrics(**(good | change))
