"""Golden numbers, and how a method is measured against them: the published code's where at hand, and our small ones."""

import importlib.util
import json
import os
import re
import zlib
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from knowsam import build
from knowsam.compat.keys import GUIDE, GUIDE_RULES, SAM, STUDENT_RULES, translate
from knowsam.compat.rows import ROWS
from knowsam.config import parse_config
from knowsam.data.batch import Batch

ROOT = Path(__file__).resolve().parents[2]
SMALL = Path(__file__).with_name("golden_small.npz")

# Largest deviations, as the description of the golden data states them.
EVAL = 1e-4
LOSS = 1e-3
AFTER = {"unet_logits": 5e-3, "vnet_logits": 5e-3, "image_embedding": 5e-2}  # of any element
AFTER_MEAN = {"fusion_logits": 1e-2}  # of the mean: where a student gives 0.5, XOR makes single pixels jump


def golden_folder() -> Path | None:
    """$KNOWSAM_GOLDEN, else ../shared/golden/published_code beside the checkout; None where that is not."""
    given = os.environ.get("KNOWSAM_GOLDEN")
    folder = Path(given) if given else ROOT.parent / "shared" / "golden" / "published_code"
    if given and not (folder / "golden.npz").is_file():
        raise FileNotFoundError(f"KNOWSAM_GOLDEN is {given}, which has no golden.npz")  # never skipped by a typo
    return folder if (folder / "golden.npz").is_file() else None


class Golden:
    """The published code's numbers, and files as it writes them.

    Attributes:
        arrays: golden.npz.
        num_classes, side: K and S.
        weights: initial state dicts, ``subnets`` and ``sam``, by published key.
    """

    def __init__(self, folder: Path):
        spec = importlib.util.spec_from_file_location("golden_weights", folder / "weights.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        about = json.loads((folder / "keys.json").read_text())
        self.arrays = np.load(folder / "golden.npz")
        self.num_classes, self.side = about["K"], about["S"]
        self.weights = module.state_dicts(str(folder))

    def batch(self, step: int) -> Batch:
        """The images of a step: one view, the first half labelled."""
        images = torch.from_numpy(self.arrays["images"][step]).float() / 255
        masks = torch.from_numpy(self.arrays["labels"][step]).long()
        half = len(images) // 2
        return Batch(images[:half], masks[:half], images[half:], (images[half:],))

    def config(self, published_code=True):
        """As the golden data were made: no dropout, mixing from step 4 on, 1,000 steps."""
        return experiment(published_code, self.num_classes, self.side, "mix: {start: 0.003}")

    def method(self, published_code=True):
        """A method with the initial weights; what the published code lacks is random."""
        return self.fill(build.build_method(self.config(published_code)).method)

    def fill(self, method):
        own = method.state_dict()
        state = {key: keyed(key, tensor) for key, tensor in own.items()}
        for part, rules in (("subnets", STUDENT_RULES), ("sam", GUIDE_RULES)):
            state |= translate(self.weights[part], own, rules).state
        method.load_state_dict(state)
        return method


def experiment(published_code, num_classes: int, side: int, method: str):
    """Small SAM, published students, no dropout anywhere, the published optimizers, 1,000 steps."""
    rows = published_code if isinstance(published_code, bool) else list(published_code)
    classes = ["background", *(f"class {k}" for k in range(1, num_classes))]
    return parse_config(
        f"""
published_code: {json.dumps(rows)}
data: {{classes: {json.dumps(classes)}, image_size: {side}}}
students: {{unet: {{name: unet, dropout: [0, 0, 0, 0, 0]}}, vnet: {{name: vnet}}}}
sam:
  encoder: {{name: vit_tiny, out_channels: 256}}
  tuning: [{{name: adapter}}]
  prompt: {{dropout: 0.0}}
  train: [tuning, prompt]
method: {{name: knowsam, {method}}}
train: {{max_steps: 1000}}
""",
        "golden experiment",
    )


def without(row: str) -> list[str]:
    """Every row but one."""
    return [name for name in ROWS if name != row]


def keyed(key: str, like: torch.Tensor) -> torch.Tensor:
    """A weight as a function of its name and shape, the same for whatever else a network holds; float32."""
    if not like.is_floating_point():
        return torch.zeros_like(like)
    return torch.from_numpy(_keyed(as_recorded(key), tuple(like.shape)).copy())


def as_recorded(key: str) -> str:
    """What a parameter was called when the small golden numbers were made, by knowsam 0.1."""
    key = key.replace(".network.", ".").replace("sam_teacher.guide.sam.", "sam_guide.")
    return re.sub(r"(\.adapters\.\w+)\.0\.", r"\1.", key.replace("sam_teacher.guide.", "sam_guide."))


@lru_cache(maxsize=2000)
def _keyed(key: str, shape: tuple[int, ...]) -> np.ndarray:
    noise = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(shape).astype(np.float32)
    if key.endswith(("running_var", "gaussian_matrix")):
        return 1 + 0.2 * np.abs(noise) if key.endswith("running_var") else noise
    if len(shape) < 2:
        return 1 + 0.1 * noise if key.endswith("weight") else 0.1 * noise
    if "rel_pos" in key or "embed" in key.split(".")[-1]:
        return 0.3 * noise
    # Steep output layers, so that students are sure of something, and a cut at 0.5 divides something.
    gain = 8 if "subnets" in key and ".head." in key else 1
    return gain * noise * np.float32(np.prod(shape[1:]) ** -0.5)


@torch.no_grad()
def forward(method, images: torch.Tensor, stride: int = 1) -> dict[str, np.ndarray]:
    """Every quantity that the golden data hold of a forward pass, in eval mode; every ``stride``-th pixel."""
    method.eval()
    guide = method.sam_teacher.guide
    logits = method.students(images)
    embedding = guide.encode(images)
    prompts = replace(guide.prompts(embedding), masks=logits["fusion"])
    low = guide.sam.decode(embedding, prompts).low_res[:, :, 0]  # (B, K, 4E, 4E)
    full = guide(images, logits["fusion"])
    found = {
        "unet_logits": logits["unet"][..., ::stride, ::stride],
        "vnet_logits": logits["vnet"][..., ::stride, ::stride],
        "fusion_logits": logits["fusion"][..., ::stride, ::stride],
        "image_embedding": embedding.image,
        "prompt_tokens": prompts.sparse.transpose(0, 1),
        "sam_low_res_logits": low,
        "sam_logits": full[..., ::stride, ::stride],
    }
    return {name: value.numpy() for name, value in found.items()}


def train(method, config, batches, first_step: int = 0):
    """Optimizer steps as the engine does them; yields each step's terms, monitors and the learning rates it used."""
    optimizers = build.build_optimizers(config, method)
    method.train()
    for step, batch in enumerate(batches, start=first_step):
        rates = {f"lr_{name}": item.set_lr(step, config.train.max_steps) for name, item in optimizers.items()}
        out = method(batch, step)
        for item in optimizers.values():
            item.optimizer.zero_grad(set_to_none=True)
        torch.stack(list(out.losses.values())).sum().backward()
        for item in optimizers.values():
            item.optimizer.step()
        yield {name: value.item() for name, value in {**out.losses, **out.monitors}.items()} | rates


def published_row(step: int, terms: dict[str, float], following: dict[str, float]) -> np.ndarray:
    """Terms of ours as a row of ``step_losses``; ``following`` are the learning rates after the step."""
    losses = {
        name: value
        for name, value in terms.items()
        if name == "sam" or name.split("_")[0] in ("seg", "skd", "entropy", "consistency", "mix")
        if name not in ("skd_weight", "consistency_weight")
    }
    unmixed = [v for name, v in losses.items() if name.endswith(("_unet", "_vnet")) and not name.startswith("mix")]
    objective = sum(losses.values()) - losses["sam"]
    return np.array(
        [
            step,
            losses["sam"],
            following["sam"],
            objective,
            sum(unmixed),
            losses["seg_fusion"],
            following["subnets"],
        ]
    )


def rates_after(config, method, step: int) -> dict[str, float]:
    """Learning rates that the next step uses."""
    optimizers = build.build_optimizers(config, method)
    return {name: item.set_lr(step + 1, config.train.max_steps) for name, item in optimizers.items()}


# ---------------------------------------------------------------- our own small golden data

SMALL_CLASSES, SMALL_SIDE, SMALL_STRIDE = 4, 64, 8
# In mid-climb of every ramp, mixing in the second step; small updates, as these magnify other machines' rounding.
SMALL_STEPS, SMALL_METHOD = (300, 301), "mix: {start: 0.3}"


def small_config(published_code):
    config = experiment(published_code, SMALL_CLASSES, SMALL_SIDE, SMALL_METHOD)
    config.optim["subnets"]["lr"], config.optim["sam"]["lr"] = 1e-3, 1e-5
    return config


def small_method(config):
    """A method with weights by name."""
    method = build.build_method(config).method
    method.load_state_dict({key: keyed(first_name(key), tensor) for key, tensor in method.state_dict().items()})
    return method


def first_name(key: str) -> str:
    """What a weight was called when the golden numbers were made: the weights that they are of are made of names."""
    key = key.replace(f"{SAM}.", f"{GUIDE}.", 1)
    return re.sub(r"\.adapters\.(\w+)\.0\.", r".adapters.\1.", key)


def small_batch(step: int) -> Batch:
    """2 + 2 images of coloured disks on a gradient, K = 4, with unlike weak and strong views."""
    draws = np.random.RandomState(step)
    y, x = np.mgrid[:SMALL_SIDE, :SMALL_SIDE] / SMALL_SIDE
    images = np.empty((4, 3, SMALL_SIDE, SMALL_SIDE), np.float32)
    masks = np.zeros((4, SMALL_SIDE, SMALL_SIDE), np.int64)
    for image, mask in zip(images, masks, strict=True):
        image[:] = (0.3 + 0.4 * draws.rand(3, 1, 1) * x)[:]
        for k in range(1, SMALL_CLASSES):
            centre, radius = draws.rand(2), 0.1 + 0.15 * draws.rand()
            inside = (y - centre[0]) ** 2 + (x - centre[1]) ** 2 < radius**2
            mask[inside] = k
            image[:, inside] = draws.rand(3, 1)
    noise = 0.1 * draws.rand(2, 3, SMALL_SIDE, SMALL_SIDE).astype(np.float32)
    weak = torch.from_numpy(images[2:])
    strong = 0.9 - 0.8 * weak + torch.from_numpy(noise)  # unlike enough for SAM to answer otherwise
    return Batch(torch.from_numpy(images[:2]), torch.from_numpy(masks[:2]), weak, (strong,))


def small_forward(method) -> dict[str, np.ndarray]:
    return {f"eval_{k}": v for k, v in forward(method, small_batch(0).labelled, SMALL_STRIDE).items()}


def small_train(method, config, steps: int = len(SMALL_STEPS)) -> dict[str, float]:
    """Every term of every step, by ``<step>_<name>``, but for what counts pixels by their argmax: they may flip."""
    batches = [small_batch(step) for step in SMALL_STEPS[:steps]]
    found = {}
    for step, terms in zip(SMALL_STEPS, train(method, config, batches, SMALL_STEPS[0]), strict=False):
        found |= {f"{step}_{name}": value for name, value in terms.items() if name != "sam_agreement"}
    return found


def too_far(found: dict, golden: dict) -> dict[str, float]:
    """Name -> deviation of what is further from the golden numbers than is allowed; a name that one side lacks is.

    Forward passes may differ by 1e-4; what follows the XOR at 0.5 by that in the mean, as on another machine a pixel
    may fall on the other side. Losses may differ by 1e-4 relative, learning rates and ramps by rounding.
    """
    far = {}
    for name in {**found, **golden}:
        if name not in found or name not in golden:
            far[name] = float("inf")
            continue
        ours, theirs = np.asarray(found[name], np.float64), np.asarray(golden[name], np.float64)
        if ours.shape != theirs.shape:
            far[name] = float("inf")
            continue
        deviation = np.abs(ours - theirs)
        if not name.startswith("eval_"):
            exact = "_lr_" in name or name.endswith(("skd_weight", "consistency_weight"))
            error, allowed = float(deviation / max(abs(theirs), 1e-12)), 1e-6 if exact else 1e-4
        else:
            error, allowed = float(deviation.mean() if "fusion" in name or "sam" in name else deviation.max()), EVAL
        if not error <= allowed:
            far[name] = error
    return far
