"""knowsam: semi-supervised medical image segmentation with the Segment Anything Model.

For example::

    run = knowsam.train("experiments/quickstart.yaml", train__seed=1)
    mask = knowsam.load_run("runs/kvasir").predict("image.png")
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from knowsam.api import train
    from knowsam.runs import LoadedRun, load_run

__version__ = "0.2.0"
__all__ = ["LoadedRun", "__version__", "load_run", "train"]

# Loaded when asked for: whoever only asks for help or for the version does not wait for torch.
_PLACES = {"train": "knowsam.api", "load_run": "knowsam.runs", "LoadedRun": "knowsam.runs"}


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        import importlib

        return getattr(importlib.import_module(_PLACES[name]), name)
    raise AttributeError(f"module 'knowsam' has no attribute {name!r}")
