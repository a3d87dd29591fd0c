"""A trained run from its folder: what evaluate, predict and export start from."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from knowsam.config import Config
    from knowsam.engine.runfolder import RunFolder
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
    """

    run: "RunFolder"
    path: Path
    config: "Config"
    step: int | None
    best: dict[str, Any]
    method: "SSLMethod"

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

    def network(self, output: str | None = None) -> tuple[str, "nn.Module"]:
        """The name of a deployed output, and its network in eval mode: (B, 3, S, S) in 0..1 -> logits (B, K, S, S).

        Args:
            output: one that needs no SAM; the first if None.
        Raises:
            ConfigError: no such output, or one of SAM's.
        """
        from knowsam.errors import ConfigError

        networks = self.method.deployable()
        name = output or next(iter(networks))
        if name not in networks:
            there = f"no deployed output {name!r}; the run has {', '.join(networks)}"
            hint = f"SAM is not deployed; score it with: knowsam evaluate {self.run} --outputs {name}"
            raise ConfigError(there, hint=hint if name in self.method.outputs() else "")
        return name, networks[name].eval()


def add_checkpoint_argument(parser: argparse.ArgumentParser) -> None:
    """``--checkpoint``, alike for every command that reads a run."""
    parser.add_argument(
        "--checkpoint", choices=("best", "last"), default="best", help="best on validation, or the last"
    )


def load_run(folder: str, checkpoint: str = "best", *, sam: bool = True, quiet: bool = False) -> LoadedRun:
    """Read a run's checkpoint into its method, and say which it is.

    Args:
        folder: the run.
        checkpoint: ``best`` or ``last``.
        sam: False leaves SAM out, a large part of the time and memory where only deployed outputs are needed.
        quiet: do not say it.
    Raises:
        NotFoundError: no run, or it has no such checkpoint yet.
        CheckpointError: damaged, or of a version with other networks.
        ConfigError: a stored configuration that this version does not accept.
    """
    from knowsam.config import parse_config
    from knowsam.engine.checkpoint import load_checkpoint
    from knowsam.engine.log import say
    from knowsam.engine.memory import keep_freed_memory
    from knowsam.engine.precision import settle_math
    from knowsam.engine.runfolder import RunFolder
    from knowsam.errors import CheckpointError, NotFoundError

    keep_freed_memory()
    settle_math()
    run = RunFolder(folder, create=False)
    path = run.best if checkpoint == "best" else run.last
    if not path.exists():
        raise NotFoundError(f"{run} has no {path.name} yet", hint="Finish training first, or try --checkpoint last.")
    state = load_checkpoint(path, fall_back=False)
    config = parse_config(state["config"], path)  # the architecture is stored with the weights
    config.sam.pop("weights", None)  # the checkpoint holds SAM's weights; the official file need not be there
    method = _build(config, sam)
    try:
        method.load_state_dict(_without_sam(method, state["method"]))
    except RuntimeError as error:
        raise CheckpointError(f"{path} does not fit this version of the networks: {error}") from error
    if quiet:
        pass
    elif state["step"] is None:
        say(f"{run}: checkpoint {path.name}, converted; see converted.txt for what is not known of it")
    else:
        say(f"{run}: checkpoint {path.name} of step {state['step']}" + (", chosen on val" if path == run.best else ""))
    return LoadedRun(run, path, config, state["step"], state["best"], method)


def _build(config: "Config", sam: bool) -> "SSLMethod":
    from knowsam import build

    if not sam:
        try:
            return build.build_method(config, sam=False).method
        except AttributeError:
            pass  # a method of somebody else's may look into SAM while it is made: it gets the whole one
    return build.build_method(config).method


def _without_sam(method: "SSLMethod", weights: dict[str, Any]) -> dict[str, Any]:
    """The weights less those of a SAM that was left out."""
    from knowsam.build import AbsentSAM

    modules = method.named_modules(remove_duplicate=False)
    absent = tuple(f"{name}." for name, module in modules if isinstance(module, AbsentSAM))
    return {key: tensor for key, tensor in weights.items() if not key.startswith(absent)}
