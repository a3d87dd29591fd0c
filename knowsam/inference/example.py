"""The script that is written beside an exported network: how to run it without knowsam."""

import json
from collections.abc import Mapping
from typing import Any

from knowsam.errors import ConfigError

_OPEN = {
    "onnx": (
        "onnxruntime",
        """session = onnxruntime.InferenceSession(str(Path(__file__).with_name({model})))
about = json.loads(session.get_modelmeta().custom_metadata_map["knowsam"])""",
        '[output] = session.run(None, {{"image": image[None]}})[0]',
    ),
    "pt2": (
        "torch",
        """extra = {{"knowsam.json": ""}}
network = torch.export.load(Path(__file__).with_name({model}), extra_files=extra).module()
about = json.loads(extra["knowsam.json"])""",
        "[output] = network(torch.from_numpy(image[None])).detach().numpy()",
    ),
    "torchscript": (
        "torch",
        """extra = {{"knowsam.json": ""}}
network = torch.jit.load(Path(__file__).with_name({model}), _extra_files=extra)
about = json.loads(extra["knowsam.json"])""",
        "[output] = network(torch.from_numpy(image[None])).detach().numpy()",
    ),
}

_EIGHT_BITS = """if picture.mode[0] in "IF":
    sys.exit("more than 8 bits a pixel: bring the values to 0..255 as the training did")
picture = picture.convert("RGB")
small = [np.asarray(place(plane), dtype=np.float32) / 255 for plane in picture.split()]"""
# What training did with values of any depth: (low, high) become 0 and 1.
_ANY_DEPTH = """values = np.asarray(picture if picture.mode[0] in "IF" else picture.convert("RGB"), dtype=np.float64)
values = np.repeat(values[..., None], 3, axis=-1) if values.ndim == 2 else values
levels = np.zeros(values.shape, np.float32)
for c in range(3):
    seen = {seen}
    low, high = {window}{otherwise}
    if high > low:
        levels[..., c] = np.rint(np.clip((values[..., c] - low) * (65535 / (high - low)), 0, 65535))
small = [np.rint(place(Image.fromarray(plane))) / 65535 for plane in levels.transpose(2, 0, 1)]"""
_PLACE = {
    "squash": """place = lambda plane: plane.resize((side, side), Image.Resampling.BILINEAR)
back = lambda plane: plane.resize(picture.size, Image.Resampling.BILINEAR)""",
    "letterbox": """scale = side / max(picture.size)
width, height = (max(1, round(n * scale)) for n in picture.size)
left, top = (side - width) // 2, (side - height) // 2


def place(plane):
    square = Image.new(plane.mode, (side, side))
    square.paste(plane.resize((width, height), Image.Resampling.BILINEAR), (left, top))
    return square


def back(plane):
    return plane.crop((left, top, left + width, top + height)).resize(picture.size, Image.Resampling.BILINEAR)""",
}

_SCRIPT = '''"""Segment {kind}: python {name} PICTURE MASK.png. Needs numpy, pillow, {library}."""

import json
import sys
from pathlib import Path

import numpy as np
import {library}
from PIL import Image

{open}
side = about["image_size"]
picture = Image.open(sys.argv[1])

{place}
{read}
image = np.stack(small).astype(np.float32)  # (3, side, side) in 0..1
{run}  # (K, side, side)
whole = [back(Image.fromarray(plane)) for plane in output]
mask = np.argmax([np.asarray(plane) for plane in whole], axis=0).astype(np.uint8)  # class ids, (H, W)
Image.fromarray(mask).save(sys.argv[2])
for k, name in enumerate(about["classes"]):
    print(f"{{name}}: {{(mask == k).mean():.1%}} of the picture")
'''


def example_script(
    file_format: str, *, model: str, name: str, intensity: Mapping[str, Any] | None = None, fit: str = "squash"
) -> str:
    """Source text of the script.

    Args:
        file_format: of the exported network.
        model: name of its file, in the script's folder.
        name: of the script itself.
        intensity: how training prepared values, ``Intensity.state()``; None: as they are.
        fit: how images came to the network's size, see ``sizing.Fit``.
    """
    library, opening, running = (part.format(model=json.dumps(model)) for part in _OPEN[file_format])
    window = _window({"class": "AsIs"} if intensity is None else intensity)
    return _SCRIPT.format(
        name=name,
        library=library,
        open=opening,
        run=running,
        place=_PLACE[fit],
        kind="an 8-bit picture" if window is None else "a picture",
        read=_EIGHT_BITS if window is None else _ANY_DEPTH.format(**window),
    )


def _window(state: Mapping[str, Any]) -> dict[str, str] | None:
    """Python for the values that become 0 and 1, and for those that they are taken from; None: 8 bits as they are."""

    def parts(window: str, seen: str = "None", otherwise: str = "") -> dict[str, str]:
        return {"window": window, "seen": seen, "otherwise": otherwise}

    kind = state["class"]
    if kind == "AsIs":
        return None if not state.get("white") else parts(f"0.0, {float(state['white'])!r}")
    if kind == "Window":
        return parts(f"{state['low']!r}, {state['high']!r}")
    if state["fitted"]:
        windows = state["fitted"]["windows"]
        return parts(f"{windows!r}[{'c' if len(windows) > 1 else '0'}]")
    seen = "values[..., c]" if state["per_channel"] else "values"
    if kind == "ZScore":
        chosen = "seen[seen != 0]" if state["nonzero"] else "seen"
        clip = state["clip"]
        return parts(f"{chosen}.mean() - {clip} * {chosen}.std(), {chosen}.mean() + {clip} * {chosen}.std()", seen)
    if kind == "Percentile":
        constant = "\n    if high <= low:\n        low, high = seen.min(), seen.max()"
        return parts(f"np.percentile(seen, ({state['low']}, {state['high']}))", seen, constant)
    if kind == "MinMax":
        return parts("seen.min(), seen.max()", seen)
    raise ConfigError(
        f"intensity {kind} is not one of knowsam's own: no script can be written for it", hint="Leave --example out."
    )
