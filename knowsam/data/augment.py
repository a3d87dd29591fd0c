"""Weak and strong views of a batch, on the device the batch lies on."""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from knowsam.data.batch import Batch, Labelled
from knowsam.data.streams import RawBatch
from knowsam.errors import ConfigError


class Augmenter:
    """Random flips, affine and elastic distortion, light and holes for one step's images.

    Labelled images get a weak view, unlabelled ones a weak and a strong view with the *same* geometry, so that their
    pixels can be compared one to one. Flip, affine and elastic part are composed into one sampling grid: image and
    mask are interpolated once (bilinear, nearest) and both reflect at the border, so what enters from outside is a
    mirrored image with its mirrored mask. Light (brightness, contrast, gamma) and holes follow; holes paint the image
    only, the mask keeps what lies under them.

    Every probability is per image, 0..1; 0 turns the entry off. Lengths are fractions of the side S, so a setting
    means the same at every resolution; pairs are (smallest, largest), both possible. Grey images arrive as three equal
    channels, hence no hue or saturation. A setting that is changed does not shift the draws of the others.

    Args:
        horizontal_flip: probability of mirroring left and right.
        vertical_flip: probability of mirroring top and bottom.
        affine: probability of shift, scale and rotation together.
        rotate: largest angle either way, degrees.
        scale: largest relative change of size either way, < 1; 0.05 gives a zoom of 0.95 to 1.05.
        shift: largest move either way along each axis, fraction of S.
        elastic: probability of an elastic distortion of an unlabelled image, both its views.
        labelled_elastic: the same for a labelled image and its mask.
        elastic_shift: largest move of a control point along each axis, fraction of S.
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
        hole_size: side of a hole, pair of fractions of S in (0, 1]; height and width are drawn apart.
        hole_value: what a hole shows, 0..1.
        blur: probability of a Gaussian blur in a strong view.
        blur_sigma: its standard deviation, pair of fractions of S, > 0.
        noise: probability of Gaussian noise in a strong view.
        noise_std: its standard deviation, on the image's 0..1 scale.
        strong_views: how many strong views of every unlabelled image, drawn apart; what the method needs.
        plain_labelled: also give the labelled images without holes and without a change of light.
    Raises:
        ConfigError: a value outside the range stated above.
    Source:
        Probabilities and amounts: the recipe published with arXiv:2412.13742. Ours: the two views share geometry, holes
        spare the mask and the unlabelled weak view, one smooth distortion stands for the grid and elastic ones,
        contrast turns around the image's mean instead of 0.
    """

    def __init__(
        self,
        *,
        horizontal_flip: float = 0.5,
        vertical_flip: float = 0.5,
        affine: float = 0.5,
        rotate: float = 10.0,
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
        hole_value: float = 0.0,
        blur: float = 0.0,
        blur_sigma: tuple[float, float] = (0.002, 0.008),
        noise: float = 0.0,
        noise_std: float = 0.05,
        strong_views: int = 1,
        plain_labelled: bool = False,
    ):
        self.horizontal_flip = _number("horizontal_flip", horizontal_flip, 0, 1)
        self.vertical_flip = _number("vertical_flip", vertical_flip, 0, 1)
        self.affine = _number("affine", affine, 0, 1)
        self.rotate = _number("rotate", rotate, 0, 180)
        self.scale = _number("scale", scale, 0, 0.99)
        self.shift = _number("shift", shift, 0, 1)
        self.elastic = _number("elastic", elastic, 0, 1)
        self.labelled_elastic = _number("labelled_elastic", labelled_elastic, 0, 1)
        self.elastic_cells = int(_number("elastic_cells", elastic_cells, 1, 64))
        self.elastic_shift = _number("elastic_shift", elastic_shift, 0, 1)
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
        self.hole_size = _pair("hole_size", hole_size, 1e-6, 1)
        self.hole_value = _number("hole_value", hole_value, 0, 1)
        self.blur = _number("blur", blur, 0, 1)
        self.blur_sigma = _pair("blur_sigma", blur_sigma, 1e-6, 0.25)
        self.noise = _number("noise", noise, 0, 1)
        self.noise_std = _number("noise_std", noise_std, 0, 1)
        self.strong_views = strong_views
        self.plain_labelled = plain_labelled
        # Half a second to import; paid here rather than in the first step.
        import kornia.enhance
        import kornia.filters

        self._enhance, self._gaussian_blur = kornia.enhance, kornia.filters.gaussian_blur2d

    @classmethod
    def off(cls, *, strong_views: int = 1, plain_labelled: bool = False) -> "Augmenter":
        """An augmenter that changes nothing: images divided by 255, strong equal to weak."""
        return cls(
            horizontal_flip=0.0,
            vertical_flip=0.0,
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
            raw: uint8 images of one side S, L >= 1, U >= 0.
            seed: >= 0, of any size; what the caller made of (seed, rank, step).
        Returns:
            Batch on the inputs' device: images float32 in 0..1, masks int64 holding no id that the input lacks.
        """
        # Not torch's CPU generator: it seeds from the lower 32 bits only, so (seed, rank, step) packed into one wide
        # integer would collide in silence. One child per part keeps a changed setting from shifting the other draws.
        root = np.random.SeedSequence(seed)
        geometry, elastic, weak, labelled_holes, *first_view = map(np.random.default_rng, root.spawn(8))
        count = len(raw.labelled)
        images, mask, means = self._move(geometry, elastic, raw.labelled, raw.mask, raw.unlabelled)
        plain, base = images[:count], images[count:]
        images = self._relight(weak, images, means, self.weak_light, self.weak_amounts)
        labelled = self._cut_holes(labelled_holes, images[:count], self.labelled_holes, self.labelled_hole_count)
        views = [first_view, *(list(map(np.random.default_rng, root.spawn(4))) for _ in range(1, self.strong_views))]
        strong = tuple(self._strong(draws, base, means[count:]) for draws in views[: self.strong_views])
        batch = Batch(labelled, mask, images[count:], strong, raw.ids, plain if self.plain_labelled else None)
        if len(raw.second):
            # Its own root: whether the other parts have more children must not shift it.
            draws = map(np.random.default_rng, np.random.SeedSequence((seed, 1)).spawn(4))
            batch.second = self._second(draws, raw.second, raw.second_mask)
        return batch

    def _second(self, draws: Iterator[np.random.Generator], images: Tensor, mask: Tensor) -> Labelled:
        """Another labelled batch in the weak view."""
        geometry, elastic, weak, holes = draws
        moved, mask, means = self._move(geometry, elastic, images, mask, images[:0])
        moved = self._relight(weak, moved, means, self.weak_light, self.weak_amounts)
        return Labelled(self._cut_holes(holes, moved, self.labelled_holes, self.labelled_hole_count), mask)

    def _strong(self, draws: list[np.random.Generator], base: Tensor, means: Tensor) -> Tensor:
        """A strong view of unlabelled images that were moved already."""
        light, holes, blur, noise = draws
        images = self._relight(light, base, means, self.strong_light, self.strong_amounts)
        images = self._add_noise(noise, self._blur(blur, images))
        return self._cut_holes(holes, images, self.strong_holes, self.strong_hole_count)

    def _move(
        self,
        geometry: np.random.Generator,
        elastic: np.random.Generator,
        labelled: Tensor,
        mask: Tensor,
        unlabelled: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """All images in 0..1, moved, labelled ones first; the mask, moved alike; means of the images before (N,)."""
        count, side = len(labelled), labelled.shape[-1]
        assert labelled.shape[-2:] == mask.shape[-2:] == unlabelled.shape[-2:] == (side, side)
        assert labelled.dtype == mask.dtype == unlabelled.dtype == torch.uint8
        pixels = torch.cat([labelled, unlabelled])  # (N, C, S, S), N = L + U
        # Integer sums: the same to the last bit whatever the number of threads.
        size = 255 * pixels.shape[1] * side * side
        means = pixels.sum(dim=(1, 2, 3), dtype=torch.int64).double().div(size).float()  # (N,)
        images = pixels.float() / 255
        grid = self._grid(geometry, elastic, count, len(pixels) - count, side, pixels.device)
        if grid is not None:
            images = F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
            ids = mask[:, None].float()
            moved = F.grid_sample(ids, grid[:count], mode="nearest", padding_mode="reflection", align_corners=False)
            mask = moved[:, 0]
        return images.clamp_(0, 1), mask.long(), means

    def _grid(
        self,
        rng: np.random.Generator,
        elastic_rng: np.random.Generator,
        num_labelled: int,
        num_unlabelled: int,
        side: int,
        device: torch.device,
    ) -> Tensor | None:
        """Where each output pixel is read from, (N, S, S, 2) as ``grid_sample`` wants it; None when nothing moves."""
        count = num_labelled + num_unlabelled
        draws = rng.random((count, 7))
        flip_x = np.where(draws[:, 0] < self.horizontal_flip, -1.0, 1.0)
        flip_y = np.where(draws[:, 1] < self.vertical_flip, -1.0, 1.0)
        affine = draws[:, 2] < self.affine
        angle, zoom, move_x, move_y = (2 * draws[:, 3:].T - 1) * affine
        angle, zoom = np.deg2rad(angle * self.rotate), 1 + zoom * self.scale
        # A square image of width 2 around 0: rotations need no correction for the aspect, lengths count twice.
        cos, sin = np.cos(angle) / zoom, np.sin(angle) / zoom
        theta = np.stack(
            [flip_x * cos, -flip_x * sin, 2 * move_x * self.shift, flip_y * sin, flip_y * cos, 2 * move_y * self.shift],
            axis=1,
        )
        probability = np.repeat([self.labelled_elastic, self.elastic], [num_labelled, num_unlabelled])
        bent = elastic_rng.random(count) < probability
        nodes = elastic_rng.uniform(-1, 1, (count, 2, self.elastic_cells + 1, self.elastic_cells + 1))
        nodes *= 2 * self.elastic_shift * bent[:, None, None, None]
        if not (bent.any() or affine.any() or (flip_x < 0).any() or (flip_y < 0).any()):
            return None  # sampling at the pixel centres would still round

        centres = (torch.arange(side, device=device) * 2 + 1) / side - 1
        x, y = centres.view(1, 1, side), centres.view(1, side, 1)
        if bent.any():
            # Smooth noise from a few control points: the usual Gaussian filter over a full-size field costs far more.
            size = (side, side)
            bend = F.interpolate(_to(nodes, device), size, mode="bicubic", align_corners=True)  # (N, 2, S, S)
            x, y = x + bend[:, 0], y + bend[:, 1]
        a, b, c, d, e, f = _to(theta, device)[:, :, None, None].unbind(1)  # each (N, 1, 1)
        return torch.stack([a * x + b * y + c, d * x + e * y + f], dim=-1)

    def _relight(
        self,
        rng: np.random.Generator,
        images: Tensor,
        means: Tensor,
        probability: float,
        amounts: tuple[float, ...],
    ) -> Tensor:
        """Brightness, contrast around ``means`` (N,), gamma; a new tensor."""
        draws = rng.random((len(images), 4))
        chosen = draws[:, 0] < probability
        brightness, contrast, gamma = ((2 * draws[:, 1:] - 1) * chosen[:, None] * np.array(amounts)).T
        offset, gain, exponent = _to(np.stack([brightness, 1 + contrast, 1 + gamma]), images.device)
        offset = offset + means * (1 - gain)  # exactly 0 where the light stays
        images = self._enhance.adjust_contrast(images, gain, clip_output=False)
        images = self._enhance.adjust_brightness(images, offset)
        return self._enhance.adjust_gamma(images, exponent) if gamma.any() else images

    def _cut_holes(
        self, rng: np.random.Generator, images: Tensor, probability: float, count: tuple[int, int]
    ) -> Tensor:
        number, side = len(images), images.shape[-1]
        cut = rng.random(number) < probability
        holes = rng.integers(count[0], count[1], (number, 1), endpoint=True)
        draws = rng.random((4, number, count[1]))
        if not cut.any():
            return images
        smallest, largest = self.hole_size
        lengths = np.maximum(np.rint((smallest + (largest - smallest) * draws[:2]) * side), 1)
        starts = np.floor(draws[2:] * (side - lengths + 1))
        lengths *= (np.arange(count[1]) < holes) & cut[:, None]  # what is not wanted has no length
        # One transfer: (2 axes, 2 ends, N, holes, 1), axis 0 down, 1 across.
        (top, bottom), (left, right) = _to(np.stack([starts, starts + lengths], axis=1), images.device)[..., None]
        place = torch.arange(side, device=images.device)
        rows, columns = (place >= top) & (place < bottom), (place >= left) & (place < right)  # (N, holes, S)
        covered = torch.bmm(rows.float().transpose(1, 2), columns.float()) > 0  # (N, S, S)
        return images.masked_fill(covered[:, None], self.hole_value)

    def _blur(self, rng: np.random.Generator, images: Tensor) -> Tensor:
        number, side = len(images), images.shape[-1]
        chosen = np.flatnonzero(rng.random(number) < self.blur)
        sigma = rng.uniform(*self.blur_sigma, number) * side
        if not len(chosen):
            return images
        reach = min(math.ceil(3 * self.blur_sigma[1] * side), side - 1)
        index = torch.from_numpy(chosen).to(images.device)
        sigmas = _to(sigma[chosen], images.device)[:, None].expand(-1, 2)
        blurred = self._gaussian_blur(images[index], 2 * reach + 1, sigmas, border_type="reflect")
        return images.index_copy(0, index, blurred.clamp(0, 1))

    def _add_noise(self, rng: np.random.Generator, images: Tensor) -> Tensor:
        chosen = np.flatnonzero(rng.random(len(images)) < self.noise)
        if not len(chosen):
            return images
        noise = rng.standard_normal((len(chosen), *images.shape[1:]), dtype=np.float32)
        index = torch.from_numpy(chosen).to(images.device)
        return images.index_add(0, index, _to(noise, images.device), alpha=self.noise_std).clamp_(0, 1)


def _to(array: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(array).to(device, torch.float32)


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


def _counts(name: str, value: Sequence[int]) -> tuple[int, int]:
    smallest, largest = _pair(name, value, 1, 1000)
    return int(smallest), int(largest)
