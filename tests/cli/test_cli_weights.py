"""Weights come whole or not at all: a server that breaks off, lies, is away; files that are in place are kept."""

import hashlib
import http.server
import json
import os
import re
import threading
from dataclasses import replace

import pytest

from knowsam import components, pretrained
from knowsam.cli.main import run_command
from knowsam.errors import CheckpointError, ConfigError, NetworkError, NotFoundError, StorageError
from knowsam.pretrained import WEIGHTS, Pretrained, fetch, verify

CONTENT = bytes(range(256)) * 1000
ENTRY = Pretrained(
    "toy",
    "vit_b",
    "toy.pth",
    "",
    len(CONTENT),
    hashlib.sha256(CONTENT).hexdigest(),
    "Apache-2.0",
    "a toy",
)


class Server(http.server.ThreadingHTTPServer):
    """Serves ``content`` on this machine; what goes wrong is set by the test.

    Attributes:
        break_after: bytes after which each of the next connections ends, one number a connection; then none breaks.
        ranges: whether the server knows Range.
        status: answer with this instead.
        seen: the Range of every request.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.break_after, self.ranges, self.status, self.kind = CONTENT, [], True, 200, "app/octet-stream"
        self.send_length = True
        self.seen = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/toy.pth"

    def handle_error(self, request, client_address):
        pass


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server, wanted = self.server, self.headers.get("Range")
        server.seen.append(wanted)
        if server.status != 200:
            self.send_error(server.status)
            return
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and server.ranges else 0
        if start >= len(server.content):
            self.send_error(416)
            return
        self.send_response(206 if wanted and server.ranges else 200)
        if wanted and server.ranges:
            self.send_header("Content-Range", f"bytes {start}-{len(server.content) - 1}/{len(server.content)}")
        self.send_header("Content-Type", server.kind)
        if server.send_length:
            self.send_header("Content-Length", str(len(server.content) - start))
        self.end_headers()
        end = start + server.break_after.pop(0) if server.break_after else len(server.content)
        self.wfile.write(server.content[start:end])

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def get(server, folder, **options):
    return fetch(ENTRY, folder, **{"url": server.url, "pause": 0.0, "timeout": 5.0, **options})


def names(folder):
    return sorted(os.listdir(folder))


def test_a_file_comes_whole_and_is_not_fetched_twice(server, tmp_path):
    seen = []
    assert get(server, tmp_path / "new" / "folder", progress=lambda done, total: seen.append((done, total)))
    assert (tmp_path / "new" / "folder" / "toy.pth").read_bytes() == CONTENT
    assert names(tmp_path / "new" / "folder") == ["toy.pth"]
    assert seen[-1] == (len(CONTENT), len(CONTENT))
    assert get(server, tmp_path / "new" / "folder") is False
    assert server.seen == [None]


def test_a_broken_connection_is_taken_up_where_it_ended(server, tmp_path):
    server.break_after = [100_000, 50_000]
    assert get(server, tmp_path)
    assert server.seen == [None, "bytes=100000-", "bytes=150000-"]
    assert (tmp_path / "toy.pth").read_bytes() == CONTENT and names(tmp_path) == ["toy.pth"]


def test_what_has_come_is_kept_for_the_next_call(server, tmp_path):
    server.break_after = [1000] + [0] * pretrained.TRIES
    with pytest.raises(NetworkError, match=r"0\.0 MB are kept"):
        get(server, tmp_path)
    assert names(tmp_path) == ["toy.pth.part"]
    assert get(server, tmp_path)
    assert server.seen[-1] == "bytes=1000-"
    assert (tmp_path / "toy.pth").read_bytes() == CONTENT


def test_a_server_without_ranges_starts_again(server, tmp_path):
    server.ranges, server.break_after = False, [100_000]
    assert get(server, tmp_path)
    assert (tmp_path / "toy.pth").read_bytes() == CONTENT


@pytest.mark.parametrize("left", [b"z" * 5000, b"z" * (len(CONTENT) + 5), b"z" * len(CONTENT)])
def test_a_wrong_rest_of_an_earlier_call_never_becomes_the_file(server, tmp_path, left):
    """It is thrown away once it is known to be wrong, and the next call gets the file."""
    (tmp_path / "toy.pth.part").write_bytes(left)
    if len(left) <= len(CONTENT):
        with pytest.raises(CheckpointError, match="thrown away"):
            get(server, tmp_path)
        assert names(tmp_path) == []
    assert get(server, tmp_path)
    assert (tmp_path / "toy.pth").read_bytes() == CONTENT


def test_other_content_of_the_same_size_is_refused(server, tmp_path):
    server.content = CONTENT[::-1]
    with pytest.raises(CheckpointError, match="SHA-256"):
        get(server, tmp_path)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"content": CONTENT[:-1]}, "offers 255,999 bytes"),
        ({"content": b"<html>log in</html>", "kind": "text/html"}, "type text/html"),
        ({"content": b"<html>log in</html>", "kind": "text/html", "send_length": False}, "type text/html"),
        ({"content": CONTENT + b"more", "send_length": False}, "more than the 256,000 bytes"),
    ],
)
def test_another_file_is_refused_before_it_fills_the_disk(server, tmp_path, change, says):
    vars(server).update(change)
    with pytest.raises(CheckpointError, match=says):
        get(server, tmp_path)
    assert "toy.pth" not in names(tmp_path)


def test_a_file_in_place_is_never_overwritten(server, tmp_path):
    (tmp_path / "toy.pth").write_bytes(b"my own weights")
    with pytest.raises(CheckpointError, match="14 bytes"):
        get(server, tmp_path)
    assert (tmp_path / "toy.pth").read_bytes() == b"my own weights" and server.seen == []


def test_absent_at_the_server(server, tmp_path):
    server.status = 404
    with pytest.raises(NotFoundError, match="404") as caught:
        get(server, tmp_path)
    assert str(tmp_path) in caught.value.hint and len(server.seen) == 1
    assert names(tmp_path) == []


def test_a_server_in_trouble_is_asked_again_then_given_up(server, tmp_path):
    server.status = 503
    with pytest.raises(NetworkError, match="503"):
        get(server, tmp_path)
    assert len(server.seen) == pretrained.TRIES


def test_offline_says_how_to_place_the_file_by_hand(tmp_path):
    with pytest.raises(NetworkError) as caught:
        fetch(ENTRY, tmp_path, url="http://127.0.0.1:9/toy.pth", pause=0.0)
    assert f"put it into {tmp_path} as toy.pth" in caught.value.hint and "weights verify toy" in caught.value.hint
    assert names(tmp_path) == []


def test_a_name_that_is_not_known_is_given_up_at_once(tmp_path, monkeypatch):
    asked = []

    def nowhere(*_, **__):
        asked.append(1)
        raise pretrained.urllib.error.URLError(pretrained.socket.gaierror(-2, "Name or service not known"))

    monkeypatch.setattr(pretrained.urllib.request, "urlopen", nowhere)
    with pytest.raises(NetworkError, match="Name or service not known"):
        fetch(ENTRY, tmp_path, url="http://nowhere.invalid/toy.pth", pause=100.0)
    assert len(asked) == 1


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://127.0.0.1/x", "toy.pth"])
def test_only_http(tmp_path, url):
    with pytest.raises(ConfigError, match="http"):
        fetch(ENTRY, tmp_path, url=url)


def test_no_room_is_said_before_a_byte_is_fetched(server, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained.shutil, "disk_usage", lambda _: type("U", (), {"free": 1000})())
    with pytest.raises(StorageError, match=r"room for 0\.0 MB, 0\.3 MB more"):
        get(server, tmp_path)
    assert server.seen == [] and names(tmp_path) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_disk_that_fills_up_is_a_storage_error(server, tmp_path):
    (tmp_path / "toy.pth.part").symlink_to("/dev/full")
    with pytest.raises(StorageError, match="No space left"):
        get(server, tmp_path)
    assert "toy.pth" not in names(tmp_path)


def test_two_processes_do_not_write_one_file(server, tmp_path):
    with pretrained._alone(tmp_path / "toy.pth.part"), pytest.raises(StorageError, match="another process"):
        get(server, tmp_path)
    assert get(server, tmp_path)


@pytest.mark.skipif(os.getuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written(server, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(StorageError):
        get(server, tmp_path)


def test_verify_tells_cut_off_from_damaged(tmp_path):
    path = tmp_path / "toy.pth"
    with pytest.raises(NotFoundError):
        verify(path, ENTRY)
    path.write_bytes(CONTENT[:100])
    with pytest.raises(CheckpointError, match="cut off"):
        verify(path, ENTRY)
    path.write_bytes(CONTENT[:-1] + b"?")
    with pytest.raises(CheckpointError, match="damaged"):
        verify(path, ENTRY)
    path.write_bytes(CONTENT)
    verify(path, ENTRY)


# ---------------------------------------------------------------- the list and the command


def test_the_list_is_plausible_and_says_what_can_be_loaded():
    for name, entry in WEIGHTS.items():
        assert entry.name == name and entry.url.startswith("https://") and entry.url.endswith(entry.file)
        assert len(entry.sha256) == 64 and int(entry.sha256, 16) and entry.size > 10**7
        assert entry.loadable == (entry.variant in components.SAM_ENCODERS)
    assert len({entry.sha256 for entry in WEIGHTS.values()}) == len(WEIGHTS)
    assert all(WEIGHTS[name].loadable for name in ("vit_b", "vit_l", "vit_h"))


def test_what_the_loader_and_the_shipped_experiments_name_is_in_the_list():
    from pathlib import Path

    from knowsam.models.sam.weights import WIDTHS

    assert set(WIDTHS) <= set(WEIGHTS)
    experiments = Path(__file__).resolve().parents[2] / "experiments"
    named = [line for file in experiments.rglob("*.yaml") for line in file.read_text().splitlines() if ".pth" in line]
    files = {entry.file for entry in WEIGHTS.values()}
    assert named and all(any(f"weights/{file}" in line for file in files) for line in named)


@pytest.fixture
def toy(server, tmp_path, monkeypatch):
    """``toy`` in the list, and KNOWSAM_DATA in a folder of the test's own."""
    monkeypatch.setitem(WEIGHTS, "toy", replace(ENTRY, url=server.url))
    monkeypatch.setenv("KNOWSAM_DATA", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "data" / "weights" / "toy.pth"


def test_fetch_puts_the_file_where_experiments_look(toy, capsys):
    assert run_command("weights", ["fetch", "toy"]) == 0
    assert toy.read_bytes() == CONTENT
    assert "is complete, its SHA-256 is right" in capsys.readouterr().out
    assert run_command("weights", ["fetch", "toy"]) == 0
    assert "here already" in capsys.readouterr().out

    from knowsam.build import build_sam_guide
    from knowsam.config import load_text

    experiment = load_text({"sam": {"encoder": {"name": "vit_tiny"}, "weights": "weights/toy.pth"}})
    with pytest.raises(CheckpointError, match=re.escape(str(toy))):  # found, and no checkpoint of SAM
        build_sam_guide(experiment)
    toy.unlink()
    with pytest.raises(NotFoundError, match=re.escape(str(toy))) as caught:
        build_sam_guide(experiment)
    assert "knowsam weights fetch vit_b" in caught.value.hint and "sam.weights=null" in caught.value.hint


def test_fetch_elsewhere_says_what_to_set(toy, tmp_path, capsys):
    assert run_command("weights", ["fetch", "toy", "--to", str(tmp_path / "else")]) == 0
    assert f"set sam.weights={tmp_path / 'else' / 'toy.pth'}" in capsys.readouterr().out


def test_list_shows_what_is_here(toy, capsys):
    assert run_command("weights", ["list"]) == 0
    said = capsys.readouterr().out
    assert "not loadable yet" in said and all(entry.sha256 in said for entry in WEIGHTS.values())
    toy.parent.mkdir(parents=True)
    toy.write_bytes(b"short")
    assert run_command("weights", ["list"]) == 0
    assert "(wrong size)" in capsys.readouterr().out
    assert run_command("weights", ["list", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["toy"]["path"] == str(toy) and rows["vit_b"]["loadable"]


def test_verify_by_name_by_file_and_all(toy, tmp_path, capsys):
    assert run_command("weights", ["verify"]) == 66
    toy.parent.mkdir(parents=True)
    toy.write_bytes(CONTENT)
    (tmp_path / "toy.pth").write_bytes(b"short")
    assert run_command("weights", ["verify"]) == 0
    assert run_command("weights", ["verify", "toy"]) == 0
    capsys.readouterr()
    assert run_command("weights", ["verify", "toy", "./toy.pth"]) == 80
    good, wrong, hint = capsys.readouterr().out.splitlines()
    assert good == f"good    {toy} (toy)" and wrong.startswith("wrong   toy.pth has 5 bytes") and "fetch toy" in hint
    assert run_command("weights", ["verify", "vit_b"]) == 66
    assert run_command("weights", ["verify", "other.pth"]) == 65


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["fetch"], 78, "fetch takes names"),
        (["fetch", "vit_bb"], 66, "did you mean 'vit_b'?"),
        (["fetch", "mobile_sam"], 1, "cannot be loaded yet"),
        (["list", "toy"], 78, "takes no names"),
        (["list", "--to", "x"], 78, "--to goes with fetch"),
        (["verify", "--url", "x"], 78, "--url goes with fetch"),
        (["fetch", "vit_b", "vit_l", "--url", "x"], 78, "--url takes one name"),
        (["fetch", "toy", "--url", "x"], 78, "http"),
        (["grab"], 2, "invalid choice"),
    ],
)
def test_wrong_usage(toy, capsys, words, code, says):
    assert run_command("weights", words) == code
    assert says in capsys.readouterr().err
