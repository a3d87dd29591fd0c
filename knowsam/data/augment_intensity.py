"""The other half of augmentation: what changes the values of an image and leaves its pixels where they are.

Images are float32 (N, C, *S) in 0..1, *S = (H, W) or (D, H, W). Every function takes a generator of its own, draws the
same numbers whatever the settings are, and leaves its input alone.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from knowsam.data.augment_geometry import to_device


def load_libraries() -> None:
    """Half a second to import; paid by whoever calls this rather than in the first step."""
    import kornia.color
    import kornia.enhance
    import kornia.filters  # noqa: F401


def relight(
    rng: np.random.Generator, images: Tensor, means: Tensor, probability: float, amounts: Sequence[float]
) -> Tensor:
    """Brightness, contrast and gamma, the same for all channels.

    Args:
        rng: of these draws.
        images: (N, C, *S).
        means: (N,), around which contrast turns.
        probability: per image.
        amounts: largest change of brightness (added), contrast (relative) and of the exponent.
    """
    from kornia import enhance

    draws = rng.random((len(images), 4))
    chosen = draws[:, 0] < probability
    brightness, contrast, gamma = ((2 * draws[:, 1:] - 1) * chosen[:, None] * np.array(amounts)).T
    offset, gain, exponent = to_device(np.stack([brightness, 1 + contrast, 1 + gamma]), images.device)
    offset = offset + means * (1 - gain)  # exactly 0 where the light stays
    images = enhance.adjust_contrast(images, gain, clip_output=False)
    images = enhance.adjust_brightness(images, offset)
    return enhance.adjust_gamma(images, exponent) if gamma.any() else images


def recolour(
    rng: np.random.Generator,
    images: Tensor,
    probability: float,
    saturation: float,
    hue: float,
    greyscale: float,
) -> Tensor:
    """Saturation and hue together, then grey, of images of 3 channels.

    Args:
        rng: of these draws.
        images: (N, 3, *S).
        probability: of a change of colour, per image.
        saturation: largest relative change.
        hue: largest turn of the colour circle, as a fraction of it.
        greyscale: probability of an image without colour: three channels alike.
    """
    from kornia import color, enhance

    draws = rng.random((len(images), 4))
    turned, grey = draws[:, 0] < probability, draws[:, 1] < greyscale
    factors = to_device(1 + (2 * draws[:, 2] - 1) * saturation, images.device)
    angles = to_device((2 * draws[:, 3] - 1) * hue * 2 * math.pi, images.device)
    flat = images.flatten(2, -2)  # kornia's colours want (N, 3, H, W)
    if turned.any():
        rows = torch.from_numpy(np.flatnonzero(turned)).to(images.device)
        changed = enhance.adjust_saturation(flat[rows], factors[rows])
        flat = flat.index_copy(0, rows, enhance.adjust_hue(changed, angles[rows]).clamp(0, 1))
    if grey.any():
        rows = torch.from_numpy(np.flatnonzero(grey)).to(images.device)
        flat = flat.index_copy(0, rows, color.rgb_to_grayscale(flat[rows]).expand(-1, 3, -1, -1))
    return flat.view_as(images)


def cut_holes(
    rng: np.random.Generator,
    images: Tensor,
    probability: float,
    count: tuple[int, int],
    size: tuple[float, float],
    value: float,
) -> Tensor:
    """Rectangles, or cuboids, of one value.

    Args:
        rng: of these draws.
        images: (N, C, *S).
        probability: per image.
        count: fewest and most holes in an image.
        size: smallest and largest side, as a fraction of the axis.
        value: what a hole shows.
    """
    number, shape = len(images), np.array(images.shape[2:])
    dims = len(shape)
    cut = rng.random(number) < probability
    holes = rng.integers(count[0], count[1], (number, 1), endpoint=True)
    draws = rng.random((2 * dims, number, count[1]))
    if not cut.any():
        return images
    sides = shape[:, None, None]
    lengths = np.maximum(np.rint((size[0] + (size[1] - size[0]) * draws[:dims]) * sides), 1)
    starts = np.floor(draws[dims:] * (sides - lengths + 1))
    lengths *= (np.arange(count[1]) < holes) & cut[:, None]  # what is not wanted has no length
    ends = to_device(np.stack([starts, starts + lengths], axis=1), images.device)  # (dims, 2, N, holes), one transfer
    inside = []  # a tensor (N, holes, side) for each axis
    for side, (start, end) in zip(images.shape[2:], ends.unbind(0), strict=True):
        place = torch.arange(side, device=images.device)
        inside.append(((place >= start[..., None]) & (place < end[..., None])).float())
    rows = inside[0]
    for more in inside[1:-1]:
        rows = (rows[..., None] * more[..., None, :]).flatten(2)  # (N, holes, D H)
    covered = torch.bmm(rows.transpose(1, 2), inside[-1]) > 0  # whole numbers: exact in any order
    return images.masked_fill(covered.view(number, 1, *images.shape[2:]), value)


def blur(rng: np.random.Generator, images: Tensor, probability: float, sigma: tuple[float, float]) -> Tensor:
    """Gaussian blur.

    Args:
        rng: of these draws.
        images: (N, C, *S).
        probability: per image.
        sigma: smallest and largest standard deviation, as a fraction of each axis.
    """
    number, shape = len(images), images.shape[2:]
    chosen = np.flatnonzero(rng.random(number) < probability)
    sigmas = rng.uniform(*sigma, number)[chosen, None] * np.array(shape)  # pixels, (n, dims)
    if not len(chosen):
        return images
    index = torch.from_numpy(chosen).to(images.device)
    reach = [min(math.ceil(3 * sigma[1] * side), side - 1) for side in shape]
    blurred = _blur_planes(images[index].flatten(1, -3), reach[-2:], to_device(sigmas[:, -2:], images.device))
    blurred = blurred.view(len(chosen), *images.shape[1:])
    if len(shape) == 3:  # a Gaussian is separable: the depth by itself
        along = to_device(sigmas[:, :1].repeat(2, axis=1), images.device)
        blurred = _blur_planes(blurred.flatten(3), [reach[0], 0], along).view_as(blurred)
    return images.index_copy(0, index, blurred.clamp(0, 1))


def _blur_planes(images: Tensor, reach: Sequence[int], sigmas: Tensor) -> Tensor:
    """(N, c, H, W) by Gaussians of so many pixels either way, with standard deviations (N, 2)."""
    from kornia.filters import gaussian_blur2d

    return gaussian_blur2d(images, (2 * reach[0] + 1, 2 * reach[1] + 1), sigmas, border_type="reflect")


def add_noise(rng: np.random.Generator, images: Tensor, probability: float, std: float) -> Tensor:
    """Gaussian noise of a standard deviation on the 0..1 scale, apart in every channel."""
    chosen = np.flatnonzero(rng.random(len(images)) < probability)
    if not len(chosen):
        return images
    noise = rng.standard_normal((len(chosen), *images.shape[1:]), dtype=np.float32)
    index = torch.from_numpy(chosen).to(images.device)
    return images.index_add(0, index, to_device(noise, images.device), alpha=std).clamp_(0, 1)
