"""Types of command-line arguments that several commands have."""

import argparse


def positive(text: str) -> int:
    """A whole number of at least 1."""
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return value


def add_checkpoint_argument(parser: argparse.ArgumentParser) -> None:
    """``--checkpoint``, alike for every command that reads a run."""
    parser.add_argument(
        "--checkpoint", choices=("best", "last"), default="best", help="best on validation, or the last"
    )
