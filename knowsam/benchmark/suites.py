"""The measurements of training: steps in pairs, parts alone, data; and start-up. Of networks in use: ``use.py``."""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

import knowsam
from knowsam.benchmark.measure import median, paired_ratio, spread, synchronize, timed
from knowsam.benchmark.worker import PARTS, Subject, Trainee, random_streams
from knowsam.benchmark.workload import Workload

ORDER = ("data", "augmentation", *dict.fromkeys(PARTS.values()), "losses", "backward", "optimizers")
"""Parts of a step, in the order in which they run; ``losses`` is what of the forward pass is left."""


CHECKOUT = Path(knowsam.__file__).resolve().parents[1]
"""Where the tools are, whose start is measured."""


def steps(
    subjects: Sequence[Subject],
    make_workload: Callable[[Subject], Workload],
    *,
    repeats: int,
    warmup: int = 2,
    flops: bool = True,
    progress: Callable[[str], None] = lambda text: None,
) -> list[dict[str, Any]]:
    """Training steps of several subjects in turn: one each, then again, so that all meet the same machine.

    Args:
        subjects: the first is what the others are compared with.
        make_workload: what each of them trains; called in the subject's own process, so it must pickle.
        repeats: steps of each that count.
        warmup: steps before, of which the last ones settle the memory.
        flops: count the floating-point operations of one more step.
        progress: called with a line about what goes on.
    Returns:
        For each subject ``seconds`` and ``cpu_seconds`` (lists), ``parts`` (medians), ``memory``, ``flops``, ``facts``,
        and after the first ``faster``: median, smallest and largest of the ratios first / this one, pair by pair.
    """
    with ExitStack() as stack:
        trainees = [stack.enter_context(Trainee(subject, make_workload)) for subject in subjects]
        found: list[dict[str, Any]] = []
        for trainee in trainees:
            progress(f"{trainee.subject.name}: building, {warmup} steps to warm up")
            facts = trainee.facts()
            trainee.steps(warmup)
            found.append({"name": trainee.subject.name, "subject": trainee.subject, "facts": facts, "steps": []})
        for turn in range(repeats):
            progress(f"step {turn + 1} of {repeats}")
            for trainee, entry in zip(trainees, found, strict=True):
                entry["steps"] += trainee.steps(1)
        for trainee, entry in zip(trainees, found, strict=True):
            entry["memory"] = trainee.memory()
            if trainee.subject.processes > 1:
                entry["facts"] = trainee.facts()
            if flops:
                progress(f"{trainee.subject.name}: counting operations")
                entry["flops"] = trainee.steps(1, flops=True)[0]["flops"]
    for entry in found:
        done = entry.pop("steps")
        entry["seconds"] = [step["seconds"] for step in done]
        entry["cpu_seconds"] = [step["cpu_seconds"] for step in done]
        entry["parts"] = {
            part: median([step["parts"].get(part, 0.0) for step in done])
            for part in ORDER
            if any(part in step["parts"] for step in done)
        }
        entry["images_per_second"] = entry["facts"]["images"] / median(entry["seconds"])
        entry["spread"] = spread(entry["seconds"])
    for entry in found[1:]:
        entry["faster"] = paired_ratio(found[0]["seconds"], entry["seconds"])
        entry["faster_cpu"] = paired_ratio(found[0]["cpu_seconds"], entry["cpu_seconds"])
    return found


def parts(workload: Workload, device: torch.device, *, repeats: int) -> list[dict[str, Any]]:
    """SAM's encoder, its decoder and the students alone, forward and backward, at the experiment's batch.

    Args:
        workload: whose networks and batch.
        device: where they are measured.
        repeats: calls of each that count.
    Returns:
        For each ``name``, ``seconds`` (median), ``spread`` and ``flops``, the useful ones: attention counts once per
        pair of real tokens and real channel, whatever the kernel computes beside.
    """
    from knowsam.engine.precision import autocast, autocast_dtype, store_frozen

    method = workload.make_method().to(device).train()
    side, count = workload.image_size, workload.labelled_batch + workload.unlabelled_batch
    images = torch.rand(count, 3, side, side, device=device)
    precision = workload.options.precision

    def both_ways(forward: Callable[[], Any]) -> Callable[[], None]:
        def run() -> None:
            with autocast(device, precision):
                out = forward()
            outputs = list(out.values()) if isinstance(out, dict) else [out]
            torch.autograd.backward(outputs, [torch.ones_like(x) for x in outputs])

        return run

    measured: dict[str, Callable[[], None]] = {}
    guide: Any = None if method.sam_teacher is None else method.sam_teacher.guide
    students: Any = getattr(method, "students", None)
    if guide is not None:
        store_frozen(guide, autocast_dtype(precision))
        with torch.no_grad(), autocast(device, precision):
            embedding = guide.encode(images)
        coarse = torch.randn(count, workload.num_classes, side, side, device=device)
        measured["SAM encoder"] = both_ways(lambda: guide.encode(images).image)

        def decode() -> torch.Tensor:
            again = embedding.detach()
            again.image.requires_grad_()
            logits: torch.Tensor = guide.decode(again, coarse, side)
            return logits

        measured["SAM prompts and decoder"] = both_ways(decode)
    if students is not None:
        measured["students"] = both_ways(lambda: students(images))
    found = []
    for name, run in measured.items():
        operations = _useful_flops(run)
        if name == "SAM encoder":
            operations += _attention_flops(guide.image_encoder, count)
        times = timed(run, device, repeats)
        found.append({"name": name, "seconds": median(times), "spread": spread(times), "flops": operations})
    return found


def _useful_flops(run: Callable[[], Any]) -> int:
    """Operations of linear layers and convolutions; batched products are attention's and counted apart."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        run()
    counts = counter.get_flop_counts()["Global"]
    return sum(n for op, n in counts.items() if "bmm" not in str(op) and "attention" not in str(op))


def _attention_flops(encoder: Any, images: int) -> int:
    """Of softmax(q k^T) v over real tokens: two products forward, four backward.

    Args:
        encoder: SAM's image encoder: ``grid``, ``width``, and ``blocks`` with their ``window_size``.
        images: B.
    """
    grid, width = encoder.grid, encoder.width
    total = 0
    for block in encoder.blocks:
        window = block.window_size or grid
        sides = [min(window, grid - begin) for begin in range(0, grid, window)]
        pairs = sum((height * across) ** 2 for height in sides for across in sides)
        total += 6 * 2 * pairs * width
    return images * total


def data(workload: Workload, device: torch.device, *, batches: int = 50) -> dict[str, float]:
    """Images/s of the two streams with their augmentation, on the calling thread and on ``device``.

    Args:
        workload: whose images, streams and augmentation.
        device: where images are augmented.
        batches: how many count.
    """
    streams, augmenter = random_streams(workload), workload.make_augmenter()
    found = {}
    for name, augmented in (("read", False), ("read and augmented", True)):
        begin = time.perf_counter()
        for t, raw in enumerate(streams.loader(0, batches + 3)):
            if t == 3:
                synchronize(device)
                begin = time.perf_counter()
            raw = raw.to(device)
            if augmented:
                augmenter(raw, seed=t)
        synchronize(device)
        found[name] = batches * sum(streams.batch.values()) / (time.perf_counter() - begin)
    return found


STARTS: Mapping[str, Sequence[str]] = {
    "import knowsam": ("-c", "import knowsam"),
    "train --help": ("tools/train.py", "--help"),
    "train --print-config": ("tools/train.py", "experiments/quickstart.yaml", "--print-config"),
}


def startup(*, repeats: int) -> list[dict[str, Any]]:
    """Seconds from launch until a command has ended, and until the quick start's first step (its cache is there)."""
    found = []
    for name, arguments in STARTS.items():
        times = []
        for _ in range(repeats):
            begin = time.perf_counter()
            subprocess.run([sys.executable, *arguments], cwd=CHECKOUT, check=True, stdout=subprocess.DEVNULL)
            times.append(time.perf_counter() - begin)
        found.append({"name": name, "seconds": median(times), "spread": spread(times)})
    times = [_first_step() for _ in range(repeats + 1)][1:]  # the first fills the cache
    return [*found, {"name": "quick start, first step", "seconds": median(times), "spread": spread(times)}]


def _first_step() -> float:
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["experiments/quickstart.yaml", "train.log_every=1", f"run={Path(folder) / 'run'}"]
        begin = time.perf_counter()
        with subprocess.Popen(
            [sys.executable, "-u", "tools/train.py", *arguments],
            cwd=CHECKOUT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process:
            assert process.stdout is not None
            said = []
            for line in process.stdout:
                said.append(line)
                if line.lstrip().startswith("step "):
                    seconds = time.perf_counter() - begin
                    process.kill()
                    return seconds
    raise RuntimeError("the quick start ended before its first step:\n" + "".join(said))
