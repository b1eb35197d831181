"""Intervals made of intervals: published examples, hand calculation, and simulated runs."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tunewright.metrics import statistics
from tunewright.metrics.combining import Estimate, apart, over_runs, rows_and_runs


def share(right: int, n: int) -> Estimate:
    return Estimate(right / n, *statistics.wilson_interval(right, n))


@pytest.mark.parametrize(
    ("one", "other", "low", "high"),
    [  # Newcombe 1998, Stat. Med. 17:873, table II, method 10
        ((56, 70), (48, 80), 0.0524, 0.3339),
        ((9, 10), (3, 10), 0.1705, 0.8090),
        ((10, 10), (0, 10), 0.6075, 1.0),
        ((5, 56), (0, 29), -0.0381, 0.1926),
    ],
)
def test_two_shares_give_newcombes_published_intervals(one, other, low, high):
    found = apart(share(*one), share(*other))
    assert (found.low, found.high) == pytest.approx((low, high), abs=5e-5)


def test_apart_agrees_with_statsmodels():
    proportion = pytest.importorskip("statsmodels.stats.proportion")
    theirs = proportion.confint_proportions_2indep(83, 120, 61, 99, method="newcomb")
    found = apart(share(83, 120), share(61, 99))
    assert (found.low, found.high) == pytest.approx(theirs, abs=1e-9)


def test_gains_on_different_rows_are_told_apart_as_often_as_promised():
    """Gain on 60 rows minus gain on 60 others, scores continuous: 1,000 sets."""
    rng, held = np.random.default_rng(0), 0
    for _ in range(1000):
        ends = []
        for mean, spread in ((0.3, 1.0), (0.1, 0.6)):
            value, (low, high), _ = statistics.paired_t(rng.normal(mean, spread, 60))
            ends.append(Estimate(value, low, high))
        found = apart(*ends)
        held += found.low <= 0.2 <= found.high
    assert 0.935 <= held / 1000 <= 0.985


def test_the_band_over_runs_is_the_one_by_hand():
    # 4, 5, 9: mean 6, variance ((-2)^2 + (-1)^2 + 3^2) / 2 = 7, t of 2 degrees of freedom 4.302653
    half = 4.302653 * math.sqrt(7 / 3)
    found = over_runs([4.0, 5.0, 9.0])
    assert (found.value, found.low, found.high) == pytest.approx((6.0, 6 - half, 6 + half), abs=1e-5)
    with pytest.raises(ValueError, match="found 1"):
        over_runs([1.0])


def test_rows_and_runs_add_in_squares_each_side_on_its_own():
    found = rows_and_runs((-2.0, 5.0), Estimate(1.0, -3.0, 5.0))
    assert (found.low, found.high) == pytest.approx((1 - 5, 1 + math.hypot(4, 4)))
    alike = rows_and_runs((0.1, 0.4), Estimate(0.2, 0.2, 0.2))
    assert (alike.low, alike.high) == pytest.approx((0.1, 0.4))  # all runs the same: rows alone


def test_rows_and_runs_cover_new_rows_and_new_runs():
    """Gain of run s on row j: a_s + b_j + e_sj. 500 sets for each way of sharing; rows alone would hold far fewer."""
    rng = np.random.default_rng(0)
    for runs_spread, rows_spread, both in ((0.0, 1.0, 1.0), (0.1, 1.0, 1.0), (0.3, 1.0, 1.0), (0.2, 0.0, 1.0)):
        held, rows_held = 0, 0
        for _ in range(500):
            d = runs_spread * rng.standard_normal((3, 1)) + rows_spread * rng.standard_normal((1, 150))
            d = d + both * rng.standard_normal((3, 150))
            rows = statistics.paired_t(d.mean(axis=0))[1]
            found = rows_and_runs(rows, over_runs([float(v) for v in d.mean(axis=1)]))
            held += found.low <= 0 <= found.high
            rows_held += rows[0] <= 0 <= rows[1]
        assert held / 500 >= 0.94, runs_spread
        if runs_spread >= 0.2:
            assert rows_held / 500 < 0.85
