"""Lists and an experiment of a public data set: python tools/prepare.py kvasir ARCHIVE_OR_FOLDER [options]."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works in a checkout that is not installed

from knowsam.cli.main import run_command

if __name__ == "__main__":
    sys.exit(run_command("prepare", sys.argv[1:]))
