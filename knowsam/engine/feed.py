"""Batches for the loop: loaded, moved to the device, augmented, and handed out again where a method updates twice."""

from collections.abc import Callable
from dataclasses import replace

import torch

from knowsam.data.batch import Batch
from knowsam.data.seeds import derive_seed
from knowsam.data.streams import TwoStreams
from knowsam.engine.cost import Cost
from knowsam.engine.distributed import Rank
from knowsam.engine.options import TrainOptions
from knowsam.engine.spans import span
from knowsam.methods.base import StepOutput


class Feed:
    """``feed(step, micro)``: the batch of a micro-batch of an update, with the random state that belongs to it.

    Args:
        streams: raw batch t of this rank.
        augmenter: raw batch, ``seed=`` -> Batch.
        options: of the run.
        rank: this process.
        cost: counts the time that is waited for data.
        start: first update; batches before it are skipped without being read.
        rounds: updates from each batch.
    Attributes:
        taken: numbers t of the micro-batches of the current update.
        images: images that an update sees, over all processes.
    """

    def __init__(
        self,
        streams: TwoStreams,
        augmenter: Callable[..., Batch],
        options: TrainOptions,
        rank: Rank,
        cost: Cost,
        *,
        start: int,
        rounds: int,
    ):
        self.images = sum(streams.batch.values()) * options.accumulate * rank.world_size
        self.taken: list[int] = []
        self._augmenter, self._options, self._rank, self._cost = augmenter, options, rank, cost
        self._rounds = rounds
        self._kept: dict[int, tuple[int, Batch]] = {}
        first, last = (step // rounds * options.accumulate for step in (start, options.max_steps))
        pinned = rank.device.type == "cuda"
        loader = streams.loader(first, last, workers=options.workers, pin_memory=pinned)
        self._batches = zip(range(first, last), loader, strict=True)

    def __call__(self, step: int, micro: int) -> Batch:
        """The batch, augmented; sets torch's random state to what this update draws from."""
        if micro == 0:
            self.taken = []
        if step % self._rounds == 0:
            t, batch = self._next()
        else:
            t, batch = self._kept[micro]
        self.taken.append(t)
        # What batch t draws depends on t alone, so resuming needs no generator state.
        more = (f"round {batch.round}",) if batch.round else ()
        torch.manual_seed(derive_seed(self._options.seed, "noise", self._rank.rank, t, *more) & 0xFFFFFFFF)
        if self._rounds > 1:
            self._kept[micro] = t, batch
        return batch

    def hand_on(self, micro: int, out: StepOutput) -> None:
        """Give what an update carries to the next one from the same batch."""
        if self._rounds > 1:
            t, batch = self._kept[micro]
            self._kept[micro] = t, replace(batch, round=batch.round + 1, carried=out.carry)

    def _next(self) -> tuple[int, Batch]:
        with self._cost.part("data"), span("data"):
            t, raw = next(self._batches)
            raw = raw.to(self._rank.device)
        with span("augmentation"):
            return t, self._augmenter(raw, seed=derive_seed(self._options.seed, "augment", self._rank.rank, t))
