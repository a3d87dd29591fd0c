import errno
import json
import os
import pickle
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from knowsam.cli.main import run_command
from knowsam.data import cache as cache_module
from knowsam.data.cache import DecodedCache, build_cache, default_folder, file_sha256
from knowsam.data.sizing import resize_ids, resize_levels
from knowsam.errors import DataError, NotFoundError, StorageError


class Memory:
    """A source without files, which counts what it is asked for."""

    num_classes = 2

    def __init__(self, count=5, shape=(12, 16), cache_settings=None):
        rng = np.random.default_rng(0)
        self.images = {f"c{n}": rng.integers(0, 256, (*shape, 3), np.uint8) for n in range(count)}
        self.masks = {k: (v[..., 0] > 99).astype(np.uint8) for k, v in self.images.items()}
        self.asked = []
        if cache_settings:
            self.cache_settings = cache_settings

    def image(self, case_id):
        self.asked.append(case_id)
        return self.images[case_id]

    def mask(self, case_id):
        self.asked.append(f"mask {case_id}")
        return self.masks[case_id]

    def fingerprint(self, case_id):
        return str(self.images[case_id].sum())

    def mask_fingerprint(self, case_id):
        self.asked.append(f"mask {case_id}")
        return str(self.masks[case_id].sum())


def build(source, folder, ids=None, **options):
    ids = list(source.images) if ids is None else ids
    return build_cache(source, ids, **{"image_size": 8, "masks": False, "folder": folder, **options})


def test_content_and_reuse(tmp_path):
    source, told = Memory(), []
    cache = build(source, tmp_path, masks=True, progress=lambda *a: told.append(a))
    assert cache.ids == list(source.images) and len(cache) == 5
    assert cache.images.shape == (5, 3, 8, 8) and cache.masks.shape == (5, 8, 8)
    assert cache.images[:].dtype == cache.masks[:].dtype == np.uint8
    for n, case_id in enumerate(cache.ids):
        expected = resize_levels(source.images[case_id], (8, 8)).transpose(2, 0, 1)
        np.testing.assert_array_equal(cache.images[n], expected)
        np.testing.assert_array_equal(cache.masks[n], resize_ids(source.masks[case_id], (8, 8)))
    assert told == [(5, 5)]
    assert not cache.images.view(0).flags.writeable

    source.asked.clear()
    again = build(source, tmp_path, masks=True)
    assert again.folder == cache.folder
    assert all(a.startswith("mask") for a in source.asked) and len(source.asked) == 5  # fingerprints only
    assert not list(tmp_path.glob(".building-*"))


def test_without_masks_none_is_touched(tmp_path):
    source = Memory()
    assert build(source, tmp_path).masks is None
    assert not any(a.startswith("mask") for a in source.asked)


def test_workers_map_the_same_files(tmp_path):
    cache = build(Memory(count=100), tmp_path, masks=True)
    sent = pickle.dumps(cache)
    assert len(sent) < 1000
    np.testing.assert_array_equal(pickle.loads(sent).images[:], cache.images[:])


def test_key_follows_what_matters(tmp_path):
    folders = {build(Memory(), tmp_path).folder}
    changed = Memory()
    changed.images["c2"][0, 0] ^= 1
    folders.add(build(changed, tmp_path).folder)
    folders.add(build(Memory(), tmp_path, image_size=4).folder)
    folders.add(build(Memory(), tmp_path, masks=True).folder)
    folders.add(build(Memory(), tmp_path, ids=["c1", "c0"]).folder)
    folders.add(build(Memory(), tmp_path, ids=["c0", "c1"]).folder)
    folders.add(build(Memory(cache_settings="minmax"), tmp_path).folder)
    masks = Memory()
    masks.masks["c0"][:] = 1
    folders.add(build(masks, tmp_path, masks=True).folder)
    assert len(folders) == 8
    assert build(masks, tmp_path).folder == build(Memory(), tmp_path).folder  # images only: masks do not matter


def test_default_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("KNOWSAM_CACHE", str(tmp_path / "here"))
    assert build(Memory(), None).folder.parent == tmp_path / "here"
    monkeypatch.delenv("KNOWSAM_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_folder() == tmp_path / ".cache" / "knowsam"


def test_refused_cases(tmp_path):
    with pytest.raises(DataError, match="empty"):
        build(Memory(), tmp_path, ids=[])
    source = Memory()
    source.images["c1"] = np.zeros((3, 8, 8, 3), np.uint8)
    with pytest.raises(DataError, match=r"c1.*2-D"):
        build(source, tmp_path)
    source = Memory()
    source.masks["c1"] = np.zeros((8, 8), np.uint8)
    with pytest.raises(DataError, match=r"c1: the mask is \(8, 8\), the image \(12, 16\)"):
        build(source, tmp_path, masks=True)
    assert not list(tmp_path.glob(".building-*"))


def test_full_disk(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(cache_module.os, "fsync", full)
        with pytest.raises(StorageError, match="the disk is full") as caught:
            build(Memory(), tmp_path)
        assert "KNOWSAM_CACHE" in caught.value.hint
    with monkeypatch.context() as patch:
        patch.setattr(cache_module.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10}))
        with pytest.raises(StorageError, match="GB free"):
            build(Memory(), tmp_path)
    assert not list(tmp_path.glob(".building-*"))
    assert len(build(Memory(), tmp_path)) == 5


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_full_disk_for_real(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "_start", lambda path: open("/dev/full", "wb"))  # noqa: SIM115
    with pytest.raises(StorageError, match="the disk is full"):
        build(Memory(count=200), tmp_path)


def test_unusable_folder(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot be written"):
        build(Memory(), tmp_path / "file" / "cache")


def damage(folder, how):
    (rows,) = folder.glob("shard-*.rows")
    content = bytearray(rows.read_bytes())
    if how == "flipped":
        content[70] ^= 1
    elif how == "zeroed":
        content[64:128] = bytes(64)
    else:
        del content[-7:]
    rows.write_bytes(content)


@pytest.mark.parametrize("how", ["flipped", "zeroed", "cut short"])
def test_a_damaged_row_is_found_and_decoded_again(tmp_path, how):
    source = Memory()
    whole = build(source, tmp_path, masks=True).images[:]
    damage(tmp_path, how)
    source.asked.clear()
    np.testing.assert_array_equal(build(source, tmp_path, masks=True).images[:], whole)
    assert {"c0", "mask c0"} <= set(source.asked)


def test_damage_that_comes_while_a_list_is_open_is_told_and_mended_by_the_next_start(tmp_path):
    source = Memory()
    whole = build(source, tmp_path)
    expected = whole.images[:]
    opened = DecodedCache(whole.folder)
    damage(tmp_path, "flipped")
    with pytest.raises(StorageError, match="damaged: c") as caught:
        opened.images[list(range(5))]
    assert "same command" in caught.value.hint
    np.testing.assert_array_equal(build(source, tmp_path).images[:], expected)


def test_a_list_without_its_parts_is_built_again(tmp_path):
    for name in ("list.json", "images.npy"):
        entry = build(Memory(), tmp_path).folder
        (entry / name).unlink()
        assert build(Memory(), tmp_path).ids[0] == "c0"
    for suffix in ("json", "rows"):
        for file in tmp_path.glob(f"shard-*.{suffix}"):
            file.unlink()
        assert len(build(Memory(), tmp_path).images[:]) == 5


def test_lists_share_the_rows_of_cases_that_they_have_in_common(tmp_path):
    source = Memory(count=24)
    first = build(source, tmp_path, ids=["c0", "c1", "c2"])
    source.asked.clear()
    second = build(source, tmp_path, ids=[f"c{n}" for n in range(24)])
    assert "c0" not in source.asked and "c3" in source.asked
    third = build(source, tmp_path, ids=["c7", "c1"], masks=True)
    stored = sum(len(json.loads(file.read_text())["rows"]) for file in tmp_path.glob("shard-*.json"))
    assert stored == 24 + 2, "24 images and two masks"
    np.testing.assert_array_equal(second.images[[1, 7]], third.images[[1, 0]])
    np.testing.assert_array_equal(first.images[1], third.images[1])


def test_deep_images_keep_their_bits_and_mix_with_shallow_ones(tmp_path):
    source = Memory(shape=(8, 8))
    deep = np.arange(8 * 8 * 3, dtype=np.uint16).reshape(8, 8, 3) * 300
    source.images["c1"] = deep
    cache = build(source, tmp_path)
    np.testing.assert_array_equal(cache.images[1], deep.transpose(2, 0, 1))
    both = cache.images[[0, 1]]
    assert both.dtype == np.uint16
    np.testing.assert_array_equal(both[0], cache.images[0].astype(np.uint16) * 257)


def test_volumes_keep_their_own_size(tmp_path):
    source = Memory(count=2, shape=(3, 5, 7))
    source.images["c1"] = np.zeros((4, 5, 6, 3), np.uint8)
    source.masks["c1"] = np.zeros((4, 5, 6), np.uint8)
    cache = build(source, tmp_path, image_size=None, masks=True)
    assert cache.images[0].shape == (3, 3, 5, 7) and cache.masks[1].shape == (4, 5, 6)
    np.testing.assert_array_equal(cache.images[0], np.moveaxis(source.images["c0"], -1, 0))
    source.masks["c1"] = np.zeros((4, 5, 7), np.uint8)
    with pytest.raises(DataError, match=r"\(slices, rows, columns\)"):
        build(source, tmp_path / "other", image_size=None, masks=True)


def test_letterbox_keeps_the_shape_and_marks_what_it_adds(tmp_path):
    cache = build(Memory(), tmp_path, masks=True, fit="letterbox")  # 12 x 16 -> 6 x 8 inside 8 x 8
    assert (cache.images[0][:, [0, 7]] == 0).all() and (cache.images[0][:, 1:7] > 0).any()
    assert (cache.masks[0][[0, 7]] == 255).all() and set(np.unique(cache.masks[0][1:7])) <= {0, 1}


def test_the_cache_command(tmp_path, capsys):
    build(Memory(), tmp_path, ids=["c0", "c1"])
    kept = build(Memory(), tmp_path, ids=["c3"])
    old = build(Memory(), tmp_path, ids=["c4"])
    os.utime(old.folder, (1e9, 1e9))
    command = partial(run_command, "cache")
    assert command(["show", "--folder", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "3 shards hold" in said and kept.folder.name[:8] in said
    assert command(["prune", "--folder", str(tmp_path)]) == 78
    assert command(["prune", "--unused-for", "10", "--folder", str(tmp_path)]) == 0
    assert "1 of 3 lists went" in capsys.readouterr().out
    assert len(list(tmp_path.glob("shard-*.rows"))) == 2 and not old.folder.exists()
    assert command(["verify", "--folder", str(tmp_path)]) == 0
    (tmp_path / f"{kept.shards[0]}.rows").write_bytes(b"x" * 192)
    assert command(["verify", "--folder", str(tmp_path)]) == 65
    assert command(["prune", "--all", "--folder", str(tmp_path)]) == 0
    assert not list(tmp_path.glob("*/list.json"))
    assert command(["show", "--folder", str(tmp_path / "none")]) == 66


def test_leftovers_of_dead_builders_go(tmp_path):
    key = build(Memory(), tmp_path).folder.name
    for name in (f".building-{key}-dead", ".building-0123abcd-dead"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "images.npy").touch()
    build(Memory(), tmp_path, image_size=4)
    assert not list(tmp_path.glob(".building-*"))


BUILDER = """
import sys, time
from test_data_cache import Memory, build
class Slow(Memory):
    def image(self, case_id):
        with open(sys.argv[2], "a") as log:
            log.write(case_id + "\\n")
        time.sleep(0.05)
        return super().image(case_id)
cache = build(Slow(count=8), sys.argv[1])
print(int(cache.images[:].sum()))
"""


def run_builders(tmp_path, count):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    command = [sys.executable, "-c", BUILDER, str(tmp_path / "cache"), str(tmp_path / "log")]
    return [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(count)
    ]


def test_two_processes_decode_once(tmp_path):
    answers = [process.communicate(timeout=60) for process in run_builders(tmp_path, 2)]
    assert answers[0] == answers[1] and answers[0][0].strip().isdigit(), answers
    assert sorted((tmp_path / "log").read_text().split()) == [f"c{n}" for n in range(8)]


def test_a_killed_builder_is_survived(tmp_path):
    (victim,) = run_builders(tmp_path, 1)
    deadline = time.monotonic() + 60
    while not (tmp_path / "log").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    victim.kill()
    victim.communicate()
    assert len(build(Memory(count=8), tmp_path / "cache")) == 8
    assert not list((tmp_path / "cache").glob(".building-*"))


def test_memo(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "_memo", cache_module._Memo())
    path = tmp_path / "a.png"
    path.write_bytes(b"one")
    young = file_sha256(path)
    assert not cache_module._memo.entries  # too young to trust its time stamp
    os.utime(path, (1e9, 1e9))
    assert file_sha256(path) == young and len(cache_module._memo.entries) == 1

    class Files(Memory):
        def fingerprint(self, case_id):
            return file_sha256(path)

    build(Files(), tmp_path / "cache")
    assert (tmp_path / "cache" / "fingerprints.json").is_file()
    monkeypatch.setattr(cache_module, "_memo", cache_module._Memo())  # a new process
    monkeypatch.setattr(cache_module.hashlib, "file_digest", lambda *_: pytest.fail("the file was read again"))
    build(Files(), tmp_path / "cache")
    monkeypatch.undo()
    path.write_bytes(b"other")
    assert file_sha256(path) != young
    path.unlink()
    with pytest.raises(NotFoundError, match=r"a\.png"):
        file_sha256(path)


def test_a_broken_memo_costs_nothing(tmp_path):
    (tmp_path / "fingerprints.json").write_text("{broken")
    assert len(build(Memory(), tmp_path)) == 5
