"""The labelled and the unlabelled stream: which images batch t holds, as a pure function of (seed, rank, t)."""

import os
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from knowsam.data.batch import Ids
from knowsam.data.cache import DecodedCache
from knowsam.data.intensity import same_levels
from knowsam.data.levels import as_tensor
from knowsam.data.patches import ForegroundIndex, draw_patch, patch_generator
from knowsam.data.seeds import derive_seed
from knowsam.errors import DataError


@lru_cache(maxsize=8)
def _permutation(count: int, seed: int, stream: str, epoch: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(derive_seed(seed, stream, epoch))).permutation(count)


def stream_indices(count: int, *, seed: int, stream: str, start: int, length: int) -> list[int]:
    """Positions ``start`` .. ``start + length`` of an endless sequence of reshuffled passes over ``count`` cases.

    Every pass visits each case once. Any position is computed directly, so resuming costs nothing, and the sequence
    does not depend on how many processes or workers share it.
    """
    return [
        int(_permutation(count, seed, stream, position // count)[position % count])
        for position in range(start, start + length)
    ]


def weighted_indices(
    groups: Mapping[str, Sequence[int]],
    weights: Mapping[str, float],
    *,
    seed: int,
    stream: str,
    start: int,
    length: int,
) -> list[int]:
    """As ``stream_indices``, over groups of rows that have shares of their own.

    A pass holds as many images as there are rows, of each group its share; a group goes on in the next pass where it
    stopped in the last, so that each of its rows is seen as often. Any position is computed directly.

    Args:
        groups: rows by name.
        weights: shares by name, any positive numbers.
    """
    total, whole = sum(map(len, groups.values())), sum(weights[name] for name in groups)
    quota = {name: max(1, round(total * weights[name] / whole)) for name in groups}
    slots = [(name, n) for name, count in quota.items() for n in range(count)]
    found = []
    for position in range(start, start + length):
        epoch, place = divmod(position, len(slots))
        name, n = slots[int(_permutation(len(slots), seed, stream, epoch)[place])]
        rows = groups[name]
        own_epoch, own_place = divmod(epoch * quota[name] + n, len(rows))
        found.append(rows[int(_permutation(len(rows), seed, f"{stream} {name}", own_epoch)[own_place])])
    return found


class RawBatch(NamedTuple):
    """Decoded, not yet augmented.

    Attributes:
        labelled: (L, C, *S) levels: uint8 (255 is 1.0) or int32 (65535 is 1.0).
        mask: uint8 (L, *S) class ids, 255 where nothing is known.
        unlabelled: (U, C, *S) levels.
        ids: of the rows.
        second: (L, C, *S) levels, a second labelled batch, drawn apart; L = 0 if nobody needs one.
        second_mask: uint8 (L, *S).
        valid_classes: bool (L, K), which classes the masks of the labelled rows tell apart; None: all of them do.
    """

    labelled: Tensor
    mask: Tensor
    unlabelled: Tensor
    ids: Ids
    second: Tensor
    second_mask: Tensor
    valid_classes: Tensor | None = None

    def to(self, device: torch.device) -> "RawBatch":
        """The same on another device, without waiting for the copies."""
        labelled, mask, unlabelled, second, second_mask = (
            x.to(device, non_blocking=True)
            for x in (self.labelled, self.mask, self.unlabelled, self.second, self.second_mask)
        )
        # A loader that pins memory has made lists of the tuples.
        classes = None if self.valid_classes is None else self.valid_classes.to(device, non_blocking=True)
        return RawBatch(labelled, mask, unlabelled, Ids(*map(tuple, self.ids)), second, second_mask, classes)


class TwoStreams(Dataset[RawBatch]):
    """``batch t`` of this rank as uint8 tensors.

    Args:
        labelled: cache with masks.
        unlabelled: cache without masks; None for none.
        labelled_batch, unlabelled_batch: L and U of one process.
        seed: of the run.
        rank, world_size: this process among all; each takes its slice of the global batch.
        second_labelled: also draw a second batch of ``labelled_batch`` labelled cases.
        patch_size: cut crops of this size, pixels or voxels, out of cases of any size; None: cases are of one size.
        foreground: share of the labelled crops that are drawn around a voxel of a foreground class. Crops of unlabelled
            cases are drawn anywhere: nobody may know where their foreground is.
        weights: share of each data set in the images of both streams; a case's id begins with its data set's name and
            ``/``. None: every case is as likely.
        valid_classes: bool (K,) by name of a data set whose masks tell only some classes apart.
    Raises:
        DataError: no labelled case, or unlabelled images asked for and none there.
    """

    def __init__(
        self,
        labelled: DecodedCache,
        unlabelled: DecodedCache | None,
        *,
        labelled_batch: int,
        unlabelled_batch: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        second_labelled: bool = False,
        patch_size: tuple[int, ...] | None = None,
        foreground: float = 0.5,
        weights: Mapping[str, float] | None = None,
        valid_classes: Mapping[str, NDArray[np.bool_]] | None = None,
    ):
        if not labelled.ids:
            raise DataError("the labelled list is empty: nothing to learn from")
        if unlabelled_batch and (unlabelled is None or not unlabelled.ids):
            raise DataError(
                f"data.unlabelled_batch is {unlabelled_batch} but no training case is unlabelled",
                hint="choose a smaller data.labelled list, set data.unlabelled_includes_labelled=true, "
                "or data.unlabelled_batch=0 for a supervised run",
            )
        self.labelled, self.unlabelled = labelled, unlabelled
        self.batch = {"labelled": labelled_batch, "unlabelled": unlabelled_batch}
        if second_labelled:
            self.batch["second"] = labelled_batch
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.patch_size, self.foreground, self.weights = patch_size, foreground, weights
        self.valid_classes = dict(valid_classes or {})
        self._groups: dict[str, dict[str, list[int]]] = {}
        self._foreground: list[ForegroundIndex] = []
        if patch_size is not None:
            assert labelled.masks is not None, "labelled cases are cached with their masks"
            self._foreground = [ForegroundIndex.of(labelled.masks.view(row)) for row in range(len(labelled))]

    def fingerprint(self) -> dict[str, str]:
        """Stream -> name of its decoded cache: it changes with the list, with any image and with any labelled mask."""
        caches = {"labelled": self.labelled, "unlabelled": self.unlabelled}
        return {name: cache.folder.name for name, cache in caches.items() if cache is not None}

    def indices(self, stream: str, t: int) -> list[int]:
        """Rows of the cache of ``labelled``, ``unlabelled`` or ``second`` in this rank's batch t."""
        size = self.batch.get(stream, 0)
        if not size:
            return []
        start = (t * self.world_size + self.rank) * size
        ids = self._cache(stream).ids
        if self.weights:
            groups = self._groups.get(stream) or self._groups.setdefault(stream, _by_data_set(ids))
            return weighted_indices(groups, self.weights, seed=self.seed, stream=stream, start=start, length=size)
        return stream_indices(len(ids), seed=self.seed, stream=stream, start=start, length=size)

    def ids(self, stream: str, t: int) -> tuple[str, ...]:
        """Case ids of a stream in this rank's batch t."""
        rows = self.indices(stream, t)
        return tuple(self._cache(stream).ids[row] for row in rows) if rows else ()

    def __getitem__(self, t: int) -> RawBatch:
        labelled, mask = self._rows("labelled", t)
        unlabelled, _ = self._rows("unlabelled", t)
        second, second_mask = self._rows("second", t)
        labelled, unlabelled, second = _of_one_type(labelled, unlabelled, second)
        ids = Ids(*(self.ids(stream, t) for stream in ("labelled", "unlabelled", "second")))
        nothing = labelled[:0]
        return RawBatch(
            labelled,
            mask,
            nothing if unlabelled is None else unlabelled,
            ids,
            nothing if second is None else second,
            mask[:0] if second_mask is None else second_mask,
            self._valid(ids.labelled),
        )

    def _valid(self, ids: Sequence[str]) -> Tensor | None:
        if not self.valid_classes:
            return None
        whole = np.ones_like(next(iter(self.valid_classes.values())))
        return torch.from_numpy(np.stack([self.valid_classes.get(i.partition("/")[0], whole) for i in ids]))

    def _rows(self, stream: str, t: int) -> tuple[Any, Any]:
        """Levels and masks of a stream's batch as tensors; None for what there is not."""
        rows = self.indices(stream, t)
        if not rows:
            return None, None
        cache = self._cache(stream)
        masks = cache.masks if stream != "unlabelled" else None
        if self.patch_size is None:
            images = cache.images[rows]
            return as_tensor(images), None if masks is None else as_tensor(masks[rows])
        crops, crop_masks = [], []
        first = (t * self.world_size + self.rank) * len(rows)  # drawn by place in the stream, whoever holds it
        for place, row in enumerate(rows):
            rng = patch_generator(self.seed, stream, first + place)
            mask, index = (None, None) if masks is None else (masks.view(row), self._foreground[row])
            # Only mapped: a crop reads no more than itself.
            image, cut = draw_patch(cache.images.view(row), mask, self.patch_size, rng, index, self.foreground)
            crops.append(image)
            if cut is not None:
                crop_masks.append(cut)
        return as_tensor(np.stack(same_levels(crops))), as_tensor(np.stack(crop_masks)) if crop_masks else None

    def _cache(self, stream: str) -> DecodedCache:
        cache = self.unlabelled if stream == "unlabelled" else self.labelled
        assert cache is not None, "a stream without cases has no rows"
        return cache

    def loader(self, start: int, stop: int, *, workers: int = 0, pin_memory: bool = False) -> DataLoader[RawBatch]:
        """Batches ``start`` .. ``stop - 1`` in order. Workers hold no random state, so their number changes nothing.

        One loader lasts for a whole run, so its workers do, too. There are never more of them than cores.
        """
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return DataLoader(
            self,
            batch_size=None,
            sampler=range(start, stop),
            num_workers=min(workers, cores),
            collate_fn=_as_it_is,
            pin_memory=pin_memory,
            # Its own generator: otherwise each new iterator draws from the global one and shifts dropout.
            generator=torch.Generator().manual_seed(0),
            multiprocessing_context="forkserver" if workers else None,
        )


def _by_data_set(ids: Sequence[str]) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = {}
    for row, case_id in enumerate(ids):
        groups.setdefault(case_id.partition("/")[0], []).append(row)
    return groups


def _of_one_type(*streams: Tensor | None) -> list[Any]:
    """Levels of all streams as uint8 or, where one of them holds deeper images, all as int32 (255 becomes 65535)."""
    if all(levels is None or levels.dtype == torch.uint8 for levels in streams):
        return list(streams)
    deep = [levels is None or levels.dtype == torch.int32 for levels in streams]
    return [levels if fits else levels.int() * 257 for levels, fits in zip(streams, deep, strict=True)]  # type: ignore[union-attr]


def _as_it_is(batch: Any) -> Any:
    """In the place of torch's conversion, which would make lists of the ids' tuples."""
    return batch


class FirstBatch(TwoStreams):
    """The first batch, again and again: what a healthy pipeline learns by heart."""

    def indices(self, stream: str, t: int) -> list[int]:
        """As those of batch 0."""
        return super().indices(stream, 0)
