"""From stored values to what a network sees: 0..1, by one rule for training, validation, prediction and export.

A rule gives *levels*: uint8 (255 is 1.0) where the file has 8 bits and they are kept, else uint16 (65535 is 1.0), so
that nothing deeper than a picture is cut to 8 bits. A rule of scope ``dataset`` is fitted once, on the training
images, labelled or not; what it found is stored with the run's weights.
"""

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np

from knowsam.data.case import Case
from knowsam.errors import ConfigError, DataError

Scope = Literal["slice", "case", "dataset"]
SCOPES: tuple[Scope, ...] = ("slice", "case", "dataset")

_SAMPLES = 20_000  # voxels of a case that a fit over the data set looks at
_PIECE = 2**22  # values that are floats at a time
_TOO_DARK = 8  # 16-bit pictures that use less than an eighth of their range hold fewer bits than their file says


class Intensity(ABC):
    """A rule. Subclasses are named in YAML: ``data.intensity: {name: window, low: -160, high: 240}``.

    Attributes:
        pointwise: whether a value's level depends on nothing but the value, so that scopes mean nothing.
        scope: over which values its statistics are taken: a slice (an image, or each slice of a volume by itself), a
            case (an image or a whole volume), or all training cases.
        fitted: what a rule of scope ``dataset`` found; empty before, and for the others.
    """

    pointwise: ClassVar[bool] = False
    scope: Scope = "case"

    def __init__(self) -> None:
        self.fitted: dict[str, Any] = {}

    @property
    def needs_fit(self) -> bool:
        """Whether it must see the training images before it can be used."""
        return self.scope == "dataset" and not self.fitted

    def __call__(self, case: Case, where: str = "image") -> np.ndarray:
        """Levels of a case.

        Args:
            case: as read.
            where: its name, for messages.
        Returns:
            uint8 or uint16 (C, *S).
        Raises:
            DataError: values that are no numbers, NaN or infinite, or that the rule does not fit.
        """
        image = case.image
        if image.dtype.kind not in "buif":
            raise DataError(f"{where}: pixels of type {image.dtype} are not read; needed are numbers")
        if image.dtype.kind == "f" and not np.isfinite(image).all():
            raise DataError(f"{where}: {int((~np.isfinite(image)).sum())} pixels are NaN or infinite")
        if self.needs_fit:
            raise ConfigError(
                f"intensity {self.about()} is of scope dataset and was not fitted",
                hint="It is fitted when a run begins; use the run, or choose another scope.",
            )
        if self.scope == "slice" and image.ndim == 4 and not self.pointwise:
            return np.stack(
                [self._levels(image[:, z], case, f"{where} slice {z}") for z in range(image.shape[1])], axis=1
            )
        return self._levels(image, case, where)

    @abstractmethod
    def _levels(self, image: np.ndarray, case: Case, where: str) -> np.ndarray:
        """Levels of (C, *S), whose values are finite."""

    def fit(self, cases: Iterable[Case]) -> None:
        """Look at all training cases once; does nothing unless the scope is ``dataset``.

        Args:
            cases: labelled or not; each is forgotten before the next.
        """
        if self.scope == "dataset":
            raise NotImplementedError(f"{type(self).__name__} has scope dataset and no fit()")

    def options(self) -> dict[str, Any]:
        """Its settings, as in YAML."""
        return {}

    def state(self) -> dict[str, Any]:
        """Settings and what was fitted, as plain values: two rules with equal states give equal levels."""
        return {"class": type(self).__name__, **self.options(), "fitted": self.fitted}

    def about(self) -> str:
        """The rule in words."""
        settings = ", ".join(f"{key} {value}" for key, value in self.options().items() if value is not None)
        return f"{type(self).__name__.lower()} ({settings})" if settings else type(self).__name__.lower()


class AsIs(Intensity):
    """Stored values as they are: black and white of the file's format or type are 0 and 1.

    8-bit pictures come out untouched, floats must lie in 0..1. Signed numbers have no black and white and are refused;
    so are 16-bit files that use less than an eighth of their range, as 12 bits stored in 16 would come out black.

    Args:
        white: the value that is white, such as 4095 for 12 bits; None: the format's, or the type's largest.
    """

    pointwise = True

    def __init__(self, *, white: float | None = None):
        super().__init__()
        if white is not None and not white > 0:
            raise ConfigError(f"intensity: white is {white}, allowed are numbers above 0")
        self.white = white

    def options(self) -> dict[str, Any]:
        """Its settings."""
        return {"white": self.white}

    def _levels(self, image: np.ndarray, case: Case, where: str) -> np.ndarray:
        choose = "choose data.intensity minmax, percentile, zscore or window for this data set"
        if image.dtype == bool:
            return image.astype(np.uint8) * 255
        if case.display is not None and self.white is None:
            return stretch(case.display, 0, 1)
        low, high = (0.0, float(self.white)) if self.white is not None else case.full_range or (None, None)
        if low is None or high is None:
            if image.dtype.kind == "i":
                raise DataError(
                    f"{where}: pixels of type {image.dtype}; signed numbers have no black and white", hint=choose
                )
            low, high = 0.0, 1.0 if image.dtype.kind == "f" else float(np.iinfo(image.dtype).max)
        if image.dtype == np.uint8 and (low, high) == (0.0, 255.0):
            return image
        least, most = (float(image.min()), float(image.max())) if image.size else (0.0, 0.0)
        if image.dtype.kind == "f" and case.full_range is None and (least < low - 1e-6 or most > high + 1e-6):
            # a resampled 0..1 image overshoots by rounding only
            raise DataError(
                f"{where}: float pixels run from {least:g} to {most:g}; intensity as_is allows 0..{high:g}", hint=choose
            )
        if image.dtype == np.uint16 and self.white is None and high == 65535 and 0 < most < high / _TOO_DARK:
            bits = max(1, math.ceil(math.log2(most + 1)))
            raise DataError(
                f"{where}: 16-bit values reach only {most:g} of 65535; intensity as_is would make it nearly black",
                hint=f"set data.intensity={{name: as_is, white: {2**bits - 1}}} if these are {bits} bits, white: 65535 "
                f"if it is as dark as that, or {choose}",
            )
        if image.dtype == np.uint16 and (low, high) == (0.0, 65535.0):
            return image
        return stretch(image, low, high)


class Window(Intensity):
    """A window of values, the same for every case: CT in Hounsfield units.

    Args:
        low, high: the values that become 0 and 1; what lies beyond is clipped. Liver: -160 to 240.
        centre, width: the same in the other way of saying it.
    """

    pointwise = True

    def __init__(
        self,
        *,
        low: float | None = None,
        high: float | None = None,
        centre: float | None = None,
        width: float | None = None,
    ):
        super().__init__()
        if centre is not None and width is not None and low is None and high is None:
            low, high = centre - width / 2, centre + width / 2
        elif low is None or high is None or centre is not None or width is not None:
            raise ConfigError(
                "intensity window needs low and high, or centre and width", hint="{name: window, low: -160, high: 240}"
            )
        if not low < high:
            raise ConfigError(f"intensity window runs from {low} to {high}; low must be below high")
        self.low, self.high = float(low), float(high)

    def options(self) -> dict[str, Any]:
        """Its settings."""
        return {"low": self.low, "high": self.high}

    def _levels(self, image: np.ndarray, case: Case, where: str) -> np.ndarray:
        return stretch(image, self.low, self.high)


class _Statistic(Intensity):
    """A rule whose window comes from statistics of a slice, a case or all training cases."""

    per_channel: bool

    def __init__(self, scope: Scope, per_channel: bool):
        super().__init__()
        if scope not in SCOPES:
            raise ConfigError(f"intensity: scope is {scope!r}; allowed are {', '.join(SCOPES)}")
        self.scope, self.per_channel = scope, per_channel

    def options(self) -> dict[str, Any]:
        """Its settings."""
        return {"scope": self.scope, "per_channel": self.per_channel}

    @abstractmethod
    def _window(self, values: np.ndarray) -> tuple[float, float]:
        """The values that become 0 and 1, from those of one or all channels, (C, N)."""

    def _levels(self, image: np.ndarray, case: Case, where: str) -> np.ndarray:
        if self.scope == "dataset":
            windows = self.fitted["windows"]
            if len(windows) not in (1, len(image)):
                raise DataError(f"{where}: has {len(image)} channels; intensity was fitted on {len(windows)}")
        else:
            windows = self._windows(image.reshape(len(image), -1))
        if len(windows) == 1:
            return stretch(image, *windows[0])
        return np.stack([stretch(channel, *window) for channel, window in zip(image, windows, strict=True)])

    def _windows(self, values: np.ndarray) -> list[tuple[float, float]]:
        parts = values[:, None] if self.per_channel else values[None]
        return [self._window(part) for part in parts]

    def fit(self, cases: Iterable[Case]) -> None:
        """Windows over evenly spaced voxels of every case."""
        if self.scope != "dataset":
            return
        samples: list[np.ndarray] = []
        for case in cases:
            values = case.image.reshape(len(case.image), -1)
            if values.dtype.kind == "f" and not np.isfinite(values).all():
                raise DataError("intensity cannot be fitted: a training case holds NaN or infinite values")
            low, high = values.argmin(1), values.argmax(1)
            step = max(1, values.shape[1] // _SAMPLES)
            # the extremes are always among them, so that minmax is exact
            kept = np.concatenate([values[:, ::step], values[np.arange(len(values)), low][:, None],
                                   values[np.arange(len(values)), high][:, None]], axis=1)  # fmt: skip
            samples.append(kept.astype(np.float64))
            if len({len(sample) for sample in samples}) > 1:
                raise DataError("intensity cannot be fitted: training cases have different numbers of channels")
        if not samples:
            raise DataError("intensity cannot be fitted: there is no training case")
        windows = self._windows(np.concatenate(samples, axis=1))
        self.fitted = {"windows": [list(window) for window in windows], "cases": len(samples)}


class MinMax(_Statistic):
    """Smallest to largest value.

    Args:
        scope: slice, case or dataset.
        per_channel: each channel by itself, as for sequences of MRI; False keeps the hue of colours.
    """

    def __init__(self, *, scope: Scope = "case", per_channel: bool = False):
        super().__init__(scope, per_channel)

    def _window(self, values: np.ndarray) -> tuple[float, float]:
        return float(values.min()), float(values.max())


class Percentile(_Statistic):
    """Two percentiles become 0 and 1; what lies beyond is clipped. A nearly constant case is stretched by its extremes.

    Args:
        low, high: percentiles, 0 to 100.
        scope, per_channel: as for ``MinMax``.
    """

    def __init__(self, *, low: float = 0.5, high: float = 99.5, scope: Scope = "case", per_channel: bool = False):
        super().__init__(scope, per_channel)
        if not 0 <= low < high <= 100:
            raise ConfigError(f"intensity percentile runs from {low} to {high}; allowed: 0 <= low < high <= 100")
        self.low, self.high = low, high

    def options(self) -> dict[str, Any]:
        """Its settings."""
        return {"low": self.low, "high": self.high, **super().options()}

    def _window(self, values: np.ndarray) -> tuple[float, float]:
        low, high = (float(v) for v in np.percentile(values, (self.low, self.high)))
        return (low, high) if high > low else (float(values.min()), float(values.max()))


class ZScore(_Statistic):
    """Mean and standard deviation: the mean becomes 0.5, ``clip`` deviations above it 1, below it 0.

    That is the z-score on the scale 0..1 on which light is augmented and SAM looks: the two differ by a fixed factor
    and offset, which a network's first layer takes up.

    Args:
        clip: deviations that are kept either way, > 0.
        nonzero: statistics over values other than 0 alone, as for MRI with its background cut away.
        scope, per_channel: as for ``MinMax``.
    """

    def __init__(self, *, clip: float = 4.0, nonzero: bool = False, scope: Scope = "case", per_channel: bool = False):
        super().__init__(scope, per_channel)
        if not clip > 0:
            raise ConfigError(f"intensity zscore: clip is {clip}, allowed are numbers above 0")
        self.clip, self.nonzero = clip, nonzero

    def options(self) -> dict[str, Any]:
        """Its settings."""
        return {"clip": self.clip, "nonzero": self.nonzero, **super().options()}

    def _window(self, values: np.ndarray) -> tuple[float, float]:
        mean, deviation = _moments(values, nonzero=self.nonzero and bool((values != 0).any()))
        return mean - self.clip * deviation, mean + self.clip * deviation


def stretch(image: np.ndarray, low: float, high: float) -> np.ndarray:
    """Values to levels: ``low`` becomes 0, ``high`` 65535, what lies beyond is clipped; all 0 if ``high <= low``.

    Returns:
        uint16, same shape.
    """
    levels = np.zeros(image.shape, np.uint16)
    if not high > low:
        return levels
    for part in _pieces(image):
        values: Any = image[part].astype(np.float64 if image.dtype.itemsize > 2 else np.float32)
        values -= low
        values *= 65535 / (high - low)
        levels[part] = np.rint(np.clip(values, 0, 65535, out=values))
    return levels


def _pieces(image: np.ndarray) -> Iterator[tuple[slice, ...]]:
    """Slices along the second axis that cover an array, so that of a large volume little is a float at a time."""
    if image.size <= _PIECE or image.ndim < 2:
        yield (slice(None),)
        return
    step = max(1, _PIECE * image.shape[1] // image.size)
    for start in range(0, image.shape[1], step):
        yield slice(None), slice(start, start + step)


def _moments(values: np.ndarray, *, nonzero: bool) -> tuple[float, float]:
    """Mean and standard deviation, without a float copy of everything."""
    flat = values.reshape(-1)

    def parts() -> Iterator[np.ndarray]:
        for start in range(0, flat.size, _PIECE):
            part = flat[start : start + _PIECE].astype(np.float64)
            yield part[part != 0] if nonzero else part

    count, total = 0, 0.0
    for part in parts():
        count, total = count + part.size, total + float(part.sum())
    mean = total / count
    return mean, math.sqrt(sum(float(np.square(part - mean).sum()) for part in parts()) / count)


class Preparation:
    """From cases to the levels that networks see: the intensity rule, and the number of channels.

    Args:
        intensity: the rule.
        channels: C of the networks. With 3, grey images are repeated; else a case must have C channels.
    """

    def __init__(self, intensity: Intensity | None = None, channels: int = 3):
        self.intensity = AsIs() if intensity is None else intensity
        self.channels = channels

    def __call__(self, case: Case, where: str = "image") -> np.ndarray:
        """Levels of a case, channels last, as pictures are.

        Returns:
            uint8 or uint16 (*S, C).
        Raises:
            DataError: another number of channels, or as the rule.
        """
        levels = self.intensity(case, where)  # (c, *S)
        if len(levels) == 1 and self.channels == 3:
            levels = np.repeat(levels, 3, axis=0)
        if len(levels) != self.channels:
            wanted = "1 or 3" if self.channels == 3 else str(self.channels)
            raise DataError(
                f"{where}: has {len(levels)} channels; this experiment takes {wanted}",
                hint=f"set data.channels={len(levels)} to train on them",
            )
        return np.moveaxis(levels, 0, -1)

    def state(self) -> dict[str, Any]:
        """All that decides about the levels, as plain values; two preparations with equal states are the same."""
        return {"intensity": self.intensity.state(), "channels": self.channels}

    def key(self) -> str:
        """``state`` as text."""
        return json.dumps(self.state(), sort_keys=True)

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take over what a run fitted.

        Raises:
            ConfigError: it was prepared by another rule.
        """
        mine, other = (json.loads(json.dumps(dict(one))) for one in (self.state(), state))  # tuples become lists
        for part in (mine["intensity"], other["intensity"]):
            part.pop("fitted", None)
        if mine != other:
            raise ConfigError(f"the run prepared its images by {other}, this experiment says {mine}")
        self.intensity.fitted = dict(state["intensity"].get("fitted", {}))


def same_levels(arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Levels of one type: uint8 if all are, else uint16, which holds every uint8 level exactly (times 257)."""
    if all(array.dtype == np.uint8 for array in arrays):
        return list(arrays)
    return [array.astype(np.uint16) * np.uint16(257) if array.dtype == np.uint8 else array for array in arrays]


def as_picture(levels: np.ndarray) -> np.ndarray:
    """Levels (*S, C) as people look at them: uint8 (*S, 3); of other than 3 channels, the first in grey."""
    shown = levels if levels.shape[-1] == 3 else np.repeat(levels[..., :1], 3, axis=-1)
    return shown if shown.dtype == np.uint8 else np.rint(shown.astype(np.float32) / 257).astype(np.uint8)


def fit(preparation: Preparation, read: Callable[[str], Case], case_ids: Sequence[str]) -> None:
    """Fit a preparation that needs it.

    Args:
        read: case id -> case.
        case_ids: of training cases.
    """
    if preparation.intensity.needs_fit:
        preparation.intensity.fit(read(case_id) for case_id in case_ids)
