"""Checkpoints of the published code: what they are, and their weights in our networks."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from knowsam import components
from knowsam.compat.keys import GUIDE, GUIDE_RULES, STUDENT_RULES, STUDENTS, Translation, translate
from knowsam.compat.rows import ROWS
from knowsam.data.batch import Batch
from knowsam.errors import CheckpointError, ConfigError
from knowsam.methods.base import StepOutput, StudentMethod
from knowsam.models.sam.encoder import SamImageEncoder
from knowsam.models.sam.weights import read_state_dict
from knowsam.needs import Needs

IMAGE_SIZE = 256
"""The only side, in pixels, that the published code works with."""

STUDENT_ROWS = tuple(name for name, row in ROWS.items() if row.part in ("students", "fusion"))
"""Rows that the students' file alone needs."""

STUDENTS_FILE, SAM_FILE = "SGDL_best_model.pth", "sam_best_model.pth"
# A key that every file of the kind holds, by which one is told from the other.
STUDENTS_MARK, SAM_MARK = "UNet.out_conv.weight", "super_prompt.box_decoder.0.ffn.3.weight"


class ConvertedStudents(StudentMethod):
    """Students and fusion head of a converted checkpoint without SAM: evaluated, used, exported, not trained.

    Args:
        students: with a fusion head.
    """

    needs = Needs(students=2, fusion=True)

    def forward(self, batch: Batch, step: int) -> StepOutput:
        """Raises ConfigError: nothing tells how these weights should be trained further."""
        raise self._refusal()

    def trainable_groups(self) -> dict[str, list[nn.Parameter]]:
        """Raises ConfigError, before anything is trained."""
        raise self._refusal()

    def _refusal(self) -> ConfigError:
        return ConfigError(
            "this run was converted from a published checkpoint, to be evaluated and used; it cannot be trained",
            hint="Train an experiment with method.name=knowsam and published_code=true instead.",
        )


@dataclass
class PublishedFile:
    """One file of the published code.

    Attributes:
        path: where it is.
        state: its tensors by published key.
        num_classes: K, background included.
        sam: options of the ``sam`` block that its tensors tell; empty for the students' file.
    """

    path: Path
    state: dict[str, Tensor]
    num_classes: int
    sam: dict[str, Any]

    @property
    def contents(self) -> str:
        """What the file holds, in words."""
        return "SAM, adapters and prompt generator" if self.sam else "students and fusion head"


def read_students(path: str | Path) -> PublishedFile:
    """The students' and fusion head's file.

    Raises:
        NotFoundError: no such file.
        CheckpointError: not such a file, or its parts disagree about the number of classes.
    """
    path, state = _read(path, STUDENTS_FILE, STUDENTS_MARK)
    heads = (STUDENTS_MARK, "VNet.out_conv.weight", "Discriminator.final_conv.3.weight")
    parts = {name: _length(path, state, name) for name in heads}
    if len(set(parts.values())) > 1:
        found = ", ".join(f"{count} by {key}" for key, count in parts.items())
        raise CheckpointError(f"{path} disagrees with itself about the number of classes: {found}")
    return PublishedFile(path, state, parts[STUDENTS_MARK], {})


def read_sam(path: str | Path) -> PublishedFile:
    """SAM's file.

    Raises:
        NotFoundError: no such file.
        CheckpointError: not such a file, or a SAM of another size than any encoder of ours.
    """
    path, state = _read(path, SAM_FILE, SAM_MARK)
    heads = {key.split(".")[2] for key in state if key.startswith("super_prompt.box_decoder.")}
    depth = len({key.split(".")[2] for key in state if key.startswith("image_encoder.blocks.")})
    width = _length(path, state, "image_encoder.patch_embed.proj.bias")
    hidden = _length(path, state, "image_encoder.blocks.0.MLP_Adapter.D_fc1.bias")
    channels = _length(path, state, "image_encoder.neck.0.weight")
    tokens = _length(path, state, "super_prompt.box_decoder.0.ffn.3.bias") // channels
    sizes = _encoder_sizes()
    if (width, depth) not in sizes:
        known = ", ".join(f"{name} ({w} wide, {d} deep)" for (w, d), name in sizes.items())
        raise CheckpointError(
            f"{path} holds a SAM encoder {width} wide and {depth} blocks deep, none that is known: {known}"
        )
    return PublishedFile(
        path,
        state,
        len(heads),
        {
            "encoder": {"name": sizes[width, depth], "out_channels": channels},
            "tuning": [{"name": "adapter", "ratio": hidden / width}],
            "prompt": {"name": "learned", "tokens": tokens},
            "train": ["tuning", "prompt"],
        },
    )


def _encoder_sizes() -> dict[tuple[int, int], str]:
    """Width and depth -> name of every encoder of ours that is a ViT of one size."""
    found = {}
    with torch.device("meta"):
        for name, target in components.SAM_ENCODERS.items():
            encoder = components.load(target)()
            if name != "sam_vit" and isinstance(encoder, SamImageEncoder):
                found[encoder.width, len(encoder.blocks)] = name
    return found


def load_published(method: nn.Module, file: PublishedFile) -> Translation:
    """Put a published file's weights into a method's students or SAM, in place; every key is accounted for.

    Args:
        method: holds ``students``, and ``sam_guide`` for SAM's file, built with ``published_code``.
        file: from :func:`read_students` or :func:`read_sam`.
    Raises:
        CheckpointError: keys or shapes that do not fit, or numbers that are not finite; nothing was loaded.
    """
    part, rules = (GUIDE, GUIDE_RULES) if file.sam else (STUDENTS, STUDENT_RULES)
    own = {key: tensor for key, tensor in method.state_dict().items() if key.startswith(f"{part}.")}
    translation = translate(file.state, own, rules)
    if not translation.complete:
        expected = SAM_FILE if file.sam else STUDENTS_FILE
        raise CheckpointError(
            f"{file.path} does not fit the published networks:\n" + "\n".join(f"  {x}" for x in problems(translation)),
            hint=f"Expected {expected} as the published code saves it.",
        )
    broken = [key for key, name in translation.loaded.items() if not torch.isfinite(translation.state[name]).all()]
    if broken:
        raise CheckpointError(f"{file.path} holds NaN or infinity in {_first(broken)}")
    method.load_state_dict(translation.state, strict=False)  # every key is accounted for above
    return translation


def problems(translation: Translation) -> list[str]:
    """What keeps a file from being loaded, a line each: kind, count, first keys and shapes."""
    shapes = [
        f"{key} {_shape(found)}, expected {_shape(want)}" for key, (found, want) in translation.mismatched.items()
    ]
    kinds = (
        ("of another shape", shapes),
        ("unknown", translation.unknown),
        ("not in the file, by our name", translation.missing),
    )
    return [f"{len(names)} {kind}: {_first(names)}" for kind, names in kinds if names]


def report(file: PublishedFile, translation: Translation) -> str:
    """The load report of one file, as a short table."""
    resized = [f"{key} {_shape(old)} -> {_shape(new)}" for key, (old, new) in translation.resized.items()]
    rows = [
        ("loaded as they are", len(translation.loaded) - len(resized), ""),
        ("resized", len(resized), _first(resized)),
        ("left out, as no forward of the published code reaches them", len(translation.dead), _first(translation.dead)),
        ("missing", len(translation.missing), ""),
        ("unknown", len(translation.unknown), ""),
    ]
    lines = [f"  {count:>4} {name}{': ' + detail if detail else ''}" for name, count, detail in rows]
    return "\n".join([f"{file.path.name}: {file.contents}, K = {file.num_classes}", *lines])


def _read(path: str | Path, expected: str, mark: str) -> tuple[Path, dict[str, Tensor]]:
    path = Path(path)
    state = read_state_dict(path, f"checkpoint {expected}", "The published code writes it into its model folder.")
    if all(key.startswith("module.") for key in state):  # saved from within DataParallel
        state = {key.removeprefix("module."): tensor for key, tensor in state.items()}
    if mark not in state:
        raise CheckpointError(
            f"{path} is not {expected} of the published code: it has no {mark}; its {len(state)} keys start with "
            f"{_first(list(state))}",
            hint=_advice(state),
        )
    return path, state


def _length(path: Path, state: Mapping[str, Tensor], key: str) -> int:
    """Length of a tensor's first axis."""
    if key not in state or state[key].ndim < 1:
        found = "no such tensor" if key not in state else "a single number"
        raise CheckpointError(f"{path}: {key} should be a tensor of weights, found {found}")
    return state[key].shape[0]


def _advice(state: Mapping[str, Tensor]) -> str:
    """What the file seems to be, and what to do with it."""
    if STUDENTS_MARK in state:
        return f"It looks like {STUDENTS_FILE}: give it as --subnets."
    if SAM_MARK in state:
        return f"It looks like {SAM_FILE}: give it as --sam."
    if "image_encoder.pos_embed" in state:
        return "It looks like an official SAM file: set sam.weights to it in an experiment instead."
    return f"Give {STUDENTS_FILE} as --subnets and, if you have it, {SAM_FILE} as --sam."


def _first(names: list[str], count: int = 3) -> str:
    more = f", ... ({len(names) - count} more)" if len(names) > count else ""
    return ", ".join(names[:count]) + more


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"
