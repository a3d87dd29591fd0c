"""What a sweep costs beside its trials: python tools/bench_sweep.py --launcher local --trials 500 --workers 2.

Runs trials that only sleep, and compares the time with that of workers who lose none.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SWEEP = """
name: overhead
base: {base}
folder: {folder}
seeds: [{seeds}]
command: [sleep, "{seconds}"]
launcher: {{name: {launcher}, workers: {workers}, threads: 1}}
"""


def main() -> int:
    """Run it; the exit code is that of the sweep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--launcher", default="local", choices=("local", "ray"))
    parser.add_argument("--trials", type=int, default=500)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=1.0, help="of a trial")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sweep = Path(folder) / "overhead.yaml"
        values = vars(args) | {"base": ROOT / "experiments" / "quickstart.yaml", "folder": Path(folder) / "sweep"}
        sweep.write_text(SWEEP.format(**values, seeds=", ".join(map(str, range(args.trials)))), encoding="utf-8")
        begin = time.perf_counter()
        words = [sys.executable, str(ROOT / "tools" / "sweep.py"), str(sweep)]
        code = subprocess.run(words, stdout=subprocess.DEVNULL).returncode
        seconds = time.perf_counter() - begin
    ideal = args.trials * args.seconds / args.workers
    print(
        f"{args.launcher}: {args.trials} trials of {args.seconds:g} s, {args.workers} at a time: {seconds:.1f} s, "
        f"ideal {ideal:.1f} s, overhead {100 * (seconds / ideal - 1):.1f} % (start-up included)"
    )
    return code


if __name__ == "__main__":
    sys.exit(main())
