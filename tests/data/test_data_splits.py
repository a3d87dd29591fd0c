import codecs
import difflib
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from knowsam.data import splits as module
from knowsam.data.nearest import NearestNames
from knowsam.data.splits import (
    Splits,
    check_against,
    group_of,
    independent_units,
    inspect_splits,
    load_splits,
    read_groups,
    unlistable,
)
from knowsam.errors import ConfigError, DataError, NotFoundError

GOOD = {
    "train.txt": "p1_a\np1_b\np2_a\n",
    "labelled_10pct.txt": "p1_a\n",
    "val.txt": "p3_a\n",
    "test.txt": "p4_a\n",
}
REGEX = r"^(p\d+)_"


def write(folder, files):
    for name, text in files.items():
        (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)
    return folder


def read_list(path):
    """(line, id) of one list, by way of its folder."""
    assert path.name == "test.txt"
    splits = load_splits(path.parent)
    return sorted((splits.lines["test.txt"][i], i) for i in splits.test)


def test_good_folder(tmp_path):
    splits = load_splits(write(tmp_path, GOOD), group_regex=REGEX)
    assert splits.train == ("p1_a", "p1_b", "p2_a")
    assert splits.labelled == ("p1_a",) and splits.unlabelled == ("p1_b", "p2_a")
    assert splits.of("val") == ["p3_a"] and splits.of("test") == ["p4_a"]
    assert set(splits.sha256) == set(GOOD) and len(splits.sha256["val.txt"]) == 64
    with pytest.raises(ValueError, match="'val' and 'test'"):
        splits.of("train")


def test_all_and_test_only(tmp_path):
    assert load_splits(write(tmp_path, GOOD), "all").labelled == ("p1_a", "p1_b", "p2_a")
    assert load_splits(tmp_path, "labelled_10pct.txt").labelled == ("p1_a",)
    only = tmp_path / "only"
    only.mkdir()
    splits = load_splits(write(only, {"test.txt": "b\na\n"}))
    assert splits.test == ("a", "b") and splits.train == splits.labelled == splits.val == ()


@pytest.mark.parametrize(
    "content",
    [
        b"b\r\na\r\n",
        codecs.BOM_UTF8 + b"b\na",
        b"\n# made by hand\n  b \n\n\ta\n   \n",
        b"b\ra",
    ],
)
def test_tolerated_text(tmp_path, content):
    path = tmp_path / "test.txt"
    path.write_bytes(content)
    assert [i for _, i in read_list(path)] == ["b", "a"]


def test_names_survive(tmp_path):
    names = ["a b", "é", "e\u0301", "it's", "-x", "x\u2028y", "sub/a", "a..b", "😀", "a#b"]
    path = tmp_path / "test.txt"
    path.write_text("".join(f"{n}\n" for n in names), encoding="utf-8")
    assert read_list(path) == list(enumerate(names, start=1))


@pytest.mark.parametrize(
    "bad",
    [
        "../x",
        "a/../../x",
        "..",
        "..\\x",
        "a\\..\\x",
        "/etc/passwd",
        "\\\\host\\x",
        "C:\\x",
        "c:/x",
        "a\0b",
        "a\x1bb",
        "./x",
        "a//b",
        "a/",
    ],
)
def test_escapes_are_refused_with_their_line(tmp_path, bad):
    path = tmp_path / "test.txt"
    path.write_text(f"# head\nfine\n{bad}\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"test\.txt:3: "):
        read_list(path)


def test_not_utf8(tmp_path):
    path = tmp_path / "test.txt"
    path.write_bytes(b"a\nb\n\xff\xfe\n")
    with pytest.raises(DataError, match=r"test\.txt:3: not UTF-8"):
        read_list(path)
    path.write_bytes("a\nb\n".encode("utf-16"))
    with pytest.raises(DataError, match="UTF-8"):
        read_list(path)


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        ({"train.txt": "p1_a\np2_a\np1_a\n"}, [r"train\.txt:3: p1_a is already in line 1"]),
        ({"val.txt": "# v\np2_a\n"}, [r"val\.txt:2: p2_a is also in train\.txt:3"]),
        ({"test.txt": "p4_a\np3_a\n"}, [r"test\.txt:2: p3_a is also in val\.txt:1"]),
        ({"val.txt": "p2_z\n"}, [r"val\.txt:1: group p2 \(p2_z\) is also in train\.txt:3 \(p2_a\)"]),
        ({"val.txt": "nobody\n"}, [r"val\.txt:1: nobody has no group"]),
        ({"labelled_10pct.txt": "p1_a\np9_a\n"}, [r"labelled_10pct\.txt:2: p9_a is not in train\.txt"]),
        ({"labelled_10pct.txt": "p3_a\n"}, [r"labelled_10pct\.txt:1: p3_a is not in train"]),
        ({"labelled_10pct.txt": "\n# none\n"}, [r"labelled_10pct\.txt:1: the list is empty"]),
        ({"train.txt": ""}, [r"train\.txt:1: the list is empty"]),
        ({"val.txt": "\r\n"}, [r"val\.txt:1: the list is empty"]),
        (
            {"train.txt": "p1_a\n../x\np1_b\np1_b\n", "test.txt": "p1_a\n", "labelled_10pct.txt": "p7_a\n"},
            [
                r"train\.txt:2: '\.\./x' leaves",
                r"train\.txt:4: p1_b is already in line 3",
                r"test\.txt:1: p1_a is also in train\.txt:1",
                r"labelled_10pct\.txt:1: p7_a is not in train",
            ],
        ),
    ],
)
def test_every_problem_is_told_with_its_line(tmp_path, changes, messages):
    write(tmp_path, GOOD | changes)
    with pytest.raises(DataError) as caught:
        load_splits(tmp_path, group_regex=REGEX)
    for message in messages:
        assert caught.match(message)


def test_a_patient_in_two_splits_is_told_once(tmp_path):
    write(tmp_path, GOOD | {"test.txt": "".join(f"p1_t{n}\n" for n in range(50))})
    with pytest.raises(DataError, match="1 problem\n"):
        load_splits(tmp_path, group_regex=REGEX)
    assert load_splits(tmp_path).test  # without a regex every id is its own group


def test_absent_things(tmp_path):
    with pytest.raises(NotFoundError, match="nowhere"):
        load_splits(tmp_path / "nowhere")
    with pytest.raises(NotFoundError, match="none of train"):
        load_splits(tmp_path)
    write(tmp_path, GOOD | {"labelled_1pct.txt": "p1_a\n"})
    with pytest.raises(NotFoundError, match="there are labelled_10pct, labelled_1pct, all"):
        load_splits(tmp_path, "labelled_7cases")
    with pytest.raises(ConfigError, match="plain name"):
        load_splits(tmp_path, "../labelled_10pct")
    with pytest.raises(ConfigError, match="no regular expression"):
        load_splits(tmp_path, group_regex="(")
    (tmp_path / "train.txt").unlink()
    with pytest.raises(DataError, match=r"no train\.txt"):
        load_splits(tmp_path)


def test_check_against(tmp_path):
    splits = load_splits(write(tmp_path, GOOD))
    check_against(splits, ["p1_a", "p1_b", "p2_a", "p3_a", "p4_a", "extra"])
    with pytest.raises(DataError) as caught:
        check_against(splits, ["p1_a", "P1_B", "p2_aa", "p3_a.png"], where="images")
    text = str(caught.value)
    assert "4 of 5 listed cases" in text
    assert "train.txt:2: 'p1_b' is not in images; nearest is 'P1_B'" in text
    assert "train.txt:3: 'p2_a' is not in images; nearest is 'p2_aa'" in text
    assert "val.txt:1: 'p3_a' is not in images; nearest is 'p3_a.png'" in text
    assert "test.txt:1: 'p4_a'" in text
    check_against(splits, ["p3_a"], checked=("val",))


def test_firewall_of_the_lists():
    splits = Splits(train=("a", "b"), labelled=("a",), val=("v",))
    splits.require_readable_mask("a")
    splits.require_readable_mask("v")
    with pytest.raises(DataError, match="unlabelled"):
        splits.require_readable_mask("b")
    with pytest.raises(DataError, match="none of the split lists"):
        splits.require_readable_mask("c")


def test_inspect_returns_what_can_be_used(tmp_path):
    files = {**GOOD, "val.txt": "p3_a\np1_b\n../x\n", "test.txt": "p4_a\np3_a\n", "labelled_10pct.txt": "p1_a\nzz\n"}
    splits, faults = inspect_splits(write(tmp_path, files), group_regex=REGEX)
    assert (splits.train, splits.labelled) == (("p1_a", "p1_b", "p2_a"), ("p1_a",))
    assert (splits.val, splits.test) == (("p3_a",), ("p4_a",))  # a case belongs to one list, train first
    assert [fault.kind for fault in faults] == ["bad list", "shared case", "shared case", "shared group", "bad list"]
    assert [fault.cases for fault in faults if fault.kind == "shared case"] == [("p1_b",), ("p3_a",)]
    assert inspect_splits(write(tmp_path, GOOD), group_regex=REGEX)[1] == []


def test_groups_from_a_table(tmp_path):
    write(tmp_path, GOOD)
    write(tmp_path, {"groups.csv": "id,group\np1_a,A\np1_b,A\np2_a,B\np3_a,C\np4_a,D\nother,A\n"})
    assert load_splits(tmp_path).val == ("p3_a",)
    write(tmp_path, {"groups.csv": 'id,group\np1_a,A\np1_b,A\np2_a,B\np3_a,A\n"p4_a",\n'})
    with pytest.raises(DataError) as caught:
        load_splits(tmp_path)
    assert [(fault.kind, fault.cases) for fault in caught.value.faults] == [
        ("shared group", ("p3_a", "p1_a")),
        ("no group", ("p4_a",)),
    ]


def test_tables_of_groups(tmp_path):
    table = write(tmp_path, {"t.csv": "\ufeffimage,patient\na.png,1\nb.png,2\na.png,1\n"}) / "t.csv"
    assert read_groups(table, "image", "patient") == {"a.png": "1", "b.png": "2"}
    with pytest.raises(DataError, match="no column 'id'; the columns are image, patient"):
        read_groups(table)
    with pytest.raises(DataError, match=r"t\.csv:3: a has the groups 1 and 2"):
        read_groups(write(tmp_path, {"t.csv": "id,group\na,1\na,2\n"}) / "t.csv")
    with pytest.raises(NotFoundError):
        read_groups(tmp_path / "none.csv")


def test_group_of():
    assert group_of("p12_x", REGEX) == "p12" and group_of("x", REGEX) is None
    assert group_of("p12_x", r"p\d+") == "p12"
    with pytest.raises(ConfigError):
        group_of("x", "(")


def test_names_that_lists_cannot_hold(tmp_path):
    for name in ("a", "a b", "sub/a", "a#b", "é"):
        assert unlistable(name) is None
        (tmp_path / "test.txt").write_text(f"{name}\n", encoding="utf-8")
        assert read_list(tmp_path / "test.txt") == [(1, name)]
    for name in ("#a", " a", "a ", "a\nb"):
        assert unlistable(name)


PIECES = [*"a \t#./\\:\r\n\x7f\0é\ufeff\u2028", "b/", "p1_", "c\n", "d\n"]


@settings(deadline=None, max_examples=300)
@given(text=st.lists(st.sampled_from(PIECES), max_size=12).map("".join))
def test_a_list_read_as_a_whole_is_that_read_line_by_line(text, tmp_path_factory):
    content = text.encode()
    entries, faults = module._parse(tmp_path_factory.getbasetemp() / "test.txt", content)
    whole = module._plain_list(content)
    if whole:  # else it is read line by line anyway
        assert not faults and list(enumerate(whole, start=1)) == entries


def test_lists_in_order_are_not_read_line_by_line(tmp_path, monkeypatch):
    slow = load_splits(write(tmp_path, GOOD), group_regex=REGEX)
    monkeypatch.setattr(module, "_parse", lambda *_: pytest.fail("line by line"))
    fast = load_splits(tmp_path, group_regex=REGEX)
    assert fast == slow and fast.place("train.txt", "p2_a").endswith("train.txt:3")
    write(tmp_path, {"groups.csv": "id,group\np1_a,A\np1_b,A\np2_a,B\np3_a,C\np4_a,D\n"})
    assert load_splits(tmp_path).test == ("p4_a",)
    write(tmp_path, {"train.txt": "p2_a\np1_b\np1_a\n"})
    unsorted = load_splits(tmp_path)
    assert unsorted.train == slow.train and unsorted.lines["train.txt"]["p2_a"] == 1
    monkeypatch.undo()
    monkeypatch.setattr(module, "_in_order", lambda *_: None)
    assert load_splits(tmp_path).lines["train.txt"] == dict(unsorted.lines["train.txt"])


def altered(name, rng, edits):
    letters = list(name)
    for _ in range(edits):
        at = rng.randrange(len(letters))
        letters[at : at + 1] = rng.choice(["", "x", "7", letters[at] * 2, "_"])
    return "".join(letters)


@pytest.mark.parametrize("edits", [1, 2, 3])
def test_the_nearest_is_as_near_as_the_nearest_of_all(edits):
    rng = random.Random(edits)
    names = [f"patient{rng.randrange(900):03d}_{rng.choice(['ED', 'ES'])}_slice_{n % 12}" for n in range(1500)]
    names = list(dict.fromkeys(names))
    nearest = NearestNames(names)
    for name in (altered(rng.choice(names), rng, edits) for _ in range(25)):
        (best,) = difflib.get_close_matches(name, names, n=1)
        found = nearest.of(name)
        ratios = [difflib.SequenceMatcher(None, candidate, name).ratio() for candidate in (found, best)]
        assert ratios[0] == ratios[1], (name, found, best)


def test_nearest_of_odd_names():
    names = ["a", "Straße", "e\u0301tude", "x" * 300, "\udcff", "line\nbreak", "b c"]
    nearest = NearestNames(names)
    assert nearest.of("STRASSE") == "Straße" and nearest.of("étude.png") == "e\u0301tude" and nearest.of("A") == "a"
    assert nearest.of("x" * 290) == "x" * 300 and nearest.of("line_break") == "line\nbreak"
    assert nearest.of("nothing alike") is None and nearest.of("") is None
    assert NearestNames([]).of("a") is None and NearestNames(["a"]).of("a.png") == "a"


def test_names_are_found_across_pieces(monkeypatch):
    names = [f"case_{n:05d}" for n in range(2000)]
    expected = NearestNames(names).of("case_01234x")
    monkeypatch.setattr("knowsam.data.nearest._PIECE", 97)
    assert NearestNames(names).of("case_01234x") == expected == "case_01234"


def test_missing_names_among_100000_are_told_after_few_comparisons(monkeypatch):
    names = [f"patient{n // 40:05d}/scan{n % 40:02d}" for n in range(100_000)]
    compared = []
    ratio = difflib.SequenceMatcher.real_quick_ratio  # of every name that difflib looks at

    def counted(matcher):
        compared.append(1)
        return ratio(matcher)

    monkeypatch.setattr(difflib.SequenceMatcher, "real_quick_ratio", counted)
    lost = tuple(f"{name}_T1" for name in names[1000:1030])
    with pytest.raises(DataError) as caught:
        check_against(Splits(val=lost, lines={}), names, where="images")
    assert len(compared) <= 20 * 50
    assert str(caught.value).count("nearest is") == 20 and "nearest is 'patient00025/scan00'" in str(caught.value)


def test_of_very_many_names_the_nearest_is_sought_for_the_first_few(monkeypatch):
    monkeypatch.setattr("knowsam.data.nearest.MOST_BYTES", 30)
    with pytest.raises(DataError) as caught:
        check_against(Splits(val=("aax", "bbx", "ccx")), ["aa1", "bb2", "cc3"])
    assert str(caught.value).count("nearest is") == 2


def test_independent_units(tmp_path):
    ids = ["p1_a", "p1_b", "p2_a", "p3_a", "p4_a", "p4_b"]
    assert independent_units(tmp_path, ids) == {i: i for i in ids}
    by_name = independent_units(tmp_path, ids, group_regex=REGEX)
    assert by_name == dict(zip(ids, ["p1_a", "p1_a", "p2_a", "p3_a", "p4_a", "p4_a"], strict=True))
    # a picture of p2 is nearly one of p1: both patients are one unit, for their scores depend on each other
    write(tmp_path, {"near_duplicates.csv": "id,group\np1_b,p1_b\np2_a,p1_b\nelsewhere,p1_b\n"})
    assert independent_units(tmp_path, ids, group_regex=REGEX)["p2_a"] == "p1_a"
    write(tmp_path, {"groups.csv": "id,group\np3_a,X\np4_a,X\n"})
    assert independent_units(tmp_path, ids)["p4_a"] == "p3_a" and independent_units(tmp_path, ids)["p4_b"] == "p4_b"
