"""Watches every step without making the host wait for the device."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from knowsam.data.streams import TwoStreams
from knowsam.engine import distributed
from knowsam.engine.runfolder import RunFolder
from knowsam.errors import NumericError


class _Arrival:
    """Small numbers on their way from the device to the host."""

    def __init__(self, values: Tensor):
        self._values, self._event = values, None
        if values.device.type == "cuda":
            self._values = torch.empty(values.shape, pin_memory=True).copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> bool:
        """Wait for the number, if need be; True where it is not 0."""
        if self._event is not None:
            self._event.synchronize()
        return bool(self._values.item())


@dataclass
class _Watched:
    finite: _Arrival
    step: int
    batches: list[int]
    losses: Mapping[str, Tensor]


class StepGuard:
    """Learns, over all ranks, whether a step's loss is finite and whether somebody wants to stop.

    On a CPU the numbers are there at once. From a GPU they are copied without waiting and read one step later, when
    they have long arrived; until then torch's fused optimizers leave the weights alone where the loss is not finite
    (``found_inf``, which they have for gradient scaling).

    Args:
        streams: names the cases of a batch that is to blame.
        run: gets a record of it.
        device: of the losses.
        late: read them one step later; on CUDA if None.
    """

    def __init__(self, streams: TwoStreams, run: RunFolder, device: torch.device, *, late: bool | None = None):
        self._streams, self._run, self._device = streams, run, device
        self._late = device.type == "cuda" if late is None else late
        self._watched: _Watched | None = None
        self._wish: _Arrival | None = None

    def watch(
        self,
        losses: Mapping[str, Tensor],
        total: Tensor,
        step: int,
        batches: list[int],
        optimizers: Iterable[torch.optim.Optimizer],
    ) -> None:
        """Begin to watch a step, before the optimizers act on it; on every rank.

        Args:
            losses: its terms, summed over its micro-batches.
            total: sum of them.
            step, batches: of the update, and its micro-batches' numbers t.
            optimizers: told on the device to skip a step that is not finite.
        Raises:
            NumericError: this step, or when read late the one before, is not finite.
        """
        finite = distributed.all_reduce_min_(torch.isfinite(total.detach()).float())
        if self._late:
            for optimizer in optimizers:
                optimizer.found_inf = 1 - finite  # type: ignore[attr-defined]  # as GradScaler sets it
            self.settle()
        losses = {name: term.detach() for name, term in losses.items()}
        self._watched = _Watched(_Arrival(finite), step, batches, losses)
        if not self._late:
            self.settle()

    def settle(self) -> None:
        """Read what is on its way: before a checkpoint, a validation or the end, and by ``watch``.

        Raises:
            NumericError: the watched step is not finite.
        """
        watched, self._watched = self._watched, None
        if watched is not None and not watched.finite.read():
            self._refuse(watched)

    def all_go_on(self, wish: bool) -> bool:
        """False when some rank does not wish to go on; when read late, when it did not at the last call.

        Every rank gets the same result after the same step.
        """
        if distributed.world_size() == 1:
            return wish
        arriving: _Arrival | None
        arriving = _Arrival(distributed.all_reduce_min_(torch.tensor(float(wish), device=self._device)))
        if self._late:
            arriving, self._wish = self._wish, arriving
        return arriving is None or arriving.read()

    def _refuse(self, watched: _Watched) -> None:
        step = watched.step
        bad = [name for name, term in watched.losses.items() if not torch.isfinite(term)]
        cases = {
            stream: [case for t in watched.batches for case in self._streams.ids(stream, t)]
            for stream in self._streams.batch
        }
        if not bad and distributed.world_size() > 1:
            raise NumericError(
                f"step {step}: a loss term is not finite on another rank; nothing was updated",
                hint=f"That rank lists its terms and its batch in {self._run.errors}.",
            )
        terms = {name: str(term.item()) for name, term in watched.losses.items()}
        name = self._run.errors / f"nonfinite-step{step}-rank{distributed.rank()}.json"
        self._run.errors.mkdir(exist_ok=True)
        self._run.write_json(name, {"step": step, "terms": terms, "cases": cases})
        raise NumericError(
            f"step {step}: not finite: {', '.join(bad) or 'the sum of the terms'}; nothing was updated with it. "
            f"The batch is listed in {name}",
            hint="Lower optim.*.lr, set train.clip_norm, or use train.precision=fp32 or bf16.",
        )
