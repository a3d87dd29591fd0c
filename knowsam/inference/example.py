"""The script that is written beside an exported network: how to run it without knowsam."""

import json

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

# 8-bit pictures as they are; what else training did with values of any depth.
_READ = {
    "dtype": """if picture.mode[0] in "IF":
    sys.exit("more than 8 bits a pixel: bring the values to 0..255 as the training did")
picture = picture.convert("RGB")""",
    "minmax": """low, high = values.min(), values.max()  # to 0..255, as training did with every picture
picture = Image.fromarray(np.rint((values - low) / max(high - low, 1e-6) * 255).astype(np.uint8)).convert("RGB")""",
    "percentile": """low, high = np.percentile(values, (0.5, 99.5))  # to 0..255, as training did with every picture
if high <= low:
    low, high = values.min(), values.max()
values = np.rint(np.clip((values - low) / max(high - low, 1e-6), 0, 1) * 255)
picture = Image.fromarray(values.astype(np.uint8)).convert("RGB")""",
}
_VALUES = """deep = picture.mode[0] in "IF"
values = np.asarray(picture if deep else picture.convert("RGB"), dtype=np.float32)
"""

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
{read}
small = picture.resize((side, side), Image.Resampling.BILINEAR)
image = np.asarray(small, dtype=np.float32).transpose(2, 0, 1) / 255  # (3, side, side) in 0..1
{run}  # (K, side, side)
whole = [Image.fromarray(plane).resize(picture.size, Image.Resampling.BILINEAR) for plane in output]
mask = np.argmax([np.asarray(plane) for plane in whole], axis=0).astype(np.uint8)  # class ids, (H, W)
Image.fromarray(mask).save(sys.argv[2])
for k, name in enumerate(about["classes"]):
    print(f"{{name}}: {{(mask == k).mean():.1%}} of the picture")
'''


def example_script(file_format: str, *, model: str, name: str, intensity: str = "dtype") -> str:
    """Source text of the script.

    Args:
        file_format: of the exported network.
        model: name of its file, in the script's folder.
        name: of the script itself.
        intensity: how training brought values to 0..255, see ``readers.to_uint8``.
    """
    library, opening, running = (part.format(model=json.dumps(model)) for part in _OPEN[file_format])
    kind, values = ("an 8-bit picture", "") if intensity == "dtype" else ("a picture", _VALUES)
    read = values + _READ[intensity]
    return _SCRIPT.format(name=name, library=library, open=opening, run=running, kind=kind, read=read)
