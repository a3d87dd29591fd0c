"""Ready-made splits: folders called train, val and test are kept as lists."""

from collections.abc import Collection, Mapping, Sequence

from knowsam.data.make_splits import Amount, Drawn, draw
from knowsam.errors import DataError


def keep_splits(
    split_of: Mapping[str, str | None],
    units: Sequence[Sequence[str]],
    same: Sequence[Sequence[str]],
    near: Sequence[tuple[str, str, float]],
    masked: Collection[str],
    groups: Mapping[str, str] | None,
    *,
    val: float,
    test: float,
    labelled: Sequence[Amount],
    seed: int,
    skip_impossible: bool,
) -> tuple[Drawn, str]:
    """The lists that the folders give; a list that they lack is drawn from the training cases.

    Args:
        split_of: id -> ``train``, ``val``, ``test``; None: in none of these folders.
        units: cases that should stay together.
        same: sets of ids with equal pixels.
        near: near duplicates (id, id, correlation).
        masked: ids whose masks can be used.
        groups: id -> patient; None: unknown.
        val, test: per cent of the training cases, where there is no folder of that name.
        labelled, seed, skip_impossible: as ``make_splits.draw``.
    Returns:
        The lists, and what was kept, for people.
    Raises:
        DataError: a patient in two splits.
        ConfigError: as ``make_splits.draw``.
    """
    with_mask = frozenset(masked)
    _refuse_divided_patients(split_of, groups)
    dropped, warnings = _copies(split_of, same)
    ready: dict[str, list[str]] = {}
    for name in ("val", "test"):
        there = sorted(i for i, split in split_of.items() if split == name and i not in dropped)
        if not there:
            continue
        ready[name] = [i for i in there if i in with_mask]
        if bare := [i for i in there if i not in with_mask]:
            warnings.append(
                f"{len(bare)} of {len(there)} images of {name} have no mask and are in no list: {_some(bare)}"
            )
            dropped.update(bare)
    ready = {name: ids for name, ids in ready.items() if ids}
    train = frozenset(i for i, split in split_of.items() if split == "train" and i not in dropped)
    outside = sorted(i for i, split in split_of.items() if split is None)
    if outside:
        warnings.append(f"{len(outside)} images are outside of the folders of splits and in no list: {_some(outside)}")
    inner = [kept for unit in units if (kept := [i for i in unit if i in train])]
    drawn = draw(
        inner,
        with_mask & train,
        val=0 if "val" in ready else val,
        test=0 if "test" in ready else test,
        labelled=labelled,
        seed=seed,
        skip_impossible=skip_impossible,
    )
    made = [name for name in ("val", "test") if name in drawn.lists]
    lists = {**drawn.lists, **ready}
    order = ["train", "val", "test", *lists]
    drawn.lists = {name: lists[name] for name in dict.fromkeys(order) if name in lists}
    drawn.left_out = sorted({*drawn.left_out, *dropped, *outside})
    across = [(a, b) for a, b, _ in near if split_of[a] != split_of[b] and not {a, b} & {*dropped, *outside}]
    if across:
        some = "; ".join(f"{a} ~ {b}" for a, b in across[:5]) + ("; ..." if len(across) > 5 else "")
        warnings.append(f"{len(across)} pair(s) of near duplicates lie in two of the ready-made splits: {some}")
    drawn.warnings = [*warnings, *drawn.warnings]
    note = f"the folders are ready-made splits, kept as they are: {', '.join(['train', *ready])}"
    if made:
        note += f"; there is no {' and no '.join(made)}, drawn from train instead"
    return drawn, note + " (--splits draw divides all anew)"


def _refuse_divided_patients(split_of: Mapping[str, str | None], groups: Mapping[str, str] | None) -> None:
    sides: dict[str, dict[str, str]] = {}
    for case_id, group in (groups or {}).items():
        if split := split_of.get(case_id):
            sides.setdefault(group, {}).setdefault(split, case_id)
    divided = {group: those for group, those in sides.items() if len(those) > 1}
    if divided:
        shown = "; ".join(
            f"{g}: {', '.join(f'{i} in {s}' for s, i in t.items())}" for g, t in list(divided.items())[:5]
        )
        raise DataError(
            f"{len(divided)} patient(s) are in more than one of the ready-made splits: {shown}"
            + ("; ..." if len(divided) > 5 else ""),
            hint="Scores would be of patients seen in training. --splits draw divides anew, by patient.",
        )


def _copies(split_of: Mapping[str, str | None], same: Sequence[Sequence[str]]) -> tuple[set[str], list[str]]:
    """Equal images in two splits: the copy in the split that comes first of test, val, train is kept."""
    dropped: set[str] = set()
    order = {"test": 0, "val": 1, "train": 2}
    for ids in same:
        sides = {split for i in ids if (split := split_of[i]) is not None}
        if len(sides) > 1:
            keep = min(sides, key=lambda split: order[split])
            dropped.update(i for i in ids if split_of[i] not in (keep, None))
    if not dropped:
        return dropped, []
    text = (
        f"{len(dropped)} image(s) are copies of one in another split and in no list (kept in test before val and train)"
    )
    return dropped, [f"{text}: {_some(dropped)}"]


def _some(ids: Collection[str]) -> str:
    return ", ".join(sorted(ids)[:5]) + (", ..." if len(ids) > 5 else "")
