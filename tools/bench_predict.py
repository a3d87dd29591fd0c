"""What prediction costs beside the network: python tools/bench_predict.py --images 1000 --threads 1.

Compares images/s of `knowsam predict` (reading PNGs, the network, writing masks) with those of the bare network on
batches of the same size, in turn, several times. The networks have their default size and random weights.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # works in a checkout that is not installed


def measure(
    folder: Path,
    *,
    images: int = 1000,
    size: int = 256,
    batch_size: int = 8,
    repeats: int = 3,
    device: str = "cpu",
    precision: str = "fp32",
    workers: int = 2,
    threads: int = 0,
    say=print,
) -> float:
    """Images/s of predicting files over those of the bare network, the median of both.

    Args:
        folder: empty; images and masks go below it.
        images: how many files, all of the same content.
        size: side of the images and of the network's input, pixels; divisible by 16.
        batch_size: images at a time.
        repeats: how often both are measured, in turn.
        device, precision: where and how the network computes.
        workers: threads that read, and as many that write.
        threads: of the network on a CPU; torch's choice if 0.
        say: what is told how each repeat went.
    """
    import torch

    from knowsam import build
    from knowsam.config import load_config
    from knowsam.data.builtin import BuiltIn
    from knowsam.engine.train import autocast_dtype
    from knowsam.inference.files import Rules, find_inputs
    from knowsam.inference.folder import Wanted, predict_files
    from knowsam.models.students import DeployedStudents

    if threads:
        torch.set_num_threads(threads)
    config = load_config(ROOT / "experiments" / "base" / "published.yaml", [f"data.image_size={size}"])
    network = DeployedStudents(build.build_students(config)).to(device).eval()
    autocast = autocast_dtype(precision)
    files = _write_images(folder / "images", BuiltIn(train=4, val=1, test=1, size=size), images)
    batch = torch.rand(batch_size, 3, size, size, device=device)

    def bare() -> float:
        begin = time.perf_counter()
        with torch.no_grad(), torch.autocast(torch.device(device).type, dtype=autocast, enabled=autocast is not None):
            for _ in range(0, images, batch_size):
                network(batch).sum().item()  # on a GPU, waits for the answer
        return time.perf_counter() - begin

    def predict(repeat: int) -> float:
        begin = time.perf_counter()
        outcome = predict_files(
            lambda x: {"fusion": network(x)},
            find_inputs(files, Rules()),
            folder / f"out{repeat}",
            Wanted(config.data.classes),
            workers=workers,
            image_size=size,
            batch_size=batch_size,
            device=device,
            autocast=autocast,
        )
        assert outcome.done == images
        return time.perf_counter() - begin

    bare_images, images_asked = [], images
    images = min(images, 4 * batch_size)
    bare()  # warm up
    images = images_asked
    whole_images = []
    for repeat in range(repeats):
        bare_images.append(-(-images // batch_size) * batch_size / bare())
        whole_images.append(images / predict(repeat))
        say(
            f"repeat {repeat + 1}: network {bare_images[-1]:.1f}, prediction {whole_images[-1]:.1f} images/s, "
            f"ratio {whole_images[-1] / bare_images[-1]:.3f}"
        )
    network_speed, speed = statistics.median(bare_images), statistics.median(whole_images)
    say(f"median: network {network_speed:.1f}, prediction {speed:.1f} images/s, ratio {speed / network_speed:.3f}")
    return speed / network_speed


def _write_images(folder: Path, source, count: int) -> Path:
    """Generated pictures as PNGs, again and again the same few."""
    from PIL import Image

    folder.mkdir()
    ids = source.train_ids()
    for n in range(count):
        Image.fromarray(source.image(ids[n % len(ids)])).save(folder / f"{n:05d}.png")
    return folder


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--size", type=int, default=256, help="pixels")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--workers", type=int, default=2, help="threads that read, and as many that write")
    parser.add_argument("--threads", type=int, default=0, help="of the network on a CPU; 0: torch's choice")
    with tempfile.TemporaryDirectory() as folder:
        measure(Path(folder), **vars(parser.parse_args()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
