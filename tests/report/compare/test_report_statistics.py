"""Spread, paired test and Holm against numbers made by hand and against scipy."""

import itertools

import numpy as np
import pytest
from scipy import stats

from knowsam.report.compare.statistics import LEAST_PAIRS, holm, paired_differences, paired_test, spread

# A table that is worked out on paper: |d| ranked 1 .. 8, the ranks of -3 (3) and -1 (1) are below zero.
PLAIN = [-1.0, 2.0, -3.0, 4.0, 5.0, 6.0, 7.0, 8.0]


@pytest.mark.parametrize(
    ("values", "mean", "sd"),
    [([], None, None), ([0.5], 0.5, None), ([1.0, 3.0], 2.0, 2**0.5), ([1, 2, 3, 4], 2.5, 1.2909944)],
)
def test_spread(values, mean, sd):
    found = spread(values)
    assert (found.mean, found.n) == (mean, len(values))
    assert found.sd is None if sd is None else found.sd == pytest.approx(sd)


def test_paired_test_by_hand():
    """W- = 1 + 3 = 4, W+ = 36 - 4 = 32; the sign patterns with a rank sum of at most 4 are counted below."""
    found = paired_test(PLAIN)
    # Subsets of {1 .. 8} with sum <= 4: {}, 1, 2, 3, 4, 12, 13 -> 7 of 256, twice.
    assert found.p == pytest.approx(2 * 7 / 256) and found.statistic == 4 and found.method == "exact"
    assert found.effect == pytest.approx((32 - 4) / 36) and found.median == 4.5
    assert (found.pairs, found.zeros, found.reason) == (8, 0, "")


def test_ties_by_hand_and_by_all_sign_patterns():
    """Equal differences share their mean rank: |d| = 1 1 2 2 2 3 -> ranks 1.5 1.5 4 4 4 6."""
    differences = [1.0, -1.0, 2.0, 2.0, 2.0, 3.0]
    ranks = np.array([1.5, 1.5, 4, 4, 4, 6])
    found = paired_test(differences)
    assert found.statistic == 1.5 and found.effect == pytest.approx((19.5 - 1.5) / 21) and found.method == "exact, ties"
    sums = np.array([ranks[list(signs)].sum() for signs in itertools.product([False, True], repeat=6)])
    assert found.p == pytest.approx(2 * (sums <= 1.5).mean()) == pytest.approx(6 / 64)


def test_zeros_are_dropped_but_counted():
    found = paired_test([*PLAIN, 0.0, 0.0, 0.0])
    assert (found.pairs, found.zeros) == (11, 3)
    plain = paired_test(PLAIN)
    assert (found.p, found.statistic, found.effect) == (plain.p, plain.statistic, plain.effect)
    assert found.median == 2.0  # zeros are part of the median


@pytest.mark.parametrize("n", [6, 13, 14, 50, 51, 120])
@pytest.mark.parametrize("kind", ["plain", "ties", "zeros"])
def test_against_scipy(n, kind):
    rng = np.random.default_rng(n)
    differences = rng.normal(0.2, 1, n)
    if kind == "ties":
        differences[: n // 2] = np.round(differences[: n // 2], 1) + 0.05
        differences[1] = -differences[0]
    if kind == "zeros":
        differences = np.concatenate([differences, np.zeros(5)])
    found = paired_test(differences)
    kept = np.round(differences[differences != 0], 9)
    theirs = stats.wilcoxon(kept)  # scipy's own choice agrees with ours once the zeros are gone
    assert found.p == pytest.approx(theirs.pvalue, rel=1e-9) and found.statistic == theirs.statistic
    exact = kind != "ties" and n <= 50
    assert found.method == ("exact" if exact else "exact, ties" if n <= 13 else "normal")
    ranks = stats.rankdata(np.abs(kept))
    assert found.effect == pytest.approx((ranks[kept > 0].sum() - ranks[kept < 0].sum()) / ranks.sum())


def test_nothing_to_test():
    same = paired_test([0.0] * 20)
    assert (same.p, same.statistic, same.effect, same.median) == (None, None, None, 0.0)
    assert same.zeros == 20 and same.reason == "all 20 differences are zero"
    assert paired_test([]).reason == "no shared case and seed" and paired_test([]).median is None
    few = paired_test([1.0, 2.0, 3.0, 4.0, 5.0, 0.0, 0.0])
    assert few.p is None and few.reason == "only 5 pairs differ, 6 are needed" and few.effect == 1
    # The bound is where 0.05 comes into reach.
    assert 2 / 2 ** (LEAST_PAIRS - 1) > 0.05 > paired_test([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]).p == 2 / 2**6


def test_rounding_errors_make_no_ranks():
    """0.1 + 0.2 - 0.3 is not 0 in binary: such a case is a tie between the models."""
    found = paired_test([0.1 + 0.2 - 0.3, *PLAIN])
    assert found.zeros == 1 and found.p == paired_test(PLAIN).p


@pytest.mark.parametrize(
    ("given", "adjusted"),
    [
        ([], []),
        ([0.03], [0.03]),
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),  # x4: 0.02, x3: 0.03, x2: 0.06, x1: 0.04 -> 0.06
        ([0.5, 0.6], [1.0, 1.0]),
        ([0.02, 0.02], [0.04, 0.04]),
        ([None, 0.01, None, 0.02], [None, 0.02, None, 0.02]),  # what gave no p is no test of the family
        ([None], [None]),
    ],
)
def test_holm_by_hand(given, adjusted):
    assert holm(given) == pytest.approx(adjusted)


def test_differences_are_paired_by_seed_and_case():
    ours = {0: {"a": 0.9, "b": 0.5}, 1: {"a": 0.7, "b": 0.5, "c": 0.4}, 2: {"a": 0.0}}
    theirs = {0: {"a": 0.5, "b": 0.5, "c": 1.0}, 1: {"a": 0.5, "c": 0.2}, 3: {"a": 1.0}}
    found = paired_differences(ours, theirs)
    # a in seeds 0 and 1; b counts for both in seed 0 only, c in seed 1 only; seeds 2 and 3 have no partner.
    assert found == pytest.approx({"a": 0.3, "b": 0.0, "c": 0.2}) and list(found) == ["a", "b", "c"]
    assert paired_differences(ours, {7: {"a": 1.0}}) == {}
