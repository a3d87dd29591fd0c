"""Make a run of a published checkpoint: python tools/convert.py published --subnets FILE -o RUN_FOLDER."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works in a checkout that is not installed

from knowsam.cli.main import run_command

if __name__ == "__main__":
    sys.exit(run_command("convert", sys.argv[1:]))
