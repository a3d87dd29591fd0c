"""Write what each row of the published code changes into docs/fidelity.md: python tools/fidelity_table.py SWEEP_FOLDER.

Takes the scores that the trials of experiments/sweeps/fidelity.yaml left; nothing in the table is typed.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works in a checkout that is not installed

from knowsam.cli.reading import reader
from knowsam.config import REPOSITORY
from knowsam.engine.scores import MEAN
from knowsam.errors import KnowsamError
from knowsam.files import write_text
from knowsam.report.compare.collect import collect
from knowsam.report.compare.comparison import TableSet, compare

BEGIN, END = "<!-- effects: written by tools/fidelity_table.py -->", "<!-- end of effects -->"
OUTPUTS = ("fusion", "sam")
DICE = (MEAN, "dice")


def main() -> int:
    """Write the table; the exit code is 0, or that of what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sweep", help="folder of the finished sweep")
    parser.add_argument("--document", type=Path, default=REPOSITORY / "docs" / "fidelity.md")
    args = parser.parse_args()
    try:
        found = collect([args.sweep], reader("test"))
        by_output = {output: compare(found, output=output, metrics=["dice"]).sets for output in OUTPUTS}
    except KnowsamError as error:
        print(f"error[{error.kind}]: {error}", file=sys.stderr)
        return error.exit_code
    before, found_begin, rest = args.document.read_text(encoding="utf-8").partition(BEGIN)
    _, found_end, after = rest.partition(END)
    if not (found_begin and found_end):
        print(f"error: {args.document} lacks the lines {BEGIN} and {END}", file=sys.stderr)
        return 65
    write_text(args.document, f"{before}{BEGIN}\n\n{table(by_output)}\n\n{END}{after}")
    print(f"written into {args.document}")
    return 0


def table(by_output: dict[str, list[TableSet]]) -> str:
    """Settings down, experiments and outputs across, and below it what the numbers are of."""
    columns = [(item.experiment, output, item) for output, sets in by_output.items() for item in sets]
    columns.sort(key=lambda column: column[0])
    settings = list(dict.fromkeys(row.setting for _, _, item in columns for row in item.rows))
    head = ["Put back", *(f"{experiment}, {output}" for experiment, output, _ in columns)]
    lines = [f"| {' | '.join(head)} |", "|---|" + "---|" * len(columns)]
    for setting in settings:
        cells = [cell(item, setting) for _, _, item in columns]
        name = setting if setting in ("corrected", "published code") else f"`{setting}`"
        lines.append(f"| {name} | {' | '.join(cells)} |")
    runs = [run for item in by_output[OUTPUTS[0]] for row in item.rows for run in row.runs]
    seeds = sorted({run.seed for run in runs})
    counted = "; ".join(
        f"{item.experiment}: {len(item.rows[0].runs[0].case_values(OUTPUTS[0], *DICE))} test cases"
        for item in by_output[OUTPUTS[0]]
    )
    lines += [
        "",
        f"Test Dice %, mean over cases and classes, then over seeds {', '.join(map(str, seeds))}; in brackets the "
        f"difference to *corrected* for each seed. {len(runs)} runs. {counted}. A dash: not run, as it computes the "
        "same.",
    ]
    return "\n".join(lines)


def cell(item: TableSet, setting: str) -> str:
    """``mean ± sd (difference to the baseline, seed by seed)``."""
    rows = {row.setting: row.cells[DICE] for row in item.rows if DICE in row.cells}
    if setting not in rows:
        return "-"
    numbers = rows[setting]
    text = f"{100 * numbers.values.mean:.1f}"
    if numbers.values.sd is not None:
        text += f" ± {100 * numbers.values.sd:.1f}"
    if setting != item.baseline and item.baseline in rows:
        base = rows[item.baseline].by_seed
        differences = [100 * (numbers.by_seed[seed] - base[seed]) for seed in sorted(base) if seed in numbers.by_seed]
        text += f" ({', '.join(f'{difference:+.1f}' for difference in differences)})"
    return text


if __name__ == "__main__":
    sys.exit(main())
