"""SAM's published checkpoints: where they come from, what they must be, and fetching them whole or not at all."""

import errno
import fcntl
import hashlib
import http.client
import os
import shutil
import socket
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import knowsam
from knowsam import components
from knowsam.errors import CheckpointError, ConfigError, KnowsamError, NetworkError, NotFoundError, StorageError
from knowsam.files import storage_error, sync_folder
from knowsam.text import did_you_mean


@dataclass(frozen=True)
class Pretrained:
    """One published checkpoint.

    Attributes:
        name: for the command line.
        variant: the ``sam.encoder.name`` that it fits.
        file: its name, here as at its source.
        url: where its authors publish it.
        size: bytes.
        sha256: of the whole file, 64 hexadecimal digits.
        licence: of the weights.
        project: whose they are.
    """

    name: str
    variant: str
    file: str
    url: str
    size: int
    sha256: str
    licence: str
    project: str

    @property
    def loadable(self) -> bool:
        """Whether this version of knowsam has the networks for it."""
        return self.variant in components.SAM_ENCODERS


_SAM = "https://dl.fbaipublicfiles.com/segment_anything/"
_SAM_PROJECT = "segment-anything, Kirillov et al., ICCV 2023"

# The six digits in SAM's file names begin the files' MD5. Sizes and SHA-256 are those that many projects which fetched
# the files from these addresses publish; all of them agree.
WEIGHTS = {
    entry.name: entry
    for entry in (
        Pretrained(
            "vit_b",
            "vit_b",
            "sam_vit_b_01ec64.pth",
            f"{_SAM}sam_vit_b_01ec64.pth",
            375_042_383,
            "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912",
            "Apache-2.0",
            _SAM_PROJECT,
        ),
        Pretrained(
            "vit_l",
            "vit_l",
            "sam_vit_l_0b3195.pth",
            f"{_SAM}sam_vit_l_0b3195.pth",
            1_249_524_607,
            "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622",
            "Apache-2.0",
            _SAM_PROJECT,
        ),
        Pretrained(
            "vit_h",
            "vit_h",
            "sam_vit_h_4b8939.pth",
            f"{_SAM}sam_vit_h_4b8939.pth",
            2_564_550_879,
            "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e",
            "Apache-2.0",
            _SAM_PROJECT,
        ),
        Pretrained(
            "mobile_sam",
            "vit_t",
            "mobile_sam.pt",
            "https://github.com/ChaoningZhang/MobileSAM/raw/master/weights/mobile_sam.pt",
            40_728_226,
            "6dbb90523a35330fedd7f1d3dfc66f995213d81b29a5ca8108dbcdd4e37d6c2f",
            "Apache-2.0",
            "MobileSAM, Zhang et al., arXiv:2306.14289",
        ),
    )
}

TRIES = 5
"""Connections in a row that may bring nothing before ``fetch`` gives up."""

_BLOCK = 1 << 20


def where_to_get() -> str:
    """One sentence on getting SAM's official files."""
    files = ", ".join(entry.file for entry in WEIGHTS.values() if entry.loadable)
    return f"The official files are {files}: `knowsam weights fetch vit_b` gets the first, `weights list` tells more."


def by_hand(entry: Pretrained, folder: Path) -> str:
    """How to put a file into its place without this program's help."""
    return (
        f"Where there is a network, fetch {entry.url} ({megabytes(entry.size)}), put it into {folder} as {entry.file}, "
        f"and check it with: knowsam weights verify {entry.name}"
    )


def megabytes(count: int) -> str:
    """``375.0 MB``."""
    return f"{count / 1e6:,.1f} MB"


def file_sha256(path: Path, progress: Callable[[int, int], None] | None = None) -> str:
    """SHA-256 of a file, hexadecimal; ``progress`` is called with (bytes done, bytes in all)."""
    digest, done, total = hashlib.sha256(), 0, path.stat().st_size
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            done += len(block)
            if progress is not None:
                progress(done, total)
    return digest.hexdigest()


def verify(path: Path, entry: Pretrained, progress: Callable[[int, int], None] | None = None) -> None:
    """Make sure that a file is the published one, byte for byte.

    Raises:
        NotFoundError: there is none.
        CheckpointError: another size or content.
    """
    if not path.is_file():
        raise NotFoundError(f"{path} is not there", hint=by_hand(entry, path.parent))
    size = path.stat().st_size
    if size != entry.size:
        cut = "it is cut off" if size < entry.size else "it is another file"
        raise CheckpointError(
            f"{path} has {size:,} bytes, {entry.file} has {entry.size:,}: {cut}",
            hint="Move it away, then: knowsam weights fetch " + entry.name,
        )
    found = file_sha256(path, progress)
    if found != entry.sha256:
        raise CheckpointError(
            f"{path} has SHA-256 {found}, {entry.file} has {entry.sha256}: damaged, or another file",
            hint="Move it away, then: knowsam weights fetch " + entry.name,
        )


def fetch(
    entry: Pretrained,
    folder: Path,
    *,
    url: str | None = None,
    progress: Callable[[int, int], None] | None = None,
    timeout: float = 30.0,
    pause: float = 2.0,
) -> bool:
    """Bring a file into a folder, whole and verified or not at all.

    What has come is kept in ``<file>.part`` when the connection breaks off or the program ends, and the next call goes
    on from there. A file that is in place already is verified and never replaced.

    Args:
        entry: which.
        folder: made if need be.
        url: another address that offers the same file, such as a mirror.
        progress: called with (bytes done, bytes in all).
        timeout: seconds without a byte after which a connection counts as broken.
        pause: seconds before a second try; doubled with each further one.
    Returns:
        False when the good file was there already.
    Raises:
        ConfigError: the address is not http or https.
        CheckpointError: the file in place, or what the server gives, is not the published one.
        NetworkError: not reachable; NotFoundError: the server has no such file.
        StorageError: no room, no right to write, or another process is fetching it.
    """
    url = url or entry.url
    if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
        raise ConfigError(f"the address must begin with http:// or https://, got {url!r}")
    target, part = folder / entry.file, folder / f"{entry.file}.part"
    if target.exists():
        verify(target, entry)
        return False
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(part) as file:
            if target.exists():  # another process has finished it meanwhile
                verify(target, entry)
                return False
            _require_room(folder, entry.size - file.seek(0, os.SEEK_END))
            _download(file, url, entry, folder, progress, timeout, pause)
            file.flush()
            os.fsync(file.fileno())
            found = file_sha256(part)
            if found != entry.sha256:
                part.unlink()
                raise CheckpointError(
                    f"what {url} gave has SHA-256 {found}, not {entry.sha256}; it was thrown away",
                    hint="Try once more; if it happens again, something between here and there changes the file.",
                )
            os.replace(part, target)
            sync_folder(folder)
    except OSError as error:
        raise storage_error(target, error, entry.size) from error
    return True


@contextmanager
def _alone(part: Path) -> Iterator[BinaryIO]:
    """The unfinished file, open to read and write, for this process alone."""
    with part.open("ab+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            raise StorageError(
                f"another process is fetching {part.name.removesuffix('.part')} into {part.parent}",
                hint="Wait for it to end.",
            ) from None
        try:
            yield file
        finally:
            file.flush()
            # Renamed or thrown away by now; else it stays for the next call, unless nothing came.
            if part.exists() and part.stat().st_size == 0:
                part.unlink()


def _require_room(folder: Path, need: int) -> None:
    free = shutil.disk_usage(folder).free
    if need > free:
        raise StorageError(
            f"{folder} has room for {megabytes(free)}, {megabytes(need)} more are needed",
            hint="Free some space, or choose a folder on another disk with --to.",
        )


def _download(
    file: BinaryIO,
    url: str,
    entry: Pretrained,
    folder: Path,
    progress: Callable[[int, int], None] | None,
    timeout: float,
    pause: float,
) -> None:
    """Append what is missing, over as many connections as it takes."""
    failures = 0
    while (have := file.seek(0, os.SEEK_END)) != entry.size:
        if have > entry.size:
            file.truncate(0)
            continue
        try:
            _one_connection(file, url, entry, have, progress, timeout)
            reason = "the connection ended early"
        except urllib.error.HTTPError as error:
            if error.code == 416:  # the server has fewer bytes than we: not the same file
                file.truncate(0)
            elif error.code < 500 and error.code not in (408, 429):
                raise NotFoundError(
                    f"{url}: the server answers {error.code} {error.reason}", hint=by_hand(entry, folder)
                ) from error
            reason = f"the server answers {error.code} {error.reason}"
        except (OSError, http.client.HTTPException) as error:  # names, routes, sockets, certificates, time-outs
            cause = getattr(error, "reason", "") or error
            reason = str(cause) or type(error).__name__
            if isinstance(cause, socket.gaierror):
                failures = TRIES  # no such name, or no network at all: waiting some seconds mends neither
        now = file.seek(0, os.SEEK_END)
        failures = 0 if now > have else failures + 1
        if failures >= TRIES:
            kept = f"; {megabytes(now)} are kept, the same command goes on from there" if now else ""
            raise NetworkError(f"{url} cannot be fetched: {reason}{kept}", hint=by_hand(entry, folder))
        if now != entry.size:
            time.sleep(pause * 2 ** max(failures - 1, 0))


def _one_connection(
    file: BinaryIO,
    url: str,
    entry: Pretrained,
    have: int,
    progress: Callable[[int, int], None] | None,
    timeout: float,
) -> None:
    headers = {"User-Agent": f"knowsam/{knowsam.__version__}", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=timeout) as answer:
        length = answer.headers.get("Content-Length")
        if answer.status == 206:
            start, total = _content_range(answer.headers.get("Content-Range", ""))
            if start != have:
                raise http.client.HTTPException(f"asked for the bytes from {have} on, got those from {start} on")
        else:  # a server that knows no ranges gives the whole file
            start, total = 0, int(length) if length and length.isdecimal() else None
        kind = answer.headers.get_content_type()
        if kind == "text/html" or (total is not None and total != entry.size):
            offer = f"{total:,} bytes" if total is not None else "something"
            raise CheckpointError(
                f"{url} offers {offer} of type {kind}, {entry.file} has {entry.size:,} bytes: not the same file",
                hint="A page that asks to log in, a proxy, or a file that moved? Open the address in a browser.",
            )
        if start == 0 and have:
            file.truncate(0)
        while block := answer.read(_BLOCK):
            start += len(block)
            if start > entry.size:
                raise CheckpointError(f"{url} gives more than the {entry.size:,} bytes of {entry.file}")
            try:
                file.write(block)
                file.flush()
            except OSError as error:  # told apart from the network's here, where it is known
                raise storage_error(Path(file.name), error, entry.size) from error
            if progress is not None:
                progress(start, entry.size)


def _content_range(text: str) -> tuple[int, int | None]:
    """``bytes 5-9/10`` -> 5, 10."""
    try:
        span, _, total = text.removeprefix("bytes ").partition("/")
        return int(span.partition("-")[0]), int(total) if total.isdecimal() else None
    except ValueError as error:
        raise http.client.HTTPException(f"the server's Content-Range makes no sense: {text!r}") from error


def find(entry: Pretrained, places: list[Path]) -> Path | None:
    """The first of these folders' files that has the entry's name."""
    return next((place / entry.file for place in places if (place / entry.file).is_file()), None)


def named(name: str) -> Pretrained:
    """The entry of that name.

    Raises:
        NotFoundError: there is none.
    """
    if name not in WEIGHTS:
        near = did_you_mean(name, WEIGHTS)
        raise NotFoundError(f"no weights are called {name!r}{near}; there are {', '.join(WEIGHTS)}")
    return WEIGHTS[name]


def require_loadable(entry: Pretrained) -> None:
    """Refuse to fetch what could not be used.

    Raises:
        KnowsamError: this version has no networks for it.
    """
    if not entry.loadable:
        raise KnowsamError(
            f"{entry.name} cannot be loaded yet: knowsam has no encoder {entry.variant!r} (MobileSAM's is a TinyViT)",
            hint=f"Known encoders are {', '.join(components.SAM_ENCODERS)}; see knowsam weights list.",
        )
