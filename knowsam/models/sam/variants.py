"""The SAM variants, and the one function that assembles a guide.

Another encoder, tuning, prompt generator or decoder is one file and one line in a table here; a variant is one entry in
``VARIANTS``.
"""

import difflib
import inspect
import pkgutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from knowsam.models.sam.encoder import PATCH_SIZE, SamImageEncoder
from knowsam.models.sam.guide import PIXEL_MEAN, PIXEL_STD, SamGuide
from knowsam.models.sam.mask_decoder import SamMaskDecoder
from knowsam.models.sam.official import PromptEncoder
from knowsam.models.sam.prompt_generator import PromptGenerator
from knowsam.models.sam.weights import LoadReport, is_declared_new, is_omitted, load_official
from knowsam.models.tuning.adapter import add_adapters

# name -> (*, image_size, checkpointing, **entry of VARIANTS) -> module: images (B, 3, S, S) -> embedding (B, 256, E, E)
ENCODERS: dict[str, Callable] = {"sam_vit": SamImageEncoder}
# name -> () -> module: embedding, positions, sparse, dense -> logits (B, K, 4E, 4E)
MASK_DECODERS: dict[str, Callable] = {"sam": SamMaskDecoder}
# name -> (num_classes, **options) -> module: embedding -> sparse, dense or None
PROMPT_GENERATORS: dict[str, Callable] = {"learned": PromptGenerator}
# name -> (encoder, mask_decoder, **options) -> None; changes both in place, new parameters under ``adapters.``
TUNINGS: dict[str, Callable] = {"adapter": add_adapters}

# ``encoder`` and ``decoder`` (default: SAM's) name the classes; the rest are the encoder's arguments. vit_b, vit_l and
# vit_h are segment-anything's; tiny and small are for tests and short runs, with neck and decoder of official size.
VARIANTS: dict[str, dict[str, Any]] = {
    "vit_b": {"width": 768, "depth": 12, "heads": 12, "global_blocks": (2, 5, 8, 11)},
    "vit_l": {"width": 1024, "depth": 24, "heads": 16, "global_blocks": (5, 11, 17, 23)},
    "vit_h": {"width": 1280, "depth": 32, "heads": 16, "global_blocks": (7, 15, 23, 31)},
    "tiny": {"width": 96, "depth": 4, "heads": 3, "global_blocks": (1, 3)},
    "small": {"width": 192, "depth": 4, "heads": 3, "global_blocks": (1, 3)},
}
TRAIN = ("auto", "all", "tuned")


def build_sam_guide(
    variant: str = "vit_b",
    image_size: int = 256,
    num_classes: int = 2,
    weights: str | Path | None = None,
    tuning: Mapping[str, Any] | None = None,
    prompt: Mapping[str, Any] | None = None,
    mask_prompt: bool = True,
    train: str = "auto",
    checkpointing: bool = False,
    pixel_mean: Sequence[float] = PIXEL_MEAN,
    pixel_std: Sequence[float] = PIXEL_STD,
    *,
    encoder_type: Callable | None = None,
    decoder_type: Callable | None = None,
    omit: Sequence[str] = (),
) -> tuple[SamGuide, LoadReport]:
    """Assemble a guide: parts, official weights, positions resized once, tuning, freezing.

    Args:
        variant: a name in ``VARIANTS``.
        image_size: side S of the images, a multiple of 16.
        num_classes: K, background included.
        weights: official checkpoint; None leaves SAM random.
        tuning: ``{"name": <in TUNINGS>, **its options}``, for example ``{"name": "adapter", "ratio": 0.25}``, or None.
        prompt: options of the prompt generator, for example ``{"sparse": True, "dense": True, "tokens": 2}``; ``name``
            chooses another one of ``PROMPT_GENERATORS``.
        mask_prompt: feed the coarse logits back to SAM as mask prompts.
        train: ``all`` trains SAM whole, ``tuned`` only what tuning added and the prompt generator; ``auto`` is
            ``tuned`` for loaded and ``all`` for random weights. What no forward reaches is frozen in every case.
        checkpointing: recompute encoder blocks in the backward pass, to save memory.
        pixel_mean, pixel_std: per channel, for pixel values 0..255; SAM's.
        encoder_type, decoder_type: called in the place of the variant's own, with the same arguments.
        omit: regular expressions of the checkpoint's keys that are not to be loaded.
    Returns:
        The guide, and what became of every tensor of the checkpoint.
    Raises:
        ValueError: unknown names or impossible values.
        NotFoundError, CheckpointError: from ``load_official``.
    """
    if train not in TRAIN:
        raise ValueError(f"train is {train!r}; allowed: {', '.join(TRAIN)}")
    entry = dict(_lookup("variant", VARIANTS, variant))
    variants_encoder = _lookup("encoder", ENCODERS, entry.pop("encoder", "sam_vit"))
    variants_decoder = _lookup("mask decoder", MASK_DECODERS, entry.pop("decoder", "sam"))

    prompt = dict(prompt or {})
    prompt_name = prompt.pop("name", "learned")
    prompt_generator = _call("prompt generator", PROMPT_GENERATORS, prompt_name, num_classes, **prompt)
    prompts = [getattr(prompt_generator, name, True) for name in ("sparse", "dense")]
    if not (mask_prompt or any(prompts)):
        raise ValueError(
            "sparse, dense and mask_prompt are all off: every class would get the same logits; switch one of them on"
        )

    encoder = (encoder_type or variants_encoder)(image_size=image_size, checkpointing=checkpointing, **entry)
    grid = image_size // PATCH_SIZE
    prompt_encoder = PromptEncoder(
        embed_dim=256, image_embedding_size=(grid, grid), input_image_size=(image_size, image_size), mask_in_chans=16
    )
    decoder = (decoder_type or variants_decoder)()
    guide = SamGuide(
        encoder, prompt_encoder, decoder, prompt_generator, num_classes, pixel_mean, pixel_std, mask_prompt=mask_prompt
    )

    report = LoadReport() if weights is None else load_official(guide, weights, omit)
    if tuning is not None:
        options = dict(tuning)
        name = options.pop("name", None)
        _call("tuning", TUNINGS, name, guide.image_encoder, guide.mask_decoder, **options)
    from_file = {*report.loaded, *report.resized}
    report.declared_new = [
        key
        for key in guide.state_dict()
        if key not in from_file and not (weights is not None and is_omitted(key, omit))
    ]

    if train == "tuned" or (train == "auto" and weights is not None):
        freeze_untuned(guide)
    return guide, report


def freeze_untuned(guide: SamGuide) -> None:
    """Leave only what tuning added and the prompt generator trainable; warn if that is nothing."""
    for name, parameter in guide.named_parameters():
        if not is_declared_new(name):
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in guide.parameters()):
        warnings.warn("nothing of SAM is trainable: no tuning, and no prompt is generated; an optimizer will refuse it")


def _lookup(what: str, table: Mapping[str, Any], name: Any) -> Any:
    if name not in table:
        raise ValueError(f"unknown {what} {name!r}; there are {', '.join(table)}")
    return table[name]


def _call(what: str, table: Mapping[str, Callable], name: Any, *args: Any, **options: Any) -> Any:
    """table[name](*args, **options), with a readable refusal of options that it does not have.

    A name ``module:function`` is taken from outside the package.
    """
    function = pkgutil.resolve_name(name) if ":" in str(name) else _lookup(what, table, name)
    parameters = list(inspect.signature(function).parameters)[len(args) :]
    for option in options:
        if option not in parameters:
            close = difflib.get_close_matches(option, parameters, n=1)
            advice = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(parameters)}"
            raise ValueError(f"{what} {name!r} has no parameter {option!r}; {advice}")
    return function(*args, **options)
