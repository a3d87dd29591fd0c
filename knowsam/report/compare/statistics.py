"""Mean and spread over seeds, the paired test over cases, and Holm's correction. Numbers in, numbers out."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

LEAST_PAIRS = 6
"""Pairs that differ, below which no p is given: with 5 the smallest two-sided p that exists is 2 / 2^5 = 0.0625."""

EXACT_PAIRS = 50
"""Up to so many untied pairs the null distribution is counted out; beyond it the normal approximation serves."""

EXACT_TIED_PAIRS = 13
"""The same for pairs with tied ranks: all 2^13 sign patterns."""

TIE_DIGITS = 9
"""Differences are rounded to so many decimals before they are ranked. Means over classes and seeds carry rounding
errors of about 1e-16, which would give an order to differences that are equal."""


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation of some values.

    Attributes:
        mean: None of no value.
        sd: with n - 1; None of fewer than two values.
        n: how many.
    """

    mean: float | None
    sd: float | None
    n: int


@dataclass(frozen=True)
class PairedTest:
    """Wilcoxon's signed-rank test of one setting against the baseline, over cases.

    Attributes:
        pairs: cases with a difference.
        zeros: of them, those whose difference is zero; they carry no rank (Wilcoxon's own rule).
        statistic: W, the smaller of the two rank sums; None when no pair differs.
        p: two-sided; None when there is none, and ``reason`` says why.
        p_holm: p after Holm's correction over its family; None as long as there is none.
        effect: matched-pairs rank-biserial correlation, -1 .. 1, positive where the setting's values are larger; None
            when no pair differs.
        median: of the differences, zeros included; None without a pair.
        method: distribution that gave p: ``exact``, ``exact, ties`` or ``normal``; empty without p.
        reason: why there is no p, or empty.
    """

    pairs: int
    zeros: int
    statistic: float | None
    p: float | None
    effect: float | None
    median: float | None
    method: str = ""
    reason: str = ""
    p_holm: float | None = None


def spread(values: Sequence[float]) -> Spread:
    """Mean and sample standard deviation of finite values."""
    n = len(values)
    return Spread(
        float(np.mean(values)) if n else None,
        float(np.std(values, ddof=1)) if n > 1 else None,
        n,
    )


def paired_differences(
    setting: Mapping[int, Mapping[str, float]], baseline: Mapping[int, Mapping[str, float]]
) -> dict[str, float]:
    """One difference a case: setting - baseline, averaged over the seeds in which the case counts on both sides.

    A seed that one side lacks, as when its run failed, takes no part on the other side either.

    Args:
        setting, baseline: seed -> case -> value; cases that count in no mean are absent.
    Returns:
        Case -> difference, sorted by case.
    """
    found: dict[str, list[float]] = {}
    for seed in sorted(setting.keys() & baseline.keys()):
        ours, theirs = setting[seed], baseline[seed]
        for case in ours.keys() & theirs.keys():
            found.setdefault(case, []).append(ours[case] - theirs[case])
    # math.fsum: the order of the terms does not show in the result.
    return {case: math.fsum(found[case]) / len(found[case]) for case in sorted(found)}


def averaged_by(differences: Mapping[str, float], groups: Mapping[str, str]) -> dict[str, float]:
    """One difference a group of cases that show nearly the same, by its first case; other cases stay as they are.

    Args:
        differences: case -> difference.
        groups: case -> group; cases that are alike to none are absent.
    """
    found: dict[str, list[float]] = {}
    first: dict[str, str] = {}
    for case in sorted(differences):
        found.setdefault(first.setdefault(groups[case], case) if case in groups else case, []).append(differences[case])
    return {case: math.fsum(values) / len(values) for case, values in found.items()}


def paired_test(differences: Sequence[float]) -> PairedTest:
    """Wilcoxon's signed-rank test that paired differences lie symmetrically about zero; two-sided.

    Zero differences are dropped, equal ones share their mean rank. The distribution under the null hypothesis is exact
    for up to ``EXACT_PAIRS`` untied or ``EXACT_TIED_PAIRS`` tied pairs, else the normal approximation with correction
    for ties and without correction for continuity.

    Args:
        differences: one a case, finite.
    Source:
        Wilcoxon 1945 (zeros dropped); Kerby 2014 (effect size, the difference of favourable and unfavourable rank sums
        over their total).
    """
    rounded = np.round(np.asarray(differences, dtype=float), TIE_DIGITS)
    pairs, other = len(rounded), rounded[rounded != 0]
    zeros = pairs - len(other)
    if not pairs:
        return PairedTest(0, 0, None, None, None, None, reason="no shared case and seed")
    median = float(np.median(rounded))
    if not len(other):
        return PairedTest(pairs, zeros, None, None, None, median, reason=f"all {pairs} differences are zero")

    from scipy.stats import rankdata

    ranks = rankdata(np.abs(other))
    above, below = float(ranks[other > 0].sum()), float(ranks[other < 0].sum())
    statistic, effect = min(above, below), (above - below) / (above + below)
    if len(other) < LEAST_PAIRS:
        reason = f"only {len(other)} pairs differ, {LEAST_PAIRS} are needed"
        return PairedTest(pairs, zeros, statistic, None, effect, median, reason=reason)
    p, method = _wilcoxon(other, tied=len(np.unique(np.abs(other))) < len(other))
    return PairedTest(pairs, zeros, statistic, p, effect, median, method)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down adjustment: rejecting at alpha keeps the chance of any false rejection at most alpha.

    The i-th smallest of m p-values is multiplied by m - i + 1; no adjusted value is below the one before it, nor
    above 1.

    Args:
        p_values: of one family; None stands for a test that gave no p, and is not counted in m.
    Returns:
        Adjusted values in the same order.
    Source:
        Holm 1979, Scandinavian Journal of Statistics 6, 65-70.
    """
    given = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for place, (p, i) in enumerate(given):
        largest = max(largest, min(1.0, p * (len(given) - place)))
        adjusted[i] = largest
    return adjusted


def _wilcoxon(differences: np.ndarray, *, tied: bool) -> tuple[float, str]:
    """p, and how it was computed. The choice is ours, so that it does not change with the version of scipy."""
    from scipy.stats import PermutationMethod, wilcoxon

    if not tied and len(differences) <= EXACT_PAIRS:
        method, name = "exact", "exact"
    elif tied and len(differences) <= EXACT_TIED_PAIRS:
        method, name = PermutationMethod(n_resamples=2**EXACT_TIED_PAIRS + 1), "exact, ties"
    else:
        method, name = "asymptotic", "normal"
    return float(wilcoxon(differences, correction=False, method=method).pvalue), name
