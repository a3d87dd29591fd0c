"""A trained run from its folder: what evaluate, predict and export start from, and what a script may use.

For example::

    import knowsam

    run = knowsam.load_run("runs/kvasir")
    mask = run.predict("image.png")  # or an array: class ids at the image's own size
"""

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from knowsam.config import Config, parse_config
from knowsam.engine.runfolder import RunFolder
from knowsam.errors import CheckpointError, ConfigError, DataError, NotFoundError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from knowsam.build import BuiltMethod
    from knowsam.data.intensity import Preparation
    from knowsam.inference.predict import Segmentation
    from knowsam.methods.base import SSLMethod


@dataclass
class LoadedRun:
    """A run and the networks of one of its checkpoints.

    Attributes:
        run: the folder.
        path: the checkpoint's file.
        config: the configuration that is stored with the weights.
        step: optimizer updates done; None when it was converted and nobody knows.
        best: what chose ``best.pt``; may be empty.
        method: with the checkpoint's weights, on the CPU.
        preparation: from stored values to what the networks see, as in training.
        device: where :meth:`predict` computes.
    """

    run: RunFolder
    path: Path
    config: Config
    step: int | None
    best: dict[str, Any]
    method: "SSLMethod"
    preparation: "Preparation"
    device: str = field(default="cpu")

    def __repr__(self) -> str:
        return f"LoadedRun({self.run}, {self.path.name} of step {self.step}, outputs {', '.join(self.outputs)})"

    @property
    def outputs(self) -> tuple[str, ...]:
        """Outputs that can be predicted with, the deployed one first."""
        return tuple(self.method.networks())

    @property
    def classes(self) -> tuple[str, ...]:
        """K names, background first: class id -> name."""
        return tuple(self.config.data.classes)

    def origin(self) -> dict[str, Any] | None:
        """Which weights these are and how they were chosen: ``file``, ``step``, ``outputs`` (all that they have),
        ``chosen_by``, ``split``, ``value``.

        None for a converted checkpoint, of which nothing is known.
        """
        if self.step is None:
            return None
        about = {"file": self.path.name, "step": self.step, "outputs": list(self.method.outputs())}
        if self.path.name != "best.pt":
            return {**about, "chosen_by": "last step", "split": None, "value": None}
        by = f"validation Dice of {self.method.outputs()[0]}, mean over classes"
        return {**about, "chosen_by": by, "split": "val", "value": self.best["dice"]}

    def network(self, output: str | None = None) -> "tuple[str, nn.Module]":
        """The name of a deployed output, and its network in eval mode: (B, 3, S, S) in 0..1 -> logits (B, K, S, S).

        Args:
            output: one that needs no SAM; the first if None.
        Raises:
            ConfigError: no such output, or one of SAM's.
        """
        networks = self.method.networks()
        name = output or next(iter(networks))
        if name not in networks:
            there = f"no deployed output {name!r}; the run has {', '.join(networks)}"
            hint = f"SAM is not deployed; score it with: knowsam evaluate {self.run} --outputs {name}"
            raise ConfigError(there, hint=hint if name in self.method.outputs() else "")
        return name, networks[name].eval()

    def postprocess(self, output: str) -> Any:
        """What is done to the label maps of an output after the network, as in ``evaluate``; None: nothing.

        Raises:
            ConfigError: ``evaluate.postprocess`` is auto, and nothing was chosen for these weights yet.
        """
        from knowsam.inference.postprocess import CHOICE_FILE, resolve

        return resolve(
            self.config.evaluate.postprocess, self.run.read_json(self.run.path / CHOICE_FILE), output, self.origin()
        )

    def to(self, device: str) -> "LoadedRun":
        """Move the networks to a device such as ``cuda``; returns this run."""
        self.method.to(device)
        self.device = device
        return self

    def predict(
        self, image: "npt.NDArray[Any] | str | Path", *, output: str | None = None, flips: bool = False
    ) -> npt.NDArray[np.uint8]:
        """Segment one image or volume, as ``knowsam predict`` does.

        Args:
            image: a file that ``knowsam predict`` reads (picture, DICOM, h5 or NIfTI), or an array: (H, W) grey or
                (H, W, 3) colour, or a volume (D, H, W) or (D, H, W, 3), predicted slice by slice. Arrays of other types
                than uint8 are scaled by the rule that the run's own data were (``data.intensity``).
            output: one of :attr:`outputs`; the deployed one if None.
            flips: average over the image and its three mirror images.
        Returns:
            uint8 class ids (H, W) or (D, H, W), at the size of the image.
        Raises:
            DataError: a file that cannot be read, or an array of another shape.
            ConfigError: no such output.
        """
        return self.segment(image, output=output, flips=flips).labels

    def segment(
        self,
        image: "npt.NDArray[Any] | str | Path",
        *,
        output: str | None = None,
        flips: bool = False,
        probabilities: bool = False,
        uncertainty: bool = False,
    ) -> "Segmentation":
        """As :meth:`predict`, with probabilities (K, H, W) and an entropy map (H, W) where asked for.

        Post-processing of the run (``evaluate.postprocess``) is applied to the labels alone.
        """
        import torch

        from knowsam.build import sight
        from knowsam.engine.precision import autocast_dtype
        from knowsam.inference.predict import segment, with_flips

        name, network = self.network(output)

        def predict_fn(images: "torch.Tensor") -> "dict[str, torch.Tensor]":
            return {name: network(images)}

        precision = self.config.train.precision if self.config.train.precision != "fp16" else "fp32"
        [(_, found)] = segment(
            with_flips(predict_fn) if flips else predict_fn,
            [("image", functools.partial(self._read, image))],
            **sight(self.config),
            batch_size=self.config.evaluate.batch_size,
            device=self.device,
            num_classes=self.config.num_classes,
            autocast=autocast_dtype(precision),
            probabilities=probabilities,
            uncertainty=uncertainty,
            then=lambda case_id, picture, by_output: by_output[name],
            read_ahead=0,
        )
        segmentation: Segmentation = found
        if (spec := self.postprocess(name)) is not None:
            from knowsam import io
            from knowsam.build import reading
            from knowsam.inference.postprocess import apply

            known = None if isinstance(image, np.ndarray) else io.header(image, reading(self.config)).spacing
            segmentation.labels = apply(segmentation.labels, spec, known)
        return segmentation

    def _read(self, image: "npt.NDArray[Any] | str | Path") -> "np.ndarray":
        """Levels (H, W, C) or (D, H, W, C)."""
        from knowsam.build import reading
        from knowsam.data.case import Case
        from knowsam.inference.files import find_inputs

        if not isinstance(image, np.ndarray):
            files = find_inputs(image, reading(self.config))
            if len(files) != 1:
                raise DataError(f"{image} holds {len(files)} images; give one file", hint="Or use: knowsam predict")
            return self.preparation(files[0].read(), str(image))
        channels = self.preparation.channels
        coloured = image.ndim >= 3 and image.shape[-1] == channels and channels > 1
        if image.ndim - coloured not in (2, 3) or not image.size:
            raise DataError(
                f"the image is an array {image.shape}; allowed are (H, W), (H, W, {channels}), (D, H, W) and "
                f"(D, H, W, {channels})"
            )
        return self.preparation(Case(np.moveaxis(image, -1, 0) if coloured else image[None]), "the array")


def load_run(
    folder: str | Path, checkpoint: str = "best", *, sam: bool = False, quiet: bool = True, device: str = "cpu"
) -> LoadedRun:
    """Read a run's checkpoint into its method.

    Args:
        folder: the run, as ``knowsam train`` wrote it.
        checkpoint: ``best`` or ``last``.
        sam: True builds SAM too, a large part of the time and memory, which deployed outputs do not need.
        quiet: False says which checkpoint it is.
        device: where to predict.
    Raises:
        NotFoundError: no run, or it has no such checkpoint yet.
        CheckpointError: damaged, or of a version with other networks.
        ConfigError: a stored configuration that this version does not accept.
    """
    from knowsam.build import build_method, build_preparation
    from knowsam.engine.checkpoint import load_checkpoint
    from knowsam.engine.log import say
    from knowsam.engine.memory import keep_freed_memory
    from knowsam.engine.precision import settle_math

    if checkpoint not in ("best", "last"):
        raise ConfigError(f"checkpoint is {checkpoint!r}; allowed: 'best', 'last'")
    keep_freed_memory()
    settle_math()
    run = RunFolder(folder, create=False)
    path = run.best if checkpoint == "best" else run.last
    if not path.exists():
        raise NotFoundError(f"{run} has no {path.name} yet", hint="Finish training first, or try --checkpoint last.")
    state = load_checkpoint(path, fall_back=False)
    config = parse_config(state["config"], path)  # the architecture is stored with the weights
    config.sam.pop("weights", None)  # the checkpoint holds SAM's weights; the official file need not be there
    method = _make(functools.partial(build_method, config, init=False), sam=sam)
    try:
        method.load_state_dict(_without_sam(method, state["method"]))
    except RuntimeError as error:
        raise CheckpointError(f"{path} does not fit this version of the networks: {error}") from error
    if not quiet:
        known = "converted; see converted.txt for what is not known of it"
        if state["step"] is not None:
            known = f"of step {state['step']}" + (", chosen on val" if path == run.best else "")
        say(f"{run}: checkpoint {path.name}{' ' if state['step'] is not None else ', '}{known}")
    preparation = build_preparation(config, state.get("preparation"))
    return LoadedRun(run, path, config, state["step"], state["best"], method, preparation).to(device)


def _make(build: "Callable[..., BuiltMethod]", *, sam: bool) -> "SSLMethod":
    if not sam:
        try:
            return build(sam=False).method
        except AttributeError:
            pass  # a method of somebody else's may look into SAM while it is made: it gets the whole one
    return build().method


def _without_sam(method: "SSLMethod", weights: dict[str, Any]) -> dict[str, Any]:
    """The weights less those of a SAM that was left out."""
    from knowsam.build import AbsentSAM

    modules = method.named_modules(remove_duplicate=False)
    absent = tuple(f"{name}." for name, module in modules if isinstance(module, AbsentSAM))
    return {key: tensor for key, tensor in weights.items() if not key.startswith(absent)}
