"""Results as Markdown tables, fit for a terminal and for docs/benchmarks.md."""

from collections.abc import Mapping, Sequence
from typing import Any

from knowsam.benchmark.measure import median


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns.

    Args:
        head: titles of the columns.
        rows: as many cells each.
    """
    cells = [list(head), *map(list, rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def machine(facts: Mapping[str, Any], ceilings: Mapping[str, float]) -> str:
    """What was measured on, and its ceilings.

    Args:
        facts: from ``machine.describe``.
        ceilings: from ``machine.ceilings``; FLOP/s and bytes/s.
    """
    what = facts["gpu"] or f"{facts['processor']}, {facts['threads']} of {facts['cores']} cores used"
    return (
        f"{facts['date']}: {what}; torch {facts['torch']}\n"
        f"ceilings: matrix product {ceilings['fp32'] / 1e9:.0f} GFLOP/s in float32, {ceilings['bf16'] / 1e9:.0f} in "
        f"bf16; copy {ceilings['copy'] / 1e9:.1f} GB/s\n"
    )


def steps(found: Sequence[Mapping[str, Any]], ceilings: Mapping[str, float]) -> str:
    """Whole steps, then their parts.

    Args:
        found: from ``suites.steps``.
        ceilings: from ``machine.ceilings``; FLOP/s by precision.
    """
    useful = min(entry["flops"] for entry in found if "flops" in entry)
    rows = []
    for entry in found:
        seconds = median(entry["seconds"])
        peak = entry["memory"].get("device", entry["memory"]["host"])
        rows.append(
            [
                entry["name"],
                f"{seconds:.3f} ±{100 * entry['spread']:.0f} %",
                f"{median(entry['cpu_seconds']):.2f}",
                f"{entry['images_per_second']:.2f}",
                _ratio(entry.get("faster")),
                _ratio(entry.get("faster_cpu")),
                f"{peak / 2**30:.2f}",
                f"{100 * useful / seconds / ceilings[entry['facts']['precision']]:.0f} %",
            ]
        )
    head = ["subject", "s a step", "CPU s", "images/s", "x faster", "x by CPU s", "peak GiB", "of the ceiling"]
    named = list(dict.fromkeys(part for entry in found for part in entry["parts"]))
    split = [
        [part, *(f"{1e3 * entry['parts'][part]:.0f}" if part in entry["parts"] else "-" for entry in found)]
        for part in named
    ]
    return (
        f"\nsteps, {found[0]['facts']['images']} images each; {useful / 1e9:.0f} GFLOP useful\n{table(head, rows)}\n\n"
        f"milliseconds of each part\n{table(['part', *(entry['name'] for entry in found)], split)}\n"
    )


def parts(found: Sequence[Mapping[str, Any]], ceiling: float, precision: str) -> str:
    """Parts alone.

    Args:
        found: from ``suites.parts``.
        ceiling: FLOP/s of the machine at this precision.
        precision: ``fp32``, ``bf16`` or ``fp16``.
    """
    rows = [
        [
            entry["name"],
            f"{1e3 * entry['seconds']:.0f} ±{100 * entry['spread']:.0f} %",
            f"{entry['flops'] / 1e9:.0f}",
            f"{100 * entry['flops'] / entry['seconds'] / ceiling:.0f} %",
        ]
        for entry in found
    ]
    head = ["part", "ms", "GFLOP", "of the ceiling"]
    return f"\nparts alone, forward and backward, {precision}\n{table(head, rows)}\n"


def data(found: Mapping[str, float], step: Sequence[Mapping[str, Any]] | None) -> str:
    """The pipeline alone, and what the fastest step needs.

    Args:
        found: from ``suites.data``; images/s.
        step: from ``suites.steps``, for what training needs; None leaves that out.
    """
    rows = [[name, f"{rate:.0f}"] for name, rate in found.items()]
    if step:
        fastest = max(step, key=lambda entry: entry["images_per_second"])
        rows.append([f"needed by {fastest['name']}", f"{fastest['images_per_second']:.1f}"])
    return f"\ndata pipeline alone\n{table(['', 'images/s'], rows)}\n"


def inference(found: Sequence[Mapping[str, Any]]) -> str:
    """The deployed network."""
    rows = [
        [
            entry["precision"],
            str(entry["batch"]),
            f"{1e3 * entry['seconds']:.1f} ±{100 * entry['spread']:.0f} %",
            f"{entry['images_per_second']:.1f}",
        ]
        for entry in found
    ]
    return f"\ndeployed students\n{table(['precision', 'batch', 'ms a batch', 'images/s'], rows)}\n"


def prediction(found: Sequence[Mapping[str, Any]], images: int) -> str:
    """Predicting files and evaluating, beside the bare network.

    Args:
        found: from ``use.prediction``.
        images: how many each turn had.
    """
    rows = [
        [
            entry["name"],
            f"{entry['images_per_second']:.1f} ±{100 * entry['spread']:.0f} %",
            _ratio(entry.get("of_network")),
        ]
        for entry in found
    ]
    return f"\n{images} images, batches of 8\n{table(['', 'images/s', 'of the network alone'], rows)}\n"


def startup(found: Sequence[Mapping[str, Any]]) -> str:
    """Start-up times."""
    rows = [[entry["name"], f"{entry['seconds']:.2f} ±{100 * entry['spread']:.0f} %"] for entry in found]
    return f"\nstart-up\n{table(['', 's'], rows)}\n"


def processes(found: Sequence[Mapping[str, Any]]) -> str:
    """One process against two."""
    rows = []
    for entry in found:
        exchange = entry["facts"].get("exchange", {})
        rows.append(
            [
                f"{entry['subject'].processes} x {entry['facts']['threads']} threads"
                + (f", {entry['facts']['gradient_exchange']} exchange" if exchange else ""),
                f"{median(entry['seconds']):.2f} ±{100 * entry['spread']:.0f} %",
                f"{entry['images_per_second']:.2f}",
                *(
                    f"{exchange[name]:.2f}" if exchange else "-"
                    for name in ("backward_compute", "backward_comm", "backward_compute_comm_overlap")
                ),
                f"{exchange['bytes'] / 1e6:.0f}" if exchange else "-",
            ]
        )
    head = ["processes", "s a step", "images/s", "backward s", "exchange s", "of it hidden", "MB a step"]
    return f"\nthe same cores shared by processes (gloo)\n{table(head, rows)}\n"


def _ratio(ratio: tuple[float, float, float] | None) -> str:
    return "-" if ratio is None else f"{ratio[0]:.2f} ({ratio[1]:.2f} to {ratio[2]:.2f})"
