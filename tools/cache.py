"""What the decoded cache holds, and what of it may go: python tools/cache.py show|verify|prune."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works in a checkout that is not installed

from knowsam.cli.main import run_command

if __name__ == "__main__":
    sys.exit(run_command("cache", sys.argv[1:]))
