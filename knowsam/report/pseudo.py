"""How good the labels are that a method gives to unlabelled images: measured afterwards, never during training."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from knowsam.engine.scores import MEAN, Evaluation
from knowsam.report.record import Series
from knowsam.report.run_plots import Line, curves
from knowsam.report.tables import Table, number


@dataclass(frozen=True)
class Moment:
    """The weights of one step, scored on unlabelled training cases.

    Attributes:
        file: the checkpoint, such as ``best.pt`` or ``snapshots/step_0000200.pt``.
        step: updates done.
        evaluation: Dice and IoU of every output that the file holds.
    """

    file: str
    step: int
    evaluation: Evaluation


@dataclass(frozen=True)
class PseudoLabels:
    """One run's answers on its unlabelled training cases.

    Attributes:
        run: its name.
        masks: name of the list whose masks were opened, or ``all``.
        of: number of unlabelled training cases with such a mask, of which ``moments`` score some.
        moments: by step.
        reason: why there are none; empty when there are.
    """

    run: str
    masks: str = "all"
    of: int = 0
    moments: list[Moment] = field(default_factory=list)
    reason: str = ""


def table(found: PseudoLabels) -> Table:
    """A row per file, output and class."""
    rows = []
    for moment in found.moments:
        names = moment.evaluation.class_names
        for output, classes in moment.evaluation.summary().items():
            for name in [*names, *([MEAN] if len(names) > 1 else [])]:
                row = classes[name]
                texts = [
                    number(m, row[m]["mean"]) + ("" if row[m]["sd"] is None else f" ± {number(m, row[m]['sd'])}")
                    for m in ("dice", "iou")
                ]
                rows.append(
                    [
                        moment.file,
                        output,
                        "mean over classes" if name == MEAN else name,
                        str(moment.step),
                        f"{row['n']} of {row['cases']}",
                        *texts,
                        *(str(row[status]) for status in ("missed", "false_positive", "empty_both")),
                    ]
                )
    head = ["weights", "output", "class", "step", "cases", "Dice % ↑", "IoU % ↑", "missed", "false", "empty"]
    return Table("pseudo", f"{found.run}: unlabelled training cases, mean ± sd over cases", head, rows, 3)


def figure(found: PseudoLabels) -> str | None:
    """Dice over the steps, a line per output; None when there is one step only."""
    steps = sorted({moment.step for moment in found.moments})
    if len(steps) < 2:
        return None
    lines = []
    for i, output in enumerate(_outputs(found.moments)):
        by_step: dict[int, float] = {}
        for moment in found.moments:
            row: Mapping = moment.evaluation.summary().get(output, {}).get(MEAN, {})
            if row and row["dice"]["mean"] is not None:
                by_step[moment.step] = row["dice"]["mean"]
        lines.append(Line(output, Series(sorted(by_step), [by_step[step] for step in sorted(by_step)]), i, 100.0))
    return curves(f"pseudo {found.run}", lines, "Dice %")


def sentence(found: PseudoLabels) -> str:
    """What the numbers are."""
    scored = len(found.moments[0].evaluation.cases)
    which, how = ("All", "") if scored == found.of else (f"{scored} of", ", evenly spaced in the sorted list")
    return (
        f"{which} {found.of} unlabelled training cases of the list {found.masks!r}{how}, at native resolution. Their "
        "masks were opened for this page alone: training never reads them, and no checkpoint was chosen by them. "
        "Weights of one step are shown once; a snapshot holds the deployed output alone."
    )


def _outputs(moments: Sequence[Moment]) -> list[str]:
    return list(dict.fromkeys(output for moment in moments for output in moment.evaluation.outputs))
