import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from knowsam.data.augment import Augmenter
from knowsam.data.batch import Ids
from knowsam.data.streams import RawBatch
from knowsam.errors import ConfigError

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
