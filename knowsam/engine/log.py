"""What the engine says and records: console lines, a progress line, ``metrics.jsonl`` and TensorBoard."""

import json
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from knowsam.engine.distributed import is_main
from knowsam.files import write_atomically
from knowsam.text import duration

_BUFFERED_LINES = 10_000

WIDTH = 80
"""Columns of a log or a pipe, and of a terminal that does not say."""

WARNINGS = "warnings.jsonl"
"""In a run's folder: the warnings that stood on the console of its training, for whoever reads its scores."""

_kept: list[Path] = []  # where warnings go beside the console, the innermost last


def say(message: str) -> None:
    """Print a line on rank 0. A console that is gone or cannot show a character never stops a training."""
    if is_main():
        _print(message, sys.stdout)


def warn(message: str, *, every_rank: bool = False) -> None:
    """Print ``warning: ...`` on stderr; on rank 0 only unless ``every_rank``.

    Args:
        message: for people, one or several lines.
        every_rank: print it on every rank.
    """
    if every_rank or is_main():
        _print(f"warning: {message}", sys.stderr)
    if is_main() and _kept and message not in read_warnings(_kept[-1].parent):
        # Information only: the disk's troubles are told by what must be written.
        with suppress(OSError), open(_kept[-1], "a", encoding="utf-8") as file:
            file.write(json.dumps({"text": message}) + "\n")


@contextmanager
def kept_warnings(folder: str | os.PathLike[str]) -> Iterator[None]:
    """While it lasts, ``warn`` also writes into ``WARNINGS`` of a run's folder, each text once."""
    _kept.append(Path(folder) / WARNINGS)
    try:
        yield
    finally:
        _kept.pop()


def read_warnings(folder: str | os.PathLike[str]) -> list[str]:
    """The texts that ``kept_warnings`` left in a run's folder; lines that are not whole are left out."""
    try:
        lines = (Path(folder) / WARNINGS).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    texts = []
    for line in lines:
        with suppress(ValueError, TypeError, LookupError):
            texts.append(str(json.loads(line)["text"]))
    return texts


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The records of a ``metrics.jsonl``; lines that are not whole (a killed writer's last one) are left out."""
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        return []
    return [record for record, _ in _records(data)]


class MetricsLog:
    """Appends one JSON object a line to ``metrics.jsonl``, and the same numbers to TensorBoard. Silent on other ranks.

    No write problem stops a training: lines that cannot be written wait in memory (the newest 10,000) for the disk to
    recover, TensorBoard is switched off; one warning each.

    Args:
        folder: the run folder; exists.
        tensorboard: also write TensorBoard events under ``tensorboard/``.
    """

    def __init__(self, folder: str | os.PathLike[str], *, tensorboard: bool = True):
        self.path = Path(folder) / "metrics.jsonl"
        self._events = Path(folder) / "tensorboard"
        self._tensorboard = tensorboard
        self._purge_step: int | None = None
        self._writer: Any = None
        self._file: Any = None
        self._pending: deque[bytes] = deque(maxlen=_BUFFERED_LINES)
        self._warned = False

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def truncate_after(self, step: int) -> None:
        """Forget what was recorded after the checkpoint of ``step``; call on resume, before the first ``write``.

        Lines of a later step and torn lines go; TensorBoard hides its later events (``purge_step``).

        Raises:
            StorageError: the file cannot be rewritten; it is then untouched.
        """
        if not is_main():
            return
        self._close_file()
        if self.path.exists():
            kept = b"".join(line for record, line in _records(self.path.read_bytes()) if record["step"] <= step)
            write_atomically(self.path, lambda file: file.write(kept), need=len(kept))
        self._purge_step = step + 1

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Record ``{"step": step, "kind": kind, **values}``.

        Args:
            kind: ``train`` or ``val``; also the first part of TensorBoard's tag, ``train/loss``.
            step: optimizer updates done.
            values: plain numbers; NaN and infinity become null in the JSON.
        """
        if not is_main():
            return
        assert not {"step", "kind"} & set(values), "names taken by the record itself"
        self._record({"step": step, "kind": kind, **{name: json_number(value) for name, value in values.items()}})
        if self._tensorboard:
            self._guard(lambda: self._write_events(kind, step, values))

    def warning(self, step: int, name: str, text: str) -> None:
        """Record ``{"step": step, "kind": "warning", "name": name, "text": text}``, in TensorBoard as a text.

        Args:
            step: optimizer updates done.
            name: a short one, which sets this warning apart from others.
            text: for people.
        """
        if not is_main():
            return
        self._record({"step": step, "kind": "warning", "name": name, "text": text})
        if self._tensorboard:
            self._guard(lambda: self._events_writer().add_text(f"warnings/{name}", text, step))

    def picture(self, tag: str, step: int, pixels: Any) -> None:
        """Show an image in TensorBoard alone: uint8 array (H, W, 3)."""
        if is_main() and self._tensorboard:
            self._guard(lambda: self._events_writer().add_image(tag, pixels, step, dataformats="HWC"))

    def flush(self) -> None:
        """Sync everything to the disk; call before a checkpoint is saved, which must not be newer than its metrics."""
        self._write_pending()
        if self._file is not None:
            with suppress(OSError):
                os.fsync(self._file.fileno())
        if self._writer is not None:
            self._guard(self._writer.flush)

    def close(self) -> None:
        """Flush and close; writing again reopens."""
        self.flush()
        self._close_file()
        if self._writer is not None:
            self._guard(self._writer.close)
        self._writer = None

    def _record(self, record: Mapping[str, Any]) -> None:
        self._pending.append(json.dumps(record, allow_nan=False).encode() + b"\n")
        self._write_pending()

    def _write_pending(self) -> None:
        if not self._pending:
            return
        try:
            if self._file is None:
                self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 - stays open between calls
                _end_last_line(self.path)
            end = os.fstat(self._file.fileno()).st_size
            try:
                while self._pending:
                    if self._file.write(self._pending[0]) != len(self._pending[0]):
                        raise OSError("disk full")
                    self._pending.popleft()
                    end = os.fstat(self._file.fileno()).st_size
            except OSError:
                with suppress(OSError):
                    self._file.truncate(end)  # no half line for the retry to append to
                raise
        except OSError as error:
            if not self._warned:
                warn(f"cannot write {self.path}: {error.strerror or error}; metrics wait in memory, training goes on")
            self._warned = True

    def _write_events(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        writer = self._events_writer()
        for name, value in values.items():
            writer.add_scalar(f"{kind}/{name}", value, step)

    def _events_writer(self) -> Any:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter  # about a second, so only when needed

            self._writer = SummaryWriter(str(self._events), purge_step=self._purge_step, flush_secs=30)
            self._purge_step = None
        return self._writer

    def _guard(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except (OSError, ImportError) as error:
            self._tensorboard, self._writer = False, None
            warn(f"TensorBoard is off from here: {error}; metrics.jsonl goes on")

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = None


class Counter:
    """Progress of work on cases, such as decoding or scoring: call it with (done, total). Silent when it is quick.

    A live line on a terminal; elsewhere a plain line at every quarter, once the work has taken some seconds.

    Args:
        title: what is being done.
        file: stdout if None.
        clock: monotonic seconds.
    """

    quiet_seconds = 3.0

    def __init__(self, title: str, *, file: TextIO | None = None, clock: Callable[[], float] = time.monotonic):
        self.title = title
        self._file = file or sys.stdout
        self._clock = clock
        self._began = clock()
        self._quarter = 0
        self._live = False

    def __enter__(self) -> "Counter":
        self._began = self._clock()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live:
            _print("", self._file)

    def __call__(self, done: int, total: int) -> None:
        elapsed = self._clock() - self._began
        if not is_main() or elapsed < self.quiet_seconds:
            return
        left = duration(elapsed / max(done, 1) * (total - done))
        text = f"{self.title}: {done}/{total}, {left} left"
        if self._file.isatty():
            self._live = True
            self._file.write(f"\r{text}   ")
            self._file.flush()
        elif (quarter := 4 * done // max(total, 1)) > self._quarter:
            self._quarter = quarter
            _print(text, self._file)


class Progress:
    """Progress of a training: steps, loss terms, images per second, time left.

    A live line on a terminal; elsewhere a plain line every ``log_every`` steps, without control characters. A line has
    at most ``WIDTH`` columns, or those of the terminal: loss terms for which there is no room are counted (``+3``);
    ``metrics.jsonl`` has all of them. Speaks on rank 0 only. Use as a context manager.

    Args:
        max_steps: where training ends.
        start_step: updates already done when it begins (resume).
        log_every: steps between plain lines.
        file: stdout if None.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        max_steps: int,
        *,
        start_step: int = 0,
        log_every: int = 20,
        file: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.max_steps = max_steps
        self.step = start_step
        self.log_every = log_every
        self._file = file
        self._clock = clock
        self._last = clock()
        self._said = start_step
        self._terms: list[str] = []
        # The newest updates only: the first ones (warm-up, compilation) are soon forgotten.
        self._recent: deque[tuple[float, int, int]] = deque(maxlen=100)
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> "Progress":
        self._last = self._clock()
        file = self._file or sys.stdout
        if is_main() and file.isatty() and os.environ.get("TERM") != "dumb":
            self._bar, self._task = _live_bar(file, self.max_steps, self.step)
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._bar = None

    def update(self, step: int, terms: Mapping[str, float] | None = None, *, images: int = 0) -> None:
        """Report finished updates.

        Args:
            step: updates done in all.
            terms: losses by name, plain numbers; the line keeps the last ones given.
            images: images used since the last call, over all ranks.
        """
        now = self._clock()
        if step > self.step:
            self._recent.append((max(now - self._last, 0.0), step - self.step, images))
        crossed = step // self.log_every > self._said // self.log_every or (step >= self.max_steps > self._said)
        self.step, self._last = step, now
        if terms is not None:
            self._terms = [f"{name} {value:.4g}" for name, value in terms.items()]
        if self._bar is not None:
            # Before it stand the steps, the bar of 20 columns, and a column on each side of that.
            before = 2 * len(str(self.max_steps)) + 1 + 20 + 2
            self._bar.update(self._task, completed=step, text=self._text(self._bar.console.width - before))
        elif crossed:
            self._said = step
            begin = f"step {step:>{len(str(self.max_steps))}}/{self.max_steps}  "
            self.print_line(begin + self._text(WIDTH - len(begin)))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave what happens inside (validation, saving) out of images per second and time left."""
        before = self._clock()
        try:
            yield
        finally:
            self._last += self._clock() - before

    def print_line(self, message: str) -> None:
        """Print a line, above the live line if there is one."""
        if not is_main():
            return
        if self._bar is not None:
            self._bar.console.print(message, markup=False, highlight=False, soft_wrap=True)
        else:
            _print(message, self._file or sys.stdout)

    @property
    def seconds_left(self) -> float:
        """Expected seconds until ``max_steps``, validation not counted; NaN while nothing is known."""
        steps = sum(item[1] for item in self._recent)
        return sum(item[0] for item in self._recent) / steps * (self.max_steps - self.step) if steps else math.nan

    @property
    def images_per_second(self) -> float:
        """Over the newest updates; NaN while nothing is known."""
        seconds = sum(item[0] for item in self._recent)
        return sum(item[2] for item in self._recent) / seconds if seconds > 0 else math.nan

    def _text(self, width: int) -> str:
        """Terms in their order as far as there is room, how many more there are, speed, time left."""
        speed = self.images_per_second
        end = [f"{speed:.1f} images/s"] if speed > 0 else []
        end += [f"eta {duration(self.seconds_left)}"]
        for shown in range(len(self._terms), -1, -1):
            more = len(self._terms) - shown
            text = "  ".join([*self._terms[:shown], *([f"+{more}"] if more else []), *end])
            if len(text) <= width:
                break
        return text


def _live_bar(file: TextIO, max_steps: int, step: int) -> tuple[Any, Any]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Bar
    from rich.table import Column

    text = TextColumn("{task.fields[text]}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis"))
    bar = Bar(MofNCompleteColumn(), BarColumn(bar_width=20), text, console=Console(file=file), refresh_per_second=4)
    return bar, bar.add_task("", total=max_steps, completed=step, text="")


def _records(data: bytes) -> Iterator[tuple[dict[str, Any], bytes]]:
    for line in data.splitlines(keepends=True):
        if not line.endswith(b"\n"):
            continue  # torn: even if it parses, a number may have lost digits
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            yield record, line


def _end_last_line(path: Path) -> None:
    """Cut what a killed writer left behind the last newline, so that the next line starts a line."""
    with open(path, "rb+") as file:
        data = file.read()
        if data and not data.endswith(b"\n"):
            file.truncate(data.rfind(b"\n") + 1)


def json_number(value: float) -> float | None:
    """The value as ``metrics.jsonl`` holds it: None for NaN and infinity."""
    return value if math.isfinite(value) else None


def _print(message: str, file: TextIO) -> None:
    try:
        print(message, file=file, flush=True)
    except UnicodeEncodeError:
        print(message.encode("ascii", "backslashreplace").decode(), file=file, flush=True)
    except OSError:
        # The reader is gone (`| head -1`, a closed terminal). Python flushes once more at its end: give it a place.
        with suppress(OSError, ValueError):
            sink = os.open(os.devnull, os.O_WRONLY)
            os.dup2(sink, file.fileno())
            os.close(sink)
