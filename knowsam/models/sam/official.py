"""segment-anything's modules, importable without a working torchvision.

The package's ``__init__`` also imports its predictor and automatic mask generator, and these import torchvision. We
need neither. Everybody in this project takes segment-anything's classes from here.
"""

import importlib
import importlib.util
import sys


def register_without_init(name: str) -> None:
    """Put package ``name`` into ``sys.modules`` without running its ``__init__``; then its submodules can be imported.

    The parent has to stay there, or pickling a class of a submodule fails.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    spec = importlib.util.find_spec(name)  # finds a top-level package, does not run it
    if spec is None:
        raise ModuleNotFoundError(f"{name} is not installed; it is a requirement of knowsam: pip install {name}==1.0")
    package = importlib.util.module_from_spec(spec)
    sys.modules[name] = package
    # An earlier, failed import leaves the submodules that it finished in sys.modules, but no longer bound to a parent.
    for key, module in list(sys.modules.items()):
        parent, _, child = key.rpartition(".")
        if parent == name:
            setattr(package, child, module)


def import_segment_anything() -> None:
    """Import segment_anything normally if that works, else without its ``__init__``."""
    try:
        importlib.import_module("segment_anything")
    # No torchvision is an ImportError; one built for another torch raises RuntimeError, AttributeError or OSError,
    # depending on the pair. If segment-anything itself is at fault, the imports below say so.
    except Exception:
        register_without_init("segment_anything")


import_segment_anything()

from segment_anything.modeling.common import LayerNorm2d, MLPBlock  # noqa: E402
from segment_anything.modeling.image_encoder import (  # noqa: E402
    Attention,
    Block,
    ImageEncoderViT,
    window_partition,
    window_unpartition,
)
from segment_anything.modeling.mask_decoder import MaskDecoder  # noqa: E402
from segment_anything.modeling.prompt_encoder import PromptEncoder  # noqa: E402
from segment_anything.modeling.transformer import TwoWayAttentionBlock, TwoWayTransformer  # noqa: E402

__all__ = [
    "Attention",
    "Block",
    "ImageEncoderViT",
    "LayerNorm2d",
    "MLPBlock",
    "MaskDecoder",
    "PromptEncoder",
    "TwoWayAttentionBlock",
    "TwoWayTransformer",
    "window_partition",
    "window_unpartition",
]
