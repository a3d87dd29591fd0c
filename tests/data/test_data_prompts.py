"""Prompts from masks: where they lie, that they are the same again, and that clicks lead to the target."""

import itertools

import numpy as np
import pytest
import torch
from scipy import ndimage

from knowsam.data.labels import IGNORE_ID
from knowsam.data.prompts import (
    PromptPolicy,
    find_objects,
    for_sam,
    mask_logits,
    next_click,
    sample_prompts,
    sample_slice_prompts,
    simulate_clicks,
)

EVERYTHING = PromptPolicy(positive=3, negative=4, masks=True, mask_size=16)
every_dims = pytest.mark.parametrize("dims", [2, 3])
every_seed = pytest.mark.parametrize("seed", [0, 1, (2, 7)])


def drawn_mask(dims, classes=3, seed=0, ignored=True):
    """Blobs of several classes, with a strip and a rim where nothing is known."""
    rng = np.random.default_rng(seed)
    shape = (48, 40) if dims == 2 else (12, 32, 28)
    field = ndimage.gaussian_filter(rng.standard_normal(shape), 2.5)
    which = ndimage.gaussian_filter(rng.standard_normal(shape), 4)
    mask = np.where(field > 0.5 * field.std(), 1 + np.digitize(which, np.quantile(which, [1 / 3, 2 / 3])), 0)
    mask = np.minimum(mask, classes - 1).astype(np.uint8)
    if ignored:
        rim = ndimage.binary_dilation(mask == 1) & (mask == 0)
        mask[rim & (rng.random(shape) < 0.5)] = IGNORE_ID
        mask[..., :3] = IGNORE_ID
    return mask


def at(array, point):
    return array[tuple(int(c) for c in point)]


@every_dims
@every_seed
@pytest.mark.parametrize("near", [None, 0.0, 0.5])
@pytest.mark.parametrize("point", ["random", "centre"])
@pytest.mark.parametrize("instances", [True, False])
def test_points_lie_where_their_labels_say(dims, seed, near, point, instances):
    mask = drawn_mask(dims)
    policy = PromptPolicy(positive=3, negative=4, near=near, point=point, instances=instances)
    drawn = sample_prompts(mask, seed, policy)
    assert len(drawn) >= 2 and drawn.points.shape == (len(drawn), 7, dims) and drawn.labels.shape == (len(drawn), 7)
    for p in range(len(drawn)):
        target = drawn.target(p)
        assert target.any() and (mask[target] == drawn.classes[p]).all()
        points = [tuple(c) for c, label in zip(drawn.points[p].tolist(), drawn.labels[p], strict=True) if label >= 0]
        assert len(set(points)) == len(points), "no pixel twice"
        for place, label in zip(drawn.points[p], drawn.labels[p], strict=True):
            if label < 0:
                continue
            assert at(mask, place) != IGNORE_ID
            assert at(target, place) == bool(label)
        assert (drawn.labels[p] == 1).sum() == min(3, target.sum()) and (drawn.labels[p] == 0).sum() == 4
        assert (drawn.labels[p, :3] != 0).all() and (drawn.labels[p, 3:] == 0).all()


@every_dims
def test_negative_points_are_near_where_there_is_room(dims):
    mask = np.zeros((60,) * dims, np.uint8)
    mask[(slice(20, 30),) * dims] = 1
    drawn = sample_prompts(mask, 0, PromptPolicy(negative=50, near=0.5))
    assert drawn.points.min() >= 15 and drawn.points.max() <= 34
    far = sample_prompts(mask, 0, PromptPolicy(negative=50, near=None))
    assert far.points.min() < 15 and far.points.max() > 34
    tight = sample_prompts(mask, 0, PromptPolicy(negative=5, near=0.0))  # no room in the box itself
    assert (tight.labels == 0).all()


@every_dims
def test_boxes_are_exact_without_jitter(dims):
    mask = drawn_mask(dims)
    drawn = sample_prompts(mask, 3)
    for p in range(len(drawn)):
        inside = np.argwhere(drawn.target(p))
        assert drawn.boxes[p].tolist() == [*inside.min(axis=0), *inside.max(axis=0)]
    assert drawn.points is None and drawn.labels is None and drawn.masks is None


@every_dims
@pytest.mark.parametrize("jitter", [0.05, 0.2, 0.5])
def test_jitter_moves_each_face_by_its_share_and_stays_in_the_image(dims, jitter):
    mask = drawn_mask(dims)
    exact = sample_prompts(mask, 0).boxes
    moved = np.stack([sample_prompts(mask, seed, PromptPolicy(jitter=jitter)).boxes for seed in range(40)])
    sides = exact[:, dims:] - exact[:, :dims] + 1
    allowed = jitter * np.concatenate([sides, sides], axis=1)
    if jitter < 0.5:  # then no two faces can change places
        assert (np.abs(moved - exact) <= allowed + 1e-4).all()
    last = np.array([side - 1 for side in mask.shape] * 2)
    assert (moved >= 0).all() and (moved <= last).all()
    assert (moved[..., :dims] <= moved[..., dims:]).all()
    inner = (exact > allowed) & (exact < last - allowed)
    assert (np.abs(moved - exact).max(axis=0)[inner] > 0.5 * allowed[inner]).all(), "drawn over the whole range"
    assert (moved.std(axis=0) > 0).all()


@every_dims
@every_seed
def test_the_same_again_and_no_global_state(dims, seed):
    mask = drawn_mask(dims)
    untouched, torch_state = mask.copy(), torch.get_rng_state()
    policy = PromptPolicy(jitter=0.2, positive=2, negative=2, masks=True, mask_size=8, mask_noise=1.0)
    first, second = sample_prompts(mask, seed, policy), sample_prompts(mask, seed, policy)
    np.random.seed(99)  # another global state: the same draws
    state = np.random.get_state()[1].copy()
    third = sample_prompts(mask.astype(np.int64), seed, policy)
    assert (np.random.get_state()[1] == state).all() and torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(mask, untouched)
    for name in ("objects", "classes", "boxes", "points", "labels", "masks"):
        assert np.array_equal(getattr(first, name), getattr(second, name)), name
        assert np.array_equal(getattr(first, name), getattr(third, name)), name
    other = sample_prompts(mask, 12345, policy)
    assert not np.array_equal(first.points, other.points) and not np.array_equal(first.boxes, other.boxes)


@every_dims
def test_what_is_drawn_of_one_kind_does_not_depend_on_the_others(dims):
    mask = drawn_mask(dims)
    alone = sample_prompts(mask, 5, PromptPolicy(jitter=0.2))
    with_points = sample_prompts(mask, 5, PromptPolicy(jitter=0.2, positive=2, negative=3, masks=True, mask_size=8))
    assert np.array_equal(alone.boxes, with_points.boxes)
    points = sample_prompts(mask, 5, PromptPolicy(boxes=False, positive=2))
    assert points.boxes is None and np.array_equal(points.points, with_points.points[:, :2])


@every_dims
@pytest.mark.parametrize("fill", [0, IGNORE_ID])
def test_a_mask_without_objects_gives_no_prompts(dims, fill):
    shape = (9,) * dims
    drawn = sample_prompts(np.full(shape, fill, np.uint8), 0, EVERYTHING)
    assert len(drawn) == 0 and drawn.boxes.shape == (0, 2 * dims) and drawn.points.shape == (0, 7, dims)
    assert drawn.labels.shape == (0, 7) and drawn.masks.shape == (0, *(16,) * dims) and not drawn.objects.any()
    if dims == 3:
        assert sample_slice_prompts(np.full(shape, fill, np.uint8), 0) == {}
    if dims == 2:
        batch = for_sam([drawn, drawn], 64)
        assert batch.valid.shape == (2, 1) and not batch.valid.any() and not batch.targets.any()


def test_too_few_pixels_are_padded():
    mask = np.zeros((4, 4), np.uint8)
    mask[1, 2] = 1
    drawn = sample_prompts(mask, 0, PromptPolicy(positive=3, negative=2))
    assert drawn.labels.tolist() == [[1, -1, -1, 0, 0]] and drawn.points[0, 0].tolist() == [1, 2]
    full = sample_prompts(np.ones((2, 2), np.uint8), 0, PromptPolicy(positive=1, negative=2))
    assert full.labels.tolist() == [[1, -1, -1]]


@every_dims
def test_objects_are_connected_components_by_class_the_largest_first(dims):
    mask = np.zeros((16,) * dims, np.uint8)
    mask[(slice(0, 2),) * dims] = 2
    mask[(slice(4, 8),) * dims] = 2
    mask[(slice(10, 13),) * dims] = 1
    mask[(slice(8, 10),) * dims] = 2  # touches the second at a corner
    numbered, classes = find_objects(mask)
    sizes = [int((numbered == n + 1).sum()) for n in range(len(classes))]
    assert classes.tolist() == [1, 2, 2] and sizes == [3**dims, 4**dims + 2**dims, 2**dims]
    _, classes = find_objects(mask, corners=False)
    assert classes.tolist() == [1, 2, 2, 2]
    _, classes = find_objects(mask, instances=False)
    assert classes.tolist() == [1, 2]
    numbered, classes = find_objects(mask, min_size=2**dims + 1)
    assert classes.tolist() == [1, 2] and set(np.unique(numbered)) == {0, 1, 2}
    numbered, classes = find_objects(mask, most=1)
    assert classes.tolist() == [2] and (numbered > 0).sum() == 4**dims + 2**dims
    assert find_objects(mask, min_size=10**6)[1].tolist() == []


@every_dims
def test_flipped_masks_have_flipped_boxes_and_centres(dims):
    mask = np.zeros((20, 24, 28)[:dims], np.uint8)
    mask[(slice(2, 9), slice(3, 8), slice(4, 11))[:dims]] = 1  # odd sides: one middle
    mask[(slice(12, 19), slice(12, 21), slice(13, 24))[:dims]] = 2
    mask[(slice(0, 1),) * dims] = IGNORE_ID
    policy = PromptPolicy(positive=1, point="centre")
    plain = sample_prompts(mask, 0, policy)
    for axes in itertools.chain.from_iterable(itertools.combinations(range(dims), n) for n in range(dims + 1)):
        turned = sample_prompts(np.flip(mask, axes), 0, policy)
        assert turned.classes.tolist() == plain.classes.tolist()
        low, high = plain.boxes[:, :dims].copy(), plain.boxes[:, dims:].copy()
        points = plain.points.copy()
        for axis in axes:
            last = mask.shape[axis] - 1
            low[:, axis], high[:, axis] = last - high[:, axis], last - low[:, axis]
            points[..., axis] = last - points[..., axis]
        assert np.array_equal(turned.boxes, np.concatenate([low, high], axis=1))
        assert np.array_equal(turned.points, points)


@every_dims
def test_the_centre_is_the_most_interior_pixel(dims):
    mask = drawn_mask(dims)
    drawn = sample_prompts(mask, 0, PromptPolicy(positive=1, point="centre"))
    for p in range(len(drawn)):
        depth = ndimage.distance_transform_edt(np.pad(drawn.target(p), 1))[(slice(1, -1),) * dims]
        assert at(depth, drawn.points[p, 0]) == pytest.approx(depth.max())


def test_the_centre_in_millimetres():
    """A slab that is thick in pixels and thin in mm: the deepest pixel is another one."""
    mask = np.zeros((30, 30), np.uint8)
    mask[2:10, 4:26] = 1  # 8 x 22 pixels
    mask[14:28, 4:8] = 1  # 14 x 4, apart
    drawn = sample_prompts(mask, 0, PromptPolicy(positive=1, point="centre", instances=False))
    assert drawn.points[0, 0, 0] < 10
    thin = sample_prompts(mask, 0, PromptPolicy(positive=1, point="centre", instances=False), spacing=(0.1, 1.0))
    assert thin.points[0, 0, 0] > 12


@every_dims
def test_mask_prompts_are_the_object_at_low_resolution(dims):
    mask = np.zeros((32,) * dims, np.uint8)
    mask[(slice(0, 16),) * dims] = 1
    mask[(slice(22, 32),) * dims] = 2
    drawn = sample_prompts(mask, 0, PromptPolicy(masks=True, mask_size=8))
    assert drawn.masks.shape == (2, *(8,) * dims) and drawn.masks.dtype == np.float32
    first = np.full((8,) * dims, -10.0)
    first[(slice(0, 4),) * dims] = 10
    assert np.array_equal(drawn.masks[0], first)
    # Of the second, the border lies within a low pixel: a half, a quarter, or an eighth of it.
    half = drawn.masks[1][(5, 7, 7)[:dims]]
    assert half == pytest.approx(0, abs=1e-5) and drawn.masks[1][(5,) * dims] < -1
    noisy = sample_prompts(mask, 0, PromptPolicy(masks=True, mask_size=8, mask_noise=0.5))
    assert np.std(noisy.masks - drawn.masks) == pytest.approx(0.5, rel=0.3)
    assert mask_logits(np.ones((4, 4)), 16).shape == (16, 16)  # also larger than the mask


# ---------------------------------------------------------------- slices


def test_slices_of_a_volume_share_its_objects():
    volume = drawn_mask(3)
    policy = PromptPolicy(positive=2, negative=2)
    whole = sample_prompts(volume, 0, policy)
    slices = sample_slice_prompts(volume, 0, policy)
    assert list(slices) == np.flatnonzero(whole.objects.any(axis=(1, 2))).tolist()
    for z, drawn in slices.items():
        assert drawn.numbers.tolist() == sorted(set(np.unique(whole.objects[z])) - {0})
        for p, number in enumerate(drawn.numbers):
            assert np.array_equal(drawn.target(p), whole.objects[z] == number)
            assert drawn.classes[p] == whole.classes[number - 1]
            inside = np.argwhere(drawn.target(p))
            assert drawn.boxes[p].tolist() == [*inside.min(axis=0), *inside.max(axis=0)]
            for place, label in zip(drawn.points[p], drawn.labels[p], strict=True):
                if label >= 0:
                    assert at(drawn.target(p), place) == bool(label) and at(volume[z], place) != IGNORE_ID
    assert len({len(drawn) for drawn in slices.values()}) > 1


def test_a_slice_does_not_depend_on_the_others():
    volume = np.zeros((6, 16, 16), np.uint8)
    volume[1:5, 3:12, 3:12] = 1
    policy = PromptPolicy(jitter=0.3, positive=2)
    whole = sample_slice_prompts(volume, 4, policy)
    cut = volume.copy()
    cut[3:] = 0
    assert np.array_equal(sample_slice_prompts(cut, 4, policy)[1].points, whole[1].points)
    assert not np.array_equal(whole[1].points, whole[2].points), "neighbours draw apart"
    for z, drawn in whole.items():
        assert drawn.points.shape == (1, 2, 2), z
    with pytest.raises(ValueError, match=r"a volume \(D, H, W\) has slices"):
        sample_slice_prompts(volume[0], 0)


# ---------------------------------------------------------------- clicks


@every_dims
@pytest.mark.parametrize("how", ["centre", "random"])
def test_clicks_lie_on_errors_and_say_what_is_wrong(dims, how):
    mask = drawn_mask(dims)
    rng = np.random.default_rng(0)
    for seed in range(30):
        prediction = ndimage.gaussian_filter(rng.standard_normal(mask.shape), 2) > 0.02
        click = next_click(prediction, mask, how=how, seed=seed)
        assert at(mask, click.point) != IGNORE_ID
        assert at(prediction, click.point) != bool(at(mask, click.point))
        assert click.label == bool(at(mask, click.point)) and all(type(c) is int for c in click.point)
        wrong = (prediction != (mask > 0)) & (mask != IGNORE_ID)
        parts = [
            ndimage.label(wrong & side, ndimage.generate_binary_structure(dims, dims))[0]
            for side in (mask > 0, mask == 0)
        ]
        part = next(p for p in parts if at(p, click.point))
        assert click.size == (part == at(part, click.point)).sum()
        if how == "centre":
            assert click.size == max(np.bincount(p.ravel())[1:].max(initial=0) for p in parts)


@every_dims
def test_the_next_click_is_the_middle_of_the_largest_error(dims):
    target = np.zeros((31,) * dims, bool)
    target[(slice(2, 7),) * dims] = True  # missed: 5 a side
    prediction = np.zeros_like(target)
    prediction[(slice(12, 21),) * dims] = True  # too much: 9 a side
    click = next_click(prediction, target)
    assert click == ((16,) * dims, 0, 9**dims)
    again = next_click(prediction, target, clicked=np.array([click.point]))
    assert again.point != click.point and again.label == 0  # the model did not listen: elsewhere in the same error
    prediction[:] = False
    assert next_click(prediction, target) == ((4,) * dims, 1, 5**dims)
    assert next_click(prediction, target, min_size=5**dims + 1) is None
    assert next_click(target, target) is None and next_click(target, target, how="random") is None


def test_errors_under_ignored_pixels_are_none():
    target = np.full((8, 8), IGNORE_ID, np.uint8)
    assert next_click(np.ones((8, 8), bool), target) is None
    target[4, 4], target[0, 0] = 0, 1
    assert next_click(np.ones((8, 8), bool), target) == ((4, 4), 0, 1)
    assert next_click(np.ones((8, 8), bool), target, how="random", clicked=np.array([[4, 4]])) is None


def test_random_clicks_reach_every_error():
    target = np.zeros((6, 6), bool)
    target[1, 1:5] = True
    target[4, 4] = True
    seen = {next_click(np.zeros((6, 6), bool), target, how="random", seed=s).point for s in range(200)}
    assert seen == {tuple(p) for p in np.argwhere(target).tolist()}


class Oracle:
    """A model that corrects the connected error under the last click, whole."""

    def __init__(self, target):
        self.target = target
        self.prediction = np.zeros(target.shape, bool)
        self.prediction[..., ::5] = True  # it begins with mistakes of both kinds
        self.asked = 0

    def __call__(self, points, labels):
        self.asked += 1
        assert len(points) == len(labels) == self.asked
        point = tuple(points[-1])
        assert (self.target[point] > 0) == labels[-1]
        wrong = self.prediction != bool(labels[-1])
        parts, _ = ndimage.label(wrong & ((self.target > 0) == labels[-1]))
        if parts[point]:
            self.prediction[parts == parts[point]] = bool(labels[-1])
        return self.prediction.copy()


@every_dims
@pytest.mark.parametrize("how", ["centre", "random"])
def test_clicks_bring_a_perfect_oracle_to_the_target(dims, how):
    mask = (drawn_mask(dims, classes=2) != 0).astype(np.uint8)
    mask[drawn_mask(dims, classes=2) == IGNORE_ID] = IGNORE_ID
    clicked = simulate_clicks(Oracle(mask), mask, clicks=300, how=how, seed=1)
    assert clicked.dice_after[-1] == 1 and len(clicked.dice_after) == len(clicked.points) == len(clicked.labels) < 300
    assert (clicked.dice_after[:-1] < 1).all(), "it ends with the first perfect prediction"
    assert clicked.points.shape[1] == dims and not any(at(mask, p) == IGNORE_ID for p in clicked.points)
    assert len({tuple(p) for p in clicked.points.tolist()}) == len(clicked.points)
    few = simulate_clicks(Oracle(mask), mask, clicks=2, how=how, seed=1)
    assert len(few.dice_after) == 2 and np.array_equal(few.points, clicked.points[:2])


def test_a_model_that_never_listens_is_asked_so_many_times():
    target = np.zeros((9, 9), bool)
    target[2:6, 2:6] = True
    clicked = simulate_clicks(lambda points, labels: np.zeros((9, 9), bool), target, clicks=5)
    assert clicked.dice_after.tolist() == [0.0] * 5 and len({tuple(p) for p in clicked.points.tolist()}) == 5
    assert len(simulate_clicks(lambda p, n: ~target, np.zeros((9, 9), bool)).dice_after) == 0


# ---------------------------------------------------------------- for SAM


def test_prompts_of_images_become_sams():
    from knowsam.models.sam import Prompts

    masks = [drawn_mask(2, seed=n)[:40] for n in range(3)] + [np.zeros((40, 40), np.uint8)]
    policy = PromptPolicy(positive=2, negative=1, masks=True, mask_size=16)
    drawn = [sample_prompts(mask, n, policy) for n, mask in enumerate(masks)]
    batch = for_sam(drawn, 80)
    count = max(map(len, drawn))
    prompts = Prompts(**batch.prompts)
    assert (
        prompts.count == count
        and prompts.points.shape == (4, count, 3, 2)
        and prompts.masks.shape == (4, count, 16, 16)
    )
    assert prompts.boxes.dtype == prompts.points.dtype == torch.float32
    assert batch.valid.sum(1).tolist() == [len(one) for one in drawn] and not batch.valid[3].any()
    for b, one in enumerate(drawn):
        for p in range(len(one)):
            assert np.array_equal(batch.targets[b, p].numpy(), one.target(p))
            large = np.kron(one.target(p), np.ones((2, 2), bool))  # (80, 80)
            for (x, y), label in zip(prompts.points[b, p].tolist(), prompts.labels[b, p].tolist(), strict=True):
                assert large[round(y), round(x)] == bool(label) or label < 0
            inside = np.argwhere(large)
            x0, y0, x1, y1 = prompts.boxes[b, p].tolist()
            # The first and last pixel's centres: half an original pixel within the outline.
            assert [y0, x0] == (inside.min(axis=0) + 0.5).tolist() and [y1, x1] == (inside.max(axis=0) - 0.5).tolist()
    assert (prompts.labels[3] == -1).all() and not batch.targets[3].any()
    assert prompts.boxes[3, 0].tolist() == [0.5, 0.5, 78.5, 78.5]


def test_each_axis_is_carried_by_its_own_scale():
    mask = np.zeros((10, 40), np.uint8)
    mask[2, 30] = 1
    batch = for_sam([sample_prompts(mask, 0, PromptPolicy(positive=1))], 40)
    assert batch.prompts["points"].tolist() == [[[[30.0, 9.5]]]] and batch.prompts["boxes"].tolist() == [
        [[30, 9.5, 30, 9.5]]
    ]
    assert set(batch.prompts) == {"points", "labels", "boxes"}


def test_sam_segments_what_was_drawn():
    """Through the real network: shapes, and one mask for each prompt."""
    from knowsam.models.sam import Prompts, build_sam_guide

    torch.manual_seed(0)
    sam = build_sam_guide("vit_tiny", image_size=64, num_classes=2, tuning={"name": "adapter"})[0].sam
    drawn = [sample_prompts(drawn_mask(2, seed=n), n, EVERYTHING) for n in range(2)]
    batch = for_sam(drawn, sam.image_size)
    with torch.no_grad():
        decoded = sam(torch.rand(2, 3, 64, 64), Prompts(**batch.prompts), size=(48, 40))
    assert decoded.logits.shape == (2, max(map(len, drawn)), 1, 48, 40) and decoded.logits.isfinite().all()
    assert decoded.logits[:, :, 0].shape == batch.targets.shape


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"jitter": 0.6}, "jitter must be in 0..0.5"),
        ({"jitter": -0.1}, "jitter must be in 0..0.5"),
        ({"positive": -1}, "positive must be at least 0"),
        ({"min_size": 0}, "min_size must be at least 1"),
        ({"most": 0}, "most must be at least 1"),
        ({"near": -1.0}, "near must be at least 0"),
        ({"mask_size": 0}, "mask_size must be at least 1"),
        ({"point": "middle"}, "point must be 'random' or 'centre', got 'middle'"),
        ({"boxes": False}, "needs boxes, points or masks"),
    ],
)
def test_policies_refused(options, text):
    with pytest.raises(ValueError, match=text):
        PromptPolicy(**options)


def test_arguments_refused():
    mask = drawn_mask(2)
    for wrong in (mask.astype(float), mask[0], mask > 0):
        with pytest.raises(ValueError, match="integer class ids"):
            sample_prompts(wrong, 0)
    with pytest.raises(ValueError, match=r"prediction must be bool of the target's shape \(48, 40\), got uint8"):
        next_click(mask, mask)
    with pytest.raises(ValueError, match="prediction must be bool"):
        next_click(np.zeros((4, 4), bool), mask)
    with pytest.raises(ValueError, match="how must be"):
        next_click(mask > 0, mask, how="best")
    with pytest.raises(ValueError, match="target must be bool or integers"):
        next_click(mask > 0, mask.astype(float))
    plain, pointed = sample_prompts(mask, 0), sample_prompts(mask, 0, PromptPolicy(positive=1))
    with pytest.raises(ValueError, match="no image was given"):
        for_sam([], 64)
    with pytest.raises(ValueError, match="one policy for a batch"):
        for_sam([plain, pointed], 64)
    with pytest.raises(ValueError, match="images of one size"):
        for_sam([plain, sample_prompts(mask[:20], 0)], 64)
    with pytest.raises(ValueError, match="sample_slice_prompts"):
        for_sam([sample_prompts(drawn_mask(3), 0)], 64)
