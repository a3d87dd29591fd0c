"""Reading a user's folder once, whole: which pictures can be used, what they look like, which values masks hold."""

import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from knowsam import io
from knowsam.data.case import Case as StoredCase
from knowsam.data.intensity import AsIs, Intensity, MinMax, Percentile, Preparation, as_picture
from knowsam.data.labels import IGNORE_ID, LabelTable
from knowsam.data.layout import Layout, merge_masks
from knowsam.data.looks import Look, look
from knowsam.data.splits import unlistable
from knowsam.data.traits import Traits, file_traits, is_deep, turned_mask_note
from knowsam.errors import DataError, Fault, KnowsamError

Value = int | tuple[int, int, int]
"""A raw mask value: a number, or a colour."""

_MOST_COLOURS = 1000
_FEW_OBJECTS = 8  # more of them are recognised by their numbers alone


@dataclass(frozen=True)
class VolumeFacts:
    """Of a volume.

    Attributes:
        spacing: mm along D, H, W.
        low, high: smallest and largest value.
    """

    spacing: tuple[float, ...]
    low: float
    high: float


@dataclass
class Case:
    """One image of the folder, and its mask if it has one.

    Attributes:
        id: path below the folder without suffix and extension.
        image: its file.
        look: what the image looks like.
        masks: files of the mask; several are parts of one; empty without one that can be used.
        values: raw mask value -> pixels; None without a mask that can be read and has the image's size.
        objects: raw value -> connected parts of it, of a mask of few whole numbers; else None.
        together: for several masks: the raw values that they have at one pixel -> such pixels.
        traits: of the image file.
        mask_traits: of the first mask's file.
        shape: (H, W) of a picture, (D, H, W) of a volume.
        volume: what its file says beside the voxels; None of a picture.
    """

    id: str
    image: Path
    look: Look
    masks: tuple[Path, ...] = ()
    values: dict[Value, int] | None = None
    objects: dict[int, int] | None = None
    together: dict[tuple[Value, ...], int] | None = None
    traits: Traits = Traits()
    mask_traits: Traits = Traits()
    shape: tuple[int, ...] = ()
    volume: VolumeFacts | None = None


@dataclass
class Survey:
    """What was found.

    Attributes:
        cases: with an image that can be read, sorted by id.
        faults: images and masks that cannot be used, and why.
        orphans: ids of masks that have no image, sorted.
    """

    cases: list[Case] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    orphans: list[str] = field(default_factory=list)


RULES: dict[str, Intensity] = {"as_is": AsIs(), "minmax": MinMax(), "percentile": Percentile()}
"""Intensity rules that a survey can look through, by the name that an experiment has for them."""


def survey(
    layout: Layout,
    *,
    intensity: str = "as_is",
    merge: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Survey:
    """Read every image and every mask of a folder. A broken file is noted and passed over.

    Args:
        layout: where they lie.
        intensity: one of ``RULES``.
        merge: several masks of one image are parts of one; else such images count as without mask.
        progress: called as (cases done, cases in all).
    Raises:
        NotFoundError: a folder is not there.
    """
    images, masks, further = layout.image_files(), layout.mask_files(), layout.further_masks()
    found = Survey(orphans=sorted(set(masks) - set(images)))
    jobs: list[tuple[str, Path, list[Path]]] = []
    for case_id, files in images.items():
        if reason := unlistable(case_id):
            found.faults.append(Fault("image left out", f"{files[0]}: the name {case_id!r} {reason}", (case_id,)))
        elif len(files) > 1:
            text = f"{case_id}: several files of one name: {' and '.join(map(str, files))}"
            found.faults.append(Fault("image left out", text, (case_id,)))
        else:
            whole, parts = masks.get(case_id, []), further.get(case_id, [])
            if len(whole) > 1 or (len(whole + parts) > 1 and not merge):
                text = f"{case_id}: has several masks, {' and '.join(map(str, whole + parts))}"
                text += "; keep one" if len(whole) > 1 else "; --several-masks merge makes one of them"
                found.faults.append(Fault("mask not used", text, (case_id,)))
                whole = parts = []
            jobs.append((case_id, files[0], whole + parts))
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        for n, (case, faults) in enumerate(pool.map(lambda job: _read(*job, intensity=intensity), jobs)):
            found.faults += faults
            if case is not None:
                found.cases.append(case)
            if progress:
                progress(n + 1, len(jobs))
    found.cases.sort(key=lambda case: case.id)
    return found


def _read(case_id: str, image: Path, masks: list[Path], *, intensity: str) -> tuple[Case | None, list[Fault]]:
    try:
        case = _volume_case(case_id, image) if _is_volume(image) else _picture_case(case_id, image, intensity)
    except KnowsamError as error:
        return None, [Fault("image left out", str(error), (case_id,))]
    if not masks:
        return case, []
    try:
        if case.volume is None:
            case.mask_traits = file_traits(masks[0])
        raws = [_fitting_mask(path, case) for path in masks]
        counts = [raw_values(raw, str(path)) for raw, path in zip(raws, masks, strict=True)]
    except KnowsamError as error:
        return case, [Fault("mask not used", str(error), (case_id,))]
    case.values = {value: sum(c.get(value, 0) for c in counts) for c in counts for value in c}
    if len(raws) > 1:
        case.together = _together(raws)
    elif raws[0].ndim == 2 and int(raws[0].max(initial=0)) < _FEW_OBJECTS:
        from knowsam.data.label_guess import connected_parts  # which knows this module's values

        case.objects = connected_parts(raws[0])
    case.masks = tuple(masks)
    return case, []


def _is_volume(path: Path) -> bool:
    return path.name.lower().endswith((".nii", ".nii.gz"))


def _picture_case(case_id: str, path: Path, intensity: str) -> Case:
    pixels = _as_seen(path, intensity)
    return Case(case_id, path, look(pixels), traits=file_traits(path), shape=pixels.shape[:2])


def _as_seen(path: Path, intensity: str) -> np.ndarray:
    """uint8 (H, W, 3)."""
    stored = io.read_image(path)
    if stored.array.ndim != 3:
        size = " x ".join(map(str, stored.array.shape[1:]))
        raise DataError(f"{path}: is a volume of {size}, not a picture", hint="Give volumes in a folder of their own.")
    case = StoredCase(stored.array, None, stored.full_range, stored.display)
    channels = 3 if len(stored.array) in (1, 3) else len(stored.array)
    return as_picture(Preparation(RULES[intensity], channels)(case, str(path)))


def _volume_case(case_id: str, path: Path) -> Case:
    """Its look is that of the slice in the middle."""
    volume = io.read_image(path)
    if len(volume.array) > 1:
        raise DataError(f"{path}: has {len(volume.array)} channels; needed are volumes of three axes and one channel")
    array = volume.array[0]
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise DataError(f"{path}: {int((~np.isfinite(array)).sum())} voxels are NaN or infinite")
    if array.ndim != 3:
        raise DataError(f"{path}: has axes {array.shape}; needed are three")
    middle = as_picture(Preparation(Percentile())(StoredCase(array[None, len(array) // 2])))
    facts = VolumeFacts(volume.spacing or (1.0, 1.0, 1.0), float(array.min()), float(array.max()))
    return Case(case_id, path, look(middle), shape=array.shape, volume=facts)


def _fitting_mask(path: Path, case: Case) -> np.ndarray:
    """Raw values of a mask of its image's size; those of a volume as one tall picture."""
    if case.volume is not None:
        volume = io.read_mask(path).array
        if volume.shape != case.shape:
            sizes = (" x ".join(map(str, shape)) for shape in (volume.shape, case.shape))
            raise DataError(f"{path}: the mask is {next(sizes)}, the image {next(sizes)} (slices x rows x columns)")
        return volume.reshape(-1, volume.shape[-1])
    stored, shape = io.read_mask(path), case.shape
    raw = stored.array
    case.mask_traits = replace(case.mask_traits, by="index" if stored.by == "index" else "colour")
    if raw.shape[:2] != shape:
        why = turned_mask_note(case.traits, case.mask_traits) if raw.shape[:2] == shape[::-1] else ""
        raise DataError(
            f"{path}: the mask is {raw.shape[0]} x {raw.shape[1]}, the image {shape[0]} x {shape[1]} "
            f"(height x width){why}"
        )
    return raw


def _together(raws: list[np.ndarray]) -> dict[tuple[Value, ...], int]:
    """The raw values that several masks have at one pixel -> such pixels."""
    values: list[list[Value]] = []
    code = np.zeros(raws[0].shape[:2], np.int64).ravel()
    for raw in raws:
        wide = raw.astype(np.int64)
        numbers = wide[..., 0] << 16 | wide[..., 1] << 8 | wide[..., 2] if raw.ndim == 3 else wide
        there, position = np.unique(numbers.ravel(), return_inverse=True)
        values.append([(c >> 16, c >> 8 & 255, c & 255) if raw.ndim == 3 else c for c in there.tolist()])
        code = code * len(there) + position
    found: dict[tuple[Value, ...], int] = {}
    for number, count in zip(*(x.tolist() for x in np.unique(code, return_counts=True)), strict=True):
        key: list[Value] = []
        for there in reversed(values):
            number, place = divmod(number, len(there))
            key.append(there[place])
        found[tuple(reversed(key))] = count
    return found


def raw_values(raw: np.ndarray, where: str) -> dict[Value, int]:
    """Pixels of each raw value of a mask.

    Args:
        raw: as ``io.read_mask`` gives it, (H, W) or (H, W, 3).
        where: file name for the message.
    Raises:
        DataError: a photograph rather than a mask.
    """
    if raw.ndim == 2:
        values, counts = np.unique(raw, return_counts=True)
        return dict(zip(values.tolist(), counts.tolist(), strict=True))
    wide = raw.astype(np.int64)
    codes, counts = np.unique(wide[..., 0] << 16 | wide[..., 1] << 8 | wide[..., 2], return_counts=True)
    if len(codes) > _MOST_COLOURS:
        raise DataError(f"{where}: {len(codes)} colours; a mask has one for each class")
    return {(c >> 16, c >> 8 & 255, c & 255): n for c, n in zip(codes.tolist(), counts.tolist(), strict=True)}


def class_pixels(values: Mapping[Value, int], table: LabelTable) -> tuple[np.ndarray, list[Value]]:
    """Pixels of each class in a mask, and the raw values that have no class.

    Args:
        values: of the mask.
        table: which value is which class.
    Returns:
        int64 (K,); the strange values.
    """
    pixels = np.zeros(table.num_classes, np.int64)
    strange: list[Value] = []
    for value, count in values.items():
        try:
            class_id = class_of(value, table)
        except DataError:
            strange.append(value)
            continue
        if class_id != IGNORE_ID:
            pixels[class_id] += count
    return pixels, strange


def class_of(value: Value, table: LabelTable) -> int:
    """Class of one raw value; ``IGNORE_ID`` of one that is ignored.

    Raises:
        DataError: it has none.
    """
    raw = np.array([[value]], np.uint8 if isinstance(value, tuple) else np.uint16)
    return int(table.apply(raw)[0, 0])


def without_strange_masks(cases: Iterable[Case], table: LabelTable) -> tuple[list[Case], list[Fault]]:
    """The cases, those masks taken away that hold a value without a class.

    Args:
        cases: as ``survey`` gives them.
        table: which raw value is which class.
    Returns:
        The cases, sorted as before; a fault for each mask that was taken away.
    """
    kept, faults = [], []
    for case in cases:
        values = case.values or {}
        where = " and ".join(map(str, case.masks))
        if strange := class_pixels(values, table)[1]:
            shown = ", ".join(f"{show_value(v)} ({values[v]} pixels)" for v in sorted(strange, key=str)[:8])
            more = ", ..." if len(strange) > 8 else ""
            faults.append(Fault("mask not used", f"{where}: no class has the values {shown}{more}", (case.id,)))
            case = replace(case, masks=(), values=None, together=None)
        elif case.together is not None:
            try:
                case = replace(case, values=_merged_values(case.together, table), together=None)
            except DataError as error:
                faults.append(Fault("mask not used", f"{where}: {error}", (case.id,)))
                case = replace(case, masks=(), values=None, together=None)
        kept.append(case)
    return kept, faults


def _merged_values(together: Mapping[tuple[Value, ...], int], table: LabelTable) -> dict[Value, int]:
    """Pixels of each class after merging, under the raw value that each class is written as.

    Raises:
        DataError: masks that give one pixel several classes.
    """
    first: dict[int, Value] = dict(enumerate(table.raw_values()))
    if table.ignored:
        first[IGNORE_ID] = table.ignored[0]
    counts = np.array(list(together.values()))
    columns = [[class_of(value, table) for value in column] for column in zip(*together, strict=True)]
    merged = merge_masks([np.repeat(np.array(column, np.uint8), counts) for column in columns])
    classes, pixels = np.unique(merged, return_counts=True)
    return {first[k]: n for k, n in zip(classes.tolist(), pixels.tolist(), strict=True)}


def show_value(value: Value) -> str:
    """``255``, or ``[255, 0, 0]``, as YAML has them."""
    return str(list(value)) if isinstance(value, tuple) else str(value)


def suggest_intensity(images: Iterable[Path], sample: int = 32) -> tuple[str, str]:
    """The ``intensity`` that fits the files, and why in a few words (nothing where it is the usual one).

    Pictures of 8 bits need no scaling. Those of 16 bits seldom use their range: read as they are, they would be black.

    Args:
        sample: so many of the files with more than 8 bits are decoded.
    """
    deep = []
    for path in images:
        try:
            if is_deep(path):
                deep.append(path)
        except KnowsamError:
            continue  # the survey reports it
    brightest = []
    for path in deep[:: max(1, len(deep) // sample)]:
        try:
            stored = io.read_image(path)
            levels = AsIs()(StoredCase(stored.array, None, stored.full_range, stored.display), str(path))
            brightest.append(int(levels.max()) / (255 if levels.dtype == np.uint8 else 65535))
        except DataError as error:
            try:
                _as_seen(path, "percentile")
            except KnowsamError:
                continue  # broken under any rule
            return "percentile", f"{len(deep)} images hold more than 8 bits, and not all in a known range ({error})"
        except KnowsamError:
            continue
    if brightest and np.median(brightest) < 0.5:
        share = f"{100 * float(np.median(brightest)):.0f} %"
        return "percentile", f"{len(deep)} images hold more than 8 bits, of whose range they use about {share}"
    return "as_is", ""
