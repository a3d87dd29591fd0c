"""Measure and compare runs: python tools/evaluate.py RUN_FOLDER [RUN_FOLDER ...]."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works in a checkout that is not installed

from knowsam.cli.main import run_command

if __name__ == "__main__":
    sys.exit(run_command("evaluate", sys.argv[1:]))
