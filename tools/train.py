"""Train a method: python tools/train.py EXPERIMENT.yaml [key=value ...]."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works in a checkout that is not installed

from knowsam.cli.main import Command

if __name__ == "__main__":
    with Command("train") as command:
        command.code = command.run(command.arguments())
    sys.exit(command.code)
