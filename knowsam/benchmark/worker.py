"""A process that trains one subject step by step on request, so that two can be measured in turn.

Each subject has a process of its own: its memory, its allocator and its threads are not those of the other one, and its
steps are those of ``engine.train.train``, the loop of every run.
"""

import multiprocessing
import os
import socket
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from knowsam.benchmark.workload import Workload
    from knowsam.data.streams import TwoStreams

PARTS = {
    "image_encoder": "SAM encoder",
    "prompt_generator": "SAM prompts",
    "prompt_encoder": "SAM prompts",
    "mask_decoder": "SAM decoder",
    "students": "students",
}
"""Last part of a module's name in the method -> the part of the table that its forward pass belongs to."""


@dataclass(frozen=True)
class Subject:
    """What is measured.

    Attributes:
        name: in tables.
        experiment: YAML file.
        overrides: dotted settings.
        plain: the baseline of ``plain.py`` instead of knowsam's parts.
        threads: of torch.
        processes: that train together (gloo); each has ``threads`` threads.
    """

    name: str
    experiment: str
    overrides: tuple[str, ...] = ()
    plain: bool = False
    threads: int = 1
    processes: int = 1


class Trainee:
    """A subject in its processes: ``steps(n)`` makes it do n steps and says how long each took.

    Args:
        subject: what is measured.
        make_workload: what the subject trains; called in each of its processes, so it must pickle.
    Raises:
        RuntimeError: the process ended; its traceback is in the message.
    """

    def __init__(self, subject: Subject, make_workload: "Callable[[Subject], Workload]"):
        self.subject = subject
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        # Both are read when torch is loaded.
        before = {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        os.environ.update(dict.fromkeys(before, str(subject.threads)))
        port = _free_port()
        try:
            self._processes = [
                context.Process(
                    target=_serve,
                    args=(subject, make_workload, rank, port, other if rank == 0 else None),
                    daemon=True,
                )
                for rank in range(subject.processes)
            ]
            for process in self._processes:
                process.start()
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value
        other.close()

    def steps(self, count: int, *, flops: bool = False) -> list[dict[str, Any]]:
        """Do ``count`` steps and say of each:

        ``seconds``; ``cpu_seconds`` of all its threads, which other work on the machine disturbs less; ``parts``
        (seconds by name); ``flops`` if asked for, which is slow.
        """
        self._send("flops" if flops else "time", count)
        return [self._receive() for _ in range(count)]

    def memory(self) -> dict[str, int]:
        """Peak bytes since the last call: ``host``, and ``device`` on CUDA."""
        self._send("memory", 0)
        return self._receive()

    def facts(self) -> dict[str, Any]:
        """``images`` a step and trained ``parameters``, and the machine as the process sees it."""
        self._send("facts", 0)
        return self._receive()

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()  # the training loop takes SIGTERM as a wish to save and end
        for process in self._processes:
            process.join(10)

    def __enter__(self) -> "Trainee":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _send(self, request: str, count: int) -> None:
        try:
            self._connection.send((request, count))
        except OSError as error:
            raise RuntimeError(f"{self.subject.name}: its process is gone") from error

    def _receive(self) -> Any:
        try:
            reply = self._connection.recv()
        except EOFError as error:
            raise RuntimeError(f"{self.subject.name}: its process ended without a message") from error
        if isinstance(reply, BaseException | str):
            raise RuntimeError(f"{self.subject.name}: {reply}")
        return reply


class Stopwatch:
    """Collects spans (``engine.spans``) and the forward passes of parts; nested ones count for themselves."""

    def __init__(self, synchronize: Callable[[], None]):
        self.synchronize = synchronize
        self.seconds: dict[str, float] = {}
        self._open: list[list[Any]] = []  # [name, since when, seconds of what was nested]
        self.restart()

    def restart(self) -> None:
        """Forget what was collected; spans that are open begin now."""
        now = time.perf_counter()
        self.seconds.clear()
        for entry in self._open:
            entry[1], entry[2] = now, 0.0

    def begin(self, name: str) -> None:
        """A span begins."""
        self.synchronize()
        self._open.append([name, time.perf_counter(), 0.0])

    def end(self, name: str) -> None:
        """It ends."""
        self.synchronize()
        opened, since, nested = self._open.pop()
        assert opened == name, f"span {opened!r} ended as {name!r}"
        took = time.perf_counter() - since
        self.seconds[name] = self.seconds.get(name, 0.0) + took - nested
        if self._open:
            self._open[-1][2] += took

    def watch(self, module: Any, name: str) -> None:
        """Count the forward passes of ``module`` as span ``name``."""
        from torch.compiler import disable  # a compiled part traces its hooks, too

        module.register_forward_pre_hook(disable(lambda *_: self.begin(name)))
        module.register_forward_hook(disable(lambda *_: self.end(name)))


def _serve(
    subject: Subject,
    make_workload: "Callable[[Subject], Workload]",
    rank: int,
    port: int,
    connection: Connection | None,
) -> None:
    """The worker process: build the subject, train it, and do the steps that the other side asks for."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), KNOWSAM_BENCHMARK="1"
    )
    os.environ.update(WORLD_SIZE=str(subject.processes), LOCAL_WORLD_SIZE=str(subject.processes))
    try:
        _train(subject, make_workload, connection)
    except (KeyboardInterrupt, EOFError, BrokenPipeError):
        pass
    except BaseException:
        if connection is None:
            raise
        connection.send(traceback.format_exc())


def _train(subject: Subject, make_workload: "Callable[[Subject], Workload]", connection: Connection | None) -> None:
    import torch

    from knowsam.benchmark.plain import build_plain
    from knowsam.engine import distributed
    from knowsam.engine.compile import compile_parts
    from knowsam.engine.memory import keep_freed_memory
    from knowsam.engine.precision import autocast_dtype, store_frozen
    from knowsam.engine.runfolder import RunFolder
    from knowsam.engine.saving import RunRecord
    from knowsam.engine.spans import collect
    from knowsam.engine.train import train

    torch.set_num_threads(subject.threads)
    workload = make_workload(subject)
    options = workload.options
    place = distributed.setup(workload.device)
    on_cuda = place.device.type == "cuda"
    watch = Stopwatch(lambda: torch.cuda.synchronize(place.device) if on_cuda else None)
    if subject.plain:
        method, optimizers = build_plain(workload)
        method.to(place.device)
    else:
        keep_freed_memory()
        method = workload.make_method().to(place.device)
        if method.sam_teacher is not None:  # its frozen weights never move, as those of an EMA teacher do
            store_frozen(method.sam_teacher, autocast_dtype(options.precision))
        compile_parts(method.compilable(), workload.compile, place.device.type)
        optimizers = workload.make_optimizers(method)
    for name, module in method.named_modules():
        if (part := PARTS.get(name.rpartition(".")[2])) is not None:
            watch.watch(module, part)
    trained = sum(p.numel() for p in method.parameters() if p.requires_grad)
    streams: Any = random_streams(workload, rank=place.rank, world_size=place.world_size)
    facts = {
        "images": sum(streams.batch.values()) * place.world_size,
        "parameters": trained,
        "precision": options.precision,
        "gradient_exchange": options.gradient_exchange,
        "threads": torch.get_num_threads(),
    }
    if connection is not None:
        streams = _Gated(streams, connection, watch, place.device, facts)
    with tempfile.TemporaryDirectory() as folder, collect(watch), RunFolder(folder) as run:
        never = 10**9
        train(
            method,
            streams,
            workload.make_augmenter(),
            optimizers,
            lambda: {"none": 0.0},
            replace(
                options,
                validate_every=never,
                checkpoint_every=never,
                snapshot_every=0,
                pictures_every=0,
                workers=0,
                tensorboard=False,
            ),
            run=run,
            rank=place,
            record=RunRecord("", {}),
        )


def random_streams(workload: "Workload", *, rank: int = 0, world_size: int = 1, cases: int = 64) -> "TwoStreams":
    """Two streams of random images with blocks of random classes, in memory, as an experiment's own data would come.

    Args:
        workload: whose classes, size and batches.
        rank, world_size: this process among all.
        cases: in each stream.
    """
    import numpy as np

    from knowsam.data.streams import TwoStreams

    side, draw = workload.image_size, np.random.default_rng(0)

    def cache(masks: bool) -> Any:
        coarse = draw.integers(0, workload.num_classes, (cases, 8, 8), dtype=np.uint8)
        return SimpleNamespace(
            ids=[f"case{i}" for i in range(cases)],
            images=draw.integers(0, 256, (cases, 3, side, side), dtype=np.uint8),
            masks=np.kron(coarse, np.ones((1, side // 8, side // 8), np.uint8)) if masks else None,
            folder=SimpleNamespace(name="random"),
        )

    return TwoStreams(
        cache(True),
        cache(False) if workload.unlabelled_batch else None,
        labelled_batch=workload.labelled_batch,
        unlabelled_batch=workload.unlabelled_batch,
        seed=workload.options.seed,
        rank=rank,
        world_size=world_size,
    )


class _Gated:
    """Streams whose loader waits, before each batch, until the other side asks for a step."""

    def __init__(
        self,
        streams: "TwoStreams",
        connection: Connection,
        watch: Stopwatch,
        device: "torch.device",
        facts: dict[str, Any],
    ):
        self._streams, self._connection, self._watch, self._device = streams, connection, watch, device
        self._facts = facts
        self._mode, self._left = "", 0
        self._began = self._cpu_began = 0.0
        self._counter: Any = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._streams, name)

    def loader(self, *args: Any, **options: Any) -> Iterator[Any]:
        """As that of the streams."""
        for batch in self._streams.loader(*args, **options):
            self._finish()
            self._wait()
            yield batch

    def _finish(self) -> None:
        if not self._left:
            return
        self._watch.synchronize()
        seconds, cpu_seconds = time.perf_counter() - self._began, time.process_time() - self._cpu_began
        record: dict[str, Any] = {"seconds": seconds, "cpu_seconds": cpu_seconds, "parts": dict(self._watch.seconds)}
        if self._counter is not None:
            self._counter.__exit__(None, None, None)
            record["flops"] = self._counter.get_total_flops()
            self._counter = None
        self._connection.send(record)
        self._left -= 1

    def _wait(self) -> None:
        while not self._left:
            self._mode, self._left = self._connection.recv()
            if self._mode == "facts":
                self._connection.send(self._facts | _exchange(2 if self._facts["gradient_exchange"] == "bf16" else 4))
            elif self._mode == "memory":
                self._connection.send(self._memory())
        if self._mode == "flops":
            from torch.utils.flop_counter import FlopCounterMode

            self._counter = FlopCounterMode(display=False)
            self._counter.__enter__()
        self._watch.synchronize()
        self._watch.restart()
        self._began, self._cpu_began = time.perf_counter(), time.process_time()

    def _memory(self) -> dict[str, int]:
        import torch

        from knowsam.engine.memory import forget_peak, peak_host_memory

        peak = {"host": peak_host_memory()}
        forget_peak()
        if self._device.type == "cuda":
            peak["device"] = torch.cuda.max_memory_allocated(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
        return peak


def _exchange(bytes_per_value: int) -> dict[str, Any]:
    """What DDP measured of itself, averages in seconds; nothing with one process."""
    import gc

    from torch.nn.parallel import DistributedDataParallel

    for item in gc.get_objects():
        if type(item) is DistributedDataParallel:
            data = item._get_ddp_logging_data()
            names = ("forward_compute", "backward_compute", "backward_comm", "backward_compute_comm_overlap")
            found = {name: data.get(f"avg_{name}_time", 0) / 1e9 for name in names}
            return {"exchange": {**found, "bytes": data["total_parameter_size_bytes"] // 4 * bytes_per_value}}
    return {}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
