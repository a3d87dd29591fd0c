import hashlib
import itertools
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from knowsam.data.builtin import render
from knowsam.data.looks import look
from knowsam.data.make_splits import (
    Amount,
    Trait,
    draw,
    draw_folds,
    draw_labels,
    list_files,
    lists_hash,
    tie_units,
    write_draws,
    write_lists,
)
from knowsam.data.splits import independent_units, load_splits
from knowsam.errors import ConfigError, DataError, ExistsError

AMOUNTS = [Amount(5, "pct"), Amount(10, "pct"), Amount(20, "pct"), Amount(3, "groups"), Amount(7, "cases")]


def singles(count):
    return [[f"case_{n:03d}"] for n in range(count)]


def flat(units):
    return [i for unit in units for i in unit]


@st.composite
def studies(draw_):
    """Units of 1 to 6 cases, some without a mask."""
    sizes = draw_(st.lists(st.integers(1, 6), min_size=12, max_size=60))
    units = [[f"u{n:02d}_{k}" for k in range(size)] for n, size in enumerate(sizes)]
    ids = flat(units)
    masked = [i for i in ids if i.endswith("_0") or draw_(st.booleans())]
    return units, masked


@settings(max_examples=60, deadline=None)
@given(studies(), st.integers(0, 5), st.sampled_from([0, 10, 25]), st.sampled_from([5, 10, 20]))
def test_what_always_holds(study, seed, test, val):
    units, masked = study
    drawn = draw(units, masked, val=val, test=test, labelled=AMOUNTS, seed=seed, skip_impossible=True)
    lists = {name: set(ids) for name, ids in drawn.lists.items()}
    train, evaluated = lists["train"], lists["val"] | lists.get("test", set())
    # every case is somewhere, once
    assert sorted([*train, *lists["val"], *lists.get("test", ()), *drawn.left_out]) == sorted(flat(units))
    # no group is divided
    owner = {i: n for n, unit in enumerate(units) for i in unit}
    assert not {owner[i] for i in train} & {owner[i] for i in evaluated}
    assert not {owner[i] for i in lists["val"]} & {owner[i] for i in lists.get("test", ())}
    assert {owner[i] for i in drawn.left_out} <= {owner[i] for i in evaluated}
    # only cases with a mask are labelled, validated, tested; label lists hold whole groups
    labelled = [lists[name] for name in lists if name.startswith("labelled_")]
    for ids in (*labelled, evaluated):
        assert ids and ids <= set(masked)
    for ids in labelled:
        assert ids == {i for i in train & set(masked) if owner[i] in {owner[j] for j in ids}}
    # label lists lie inside each other
    labelled.sort(key=len)
    assert all(small <= large for small, large in itertools.pairwise(labelled))
    assert lists["labelled_max"] == train & set(masked)
    # sorted, and the same again whatever the order of the folder
    assert all(ids == sorted(ids) for ids in drawn.lists.values())
    shuffled = random.Random(seed).sample(units, len(units))
    again = draw(shuffled, masked[::-1], val=val, test=test, labelled=AMOUNTS[::-1], seed=seed, skip_impossible=True)
    assert again.lists == drawn.lists


def test_sizes_without_groups():
    drawn = draw(singles(200), flat(singles(200)), val=10, test=20, labelled=AMOUNTS)
    counts = {name: len(ids) for name, ids in drawn.lists.items()}
    assert counts == {
        "train": 140,
        "test": 40,
        "val": 20,
        "labelled_7cases": 7,
        "labelled_3groups": 3,
        "labelled_5pct": 7,
        "labelled_10pct": 14,
        "labelled_20pct": 28,
        "labelled_max": 140,
    }
    assert drawn.left_out == [] and drawn.warnings == []


def test_groups_come_as_near_to_the_size_as_they_can():
    units = [[f"p{n:02d}_{k}" for k in range(10)] for n in range(20)]
    drawn = draw(units, flat(units), val=10, test=20, labelled=[Amount(10, "pct"), Amount(3, "groups")])
    counts = {name: len(ids) for name, ids in drawn.lists.items()}
    assert (counts["test"], counts["val"], counts["train"]) == (40, 20, 140)
    assert (counts["labelled_10pct"], counts["labelled_3groups"]) == (10, 30)


def test_a_huge_group_does_not_fill_the_test_list():
    units = [[f"big_{k:03d}" for k in range(500)], *singles(100)]
    for seed in range(5):
        drawn = draw(units, flat(units), seed=seed)
        assert len(drawn.lists["test"]) == 99 and len(drawn.lists["val"]) == 1
        assert set(units[0]) == set(drawn.lists["train"])


def test_another_seed_is_another_drawing():
    units, ids = singles(100), flat(singles(100))
    first, second = draw(units, ids, seed=0), draw(units, ids, seed=1)
    assert set(first.lists["test"]) != set(second.lists["test"])


def test_another_option_moves_as_few_cases_as_it_must():
    units, ids = singles(200), flat(singles(200))
    base = draw(units, ids, labelled=AMOUNTS[:2]).lists
    more = draw(units, ids, labelled=AMOUNTS).lists
    assert all(more[name] == base[name] for name in base)
    larger_val = draw(units, ids, val=15, labelled=AMOUNTS[:2]).lists
    assert larger_val["test"] == base["test"] and set(larger_val["val"]) > set(base["val"])
    assert set(larger_val["labelled_max"]) < set(base["labelled_max"])
    grown = draw([*units, ["case_new"]], [*ids, "case_new"], labelled=AMOUNTS[:2]).lists
    assert len(set(grown["test"]) ^ set(base["test"])) <= 2
    assert len(set(grown["val"]) ^ set(base["val"])) <= 4


def test_the_drawing_is_the_same_on_every_machine():
    units, ids = singles(20), flat(singles(20))
    drawn = draw(units, ids, labelled=[Amount(20, "pct")], seed=3)
    # Not to be changed: lists that people have drawn and published would change with it.
    assert drawn.lists["test"] == ["case_011", "case_013", "case_014", "case_019"]
    assert drawn.lists["labelled_20pct"] == ["case_006", "case_009", "case_018"]
    first = sorted(ids, key=lambda i: hashlib.sha256(f"3:test:{i}".encode()).hexdigest())[:4]
    assert sorted(first) == drawn.lists["test"]


def test_images_without_masks():
    units = [["a1", "a2"], ["b1"], ["c1"], ["d1", "d2"], ["e1"]]
    drawn = draw(units, ["a1", "b1", "c1", "d1"], val=25, test=25, seed=0)
    assert "e1" in drawn.lists["train"]
    for first, second in (("a1", "a2"), ("d1", "d2")):
        inside = first in drawn.lists["train"]
        assert (second in drawn.lists["train"]) == inside and (second in drawn.left_out) != inside


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"val": 60, "test": 40}, ConfigError, "leave some for training"),
        ({"val": -1}, ConfigError, "at least 0"),
        (
            {"labelled": [Amount(30, "pct")]},
            DataError,
            "labelled_30pct needs 20 cases, but of 67 .* only 7",
        ),
        ({"labelled": [Amount(8, "groups")]}, DataError, "needs 8 groups"),
    ],
)
def test_refusals(options, error, says):
    with pytest.raises(error, match=says):
        draw(singles(70), flat(singles(10)), **options)


def test_too_few_groups():
    with pytest.raises(DataError, match="5 images have a mask that can be used, in 2 sets"):
        draw([["a", "b"], ["c", "d", "e"]], "abcde")
    assert draw([["a", "b"], ["c", "d", "e"]], "abcde", test=0).lists.keys() == {"train", "val", "labelled_max"}


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("5", "labelled_5pct"),
        ("2.5%", "labelled_2.5pct"),
        ("8cases", "labelled_8cases"),
        ("1group", "labelled_1groups"),
    ],
)
def test_amounts(text, name):
    assert Amount.parse(text).list_name == name


@pytest.mark.parametrize("text", ["0", "101", "-5", "2.5cases", "five", "5 %", ""])
def test_wrong_amounts(text):
    with pytest.raises(ConfigError, match="labelled amount"):
        Amount.parse(text)


def test_units_by_group_and_look():
    images = {name: render(np.random.default_rng(n), 48, 2)[0] for n, name in enumerate("abcdef")}
    images["e"] = images["a"].copy()  # a copy
    images["f"] = np.clip(images["b"].astype(int) + 6, 0, 255).astype(np.uint8)  # nearly a copy
    looks = {name: look(image) for name, image in images.items()}
    units, same, near = tie_units(looks)
    assert units == [["a", "e"], ["b", "f"], ["c"], ["d"]]
    assert same == [["a", "e"]] and [pair[:2] for pair in near] == [("b", "f")]
    assert tie_units(looks, near=False)[0] == [["a", "e"], ["b"], ["c"], ["d"], ["f"]]
    groups = dict(zip("abcdef", ["p", "q", "q", "r", "s", "t"], strict=True))
    assert tie_units(looks, groups)[0] == [["a", "e"], ["b", "c", "f"], ["d"]]


def test_written_lists_are_read_back(tmp_path):
    units = [[f"p{n}_a", f'p{n}_"b", é'] for n in range(12)]
    drawn = draw(units, flat(units), labelled=[Amount(20, "pct")])
    groups = {i: i.split("_")[0] for i in flat(units)}
    files = list_files(drawn, groups)
    assert write_lists(tmp_path / "new" / "lists", files, "how\n")
    splits = load_splits(tmp_path / "new" / "lists", "labelled_20pct")
    for name in ("train", "val", "test"):
        assert list(getattr(splits, name)) == drawn.lists[name]
    assert list(splits.labelled) == drawn.lists["labelled_20pct"]
    assert (tmp_path / "new" / "lists" / "summary.md").read_text() == "how\n"
    # groups.csv is watched over from now on
    moved = drawn.lists["train"][0]
    with open(tmp_path / "new" / "lists" / "train.txt", "r+") as file:
        rest = file.read().replace(f"{moved}\n", "")
        file.seek(0)
        file.truncate()
        file.write(rest)
    with open(tmp_path / "new" / "lists" / "test.txt", "a") as file:
        file.write(f"{moved}\n")
    with pytest.raises(DataError, match=r"group p\d+ .* is also in train"):
        load_splits(tmp_path / "new" / "lists", "labelled_20pct")


def test_lists_are_not_overwritten(tmp_path):
    ids = flat(singles(40))
    first = list_files(draw(singles(40), ids, labelled=[Amount(10, "pct"), Amount(20, "pct")]))
    second = list_files(draw(singles(40), ids, labelled=[Amount(10, "pct")], seed=1))
    assert lists_hash(first) != lists_hash(second)
    assert write_lists(tmp_path, first, "first")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ExistsError, match="labelled_10pct"):
        write_lists(tmp_path, second, "second")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert write_lists(tmp_path, first, "anything") is False  # the same lists: nothing to do
    (tmp_path / "notes.txt").write_text("mine")
    assert write_lists(tmp_path, second, "second", force=True)
    assert not (tmp_path / "labelled_20pct.txt").exists()  # would not lie inside the new train list
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert load_splits(tmp_path, "labelled_10pct").train


# ---------------------------------------------------------------- further draws, and folds


def study(seed, groups=30, classes=3):
    """Units of 1 to 8 cases, most of them with a mask, and what the masks show: classes go by patient, as in life."""
    rng = random.Random(seed)
    units, traits = [], {}
    for n in range(groups):
        ids = [f"p{n:03d}_{k}" for k in range(rng.randint(1, 8))]
        own = frozenset(k for k in range(1, classes + 1) if rng.random() < 1 / k)
        for i in ids:
            if rng.random() < 0.9:
                area = rng.random() ** 2 if own else 0.0
                traits[i] = Trait(own if area else frozenset(), area)
        units.append(ids)
    return units, traits


@pytest.mark.parametrize("seed", range(12))
def test_label_draws(seed):
    units, traits = study(seed)
    ids = flat(units)
    amounts = [Amount(10, "pct"), Amount(30, "pct"), Amount(4, "groups")]
    drawn = draw_labels(units, list(traits), train=len(ids), labelled=amounts, label_seeds=[0, 1, 5], traits=traits)
    assert set(drawn.lists) == {f"{a.list_name}_draw{n}" for a in amounts for n in (0, 1, 5)}
    owner = {i: n for n, unit in enumerate(units) for i in unit}
    for case_ids in drawn.lists.values():
        held = {owner[i] for i in case_ids}  # whole patients, and of those every case that has a mask
        assert case_ids == sorted(i for n in held for i in units[n] if i in traits)
    for n in (0, 1, 5):
        assert set(drawn.lists[f"labelled_10pct_draw{n}"]) <= set(drawn.lists[f"labelled_30pct_draw{n}"])
        assert len({owner[i] for i in drawn.lists[f"labelled_4groups_draw{n}"]}) == 4
    assert len({tuple(drawn.lists[f"labelled_30pct_draw{n}"]) for n in (0, 1, 5)}) > 1
    # the same again: in another order, with other seeds and sizes beside it
    shuffled = random.Random(seed).sample(units, len(units))
    again = draw_labels(
        shuffled, list(traits)[::-1], train=len(ids), labelled=amounts[1:2], label_seeds=[7, 5], traits=traits
    )
    assert again.lists["labelled_30pct_draw5"] == drawn.lists["labelled_30pct_draw5"]


def test_label_draws_hold_what_the_training_cases_hold():
    ids = [f"case_{n:03d}" for n in range(400)]
    kinds = [frozenset({1})] * 300 + [frozenset({1, 2})] * 80 + [frozenset()] * 20
    rng = random.Random(0)
    traits = {i: Trait(kind, rng.random() if kind else 0.0) for i, kind in zip(ids, kinds, strict=True)}
    masked = dict(units=[[i] for i in ids], masked=ids, train=400, labelled=[Amount(10, "pct")], label_seeds=range(40))
    stratified = draw_labels(**masked, traits=traits).lists.values()
    plain = draw_labels(**masked).lists.values()

    def spread(lists, what):
        values = [what([traits[i] for i in case_ids]) for case_ids in lists]
        mean = sum(values) / len(values)
        return mean, (sum((value - mean) ** 2 for value in values) / len(values)) ** 0.5

    for number, expected in ((2, 8), (1, 38)):
        counts = [sum(number in traits[i].classes for i in case_ids) for case_ids in stratified]
        assert all(abs(count - expected) <= 4 for count in counts)
    without = [sum(not traits[i].classes for i in case_ids) for case_ids in stratified]
    assert set(without) <= {1, 2, 3}
    for what in (lambda those: sum(2 in trait.classes for trait in those), lambda those: sum(t.area for t in those)):
        assert spread(stratified, what)[1] < 0.75 * spread(plain, what)[1]
    drawn_often = sorted(sum(i in case_ids for case_ids in stratified) for i in ids)
    assert drawn_often[0] < 4 < drawn_often[-1] and sum(drawn_often) == 40 * 40  # chance decides, of all alike


def test_a_rare_kind_is_drawn_as_often_as_it_is_there():
    ids = [f"case_{n:02d}" for n in range(50)]
    traits = {i: Trait(frozenset({2 if n == 7 else 1}), 0.5) for n, i in enumerate(ids)}
    drawn = draw_labels(
        [[i] for i in ids], ids, train=50, labelled=[Amount(20, "pct")], label_seeds=range(200), traits=traits
    )
    assert 20 < sum("case_07" in those for those in drawn.lists.values()) < 65  # 40 of 200 expected


def test_label_draws_are_the_same_on_every_machine():
    ids = flat(singles(20))
    traits = {i: Trait(frozenset({1 + n % 2}), n / 20) for n, i in enumerate(ids)}
    drawn = draw_labels(singles(20), ids, train=20, labelled=[Amount(25, "pct")], label_seeds=[0, 1], traits=traits)
    # Not to be changed: lists that people have drawn and published would change with it.
    assert drawn.lists == {
        "labelled_25pct_draw0": ["case_000", "case_006", "case_011", "case_013", "case_018"],
        "labelled_25pct_draw1": ["case_004", "case_008", "case_011", "case_017", "case_018"],
    }


def test_too_much_is_refused():
    with pytest.raises(DataError, match="labelled_30pct needs 30 cases"):
        draw_labels(singles(9), flat(singles(9)), train=100, labelled=[Amount(30, "pct")], label_seeds=[0])


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("fixed", [False, True])
def test_folds(seed, fixed):
    units, traits = study(seed)
    test = ["t_1", "t_0"] if fixed else None
    options = dict(val=0.0 if fixed else 15.0, labelled=[Amount(10, "pct")], seed=seed, traits=traits, test=test)
    drawings = draw_folds(units, list(traits), 4, **options)
    owner = {i: n for n, unit in enumerate(units) for i in unit}
    role = "val" if fixed else "test"
    held = [set(drawn.lists[role]) for drawn in drawings]
    assert sum(map(len, held)) == len(traits) and set().union(*held) == set(traits)  # each case with a mask, once
    for drawn in drawings:
        lists = {name: set(ids) for name, ids in drawn.lists.items()}
        parts = [lists["train"], lists["val"], lists["test"] - {"t_0", "t_1"}]
        assert sum(map(len, parts)) + len(drawn.left_out) == len(owner)
        assert all(
            not {owner[i] for i in a} & {owner[i] for i in b} for a, b in itertools.combinations(parts, 2) if a and b
        )
        assert lists["labelled_10pct"] <= lists["labelled_max"] == lists["train"] & set(traits)
        assert drawn.lists["test"] == ["t_0", "t_1"] if fixed else len(lists["val"]) >= 1
        assert all(ids == sorted(ids) for ids in drawn.lists.values())
    again = draw_folds(random.Random(1).sample(units, len(units)), list(traits)[::-1], 4, **options)
    assert [drawn.lists for drawn in again] == [drawn.lists for drawn in drawings]
    other = draw_folds(units, list(traits), 4, **{**options, "seed": seed + 100})
    assert [drawn.lists for drawn in other] != [drawn.lists for drawn in drawings]


def test_folds_hold_like_numbers_of_everything():
    units, traits = study(3, groups=100)
    drawings = draw_folds(units, list(traits), 5, traits=traits)
    tests = [[traits[i] for i in drawn.lists["test"]] for drawn in drawings]
    for what in (
        lambda those: len(those),
        lambda those: sum(1 in trait.classes for trait in those),
        lambda those: sum(3 in trait.classes for trait in those),
        lambda those: sum(trait.area for trait in those),
    ):
        values = [what(those) for those in tests]
        assert max(values) - min(values) <= 0.2 * sum(values) / 5, values


def test_fold_refusals():
    for folds, val, error, says in (
        (1, 10, ConfigError, "needed are 2"),
        (2, 60, ConfigError, "leave some for training"),
        (5, 10, DataError, "5 folds of 5 sets"),
    ):
        with pytest.raises(error, match=says):
            draw_folds(singles(5), flat(singles(5)), folds, val=val)
    assert len(draw_folds(singles(5), flat(singles(5)), 5, val=0)) == 5


def test_draws_are_written_beside_lists_and_stay_there(tmp_path):
    ids = flat(singles(40))
    base = list_files(draw(singles(40), ids, labelled=[Amount(10, "pct")]))
    write_lists(tmp_path, base, "base")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    draws = {"labelled_10pct_draw0.txt": "case_000\n", "labelled_10pct_draw1.txt": "case_001\n"}
    assert write_draws(tmp_path, draws, "first\n") == list(draws)
    assert write_draws(tmp_path, draws, "again\n") == []
    with pytest.raises(ExistsError, match=r"labelled_10pct_draw1\.txt"):
        write_draws(tmp_path, {"labelled_10pct_draw1.txt": "case_002\n"}, "other\n")
    assert write_draws(tmp_path, {"labelled_10pct_draw2.txt": "case_002\n"}, "more\n")
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    summary = (tmp_path / "summary_draws.md").read_text()
    assert summary.index("first") < summary.index("more") and "again" not in summary and "other" not in summary
    # the same lists again: nothing to do; other lists: refused, and by force the draws go with them
    assert write_lists(tmp_path, base, "base") is False
    changed = {**base, "val.txt": "case_000\n"}
    with pytest.raises(ExistsError):
        write_lists(tmp_path, changed, "x")
    assert write_lists(tmp_path, changed, "x", force=True)
    assert not list(tmp_path.glob("*_draw*.txt"))


def test_duplicates_are_written_beside_lists_that_are_the_same(tmp_path):
    ids = flat(singles(40))
    drawn = draw(singles(40), ids)
    write_lists(tmp_path, list_files(drawn), "base")
    first, second = drawn.lists["test"][:2]
    files = list_files(drawn, duplicates={"test": [[first, second]]})
    assert files["near_duplicates.csv"] == f"id,group\n{first},{first}\n{second},{first}\n"
    assert write_lists(tmp_path, files, "more") is True
    assert write_lists(tmp_path, files, "more") is False
    units = independent_units(tmp_path, drawn.lists["test"])
    assert units[first] == units[second] == first and len(set(units.values())) == len(drawn.lists["test"]) - 1
