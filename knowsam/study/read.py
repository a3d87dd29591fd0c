"""A folder in, a study out: which images can be used, what their masks mean, and the lists that were drawn."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from knowsam import io
from knowsam.data.layout import ANY_NAME, WANTED, Folders, Layout, find_layout, pictures_below, show_tree, volumes_below
from knowsam.data.make_splits import ALL_MASKS, Amount, Drawn, draw, tie_units
from knowsam.data.splits import group_of, read_groups
from knowsam.data.survey import Survey, suggest_intensity, survey, without_strange_masks
from knowsam.data.traits import orientation_note, palette_note
from knowsam.errors import ConfigError, DataError
from knowsam.study.classes import Classes, absent_classes, understand_masks
from knowsam.study.ready import keep_splits
from knowsam.study.volumes import DESCRIPTION, VolumePlan, holds_volumes, named_classes, plan_volumes

DEFAULT_LABELLED = (Amount(5, "pct"), Amount(10, "pct"), Amount(20, "pct"))


@dataclass(frozen=True)
class StudyOptions:
    """Where the pictures are, and how to divide them.

    Attributes:
        images: folder of the images, or one that holds images and masks.
        masks: folder of the masks; None: looked for near the images.
        unlabelled: folder of further images without masks; None: one of that name inside ``images``.
        image_suffix, mask_suffix: what names have after the case, such as ``_0000``; None: worked out from the names.
        classes: K names, background first; None: made up.
        labels: class id -> raw mask value or values, as ``data.labels``; ``"binary"``: every value above 0 is class 1,
            such as numbered instances; None: guessed from the masks.
        ignore: raw mask value or values of pixels about which nothing is known; None: guessed with the labels.
        several_masks: ``"merge"``: numbered masks of one image are parts of one; ``"leave"``: such images count as
            unlabelled; None: refused where there are any, with the question.
        intensity: name of the rule, see ``survey.RULES``; None: what fits the files.
        val, test: per cent of the cases with a mask.
        labelled: sizes of the label lists; None: ``DEFAULT_LABELLED``, as far as there are masks enough.
        group_regex: the part of a name that is the patient; excludes ``groups``.
        groups: CSV file that names the patient of each image.
        group_column, id_column: its columns of patients and of image names.
        near_duplicates: also keep images on one side that look nearly alike.
        ready_splits: keep folders called train, val and test as they are; else all is drawn anew.
        seed: of the draws.
    Raises:
        ConfigError: class names or labels that cannot be meant, or patients given twice.
    """

    images: Path
    masks: Path | None = None
    unlabelled: Path | None = None
    image_suffix: str | None = None
    mask_suffix: str | None = None
    classes: Sequence[str] | None = None
    labels: Mapping[Any, Any] | Literal["binary"] | None = None
    ignore: Any = None
    several_masks: Literal["merge", "leave"] | None = None
    intensity: str | None = None
    val: float = 10.0
    test: float = 20.0
    labelled: Sequence[Amount] | None = None
    group_regex: str | None = None
    groups: Path | None = None
    group_column: str = "group"
    id_column: str = "id"
    near_duplicates: bool = True
    ready_splits: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        names = self.classes
        if names is not None and ("" in names or len(set(names)) < max(2, len(names)) or "mean" in names):
            raise ConfigError(
                f"classes are {', '.join(map(repr, names))}; needed are 2 or more different names, background first, "
                "none of them 'mean'"
            )
        if self.labels is not None and self.labels != "binary" and len(self.labels) < 2:
            raise ConfigError(f"labels {dict(self.labels)!r} name {len(self.labels)} class; needed are 2 or more")
        if self.groups is not None and self.group_regex is not None:
            raise ConfigError("--groups and --group-regex exclude each other; give one of them")


@dataclass
class Study:
    """A user's folder, read and divided.

    Attributes:
        options: what was asked for.
        layout: where images and masks lie.
        intensity: name of the rule.
        survey: what can be used.
        classes: what the masks mean.
        groups: id -> patient; None: unknown.
        drawn: the lists.
        notes: what was found and assumed, for people.
        warnings: what they should look into.
        volumes: how they are to be trained on; None of pictures.
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
    volumes: VolumePlan | None = None


def read_study(options: StudyOptions, progress: Callable[[int, int], None] | None = None) -> Study:
    """Read images and masks, work out the classes, draw the lists. Nothing is written.

    Args:
        options: which folder, and how.
        progress: called as (images done, images in all).
    Raises:
        NotFoundError, DataError, ConfigError: what keeps the folder from being used.
    """
    volumes = holds_volumes(options.images)
    layout = find_layout(
        options.images,
        options.masks,
        scan=volumes_below if volumes else pictures_below,
        unlabelled=options.unlabelled,
        image_suffix=options.image_suffix,
        mask_suffix=options.mask_suffix,
    )
    if layout.masks is None:
        raise DataError(
            f"there is no mask that can be used. In {layout.root} there are:\n{show_tree(layout.root)}",
            hint=f"Training needs some; --masks says where. Understood are {WANTED}.",
        )
    _ask_about_several(layout, options)
    intensity, why = options.intensity or "as_is", ""
    if options.intensity is None and not volumes:
        intensity, why = suggest_intensity(_all_files(layout))
    merge = options.several_masks == "merge"
    found = survey(layout, intensity=intensity, merge=merge, progress=progress)
    notes = [_layout_note(layout, found)]
    if why:
        notes.append(f"intensity {intensity}, for ALL images, those of 8 bits too: {why}")
    plan = plan_volumes(found.cases) if volumes else None
    notes += plan.notes if plan is not None else []
    stored = _stored_warnings(found)
    names = options.classes
    if names is None and options.labels is None and volumes and (names := named_classes(layout.root)) is not None:
        notes.append(f"classes are named by {DESCRIPTION}")
    try:
        classes = understand_masks(found, names, options.labels, options.ignore)
    except DataError as error:
        raise DataError("\n".join([str(error), *stored]), hint=error.hint) from error
    notes.append(classes.reason)
    found.cases, strange = without_strange_masks(found.cases, classes.table)
    found.faults += strange
    if merge and (several := sum(len(case.masks) > 1 for case in found.cases)):
        notes.append(f"several masks of {several} images are merged into one each")
    looks = {case.id: case.look for case in found.cases}
    groups = _groups(options, looks)
    units, same, near = tie_units(looks, groups, near=options.near_duplicates)
    masked = [case.id for case in found.cases if case.values is not None]
    if len(masked) < 2:
        raise DataError(
            f"{len(masked)} of {len(found.cases)} images have a mask that can be used; needed are 2: one to learn from "
            "and one to validate on (and a third to test on, without --test 0)",
            hint="Have more images labelled.",
        )
    amounts = DEFAULT_LABELLED if options.labelled is None else options.labelled
    skip = options.labelled is None  # nobody asked for the usual ones
    if layout.split_of and options.ready_splits:
        drawn, kept = keep_splits(
            {i: layout.split(i) for i in looks}, units, same, near, masked, groups,
            val=options.val, test=options.test, labelled=amounts, seed=options.seed, skip_impossible=skip,
        )  # fmt: skip
        notes.append(kept)
    else:
        drawn = draw(
            units,
            masked,
            val=options.val,
            test=options.test,
            labelled=amounts,
            seed=options.seed,
            skip_impossible=skip,
        )
    notes += _duplicate_notes(same, near)
    warnings = [
        *drawn.warnings,
        *stored,
        *_survey_warnings(options.images, layout, found, drawn),
        *_group_warnings(groups, units, len(found.cases), volumes=volumes),
        *_list_warnings(found, drawn, classes),
    ]
    return Study(options, layout, intensity, found, classes, groups, drawn, notes, warnings, plan)


def _all_files(layout: Layout) -> Iterable[Path]:
    return (path for files in layout.image_files().values() for path in files)


def _layout_note(layout: Layout, found: Survey) -> str:
    masked = sum(case.values is not None for case in found.cases)
    noun = "volumes" if any(case.volume for case in found.cases) else "images"
    note = f"{len(found.cases)} {noun} that can be used in {_shown(layout.root, layout.images)}"
    if layout.image_suffix:
        note += f", called <case>{layout.image_suffix}"
    if layout.masks is None:
        return note + "; no masks were found"
    note += f"; {masked} have a mask in {_shown(layout.root, layout.masks)}"
    if layout.mask_suffix == ANY_NAME:
        return note + ", called anything: all of one folder belong to the image of its folder"
    return note + (f", called <case>{layout.mask_suffix}" if layout.mask_suffix else "")


def _shown(root: Path, folders: Folders) -> str:
    if isinstance(folders, str):
        return str(root / folders)
    shown = list(folders.values())
    return f"{root} ({', '.join(shown[:6])}{', ...' if len(shown) > 6 else ''})"


def _ask_about_several(layout: Layout, options: StudyOptions) -> None:
    """Refuse numbered masks until it is known what they are."""
    masks, further = layout.mask_files(), layout.further_masks()
    several = {i: masks.get(i, []) + files for i, files in further.items() if len(masks.get(i, []) + files) > 1}
    if not several or options.several_masks is not None:
        return
    shown = "; ".join(f"{i}: {', '.join(path.name for path in files)}" for i, files in list(several.items())[:3])
    raise DataError(
        f"{len(several)} images have several masks each ({shown}{'; ...' if len(several) > 3 else ''}): are they parts "
        "of one?",
        hint="--several-masks merge makes one of them; --several-masks leave uses these images without mask. If they "
        f"are of several readers, choose one by --mask-suffix, such as --mask-suffix {layout.mask_suffix}_1.",
    )


def _stored_warnings(found: Survey) -> list[str]:
    """How files are stored, where that is not how viewers show them.

    Raises:
        DataError: palettes that contradict each other.
    """
    images = {case.id: case.traits for case in found.cases}
    masks = {case.id: case.mask_traits for case in found.cases if case.masks}
    used = {c.id: [v for v in c.values or () if isinstance(v, int)] for c in found.cases}
    if palettes := palette_note(masks, used):
        raise DataError(palettes, hint="Save all masks with one palette, or as plain numbers or colours.")
    said = orientation_note(images, masks)
    return [said] if said is not None else []


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


def _survey_warnings(top: Path, layout: Layout, found: Survey, drawn: Drawn) -> list[str]:
    """Files that play no part."""
    warnings = [fault.kind + ": " + fault.text for fault in found.faults]
    if idle := _idle_pictures(top, layout):
        folders = Counter(path.parent.relative_to(top.absolute()).as_posix() for path in idle)
        some = ", ".join(f"{n} in {folder}" for folder, n in folders.most_common(5))
        noun = "pictures" if layout.scan is pictures_below else "volumes"
        warnings.append(f"{len(idle)} {noun} below {top} play no part: {some}{', ...' if len(folders) > 5 else ''}")
    if strays := layout.masks_among_images():
        some = ", ".join(path.name for path in strays[:3]) + (", ..." if len(strays) > 3 else "")
        warnings.append(f"{len(strays)} files among the images are called like masks and are passed over: {some}")
    if layout.scan is pictures_below and (others := layout.other_files()):
        kinds = ", ".join(f"{n} {kind}" for kind, n in others.most_common(5))
        warnings.append(f"files of other kinds are passed over: {kinds}; read are {', '.join(io.PICTURES)}")
    if found.orphans:
        shown = ", ".join(found.orphans[:5]) + (", ..." if len(found.orphans) > 5 else "")
        warnings.append(f"{len(found.orphans)} mask(s) have no image: {shown}")
    if drawn.left_out:
        warnings.append(
            f"{len(drawn.left_out)} image(s) without a mask are in no list, for val or test holds their group"
        )
    return warnings


def _idle_pictures(top: Path, layout: Layout) -> list[Path]:
    """Pictures below the folder that was named which are neither images nor masks."""
    used = {p for files in (*layout.image_files().values(), *layout.mask_files().values()) for p in files}
    used |= {path for files in layout.further_masks().values() for path in files}
    there = [path for files in layout.scan(top.absolute()).values() for path in files]
    return [path for path in there if path not in used]


def _group_warnings(
    groups: dict[str, str] | None, units: Sequence[Sequence[str]], cases: int, *, volumes: bool
) -> list[str]:
    """What was kept together without need, or may have been taken apart."""
    warnings = []
    largest = max(units, key=len)
    if len(largest) > max(10, 0.1 * cases) and (groups is None or len({groups[i] for i in largest}) > 1):
        warnings.append(
            f"near duplicates tie {len(largest)} of {cases} images together; if they are no copies, "
            "--no-near-duplicates unties them"
        )
    if groups is None and volumes:
        warnings.append(
            "patients are unknown: each volume is taken for a patient of its own. If a patient has several, give "
            "--group-regex or --groups"
        )
    elif groups is None:
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
