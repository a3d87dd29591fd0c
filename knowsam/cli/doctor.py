"""``knowsam doctor``: what would stop or slow a training on this machine, and what to do about it."""

import argparse
import json
from dataclasses import asdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from knowsam.config import Config
    from knowsam.doctor import Finding, Wanted

EPILOG = """examples:
  python tools/doctor.py
  python tools/doctor.py experiments/kvasir_10pct.yaml      # also: are its data and weights here?
  python tools/doctor.py --json

Every line begins with ok, look (works, but slower or less than it could) or broken; below it stands what to do.
exit codes: 0 nothing is broken, 1 something is, 66 no such experiment, 78 configuration.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument("experiment", nargs="?", metavar="EXPERIMENT.yaml", help="what is to be trained here")
    parser.add_argument("--json", action="store_true", help="as JSON")


def run(args: argparse.Namespace) -> int:
    """Examine, report; 1 when something is broken."""
    from knowsam.config import load_config
    from knowsam.doctor import BROKEN, LOOK, examine

    wanted = wanted_by(load_config(args.experiment)) if args.experiment else None
    findings = []
    for finding in examine(wanted):
        findings.append(finding)
        if not args.json:
            _show(finding)
    broken = sum(finding.level == BROKEN for finding in findings)
    if args.json:
        print(json.dumps({"broken": broken, "findings": [asdict(finding) for finding in findings]}, indent=2))
    else:
        looks = sum(finding.level == LOOK for finding in findings)
        print(f"\n{broken or 'nothing'} broken, {looks or 'nothing'} to look at")
    return 1 if broken else 0


def wanted_by(config: "Config") -> "Wanted":
    """What an experiment must find on this machine."""
    from knowsam.doctor import Wanted

    root, weights = config.data.source.get("root"), config.sam.get("weights")
    return Wanted({root: config.data.obtain} if root else {}, [weights] if weights and config.uses_sam else [])


def _show(finding: "Finding") -> None:
    print(f"{finding.level:<7} {finding.area:<10} {finding.text}", flush=True)
    if finding.advice:
        print(f"{'':<18} -> {finding.advice}", flush=True)
