"""What ``published_code`` may name: each behaviour of the published code that ours corrects, alone or all together.

Without torch on purpose: a configuration is checked against this table before anything slow is imported.
"""

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from knowsam.errors import ConfigError


@dataclass(frozen=True)
class Row:
    """One behaviour of the published code.

    Attributes:
        part: what it changes: ``students``, ``fusion``, ``sam``, ``adapters`` (SAM's), ``method`` or ``optim``.
        published: what the published code does, one line.
        sets: options of the experiment that say it, by dotted key; empty where code of this package does it.
    """

    part: str
    published: str
    sets: Mapping[str, Any] = field(default_factory=dict)


ROWS: dict[str, Row] = {
    "consistency_last_class": Row("method", "consistency of the last class alone, on clamped probabilities"),
    "consistency_swapped": Row(
        "method", "the second student's consistency has prediction and target swapped, hence no gradient"
    ),
    "distillation_width_two": Row(
        "method",
        "distillation over rows of width 2, whatever the number of classes",
        {"method.skd.confidence_threshold": 0.0},  # such rows are no pixels that could be left out
    ),
    "entropy_log_two": Row("method", "entropy loss -p log(p + 1e-6), divided by log 2 whatever the number of classes"),
    "ramp_in_stairs": Row("method", "the consistency ramp climbs in 200 stairs of int(max_steps / 200) steps"),
    "mix_least_uncertain": Row(
        "method", "mixing takes the least uncertain cells", {"method.mix.pick": "least_uncertain"}
    ),
    "teacher_train_mode": Row(
        "method", "SAM teaches in train mode, by the very logits that it learns", {"method.skd.teacher_mode": "train"}
    ),
    "teacher_full_weight": Row(
        "method",
        "SAM's distillation and pseudo-labels count in full, for every pixel, from their first step",
        {
            "method.skd.rampup": 0.0,
            "method.skd.confidence_threshold": 0.0,
            "method.mix.rampup": 0.0,
            "method.mix.confidence_threshold": 0.0,
        },
    ),
    "sam_strong_view": Row("method", "SAM sees the students' strong views", {"method.skd.view": "strong"}),
    "students_unnormalised": Row("students", "students see images in 0..1 as they are"),
    "fusion_rectified": Row("fusion", "the fused logits pass batch norm and LeakyReLU"),
    "fusion_xor": Row("fusion", "disagreement is the XOR of the class probabilities cut at 0.5"),
    "fusion_entropy_nats": Row("fusion", "the fusion head sees 1 - entropy in nats, with log(p + 1e-6)"),
    "sam_unnormalised": Row(
        "sam",
        "SAM sees images in 0..1 without its pixel mean and std",
        {"sam.pixel_mean": [0.0, 0.0, 0.0], "sam.pixel_std": [255.0, 255.0, 255.0]},  # of pixel values 0..255
    ),
    "windows_padded_first": Row(
        "sam", "windows are padded before the norm, so padding is normalised to the norm's bias"
    ),
    "no_relative_positions": Row("sam", "SAM's relative positions are dropped"),
    "random_decoder_mlps": Row("sam", "the mask decoder's MLPs stay random and frozen"),
    "random_adapters": Row("adapters", "adapters start at random", {"sam.tuning.zero_init": False}),
    "decoder_first_residual": Row("sam", "the mask decoder's first self-attention has a residual too"),
    "decoder_positions_stay": Row(
        "sam", "the mask decoder's second self-attention has token positions in values and residual too"
    ),
    "decoder_adapter_twice": Row("adapters", "the decoder's last adapter is applied once more, after the final norm"),
    "no_dense_prompt": Row("sam", "the prompt generator makes sparse tokens only", {"sam.prompt.dense": False}),
    "late_learning_rate": Row("optim", "the learning rate follows its schedule one step late"),
}
"""Name -> row. docs/fidelity.md says of each what we do instead, and why."""


def select(value: Any) -> tuple[str, ...]:
    """The rows that a value of ``published_code`` asks for, in the order of the table.

    Args:
        value: False for none, True for all, or a list of names.
    Raises:
        ConfigError: anything else; an unknown name is told with the nearest one.
    """
    if value is True:
        return tuple(ROWS)
    if value is False or value is None:
        return ()
    if not isinstance(value, list | tuple) or not all(isinstance(name, str) for name in value):
        raise ConfigError(f"must be true, false or a list of row names, got {value!r}", hint=_KNOWN)
    for name in value:
        if name not in ROWS:
            near = difflib.get_close_matches(name, ROWS, n=1)
            advice = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(ROWS)}"
            raise ConfigError(f"there is no row {name!r}; {advice}", hint=_KNOWN)
    return tuple(name for name in ROWS if name in value)


_KNOWN = "docs/fidelity.md lists the rows."


def settings(rows: tuple[str, ...]) -> dict[str, Any]:
    """Options that the chosen rows set, by dotted key."""
    return {key: value for name in rows for key, value in ROWS[name].sets.items()}


def problems(rows: tuple[str, ...], absent: Mapping[str, str], options: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What speaks against the chosen rows: (dotted key, text) each.

    Args:
        rows: from :func:`select`.
        absent: by part, what an experiment lacks that a row would change; empty or left out where it is there.
        options: what the experiment says, by dotted key.
    """
    needs: dict[str, list[str]] = {}
    for name in rows:
        # Adapters are part of SAM: where there is none, one complaint is enough.
        part = "sam" if ROWS[name].part == "adapters" and absent.get("sam") else ROWS[name].part
        if absent.get(part):
            needs.setdefault(absent[part], []).append(name)
    for needed, names in needs.items():
        yield "published_code", f"needs {needed} for {', '.join(names)}; add it, or list only the other rows"
    for name in rows:
        for key, value in ROWS[name].sets.items():
            if key in options and options[key] != value:
                text = f"is {options[key]!r}, but row {name!r} of published_code makes it {value!r}; leave it out"
                yield key, text
