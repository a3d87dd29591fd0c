"""How a folder of volumes is to be trained on: the size of crops, the rule of intensity, the names of its classes."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from knowsam.data.layout import pictures_below, volumes_below
from knowsam.data.survey import Case
from knowsam.errors import DataError

DESCRIPTION = "dataset.json"
"""The file in which nnU-Net and the Medical Segmentation Decathlon name classes."""

_STEP = 16  # networks halve every side four times
_MOST = {"small": 64, "full": 128}
_HOUNSFIELD = -500  # air is far below in CT, and nothing is in MRI


@dataclass(frozen=True)
class VolumePlan:
    """What is written down for training.

    Attributes:
        shape: median (D, H, W) in voxels.
        intensity: as ``data.intensity``.
        notes: what was found and assumed, for people.
    """

    shape: tuple[int, ...]
    intensity: dict[str, Any]
    notes: list[str]

    def patch_size(self, recipe: str) -> list[int]:
        """``data.patch_size``: multiples of 16, as large as the volumes as far as the recipe's memory allows.

        Args:
            recipe: ``full`` or ``small``.
        """
        most = _MOST[recipe]
        return [max(_STEP, min(most, round(side / _STEP) * _STEP)) for side in self.shape]


def holds_volumes(folder: Path) -> bool:
    """Whether a folder is one of NIfTI volumes rather than of pictures.

    Args:
        folder: the user's.
    """
    return folder.is_dir() and not pictures_below(folder) and bool(volumes_below(folder))


def plan_volumes(cases: Sequence[Case]) -> VolumePlan:
    """Work out crops and intensities.

    Args:
        cases: volumes that can be read.
    Raises:
        DataError: there are none.
    """
    volumes = [(case.shape, case.volume) for case in cases if case.volume is not None]
    if not volumes:
        raise DataError("no volume can be read", hint="Read are NIfTI volumes of three axes.")
    shape = tuple(int(side) for side in np.median([shape for shape, _ in volumes], axis=0))
    spacings = np.array([facts.spacing for _, facts in volumes])
    notes = [f"volumes of about {' x '.join(map(str, shape))} voxels (slices x rows x columns)"]
    low, high = spacings.min(axis=0), spacings.max(axis=0)
    sides = [f"{a:.3g}" if np.isclose(a, b) else f"{a:.3g} to {b:.3g}" for a, b in zip(low, high, strict=True)]
    notes[0] += f" of {' x '.join(sides)} mm"
    if np.median([facts.low for _, facts in volumes]) < _HOUNSFIELD:
        intensity: dict[str, Any] = {"name": "percentile", "scope": "dataset"}
        notes.append(
            "values below -500 look like Hounsfield units of CT: one range for all volumes, by percentiles over the "
            "training cases; where the organ is known, a window is better, such as {name: window, low: -160, high: 240}"
        )
    else:
        intensity = {"name": "zscore", "scope": "case"}
        notes.append("values have no unit, as in MRI: each volume is scaled by its own mean and spread")
    return VolumePlan(shape, intensity, notes)


def named_classes(root: Path) -> list[str] | None:
    """The names that a ``dataset.json`` beside the folders gives to class ids 0, 1, 2, ...; None without.

    Args:
        root: of images and masks.
    """
    for folder in (root, root.parent):
        try:
            labels = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8")).get("labels")
        except (OSError, ValueError, AttributeError):
            continue
        if not isinstance(labels, dict):
            continue
        by_id: dict[int, str] = {}
        for key, value in labels.items():  # the Decathlon has {"1": "liver"}, nnU-Net {"liver": 1}
            for number, name in ((key, value), (value, key)):
                if str(number).isdecimal() and not str(name).isdecimal():
                    by_id[int(number)] = str(name)
        if len(by_id) > 1 and sorted(by_id) == list(range(len(by_id))) and len(set(by_id.values())) == len(by_id):
            return [by_id[k] for k in range(len(by_id))]
    return None
