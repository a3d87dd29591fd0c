"""Several data sets as one: shared classes, a weight each, and case ids that begin with the data set's name."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from knowsam.data.case import Case
from knowsam.data.intensity import Preparation
from knowsam.data.source import CaseSource
from knowsam.errors import ConfigError, DataError


class Several(CaseSource):
    """``Source`` over other sources; a case's id is ``<name>/<its id there>``, its domain the name.

    Args:
        sources: by name.
        weights: share of the training images that each data set gives, any positive numbers; None: as many as it has
            cases.
        valid_classes: class ids that a data set's masks tell apart; all where none are given. Where a data set does not
            label a class, its background may hold that class.
    Attributes:
        partial: bool (K,) by name of the data sets that label only some classes.
    Raises:
        ConfigError: a weight that is not positive, or classes that there are not.
    """

    def __init__(
        self,
        sources: Mapping[str, CaseSource],
        weights: Mapping[str, float] | None = None,
        valid_classes: Mapping[str, Sequence[int]] | None = None,
    ):
        self.sources = dict(sources)
        self.num_classes = next(iter(self.sources.values())).num_classes
        self.weights = dict(weights or {})
        if self.weights and set(self.weights) != set(self.sources):
            missing = ", ".join(name for name in self.sources if name not in self.weights)
            raise ConfigError(f"data.sources: {missing} has no weight, others have one; give one to all or to none")
        for name, weight in self.weights.items():
            if not 0 < weight < float("inf"):
                raise ConfigError(f"data.sources.{name}.weight is {weight}; allowed are numbers above 0")
        self.partial: dict[str, NDArray[np.bool_]] = {}
        for name, classes in (valid_classes or {}).items():
            if not set(classes) <= set(range(1, self.num_classes)):
                raise ConfigError(
                    f"data.sources.{name}.valid_classes is {list(classes)}; allowed are ids of foreground classes, "
                    f"1 to {self.num_classes - 1}"
                )
            self.partial[name] = np.isin(np.arange(self.num_classes), [0, *classes])
        self._preparation = Preparation()

    def __repr__(self) -> str:
        return f"Several({self.sources})"

    @property
    def preparation(self) -> Preparation:  # type: ignore[override]  # each part has the same one
        """Shared by all data sets: the same value must be the same grey."""
        return self._preparation

    @preparation.setter
    def preparation(self, preparation: Preparation) -> None:
        self._preparation = preparation
        for source in self.sources.values():
            source.preparation = preparation

    def train_ids(self) -> list[str]:
        """Every training case of every data set."""
        return [f"{name}/{i}" for name, source in self.sources.items() for i in source.train_ids()]

    def labelled_ids(self) -> list[str]:
        """The training cases whose masks may be read."""
        return [f"{name}/{i}" for name, source in self.sources.items() for i in source.labelled_ids()]

    def eval_ids(self, split: str) -> list[str]:
        """Cases of ``"val"`` or ``"test"``; a data set that has none gives none."""
        return [f"{name}/{i}" for name, source in self.sources.items() for i in source.eval_ids(split)]

    def case(self, case_id: str) -> Case:
        """The case as stored, with its domain."""
        source, own = self._of(case_id)
        return replace(source.case(own), domain=self.domain(case_id))

    def image(self, case_id: str) -> np.ndarray:
        """Levels, as its data set gives them."""
        source, own = self._of(case_id)
        return source.image(own)

    def mask(self, case_id: str) -> NDArray[np.uint8]:
        """uint8 class ids; refuses unlabelled training cases."""
        source, own = self._of(case_id)
        return source.mask(own)

    def spacing(self, case_id: str) -> tuple[float, ...] | None:
        """mm along each axis, or None."""
        source, own = self._of(case_id)
        return source.spacing(own)

    def fingerprint(self, case_id: str) -> str:
        """Of the image's content."""
        source, own = self._of(case_id)
        return f"{source.cache_settings!r}{source.fingerprint(own)}"

    def mask_fingerprint(self, case_id: str) -> str:
        """Of the mask's content; refuses unlabelled training cases."""
        source, own = self._of(case_id)
        return f"{source.cache_settings!r}{source.mask_fingerprint(own)}"

    def domain(self, case_id: str) -> str:
        """The data set that a case belongs to."""
        return case_id.partition("/")[0]

    def valid_classes(self, case_id: str) -> NDArray[np.bool_] | None:
        """bool (K,): the classes that the case's mask tells apart; None: all."""
        return self.partial.get(self.domain(case_id))

    def where(self, case_id: str) -> str:
        """The case in messages."""
        source, own = self._of(case_id)
        return source.where(own)

    @property
    def cache_settings(self) -> tuple[object, ...]:
        """What else decides differs by data set, and is in the fingerprints."""
        return (self.preparation.key(),)

    def _of(self, case_id: str) -> tuple[CaseSource, str]:
        name, _, own = case_id.partition("/")
        if name not in self.sources or not own:
            raise DataError(f"{case_id}: of none of the data sets {', '.join(self.sources)}")
        return self.sources[name], own
