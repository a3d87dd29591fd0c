"""Is a dataset fit to train on? All that is wrong with it, not only the first thing; and the quick question alone."""

import hashlib
import math
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from knowsam import io
from knowsam.data.cache import file_sha256, known, load_memo, remembered, save_memo
from knowsam.data.labels import IGNORE_ID
from knowsam.data.layout import Layout
from knowsam.data.looks import Look, look, near_pairs, same_pixels, tied_within
from knowsam.data.make_splits import LEFT_OUT_FILE
from knowsam.data.source import Source
from knowsam.data.splits import DUPLICATES_FILE, SPLITS, Splits, independent_units
from knowsam.data.traits import Traits, depth_note, file_traits, orientation_note, palette_note
from knowsam.errors import DataError, Fault, KnowsamError, NotFoundError
from knowsam.io.palettes import PALETTES

_PEEK = 4096
_LOSES_IMAGE = {"missing image", "several images"}
_LOSES_MASK = {"missing mask", "several masks"}


@dataclass
class ClassCounts:
    """Of the cases of one list whose masks may be read.

    Attributes:
        cases: how many masks were read.
        empty: ids without any foreground, sorted.
        pixels: int64 (K,), pixels of each class.
        present: int64 (K,), cases that hold each class.
        ignored: pixels about which nothing is known; they belong to no class.
        silent: ids of whose mask nothing is known at all, sorted.
    """

    cases: int
    empty: list[str]
    pixels: np.ndarray
    present: np.ndarray
    ignored: int = 0
    silent: list[str] = field(default_factory=list)

    @property
    def shares(self) -> list[float]:
        """Each class's share of the pixels that have a class, 0..1."""
        shares: list[float] = (self.pixels / max(self.pixels.sum(), 1)).tolist()
        return shares

    @property
    def ignored_share(self) -> float:
        """Share of all pixels about which nothing is known, 0..1."""
        return float(self.ignored / max(self.pixels.sum() + self.ignored, 1))

    def to_dict(self, class_names: Sequence[str]) -> dict[str, Any]:
        """The counts for programs: plain values.

        Args:
            class_names: K names, background first.
        """
        return {
            "masks_read": self.cases,
            "empty_masks": self.empty,
            "pixel_share": dict(zip(class_names, self.shares, strict=True)),
            "ignored_share": self.ignored_share,
            "cases_with_class": dict(zip(class_names, self.present.tolist(), strict=True)),
        }


@dataclass
class Findings:
    """What ``check_all`` found.

    Attributes:
        errors: what must be mended before training.
        warnings: what should be looked at.
        cases: list name -> number of cases.
        classes: ``labelled``, ``val``, ``test`` -> counts.
        sizes: (smallest, largest) (height, width) by area; None without a readable image.
    """

    errors: list[Fault] = field(default_factory=list)
    warnings: list[Fault] = field(default_factory=list)
    cases: dict[str, int] = field(default_factory=dict)
    classes: dict[str, ClassCounts] = field(default_factory=dict)
    sizes: tuple[tuple[int, int], tuple[int, int]] | None = None

    def to_dict(self, class_names: Sequence[str]) -> dict[str, Any]:
        """The findings for programs: plain values, with ``fit`` true where nothing must be mended.

        Args:
            class_names: K names, background first.
        """
        return {
            "fit": not self.errors,
            "errors": [fault._asdict() for fault in self.errors],
            "warnings": [fault._asdict() for fault in self.warnings],
            "cases": self.cases,
            "smallest_and_largest_image": self.sizes,
            "classes": {name: counts.to_dict(class_names) for name, counts in self.classes.items()},
        }


def check_quick(source: Source, cache_folder: str | Path | None = None) -> None:
    """Refuse a source in whose splits the same image occurs twice, as far as that is known without decoding.

    That lists, files, ids and groups are in order was proven by building the source. Here: copies of one file under
    several names (files of equal size are compared), and equal pixels where ``check_all`` has seen these files before.

    Args:
        source: built; sources whose images are no files of their own are passed over.
        cache_folder: where earlier fingerprints are kept; the default one if None.
    Raises:
        DataError: every image that is in two splits.
    """
    path_of = getattr(source, "image_path", None)
    if path_of is None:
        return
    load_memo(cache_folder)
    split_of: dict[str, str] = {}
    paths: dict[str, Path] = {}
    pixels: dict[str, list[str]] = defaultdict(list)
    sizes: dict[int, list[str]] = defaultdict(list)
    for split, ids in _split_ids(source).items():
        for case_id in ids:
            path = paths[case_id] = path_of(case_id)
            split_of[case_id] = split
            for picture in (known(path, _pixels_key(source)) or "").split():
                pixels[picture].append(case_id)
            sizes[os.stat(path).st_size].append(case_id)

    def spread(ids: Iterable[str]) -> bool:
        return len({split_of[i] for i in ids}) > 1

    sets = [tuple(dict.fromkeys(ids)) for ids in pixels.values() if spread(ids)]
    for ids in sizes.values():
        for alike in _by(ids, lambda i: _peek(paths[i])) if spread(ids) else ():
            sets += [tuple(same) for same in _by(alike, lambda i: file_sha256(paths[i])) if spread(same)]
    faults = [Fault("same image in two splits", _twice(ids, split_of), ids) for ids in dict.fromkeys(sets)]
    if faults:
        raise DataError(
            f"{len(faults)} image(s) are in more than one split, under several names:\n"
            + "\n".join(fault.text for fault in faults[:20])
            + (f"\n... and {len(faults) - 20} more" if len(faults) > 20 else ""),
            hint="Keep each in one list only; knowsam check lists all of them, and of near duplicates.",
            faults=faults,
        )


def check_all(
    build: Callable[[Splits | None], Source],
    lists: tuple[Splits, Sequence[Fault]] | None,
    *,
    num_classes: int,
    class_names: Sequence[str],
    near: bool = True,
    cache_folder: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Findings, Source | None]:
    """Look at every image, and at every mask that may be read. Masks of unlabelled training cases are never opened.

    Args:
        build: makes the source from split lists (None: from its own).
        lists: the split lists as far as they can be used, and what is wrong with them; None for a source without.
        num_classes: K, background included.
        class_names: K names, for messages.
        near: also look for near duplicates across splits.
        cache_folder: where the pixels' hashes are left for ``check_quick``; the default one if None.
        progress: called as (cases done, cases in all).
    Returns:
        What was found; and the source without the cases that cannot be used, None if none could be built.
    Raises:
        NotFoundError, ConfigError: what ``build`` raises.
    """
    found = Findings()
    splits = None
    if lists is not None:
        splits, list_faults = lists
        found.errors += list_faults
    source, splits = _build(build, splits, found)
    if source is None:
        return found, None
    # A fault names the list as it was written, not as it was made usable.
    ids = _split_ids(source) if lists is None else {name: list(getattr(lists[0], name)) for name in SPLITS}
    labelled = source.labelled_ids() if lists is None else lists[0].labelled
    counted = {"labelled": labelled, "val": ids["val"], "test": ids["test"]}
    found.cases = {"train": len(ids["train"]), **{name: len(those) for name, those in counted.items()}}
    usable = _split_ids(source)
    present = {i for those in usable.values() for i in those}
    readable = {*source.labelled_ids(), *usable["val"], *usable["test"]}

    load_memo(cache_folder)
    jobs = [(i, split, i in readable) for split in SPLITS for i in ids[split] if i in present]
    pictures: list[tuple[str, str, Look]] = []  # of a volume, one a slice
    classes: dict[str, dict[str, np.ndarray]] = defaultdict(dict)
    sizes: list[tuple[int, int]] = []
    stored = _Stored(getattr(source, "reading", None) or io.Reading())
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        results = pool.map(lambda job: _look_at(source, job[0], job[2], num_classes), jobs)
        for n, ((case_id, split, _), seen) in enumerate(zip(jobs, results, strict=True)):
            found.errors += [_placed(fault, splits, split) for fault in seen.faults]
            pictures += [(case_id, split, item) for item in seen.looks]
            if seen.size:
                sizes.append(seen.size)
            if seen.looks and not any(item.pixels for item in seen.looks):
                text = f"{split} {case_id}: every pixel has the same value"
                found.warnings.append(Fault("image of one colour", text, (case_id,)))
            if seen.classes is not None:
                classes["labelled" if split == "train" else split][case_id] = seen.classes
            stored.add(case_id, seen)
            if progress:
                progress(n + 1, len(jobs))
    save_memo(cache_folder)
    stored.judge(found)
    found.warnings += _passed_over(source)
    if sizes:
        found.sizes = (min(sizes, key=math.prod), max(sizes, key=math.prod))
    found.classes = {name: _count(classes[name], num_classes) for name in counted if counted[name]}
    _compare(pictures, near, found, None if splits is None else splits.folder)
    _judge(found, class_names)
    return found, source


@dataclass
class _Seen:
    faults: list[Fault] = field(default_factory=list)
    looks: list[Look] = field(default_factory=list)
    size: tuple[int, int] | None = None
    classes: np.ndarray | None = None
    brightest: int | None = None
    image: Traits | None = None
    mask: Traits | None = None
    indices: list[int] = field(default_factory=list)


class _Stored:
    """How the files of all cases are stored, and what is to be said of it."""

    def __init__(self, reading: io.Reading) -> None:
        self.reading = reading
        self.images: dict[str, Traits] = {}
        self.masks: dict[str, Traits] = {}
        self.brightest: dict[str, int] = {}
        self.indices: dict[str, list[int]] = {}

    def add(self, case_id: str, seen: _Seen) -> None:
        if seen.image is not None:
            self.images[case_id] = seen.image
        if seen.mask is not None:
            self.masks[case_id] = seen.mask
            self.indices[case_id] = seen.indices
        if seen.brightest is not None:
            self.brightest[case_id] = seen.brightest

    def judge(self, found: Findings) -> None:
        if text := orientation_note(self.images, self.masks, self.reading.orientation):
            found.warnings.append(Fault("orientation tags", text))
        if text := depth_note(self.brightest, self.images):
            found.warnings.append(Fault("nearly black images", text))
        if self.reading.palette == "auto" and (text := palette_note(self.masks, self.indices)):
            # of the files that contradict each other it depends on chance which is read, and refused, second
            found.errors = [fault for fault in found.errors if fault.kind != PALETTES]
            found.errors.append(Fault(PALETTES, text))


def _passed_over(source: Source) -> list[Fault]:
    """Files in the folders of images and masks that play no part, by kind and number."""
    if not all(hasattr(source, name) for name in ("root", "image_dir", "mask_dir", "splits")):
        return []
    folder: Any = source
    layout = Layout(folder.root, folder.image_dir, folder.mask_dir, folder.image_suffix, folder.mask_suffix)
    faults = []
    try:
        kinds = layout.other_files()
        images, strays, masks = layout.image_files(), layout.masks_among_images(), layout.mask_files()
    except NotFoundError:  # a folder of masks that nobody needs
        return []
    for kind, number in kinds.most_common():
        text = f"{number} {kind} in the folders of images and masks; read are {', '.join(io.PICTURES)}"
        faults.append(Fault("files passed over", text))
    if strays:
        text = f"{len(strays)} files among the images are called like masks: {_some([path.name for path in strays])}"
        faults.append(Fault("files passed over", text))
    splits = folder.splits
    left_out = splits.folder / LEFT_OUT_FILE
    known_ids = {*splits.train, *splits.val, *splits.test}
    known_ids |= set(left_out.read_text(encoding="utf-8").splitlines()) if left_out.is_file() else set()
    if unlisted := [i for i in images if i not in known_ids]:
        faults.append(Fault("files passed over", f"{len(unlisted)} images are in no list: {_some(unlisted)}"))
    if orphans := [i for i in masks if i not in images]:
        faults.append(Fault("files passed over", f"{len(orphans)} masks have no image: {_some(orphans)}"))
    return faults


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def _build(
    build: Callable[[Splits | None], Source], splits: Splits | None, found: Findings
) -> tuple[Source | None, Splits | None]:
    """The source over what can be used. It refuses one kind of fault at a time: asked again without those cases."""
    while True:
        try:
            return build(splits), splits
        except DataError as error:
            no_image = {i for fault in error.faults if fault.kind in _LOSES_IMAGE for i in fault.cases}
            no_mask = {i for fault in error.faults if fault.kind in _LOSES_MASK for i in fault.cases}
            found.errors += [_listed(fault, splits) for fault in error.faults] or [Fault("data", str(error))]
            if splits is None or not (no_image or no_mask):
                return None, splits
            splits = _without(splits, no_image, no_mask)


def _without(splits: Splits, no_image: set[str], no_mask: set[str]) -> Splits:
    """Cases without image are dropped; those without mask remain as unlabelled ones, so that their image is checked."""

    def left(ids: Iterable[str]) -> tuple[str, ...]:
        return tuple(i for i in ids if i not in no_image and i not in no_mask)

    train = {i for i in (*splits.train, *no_mask) if i not in no_image}
    return replace(
        splits,
        train=tuple(sorted(train)),
        labelled=left(splits.labelled),
        val=left(splits.val),
        test=left(splits.test),
    )


def _split_ids(source: Source) -> dict[str, list[str]]:
    return {"train": source.train_ids(), "val": source.eval_ids("val"), "test": source.eval_ids("test")}


def _look_at(source: Source, case_id: str, readable: bool, num_classes: int) -> _Seen:
    seen = _Seen()
    try:
        image = source.image(case_id)  # (H, W, C) or (D, H, W, C)
    except KnowsamError as error:
        text = f"{error}; {error.hint}" if error.hint else str(error)
        seen.faults.append(Fault("image cannot be read", text, (case_id,)))
    else:
        seen.size = (image.shape[-3], image.shape[-2])
        seen.brightest = 255 * int(image.max()) // np.iinfo(image.dtype).max
        seen.looks = [look(picture) for picture in (image if image.ndim == 4 else image[None])]
        path_of = getattr(source, "image_path", None)
        if path_of is not None:
            seen.image = file_traits(path_of(case_id))
            hashes = " ".join(item.pixels for item in seen.looks if item.pixels)
            remembered(path_of(case_id), _pixels_key(source), lambda: hashes)
    if readable:
        try:
            mask = source.mask(case_id)
        except KnowsamError as error:
            faults = getattr(error, "faults", ()) or (Fault("mask cannot be read", str(error), (case_id,)),)
            # a broken image is no fault of its mask
            seen.faults += [f for f in faults if not any(other.text.startswith(f.text) for other in seen.faults)]
            if any(fault.kind == PALETTES for fault in faults):
                _look_at_mask_file(source, case_id, seen)
        else:
            seen.classes = np.bincount(mask.ravel(), minlength=IGNORE_ID + 1)
            _look_at_mask_file(source, case_id, seen)
    return seen


def _look_at_mask_file(source: Source, case_id: str, seen: _Seen) -> None:
    paths_of = getattr(source, "mask_paths", None)
    if paths_of is None:
        return
    path = paths_of(case_id)[0]
    seen.mask = file_traits(path)
    if seen.mask.palette is not None:
        mask = io.read_mask(path, getattr(source, "reading", None) or io.Reading())
        seen.mask = replace(seen.mask, by="index" if mask.by == "index" else "colour")
        seen.indices = np.unique(mask.array).tolist() if mask.by == "index" else []


def _pixels_key(source: Source) -> str:
    """What a file's pixel hashes are remembered as: settings that change the decoded values are part of it."""
    return f"pixels:{getattr(source, 'cache_settings', None)!r}"


def _placed(fault: Fault, splits: Splits | None, split: str) -> Fault:
    place = splits.place(f"{split}.txt", fault.cases[0]) if splits is not None and fault.cases else split
    return fault._replace(text=f"{place}: {fault.text}")


def _listed(fault: Fault, splits: Splits | None) -> Fault:
    """The fault with the place of its case in the lists, which a missing image's text has already."""
    if splits is None or not fault.cases or fault.kind == "missing image":
        return fault
    split = next((name for name in SPLITS if fault.cases[0] in getattr(splits, name)), None)
    return _placed(fault, splits, split) if split else fault


def _count(masks: Mapping[str, np.ndarray], num_classes: int) -> ClassCounts:
    counts = np.array(list(masks.values()), np.int64).reshape(-1, IGNORE_ID + 1)
    ignored, counts = counts[:, IGNORE_ID], counts[:, :num_classes]
    empty = sorted(i for i, pixels in zip(masks, counts, strict=True) if pixels[0] and not pixels[1:].any())
    silent = sorted(i for i, pixels in zip(masks, counts, strict=True) if not pixels.any())
    return ClassCounts(
        len(masks), empty, counts.sum(axis=0), (counts > 0).sum(axis=0), ignored=int(ignored.sum()), silent=silent
    )


def _compare(pictures: list[tuple[str, str, Look]], near: bool, found: Findings, folder: Path | None) -> None:
    """Equal and nearly equal pictures in different splits, and cases of val or test that show the same thing."""
    looks = [item for _, _, item in pictures]
    split_of = {case_id: split for case_id, split, _ in pictures}
    sets: list[tuple[str, ...]] = []
    inside: dict[tuple[str, str], set[int]] = defaultdict(set)  # two cases of one split -> slices that are alike
    for places in same_pixels(looks):
        if len({pictures[n][1] for n in places}) > 1:
            sets.append(tuple(dict.fromkeys(pictures[n][0] for n in places)))
        for n in places[1:]:
            inside[pictures[places[0]][0], pictures[n][0]].add(places[0])
    for ids in dict.fromkeys(sets):
        found.errors.append(Fault("same image in two splits", _twice(ids, split_of), ids))
    known_pairs = set()
    for i, j, correlation in near_pairs(looks) if near else ():
        (one, first, _), (other, second, _) = pictures[i], pictures[j]
        inside[one, other].add(i)
        if first != second and (one, other) not in known_pairs:
            known_pairs.add((one, other))
            text = f"{first} {one} ~ {second} {other}: correlation {correlation:.3f}"
            found.warnings.append(Fault("near duplicates in two splits", text, (one, other)))
    slices = Counter(case_id for case_id, _, _ in pictures)  # volumes of one organ have a slice or two in common
    ties = [pair for pair, alike in inside.items() if 2 * len(alike) >= min(slices[i] for i in pair)]
    evaluated = {case_id: split for case_id, split in split_of.items() if split != "train"}
    for split, those in tied_within(ties, evaluated).items():
        for alike_ids in those:
            units = independent_units(folder, alike_ids) if folder is not None else {}
            text = f"{split}: {' ~ '.join(alike_ids)} are one observation, not {len(alike_ids)}"
            if len(set(units.values())) != 1:
                text += f"; knowsam splits --mark-duplicates writes that into {DUPLICATES_FILE} beside the lists"
            found.warnings.append(Fault("near duplicates in one split", text, tuple(alike_ids)))


def _judge(found: Findings, class_names: Sequence[str]) -> None:
    """What the numbers say."""
    for name in ("labelled", "val"):
        if not found.cases[name]:
            text = {"labelled": "no training case is labelled", "val": "there is no validation case"}[name]
            found.errors.append(Fault("empty list", text))
    if not found.cases["test"]:
        found.warnings.append(Fault("empty list", "there is no test case: results could be given on val only"))
    for name, counts in found.classes.items():
        if not counts.cases:
            continue
        absent = [class_names[k] for k, cases in enumerate(counts.present) if not cases]
        if absent:
            text = f"{name}: no pixel is {', '.join(absent)}"
            learn = name == "labelled" and absent != class_names[:1]
            where = found.errors if learn else found.warnings
            where.append(Fault("class never seen", text + ("; it cannot be learned" if learn else "")))
        if counts.empty:
            share = f"{len(counts.empty)} of {counts.cases} masks hold background only"
            some = ", ".join(counts.empty[:5]) + (", ..." if len(counts.empty) > 5 else "")
            found.warnings.append(Fault("empty masks", f"{name}: {share}: {some}", tuple(counts.empty)))
        if counts.silent:
            text = f"{name}: every pixel of {len(counts.silent)} of {counts.cases} masks is ignored"
            text += f": {_some(counts.silent)}"
            found.warnings.append(Fault("masks that say nothing", text, tuple(counts.silent)))


def _twice(ids: Sequence[str], split_of: Mapping[str, str]) -> str:
    return " = ".join(f"{split_of[i]} {i}" for i in ids)


def _by(ids: Iterable[str], key: Callable[[str], Any]) -> list[list[str]]:
    """The sets of two or more that share a key."""
    sets: dict[Any, list[str]] = defaultdict(list)
    for i in ids:
        sets[key(i)].append(i)
    return [found for found in sets.values() if len(found) > 1]


def _peek(path: Path) -> bytes:
    """A few bytes from the middle: enough to tell most files of equal size apart without reading them."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.stat(path).st_size // 2 - _PEEK // 2))
            return hashlib.sha256(file.read(_PEEK)).digest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
