"""The measurements of a trained network in use: alone, predicting files, and being evaluated."""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from knowsam.benchmark.measure import median, paired_ratio, spread, timed
from knowsam.benchmark.workload import Workload
from knowsam.data.builtin import BuiltIn
from knowsam.data.case import Case


def inference(
    workload: Workload, device: torch.device, *, repeats: int, batch_sizes: Sequence[int] = (1, 4, 16)
) -> list[dict[str, Any]]:
    """The deployed network alone: seconds a batch and images/s, by precision and batch size.

    Args:
        workload: whose deployed network it is.
        device: of the network.
        repeats: batches that count.
        batch_sizes: images at a time, (B, 3, S, S) each.
    """
    from knowsam.engine.precision import autocast

    side = workload.image_size
    network = workload.make_method().inference_model().to(device).eval()
    found = []
    for precision in ("fp32", "bf16"):
        for size in batch_sizes:
            images = torch.rand(size, 3, side, side, device=device)

            def run(images: torch.Tensor = images, precision: str = precision) -> None:
                with torch.no_grad(), autocast(device, precision):
                    network(images)

            times = timed(run, device, repeats)
            row = {"precision": precision, "batch": size, "seconds": median(times), "spread": spread(times)}
            found.append(row | {"images_per_second": size / median(times)})
    return found


def prediction(
    workload: Workload,
    device: torch.device,
    *,
    repeats: int,
    images: int = 200,
    batch_size: int = 8,
    workers: int = 2,
    progress: Callable[[str], None] = lambda text: None,
) -> list[dict[str, Any]]:
    """``predict`` on PNGs of the network's size, and ``evaluate`` without and with distances, beside the bare network.

    Each turn measures one of each on as many images in batches of the same size: what is missing to a ratio of 1 is
    reading, writing and scoring. The network has random weights; scored is a disc in each image, as the speckle of
    a random network would make distances slower than any trained one's.

    Args:
        workload: whose deployed network it is.
        device: of the network.
        repeats: turns.
        images: how many; they repeat four pictures.
        batch_size: images at a time.
        workers: threads that read files, and as many that write.
        progress: called with a line about what goes on.
    Returns:
        For each ``name``, ``images_per_second`` (median), ``spread``, and but for the first ``of_network``: median,
        smallest and largest of its speed over the bare network's, turn by turn.
    """
    from knowsam.data.intensity import Preparation
    from knowsam.engine.evaluate import evaluate
    from knowsam.engine.precision import autocast, autocast_dtype
    from knowsam.inference.files import find_inputs
    from knowsam.inference.folder import Wanted, predict_files
    from knowsam.io import Reading

    side, num_classes, precision = workload.image_size, workload.num_classes, workload.options.precision
    network = workload.make_method(sam=False).inference_model().to(device).eval()
    source = _FewPictures(images, side, num_classes)
    disc = _disc(side, num_classes).to(device)
    settings: dict[str, Any] = {
        "image_size": side,
        "batch_size": batch_size,
        "device": device,
        "autocast": autocast_dtype(precision),
    }

    def discs(x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"fusion": 0 * network(x) + disc}

    def bare() -> None:
        batch = torch.rand(batch_size, 3, side, side, device=device)
        with torch.no_grad(), autocast(device, precision):
            for _ in range(0, images, batch_size):
                network(batch).sum().item()  # on a GPU, waits for the result

    with tempfile.TemporaryDirectory() as folder:
        files = source.write(Path(folder) / "images")

        def predict() -> None:
            classes = [f"class {k}" for k in range(num_classes)]
            with tempfile.TemporaryDirectory(dir=folder) as out:
                found = find_inputs(files, Reading())
                outcome = predict_files(
                    discs, found, out, Wanted(classes), preparation=Preparation(), workers=workers, **settings
                )
            assert outcome.done == images, outcome.failed[:1]

        subjects: dict[str, Callable[[], Any]] = {
            "network alone": bare,
            "predict": predict,
            "evaluate, overlap alone": lambda: evaluate(discs, source, "test", distances=False, **settings),
            "evaluate, all metrics": lambda: evaluate(discs, source, "test", **settings),
        }
        seconds: dict[str, list[float]] = {name: [] for name in subjects}
        for turn in range(repeats):
            progress(f"prediction, turn {turn + 1} of {repeats}")
            for name, run in subjects.items():
                seconds[name] += timed(run, device, 1, warmup=0)
    found = []
    whole = -(-images // batch_size) * batch_size  # the bare network's last batch is full
    for name, times in seconds.items():
        count = whole if name == "network alone" else images
        row: dict[str, Any] = {"name": name, "images_per_second": count / median(times), "spread": spread(times)}
        if name != "network alone":
            ratios = paired_ratio(seconds["network alone"], times)
            row["of_network"] = tuple(ratio * images / whole for ratio in ratios)
        found.append(row)
    return found


class _FewPictures(BuiltIn):
    """The built-in dataset, whose test cases repeat the same four pictures."""

    def __init__(self, count: int, side: int, num_classes: int) -> None:
        super().__init__(num_classes=num_classes, train=1, val=1, test=count, size=side)
        self._four = self.eval_ids("test")[:4]
        for case in self._four:  # drawn here, and from now on in memory
            self.image(case)

    def case(self, case_id: str) -> Case:
        return super().case(self._one_of_four(case_id))

    def mask(self, case_id: str) -> NDArray[np.uint8]:
        return super().mask(self._one_of_four(case_id))

    def _one_of_four(self, case_id: str) -> str:
        return self._four[int(case_id.rpartition("_")[2]) % len(self._four)]

    def write(self, folder: Path) -> Path:
        from PIL import Image

        folder.mkdir()
        for case in self.eval_ids("test"):
            Image.fromarray(self.image(case)).save(folder / f"{case}.png")
        return folder


def _disc(side: int, num_classes: int) -> torch.Tensor:
    """Logits (K, S, S) of class 1 in a disc, background around it."""
    place = torch.arange(side) - side / 2
    inside = (place[:, None] ** 2 + place**2 < (side / 4) ** 2).float()
    logits = torch.zeros(num_classes, side, side)
    logits[0], logits[1] = 8 * (1 - inside), 8 * inside
    return logits
