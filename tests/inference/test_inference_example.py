"""The script beside an exported network does with a picture what training did."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from knowsam import io
from knowsam.data.case import Case
from knowsam.data.intensity import AsIs, MinMax, Percentile, Preparation, Window, ZScore
from knowsam.inference.example import example_script
from knowsam.inference.predict import segment


class Bright(torch.nn.Module):
    """Class 1 where red is above one half."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        red = image[:, :1]
        return torch.cat([1 - red, red], 1)


RULES = {
    "as_is": AsIs(),
    "minmax": MinMax(),
    "percentile": Percentile(),
    "channels apart": MinMax(per_channel=True),
    "zscore": ZScore(clip=2),
    "window": Window(low=31, high=130),
}


@pytest.mark.parametrize("fit", ["squash", "letterbox"])
@pytest.mark.parametrize("intensity", RULES)
def test_the_script_reads_as_training_did(tmp_path, intensity, fit):
    rule = RULES[intensity]
    about = {"image_size": 64, "classes": ["dark", "bright"]}
    torch.jit.save(torch.jit.script(Bright()), tmp_path / "net.pt", _extra_files={"knowsam.json": json.dumps(about)})
    script = example_script("torchscript", model="net.pt", name="x.py", intensity=rule.state(), fit=fit)
    (tmp_path / "x.py").write_text(script)
    ramp = np.linspace(40, 120, 64 * 64).reshape(64, 64)
    ramp[0, 0] = 255  # alone: minmax heeds it, percentiles do not
    ramp = np.repeat(ramp[:48], 1, axis=0) if fit == "letterbox" else ramp
    Image.fromarray(ramp.astype(np.uint8)).save(tmp_path / "grey.png")
    Image.fromarray(np.stack([ramp, ramp / 2, ramp / 3], -1).astype(np.uint8)).save(tmp_path / "colour.png")
    Image.fromarray((ramp * 100).astype(np.uint16)).save(tmp_path / "deep.png")
    shares = set()
    for name in ("grey", "colour", "deep"):
        words = [sys.executable, "x.py", f"{name}.png", f"{name}_mask.png"]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
        if (name, intensity) == ("deep", "as_is"):
            assert done.returncode == 1 and "more than 8 bits a pixel" in done.stderr
            continue
        assert done.returncode == 0, done.stderr
        mask = np.asarray(Image.open(tmp_path / f"{name}_mask.png"))
        stored = io.read_image(tmp_path / f"{name}.png")
        levels = Preparation(rule)(Case(stored.array, full_range=stored.full_range))
        [(_, said)] = predict_cases_of(levels, fit)
        assert (mask == said).all(), name
        shares.add(float(mask.mean()))
    assert any(0 < share < 1 for share in shares)


def predict_cases_of(levels, fit):
    return segment(
        lambda x: {"net": Bright()(x)}, [("x", lambda: levels)], image_size=64, batch_size=1, device="cpu", fit=fit,
        then=lambda case, image, found: found["net"].labels,
    )  # fmt: skip
