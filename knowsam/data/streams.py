"""The labelled and the unlabelled stream: which images batch t holds, as a pure function of (seed, rank, t)."""

import hashlib
import os
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

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
    """Decoded, not yet augmented: uint8 images (L, 3, S, S), masks (L, S, S), unlabelled images (U, 3, S, S)."""

    labelled: Tensor
    mask: Tensor
    unlabelled: Tensor


class TwoStreams(Dataset):
    """``batch t`` of this rank as uint8 tensors.

    Args:
        labelled: cache with masks.
        unlabelled: cache without masks; None for none.
        labelled_batch, unlabelled_batch: L and U of one process.
        seed: of the run.
        rank, world_size: this process among all; each takes its slice of the global batch.
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
        self.seed, self.rank, self.world_size = seed, rank, world_size

    def fingerprint(self) -> dict[str, str]:
        """Stream -> name of its decoded cache: it changes with the list, with any image and with any labelled mask."""
        caches = {"labelled": self.labelled, "unlabelled": self.unlabelled}
        return {name: cache.folder.name for name, cache in caches.items() if cache is not None}

    def indices(self, stream: str, t: int) -> list[int]:
        """Cases of ``labelled`` or ``unlabelled`` in this rank's batch t."""
        size = self.batch[stream]
        if not size:
            return []
        count = len(getattr(self, stream).ids)
        start = (t * self.world_size + self.rank) * size
        return stream_indices(count, seed=self.seed, stream=stream, start=start, length=size)

    def __getitem__(self, t: int) -> RawBatch:
        labelled = self.indices("labelled", t)
        unlabelled = self.indices("unlabelled", t)
        side = self.labelled.images.shape[-1]
        return RawBatch(
            torch.from_numpy(self.labelled.images[labelled]),
            torch.from_numpy(self.labelled.masks[labelled]),
            torch.from_numpy(self.unlabelled.images[unlabelled])
            if unlabelled
            else torch.empty((0, 3, side, side), dtype=torch.uint8),
        )

    def loader(self, start: int, stop: int, *, workers: int = 0, pin_memory: bool = False) -> DataLoader:
        """Batches ``start`` .. ``stop - 1`` in order. Workers hold no random state, so their number changes nothing.

        One loader lasts for a whole run, so its workers do, too. There are never more of them than cores.
        """
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return DataLoader(
            self,
            batch_size=None,
            sampler=range(start, stop),
            num_workers=min(workers, cores),
            pin_memory=pin_memory,
            # Its own generator: otherwise each new iterator draws from the global one and shifts dropout.
            generator=torch.Generator().manual_seed(0),
            multiprocessing_context="forkserver" if workers else None,
        )
