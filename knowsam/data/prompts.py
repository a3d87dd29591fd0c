"""Prompts drawn from masks: boxes, points, masks, and the clicks that correct a prediction. In 2-D and 3-D.

Pure functions of their arguments: the same mask, seed and policy give the same prompts on every machine, and no global
random state is read or moved. Coordinates are in pixels along the array's axes, (y, x) or (z, y, x), pixel centres at
whole numbers; :func:`for_sam` turns them into what SAM takes. Ignored pixels (``IGNORE_ID``) are never clicked.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from knowsam.data.labels import IGNORE_ID

SURE = 10.0
"""Logit of a mask prompt where nothing is in doubt."""

Seed = int | Sequence[int]
"""Numbers from 0 on; several where draws depend on several things, as (seed, step, case)."""

Mask = NDArray[np.integer[Any]]
Bool = NDArray[np.bool_]
Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class PromptPolicy:
    """Which prompts are drawn of a mask, for each of its objects.

    Attributes:
        boxes: a box around the object.
        jitter: how far each face of the box may move, as a fraction of the box's side, 0..0.5; uniform in both
            directions, kept within the image.
        positive: points within the object.
        negative: points outside it, on other objects too.
        point: ``random``, or ``centre``: the first positive point is the object's most interior pixel.
        near: negative points lie in the object's box, enlarged by this fraction of its sides on each face; anywhere
            where that leaves too few pixels, and if None.
        masks: a mask prompt: the object at low resolution, as logits.
        mask_size: pixels a side of it, 4 times SAM's embedding (256 for images of 1024).
        mask_noise: standard deviation of noise on its logits.
        instances: an object is a connected component of a class; False: it is the whole class.
        corners: whether pixels that touch at a corner, or voxels at an edge, are connected.
        min_size: pixels of the smallest object that is prompted for.
        most: objects at most, the largest; all if None.
    Raises:
        ValueError: a value outside what is stated, or no prompt of any kind.
    """

    boxes: bool = True
    jitter: float = 0.0
    positive: int = 0
    negative: int = 0
    point: Literal["random", "centre"] = "random"
    near: float | None = 0.5
    masks: bool = False
    mask_size: int = 256
    mask_noise: float = 0.0
    instances: bool = True
    corners: bool = True
    min_size: int = 1
    most: int | None = None

    def __post_init__(self) -> None:
        if self.point not in ("random", "centre"):
            raise ValueError(f"point must be 'random' or 'centre', got {self.point!r}")
        if not 0 <= self.jitter <= 0.5:
            raise ValueError(f"jitter must be in 0..0.5 of a box's side, got {self.jitter}")
        at_least = {
            "positive": (self.positive, 0),
            "negative": (self.negative, 0),
            "near": (self.near, 0),
            "mask_size": (self.mask_size, 1),
            "mask_noise": (self.mask_noise, 0),
            "min_size": (self.min_size, 1),
            "most": (self.most, 1),
        }
        for name, (value, least) in at_least.items():
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if not (self.boxes or self.positive or self.negative or self.masks):
            raise ValueError("a policy needs boxes, points or masks; all of them are off")


@dataclass(frozen=True, eq=False)
class MaskPrompts:
    """P prompts, one for each object of a mask; P is 0 where a mask is empty. d is 2 or 3.

    Attributes:
        objects: int32 (*S), p + 1 on the pixels of prompt p's object, else 0.
        classes: (P,), the objects' class ids.
        numbers: (P,), of the objects, from 1; in a slice of a volume, of the volume's objects.
        boxes: (P, 2 d), first and last pixel along each axis: (y, x, y, x) or (z, y, x, z, y, x), low corner first;
            fractions of pixels where jittered. None if not asked for, as the rest.
        points: (P, N, d), N = positive + negative, positive ones first.
        labels: (P, N), 1 within the object, 0 outside, -1 where there was no pixel left to be clicked: padding.
        masks: (P, m, m) or (P, m, m, m), logits.
    """

    objects: NDArray[np.int32]
    classes: Ints
    numbers: Ints
    boxes: Floats | None = None
    points: Floats | None = None
    labels: Ints | None = None
    masks: Floats | None = None

    def __len__(self) -> int:
        """P."""
        return len(self.classes)

    def target(self, prompt: int) -> Bool:
        """Pixels of a prompt's object, (*S)."""
        found: Bool = self.objects == prompt + 1
        return found


class Click(NamedTuple):
    """A correction.

    Attributes:
        point: (y, x) or (z, y, x).
        label: 1 for a missed pixel, 0 for one that should not be there.
        size: pixels of the connected error that it lies in.
    """

    point: tuple[int, ...]
    label: int
    size: int


class Clicked(NamedTuple):
    """A sequence of clicks and what came of it.

    Attributes:
        points: int64 (N, d).
        labels: int64 (N,), 1 or 0.
        dice_after: float64 (N,), in 0..1, after each click, without ignored pixels.
    """

    points: Ints
    labels: Ints
    dice_after: NDArray[np.float64]


class ForSam(NamedTuple):
    """Prompts of B images, padded to P an image.

    Attributes:
        prompts: arguments of ``models.sam.Prompts`` by name: ``points`` (B, P, N, 2), x before y, ``labels`` (B, P, N),
            ``boxes`` (B, P, 4), ``masks`` (B, P, m, m), in pixels of the image that SAM encodes.
        valid: bool (B, P), False for padding.
        targets: bool (B, P, H, W), the objects that are asked for.
    """

    prompts: dict[str, Tensor]
    valid: Tensor
    targets: Tensor


def sample_prompts(
    mask: Mask, seed: Seed, policy: PromptPolicy | None = None, *, spacing: Sequence[float] | None = None
) -> MaskPrompts:
    """Draw prompts for every object of a mask: by class, the largest first.

    Args:
        mask: class ids (H, W) or (D, H, W); 0 is background, ``IGNORE_ID`` is unknown.
        seed: of all draws. What is drawn of one kind does not depend on which other kinds are asked for.
        policy: what is drawn; boxes if None.
        spacing: mm along each axis, for the most interior pixel; pixels are cubes if None.
    Raises:
        ValueError: no mask of class ids.
    """
    policy = policy or PromptPolicy()
    mask = _checked(mask)
    objects, classes = find_objects(
        mask, instances=policy.instances, corners=policy.corners, min_size=policy.min_size, most=policy.most
    )
    numbers = np.arange(1, len(classes) + 1, dtype=np.int64)
    return _draw(mask, objects, classes, numbers, seed, policy, spacing)


def sample_slice_prompts(
    mask: Mask, seed: Seed, policy: PromptPolicy | None = None, *, spacing: Sequence[float] | None = None
) -> dict[int, MaskPrompts]:
    """Draw 2-D prompts in every slice of a volume that meets an object; objects are the volume's, not the slices'.

    A slice through an object is one prompt, also where it is in several pieces.

    Args:
        mask: class ids (D, H, W).
        seed: of all draws; those of a slice do not depend on the other slices.
        policy: what is drawn; ``min_size`` and ``most`` are of objects of the volume.
        spacing: mm along each axis of the volume.
    Returns:
        Slice -> prompts, ascending; slices without an object are left out.
    Raises:
        ValueError: no volume of class ids.
    """
    policy = policy or PromptPolicy()
    mask = _checked(mask)
    if mask.ndim != 3:
        raise ValueError(f"a volume (D, H, W) has slices; the mask is {mask.shape}")
    objects, classes = find_objects(
        mask, instances=policy.instances, corners=policy.corners, min_size=policy.min_size, most=policy.most
    )
    found: dict[int, MaskPrompts] = {}
    for z in np.flatnonzero(objects.any(axis=(1, 2))).tolist():
        numbers = np.unique(objects[z])
        numbers = numbers[numbers > 0].astype(np.int64)
        table = np.zeros(len(classes) + 1, np.int32)
        table[numbers] = np.arange(1, len(numbers) + 1)
        own = table[objects[z]]
        in_plane = None if spacing is None else spacing[1:]
        found[z] = _draw(mask[z], own, classes[numbers - 1], numbers, [*_words(seed), z], policy, in_plane)
    return found


def find_objects(
    mask: Mask, *, instances: bool = True, corners: bool = True, min_size: int = 1, most: int | None = None
) -> tuple[NDArray[np.int32], Ints]:
    """Number the objects of a mask: by class, the largest first.

    Args:
        mask: class ids (H, W) or (D, H, W); 0 is background, ``IGNORE_ID`` is unknown.
        instances, corners, min_size, most: as in :class:`PromptPolicy`.
    Returns:
        int32 (*S), 0 or the number of an object from 1; class ids (P,).
    """
    mask = _checked(mask)
    structure = ndimage.generate_binary_structure(mask.ndim, mask.ndim if corners else 1)
    numbered = np.zeros(mask.shape, np.int32)
    classes: list[int] = []
    sizes: list[int] = []
    for class_id in np.unique(mask).tolist():
        if class_id in (0, IGNORE_ID):
            continue
        parts = (mask == class_id).astype(np.int32)
        if instances:
            ndimage.label(parts, structure, output=parts)
        pixels = np.bincount(parts.ravel())[1:]
        order = [p for p in np.argsort(-pixels, kind="stable") if pixels[p] >= min_size]
        table = np.zeros(len(pixels) + 1, np.int32)
        table[np.array(order, int) + 1] = len(classes) + 1 + np.arange(len(order))
        numbered += table[parts]
        classes += [class_id] * len(order)
        sizes += pixels[order].tolist()
    if most is not None and len(classes) > most:
        kept = np.sort(np.argsort(-np.array(sizes), kind="stable")[:most])
        table = np.zeros(len(classes) + 1, np.int32)
        table[kept + 1] = np.arange(1, most + 1)
        numbered, classes = table[numbered], np.array(classes)[kept].tolist()
    return numbered, np.array(classes, np.int64)


def next_click(
    prediction: Bool,
    target: Bool | Mask,
    *,
    how: Literal["centre", "random"] = "centre",
    seed: Seed = 0,
    clicked: NDArray[Any] | None = None,
    spacing: Sequence[float] | None = None,
    corners: bool = True,
    min_size: int = 1,
) -> Click | None:
    """Where a person would correct a prediction next.

    Args:
        prediction: bool (*S).
        target: bool (*S), or integers: 0 outside, ``IGNORE_ID`` unknown, anything else inside.
        how: ``centre``: the most interior pixel of the largest connected error, as interactive segmentation is
            evaluated; ``random``: any wrong pixel.
        seed: of the draw.
        clicked: (N, d), points that were clicked before and are not clicked again.
        spacing: mm along each axis; pixels are cubes if None.
        corners: whether pixels that touch at a corner are one error.
        min_size: pixels of the smallest error that is corrected.
    Returns:
        None where nothing is left to be corrected.
    Raises:
        ValueError: shapes that differ, another ``how``.
    """
    if how not in ("centre", "random"):
        raise ValueError(f"how must be 'centre' or 'random', got {how!r}")
    target, prediction = _as_target(target), np.asarray(prediction)
    if prediction.shape != target.shape or prediction.dtype != np.bool_:
        raise ValueError(
            f"prediction must be bool of the target's shape {target.shape}, got {prediction.dtype} {prediction.shape}"
        )
    inside = target.astype(bool)
    wrong = prediction != inside
    if target.dtype != np.bool_:
        wrong &= target != IGNORE_ID
    structure = ndimage.generate_binary_structure(target.ndim, target.ndim if corners else 1)
    missed, count = ndimage.label(wrong & inside, structure)
    extra, _ = ndimage.label(wrong & ~inside, structure)
    errors = np.where(extra > 0, extra + count, missed)  # one number for each connected error
    sizes = np.bincount(errors.ravel())
    sizes[0] = 0
    sizes[sizes < min_size] = 0
    free = np.ones(target.shape, bool)
    if clicked is not None and len(clicked):
        free[tuple(np.asarray(clicked, int).T)] = False

    def click(point: tuple[int, ...]) -> Click:
        return Click(point, int(inside[point]), int(sizes[errors[point]]))

    if how == "random":
        open_ = np.flatnonzero((sizes[errors] > 0) & free)
        if not len(open_):
            return None
        chosen = np.random.default_rng(_words(seed)).choice(open_)
        return click(tuple(int(c) for c in np.unravel_index(chosen, target.shape)))
    places = ndimage.find_objects(errors)
    for number in np.argsort(-sizes, kind="stable").tolist():
        if not sizes[number]:
            return None
        place = places[number - 1]
        region = errors[place] == number
        if (point := _most_interior(region, spacing, region & free[place])) is not None:
            return click(tuple(int(c) + s.start for c, s in zip(point, place, strict=True)))
    return None


def simulate_clicks(
    segment: Callable[[Ints, Ints], Bool],
    target: Bool | Mask,
    *,
    clicks: int = 20,
    until: float = 1.0,
    how: Literal["centre", "random"] = "centre",
    seed: Seed = 0,
    spacing: Sequence[float] | None = None,
    min_size: int = 1,
) -> Clicked:
    """Correct a model click by click, as a person would, beginning with an empty prediction.

    Args:
        segment: points (N, d) and labels (N,) of all clicks so far -> prediction, bool (*S).
        target: as for :func:`next_click`.
        clicks: at most.
        until: Dice at which it ends.
        how, seed, spacing, min_size: as for :func:`next_click`.
    Returns:
        As many clicks as it took; none where the target is empty.
    """
    target = _as_target(target)
    prediction: Bool = np.zeros(target.shape, bool)
    points: list[tuple[int, ...]] = []
    labels: list[int] = []
    dice: list[float] = []
    while len(points) < clicks and (not dice or dice[-1] < until):
        click = next_click(
            prediction,
            target,
            how=how,
            seed=[*_words(seed), len(points)],
            clicked=np.array(points),
            spacing=spacing,
            min_size=min_size,
        )
        if click is None:
            break
        points.append(click.point)
        labels.append(click.label)
        prediction = segment(np.array(points, np.int64), np.array(labels, np.int64))
        dice.append(_dice(prediction, target))
    shape = (len(points), target.ndim)
    return Clicked(np.array(points, np.int64).reshape(shape), np.array(labels, np.int64), np.array(dice, np.float64))


def mask_logits(target: NDArray[Any], size: int) -> Floats:
    """A mask prompt: each pixel's share of the object, as logits in -10..10.

    Args:
        target: bool, or shares in 0..1, (*S).
        size: m, pixels a side.
    Returns:
        (m, m) or (m, m, m).
    """
    pool = F.adaptive_avg_pool2d if target.ndim == 2 else F.adaptive_avg_pool3d
    share = pool(torch.from_numpy(np.ascontiguousarray(target, np.float32))[None, None], size)[0, 0]
    logits: Floats = torch.logit(share.clamp(0, 1), eps=1e-6).clamp(-SURE, SURE).numpy()
    return logits


def for_sam(drawn: Sequence[MaskPrompts], image_size: int) -> ForSam:
    """What SAM takes: ``Prompts(**for_sam(drawn, 1024).prompts)``.

    Coordinates are carried from the masks' pixels to those of the square image that SAM encodes, x before y. Images
    with fewer objects than others get padding: points of label -1, the whole image as box, an undecided mask.

    Args:
        drawn: of B images of one size, by one policy.
        image_size: pixels a side of the image that SAM encodes, to which masks' images are resized.
    Raises:
        ValueError: nothing drawn, prompts of volumes, or of different sizes or kinds.
    """
    if not drawn:
        raise ValueError("no image was given: drawn holds one MaskPrompts an image")
    shapes = {one.objects.shape for one in drawn}
    if len(shapes) > 1 or len(next(iter(shapes))) != 2:
        raise ValueError(
            f"SAM takes prompts of images of one size (H, W), got {sorted(shapes)}; "
            "sample_slice_prompts draws them slice by slice for a volume"
        )
    (shape,) = shapes
    count = max(1, *(len(one) for one in drawn))
    scale = image_size / np.array(shape)

    def carried(places: NDArray[Any]) -> NDArray[Any]:  # (..., 2), y and x -> x and y
        return ((places + 0.5) * scale - 0.5)[..., ::-1]

    def padded(name: str, fill: float) -> NDArray[Any] | None:
        kinds = [getattr(one, name) for one in drawn]
        if all(kind is None for kind in kinds):
            return None
        if any(kind is None for kind in kinds) or len({kind.shape[1:] for kind in kinds}) > 1:
            raise ValueError(f"{name} were drawn for some images, or by different policies; use one policy for a batch")
        return np.stack([_pad(kind, count, fill) for kind in kinds])

    prompts: dict[str, NDArray[Any]] = {}
    valid = np.stack([np.arange(count) < len(one) for one in drawn])
    if (boxes := padded("boxes", 0)) is not None:
        boxes[~valid] = [0, 0, shape[0] - 1, shape[1] - 1]
        corners = carried(boxes.reshape(*boxes.shape[:2], 2, 2))
        prompts["boxes"] = corners.reshape(boxes.shape).astype(np.float32)
    if (points := padded("points", 0)) is not None:
        prompts["points"] = carried(points).astype(np.float32)
        labels = padded("labels", -1)
        assert labels is not None
        prompts["labels"] = labels
    if (masks := padded("masks", 0)) is not None:
        prompts["masks"] = masks
    targets = np.stack([one.objects[None] == np.arange(1, count + 1).reshape(-1, 1, 1) for one in drawn])
    tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in prompts.items()}
    return ForSam(tensors, torch.from_numpy(valid), torch.from_numpy(targets))


# ---------------------------------------------------------------- within


def _draw(
    mask: Mask,
    objects: NDArray[np.int32],
    classes: Ints,
    numbers: Ints,
    seed: Seed,
    policy: PromptPolicy,
    spacing: Sequence[float] | None,
) -> MaskPrompts:
    """Prompts of numbered objects; each object draws from a stream of its own."""
    dims, total, wanted = mask.ndim, len(classes), policy.positive + policy.negative
    boxes = np.zeros((total, 2 * dims), np.float32)
    points, labels = np.zeros((total, wanted, dims), np.float32), np.full((total, wanted), -1, np.int64)
    masks = np.zeros((total, *(policy.mask_size,) * dims), np.float32) if policy.masks else None
    for p, place in enumerate(ndimage.find_objects(objects, max_label=total)):
        draws = np.random.default_rng([*_words(seed), int(numbers[p])])
        # Boxes, points and masks in turn, each from its own stream: asking for one does not change another.
        of_box, of_inside, of_outside, of_mask = draws.spawn(4)
        boxes[p] = _box(place, mask.shape, policy.jitter, of_box)
        region = objects[place] == p + 1
        used = [0, policy.positive]  # columns of positive points come first; what is left of either is padding
        for point, inside in _points(mask, objects, region, place, policy, spacing, of_inside, of_outside):
            column = used[0 if inside else 1]
            points[p, column], labels[p, column] = point, int(inside)
            used[0 if inside else 1] += 1
        if masks is not None:
            noise = policy.mask_noise * of_mask.standard_normal(masks.shape[1:])
            masks[p] = mask_logits(objects == p + 1, policy.mask_size) + noise
    return MaskPrompts(
        objects,
        classes,
        numbers,
        boxes if policy.boxes else None,
        points if wanted else None,
        labels if wanted else None,
        masks,
    )


def _box(
    place: tuple[slice, ...], shape: Sequence[int], jitter: float, draws: np.random.Generator
) -> NDArray[np.float64]:
    """(2 d,): first and last pixel along each axis, each face moved."""
    low, high = np.array([s.start for s in place], float), np.array([s.stop - 1 for s in place], float)
    sides = high - low + 1
    moved = jitter * sides * draws.uniform(-1, 1, (2, len(sides)))
    corners = np.sort(np.stack([low, high]) + moved, axis=0)
    clipped: NDArray[np.float64] = np.clip(corners, 0, np.array(shape) - 1).ravel()
    return clipped


def _points(
    mask: Mask,
    objects: NDArray[np.int32],
    region: Bool,
    place: tuple[slice, ...],
    policy: PromptPolicy,
    spacing: Sequence[float] | None,
    of_inside: np.random.Generator,
    of_outside: np.random.Generator,
) -> Iterator[tuple[NDArray[Any], bool]]:
    """Points, and whether they are positive; fewer where pixels are too few."""
    start = np.array([s.start for s in place])
    wanted, free = policy.positive, region.copy()
    if policy.point == "centre" and wanted and (centre := _most_interior(region, spacing, region)) is not None:
        free[tuple(centre)] = False
        wanted -= 1
        yield centre + start, True
    for point in _choose(free, wanted, of_inside):
        yield point + start, True
    if not policy.negative:
        return
    number = objects[place][region][0]

    def outside(where: tuple[slice, ...]) -> Bool:
        allowed: Bool = (objects[where] != number) & (mask[where] != IGNORE_ID)
        return allowed

    around = tuple(slice(0, side) for side in mask.shape)
    if policy.near is not None:
        margin = [int(np.ceil(policy.near * (s.stop - s.start))) for s in place]
        enlarged = tuple(
            slice(max(0, s.start - m), min(side, s.stop + m))
            for s, m, side in zip(place, margin, mask.shape, strict=True)
        )
        if np.count_nonzero(outside(enlarged)) >= policy.negative:
            around = enlarged
    for point in _choose(outside(around), policy.negative, of_outside):
        yield point + np.array([s.start for s in around]), False


def _choose(allowed: Bool, count: int, draws: np.random.Generator) -> NDArray[Any]:
    """So many of the pixels that are True, or all if they are fewer, none twice: (n, d)."""
    candidates = np.flatnonzero(allowed)
    chosen = draws.choice(candidates, min(count, len(candidates)), replace=False) if len(candidates) else candidates
    return np.stack(np.unravel_index(chosen, allowed.shape), axis=-1)


def _most_interior(region: Bool, spacing: Sequence[float] | None, allowed: Bool) -> NDArray[Any] | None:
    """The allowed pixel that is farthest from the region's outside, (d,); of several, the one nearest to its middle.

    Whatever lies beyond the array is outside.
    """
    if not allowed.any():
        return None
    step = np.ones(region.ndim) if spacing is None else np.asarray(spacing, float)
    depth = ndimage.distance_transform_edt(np.pad(region, 1), sampling=step)
    depth = np.where(allowed, depth[(slice(1, -1),) * region.ndim], -1.0)
    best = np.argwhere(depth >= depth.max() - 1e-9)
    middle = np.argwhere(region).mean(axis=0)
    chosen: NDArray[Any] = best[np.argmin(np.round((((best - middle) * step) ** 2).sum(axis=1), 6))]
    return chosen


def _dice(prediction: Bool, target: NDArray[Any]) -> float:
    known = np.ones(target.shape, bool) if target.dtype == np.bool_ else target != IGNORE_ID
    found, true = prediction & known, target.astype(bool) & known
    both = int(found.sum()) + int(true.sum())
    return 2 * int((found & true).sum()) / both if both else 1.0


def _pad(rows: NDArray[Any], count: int, fill: float) -> NDArray[Any]:
    return np.concatenate([rows, np.full((count - len(rows), *rows.shape[1:]), fill, rows.dtype)])


def _words(seed: Seed) -> list[int]:
    return [int(seed)] if isinstance(seed, int | np.integer) else [int(word) for word in seed]


def _as_target(target: Bool | Mask) -> Bool | Mask:
    given: NDArray[Any] = np.asarray(target)
    if given.ndim not in (2, 3) or not (given.dtype == np.bool_ or np.issubdtype(given.dtype, np.integer)):
        raise ValueError(f"target must be bool or integers (H, W) or (D, H, W), got {given.dtype} {given.shape}")
    return given


def _checked(mask: NDArray[Any]) -> Mask:
    mask = np.asarray(mask)
    if mask.ndim not in (2, 3) or not np.issubdtype(mask.dtype, np.integer):
        raise ValueError(f"mask must be integer class ids (H, W) or (D, H, W), got {mask.dtype} {mask.shape}")
    return mask
