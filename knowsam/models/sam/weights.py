"""Official SAM weights: read, resized once to the model's positions, loaded, and accounted for key by key."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from knowsam.errors import CheckpointError, NotFoundError
from knowsam.models.sam.parameters import is_new, is_unused
from knowsam.pretrained import where_to_get

# ViT width of segment-anything's variants
WIDTHS = {"vit_b": 768, "vit_l": 1024, "vit_h": 1280}
PATCH_WEIGHT = "image_encoder.patch_embed.proj.weight"


@dataclass
class LoadReport:
    """What became of every key; ``str(report)`` is a short table.

    Attributes:
        path: the file; None when no weights were loaded.
        loaded: keys copied as they are.
        resized: keys interpolated to the model's size, with the shapes (from, to).
        missing: the model has them, the file has not.
        unexpected: the file has them, the model has not.
        declared_new: keys that no official file holds, as the parts declare: tunings, tokens of their own, prompt
            generator.
        omitted: keys that the caller asked not to load, whether the model has them or not, and those that a part
            declares to do without.
    """

    path: Path | None = None
    loaded: list[str] = field(default_factory=list)
    resized: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    declared_new: list[str] = field(default_factory=list)
    omitted: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        if self.path is None:
            return f"SAM weights: none loaded, {len(self.declared_new)} tensors start random"
        rows = [
            ("loaded as they are", len(self.loaded), ""),
            ("resized", len(self.resized), self._resized_shapes()),
            ("new here", len(self.declared_new), _first(sorted({key.split(".")[0] for key in self.declared_new}), 4)),
            ("missing", len(self.missing), _first(self.missing)),
            ("unexpected", len(self.unexpected), _first(self.unexpected)),
            *([("left out", len(self.omitted), _first(self.omitted))] if self.omitted else []),
        ]
        lines = [f"  {name:<18} {count:>5}  {detail}".rstrip() for name, count, detail in rows]
        return "\n".join([f"SAM weights: {self.path.name}", *lines])

    def _resized_shapes(self) -> str:
        pairs = dict.fromkeys(self.resized.values())  # each pair once, in order
        return ", ".join(f"{_shape(old)} -> {_shape(new)}" for old, new in pairs)


def is_omitted(key: str, omit: Sequence[str]) -> bool:
    """Whether one of the regular expressions finds itself in the key."""
    return any(re.search(pattern, key) for pattern in omit)


def load_official(sam: nn.Module | Mapping[str, nn.Module], path: str | Path, omit: Sequence[str] = ()) -> LoadReport:
    """Load a file of segment-anything's format into a SAM, or into parts named as in segment-anything, in place.

    Only ``pos_embed`` (bicubic over the grid) and relative positions (linear along their length, as segment-anything
    does on the fly) may differ in size; they are resized here, once.

    Args:
        sam: a :class:`Sam`, or ``{"image_encoder": ..., "prompt_encoder": ..., "mask_decoder": ...}``.
        path: a bare state dict, or one under ``model`` or ``state_dict``.
        omit: regular expressions of keys to leave out: they stay as they are in the model, if it has them at all.
    Returns:
        The report; nothing is missing or unexpected in it.
    Raises:
        NotFoundError: no such file.
        CheckpointError: not a checkpoint, another variant, or any key not accounted for; the model is left as it was.
    """
    path = Path(path)
    model = sam if isinstance(sam, nn.Module) else nn.ModuleDict(sam)
    own = model.state_dict()
    declared_new, unused = is_new(model), is_unused(model)
    state = read_state_dict(path)
    if not any(key in own for key in state):
        raise CheckpointError(
            f"{path}: none of its {len(state)} keys belongs to SAM; it starts with {_first(list(state))}",
            hint=f"Keys should look like {PATCH_WEIGHT}. {where_to_get()}",
        )
    _check_variant(path, state, own)

    report = LoadReport(path=path, declared_new=[key for key in own if key not in state and declared_new(key)])
    ready: dict[str, Tensor] = {}
    mismatched: list[str] = []
    for key, tensor in state.items():
        if is_omitted(key, omit) or unused(key):
            report.omitted.append(key)
            continue
        if key not in own:
            report.unexpected.append(key)
            continue
        old, new = tuple(tensor.shape), tuple(own[key].shape)
        if old == new:
            ready[key] = tensor
            report.loaded.append(key)
        elif (resized := _resize(key, tensor, new)) is not None:
            ready[key] = resized
            report.resized[key] = (old, new)
        else:
            mismatched.append(f"{key} {_shape(old)} -> {_shape(new)}")
    report.missing = [key for key in own if key not in state and not declared_new(key) and not is_omitted(key, omit)]

    problems = [("missing", report.missing), ("unexpected", report.unexpected), ("of another shape", mismatched)]
    if any(keys for _, keys in problems):
        counts = "; ".join(f"{len(keys)} {name}: {_first(keys)}" for name, keys in problems if keys)
        raise CheckpointError(
            f"{path} does not fit this SAM: {counts}",
            hint="Load an official file of the same variant; nothing was loaded.",
        )
    model.load_state_dict(ready, strict=False)  # every key is accounted for above
    return report


def read_state_dict(path: str | Path, what: str = "SAM weights", advice: str | None = None) -> dict[str, Tensor]:
    """Tensors of a checkpoint file by key, on the CPU. Never runs code from the file.

    Args:
        path: a bare state dict, or one under ``model`` or ``state_dict``.
        what: the file should be, for messages.
        advice: where to get it; where SAM's official files are if None.
    Raises:
        NotFoundError: no such file.
        CheckpointError: not a checkpoint of tensors; says what the file seems to be.
    """
    path = Path(path)
    advice = where_to_get() if advice is None else advice
    if not path.exists():
        raise NotFoundError(f"{what} not found: {path}", hint=advice)
    if not path.is_file():
        raise CheckpointError(f"{path} is a folder, not a checkpoint file", hint="Give the path of the .pth file.")
    try:
        with path.open("rb") as file:
            head = file.read(512).lstrip().lower()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    if not head:
        raise CheckpointError(f"{path} is an empty file", hint=f"The download stopped early. {advice}")
    if head.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise CheckpointError(f"{path} is a web page (HTML), not a checkpoint", hint=advice)
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is a Git LFS pointer, not the file itself", hint="Fetch it with git lfs pull.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (
        Exception
    ) as error:  # torch.load raises whatever its readers raise: Unpickling-, Runtime-, EOF-, KeyError, ...
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if "Weights only load failed" in reason:  # torch goes on to advise running whatever code the file holds
            reason = "it is no file of plain tensors"
        raise CheckpointError(
            f"{path} cannot be read as a PyTorch checkpoint of tensors: {reason}",
            hint=f"It may be cut off, or not a checkpoint at all. {advice}",
        ) from error
    for wrapper in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a state dict of named tensors")
    others = [str(key) for key, value in content.items() if not isinstance(value, Tensor)]
    if others or not content:
        what = f"holds things that are not tensors: {_first(others)}" if others else "holds an empty state dict"
        raise CheckpointError(
            f"{path} {what}", hint="Expected a bare state dict, or one under 'model' or 'state_dict'."
        )
    return dict(content)


def resize_positions(table: Tensor, size: tuple[int, int]) -> Tensor:
    """Absolute positions (1, h, w, d) -> (1, *size, d): bicubic, no antialiasing, float32."""
    table = table.float().permute(0, 3, 1, 2)
    table = F.interpolate(table, size=size, mode="bicubic", align_corners=False, antialias=False)
    return table.permute(0, 2, 3, 1).contiguous()


def resize_relative_positions(table: Tensor, length: int) -> Tensor:
    """Relative positions (2h - 1, c) -> (length, c): linear, as segment-anything's get_rel_pos, float32."""
    return F.interpolate(table.float().t()[None], size=length, mode="linear")[0].t().contiguous()


def _resize(key: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor | None:
    """The tensor at the model's size if the key may be resized and only its size differs, else None."""
    if tensor.ndim != len(shape) or tensor.shape[-1] != shape[-1]:
        return None
    if key.endswith("image_encoder.pos_embed"):
        return resize_positions(tensor, (shape[1], shape[2]))
    if re.search(r"attn\.rel_pos_[hw]$", key):
        return resize_relative_positions(tensor, shape[0])
    return None


def _check_variant(path: Path, state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Say which variant the file is of, rather than list hundreds of shapes."""
    if PATCH_WEIGHT not in state or PATCH_WEIGHT not in own:
        return
    theirs, ours = state[PATCH_WEIGHT].shape[0], own[PATCH_WEIGHT].shape[0]
    if theirs != ours:
        raise CheckpointError(
            f"{path} looks like {_variant(theirs)}; the model is {_variant(ours)}",
            hint="Choose the file of the model's variant, or the variant of the file.",
        )


def _variant(width: int) -> str:
    names = [name for name, official in WIDTHS.items() if official == width]
    return f"{names[0]} (width {width})" if names else f"a ViT of width {width}, none of the official variants"


def _first(names: list[str], count: int = 3) -> str:
    more = f", ... ({len(names) - count} more)" if len(names) > count else ""
    return ", ".join(names[:count]) + more


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
