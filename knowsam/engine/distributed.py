"""Ranks, devices and collectives. Every function is valid, and does the obvious thing, without a process group."""

import contextlib
import hashlib
import os
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from knowsam.errors import ConfigError, KnowsamError

T = TypeVar("T")


@dataclass(frozen=True)
class Rank:
    """Who this process is among those that train together.

    Attributes:
        rank: 0 .. world_size - 1 over all machines.
        world_size: number of processes.
        local_rank: 0 .. on this machine.
        device: where this process computes.
    """

    rank: int
    world_size: int
    local_rank: int
    device: torch.device


def setup(device_choice: str = "auto", timeout: float = 600.0) -> Rank:
    """Choose the device and, when torchrun started several processes, join them (gloo on CPU, NCCL on CUDA).

    Args:
        device_choice: ``auto`` (CUDA if there is one, else CPU), ``cpu``, ``cuda`` or ``cuda:N``.
        timeout: seconds that a collective may take; must exceed whatever one rank does while the others wait.
    Returns:
        This process' rank and device; rank 0 of 1 when torchrun is not involved.
    Raises:
        ConfigError: unknown or absent device, or more processes on this machine than devices.
    """
    rank, world_size = _env_int("RANK", 0), _env_int("WORLD_SIZE", 1)
    local_rank = _env_int("LOCAL_RANK", 0)
    device = _choose_device(device_choice, local_rank, _env_int("LOCAL_WORLD_SIZE", 1))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world_size > 1 and not dist.is_initialized():
        if device.type == "cuda":
            dist.init_process_group("nccl", timeout=timedelta(seconds=timeout), device_id=device)
        else:
            dist.init_process_group("gloo", timeout=timedelta(seconds=timeout))
    return Rank(rank, world_size, local_rank, device)


def replicate(method: nn.Module, rank: Rank, exchange: str = "fp32") -> nn.Module:
    """What the loop calls in place of ``method``: DDP around it, which averages gradients; itself with one process.

    DDP is around the whole method: calling a part of it past DDP's forward would let the replicas drift apart
    unnoticed.

    Args:
        method: on ``rank.device``, the same weights on every rank.
        rank: this process.
        exchange: ``fp32``, or ``bf16`` for half the bytes: gradients are rounded to bfloat16 on their way and summed in
            it; weights and optimizers stay in float32.
    """
    if rank.world_size == 1:
        return method
    # In bf16 the gradient of a 1 x 1 convolution arrives with channels-last strides; DDP then copies these few thousand
    # numbers into their bucket, which is nothing to alarm a user with.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides", UserWarning)
    # A view of the bucket as gradient saves a copy; it must be set up before the first backward.
    ids = [rank.device.index] if rank.device.type == "cuda" else None
    replica = nn.parallel.DistributedDataParallel(method, device_ids=ids, gradient_as_bucket_view=True)
    if exchange == "bf16":
        replica.register_comm_hook(None, _average_in_bf16)
    return replica


def without_exchange(runner: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Within, a backward pass adds up gradients on this process alone; the next one outside exchanges the sum.

    Args:
        runner: what :func:`replicate` gave.
    """
    if isinstance(runner, nn.parallel.DistributedDataParallel):
        held: contextlib.AbstractContextManager[None] = runner.no_sync()
        return held
    return contextlib.nullcontext()


def _average_in_bf16(_: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """As torch's ``bf16_compress_hook``, which refuses gloo."""
    gradients = bucket.buffer()
    # Divided before the sum, as the sum of many ranks has the fewest bits to spare.
    small = gradients.to(torch.bfloat16).div_(dist.get_world_size())
    done = dist.all_reduce(small, async_op=True).get_future()
    return done.then(lambda future: gradients.copy_(future.value()[0]))


def teardown() -> None:
    """Leave the process group, if there is one."""
    if _joined():
        # A thread of gloo may still be about to free a tensor of the last collective and needs the lock of the
        # interpreter for that: were it gone, the thread would abort a process whose work is done.
        time.sleep(0.5)
        dist.destroy_process_group()


def is_main() -> bool:
    """True on rank 0, which alone writes and speaks."""
    return (dist.get_rank() if _joined() else _env_int("RANK", 0)) == 0


def rank() -> int:
    """Rank of this process; 0 without a process group."""
    return dist.get_rank() if _joined() else _env_int("RANK", 0)


def world_size() -> int:
    """Number of processes in the group; 1 without one."""
    return dist.get_world_size() if _joined() else 1


def barrier() -> None:
    """Wait for all ranks."""
    if _joined():
        dist.barrier()


def all_reduce_mean(values: Mapping[str, float]) -> dict[str, float]:
    """Mean over ranks of each value.

    Args:
        values: plain numbers; every rank must bring the same names.
    Returns:
        The same names in the same order.
    """
    if world_size() == 1 or not values:
        return dict(values)
    names = sorted(values)  # ranks may have filled their dictionaries in different orders
    total = torch.tensor([values[name] for name in names], dtype=torch.float64, device=_collective_device())
    dist.all_reduce(total)
    mean = dict(zip(names, (total / world_size()).tolist(), strict=True))
    return {name: mean[name] for name in values}


def all_reduce_min_(values: torch.Tensor) -> torch.Tensor:
    """Replace each value by its smallest over the ranks, in place, without making the host wait for a GPU."""
    if world_size() > 1:
        dist.all_reduce(values, op=dist.ReduceOp.MIN)
    return values


def broadcast_object(value: T, source: int = 0) -> T:
    """The picklable ``value`` of rank ``source``, on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=source, device=_collective_device())
    return box[0]


def call_on_main(function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Run ``function`` on rank 0 only and give its (picklable) result to all.

    A KnowsamError raised there is raised on every rank, so that nobody is left waiting in a collective; the command
    line prints it once. Any other exception is a bug of rank 0: the others see a KnowsamError that says so.
    """
    failure: BaseException | None = None
    outcome: tuple[Any, KnowsamError | None] = (None, None)
    if is_main():
        try:
            outcome = (function(*args, **kwargs), None)
        except KnowsamError as error:
            failure, outcome = error, (None, error)
        except Exception as error:
            failure, outcome = error, (None, KnowsamError(f"rank 0 failed: {type(error).__name__}: {error}"))
    result, refusal = broadcast_object(outcome)
    if failure is not None:
        raise failure
    if refusal is not None:
        refusal.reported_by_main = True
        raise refusal
    return result


def replicas_equal(module: nn.Module, *, buffers: bool = False) -> list[str]:
    """Names of the tensors of ``module`` that differ between ranks; empty when the replicas agree.

    Args:
        module: same architecture on every rank; all ranks must call.
        buffers: compare buffers too. Off by default because DDP sends rank 0's buffers (batch norm's statistics) at the
            *start* of a forward pass: between two steps they may differ and be right.
    """
    if world_size() == 1:
        return []
    tensors: dict[str, torch.Tensor] = dict(module.named_parameters())
    if buffers:
        tensors |= dict(module.named_buffers())
    if not tensors:
        return []
    low = torch.tensor([_hash64(tensor) for tensor in tensors.values()], device=_collective_device())
    high = low.clone()
    dist.all_reduce(low, op=dist.ReduceOp.MIN)
    dist.all_reduce(high, op=dist.ReduceOp.MAX)
    return [name for name, differs in zip(tensors, (low != high).tolist(), strict=True) if differs]


def _hash64(tensor: torch.Tensor) -> int:
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little", signed=True)


def _choose_device(choice: str, local_rank: int, local_world_size: int) -> torch.device:
    if choice == "auto":
        choice = "cuda" if torch.cuda.is_available() else "cpu"
    if choice == "cpu":
        return torch.device("cpu")
    kind, _, index = choice.partition(":")
    if kind != "cuda" or (":" in choice and not index.isdecimal()):
        raise ConfigError(f"unknown device {choice!r}; allowed: auto, cpu, cuda, cuda:N")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        raise ConfigError(f"device {choice!r} asked for, but torch sees no CUDA device", hint="Use 'auto' or 'cpu'.")
    if index:
        if local_world_size > 1:
            raise ConfigError(
                f"device {choice!r} names one device, but {local_world_size} processes run on this machine",
                hint="Use device 'cuda': each process then takes the device of its local rank.",
            )
        if int(index) >= count:
            raise ConfigError(f"device {choice!r} does not exist; this machine has cuda:0 to cuda:{count - 1}")
        return torch.device("cuda", int(index))
    if local_world_size > count:
        raise ConfigError(
            f"{local_world_size} processes on this machine, but only {count} CUDA device{'s' if count > 1 else ''}",
            hint=f"Start torchrun with --nproc-per-node={count}.",
        )
    return torch.device("cuda", local_rank)


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized()


def _collective_device() -> torch.device:
    # NCCL moves device memory only
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def _env_int(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else default
