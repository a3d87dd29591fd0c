"""Look through a data set once: python tools/index.py EXPERIMENT_OR_FOLDER [options]."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works in a checkout that is not installed

from knowsam.cli.main import run_command

if __name__ == "__main__":
    sys.exit(run_command("index", sys.argv[1:]))
