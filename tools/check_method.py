"""Check that a method keeps the contract of the loop: python tools/check_method.py module:Class."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works in a checkout that is not installed

from knowsam.cli.main import run_command

if __name__ == "__main__":
    sys.exit(run_command("check-method", sys.argv[1:]))
