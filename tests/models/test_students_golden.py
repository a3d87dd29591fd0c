"""U-Net and V-Net against outputs of the published code, where its golden data are at hand."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from knowsam.models.unet import UNet
from knowsam.models.vnet import VNet

GOLDEN = Path(__file__).parents[2] / ".." / "shared" / "golden" / "published_code"
LEVELS = ["one", "two", "three", "four", "five"]
RISE = ["six", "seven", "eight", "nine"]


@pytest.fixture(scope="module")
def golden():
    if not (GOLDEN / "golden.npz").is_file():
        pytest.skip("the golden data of the published code are not here")
    spec = importlib.util.spec_from_file_location("golden_weights", GOLDEN / "weights.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return np.load(GOLDEN / "golden.npz"), module.state_dicts(str(GOLDEN))["subnets"]


def unet_key(key):
    part, *rest = key.split(".")
    if part == "head":
        return f"UNet.out_conv.{rest[0]}"
    level, tail = int(rest[0]), ".".join(rest[1:])
    if part == "up":
        return f"UNet.up{level + 1}.up.{tail}"
    if part == "decoder":
        return f"UNet.up{level + 1}.conv.conv_conv.{tail}"
    return f"UNet.in_conv.conv_conv.{tail}" if level == 0 else f"UNet.down{level}.maxpool_conv.1.conv_conv.{tail}"


def vnet_key(key):
    part, *rest = key.split(".")
    if part == "head":
        return f"VNet.out_conv.{rest[0]}"
    if part == "stem":
        return f"VNet.block_one.conv.{rest[0]}.{rest[1]}"
    level, unit, tail = int(rest[0]), int(rest[1]), rest[2]
    # Ours has convolution, norm, ReLU per unit, theirs convolution and ReLU.
    block = {
        "down": f"{LEVELS[level]}_dw",
        "encoder": LEVELS[(level + 1) % 5],
        "up": f"{['five', *RISE][level]}_up",
        "decoder": RISE[level % 4],
    }[part]
    return f"VNet.block_{block}.conv.{unit // 3 * 2}.{tail}"


@pytest.mark.parametrize(("build", "translate", "output"), [(UNet, unet_key, "unet"), (VNet, vnet_key, "vnet")])
def test_equal_to_the_published_code(golden, build, translate, output):
    arrays, published = golden
    network = build(2).eval()
    network.load_state_dict({key: published[translate(key)] for key in network.state_dict()})
    images = torch.from_numpy(arrays["images"][0, :2]).float() / 255
    with torch.no_grad():
        logits = network(images)
    torch.testing.assert_close(logits, torch.from_numpy(arrays[f"eval_{output}_logits"]), rtol=0, atol=1e-4)
