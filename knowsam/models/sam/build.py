"""From names to a SAM: parts, official weights, positions resized once, tunings, and what trains.

A part is a block, as in an experiment's file: its name in a table of ``knowsam.components``, ``module:name`` of one
from outside, or, in Python, the class or function itself, with its options beside it. A bare name is a block, too.
"""

import difflib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from knowsam import components
from knowsam.models.sam.channels import Channels, Rule
from knowsam.models.sam.guide import SamGuide
from knowsam.models.sam.parameters import is_new
from knowsam.models.sam.prompts import SamPromptEncoder
from knowsam.models.sam.sam import PIXEL_MEAN, PIXEL_STD, Sam, stated
from knowsam.models.sam.slicewise import SliceWiseGuide
from knowsam.models.sam.weights import LoadReport, is_omitted, load_official

Block = str | Callable[..., Any] | Mapping[str, Any]

PARTS = ("encoder", "prompt_encoder", "decoder", "tuning")
"""What of a SAM may train; of a guide also ``prompt``."""


def build_sam(
    encoder: Block = "vit_b",
    decoder: Block = "sam",
    tuning: Block | Sequence[Block] | None = None,
    weights: str | Path | None = None,
    train: Literal["auto", "all"] | Sequence[str] = "auto",
    pixel_mean: Sequence[float] = PIXEL_MEAN,
    pixel_std: Sequence[float] = PIXEL_STD,
    image_size: int = 256,
    channels: Rule = "repeat",
    *,
    num_classes: int | None = None,
    in_channels: int = 3,
    omit: Sequence[str] = (),
) -> tuple[Sam, LoadReport]:
    """Assemble a promptable SAM. What a use never reaches is left as it is: see :func:`freeze_unreached`.

    torch's global random state is afterwards what it was.

    Args:
        encoder: of ``SAM_ENCODERS``, for example ``{"name": "vit_b", "checkpointing": True}``. It is offered
            ``image_size`` and ``in_channels``.
        decoder: of ``SAM_DECODERS``. It is offered ``embed_dim`` (the encoder's channels), ``image_size`` and, if they
            are known, ``num_classes``.
        tuning: of ``TUNINGS``, one or several in their order, for example ``{"name": "adapter", "ratio": 0.25}``. Each
            is offered ``encoder``, ``mask_decoder``, ``sam`` and ``embed_dim``, and attaches modules in place.
        weights: official checkpoint; None leaves SAM random.
        train: which parts of ``PARTS`` train: ``tuning`` is what no official file holds, wherever it is. ``all``, or
            ``auto``: all of random weights, the tuning of loaded ones.
        pixel_mean, pixel_std: per channel, for pixel values 0..255; SAM's.
        image_size: side S of the images, a multiple of the encoder's stride.
        num_classes: K, background included, for decoders that want it.
        channels: how images come to the 3 channels of SAM's encoders: repeat, learned, or three numbers; see
            :class:`~knowsam.models.sam.channels.Channels`.
        in_channels: of the images; encoders other than SAM's may want it.
        omit: regular expressions of the checkpoint's keys that are not to be loaded.
    Returns:
        SAM, and what became of every tensor of the checkpoint.
    Raises:
        ValueError: unknown names or impossible values.
        TypeError: options that a part does not have, or lacks.
        NotFoundError, CheckpointError: from ``load_official``.
    """
    asked = _trained_parts(train, PARTS)
    offered = _offers(image_size, in_channels, num_classes)
    with _own_random_state():
        sam, report = _assemble(
            _make("encoder", encoder, offered),
            decoder,
            tuning,
            weights,
            pixel_mean,
            pixel_std,
            omit,
            offered,
            channels,
        )
    _freeze_others(sam, sam, asked, loaded=weights is not None)
    return sam, report


def build_sam_guide(
    encoder: Block = "vit_b",
    decoder: Block = "sam",
    prompt: Block = "learned",
    tuning: Block | Sequence[Block] | None = None,
    weights: str | Path | None = None,
    mask_prompt: bool = True,
    train: Literal["auto", "all"] | Sequence[str] = "auto",
    pixel_mean: Sequence[float] = PIXEL_MEAN,
    pixel_std: Sequence[float] = PIXEL_STD,
    image_size: int = 256,
    num_classes: int = 2,
    channels: Rule = "repeat",
    slices: int | None = None,
    *,
    in_channels: int = 3,
    spatial_dims: int = 2,
    omit: Sequence[str] = (),
    freeze: bool = True,
) -> tuple[SamGuide | SliceWiseGuide, LoadReport]:
    """Assemble SAM with prompts of its own. What no forward of a guide reaches is frozen.

    torch's global random state is afterwards what it was.

    Args:
        encoder, decoder, tuning, weights, pixel_mean, pixel_std: as of :func:`build_sam`.
        image_size, channels, in_channels, omit: likewise.
        prompt: of ``SAM_PROMPTS``, for example ``{"name": "learned", "sparse": True, "dense": True, "tokens": 2}``. It
            is offered ``num_classes`` and ``embed_dim``.
        mask_prompt: feed the coarse logits back to SAM as mask prompts.
        train: which parts of ``PARTS``, and ``prompt``, train. ``all``, or ``auto``: all of random weights, tuning and
            prompt generator of loaded ones.
        num_classes: K, background included.
        slices: of every volume that SAM is asked for in training, where images are volumes; None: all.
        spatial_dims: 2, or 3: volumes, slice by slice.
        freeze: freeze what no forward of the guide reaches; False where the same SAM is used otherwise, too.
    Returns:
        The guide, and what became of every tensor of the checkpoint.
    Raises:
        ValueError: unknown names or impossible values.
        TypeError: options that a part does not have, or lacks.
        NotFoundError, CheckpointError: from ``load_official``.
    """
    asked = _trained_parts(train, (*PARTS, "prompt"))
    offered = _offers(image_size, in_channels, num_classes)
    with _own_random_state():
        # The prompt generator draws its weights before the encoder, which runs that are repeated rely on; its width
        # is the encoder's, and only some encoders tell theirs before they are there.
        width = _channels(encoder)
        generator = None if width is None else _prompt_generator(prompt, mask_prompt, width, num_classes)
        made = _make("encoder", encoder, offered)
        if generator is None or width != stated(made, "out_channels"):
            generator = _prompt_generator(prompt, mask_prompt, stated(made, "out_channels"), num_classes)
        sam, report = _assemble(made, decoder, tuning, weights, pixel_mean, pixel_std, omit, offered, channels)
        guide = SamGuide(sam, generator, num_classes, mask_prompt=mask_prompt, freeze=freeze)
    report.declared_new += [f"prompt_generator.{key}" for key in generator.state_dict()]
    _freeze_others(guide, sam, asked, loaded=weights is not None)
    if asked != () and not any(parameter.requires_grad for parameter in guide.parameters()):
        warnings.warn("nothing of SAM is trainable: no tuning, and no prompt is generated; an optimizer will refuse it")
    if spatial_dims == 2:
        if slices is not None:
            raise ValueError(f"sam.slices is {slices}, but images are pictures, which have none")
        return guide, report
    return SliceWiseGuide(guide, slices), report


def _assemble(
    encoder: nn.Module,
    decoder: Block,
    tuning: Block | Sequence[Block] | None,
    weights: str | Path | None,
    pixel_mean: Sequence[float],
    pixel_std: Sequence[float],
    omit: Sequence[str],
    offered: Mapping[str, Any],
    channels: Rule,
) -> tuple[Sam, LoadReport]:
    """SAM around a finished encoder, with weights and tunings."""
    embed_dim, grid = stated(encoder, "out_channels"), stated(encoder, "grid")
    prompt_encoder = SamPromptEncoder(embed_dim=embed_dim, grid=grid, image_size=grid * stated(encoder, "stride"))
    mask_decoder = _make("decoder", decoder, {**offered, "embed_dim": embed_dim})
    to_rgb = Channels(channels, offered["in_channels"]) if getattr(encoder, "in_channels", 3) == 3 else None
    sam = Sam(encoder, prompt_encoder, mask_decoder, pixel_mean, pixel_std, to_rgb)
    report = LoadReport() if weights is None else load_official(sam, weights, omit)
    for block in _blocks(tuning):
        parts = {"encoder": encoder, "mask_decoder": mask_decoder, "sam": sam, "embed_dim": embed_dim}
        _make("tuning", block, parts)
    from_file = {*report.loaded, *report.resized}
    left_out = () if weights is None else omit
    report.declared_new = [key for key in sam.state_dict() if key not in from_file and not is_omitted(key, left_out)]
    return sam, report


# ---------------------------------------------------------------- blocks

TABLES: dict[str, tuple[Mapping[str, str], str | None]] = {
    "encoder": (components.SAM_ENCODERS, "vit_b"),
    "decoder": (components.SAM_DECODERS, "sam"),
    "prompt": (components.SAM_PROMPTS, "learned"),
    "tuning": (components.TUNINGS, None),
}
"""Kind of part -> its table, and the name of a block that gives options alone."""


def _blocks(tuning: Block | Sequence[Block] | None) -> Sequence[Block]:
    """One block, several or none, as a list."""
    if tuning is None:
        return ()
    return tuning if isinstance(tuning, Sequence) and not isinstance(tuning, str) else (tuning,)


def _resolve(kind: str, block: Block) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The constructor that a block names, and its options."""
    table, default = TABLES[kind]
    options = dict(block) if isinstance(block, Mapping) else {"name": block}
    name = options.pop("name", default)
    if callable(name):
        return name, options
    target = table.get(str(name), str(name))
    if ":" not in target:
        near = difflib.get_close_matches(str(name), table, n=1)
        advice = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(table)}, and module:name of your own"
        raise ValueError(f"unknown {kind} {name!r}; {advice}")
    try:
        return components.load(target), options
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{kind} {name!r} cannot be imported: {error}") from error


def _make(kind: str, block: Block, offered: Mapping[str, Any]) -> Any:
    """What a block's constructor makes of its options and of what it asks for of ``offered``."""
    constructor, options = _resolve(kind, block)
    return components.call(constructor, offered, options)


def _offers(image_size: int, in_channels: int, num_classes: int | None) -> dict[str, Any]:
    known = {} if num_classes is None else {"num_classes": num_classes}
    return {"image_size": image_size, "in_channels": in_channels, **known}


def _channels(encoder: Block) -> int | None:
    """Channels of the embedding as the encoder's block or its constructor's default says; None if they don't."""
    constructor, options = _resolve("encoder", encoder)
    parameter = signature(constructor).parameters.get("out_channels")
    found = options.get("out_channels", None if parameter is None else parameter.default)
    return found if isinstance(found, int) else None


def _prompt_generator(prompt: Block, mask_prompt: bool, embed_dim: int, num_classes: int) -> nn.Module:
    generator: nn.Module = _make("prompt", prompt, {"num_classes": num_classes, "embed_dim": embed_dim})
    if not (mask_prompt or any(getattr(generator, name, True) for name in ("sparse", "dense"))):
        raise ValueError(
            "sparse, dense and mask_prompt are all off: every class would get the same logits; switch one of them on"
        )
    return generator


@contextmanager
def _own_random_state() -> Iterator[None]:
    """Draws begin where torch's global state is, and leave it there."""
    device = torch.get_default_device()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


# ---------------------------------------------------------------- what trains


def _trained_parts(train: Literal["auto", "all"] | Sequence[str], parts: Sequence[str]) -> str | tuple[str, ...]:
    """``train``, checked."""
    if train in ("auto", "all"):
        return str(train)
    if isinstance(train, str) or not set(train) <= set(parts):
        raise ValueError(f"train is {train!r}; allowed: auto, all, or a list of {', '.join(parts)}")
    return tuple(train)


def _freeze_others(model: nn.Module, sam: Sam, asked: str | tuple[str, ...], *, loaded: bool) -> None:
    """Freeze what is not of the parts that are to train; nothing is thawed."""
    if asked == "all" or (asked == "auto" and not loaded):
        return
    chosen = ("tuning", "prompt") if asked == "auto" else asked
    parts = {
        "encoder": sam.image_encoder,
        "prompt_encoder": sam.prompt_encoder,
        "decoder": sam.mask_decoder,
        "prompt": getattr(model, "prompt_generator", None),
    }
    kept = {id(p) for name, part in parts.items() if name in chosen and part is not None for p in part.parameters()}
    if "tuning" in chosen:
        new = is_new(sam)
        kept |= {id(p) for name, p in sam.named_parameters() if new(name)}
    for parameter in model.parameters():
        if id(parameter) not in kept:
            parameter.requires_grad_(False)
