"""The script beside an exported network does with a picture what training did."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from knowsam.data.readers import read_image
from knowsam.inference.example import example_script


class Bright(torch.nn.Module):
    """Class 1 where red is above one half."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        red = image[:, :1]
        return torch.cat([1 - red, red], 1)


@pytest.mark.parametrize("intensity", ["dtype", "minmax", "percentile"])
def test_the_script_reads_as_training_did(tmp_path, intensity):
    about = {"image_size": 64, "classes": ["dark", "bright"]}
    torch.jit.save(torch.jit.script(Bright()), tmp_path / "net.pt", _extra_files={"knowsam.json": json.dumps(about)})
    script = example_script("torchscript", model="net.pt", name="x.py", intensity=intensity)
    (tmp_path / "x.py").write_text(script)
    ramp = np.linspace(40, 120, 64 * 64).reshape(64, 64)
    ramp[0, 0] = 255  # alone: minmax heeds it, percentiles do not
    Image.fromarray(ramp.astype(np.uint8)).save(tmp_path / "grey.png")
    Image.fromarray(np.stack([ramp, ramp / 2, ramp / 3], -1).astype(np.uint8)).save(tmp_path / "colour.png")
    Image.fromarray((ramp * 100).astype(np.uint16)).save(tmp_path / "deep.png")
    shares = set()
    for name in ("grey", "colour", "deep"):
        words = [sys.executable, "x.py", f"{name}.png", f"{name}_mask.png"]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
        if (name, intensity) == ("deep", "dtype"):
            assert done.returncode == 1 and "more than 8 bits a pixel" in done.stderr
            continue
        assert done.returncode == 0, done.stderr
        mask = np.asarray(Image.open(tmp_path / f"{name}_mask.png"))
        wanted = read_image(tmp_path / f"{name}.png", intensity)[..., 0] > 127
        assert (mask == wanted).all(), name
        shares.add(round(float(wanted.mean()), 3))
    assert (max(shares) > 0.3) == (intensity == "percentile"), "the intensities differ"
