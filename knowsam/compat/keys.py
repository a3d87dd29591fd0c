"""The published checkpoints' key names, and what they are called here.

``SGDL_best_model.pth`` holds the two students and the fusion head, ``sam_best_model.pth`` SAM with its adapters and
prompt generator.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from knowsam.models.sam.weights import resize_positions

LEVELS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
STUDENTS, GUIDE = "students", "sam_teacher.guide"
_UNET, _VNET = (f"{STUDENTS}.subnets.{name}.network" for name in ("unet", "vnet"))
SAM = f"{GUIDE}.sam"

Rules = Sequence[tuple[str, str | Callable[[re.Match[str]], str] | None]]
"""Pattern of a whole published key -> template or function; None for what no forward of the published code reaches."""


def _vnet(match: re.Match[str]) -> str:
    """V-Net's blocks are numbered through; a unit is (convolution, ReLU) there and (convolution, norm, ReLU) here."""
    level, kind, unit, tail = LEVELS.index(match[1]), match[2] or "", int(match[3]) // 2 * 3, match[4]
    if kind == "_dw":
        place = f"down.{level}"
    elif kind == "_up":
        place = f"up.{level - 4}"
    elif level == 0:
        place = "stem"
    else:
        place = f"encoder.{level - 1}" if level < 5 else f"decoder.{level - 5}"
    return f"{_VNET}.{place}.{unit}.{tail}"


def _prompt_conv(match: re.Match[str]) -> str:
    """The prompt generator's double convolutions have a dropout between their halves there, and none here."""
    block = {"conv_1": 0, "down_1": 1, "conv_2": 2, "down_2": 3}[match[2]]
    layer = int(match[3])
    return f"{GUIDE}.prompt_generator.sparse_heads.{match[1]}.convs.{block}.{layer - (layer > 3)}.{match[4]}"


_HEAD = f"{STUDENTS}.fusion_head"
STUDENT_RULES: Rules = (
    (r"UNet\.in_conv\.conv_conv\.(.+)", rf"{_UNET}.encoder.0.\1"),
    (r"UNet\.down(\d)\.maxpool_conv\.1\.conv_conv\.(.+)", rf"{_UNET}.encoder.\1.\2"),
    (r"UNet\.up(\d)\.up\.(.+)", lambda m: f"{_UNET}.up.{int(m[1]) - 1}.{m[2]}"),
    (r"UNet\.up(\d)\.conv\.conv_conv\.(.+)", lambda m: f"{_UNET}.decoder.{int(m[1]) - 1}.{m[2]}"),
    (r"UNet\.out_conv\.(.+)", rf"{_UNET}.head.\1"),
    (rf"VNet\.block_({'|'.join(LEVELS)})(_dw|_up)?\.conv\.(\d+)\.(.+)", _vnet),
    (r"VNet\.out_conv\.(.+)", rf"{_VNET}.head.\1"),
    (r"Discriminator\.ambiguous_conv\.(.+)", rf"{_HEAD}.agreement.\1"),
    (r"Discriminator\.entmap_conv\.(.+)", rf"{_HEAD}.certainty.\1"),
    (r"Discriminator\.logits_conv\.(.+)", rf"{_HEAD}.logits.\1"),
    (r"Discriminator\.final_conv\.([01])\.(.+)", rf"{_HEAD}.merge.\1.\2"),
    (r"Discriminator\.final_conv\.([34])\.(.+)", lambda m: f"{_HEAD}.head.{int(m[1]) - 3}.{m[2]}"),
)
_BLOCK = r"(image_encoder\.blocks\.\d+|mask_decoder\.transformer\.layers\.\d+)"
GUIDE_RULES: Rules = (
    (r"image_encoder\.blocks\.\d+\.Depth_Adapter\..+", None),
    (r"mask_decoder\.transformer\.MLP_Adapter\..+", None),
    (rf"{_BLOCK}\.MLP_Adapter\.D_(fc[12]\..+)", rf"{SAM}.\1.adapters.parallel_mlp.0.\2"),
    (rf"{_BLOCK}\.Space_Adapter\.D_(fc[12]\..+)", rf"{SAM}.\1.adapters.post_attention.0.\2"),
    (
        r"mask_decoder\.transformer\.Space_Adapter\.D_(fc[12]\..+)",
        rf"{SAM}.mask_decoder.transformer.adapters.post_attention.0.\1",
    ),
    (r"(mask_decoder\.transformer\.layers\.\d+\.mlp)\.layers\.0\.0\.(.+)", rf"{SAM}.\1.lin1.\2"),
    (r"(mask_decoder\.transformer\.layers\.\d+\.mlp)\.fc\.(.+)", rf"{SAM}.\1.lin2.\2"),
    (
        r"super_prompt\.box_decoder\.(\d+)\.(conv_[12]|down_[12])\.(?:maxpool_conv\.1\.)?conv_conv\.(\d+)\.(.+)",
        _prompt_conv,
    ),
    (r"super_prompt\.box_decoder\.(\d+)\.conv_3\.(.+)", rf"{GUIDE}.prompt_generator.sparse_heads.\1.project.\2"),
    (r"super_prompt\.box_decoder\.(\d+)\.ffn\.(.+)", rf"{GUIDE}.prompt_generator.sparse_heads.\1.ffn.\2"),
    (r"((?:image_encoder|prompt_encoder|mask_decoder)\..+)", rf"{SAM}.\1"),
)
POSITIONS = f"{SAM}.image_encoder.pos_embed"


@dataclass
class Translation:
    """A published state dict under our names, and what became of every key.

    Attributes:
        state: tensors by our key, at our sizes.
        loaded: published key -> our key.
        resized: those of ``loaded`` whose tensor was interpolated: published key -> shapes (from, to).
        dead: published keys that none of its forwards reaches; left out.
        unknown: keys of no published checkpoint of this kind.
        missing: our keys that got no tensor.
        mismatched: published key -> shapes (found, expected).
    """

    state: dict[str, Tensor] = field(default_factory=dict)
    loaded: dict[str, str] = field(default_factory=dict)
    resized: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    dead: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    mismatched: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether the file and our networks account for each other without a rest."""
        return not (self.unknown or self.missing or self.mismatched)


def our_name(key: str, rules: Rules = (*STUDENT_RULES, *GUIDE_RULES)) -> str | None:
    """What a published key is called here; None if the published code never uses it.

    Raises:
        KeyError: no published checkpoint has such a key.
    """
    for pattern, target in rules:
        if match := re.fullmatch(pattern, key):
            if target is None:
                return None
            return target(match) if callable(target) else match.expand(target)
    raise KeyError(key)


def translate(published: Mapping[str, Tensor], own: Mapping[str, Tensor], rules: Rules) -> Translation:
    """Rename a published state dict to our keys; absolute positions are resized once, bicubic, as the code does always.

    Args:
        published: state dict of one published file.
        own: our state dict, of the parts that the file should fill: names and shapes.
        rules: ``STUDENT_RULES`` or ``GUIDE_RULES``.
    """
    result = Translation()
    for key, tensor in published.items():
        try:
            name = our_name(key, rules)
        except KeyError:
            result.unknown.append(key)
            continue
        if name is None:
            result.dead.append(key)
            continue
        if name not in own:
            result.unknown.append(key)
            continue
        found, expected = tuple(tensor.shape), tuple(own[name].shape)
        if name == POSITIONS and found != expected and len(found) == 4 and found[-1] == expected[-1]:
            tensor = resize_positions(tensor, (expected[1], expected[2]))
            result.resized[key] = (found, expected)
        elif found != expected:
            result.mismatched[key] = (found, expected)
            continue
        result.state[name] = tensor
        result.loaded[key] = name
    translated = {our for our in result.loaded.values()} | {our_name(key, rules) for key in result.mismatched}
    result.missing = [name for name in own if name not in translated]
    return result
