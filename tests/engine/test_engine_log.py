"""Metrics survive crashes and full disks; the progress line is readable and its time left makes sense."""

import io
import json
import math
import os
import re

import pytest

from knowsam.engine import log
from knowsam.engine.log import MetricsLog, Progress, kept_warnings, read_metrics, read_warnings, say, warn
from knowsam.text import duration


class Clock:
    """Seconds that pass when told to."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def _steps(folder) -> list[int]:
    return [record["step"] for record in read_metrics(folder / "metrics.jsonl")]


def test_records_are_json_lines(tmp_path):
    with MetricsLog(tmp_path, tensorboard=False) as metrics:
        metrics.write("train", 1, {"loss": 0.5})
        metrics.write("val", 1, {"hd95": math.nan})
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()  # flushed before it is closed
    assert [json.loads(line) for line in lines] == [
        {"step": 1, "kind": "train", "loss": 0.5},
        {"step": 1, "kind": "val", "hd95": None},
    ]


@pytest.mark.parametrize("torn", [b"", b'{"step": 3', b'{"step": 3, "kind": "train"}', b"\xff\xfe\n", b"[1]\n"])
def test_resume_drops_later_and_torn_lines(tmp_path, torn):
    with MetricsLog(tmp_path, tensorboard=False) as metrics:
        for step in (1, 2, 3, 4):
            metrics.write("train", step, {"loss": step / 2})
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(torn)
    assert _steps(tmp_path) == [1, 2, 3, 4]
    with MetricsLog(tmp_path, tensorboard=False) as metrics:
        metrics.truncate_after(2)
        metrics.write("train", 3, {"loss": 9.0})
    assert _steps(tmp_path) == [1, 2, 3]
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_appending_after_a_torn_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "kind": "train"}\n{"step": 2, "ki')
    with MetricsLog(tmp_path, tensorboard=False) as metrics:
        metrics.write("train", 5, {})
    assert _steps(tmp_path) == [1, 5]


def test_a_full_disk_is_one_warning_and_loses_nothing(tmp_path, capsys):
    class Full:
        """Writes half of what it is given, then has no room."""

        def __init__(self, file):
            self.file = file

        def write(self, data):
            return self.file.write(data[: len(data) // 2])

        def __getattr__(self, name):
            return getattr(self.file, name)

    with MetricsLog(tmp_path, tensorboard=False) as metrics:
        metrics.write("train", 1, {})
        real = metrics._file
        metrics._file = Full(real)
        metrics.write("train", 2, {})
        metrics.write("train", 3, {})
        assert _steps(tmp_path) == [1]
        metrics._file = real
        metrics.write("train", 4, {})
        assert _steps(tmp_path) == [1, 2, 3, 4]
    assert capsys.readouterr().err.count("warning:") == 1


def test_tensorboard_is_written_and_purged(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricsLog(tmp_path) as metrics:
        for step in (1, 2, 3):
            metrics.write("train", step, {"loss": float(step)})
    with MetricsLog(tmp_path) as metrics:
        metrics.truncate_after(1)
        metrics.write("train", 2, {"loss": 20.0})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {item.step: item.value for item in events.Scalars("train/loss")} == {1: 1.0, 2: 20.0}


def test_tensorboard_that_fails_is_switched_off(tmp_path, capsys):
    (tmp_path / "tensorboard").write_text("a file where the folder should be")
    with MetricsLog(tmp_path) as metrics:
        metrics.write("train", 1, {"loss": 1.0})
        metrics.write("train", 2, {"loss": 1.0})
    assert _steps(tmp_path) == [1, 2]
    assert capsys.readouterr().err.count("TensorBoard is off") == 1


def test_other_ranks_are_silent(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    with MetricsLog(tmp_path) as metrics, Progress(2, log_every=1) as progress:
        metrics.truncate_after(0)
        metrics.write("train", 1, {"loss": 1.0})
        progress.update(1, {"loss": 1.0})
        progress.print_line("x")
        say("x")
        warn("x")
    assert os.listdir(tmp_path) == [] and "".join(capsys.readouterr()) == ""
    warn("mine", every_rank=True)
    assert capsys.readouterr().err == "warning: mine\n"


def test_time_left_leaves_validation_out():
    clock, out = Clock(), io.StringIO()
    with Progress(100, log_every=10, file=out, clock=clock) as progress:
        assert math.isnan(progress.seconds_left)
        for step in range(1, 21):
            clock.now += 2.0
            progress.update(step, {"loss": 0.123456, "dice": 1.0}, images=8)
            with progress.paused():
                clock.now += 1000.0
    assert progress.seconds_left == pytest.approx(160.0)
    assert progress.images_per_second == pytest.approx(4.0)
    assert out.getvalue().splitlines() == [
        "step  10/100  loss 0.1235  dice 1  4.0 images/s  eta 0:03:00",
        "step  20/100  loss 0.1235  dice 1  4.0 images/s  eta 0:02:40",
    ]


def test_slow_first_steps_are_forgotten_and_the_clock_may_jump():
    clock = Clock()
    progress = Progress(1000, clock=clock, log_every=10_000, file=io.StringIO())
    clock.now += 500.0
    progress.update(1)
    for step in range(2, 200):
        clock.now += 1.0
        progress.update(step)
    assert progress.seconds_left == pytest.approx(1000 - 199)
    clock.now -= 10_000.0
    progress.update(200)
    assert progress.seconds_left >= 0


def test_resume_counts_from_where_it_was_and_the_last_step_is_shown():
    clock, out = Clock(), io.StringIO()
    with Progress(27, start_step=20, log_every=5, file=out, clock=clock) as progress:
        for step in range(21, 28):
            clock.now += 1.0
            progress.update(step)
    assert out.getvalue().splitlines() == ["step 25/27  eta 0:00:02", "step 27/27  eta 0:00:00"]


def test_live_line_only_on_a_terminal(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich would take a file for a terminal
    plain, live, dumb = io.StringIO(), Terminal(), Terminal()
    monkeypatch.setenv("TERM", "xterm")
    for out in (plain, live):
        with Progress(2, log_every=1, file=out) as progress:
            progress.update(1, {"loss[a]": 1.0}, images=2)
            progress.print_line("[bold]message")
            progress.update(2)
        assert "loss[a] 1" in out.getvalue() and "[bold]message" in out.getvalue()
    monkeypatch.setenv("TERM", "dumb")
    with Progress(2, log_every=1, file=dumb) as progress:
        progress.update(2)
    assert "\x1b" in live.getvalue()
    assert not any(ord(letter) < 32 and letter != "\n" for letter in plain.getvalue() + dumb.getvalue())


def test_a_console_that_cannot_show_or_take_it_does_no_harm():
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    log._print("café", ascii_only)
    assert ascii_only.buffer.getvalue() == b"caf\\xe9\n"
    reader, writer = os.pipe()
    os.close(reader)
    gone = os.fdopen(writer, "w")
    log._print("nobody reads this", gone)
    gone.close()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00:00"), (59.6, "0:01:00"), (3661, "1:01:01"), (90_061, "1d 01:01:01"), (math.nan, "--"), (-1, "--")],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_counter_is_silent_when_quick_and_speaks_by_quarters_when_slow():
    from knowsam.engine.log import Counter

    now = [0.0]
    file = io.StringIO()
    with Counter("decoding", file=file, clock=lambda: now[0]) as counter:
        for done in range(1, 101):
            now[0] += 0.02
            counter(done, 100)
    assert file.getvalue() == ""
    with Counter("decoding", file=file, clock=lambda: now[0]) as counter:
        for done in range(1, 101):
            now[0] += 1.0
            counter(done, 100)
    lines = file.getvalue().splitlines()
    assert [line.partition(",")[0] for line in lines] == [f"decoding: {n}/100" for n in (25, 50, 75, 100)]


# ---------------------------------------------------------------- eighty columns, and warnings that stay


TERMS = {f"consistency_student_{i}": 0.0123456 * 10**i for i in range(6)}


@pytest.mark.parametrize(("max_steps", "count"), [(60, 1), (30_000, 2), (2_000_000, 6)])
def test_a_plain_line_fits_80_columns_and_counts_what_it_leaves_out(max_steps, count):
    clock, out = Clock(), io.StringIO()
    terms = {"loss": 123.4567, **dict(list(TERMS.items())[:count])}
    with Progress(max_steps, log_every=1, file=out, clock=clock) as progress:
        clock.now += 0.5
        progress.update(1, terms, images=1000)
    (line,) = out.getvalue().splitlines()
    assert len(line) <= 80 and "loss 123.5" in line and "images/s  eta " in line
    shown = sum(f"{name} " in line for name in terms)
    assert (f"+{len(terms) - shown}  " in line) == (shown < len(terms))
    assert shown == len(terms) or len(line) + len(list(terms)[shown]) > 70, "as many terms as there is room for"


def test_a_line_that_fits_is_whole():
    clock, out = Clock(), io.StringIO()
    with Progress(9, log_every=1, file=out, clock=clock) as progress:
        clock.now += 1.0
        progress.update(1, {"loss": 1.0, "seg": 0.25, "sam": 0.5}, images=4)
    assert out.getvalue() == "step 1/9  loss 1  seg 0.25  sam 0.5  4.0 images/s  eta 0:00:08\n"


def test_the_live_line_fits_its_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    out = Terminal()
    with Progress(30_000, log_every=1, file=out) as progress:
        progress.update(1, {"loss": 1.0, **TERMS}, images=4)
    lines = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text) for text in re.split(r"[\r\n]", out.getvalue())]
    told = [line for line in lines if "eta" in line]
    assert told and all(len(line.rstrip()) <= 80 and "…" not in line and "+" in line for line in told)


def test_warnings_of_a_training_stay_in_its_folder(tmp_path, capsys):
    warn("before")
    with kept_warnings(tmp_path):
        warn("no labelled image shows tumour")
        warn("two\nlines, with “quotes”")
        warn("no labelled image shows tumour")
    warn("after")
    assert capsys.readouterr().err.count("warning: ") == 5
    assert read_warnings(tmp_path) == ["no labelled image shows tumour", "two\nlines, with “quotes”"]
    with open(tmp_path / "warnings.jsonl", "a") as file:
        file.write('[1]\n{"tex')
    assert len(read_warnings(tmp_path)) == 2 and read_warnings(tmp_path / "nowhere") == []


def test_a_folder_that_is_gone_ends_no_training(tmp_path, capsys):
    with kept_warnings(tmp_path / "gone"):
        warn("said all the same")
    assert "said all the same" in capsys.readouterr().err


def test_a_run_folder_keeps_warnings_while_it_is_locked(tmp_path, capsys):
    from knowsam.engine.runfolder import RunFolder

    with RunFolder(tmp_path / "run") as run:
        warn("of this run")
    warn("of nobody")
    assert read_warnings(run) == ["of this run"]
