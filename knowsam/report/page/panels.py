"""Which cases a page shows as pictures, and why these."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from knowsam.engine.scores import MEAN
from knowsam.report.page.score_tables import missed_cases
from knowsam.report.runs import Run


@dataclass(frozen=True)
class Pick:
    """A case to show.

    Attributes:
        case: its id.
        why: ``best``, ``median``, ``worst``, ``a structure is missed``, or ``the runs differ most``.
    """

    case: str
    why: str


@dataclass(frozen=True)
class Panel:
    """A picture that belongs on the page.

    Attributes:
        run: its name.
        case: id.
        why: it was chosen.
    """

    run: str
    case: str
    why: str


def plan_panels(runs: Sequence[Run], outputs: Mapping[str, str], count: int) -> list[Panel]:
    """Which cases to show: the same for all runs that were scored on the same ones, else each run's own.

    Args:
        runs: the scored ones of the page.
        outputs: name of the run -> output by whose Dice cases are chosen.
        count: of best, median and worst cases each; 0 for none.
    """
    if len({run.scores["cases_sha256"] for run in runs}) == 1:
        picks = choose_cases(runs, [outputs[run.setting] for run in runs], count)
        return [Panel(run.setting, pick.case, pick.why) for pick in picks for run in runs]
    return [
        Panel(run.setting, pick.case, pick.why)
        for run in runs
        for pick in choose_cases([run], [outputs[run.setting]], count)
    ]


def choose_cases(runs: Sequence[Run], outputs: Sequence[str], count: int) -> list[Pick]:
    """The best, the middle and the worst cases, by Dice averaged over classes and over the runs; and misses besides.

    Where the worst cases show no missed structure, or not all, as many more that do are added: with several classes a
    case may lack one and have a good mean all the same.

    Ties are broken by the case's id, so that the choice is the same every time. No case is chosen twice, however few
    there are.

    Args:
        runs: scored on the same cases.
        outputs: of each run, whose scores count.
        count: of each kind.
    """
    values = [run.case_values(output, MEAN, "dice") for run, output in zip(runs, outputs, strict=True)]
    shared = [case for case in values[0] if all(case in other for other in values)]
    means = {case: math.fsum(of[case] for of in values) / len(values) for case in shared}
    order = sorted(shared, key=lambda case: (-means[case], case))
    middle = max(0, (len(order) - count) // 2)
    groups = [("best", order[:count]), ("worst", order[::-1][:count]), ("median", order[middle : middle + count])]
    if len(runs) > 1:
        spreads = {case: max(of[case] for of in values) - min(of[case] for of in values) for case in shared}
        groups.append(("the runs differ most", sorted(shared, key=lambda case: (-spreads[case], case))[:count]))
    missed = dict.fromkeys(c for run, output in zip(runs, outputs, strict=True) for c in missed_cases(run, output))
    fewest = sorted((case for case in missed if case in means), key=lambda case: (means[case], case))
    others = [case for case in fewest if case not in groups[1][1]]
    groups.insert(2, ("a structure is missed", others[:count]))
    chosen: dict[str, str] = {}
    for why, cases in groups:
        for case in cases:
            chosen.setdefault(case, why)
    rank = ["best", "median", "worst", "a structure is missed", "the runs differ most"]
    return sorted((Pick(case, why) for case, why in chosen.items()), key=lambda pick: rank.index(pick.why))
