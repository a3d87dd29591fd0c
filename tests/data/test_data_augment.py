import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from knowsam.data.augment import Augmenter
from knowsam.data.batch import Ids
from knowsam.data.streams import RawBatch
from knowsam.errors import ConfigError
from knowsam.losses import IGNORE

GEOMETRY_ONLY = {"weak_light": 0, "strong_light": 0, "labelled_holes": 0, "strong_holes": 0}
EVERYTHING = {
    name: 1.0
    for name in (
        *("horizontal_flip", "vertical_flip", "affine", "elastic", "labelled_elastic", "weak_light", "strong_light"),
        *("labelled_holes", "strong_holes", "blur", "noise"),
    )
} | {"weak_gamma": 0.3, "strong_gamma": 0.3}


def draw_inputs(num_labelled=3, num_unlabelled=4, side=64, num_classes=4):
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(num_labelled + num_unlabelled, 3, 6, 6, generator=generator)
    images = (F.interpolate(coarse, (side, side), mode="bilinear") * 255).to(torch.uint8)
    ids = torch.randint(0, num_classes, (num_labelled, 1, 4, 4), generator=generator).float()
    mask = F.interpolate(ids, (side, side))[:, 0].to(torch.uint8)
    return images[:num_labelled], mask, images[num_labelled:]


def raw(labelled, mask, unlabelled, second=None, second_mask=None):
    """What the streams give, of these tensors."""
    second = labelled[:0] if second is None else second
    return RawBatch(labelled, mask, unlabelled, Ids(), second, mask[:0] if second_mask is None else second_mask)


def tensors(batch):
    return [batch.labelled, batch.mask, batch.weak, *batch.strong]


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(tensors(first), tensors(second), strict=True))


@pytest.mark.parametrize("settings", [{}, EVERYTHING])
@pytest.mark.parametrize("num_unlabelled", [4, 0])
def test_shapes_types_and_range(settings, num_unlabelled):
    batch = Augmenter(**settings)(raw(*draw_inputs(3, num_unlabelled, 48)), seed=5)
    assert batch.labelled.shape == (3, 3, 48, 48)
    assert batch.mask.shape == (3, 48, 48)
    assert batch.weak.shape == batch.strong[0].shape == (num_unlabelled, 3, 48, 48)
    assert batch.mask.dtype == torch.int64
    for images in (batch.labelled, batch.weak, batch.strong[0]):
        assert images.dtype == torch.float32
        assert ((images >= 0) & (images <= 1)).all()


@pytest.mark.parametrize("settings", [{}, EVERYTHING])
def test_same_seed_same_bits_whatever_the_threads(settings):
    inputs = draw_inputs(side=160)
    first = Augmenter(**settings)(raw(*inputs), seed=11)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        second = Augmenter(**settings)(raw(*inputs), seed=11)
    finally:
        torch.set_num_threads(threads)
    assert same(first, second)
    assert not same(first, Augmenter(**settings)(raw(*inputs), seed=12))


def test_wide_seeds_do_not_collide():
    # torch's CPU generator keeps the lower 32 bits of a seed; a caller may well pack the rank above them.
    inputs = draw_inputs()
    assert not same(Augmenter()(raw(*inputs), seed=7), Augmenter()(raw(*inputs), seed=7 + (1 << 40)))


def test_global_random_state_is_neither_read_nor_moved():
    inputs, augmenter = draw_inputs(), Augmenter(**EVERYTHING)
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    first = augmenter(raw(*inputs), seed=3)
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])
    assert before[2] == random.getstate()
    torch.manual_seed(2), np.random.seed(2), random.seed(2)
    assert same(first, augmenter(raw(*inputs), seed=3))


def test_inputs_are_left_alone():
    inputs = draw_inputs()
    copies = [tensor.clone() for tensor in inputs]
    Augmenter(**EVERYTHING)(raw(*inputs), seed=3)
    assert all(torch.equal(a, b) for a, b in zip(inputs, copies, strict=True))


def test_off_is_the_identity():
    labelled, mask, unlabelled = draw_inputs()
    batch = Augmenter.off()(raw(labelled, mask, unlabelled), seed=9)
    assert torch.equal(batch.labelled, labelled.float() / 255)
    assert torch.equal(batch.mask, mask.long())
    assert torch.equal(batch.weak, unlabelled.float() / 255)
    assert torch.equal(batch.strong[0], batch.weak)
    assert batch.strong[0].data_ptr() != batch.weak.data_ptr()  # mixing may write into one of them


@pytest.mark.parametrize("flip, dim", [("horizontal_flip", -1), ("vertical_flip", -2)])
def test_flip_turns_the_axis_it_names(flip, dim):
    labelled, mask, unlabelled = draw_inputs()
    off = {"horizontal_flip": 0, "vertical_flip": 0, "affine": 0, "elastic": 0} | GEOMETRY_ONLY
    batch = Augmenter(**(off | {flip: 1}))(raw(labelled, mask, unlabelled), seed=0)
    assert torch.equal(batch.mask, mask.long().flip(dim))
    torch.testing.assert_close(batch.labelled, labelled.flip(dim) / 255, atol=1e-4, rtol=0)
    torch.testing.assert_close(batch.strong[0], unlabelled.flip(dim) / 255, atol=1e-4, rtol=0)


# Of the implementation that knew squares of 8 bits alone: the last image at [:, 7::9, 5::9], masks at [:, 3::5, 2::5].
GOLDEN = {
    "default": {
        "labelled": [
            0.7356366,
            0.8455036,
            0.838491,
            0.6942092,
            0.2151052,
            0.7098563,
            0.5299513,
            0.0748223,
            0.7982385,
            0.269164,
            0.6493958,
            0.4945114,
            0.5542189,
            0.4121399,
            0.7978538,
            0.4823655,
            0.6321765,
            0.4498355,
        ],
        "weak": [
            0.6832669,
            0.4074613,
            0.6284149,
            0.9174316,
            0.5889012,
            0.2873989,
            0.1455297,
            0.2325045,
            0.3283979,
            0.5916021,
            0.354557,
            0.4116178,
            0.7645121,
            0.6158571,
            0.6246475,
            0.0593202,
            0.3430993,
            0.6629292,
        ],
        "strong1": [
            0.6173447,
            0.336767,
            0.5615436,
            0.855561,
            0.5213463,
            0.2146273,
            0.0703034,
            0.1587831,
            0.2563356,
            0.5240939,
            0.2829474,
            0.3409955,
            0.6999957,
            0.5487686,
            0.5577111,
            0.0,
            0.2712914,
            0.5966552,
        ],
        "mask": [
            2,
            0,
            0,
            3,
            3,
            0,
            0,
            0,
            3,
            2,
            2,
            1,
            0,
            3,
            3,
            3,
            3,
            2,
            2,
            0,
            3,
            2,
            1,
            1,
            0,
            2,
            0,
            2,
            1,
            0,
            3,
            2,
            0,
            3,
            3,
            2,
            0,
            0,
            0,
            1,
            0,
            1,
            2,
            0,
            1,
            2,
            0,
            1,
            0,
            1,
        ],
    },
    "everything": {
        "labelled": [
            0.1930998,
            0.2017362,
            0.27812,
            0.0,
            0.0,
            0.6859228,
            0.4952607,
            0.7325176,
            0.275301,
            0.0,
            0.0,
            0.2881998,
            0.6338052,
            0.5493728,
            0.5289506,
            0.0,
            0.0,
            0.2656876,
        ],
        "weak": [
            0.5898063,
            0.6835117,
            0.3264103,
            0.5800476,
            0.3885373,
            0.3720416,
            0.4134892,
            0.6722387,
            0.673721,
            0.7217525,
            0.8305923,
            0.8619207,
            0.3775253,
            0.5464196,
            0.5081888,
            0.6571463,
            0.3610906,
            0.7517355,
        ],
        "strong0": [
            0.416756,
            0.4444022,
            0.3499187,
            0.0,
            0.0,
            0.4409069,
            0.5583345,
            0.3719262,
            0.562337,
            0.0,
            0.0,
            0.5427114,
            0.4427063,
            0.5650261,
            0.4201935,
            0.0,
            0.0,
            0.4290662,
        ],
        "strong1": [
            0.517378,
            0.0,
            0.4167208,
            0.5384723,
            0.0,
            0.315291,
            0.4356475,
            0.0,
            0.5568262,
            0.5765299,
            0.0,
            0.4928523,
            0.3704913,
            0.0,
            0.4967302,
            0.5657308,
            0.0,
            0.5359415,
        ],
        "plain": [
            0.2700351,
            0.2775196,
            0.3446699,
            0.7433075,
            0.2520505,
            0.7217064,
            0.5423877,
            0.7661473,
            0.3421643,
            0.3843439,
            0.7552962,
            0.3536445,
            0.6722664,
            0.5928278,
            0.5737455,
            0.4638198,
            0.7752533,
            0.3336342,
        ],
        "second": [
            0.568318,
            0.4586143,
            0.5331953,
            0.7502689,
            0.0,
            0.7920654,
            0.1250784,
            0.4228099,
            0.6244557,
            0.5585637,
            0.0,
            0.9240948,
            0.883059,
            0.4771305,
            0.3852092,
            0.5832663,
            0.0,
            0.9050813,
        ],
        "mask": [
            3,
            1,
            0,
            1,
            0,
            1,
            1,
            2,
            3,
            0,
            0,
            0,
            1,
            2,
            2,
            0,
            0,
            2,
            2,
            1,
            3,
            1,
            1,
            3,
            0,
            3,
            0,
            3,
            1,
            2,
            2,
            2,
            2,
            0,
            3,
            3,
            2,
            1,
            3,
            2,
            2,
            0,
            1,
            1,
            3,
            2,
            1,
            2,
            1,
            2,
        ],
    },
}


@pytest.mark.parametrize(
    "name, settings",
    [("default", {}), ("everything", EVERYTHING | {"blur_sigma": (0.03, 0.06), "hole_size": (0.1, 0.3)})],
)
def test_square_8_bit_images_get_the_views_they_always_got(name, settings):
    """Runs are repeated, and compared with older ones, by seed."""
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 3, 24, 24), np.uint8))
    mask = torch.from_numpy(np.random.default_rng(1).integers(0, 4, (2, 24, 24), np.uint8))
    augmenter = Augmenter(**settings, strong_views=2, plain_labelled=True)
    batch = augmenter(raw(images[:2], mask, images[2:], images[:2], mask), seed=2**40 + 3)
    found = {"labelled": batch.labelled, "weak": batch.weak, "plain": batch.plain, "second": batch.second.images}
    found |= {"strong0": batch.strong[0], "strong1": batch.strong[1]}
    for view, wanted in GOLDEN[name].items():
        if view == "mask":
            assert batch.mask[:, 3::5, 2::5].flatten().tolist() == wanted
        else:
            torch.testing.assert_close(
                found[view][-1, :, 7::9, 5::9].flatten(), torch.tensor(wanted), atol=2e-6, rtol=0
            )


def coordinates(count, side):
    """Images whose red is x and green is y, 0..255."""
    ramp = torch.arange(side).float() * 255 / (side - 1)
    image = torch.stack([ramp.expand(side, side), ramp[:, None].expand(side, side), torch.full((side, side), 100.0)])
    return image.round().to(torch.uint8).expand(count, 3, side, side).contiguous()


@pytest.mark.parametrize("seed", range(3))
def test_pair_shares_its_geometry(seed):
    labelled, mask, _ = draw_inputs(side=128)
    unlabelled = coordinates(4, 128)
    augmenter = Augmenter(**(GEOMETRY_ONLY | {"affine": 1, "elastic": 1}))
    batch = augmenter(raw(labelled, mask, unlabelled), seed=seed)
    assert torch.equal(batch.weak, batch.strong[0])
    assert not torch.equal(batch.weak[0], batch.weak[1])  # but every image has its own
    # Under all the rest, the strong view shows the weak one's pixels wherever there is no hole.
    strong = Augmenter(**(GEOMETRY_ONLY | {"affine": 1, "elastic": 1, "strong_holes": 1}))
    holed = strong(raw(labelled, mask, unlabelled), seed=seed)
    assert torch.equal(holed.weak, batch.weak)
    shown = holed.strong[0][:, 2] > 0
    assert 0.5 < shown.float().mean() < 0.99
    assert torch.equal(
        holed.strong[0].masked_select(shown[:, None]),
        holed.weak.masked_select(shown[:, None]),
    )


def test_amounts_are_in_their_units():
    # Where the middle and its neighbour come from tells shift, angle and zoom.
    side, count = 101, 64
    labelled, mask, _ = draw_inputs(side=side)
    settings = GEOMETRY_ONLY | {"horizontal_flip": 0, "vertical_flip": 0, "affine": 1, "elastic": 0}
    settings |= {"rotate": 10, "scale": 0.05, "shift": 0.1}
    batch = Augmenter(**settings)(raw(labelled, mask, coordinates(count, side)), seed=1)
    source = batch.weak[:, :2].double() * (side - 1)  # (N, 2, S, S), pixels
    middle = source[:, :, 50, 50] - 50
    assert 8 < middle.abs().max() < 10.1 + 0.5
    step = (source[:, :, 50, 65] - source[:, :, 50, 35]) / 30
    angle = torch.rad2deg(torch.atan2(step[:, 1], step[:, 0]))
    assert 8 < angle.abs().max() < 10 + 1.5  # 8-bit coordinates are good to about a degree
    assert ((step.norm(dim=1) - 1).abs() < 0.05 / 0.95 + 0.03).all()


@pytest.mark.parametrize("settings", [{}, {"affine": 1, "labelled_elastic": 1}, {"rotate": 180, "shift": 0.3}])
def test_image_and_mask_move_together(settings):
    side, num_classes = 128, 4
    _, mask, unlabelled = draw_inputs(8, 2, side, num_classes)
    painted = (mask * 80)[:, None].expand(-1, 3, -1, -1).contiguous()
    for seed in range(3):
        batch = Augmenter(**(GEOMETRY_ONLY | settings))(raw(painted, mask, unlabelled), seed=seed)
        shown = (batch.labelled[:, 0] * 255 / 80).round().long()
        ids = batch.mask[:, None].float()
        inside = (F.max_pool2d(ids, 5, 1, 2) == -F.max_pool2d(-ids, 5, 1, 2))[:, 0]  # 2 pixels from any border
        assert inside.float().mean() > 0.5
        assert (shown == batch.mask)[inside].float().mean() > 0.999
        assert (shown == batch.mask).float().mean() > 0.9


def test_labels_are_kept_as_they_are():
    labelled, mask, unlabelled = draw_inputs(6)
    mask[mask == 3] = 255  # a void label is an id like any other
    for seed in range(5):
        batch = Augmenter(**EVERYTHING)(raw(labelled, mask, unlabelled), seed=seed)
        assert set(batch.mask.unique().tolist()) == {0, 1, 2, 255}


def test_holes_spare_mask_and_weak_view():
    labelled, mask, unlabelled = draw_inputs(8, 8, 100)
    labelled, unlabelled = labelled.clamp(min=1), unlabelled.clamp(min=1)
    settings = {"weak_light": 0, "strong_light": 0, "hole_size": (0.1, 0.2)}
    settings |= {"labelled_hole_count": (1, 1), "strong_hole_count": (1, 1)}
    without = Augmenter(**settings, labelled_holes=0, strong_holes=0)(raw(labelled, mask, unlabelled), seed=4)
    batch = Augmenter(**settings, labelled_holes=1, strong_holes=1)(raw(labelled, mask, unlabelled), seed=4)
    assert torch.equal(batch.mask, without.mask)
    assert torch.equal(batch.weak, without.weak)
    for images in (batch.labelled, batch.strong[0]):
        covered = (images == 0).all(dim=1)  # (N, S, S)
        heights, widths = covered.any(dim=2).sum(dim=1), covered.any(dim=1).sum(dim=1)
        assert ((heights >= 10) & (heights <= 20) & (widths >= 10) & (widths <= 20)).all()
        assert torch.equal(covered.sum(dim=(1, 2)), heights * widths)  # one whole rectangle, inside the image


@pytest.mark.parametrize("name, index", [("weak_light", 2), ("strong_light", 3), ("blur", 3), ("noise", 3)])
def test_light_blur_and_noise_change_their_view_only(name, index):
    inputs = draw_inputs()
    settings = GEOMETRY_ONLY | {"blur_sigma": (0.02, 0.03)}
    plain = tensors(Augmenter(**settings)(raw(*inputs), seed=2))
    changed = tensors(Augmenter(**(settings | {name: 1}))(raw(*inputs), seed=2))
    assert (plain[index] - changed[index]).abs().amax(dim=(1, 2, 3)).min() > 0.001
    assert torch.equal(plain[5 - index], changed[5 - index])  # the other view of the pair
    assert torch.equal(plain[1], changed[1])


def test_light_by_hand():
    # One flat image: contrast turns around its mean and shows nothing, brightness adds, gamma is an exponent.
    labelled, mask, _ = draw_inputs(side=8)
    flat = torch.full((200, 3, 8, 8), 102, dtype=torch.uint8)  # 0.4
    still = GEOMETRY_ONLY | {"horizontal_flip": 0, "vertical_flip": 0, "affine": 0, "elastic": 0, "strong_light": 1}

    def strong(**amounts):
        zero = {"strong_brightness": 0, "strong_contrast": 0, "strong_gamma": 0}
        return Augmenter(**(still | zero | amounts))(raw(labelled, mask, flat), seed=0).strong[0][:, 0, 0, 0]

    torch.testing.assert_close(strong(strong_contrast=0.5), torch.full((200,), 0.4))
    for values, low, high in (
        (strong(strong_brightness=0.2), 0.2, 0.6),
        (strong(strong_gamma=0.5), 0.4**1.5, 0.4**0.5),
    ):
        assert low - 1e-5 <= values.min() < low + 0.02
        assert high - 0.02 < values.max() <= high + 1e-5


def test_probability_is_per_image():
    labelled, mask, unlabelled = draw_inputs(2, 400, 16)
    batch = Augmenter(**(GEOMETRY_ONLY | {"strong_holes": 0.7, "hole_size": (0.2, 0.2)}))(
        raw(labelled, mask, unlabelled), seed=0
    )
    share = (batch.weak != batch.strong[0]).flatten(1).any(dim=1).float().mean()
    assert 0.6 < share < 0.8


@pytest.mark.parametrize(
    "settings, name",
    [
        ({"affine": 1.5}, "affine"),
        ({"scale": 1.0}, "scale"),
        ({"elastic_shift": 0.1}, "elastic_shift"),
        ({"hole_size": (0.3, 0.1)}, "hole_size"),
        ({"strong_hole_count": (1, 2, 3)}, "strong_hole_count"),
        ({"noise_std": float("nan")}, "noise_std"),
        ({"cuboid_size": (0.1, 1.2)}, "cuboid_size"),
        ({"hue": 0.6}, "hue"),
        ({"tilt": (10,)}, "tilt"),
        ({"tilt": (10, -1)}, "tilt"),
    ],
)
def test_refusals_name_the_field(settings, name):
    with pytest.raises(ConfigError, match=f"augment: {name} "):
        Augmenter(**settings)


def test_more_strong_views_leave_the_first_ones_alone_and_differ():
    inputs = raw(*draw_inputs())
    one, three = (Augmenter(**EVERYTHING, strong_views=n)(inputs, seed=4) for n in (1, 3))
    assert same(one, Augmenter(**EVERYTHING)(inputs, seed=4)) and len(three.strong) == 3
    assert torch.equal(one.strong[0], three.strong[0]) and torch.equal(one.weak, three.weak)
    assert not torch.equal(three.strong[0], three.strong[1]) and not torch.equal(three.strong[1], three.strong[2])
    assert Augmenter(strong_views=0)(inputs, seed=4).strong == ()


def test_views_share_their_geometry():
    """Without light and holes every view of an unlabelled image is the weak one, moved alike."""
    batch = Augmenter(**(GEOMETRY_ONLY | {"affine": 1, "elastic": 1}), strong_views=2)(raw(*draw_inputs()), seed=1)
    assert all(torch.equal(view, batch.weak) for view in batch.strong)


def test_plain_labelled_view_has_the_geometry_and_neither_light_nor_holes():
    inputs, everything = raw(*draw_inputs()), EVERYTHING | {"strong_views": 1}
    batch = Augmenter(**everything, plain_labelled=True)(inputs, seed=9)
    bare = Augmenter(**(everything | {"weak_light": 0, "labelled_holes": 0}))(inputs, seed=9)
    assert torch.equal(batch.plain, bare.labelled) and not torch.equal(batch.plain, batch.labelled)
    assert same(batch, Augmenter(**everything)(inputs, seed=9))
    assert Augmenter(**everything)(inputs, seed=9).plain is None


def test_second_labelled_batch_is_drawn_apart_and_shifts_nothing():
    labelled, mask, unlabelled = draw_inputs()
    augmenter = Augmenter(**EVERYTHING)
    alone = augmenter(raw(labelled, mask, unlabelled), seed=2)
    both = augmenter(raw(labelled, mask, unlabelled, labelled, mask), seed=2)
    assert same(alone, both) and alone.second is None
    assert both.second.images.shape == both.labelled.shape and both.second.mask.dtype == torch.int64
    assert not torch.equal(both.second.images, both.labelled), "the same images get other draws"
    again = augmenter(raw(labelled, mask, unlabelled, labelled, mask), seed=2)
    assert all(torch.equal(a, b) for a, b in zip(both.second, again.second, strict=True))


# ---------------------------------------------------------------- volumes, other sides, channels and depths

SHAPES = [(40, 64), (64, 64, 64), (12, 48, 40)]
STILL = GEOMETRY_ONLY | {"horizontal_flip": 0, "vertical_flip": 0, "depth_flip": 0, "affine": 0, "elastic": 0}


def ramps(count, shape, dtype=torch.int32):
    """Images of one channel an axis, the last axis first: where a pixel is, from 0 at one end to white at the other."""
    white = {torch.uint8: 255, torch.int32: 65535}[dtype]
    axes = [torch.linspace(0, 1, side) for side in shape]
    places = torch.stack(torch.meshgrid(*axes, indexing="ij")[::-1])
    return (places * white).round().to(dtype).expand(count, *places.shape).contiguous()


def smooth_inputs(shape, channels, dtype, num_labelled=2, num_unlabelled=3, num_classes=4):
    generator = torch.Generator().manual_seed(1)
    mode = "bilinear" if len(shape) == 2 else "trilinear"
    coarse = torch.rand(num_labelled + num_unlabelled, channels, *(4,) * len(shape), generator=generator)
    white = {torch.uint8: 255, torch.int32: 65535}[dtype]
    images = (F.interpolate(coarse, shape, mode=mode) * white).to(dtype)
    ids = torch.randint(0, num_classes, (num_labelled, 1, *(3,) * len(shape)), generator=generator).float()
    mask = F.interpolate(ids, shape)[:, 0].to(torch.uint8)
    return images[:num_labelled], mask, images[num_labelled:]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_any_sides_channels_and_levels(shape, channels, dtype):
    labelled, mask, unlabelled = smooth_inputs(shape, channels, dtype)
    mask[mask == 3] = 255
    inputs = raw(labelled, mask, unlabelled, labelled, mask)
    batch = Augmenter(**EVERYTHING, strong_views=2, plain_labelled=True)(inputs, seed=3)
    assert batch.mask.shape == (2, *shape) and batch.mask.dtype == torch.int64
    assert set(batch.mask.unique().tolist()) == {0, 1, 2, IGNORE}
    views = [batch.labelled, batch.weak, *batch.strong, batch.plain, batch.second.images]
    for images, count in zip(views, (2, 3, 3, 3, 2, 2), strict=True):
        assert images.shape == (count, channels, *shape) and images.dtype == torch.float32
        assert ((images >= 0) & (images <= 1)).all() and images.std() > 0.02
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert same(batch, Augmenter(**EVERYTHING, strong_views=2)(inputs, seed=3))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("shape", SHAPES)
def test_both_kinds_of_levels_mean_the_same(shape):
    labelled, mask, unlabelled = smooth_inputs(shape, 1, torch.uint8)
    deep = raw(labelled.int() * 257, mask, unlabelled.int() * 257)  # 255 * 257 = 65535
    first, second = (Augmenter(**EVERYTHING)(inputs, seed=8) for inputs in (raw(labelled, mask, unlabelled), deep))
    for a, b in zip(tensors(first), tensors(second), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    off = Augmenter.off()(deep, seed=0)
    assert torch.equal(off.labelled, labelled.int() * 257 / 65535) and torch.equal(off.mask, mask.long())


def test_deep_levels_are_not_rounded_to_8_bits():
    levels = torch.arange(64 * 64, dtype=torch.int32).view(1, 1, 64, 64) + 20000
    batch = Augmenter.off()(raw(levels, torch.zeros(1, 64, 64, dtype=torch.uint8), levels[:0]), seed=0)
    assert len(batch.labelled.unique()) == 64 * 64
    assert torch.equal((batch.labelled * 65535).round().int(), levels)


@pytest.mark.parametrize("flip, dim", [("horizontal_flip", -1), ("vertical_flip", -2), ("depth_flip", -3)])
def test_flip_turns_the_axis_of_a_volume_that_it_names(flip, dim):
    labelled, mask, unlabelled = smooth_inputs((10, 24, 16), 2, torch.uint8)
    batch = Augmenter(**(STILL | {flip: 1}))(raw(labelled, mask, unlabelled), seed=0)
    assert torch.equal(batch.mask, mask.long().flip(dim))
    torch.testing.assert_close(batch.labelled, labelled.flip(dim) / 255, atol=1e-4, rtol=0)
    torch.testing.assert_close(batch.strong[0], unlabelled.flip(dim) / 255, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "settings", [{"affine": 1, "labelled_elastic": 1}, {"affine": 1, "rotate": 60, "tilt": (40, 30)}]
)
@pytest.mark.parametrize("shape", SHAPES)
def test_image_and_mask_move_together_whatever_the_shape(settings, shape):
    _, mask, unlabelled = smooth_inputs(shape, 1, torch.uint8, num_labelled=4)
    painted = (mask * 80)[:, None].contiguous()
    pool = F.max_pool2d if len(shape) == 2 else F.max_pool3d
    for seed in range(2):
        batch = Augmenter(**(STILL | settings))(raw(painted, mask, unlabelled), seed=seed)
        assert not torch.equal(batch.mask, mask.long())
        shown, ids = (batch.labelled[:, 0] * 255 / 80).round().long(), batch.mask[:, None].float()
        inside = (pool(ids, 3, 1, 1) == -pool(-ids, 3, 1, 1))[:, 0]  # a pixel from any border
        assert inside.float().mean() > 0.4
        assert (shown == batch.mask)[inside].float().mean() > 0.999


def read_places(shape, count=48, **settings):
    """Where the pixels of a moved image come from, in pixels from its middle: (N, dims, *S), x first."""
    mask = torch.zeros(1, *shape, dtype=torch.uint8)
    batch = Augmenter(**(STILL | {"affine": 1, "scale": 0, "shift": 0} | settings))(
        raw(ramps(1, shape), mask, ramps(count, shape)), seed=1
    )
    sides = torch.tensor(shape[::-1]).view(1, -1, *(1,) * len(shape)).double()
    return (batch.weak.double() - 0.5) * (sides - 1)


def slopes(places, reach=4):
    """How the source moves, in pixels, with a step along each output axis around the middle: (N, dims, dims)."""
    dims, middle = places.shape[1], [side // 2 for side in places.shape[2:]]
    found = []
    for axis in range(dims):  # x, y, z
        at = [list(middle), list(middle)]
        at[0][dims - 1 - axis] -= reach
        at[1][dims - 1 - axis] += reach
        low, high = (places[(slice(None), slice(None), *place)] for place in at)
        found.append((high - low) / (2 * reach))
    return torch.stack(found, dim=2)


@pytest.mark.parametrize("shape", [(41, 81), (65, 25)])
def test_a_picture_that_is_no_square_turns_without_shear(shape):
    turn = slopes(read_places(shape, rotate=20))
    torch.testing.assert_close(turn @ turn.transpose(1, 2), torch.eye(2).double().expand_as(turn), atol=2e-3, rtol=0)
    angle = torch.rad2deg(torch.atan2(turn[:, 1, 0], turn[:, 0, 0]))
    assert 17 < angle.abs().max() <= 20.1 and angle.min() < 0 < angle.max()


@pytest.mark.parametrize(
    "shape, settings, turning",
    [
        ((33, 33, 33), {"rotate": 20, "tilt": (0, 0)}, (0, 1)),
        ((33, 41, 37), {"rotate": 0, "tilt": (20, 0)}, (0, 2)),
        ((33, 41, 37), {"rotate": 0, "tilt": (0, 20)}, (1, 2)),
        ((13, 41, 43), {"rotate": 20}, (0, 1)),  # thick slices stay slices
    ],
)
def test_volumes_turn_about_the_axis_that_is_named(shape, settings, turning):
    turn = slopes(read_places(shape, **settings))
    torch.testing.assert_close(turn @ turn.transpose(1, 2), torch.eye(3).double().expand_as(turn), atol=2e-3, rtol=0)
    first, second = turning
    assert 17 < torch.rad2deg(torch.asin(turn[:, first, second])).abs().max() < 20.2
    still = ({0, 1, 2} - set(turning)).pop()
    torch.testing.assert_close(turn[:, still, still], torch.ones(len(turn)).double(), atol=1e-3, rtol=0)


def test_volumes_of_alike_sides_tilt_by_default():
    turn = slopes(read_places((33, 33, 33), rotate=20))
    assert all(turn[:, axis, 2].abs().max() > 0.2 for axis in (0, 1))


def test_shift_and_zoom_of_volumes_are_in_their_units():
    shape = (21, 61, 41)
    moved = read_places(shape, rotate=0, shift=0.1)[:, :, 10, 30, 20]
    assert (moved.abs().amax(0) <= torch.tensor([4.1, 6.1, 2.1]) + 0.05).all()
    assert (moved.abs().amax(0) >= 0.8 * torch.tensor([4.1, 6.1, 2.1])).all()
    zoom = slopes(read_places(shape, rotate=0, scale=0.2))
    per_axis = torch.diagonal(zoom, dim1=1, dim2=2)
    assert (per_axis - per_axis[:, :1]).abs().max() < 2e-3  # alike along all axes
    assert 0.82 < per_axis.min() < 0.87 and 1.18 < per_axis.max() < 1.26


@pytest.mark.parametrize("shape", [(40, 56), (48, 40, 44)])
def test_the_strongest_elastic_distortion_does_not_fold(shape):
    settings = {"affine": 0, "elastic": 1, "elastic_shift": 0.04, "elastic_cells": 5}
    places = read_places(shape, count=24, **settings)
    inner = (slice(None), slice(None), *(slice(6, -6),) * len(shape))
    dims = len(shape)
    steps = [torch.diff(places[inner], dim=1 + dims - axis) for axis in range(dims)]
    smallest = [side - 13 for side in shape]
    steps = [step[(slice(None), slice(None), *(slice(0, side) for side in smallest))] for step in steps]
    jacobian = torch.stack(steps, dim=-1).movedim(1, -2)  # (N, *S, dims, dims)
    determinant = torch.linalg.det(jacobian)
    assert determinant.min() > 0 and determinant.std() > 0.05


def test_cuboids_are_whole_and_of_their_size():
    shape = (20, 50, 40)
    labelled, mask, unlabelled = smooth_inputs(shape, 1, torch.uint8, num_unlabelled=6)
    unlabelled = unlabelled.clamp(min=1)
    settings = STILL | {"strong_holes": 1, "strong_hole_count": (1, 1), "cuboid_size": (0.2, 0.5)}
    batch = Augmenter(**settings)(raw(labelled, mask, unlabelled), seed=4)
    covered = batch.strong[0][:, 0] == 0  # (N, D, H, W)
    sides = [covered.transpose(1, axis).flatten(2).any(2).sum(1) for axis in (1, 2, 3)]
    for side, found in zip(shape, sides, strict=True):
        assert ((found >= 0.2 * side) & (found <= 0.5 * side)).all() and len(found.unique()) > 1
    assert torch.equal(covered.flatten(1).sum(1), sides[0] * sides[1] * sides[2])
    assert torch.equal(batch.strong[0].masked_fill(covered[:, None], 0), batch.weak.masked_fill(covered[:, None], 0))


@pytest.mark.parametrize("shape", [(31, 45), (15, 31, 21)])
def test_blur_is_a_gaussian_along_every_axis(shape):
    """Of a single bright pixel remains a Gaussian, whose width is a fraction of each axis."""
    image = torch.zeros(1, 1, *shape, dtype=torch.int32)
    image[(0, 0, *(side // 2 for side in shape))] = 65535
    settings = STILL | {"blur": 1, "blur_sigma": (0.06, 0.06)}
    strong = Augmenter(**settings)(raw(image, image[0].byte(), image), seed=0).strong[0][0, 0].double()
    assert strong.sum().item() == pytest.approx(1, abs=1e-4)
    for axis, side in enumerate(shape):
        along = strong.sum([other for other in range(len(shape)) if other != axis])
        place = torch.arange(side).double() - side // 2
        kernel = torch.exp(-(place**2) / (2 * (0.06 * side) ** 2))
        kernel[place.abs() > math.ceil(3 * 0.06 * side)] = 0
        torch.testing.assert_close(along, kernel / kernel.sum(), atol=1e-5, rtol=0)


def test_colour_changes_strong_views_alone_and_shifts_nothing():
    inputs, settings = raw(*draw_inputs()), EVERYTHING | {"noise": 0}
    plain = Augmenter(**settings, strong_views=2)(inputs, seed=6)
    coloured = Augmenter(**settings, strong_views=2, colour=1)(inputs, seed=6)
    assert torch.equal(plain.weak, coloured.weak) and torch.equal(plain.labelled, coloured.labelled)
    for before, after in zip(plain.strong, coloured.strong, strict=True):
        assert (before - after).abs().amax((1, 2, 3)).min() > 0.005
        assert torch.equal((before == 0).all(1), (after == 0).all(1))  # the same holes
    never = Augmenter(**settings, strong_views=2, saturation=0.1, hue=0.2)(inputs, seed=6)
    assert same(plain, never)


def colours(values, **settings):
    """Strong views (N, 3) of one pixel's colour each, without anything else."""
    image = torch.tensor(values, dtype=torch.int32).view(1, 3, 1, 1).expand(64, 3, 4, 4).contiguous()
    batch = Augmenter(**(STILL | settings))(raw(image[:1], image[:1, 0].byte(), image), seed=0)
    return batch.strong[0][:, :, 0, 0].double()


def test_colour_by_hand():
    red = (52428, 13107, 13107)  # 0.8, 0.2, 0.2: hue 0, saturation 0.75, value 0.8
    turned = colours(red, colour=1, saturation=0, hue=0.1)
    torch.testing.assert_close(turned.amax(1), torch.full((64,), 0.8).double(), atol=1e-4, rtol=0)
    torch.testing.assert_close(turned.amin(1), torch.full((64,), 0.2).double(), atol=1e-4, rtol=0)
    # A tenth of the circle from red towards yellow lifts green by 0.6 of the range, towards magenta blue.
    reach = (turned[:, 1:] - 0.2).amax(0) / 0.6
    assert ((reach > 0.54) & (reach <= 0.601)).all()
    faded = colours(red, colour=1, saturation=0.4, hue=0)
    saturation = 1 - faded.amin(1) / faded.amax(1)
    assert 0.75 * 0.6 - 1e-3 < saturation.min() < 0.5 and 0.97 < saturation.max() <= 1
    grey = colours(red, greyscale=1)
    torch.testing.assert_close(grey, torch.full_like(grey, 0.299 * 0.8 + 0.701 * 0.2), atol=1e-4, rtol=0)
    share = (colours(red, colour=0.5, hue=0.1) != colours(red)).any(1).double().mean()
    assert 0.3 < share < 0.7


def test_colour_of_volumes_of_three_channels():
    labelled, mask, unlabelled = smooth_inputs((6, 20, 16), 3, torch.int32)
    batch = Augmenter(**STILL, greyscale=1)(raw(labelled, mask, unlabelled), seed=0)
    grey = (batch.weak * torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1, 1)).sum(1, keepdim=True)
    torch.testing.assert_close(batch.strong[0], grey.expand(-1, 3, -1, -1, -1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("setting", ["colour", "greyscale"])
def test_colour_of_one_channel_is_refused(setting):
    inputs = raw(*smooth_inputs((16, 16), 1, torch.uint8))
    with pytest.raises(ConfigError, match=rf"augment: {setting} is 0\.5, but images have 1 channel") as caught:
        Augmenter(**{setting: 0.5})(inputs, seed=0)
    assert caught.value.hint == f"Set augment.{setting}: 0."
