"""The built-in dataset: generated lesions on textured backgrounds. No files, no network; demo and tests use it."""

import hashlib
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from knowsam.data.case import Case
from knowsam.data.source import CaseSource
from knowsam.errors import DataError


class BuiltIn(CaseSource):
    """Seeded, generated cases with 2 or more classes, behind the same interface as files on disk (``Source``).

    Every image has its own palette, illumination and texture. A lesion is darker than its surroundings, has an edge and
    a tint of its own, and from class 2 on a grain; stains of such tints without an edge, vessels and glare lie about.
    A handful of labelled images suggests that some colours matter; a hundred show what lesions have in common.

    Args:
        labelled: ``labelled_<p>pct`` or ``all``: the first p % of the training cases have masks.
        num_classes: K >= 2, background included; classes differ by their grain.
        train, val, test: cases per split.
        size: native height and width in pixels.
        seed: of the dataset (not of the run).
    """

    def __init__(
        self,
        labelled: str = "labelled_10pct",
        *,
        num_classes: int = 2,
        train: int = 160,
        val: int = 40,
        test: int = 100,
        size: int = 96,
        seed: int = 0,
    ):
        if num_classes < 2:
            raise DataError(f"the built-in dataset needs at least 2 classes, got {num_classes}")
        if min(train, val, test) < 1 or size < 32:
            raise DataError(f"train, val, test must be >= 1 and size >= 32, got {train}, {val}, {test}, {size}")
        self.num_classes = num_classes
        self.counts = {"train": train, "val": val, "test": test}
        self.size = size
        self.seed = seed
        self.num_labelled = _labelled_count(labelled, train)
        self._render = lru_cache(maxsize=64)(self._render_uncached)

    def __repr__(self) -> str:
        return f"BuiltIn(num_classes={self.num_classes}, size={self.size}, seed={self.seed}, counts={self.counts})"

    def __getstate__(self) -> dict[str, Any]:
        # The memo can't be pickled into loader workers and needn't be.
        return {k: v for k, v in self.__dict__.items() if k != "_render"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._render = lru_cache(maxsize=64)(self._render_uncached)

    def train_ids(self) -> list[str]:
        """Every training case."""
        return [f"train_{i:04d}" for i in range(self.counts["train"])]

    def labelled_ids(self) -> list[str]:
        """The first ``labelled`` training cases; a smaller set lies inside a larger one."""
        return self.train_ids()[: self.num_labelled]

    def eval_ids(self, split: str) -> list[str]:
        """Cases of ``val`` or ``test``."""
        return [f"{split}_{i:04d}" for i in range(self.counts[split])]

    def case(self, case_id: str) -> Case:
        """uint8 (3, size, size)."""
        return Case(np.moveaxis(self._render(case_id)[0], -1, 0), full_range=(0.0, 255.0))

    def mask(self, case_id: str) -> NDArray[np.uint8]:
        """uint8 class ids (size, size); refused for unlabelled training cases."""
        self._firewall(case_id)
        return self._render(case_id)[1]

    def spacing(self, case_id: str) -> None:
        """Unknown: distances are in pixels."""
        return None

    def fingerprint(self, case_id: str) -> str:
        """Of what the image is generated from."""
        recipe = f"builtin-v{VERSION}:{self.seed}:{self.size}:{self.num_classes}:{case_id}"
        return hashlib.sha256(recipe.encode()).hexdigest()

    def mask_fingerprint(self, case_id: str) -> str:
        """Of what the mask is generated from; refused for unlabelled training cases."""
        self._firewall(case_id)
        return self.fingerprint(case_id)

    def _firewall(self, case_id: str) -> None:
        if case_id.startswith("train_") and int(case_id[6:]) >= self.num_labelled:
            raise DataError(f"case {case_id!r} is unlabelled: its mask may not be read")

    def _render_uncached(self, case_id: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        key = hashlib.sha256(f"{self.seed}:{case_id}".encode()).digest()
        rng = np.random.Generator(np.random.Philox(int.from_bytes(key[:8], "little")))
        return render(rng, self.size, self.num_classes)


VERSION = 1  # of the pictures; part of every fingerprint


def _labelled_count(labelled: str, train: int) -> int:
    if labelled == "all":
        return train
    percent = labelled.removeprefix("labelled_").removesuffix("pct")
    if not labelled.startswith("labelled_") or not percent.isdigit() or not 0 < int(percent) <= 100:
        raise DataError(
            f"labelled list {labelled!r} of the built-in dataset: allowed are 'labelled_<1..100>pct' and 'all'"
        )
    return max(1, round(train * int(percent) / 100))


def render(rng: np.random.Generator, size: int, num_classes: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Draw one case.

    Args:
        rng: all randomness.
        size: pixels per side.
        num_classes: K, background included.
    Returns:
        image uint8 (size, size, 3), mask uint8 (size, size) in 0..K-1.
    """
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / size
    low, high = _palette(rng)
    texture = _noise(rng, size, int(rng.integers(3, 7))) + 0.6 * _noise(rng, size, int(rng.integers(8, 20)))
    image = low + (high - low) * _unit(texture)[..., None]
    image += rng.normal(0, 0.12) * (np.cos(rng.uniform(0, 6.28)) * (x - 0.5) + (y - 0.5))[..., None]  # illumination

    shift = _lesion_colour(rng)
    mask = np.zeros((size, size), np.uint8)
    for _ in range(int(rng.integers(1, 4))):
        inside, soft = _blob(rng, x, y)
        if (inside & (mask > 0)).any() or not inside.any():
            continue
        kind = int(rng.integers(1, num_classes))
        strength = rng.uniform(0.6, 1.2)
        image += soft[..., None] * (strength * shift + _grain(rng, x, y, kind, size)[..., None])
        mask[inside] = kind

    for _ in range(int(rng.integers(1, 4))):  # vessels: thin dark arcs over everything
        angle, offset, bend = rng.uniform(0, np.pi), rng.uniform(-0.4, 0.4), rng.uniform(-0.6, 0.6)
        u, v = _rotate(x - 0.5, y - 0.5, angle)
        image -= 0.18 * np.exp(-(((v - offset - bend * u * u) / rng.uniform(0.008, 0.02)) ** 2))[..., None]
    for _ in range(int(rng.integers(0, 4))):  # glare
        cx, cy, r = rng.uniform(0, 1), rng.uniform(0, 1), rng.uniform(0.01, 0.06)
        image += 0.4 * np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / r**2)[..., None]
    for _ in range(int(rng.integers(0, 3))):  # stains: as large and as tinted as a lesion, but without an edge
        cx, cy, r = rng.uniform(0, 1), rng.uniform(0, 1), rng.uniform(0.08, 0.2)
        stain = rng.choice([-0.6, 0.6], p=[0.3, 0.7]) * _lesion_colour(rng)
        image -= np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / r**2)[..., None] * stain
    image += rng.normal(0, rng.uniform(0.01, 0.05), image.shape)  # sensor noise
    return (np.clip(image, 0, 1) * 255).astype(np.uint8), mask


def _palette(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    low = rng.uniform(0.15, 0.6, 3)
    return low, np.clip(low + rng.uniform(0.08, 0.3) * rng.uniform(0.4, 1.0, 3), 0, 0.95)


def _lesion_colour(rng: np.random.Generator) -> np.ndarray:
    """What a lesion adds to its surroundings: it is darker, and tinted towards any hue, different in every image."""
    tint = rng.normal(0, 1, 3)
    return rng.uniform(0.18, 0.30) * (0.8 * tint / np.linalg.norm(tint) - 0.8)


def _noise(rng: np.random.Generator, size: int, cells: int) -> np.ndarray:
    """Smooth noise, about -1..1: a random grid of ``cells`` per side, bilinear between the nodes."""
    grid = rng.normal(0, 0.5, (cells + 2, cells + 2)).astype(np.float32)
    at = np.linspace(0, cells, size, dtype=np.float32)
    i = at.astype(int)
    f = at - i
    f = f * f * (3 - 2 * f)
    rows = grid[i] * (1 - f)[:, None] + grid[i + 1] * f[:, None]
    return rows[:, i] * (1 - f) + rows[:, i + 1] * f


def _unit(z: np.ndarray) -> np.ndarray:
    return (z - z.min()) / max(float(np.ptp(z)), 1e-6)


def _rotate(x: np.ndarray, y: np.ndarray, angle: float) -> tuple[np.ndarray, np.ndarray]:
    return np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x


def _blob(rng: np.random.Generator, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A lumpy ellipse: inside (bool) and a soft-edged version of it (0..1)."""
    u, v = _rotate(x - rng.uniform(0.15, 0.85), y - rng.uniform(0.15, 0.85), rng.uniform(0, np.pi))
    u, v = u / rng.uniform(0.08, 0.20), v / rng.uniform(0.08, 0.20)
    theta = np.arctan2(v, u)
    edge = 1 + sum(rng.normal(0, 0.25 / k) * np.cos(k * theta + rng.uniform(0, 6.28)) for k in (2, 3, 5))
    distance = np.hypot(u, v) - edge
    return distance < 0, 1 / (1 + np.exp(np.clip(distance / 0.08, -30, 30)))


def _grain(rng: np.random.Generator, x: np.ndarray, y: np.ndarray, kind: int, size: int) -> np.ndarray:
    """Class ``kind``'s own texture: class 1 is plain, the others have warped ripples, the coarser the higher."""
    wavelength = (0.10 + 0.06 * (kind - 2)) * rng.uniform(0.9, 1.15)
    u, v = _rotate(x, y, rng.uniform(0, np.pi))
    warp = 0.02 * _noise(rng, size, 6)
    ripples = np.sin(6.283 * (u + warp) / wavelength) * np.sin(6.283 * (v - warp) / wavelength)
    return (rng.uniform(0.06, 0.10) if kind > 1 else 0.0) * ripples
