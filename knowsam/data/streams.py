"""The labelled and the unlabelled stream: which images batch t holds, as a pure function of (seed, rank, t)."""

import hashlib
import os
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from knowsam.data.batch import Ids
from knowsam.data.cache import DecodedCache
from knowsam.errors import DataError


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from any number of integers and words; different words give unrelated seeds."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


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


class RawBatch(NamedTuple):
    """Decoded, not yet augmented.

    Attributes:
        labelled: uint8 (L, C, *S).
        mask: uint8 (L, *S) class ids.
        unlabelled: uint8 (U, C, *S).
        ids: of the rows.
        second: uint8 (L, C, *S), a second labelled batch, drawn apart; L = 0 if nobody needs one.
        second_mask: uint8 (L, *S).
    """

    labelled: Tensor
    mask: Tensor
    unlabelled: Tensor
    ids: Ids
    second: Tensor
    second_mask: Tensor

    def to(self, device: torch.device) -> "RawBatch":
        """The same on another device, without waiting for the copies."""
        labelled, mask, unlabelled, second, second_mask = (
            x.to(device, non_blocking=True)
            for x in (self.labelled, self.mask, self.unlabelled, self.second, self.second_mask)
        )
        # A loader that pins memory has made lists of the tuples.
        return RawBatch(labelled, mask, unlabelled, Ids(*map(tuple, self.ids)), second, second_mask)


class TwoStreams(Dataset[RawBatch]):
    """``batch t`` of this rank as uint8 tensors.

    Args:
        labelled: cache with masks.
        unlabelled: cache without masks; None for none.
        labelled_batch, unlabelled_batch: L and U of one process.
        seed: of the run.
        rank, world_size: this process among all; each takes its slice of the global batch.
        second_labelled: also draw a second batch of ``labelled_batch`` labelled cases.
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
        return stream_indices(len(self._cache(stream).ids), seed=self.seed, stream=stream, start=start, length=size)

    def ids(self, stream: str, t: int) -> tuple[str, ...]:
        """Case ids of a stream in this rank's batch t."""
        rows = self.indices(stream, t)
        return tuple(self._cache(stream).ids[row] for row in rows) if rows else ()

    def __getitem__(self, t: int) -> RawBatch:
        labelled, unlabelled, second = (self.indices(stream, t) for stream in ("labelled", "unlabelled", "second"))
        images, masks = self.labelled.images, self.labelled.masks
        assert masks is not None, "labelled cases are cached with their masks"
        return RawBatch(
            torch.from_numpy(images[labelled]),
            torch.from_numpy(masks[labelled]),
            torch.from_numpy(self._cache("unlabelled").images[unlabelled] if unlabelled else images[:0].copy()),
            Ids(*(self.ids(stream, t) for stream in ("labelled", "unlabelled", "second"))),
            torch.from_numpy(images[second]),
            torch.from_numpy(masks[second]),
        )

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


def _as_it_is(batch: Any) -> Any:
    """In the place of torch's conversion, which would make lists of the ids' tuples."""
    return batch


class FirstBatch(TwoStreams):
    """The first batch, again and again: what a healthy pipeline learns by heart."""

    def indices(self, stream: str, t: int) -> list[int]:
        """As those of batch 0."""
        return super().indices(stream, 0)
