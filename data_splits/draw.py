"""Draw the lists of this folder again: ``python data_splits/draw.py DATA [DESTINATION]`` (README.md gives the rules).

DATA holds the folders kvasir_seg, dsb2018, polyp_external, hippocampus (``index.csv`` each), acdc (the SSL4MIS lists)
and la (the UA-MT lists). Data sets that are not there are passed over. Only the standard library is used, and the order
comes from a hash rather than a random generator, so that every version of Python draws the same lists.
"""

import csv
import hashlib
import sys
from collections import defaultdict
from pathlib import Path

SEED = 2025
PERCENTS = (1, 5, 10, 20, 30)
KVASIR_DROPPED = "kvasir_train_0222"  # nearly the same picture as kvasir_test_0016
ACDC_SLICES = {3: 68, 7: 136, 14: 256}  # patients: slices from the top of train_slices.list


def shuffled(ids: list[str]) -> list[str]:
    """``ids`` in an order that depends on SEED and the ids alone."""
    return sorted(ids, key=lambda i: hashlib.sha256(f"{SEED}:{i}".encode()).hexdigest())


def interleaved(stratum_of: dict[str, str]) -> list[str]:
    """An order whose every prefix holds the strata in about their proportions, so that nested lists are stratified."""
    strata = defaultdict(list)
    for case_id, stratum in stratum_of.items():
        strata[stratum].append(case_id)
    placed = []
    for stratum, ids in strata.items():
        placed += [((n + 0.5) / len(ids), stratum, i) for n, i in enumerate(shuffled(ids))]
    return [i for _, _, i in sorted(placed)]


def labelled_lists(order: list[str]) -> dict[str, list[str]]:
    """Nested label lists: the first 1, 5, ... % of one order."""
    return {f"labelled_{p}pct": order[: max(1, round(len(order) * p / 100))] for p in PERCENTS}


def kvasir_seg(folder: Path) -> dict[str, list[str]]:
    """The source's own split, less one near duplicate."""
    lists = defaultdict(list)
    for row in rows(folder):
        if row["name"] != KVASIR_DROPPED:
            lists[{"validation": "val"}.get(row["source_split"], row["source_split"])].append(row["name"])
    return {**lists, **labelled_lists(shuffled(lists["train"]))}


def dsb2018(folder: Path) -> dict[str, list[str]]:
    """70/10/20 within each domain; near duplicates stay together."""
    domain = {row["name"]: row["domain"] for row in rows(folder)}
    units = defaultdict(lambda: defaultdict(list))  # domain -> unit (group or single picture) -> names
    for row in rows(folder):
        group = row["near_duplicate_group"]
        units[row["domain"]][row["name"] if group == "-1" else f"group {group}"].append(row["name"])
    lists = {"train": [], "val": [], "test": []}
    for by_unit in units.values():
        order = [name for unit in shuffled(list(by_unit)) for name in by_unit[unit]]
        ends = {name: n for n, name in enumerate(order)}
        train, val = round(0.7 * len(order)), round(0.1 * len(order))
        for names in by_unit.values():  # a unit goes where its first picture falls
            first = min(ends[name] for name in names)
            lists["train" if first < train else "val" if first < train + val else "test"] += names
    return {**lists, **labelled_lists(interleaved({i: domain[i] for i in lists["train"]}))}


def polyp_external(folder: Path) -> dict[str, list[str]]:
    """Everything is test."""
    return {"test": [row["name"] for row in rows(folder)]}


def acdc(folder: Path) -> dict[str, list[str]]:
    """The SSL4MIS lists; label lists are the first slices of train_slices.list, which are whole patients."""
    train = (folder / "train_slices.list").read_text(encoding="utf-8").split()
    lists = {name: (folder / f"{name}.list").read_text(encoding="utf-8").split() for name in ("val", "test")}
    for patients, slices in ACDC_SLICES.items():
        lists[f"labelled_{patients}cases"] = train[:slices]
    return {"train": train, **lists}


def hippocampus(folder: Path) -> dict[str, list[str]]:
    """40 volumes to test on, 20 to validate, 200 to train; one volume a patient."""
    order = shuffled([row["name"] for row in rows(folder)])
    lists = {"test": order[:40], "val": order[40:60], "train": order[60:]}
    return {**lists, **{f"labelled_{n}cases": lists["train"][:n] for n in (5, 10, 20, 50)}}


def rows(folder: Path) -> list[dict[str, str]]:
    """The lines of ``index.csv``."""
    with open(folder / "index.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def la(folder: Path) -> dict[str, list[str]]:
    """UA-MT's lists; val is drawn from the training scans that no label list names."""
    train, test = ((folder / f"{name}.list").read_text(encoding="utf-8").split() for name in ("train", "test"))
    val = shuffled(train[16:])[:8]
    labelled = {f"labelled_{n}cases": train[:n] for n in (4, 8, 16)}
    return {"train": [i for i in train if i not in val], "val": val, "test": test, **labelled}


DATASETS = {
    "kvasir_seg": kvasir_seg,
    "dsb2018": dsb2018,
    "polyp_external": polyp_external,
    "acdc": acdc,
    "hippocampus": hippocampus,
    "la": la,
}


def main(data: Path, destination: Path) -> None:
    """Write ``destination/<data set>/<list>.txt``: sorted ids, one a line."""
    for name, draw in DATASETS.items():
        if not (data / name).is_dir():
            print(f"{name}: not in {data}, passed over")
            continue
        (destination / name).mkdir(parents=True, exist_ok=True)
        for list_name, ids in draw(data / name).items():
            text = "".join(f"{i}\n" for i in sorted(ids))
            (destination / name / f"{list_name}.txt").write_text(text, encoding="utf-8", newline="\n")
            print(f"{name}/{list_name}.txt: {len(ids)}")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) == 3 else Path(__file__).parent)
