"""An index of files: what it holds, when it is built again, and what a start of millions of rows costs."""

import hashlib
import os
import pickle
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from knowsam.data.index import NOTHING, IdList, Index, _places
from knowsam.data.make_index import Place, Wanted, index_place, make_index, write_index
from knowsam.data.splits import check_against, load_splits, regex_rule, table_rule
from knowsam.errors import DataError, NotFoundError, StorageError

PLACES = (Place("images", (".png", ".jpg")), Place("masks", (".png",), masks=True))
PATIENT = r"^(p\d+)"


def mask_range(path):
    values = np.asarray(Image.open(path))
    return int(values.min()), int(values.max())


def patient(case_id):
    return case_id.split("/")[0]


@pytest.fixture
def data(tmp_path):
    """Patients p0..p4 of four images each; the last of each has no mask, p0's first two are the same file."""
    for n in range(20):
        name = f"p{n // 4}/{n:02d}"
        for kind in ("images", "masks"):
            (tmp_path / "data" / kind / f"p{n // 4}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), max(n, 1), np.uint8)).save(tmp_path / "data" / "images" / f"{name}.png")
        if n % 4 < 3:
            mask = np.zeros((8, 8), np.uint8)
            mask[0, 0] = n
            Image.fromarray(mask).save(tmp_path / "data" / "masks" / f"{name}.png")
    return tmp_path / "data"


def build(data, **wanted):
    report = make_index(data.parent / "my.index", data, PLACES, Wanted(**wanted))
    return Index(data.parent / "my.index"), report


def lists(folder, index, *, test_from=16):
    """Lists of the indexed cases: p0..p2 train, p3 val, p4 test."""
    folder.mkdir(exist_ok=True)
    ids = list(index.ids)
    parts = {"train": ids[:12], "labelled_10pct": ids[:3], "val": ids[12:test_from], "test": ids[test_from:]}
    for name, those in parts.items():
        (folder / f"{name}.txt").write_text("".join(f"{i}\n" for i in those))
    return folder


def test_what_an_index_holds(data):
    everything = dict(
        digests=True, mask_range=mask_range, group=patient, domain=lambda i: "a" if i < "p2" else None, group_rule="x"
    )
    index, report = build(data, **everything)
    assert (report.cases, report.masks, report.read, report.known) == (20, 15, 35, 0)
    assert list(index) == sorted(index) == [f"p{n // 4}/{n:02d}" for n in range(20)]
    assert "p1/05" in index and "p1/5" not in index and 5 not in index and "\udcff" not in index
    assert index.file("p1/05") == data / "images/p1/05.png" and index.mask_file("p1/05") == data / "masks/p1/05.png"
    assert index.files(["p4/19", "p0/00"]) == [data / "images/p4/19.png", data / "images/p0/00.png"]
    assert all(path.is_file() for path in [*index.images.values(), *index.masks.values()])
    assert len(index.images) == 20 and len(index.masks) == 15 and "p0/03" not in index.masks
    assert index.group("p3/12") == "p3" and index.domain("p1/04") == "a" and index.domain("p2/08") is None
    assert index.mask_range("p2/09") == (0, 9) and index.mask_range("p0/03") is None
    assert index.digest("p1/05") == hashlib.sha256((data / "images/p1/05.png").read_bytes()).hexdigest()
    assert index.digest("p0/03", "mask") is None
    assert index.column("image_size")[7] == (data / "images/p1/07.png").stat().st_size
    for ask in (index.file, index.mask_file, index.group, index.digest):
        with pytest.raises(DataError, match=r"p9 is not in the index .*my\.index"):
            ask("p9")
    with pytest.raises(DataError, match="no mask"):
        index.mask_file("p0/03")


def test_what_is_passed_over_is_said(data):
    (data / "images" / "p0" / "00.jpg").write_bytes(b"another file of that name")
    (data / "images" / "notes.docx").write_bytes(b"")
    (data / "images" / "#5.png").write_bytes(b"")
    (data / "images" / ".hidden.png").write_bytes(b"")
    (data / "masks" / "p9").mkdir()
    (data / "masks" / "p9" / "99.png").write_bytes(b"")
    (data / "masks" / "p1" / "06.png").write_bytes(b"no picture")
    os.symlink(data / "nowhere.png", data / "images" / "dangling.png")
    index, report = build(data, mask_range=mask_range, group=lambda i: None if i == "p1/04" else "g")
    told = "\n".join(report.notes)
    for part in (
        "1 x .docx is not read, such as images/notes.docx",
        "marks a comment in lists, such as 'images/#5.png'",
        "1 x a link that leads nowhere",
        "1 masks without an image",
        "1 ids have several files",
        "cannot be read, and is in the index all the same: masks/p1/06.png",
        "1 of 20 cases have no group, such as p1/04",
    ):
        assert part in told
    assert len(index) == 20 and index.mask_range("p1/06") is None
    with pytest.raises(DataError, match=r"p0/00: images/p0/00\.\w+ and images/p0/00\.\w+"):
        index.file("p0/00")


def test_suffixes_and_folders_inside_each_other(tmp_path):
    for name in ("data/slices/a_1.h5", "data/slices/a_2.h5", "data/a.h5", "data/b.h5"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    make_index(tmp_path / "i", tmp_path, (Place("data/slices", (".h5",)), Place("data", (".h5",))))
    assert list(Index(tmp_path / "i")) == ["a", "a_1", "a_2", "b"]
    (tmp_path / "scans").mkdir()
    (tmp_path / "scans" / "v_0000.nii.gz").write_bytes(b"x")
    make_index(tmp_path / "i", tmp_path, (Place("scans", (".gz", ".nii.gz"), "_0000"),))
    assert dict(Index(tmp_path / "i").images) == {"v": tmp_path / "scans" / "v_0000.nii.gz"}
    for name in ("one/x_0000.png", "one/x_mask.PNG", "one/y_0000.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    places = (Place("", (".png",), "_0000"), Place("", (".png",), "_mask", masks=True))
    make_index(tmp_path / "i", tmp_path / "one", places)
    index = Index(tmp_path / "i")
    assert dict(index.images) == {i: tmp_path / "one" / f"{i}_0000.png" for i in "xy"}
    assert dict(index.masks) == {"x": tmp_path / "one" / "x_mask.PNG"}
    assert index_place(tmp_path, places) != index_place(tmp_path, PLACES) == index_place(f"{tmp_path}/", PLACES)


def test_refusals(tmp_path, data):
    with pytest.raises(NotFoundError, match="nowhere does not exist"):
        make_index(tmp_path / "i", tmp_path / "nowhere", PLACES)
    with pytest.raises(NotFoundError, match="labels does not exist"):
        make_index(tmp_path / "i", data, (PLACES[0], Place("labels", (".png",), masks=True)))
    with pytest.raises(NotFoundError, match="no image in"):
        make_index(tmp_path / "i", data, (Place("images", (".bmp",)),))
    with pytest.raises(NotFoundError, match="there is no index"):
        Index(tmp_path / "i")
    index, _ = build(data)
    whole = index.path.read_bytes()
    for damaged, says in (
        (whole[:-70], "damaged or cut short"),
        (whole[:30], "damaged or cut short"),
        (b"", "no index of knowsam"),
        (b"PNG" + whole, "no index of knowsam"),
        (whole.replace(b'"format": 1', b'"format": 9'), "format 9"),
    ):
        (tmp_path / "bad").write_bytes(damaged)
        with pytest.raises(DataError, match=says):
            Index(tmp_path / "bad")


def test_only_what_is_new_is_read_again(data):
    seen = []

    def counted(path):
        seen.append(path.name)
        return mask_range(path)

    first, _ = build(data, digests=True, mask_range=counted)
    assert len(seen) == 15
    assert build(data, digests=True, mask_range=counted)[1].known == 35 and len(seen) == 15
    Image.fromarray(np.full((9, 9), 77, np.uint8)).save(data / "masks/p1/05.png")
    Image.fromarray(np.full((9, 9), 78, np.uint8)).save(data / "masks/p0/03.png")
    (data / "masks/p0/01.png").unlink()
    index, report = build(data, digests=True, mask_range=counted)
    assert sorted(seen[15:]) == ["03.png", "05.png"] and (report.read, report.known) == (2, 33)
    assert (index.mask_range("p1/05"), index.mask_range("p0/03"), index.mask_range("p0/01")) == (
        (77, 77),
        (78, 78),
        None,
    )
    untouched = [i for i in first if i not in ("p1/05", "p0/03", "p0/01")]
    for what in ("image", "mask"):
        assert [index.digest(i, what) for i in untouched] == [first.digest(i, what) for i in untouched]
    # what an index without ranges cannot know is read
    make_index(data.parent / "other.index", data, PLACES, Wanted(digests=True))
    make_index(data.parent / "other.index", data, PLACES, Wanted(digests=True, mask_range=counted))
    assert Index(data.parent / "other.index").mask_range("p1/05") == (77, 77)


def test_an_attempt_that_was_broken_off_is_gone_on_with(data, monkeypatch):
    monkeypatch.setattr("knowsam.data.make_index._AT_ONCE", 4)
    seen = []
    lock = threading.Lock()

    def dies(path):
        with lock:
            seen.append(path.name)
            if len(seen) > 9:
                raise KeyboardInterrupt
        return mask_range(path)

    with pytest.raises(KeyboardInterrupt):
        build(data, mask_range=dies)
    assert not (data.parent / "my.index").exists()
    part = data.parent / "my.index.part"
    part.write_bytes(part.read_bytes() + b"half a no")  # as a power cut leaves it
    again = []

    def counted(path):
        again.append(path.name)
        return mask_range(path)

    index, report = build(data, mask_range=counted)
    assert report.known == 8 and len(again) == 7 and len({*seen[:8], *again}) == 15
    assert index.mask_range("p2/09") == (0, 9) and not part.exists()


def test_all_or_nothing(data, monkeypatch):
    build(data)
    before = (data.parent / "my.index").read_bytes()
    (data / "images" / "new.png").write_bytes(b"x")
    with monkeypatch.context() as patch:
        patch.setattr("knowsam.files.os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "no space")))
        with pytest.raises(StorageError, match="no space"):
            build(data)
    assert (data.parent / "my.index").read_bytes() == before
    assert {path.name for path in data.parent.iterdir()} == {"data", "my.index", "my.index.part"}
    assert "new" in build(data)[0]


@pytest.mark.skipif(sys.platform == "win32", reason="flock")
def test_two_do_not_build_one_index(data):
    def inner(path):
        with pytest.raises(StorageError, match=r"another process is building .*my\.index"):
            build(data)
        return 0, 0

    build(data, mask_range=inner)


def test_stale(data):
    index, _ = build(data)
    assert index.stale() == index.stale(None) == [] and not index.changed("p1/05")
    os.utime(data / "images/p1/05.png", ns=(1, 1))
    assert index.changed("p1/05") and index.stale() == ["p1/05: written over or gone since"]
    (data / "masks/p2/08.png").unlink()
    assert index.stale() == ["folder masks/p2: files have come or gone since"] + [
        f"{i}: written over or gone since" for i in ("p1/05", "p2/08")
    ]
    assert len(index.stale(3)) < 3
    (data / "images/p3").rename(data / "images/q3")
    assert "folder images/p3 is gone" in index.stale()
    data.rename(data.with_name("moved"))
    assert index.stale() == [f"{data} is not there"]


def test_lists_over_an_index_are_the_lists(data, tmp_path):
    index, _ = build(data, group=patient, group_rule=regex_rule(PATIENT))
    folder = lists(tmp_path / "lists", index)
    plain = load_splits(folder, group_regex=PATIENT)
    splits = load_splits(folder, group_regex=PATIENT, index=index)
    for name in ("train", "labelled", "val", "test", "unlabelled"):
        ids = getattr(splits, name)
        assert isinstance(ids, IdList) and ids == getattr(plain, name) and list(ids) == list(getattr(plain, name))
        assert all(i in ids for i in getattr(plain, name)) and len(ids) == len(getattr(plain, name))
        assert "p9/99" not in ids and ids[0] == getattr(plain, name)[0] and ids[-1] == getattr(plain, name)[-1]
        assert list(ids[1:3]) == list(getattr(plain, name)[1:3])
    assert sorted(splits.readable_masks) == sorted(plain.readable_masks)
    assert splits.sha256 == plain.sha256 and splits.place("val.txt", "p3/13") == plain.place("val.txt", "p3/13")
    for case_id in index:
        told = []
        for those in (splits, plain):
            try:
                told.append(those.require_readable_mask(case_id))
            except DataError as error:
                told.append(str(error))
        assert told[0] == told[1]
    check_against(splits, index)
    assert index.without_mask(splits.train) == ["p0/03", "p1/07", "p2/11"]
    check_against(load_splits(folder, "all", index=index), index)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("val.txt", "p3/12\np0/00\n"),
        ("val.txt", "p3/12\np3/12\n"),
        ("val.txt", "p2/gone\n"),
        ("val.txt", "../p3/12\n"),
        ("val.txt", "# none\n"),
        ("labelled_10pct.txt", "p3/12\n"),
    ],
)
def test_wrong_lists_are_told_alike_with_an_index(data, tmp_path, name, text):
    index, _ = build(data, group=patient, group_rule=regex_rule(PATIENT))
    folder = lists(tmp_path / "lists", index)
    (folder / name).write_text(text)
    told = []
    for given in (None, index):
        with pytest.raises(DataError) as caught:
            load_splits(folder, group_regex=PATIENT, index=given)
        told.append(str(caught.value))
    assert told[0] == told[1]


def test_a_patient_in_two_lists_is_seen_in_the_index(data, tmp_path, monkeypatch):
    index, _ = build(data, group=patient, group_rule=regex_rule(PATIENT))
    folder = lists(tmp_path / "lists", index, test_from=14)
    with pytest.raises(DataError, match="group p3"):
        load_splits(folder, group_regex=PATIENT, index=index)
    # an index whose groups are by another rule is not believed
    other, _ = build(data, group=lambda i: i, group_rule=regex_rule("(.*)"))
    with pytest.raises(DataError, match="group p3"):
        load_splits(folder, group_regex=PATIENT, index=other)
    (folder / "groups.csv").write_text("id,group\n" + "".join(f"{i},{i[:2]}\n" for i in index))
    by_table, _ = build(data, group=patient, group_rule=table_rule(folder / "groups.csv"))
    with pytest.raises(DataError, match="group p3"):
        load_splits(folder, index=by_table)
    monkeypatch.setattr("knowsam.data.splits.read_groups", lambda path: pytest.fail("the index knows the groups"))
    assert load_splits(lists(folder, index), index=by_table).test


def test_a_missing_name_is_told_with_the_nearest(data, tmp_path):
    index, _ = build(data)
    folder = lists(tmp_path / "lists", index)
    (folder / "val.txt").write_text("p3/12\nP3/13\n")
    with pytest.raises(DataError, match=r"val\.txt:2: 'P3/13' is not in images; nearest is 'p3/13'"):
        check_against(load_splits(folder, index=index), index, where="images")


def test_lists_are_translated_once(data, tmp_path, monkeypatch):
    index, _ = build(data)
    folder = lists(tmp_path / "lists", index)
    first = load_splits(folder, index=index)
    monkeypatch.setattr(Index, "rows", lambda *_: pytest.fail("translated again"))
    assert load_splits(folder, index=Index(index.path)).train == first.train
    (folder / "val.txt").write_text("p3/12\n")
    with pytest.raises(pytest.fail.Exception, match="translated again"):
        load_splits(folder, index=index)
    monkeypatch.undo()
    # other files, other rows: an index that was built again asks anew
    (data / "images" / "a.png").write_bytes(b"x")
    again, _ = build(data)
    assert list(load_splits(folder, index=again).train) == list(first.train)
    assert load_splits(folder, index=again).train.rows[0] == first.train.rows[0] + 1


def test_the_same_file_in_two_lists(data, tmp_path):
    index, _ = build(data, digests=True)
    splits = load_splits(lists(tmp_path / "lists", index), index=index)
    parts = {name: getattr(splits, name) for name in ("train", "val", "test")}
    assert index.same_content(parts) == []  # p0's two are both in train
    (data / "images/p4/19.png").write_bytes((data / "images/p0/02.png").read_bytes())
    index, _ = build(data, digests=True)
    splits = load_splits(tmp_path / "lists", index=index)
    parts = {name: getattr(splits, name) for name in ("train", "val", "test")}
    assert index.same_content(parts) == [("p0/02", "p4/19")]
    assert build(data)[0].same_content(parts) == []  # nothing was read


def test_workers_map_the_index_and_get_no_copy(data, tmp_path):
    index, _ = build(data, group=patient)
    splits = load_splits(lists(tmp_path / "lists", index), index=index)
    assert splits.readable_masks  # worked out here, and not sent
    sent = tmp_path / "sent"
    sent.write_bytes(pickle.dumps((index, splits)))
    assert sent.stat().st_size < 2000
    code = (
        "import pickle, sys, numpy as np\n"
        "index, splits = pickle.loads(open(sys.argv[1], 'rb').read())\n"
        "assert isinstance(splits.train.rows, np.memmap) and not splits.train.rows.flags.writeable\n"
        "owner = index.column('image_size')\n"
        "while not isinstance(owner, np.memmap): owner = owner.base\n"
        "print(index.file(splits.test[0]), 'p0/00' in splits.readable_masks)"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    words = [sys.executable, "-c", code, str(sent)]
    done = subprocess.run(words, capture_output=True, text=True, check=True, env=env)
    assert done.stdout.split() == [str(data / "images/p4/16.png"), "True"]
    part = pickle.loads(pickle.dumps(splits.train[2:4]))
    assert list(part) == ["p0/02", "p0/03"]  # of a mapped list, not the whole of it


def test_names_of_one_hash_are_told_apart():
    class Same(str):
        __slots__ = ()

        def __hash__(self):
            return 5

    names = [Same(c) for c in "abcd"]
    assert _places([Same("c"), Same("x"), Same("a")], names).tolist() == [2, -1, 0]
    assert _places(["c", "x", "a"], list("abcd")).tolist() == [2, -1, 0]


# ---------------------------------------------------------------- many rows


def made_up(folder, count, *, per_group=40):
    """An index of ``count`` cases that are nowhere, and lists over it: 90 % train, 5 % val, 5 % test."""
    numbers = np.arange(count)
    ids = [f"p{n // per_group:06d}/scan{n % per_group:02d}" for n in range(count)]
    groups = [f"p{n:06d}" for n in range(-(-count // per_group))]
    zeros = np.zeros(count, np.int64)
    columns = {f"{what}_{name}": zeros for what in ("image", "mask") for name in ("size", "mtime")}
    columns |= {
        "image_kind": np.zeros(count, np.uint16),
        "mask_kind": np.where(numbers % 3 == 0, NOTHING, 1).astype(np.uint16),
        "several": np.zeros(count, np.uint8),
        "content": np.zeros(count, np.uint32),
        "group": (numbers // per_group + 1).astype(np.uint32),
        "domain": np.zeros(count, np.uint32),
        "folder_mtime": np.zeros(1, np.int64),
    }
    header = {
        "root": str(folder / "nowhere"),
        "kinds": [["images/", ".png"], ["masks/", ".png"]],
        "several": {},
        "domains": [],
        "group_rule": regex_rule(PATIENT),
    }
    folder.mkdir(exist_ok=True)
    write_index(folder / "my.index", header, columns, {"id": ids, "group": groups, "folder": ["images"]})
    first, second = (round(count * share / per_group) * per_group for share in (0.9, 0.95))
    parts = {"train": ids[:first], "val": ids[first:second], "test": ids[second:], "labelled_1pct": ids[: count // 100]}
    for name, those in parts.items():
        (folder / f"{name}.txt").write_text("".join(f"{i}\n" for i in those))
    return folder


def start(folder):
    """What a training does of an index before its first batch."""
    index = Index(folder / "my.index")
    splits = load_splits(folder, "labelled_1pct", group_regex=PATIENT, index=index)
    check_against(splits, index)
    parts = {name: getattr(splits, name) for name in ("train", "val", "test")}
    assert index.same_content(parts) == [] and index.several_files(splits.train) == []
    lacking = len(index.without_mask(splits.labelled[:150]))
    files = index.files(splits.train[:8])
    assert len(splits.unlabelled) == len(splits.train) - len(splits.labelled)
    for case_id in splits.labelled[:8]:
        splits.require_readable_mask(case_id)
    return lacking, len(files)


def calls(action):
    """How often which function of Python or C is called, looks at the disk among them."""
    counted = Counter()

    def count(frame, event, argument):
        if event in ("call", "c_call"):
            counted[argument.__name__ if event == "c_call" else frame.f_code.co_name] += 1

    sys.setprofile(count)
    try:
        action()
    finally:
        sys.setprofile(None)
    return counted


def test_a_start_does_not_do_more_on_more_rows(tmp_path):
    small, large = made_up(tmp_path / "small", 20_000), made_up(tmp_path / "large", 200_000)
    assert start(small) == start(large) == (50, 8)  # translates the lists
    few, many = calls(lambda: start(small)), calls(lambda: start(large))
    # Looking up an id takes a few steps more in a longer table; nothing else may grow.
    assert sum(many.values()) < 1.5 * sum(few.values()) < 60_000
    for name in ("stat", "lstat", "scandir", "is_file"):
        assert many[name] == few[name] < 50, name
    assert many["open"] == few["open"] < 50


def test_translating_lists_is_linear(tmp_path):
    small, large = made_up(tmp_path / "small", 5_000), made_up(tmp_path / "large", 50_000)
    few, many = sum(calls(lambda: start(small)).values()), sum(calls(lambda: start(large)).values())
    assert many < 11 * few


@pytest.mark.slow
def test_a_start_on_4_6_million_rows(tmp_path):
    folder = made_up(tmp_path / "many", 4_600_000)
    start(folder)
    small = made_up(tmp_path / "small", 20_000)
    start(small)
    few, many = calls(lambda: start(small)), calls(lambda: start(folder))
    assert sum(many.values()) < 1.5 * sum(few.values())
    assert many["stat"] == few["stat"]
