"""Weak and strong views of a batch, on the device the batch lies on."""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from knowsam.data import augment_intensity as intensity
from knowsam.data.augment_geometry import Geometry, move
from knowsam.data.batch import Batch, Labelled
from knowsam.data.levels import WHITE, to_unit
from knowsam.data.streams import RawBatch
from knowsam.errors import ConfigError


class Augmenter:
    """Random flips, affine and elastic distortion, light and holes for one step's images or volumes.

    Labelled images get a weak view, unlabelled ones a weak and a strong view with the *same* geometry, so that their
    pixels can be compared one to one. Flip, affine and elastic part are composed into one sampling grid: image and
    mask are interpolated once (bilinear, nearest) and both reflect at the border, so what enters from outside is a
    mirrored image with its mirrored mask. Light (brightness, contrast, gamma) and holes follow; holes paint the image
    only, the mask keeps what lies under them.

    Every probability is per image, 0..1; 0 turns the entry off. Lengths are fractions of the axis that they lie along,
    so a setting means the same at every resolution and in a patch of unlike sides; angles are between pixels as they
    lie. Pairs are (smallest, largest), both possible. A setting that is changed does not shift the draws of the others.

    Args:
        horizontal_flip: probability of mirroring left and right.
        vertical_flip: probability of mirroring top and bottom.
        depth_flip: probability of mirroring the first and the last slice of a volume.
        affine: probability of shift, scale and rotation together.
        rotate: largest angle either way within a slice, degrees.
        tilt: largest angles either way of a volume's slices, about their horizontal and about their vertical axis,
            degrees. None: as ``rotate``, or 0 for stacks of few, thick slices: where the longest side has more than 3
            times the voxels of the depth.
        scale: largest relative change of size either way, < 1; 0.05 gives a zoom of 0.95 to 1.05.
        shift: largest move either way along each axis, fraction of it.
        elastic: probability of an elastic distortion of an unlabelled image, both its views.
        labelled_elastic: the same for a labelled image and its mask.
        elastic_shift: largest move of a control point along each axis, fraction of it.
        elastic_cells: cells between control points along each axis, >= 1. ``elastic_shift * elastic_cells`` is at most
            0.2: beyond it the distortion folds over itself.
        weak_light: probability of a change of light in a weak view.
        weak_brightness: largest amount added or taken away, on the image's 0..1 scale.
        weak_contrast: largest relative change of contrast around the image's mean, <= 1; 0.2 gives 0.8 to 1.2.
        weak_gamma: largest change of the exponent, < 1; 0.2 gives 0.8 to 1.2.
        labelled_holes: probability that holes are cut into a labelled image.
        labelled_hole_count: holes in an image when there are any, pair of counts.
        strong_light: probability of a change of light in a strong view.
        strong_brightness: as ``weak_brightness``.
        strong_contrast: as ``weak_contrast``.
        strong_gamma: as ``weak_gamma``.
        strong_holes: probability that holes are cut into a strong view; the weak view of the pair never has any.
        strong_hole_count: as ``labelled_hole_count``.
        hole_size: side of a hole, pair of fractions of the axis in (0, 1]; height and width are drawn apart.
        cuboid_size: the same for a volume, whose holes are cuboids and cover less of it.
        hole_value: what a hole shows, 0..1.
        blur: probability of a Gaussian blur in a strong view.
        blur_sigma: its standard deviation, pair of fractions of each axis, > 0.
        noise: probability of Gaussian noise in a strong view.
        noise_std: its standard deviation, on the image's 0..1 scale.
        colour: probability of a change of colour in a strong view, for images of 3 channels alone. What was grey stays
            grey.
        saturation: its largest relative change of saturation, <= 1.
        hue: its largest turn of the colour circle, fraction of the circle, <= 0.5.
        greyscale: probability that a strong view loses its colour, likewise.
        strong_views: how many strong views of every unlabelled image, drawn apart; what the method needs.
        plain_labelled: also give the labelled images without holes and without a change of light.
    Raises:
        ConfigError: a value outside the range stated above.
    Source:
        Probabilities and amounts: the recipe published with arXiv:2412.13742. Ours: the two views share geometry, holes
        spare the mask and the unlabelled weak view, one smooth distortion stands for the grid and elastic ones,
        contrast turns around the image's mean instead of 0. No tilt of thick slices: nnU-Net (arXiv:1904.08128).
    """

    def __init__(
        self,
        *,
        horizontal_flip: float = 0.5,
        vertical_flip: float = 0.5,
        depth_flip: float = 0.5,
        affine: float = 0.5,
        rotate: float = 10.0,
        tilt: tuple[float, float] | None = None,
        scale: float = 0.05,
        shift: float = 0.0625,
        elastic: float = 0.5,
        labelled_elastic: float = 0.0,
        elastic_shift: float = 0.03,
        elastic_cells: int = 5,
        weak_light: float = 0.2,
        weak_brightness: float = 0.2,
        weak_contrast: float = 0.2,
        weak_gamma: float = 0.0,
        labelled_holes: float = 0.5,
        labelled_hole_count: tuple[int, int] = (5, 8),
        strong_light: float = 0.6,
        strong_brightness: float = 0.2,
        strong_contrast: float = 0.2,
        strong_gamma: float = 0.0,
        strong_holes: float = 0.7,
        strong_hole_count: tuple[int, int] = (10, 20),
        hole_size: tuple[float, float] = (0.05, 0.05),
        cuboid_size: tuple[float, float] = (0.1, 0.2),
        hole_value: float = 0.0,
        blur: float = 0.0,
        blur_sigma: tuple[float, float] = (0.002, 0.008),
        noise: float = 0.0,
        noise_std: float = 0.05,
        colour: float = 0.0,
        saturation: float = 0.5,
        hue: float = 0.1,
        greyscale: float = 0.0,
        strong_views: int = 1,
        plain_labelled: bool = False,
    ):
        self.geometry = Geometry(
            flips=(
                _number("horizontal_flip", horizontal_flip, 0, 1),
                _number("vertical_flip", vertical_flip, 0, 1),
                _number("depth_flip", depth_flip, 0, 1),
            ),
            affine=_number("affine", affine, 0, 1),
            rotate=_number("rotate", rotate, 0, 180),
            tilt=None if tilt is None else _angles("tilt", tilt),
            scale=_number("scale", scale, 0, 0.99),
            shift=_number("shift", shift, 0, 1),
            elastic=(_number("labelled_elastic", labelled_elastic, 0, 1), _number("elastic", elastic, 0, 1)),
            elastic_shift=_number("elastic_shift", elastic_shift, 0, 1),
            elastic_cells=int(_number("elastic_cells", elastic_cells, 1, 64)),
        )
        if elastic_shift * elastic_cells > 0.2 + 1e-9:
            raise ConfigError(
                f"augment: elastic_shift {elastic_shift} times elastic_cells {elastic_cells} is over 0.2: would fold",
                hint=f"Set augment.elastic_shift to {0.2 / elastic_cells:.3g} or less, or use fewer cells.",
            )
        self.weak_light = _number("weak_light", weak_light, 0, 1)
        self.weak_amounts = (
            _number("weak_brightness", weak_brightness, 0, 1),
            _number("weak_contrast", weak_contrast, 0, 1),
            _number("weak_gamma", weak_gamma, 0, 0.99),
        )
        self.labelled_holes = _number("labelled_holes", labelled_holes, 0, 1)
        self.labelled_hole_count = _counts("labelled_hole_count", labelled_hole_count)
        self.strong_light = _number("strong_light", strong_light, 0, 1)
        self.strong_amounts = (
            _number("strong_brightness", strong_brightness, 0, 1),
            _number("strong_contrast", strong_contrast, 0, 1),
            _number("strong_gamma", strong_gamma, 0, 0.99),
        )
        self.strong_holes = _number("strong_holes", strong_holes, 0, 1)
        self.strong_hole_count = _counts("strong_hole_count", strong_hole_count)
        self.hole_sizes = {  # by the number of axes
            2: _pair("hole_size", hole_size, 1e-6, 1),
            3: _pair("cuboid_size", cuboid_size, 1e-6, 1),
        }
        self.hole_value = _number("hole_value", hole_value, 0, 1)
        self.blur = _number("blur", blur, 0, 1)
        self.blur_sigma = _pair("blur_sigma", blur_sigma, 1e-6, 0.25)
        self.noise = _number("noise", noise, 0, 1)
        self.noise_std = _number("noise_std", noise_std, 0, 1)
        self.colour = _number("colour", colour, 0, 1)
        self.saturation = _number("saturation", saturation, 0, 1)
        self.hue = _number("hue", hue, 0, 0.5)
        self.greyscale = _number("greyscale", greyscale, 0, 1)
        self.strong_views = strong_views
        self.plain_labelled = plain_labelled
        intensity.load_libraries()

    @classmethod
    def off(cls, *, strong_views: int = 1, plain_labelled: bool = False) -> "Augmenter":
        """An augmenter that changes nothing: levels become 0..1, strong is equal to weak."""
        return cls(
            horizontal_flip=0.0,
            vertical_flip=0.0,
            depth_flip=0.0,
            affine=0.0,
            elastic=0.0,
            weak_light=0.0,
            labelled_holes=0.0,
            strong_light=0.0,
            strong_holes=0.0,
            strong_views=strong_views,
            plain_labelled=plain_labelled,
        )

    @torch.no_grad()
    def __call__(self, raw: RawBatch, *, seed: int) -> Batch:
        """Draw the views of one step.

        Every draw is a function of ``seed`` and the settings alone. No global random state, of the CPU or of a GPU, is
        read or moved, and the draws are made on the CPU, so they are the same on every device. More strong views leave
        the first one as it is, and a second labelled batch all others.

        Args:
            raw: levels (L, C, *S) and (U, C, *S) of any C, L >= 1, U >= 0: uint8, of which 255 is 1.0, or int32, of
                which 65535 is 1.0. *S is (H, W) or (D, H, W), sides alike or not. Of the uint8 mask (L, *S), 255 is
                where nothing is known.
            seed: >= 0, of any size; what the caller made of (seed, rank, step).
        Returns:
            Batch on the inputs' device: images float32 in 0..1, masks int64 holding no id that the input lacks, with
            ``losses.IGNORE`` for 255.
        Raises:
            ConfigError: a change of colour is asked for, and images have other than 3 channels.
        """
        # Not torch's CPU generator: it seeds from the lower 32 bits only, so (seed, rank, step) packed into one wide
        # integer would collide in silence. One child per part keeps a changed setting from shifting the other draws.
        root = np.random.SeedSequence(seed)
        geometry, elastic, weak, labelled_holes, *first_view = map(np.random.default_rng, root.spawn(8))
        count = len(raw.labelled)
        images, mask, means = self._move(geometry, elastic, raw.labelled, raw.mask, raw.unlabelled)
        plain, base = images[:count], images[count:]
        images = intensity.relight(weak, images, means, self.weak_light, self.weak_amounts)
        labelled = self._cut_holes(labelled_holes, images[:count], self.labelled_holes, self.labelled_hole_count)
        views = [first_view, *(list(map(np.random.default_rng, root.spawn(4))) for _ in range(1, self.strong_views))]
        # A root of their own, as for the second batch: whether the other parts have more children must not shift them.
        colours = map(np.random.default_rng, np.random.SeedSequence((seed, 2)).spawn(self.strong_views))
        strong = tuple(
            self._strong(draws, colour, base, means[count:])
            for draws, colour in zip(views[: self.strong_views], colours, strict=True)
        )
        batch = Batch(
            labelled,
            mask,
            images[count:],
            strong,
            raw.ids,
            plain if self.plain_labelled else None,
            valid_classes=raw.valid_classes,
        )
        if len(raw.second):
            draws = map(np.random.default_rng, np.random.SeedSequence((seed, 1)).spawn(4))
            batch.second = self._second(draws, raw.second, raw.second_mask)
        return batch

    def _second(self, draws: Iterator[np.random.Generator], images: Tensor, mask: Tensor) -> Labelled:
        """Another labelled batch in the weak view."""
        geometry, elastic, weak, holes = draws
        moved, mask, means = self._move(geometry, elastic, images, mask, images[:0])
        moved = intensity.relight(weak, moved, means, self.weak_light, self.weak_amounts)
        return Labelled(self._cut_holes(holes, moved, self.labelled_holes, self.labelled_hole_count), mask)

    def _strong(
        self, draws: list[np.random.Generator], colours: np.random.Generator, base: Tensor, means: Tensor
    ) -> Tensor:
        """A strong view of unlabelled images that were moved already."""
        light, holes, blur, noise = draws
        images = intensity.relight(light, base, means, self.strong_light, self.strong_amounts)
        if self.colour or self.greyscale:
            if images.shape[1] != 3:
                setting = "colour" if self.colour else "greyscale"
                raise ConfigError(
                    f"augment: {setting} is {getattr(self, setting)}, but images have {images.shape[1]} channel(s); it "
                    "is for 3, red, green and blue",
                    hint=f"Set augment.{setting}: 0.",
                )
            images = intensity.recolour(colours, images, self.colour, self.saturation, self.hue, self.greyscale)
        images = intensity.blur(blur, images, self.blur, self.blur_sigma)
        images = intensity.add_noise(noise, images, self.noise, self.noise_std)
        return self._cut_holes(holes, images, self.strong_holes, self.strong_hole_count)

    def _cut_holes(
        self, rng: np.random.Generator, images: Tensor, probability: float, count: tuple[int, int]
    ) -> Tensor:
        size = self.hole_sizes[images.ndim - 2]
        return intensity.cut_holes(rng, images, probability, count, size, self.hole_value)

    def _move(
        self,
        geometry: np.random.Generator,
        elastic: np.random.Generator,
        labelled: Tensor,
        mask: Tensor,
        unlabelled: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """All images in 0..1, moved, labelled ones first; the mask, moved alike; means of the images before (N,)."""
        count, shape = len(labelled), labelled.shape[2:]
        assert shape == mask.shape[1:] == unlabelled.shape[2:] and len(shape) in (2, 3)
        assert labelled.dtype == unlabelled.dtype and labelled.dtype in WHITE and mask.dtype == torch.uint8
        levels = torch.cat([labelled, unlabelled])  # (N, C, *S), N = L + U
        # Integer sums: the same to the last bit whatever the number of threads.
        white = WHITE[levels.dtype] * math.prod(levels.shape[1:])
        means = levels.flatten(1).sum(dim=1, dtype=torch.int64).double().div(white).float()  # (N,)
        images = to_unit(levels)
        counts = count, len(levels) - count
        grid = self.geometry.grid(geometry, elastic, counts, shape, levels.device)
        if grid is not None:
            images, mask = move(images, mask, grid)
        mask = mask.long()
        return images.clamp_(0, 1), mask, means


def _number(name: str, value: float, low: float, high: float) -> float:
    if not low <= value <= high:
        raise ConfigError(f"augment: {name} is {value}, allowed is {low:g} to {high:g}")
    return value


def _pair(name: str, value: Sequence[float], low: float, high: float) -> tuple[float, float]:
    pair = tuple(value)
    if len(pair) != 2 or not low <= pair[0] <= pair[1] <= high:
        raise ConfigError(
            f"augment: {name} is {value}, allowed are (smallest, largest), {low:g} <= smallest <= largest <= {high:g}"
        )
    return pair


def _angles(name: str, value: Sequence[float]) -> tuple[float, float]:
    angles = tuple(value)
    if len(angles) != 2 or not all(0 <= angle <= 180 for angle in angles):
        raise ConfigError(f"augment: {name} is {value}, allowed are two angles of 0 to 180 degrees, or null")
    return angles


def _counts(name: str, value: Sequence[int]) -> tuple[int, int]:
    smallest, largest = _pair(name, value, 1, 1000)
    return int(smallest), int(largest)
