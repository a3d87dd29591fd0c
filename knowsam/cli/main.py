"""The ``knowsam`` command. Commands are imported only when they run, so that help is quick."""

import argparse
import difflib
import importlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import knowsam
from knowsam.errors import KnowsamError

COMMANDS = {
    "init": ("knowsam.cli.init", "write an experiment and split lists for your own folder of images and masks"),
    "prepare": ("knowsam.cli.prepare", "make lists and an experiment of a public data set's official download"),
    "check": ("knowsam.cli.check", "check an experiment's data: missing and broken files, wrong masks, leaks"),
    "splits": ("knowsam.cli.splits", "draw seeded split lists for a folder of images and masks"),
    "index": ("knowsam.cli.index", "look through a large data set once, so that trainings start at once"),
    "train": ("knowsam.cli.train", "train a method from an experiment file, or go on where a run stopped"),
    "check-method": ("knowsam.cli.check_method", "check that a method keeps the contract of the loop"),
    "evaluate": ("knowsam.cli.evaluate", "measure finished runs on their test cases and compare them"),
    "score": ("knowsam.cli.score", "measure masks of another tool by the rules by which runs are measured"),
    "predict": ("knowsam.cli.predict", "segment images, volumes or folders with a finished run"),
    "export": ("knowsam.cli.export", "write a run's deployed network as one ONNX, pt2 or TorchScript file"),
    "compare": ("knowsam.cli.compare", "statistics over seeds and cases: tables, tests against a baseline, plots"),
    "report": ("knowsam.cli.report", "one page about a run, or several beside each other: curves, scores, pictures"),
    "sweep": ("knowsam.cli.sweep", "run many trials from one sweep file, resumable, on one machine or many"),
    "benchmark": ("knowsam.cli.benchmark", "measure steps, data, prediction and start-up against the machine's limit"),
    "weights": ("knowsam.cli.weights", "list, fetch and verify SAM's published checkpoints"),
    "convert": ("knowsam.cli.convert", "make a run folder of a checkpoint of the published code"),
    "cache": ("knowsam.cli.cache", "show, verify or prune the cache of decoded images"),
    "doctor": ("knowsam.cli.doctor", "look for what would stop or slow a training on this machine"),
    "completion": ("knowsam.cli.completion", "print the script that completes commands in a shell"),
}
"""Name -> (module, help). A module has ``add_arguments(parser)`` and ``run(args) -> int``; imports go into ``run``."""

INTERNAL_ERROR = 70
INTERRUPTED = 130
BROKEN_PIPE = 141

# torchrun ends every process as soon as one fails; within this time it ends us if rank 0 failed too and has spoken.
RANK_ZERO_HEAD_START = 2.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``knowsam COMMAND ...``.

    Args:
        argv: arguments after ``knowsam``; those of the process if None.
    Returns:
        Exit code: 0 finished, 2 wrong usage, 70 a bug, 130 interrupted, else the code of the ``KnowsamError``.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] in COMMANDS:
        return run_command(arguments[0], arguments[1:])
    width = max(map(len, COMMANDS))
    table = "\n".join(f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="knowsam",
        usage="knowsam COMMAND ...",
        description="Semi-supervised medical image segmentation with the Segment Anything Model.",
        epilog=f"commands:\n{table}\n\n'knowsam COMMAND --help' tells more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"knowsam {knowsam.__version__}")
    try:
        if arguments and not arguments[0].startswith("-"):
            near = difflib.get_close_matches(arguments[0], COMMANDS, n=1)
            ask = f"; did you mean {near[0]!r}?" if near else f"; there are: {', '.join(COMMANDS)}"
            parser.error(f"no command {arguments[0]!r}{ask}")
        parser.parse_args(arguments)
        parser.print_help()
        sys.stdout.flush()
    except SystemExit as stop:
        return _code(stop)
    except BrokenPipeError:
        return _broken_pipe()
    return 0 if not arguments else 2


class Command:
    """One command as a ``with`` block, which turns whatever is raised in it into a message and an exit code.

        with Command("train") as command:
            command.code = command.run(command.arguments())
        sys.exit(command.code)

    A block, not a function, so that between the program and what it calls there is no frame to read past.

    Args:
        name: a key of ``COMMANDS``.
        argv: arguments after the command; those of the process if None.
    Attributes:
        code: exit code; 0 finished, 2 wrong usage, 70 a bug, 130 interrupted, else that of the ``KnowsamError``.
    """

    def __init__(self, name: str, argv: Sequence[str] | None = None):
        self.name, self.argv, self.code = name, argv, 0

    @property
    def run(self) -> Callable[[argparse.Namespace], int]:
        """What the command does with its arguments."""
        function: Callable[[argparse.Namespace], int] = importlib.import_module(COMMANDS[self.name][0]).run
        return function

    def arguments(self) -> argparse.Namespace:
        """Parse the command line; SystemExit where it is wrong, or asks for help."""
        parser = argparse.ArgumentParser(
            prog=f"knowsam {self.name}", description=f"{self.name}: {COMMANDS[self.name][1]}"
        )
        importlib.import_module(COMMANDS[self.name][0]).add_arguments(parser)
        # Intermixed: options may also stand between the others, as in `EXPERIMENT --dry-run key=value`.
        return parser.parse_intermixed_args(self.argv)

    def __enter__(self) -> "Command":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        if error is None:
            try:
                sys.stdout.flush()
            except BrokenPipeError:
                self.code = _broken_pipe()
        elif isinstance(error, SystemExit):
            self.code = _code(error)
        elif isinstance(error, KnowsamError):
            self.code = _report(error)
        elif isinstance(error, KeyboardInterrupt):
            print("interrupted", file=sys.stderr)
            self.code = INTERRUPTED
        elif isinstance(error, BrokenPipeError):
            self.code = _broken_pipe()
        elif isinstance(error, Exception):
            traceback.print_exception(error)
            self.code = INTERNAL_ERROR
        else:
            return False
        return True


def run_command(name: str, argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit code.

    Args:
        name: a key of ``COMMANDS``.
        argv: arguments after the command; those of the process if None.
    """
    with Command(name, argv) as command:
        command.code = int(command.run(command.arguments()) or 0)
    return command.code


def _report(error: KnowsamError) -> int:
    rank = os.environ.get("RANK", "0") if os.environ.get("WORLD_SIZE", "1") != "1" else "0"
    if rank != "0":
        if error.reported_by_main:
            return error.exit_code
        # Most mistakes are made by all ranks alike and reported by rank 0; one that only this rank met, by this rank.
        code = error.exit_code  # not the error, whose frames hold everything that was there
        signal.signal(signal.SIGTERM, lambda *_: os._exit(code))
        time.sleep(RANK_ZERO_HEAD_START)
    where = f"rank {rank}: " if rank != "0" else ""
    print(f"error[{error.kind}]: {where}{error}", file=sys.stderr)
    if error.hint:
        print(f"hint: {error.hint}", file=sys.stderr)
    sys.stderr.flush()
    return error.exit_code


def _code(stop: SystemExit) -> int:
    if stop.code is None or isinstance(stop.code, int):
        return stop.code or 0
    print(stop.code, file=sys.stderr)
    return 1


def _broken_pipe() -> int:
    # Python flushes stdout once more at its end, which would complain about the reader that left.
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, sys.stdout.fileno())
    os.close(sink)
    return BROKEN_PIPE


if __name__ == "__main__":
    sys.exit(main())
