"""The geometric half of augmentation: one sampling grid for images and masks, in 2-D and 3-D.

Axes of an image are *S = (H, W) or (D, H, W); axes of a sampling grid are the other way round, x (W), y (H), z (D), as
``torch.nn.functional.grid_sample`` has it. Grid coordinates run from -1 to 1 over each axis.
"""

import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

THICK = 3
"""A volume whose longest side has more than so many times the voxels of its depth is a stack of thick slices."""


@dataclass(frozen=True)
class Geometry:
    """Amounts of flips, affine and elastic distortion; see ``Augmenter`` for units and ranges.

    Attributes:
        flips: probability of mirroring along x, y and z; images have no z.
        affine: probability of shift, scale and rotation together.
        rotate: largest angle in the plane of x and y, degrees.
        tilt: largest angles about y and about x, degrees, for volumes alone; None chooses by their shape.
        scale, shift: relative change of size; move along each axis, fraction of that axis.
        elastic: probability of a distortion of a labelled and of an unlabelled image.
        elastic_shift, elastic_cells: of a control point, fraction of each axis; cells along each axis.
    """

    flips: tuple[float, float, float]
    affine: float
    rotate: float
    tilt: tuple[float, float] | None
    scale: float
    shift: float
    elastic: tuple[float, float]
    elastic_shift: float
    elastic_cells: int

    def grid(
        self,
        rng: np.random.Generator,
        elastic_rng: np.random.Generator,
        counts: tuple[int, int],
        shape: Sequence[int],
        device: torch.device,
    ) -> Tensor | None:
        """Where each output pixel is read from; None when nothing moves.

        Args:
            rng, elastic_rng: of the affine part and of the elastic part.
            counts: labelled and unlabelled images.
            shape: (H, W), or (D, H, W).
            device: of the result.
        Returns:
            float32 (N, *S, 2 or 3), coordinates in the order x, y, z.
        """
        flips, affine, theta = self._affine(rng, sum(counts), shape)
        bent, nodes = self._elastic(elastic_rng, counts, len(shape))
        if not (bent.any() or affine.any() or (flips < 0).any()):
            return None  # sampling at the pixel centres would still round

        places = []
        for axis, side in enumerate(reversed(shape)):
            centres = (torch.arange(side, device=device) * 2 + 1) / side - 1
            places.append(centres.view(1, *(1,) * (len(shape) - 1 - axis), side, *(1,) * axis))
        if bent.any():
            bend = smooth_field(to_device(nodes, device), shape)  # (N, 2 or 3, *S)
            places = [place + bend[:, axis] for axis, place in enumerate(places)]
        matrix = to_device(theta, device)[(..., *(None,) * len(shape))]  # (N, 2 or 3, 3 or 4, 1, ...)
        read = []
        for *factors, move in (row.unbind(1) for row in matrix.unbind(1)):
            turned = (factor * place for factor, place in zip(factors, places, strict=True))
            read.append(functools.reduce(operator.add, turned) + move)
        return torch.stack(read, dim=-1)

    def _affine(
        self, rng: np.random.Generator, count: int, shape: Sequence[int]
    ) -> tuple[NDArray[np.float64], NDArray[np.bool_], NDArray[np.float64]]:
        """Signs (N, dims), which images turn, and matrices (N, dims, dims + 1)."""
        dims, angles = len(shape), 1 if len(shape) == 2 else 3
        draws = rng.random((count, 2 * dims + angles + 2))
        flips = np.where(draws[:, :dims] < self.flips[:dims], -1.0, 1.0)
        affine = draws[:, dims] < self.affine
        amounts = (2 * draws[:, dims + 1 :].T - 1) * affine
        zoom, moves = 1 + amounts[angles] * self.scale, amounts[angles + 1 :].T
        turn = _turn(np.deg2rad(amounts[0] * self.rotate), 0, 1, dims)
        if dims == 3:
            about_y, about_x = self._tilts(shape)
            turn = turn @ _turn(np.deg2rad(amounts[1] * about_y), 0, 2, dims)
            turn = turn @ _turn(np.deg2rad(amounts[2] * about_x), 1, 2, dims)
        # A turn is one of pixels, but grid coordinates run from -1 to 1 over every axis, long or short.
        sides = np.array(shape[::-1], dtype=np.float64)
        turn = flips[:, :, None] * (turn / zoom[:, None, None]) * (sides / sides[:, None])
        return flips, affine, np.concatenate([turn, (2 * moves * self.shift)[:, :, None]], axis=2)

    def _tilts(self, shape: Sequence[int]) -> tuple[float, float]:
        if self.tilt is not None:
            return self.tilt
        return (0.0, 0.0) if max(shape) > THICK * shape[0] else (self.rotate, self.rotate)

    def _elastic(
        self, rng: np.random.Generator, counts: tuple[int, int], dims: int
    ) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
        """Which images bend, and the moves of their control points (N, dims, cells + 1, ...), in grid coordinates."""
        bent = rng.random(sum(counts)) < np.repeat(self.elastic, counts)
        nodes = rng.uniform(-1, 1, (sum(counts), dims, *(self.elastic_cells + 1,) * dims))
        nodes *= 2 * self.elastic_shift * bent[(..., *(None,) * (dims + 1))]
        return bent, nodes


def move(images: Tensor, mask: Tensor, grid: Tensor) -> tuple[Tensor, Tensor]:
    """Read images and the masks of the first ones at a grid; what enters from outside is a mirror image.

    Args:
        images: float (N, C, *S).
        mask: (L, *S), any whole numbers below 2^24.
        grid: (N, *S, 2 or 3).
    Returns:
        Images, interpolated linearly; masks, by the nearest pixel, as float.
    """
    images = F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    ids = mask[:, None].float()
    moved = F.grid_sample(ids, grid[: len(mask)], mode="nearest", padding_mode="reflection", align_corners=False)
    return images, moved[:, 0]


def smooth_field(nodes: Tensor, shape: Sequence[int]) -> Tensor:
    """Control points (N, c, n, n) or (N, c, n, n, n) -> a field (N, c, *S) through them, by cubic convolution.

    Smooth noise from a few control points: the usual Gaussian filter over a full-size field costs far more.
    """
    if len(shape) == 2:
        return F.interpolate(nodes, tuple(shape), mode="bicubic", align_corners=True)
    # torch has no cubic interpolation of volumes: planes first, then along the depth with the same weights.
    planes = F.interpolate(nodes.flatten(1, 2), tuple(shape[1:]), mode="bicubic", align_corners=True)
    planes = planes.unflatten(1, nodes.shape[1:3])  # (N, c, n, H, W)
    count = planes.shape[2]
    unit = torch.eye(count, device=nodes.device)[None, None]
    weights = F.interpolate(unit, (shape[0], count), mode="bicubic", align_corners=True)[0, 0]  # (D, n)
    field = nodes.new_zeros(*nodes.shape[:2], *shape)
    for node in range(count):  # sums in this order whatever the number of threads, as a matrix product would not
        field.addcmul_(planes[:, :, node, None], weights[:, node, None, None])
    return field


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """A float32 tensor of an array."""
    return torch.from_numpy(array).to(device, torch.float32)


def _turn(angle: NDArray[np.float64], first: int, second: int, dims: int) -> NDArray[np.float64]:
    """Rotation matrices (N, dims, dims) in the plane of two axes; ``angle`` (N,) in radians."""
    matrix = np.tile(np.eye(dims), (len(angle), 1, 1))
    matrix[:, first, first] = matrix[:, second, second] = np.cos(angle)
    matrix[:, first, second], matrix[:, second, first] = -np.sin(angle), np.sin(angle)
    return matrix
