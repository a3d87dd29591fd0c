"""``python -m knowsam`` is the ``knowsam`` command."""

import sys

from knowsam.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
