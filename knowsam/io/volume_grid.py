"""Where the voxels of a stored volume lie, and the canonical grid: RAS+, slices first."""

from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from knowsam.io.opening import medical

T = TypeVar("T", int, float)
_RAS = np.array([[0, 1], [1, 1], [2, 1]])


@dataclass(frozen=True)
class VolumeGrid:
    """Between the stored axes (i, j, k) and (D, H, W).

    Attributes:
        shape: (i, j, k).
        affine: 4 x 4, stored indices to mm in RAS+.
        slice_axis: 0, 1, 2: of x, y, z the one that becomes D; the others follow, the later one first.
        flat: k has one entry, and the canonical grid is (H, W) without it.
    """

    shape: tuple[int, int, int]
    affine: np.ndarray
    slice_axis: int = 2
    flat: bool = False

    @property
    def directed(self) -> bool:
        """Whether the affine says where the axes point."""
        return bool(np.isfinite(self.affine).all()) and not np.isnan(self._orientations()).any()

    @property
    def axes(self) -> str:
        """Where the stored axes point, such as ``LPS``."""
        return "".join(medical("nibabel").aff2axcodes(self.affine))

    @property
    def canonical_shape(self) -> tuple[int, ...]:
        """(D, H, W) or (H, W)."""
        return self._ordered(self.shape)

    @property
    def spacing(self) -> tuple[float, ...] | None:
        """mm along the canonical axes; None where the affine says no size."""
        sizes = np.sqrt((np.nan_to_num(self.affine[:3, :3]) ** 2).sum(axis=0))
        return self._ordered(tuple(float(s) for s in sizes)) if (sizes > 0).all() else None

    @property
    def canonical_affine(self) -> np.ndarray:
        """4 x 4, canonical indices (x, y, z) to mm in RAS+."""
        back: np.ndarray = medical("nibabel").orientations.inv_ornt_aff(self._turn(), self.shape)
        affine: np.ndarray = self.affine @ back
        return affine

    def canonical(self, stored: np.ndarray) -> np.ndarray:
        """(i, j, k) -> (D, H, W) or (H, W), a view."""
        turned: np.ndarray = medical("nibabel").apply_orientation(stored, self._turn())
        slices = np.moveaxis(turned.transpose(2, 1, 0), 2 - self._depth(), 0)
        return slices[0] if self.flat else slices

    def stored(self, canonical: np.ndarray) -> np.ndarray:
        """What ``canonical`` turns back."""
        slices = canonical[None] if self.flat else canonical
        turned = np.moveaxis(slices, 0, 2 - self._depth()).transpose(2, 1, 0)
        nibabel = medical("nibabel")
        back: np.ndarray = nibabel.apply_orientation(turned, nibabel.orientations.ornt_transform(_RAS, self._turn()))
        return back

    def _orientations(self) -> np.ndarray:
        found: np.ndarray = medical("nibabel").io_orientation(self.affine)
        return found

    def _turn(self) -> np.ndarray:
        """Where each stored axis goes, and whether it is mirrored; an affine without directions turns nothing."""
        return self._orientations() if self.directed else _RAS

    def _depth(self) -> int:
        return int(self._turn()[2, 0]) if self.flat else self.slice_axis

    def _ordered(self, of_ijk: tuple[T, ...]) -> tuple[T, ...]:
        xyz: dict[int, T] = {int(axis): value for axis, value in zip(self._turn()[:, 0], of_ijk, strict=True)}
        depth = self._depth()
        rest: tuple[T, ...] = tuple(xyz[axis] for axis in (2, 1, 0) if axis != depth)
        return rest if self.flat else (xyz[depth],) + rest  # noqa: RUF005
