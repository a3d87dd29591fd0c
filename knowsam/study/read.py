"""A folder in, a study out: which images can be used, what their masks mean, and the lists that were drawn."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from knowsam.data.layout import Layout, find_layout
from knowsam.data.make_splits import ALL_MASKS, Amount, Drawn, draw, tie_units
from knowsam.data.readers import EXTENSIONS
from knowsam.data.splits import group_of, read_groups
from knowsam.data.survey import Survey, suggest_intensity, survey, without_strange_masks
from knowsam.errors import ConfigError, DataError
from knowsam.study.classes import Classes, absent_classes, understand_masks

DEFAULT_LABELLED = (Amount(5, "pct"), Amount(10, "pct"), Amount(20, "pct"))


@dataclass(frozen=True)
class StudyOptions:
    """Where the pictures are, and how to divide them.

    Attributes:
        images: folder of the images, or one that holds images and masks.
        masks: folder of the masks; None: looked for near the images.
        image_suffix, mask_suffix: what names have after the case, such as ``_0000``; None: worked out from the names.
        classes: K names, background first; None: made up.
        labels: class id -> raw mask value or values, as ``data.labels``; None: guessed from the masks.
        intensity: how values become 0..255, see ``readers.to_uint8``; None: what fits the files.
        val, test: per cent of the cases with a mask.
        labelled: sizes of the label lists; None: ``DEFAULT_LABELLED``, as far as there are masks enough.
        group_regex: the part of a name that is the patient; excludes ``groups``.
        groups: CSV file that names the patient of each image.
        group_column, id_column: its columns of patients and of image names.
        near_duplicates: also keep images on one side that look nearly alike.
        seed: of the draws.
    Raises:
        ConfigError: class names or labels that cannot be meant, or patients given twice.
    """

    images: Path
    masks: Path | None = None
    image_suffix: str | None = None
    mask_suffix: str | None = None
    classes: Sequence[str] | None = None
    labels: Mapping[Any, Any] | None = None
    intensity: str | None = None
    val: float = 10.0
    test: float = 20.0
    labelled: Sequence[Amount] | None = None
    group_regex: str | None = None
    groups: Path | None = None
    group_column: str = "group"
    id_column: str = "id"
    near_duplicates: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        names = self.classes
        if names is not None and ("" in names or len(set(names)) < max(2, len(names)) or "mean" in names):
            raise ConfigError(
                f"classes are {', '.join(map(repr, names))}; needed are 2 or more different names, background first, "
                "none of them 'mean'"
            )
        if self.labels is not None and len(self.labels) < 2:
            raise ConfigError(f"labels {dict(self.labels)!r} name {len(self.labels)} class; needed are 2 or more")
        if self.groups is not None and self.group_regex is not None:
            raise ConfigError("--groups and --group-regex exclude each other; give one of them")


@dataclass
class Study:
    """A user's folder, read and divided.

    Attributes:
        options: what was asked for.
        layout: where images and masks lie.
        intensity: how values become 0..255.
        survey: what can be used.
        classes: what the masks mean.
        groups: id -> patient; None: unknown.
        drawn: the lists.
        notes: what was found and assumed, for people.
        warnings: what they should look into.
    """

    options: StudyOptions
    layout: Layout
    intensity: str
    survey: Survey
    classes: Classes
    groups: dict[str, str] | None
    drawn: Drawn
    notes: list[str]
    warnings: list[str]


def read_study(options: StudyOptions, progress: Callable[[int, int], None] | None = None) -> Study:
    """Read images and masks, work out the classes, draw the lists. Nothing is written.

    Args:
        options: which folder, and how.
        progress: called as (images done, images in all).
    Raises:
        NotFoundError, DataError, ConfigError: what keeps the folder from being used.
    """
    layout = find_layout(
        options.images, options.masks, image_suffix=options.image_suffix, mask_suffix=options.mask_suffix
    )
    intensity, why = (options.intensity, "") if options.intensity else suggest_intensity(_all_files(layout))
    found = survey(layout, intensity=intensity, progress=progress)
    notes = [_layout_note(layout, found)]
    if why:
        notes.append(f"intensity {intensity}, for ALL images, those of 8 bits too: {why}")
    classes = understand_masks(found, options.classes, options.labels)
    notes.append(classes.reason)
    found.cases, strange = without_strange_masks(found.cases, classes.table)
    found.faults += strange
    looks = {case.id: case.look for case in found.cases}
    groups = _groups(options, looks)
    units, same, near = tie_units(looks, groups, near=options.near_duplicates)
    drawn = draw(
        units,
        [case.id for case in found.cases if case.values is not None],
        val=options.val,
        test=options.test,
        labelled=DEFAULT_LABELLED if options.labelled is None else options.labelled,
        seed=options.seed,
        skip_impossible=options.labelled is None,  # nobody asked for the usual ones
    )
    notes += _duplicate_notes(same, near)
    warnings = [
        *drawn.warnings,
        *_survey_warnings(layout, found, drawn),
        *_group_warnings(groups, units, len(found.cases)),
        *_list_warnings(found, drawn, classes),
    ]
    return Study(options, layout, intensity, found, classes, groups, drawn, notes, warnings)


def _all_files(layout: Layout) -> Iterable[Path]:
    return (path for files in layout.image_files().values() for path in files)


def _layout_note(layout: Layout, found: Survey) -> str:
    masked = sum(case.values is not None for case in found.cases)
    note = f"{len(found.cases)} images that can be used in {layout.images}"
    if layout.image_suffix:
        note += f", called <case>{layout.image_suffix}"
    if layout.masks is None:
        return note + "; no masks were found"
    note += f"; {masked} have a mask in {layout.masks}"
    return note + (f", called <case>{layout.mask_suffix}" if layout.mask_suffix else "")


def _groups(options: StudyOptions, ids: Iterable[str]) -> dict[str, str] | None:
    """Patient of each image.

    Raises:
        NotFoundError, ConfigError: a table or an expression that cannot be used.
        DataError: images without a patient.
    """
    if options.group_regex is not None:
        found = {i: group_of(i, options.group_regex) for i in ids}
        by = f"by {options.group_regex!r}"
    elif options.groups is not None:
        given = read_groups(options.groups, options.id_column, options.group_column)
        by_stem = {str(Path(i).with_suffix("")): group for i, group in given.items() if Path(i).suffix}
        found = {i: given.get(i, by_stem.get(i)) for i in ids}
        by = f"in {options.groups}"
    else:
        return None
    groups = {i: group for i, group in found.items() if group is not None}
    if missing := [i for i in found if i not in groups]:
        shown = ", ".join(missing[:10]) + (", ..." if len(missing) > 10 else "")
        raise DataError(f"{len(missing)} of {len(found)} images have no group {by}: {shown}")
    return groups


def _duplicate_notes(same: list[list[str]], near: list[tuple[str, str, float]]) -> list[str]:
    notes = []
    if same:
        shown = "; ".join(" = ".join(found) for found in same[:5]) + ("; ..." if len(same) > 5 else "")
        notes.append(f"{len(same)} set(s) of equal images, each kept on one side: {shown}")
    if near:
        shown = "; ".join(f"{a} ~ {b}" for a, b, _ in near[:5]) + ("; ..." if len(near) > 5 else "")
        notes.append(f"{len(near)} pair(s) of near duplicates, each kept on one side: {shown}")
    return notes


def _survey_warnings(layout: Layout, found: Survey, drawn: Drawn) -> list[str]:
    """Files that play no part."""
    warnings = [fault.kind + ": " + fault.text for fault in found.faults]
    if others := layout.other_files():
        kinds = ", ".join(f"{n} {kind}" for kind, n in others.most_common(5))
        warnings.append(f"files of other kinds are passed over: {kinds}; read are {', '.join(EXTENSIONS)}")
    if found.orphans:
        shown = ", ".join(found.orphans[:5]) + (", ..." if len(found.orphans) > 5 else "")
        warnings.append(f"{len(found.orphans)} mask(s) have no image: {shown}")
    if drawn.left_out:
        warnings.append(
            f"{len(drawn.left_out)} image(s) without a mask are in no list, for val or test holds their group"
        )
    return warnings


def _group_warnings(groups: dict[str, str] | None, units: Sequence[Sequence[str]], cases: int) -> list[str]:
    """What was kept together without need, or may have been taken apart."""
    warnings = []
    largest = max(units, key=len)
    if len(largest) > max(10, 0.1 * cases) and (groups is None or len({groups[i] for i in largest}) > 1):
        warnings.append(
            f"near duplicates tie {len(largest)} of {cases} images together; if they are no copies, "
            "--no-near-duplicates unties them"
        )
    if groups is None:
        warnings.append(
            "patients are unknown: images of one patient may be in train and in test. "
            "If names or a table tell them, give --group-regex or --groups"
        )
    return warnings


def _list_warnings(found: Survey, drawn: Drawn, classes: Classes) -> list[str]:
    """Lists that are equal, or lack a class."""
    warnings = []
    label_lists = [name for name in drawn.lists if name.startswith("labelled_") and name != ALL_MASKS]
    for n, name in enumerate(label_lists):
        for other in label_lists[:n]:
            if drawn.lists[name] == drawn.lists[other]:
                warnings.append(f"{other} and {name} hold the same cases: there are too few to tell them apart")
    for name, ids in drawn.lists.items():
        if name not in ("train", ALL_MASKS) and (absent := absent_classes(found, ids, classes.table)):
            warnings.append(f"{name} holds no pixel of {', '.join(classes.names[k] for k in absent)}")
    return warnings
