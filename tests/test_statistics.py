"""Every interval and test against an independent truth: a table, a published example, brute force, another library."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest

from tunewright.metrics import statistics as st

Z = 1.959963984540054


def rows(fixed: int, broken: int, n: int) -> tuple[list[int], list[int]]:
    """Base and tuned scores with these flips; the rest is half right, half wrong in both."""
    both = [i % 2 for i in range(n - fixed - broken)]
    return [0] * fixed + [1] * broken + both, [1] * fixed + [0] * broken + both


def f1(pairs) -> float:
    """Of (label, prediction) pairs; nan where neither ever says 1."""
    both = sum(label and said for label, said in pairs)
    either = sum(label + said for label, said in pairs)
    return 2 * both / either if either else math.nan


# Tango's score interval


@pytest.mark.parametrize(
    ("fixed", "broken", "n", "low", "high"),
    [
        (6, 16, 161, -0.1240, -0.0054),  # Cavo 2012, as printed by R contingencytables, Tango_asymptotic_score_CI
        (1, 7, 21, -0.517, -0.026),  # Bentur 2009, in Fagerland, Lydersen and Laake 2014, Stat. Med. 33:2850
    ],
)
def test_tango_gives_the_published_intervals(fixed, broken, n, low, high):
    digits = 4 if n == 161 else 3
    assert tuple(round(end, digits) for end in st.tango_interval(fixed, broken, n)) == (low, high)


def score_by_brute_force(fixed: int, broken: int, n: int, difference: float) -> float:
    """Tango's statistic with the likelihood maximised over a grid: no quadratic, nothing shared with the module."""
    rate = np.linspace(max(0.0, -difference), (1 - difference) / 2, 400_001)[1:-1]
    log_likelihood = (
        fixed * np.log(rate + difference)
        + broken * np.log(rate)
        + (n - fixed - broken) * np.log1p(-2 * rate - difference)
    )
    best = rate[log_likelihood.argmax()]
    return (fixed - broken - n * difference) / math.sqrt(n * (2 * best + difference - difference**2))


@pytest.mark.parametrize(
    ("fixed", "broken", "n"),
    [(1, 0, 20), (5, 2, 50), (12, 30, 100), (21, 62, 500), (3, 3, 7), (9, 1, 10), (0, 40, 900)],
)
def test_both_ends_of_tango_solve_the_score_equation(fixed, broken, n):
    low, high = st.tango_interval(fixed, broken, n)
    assert score_by_brute_force(fixed, broken, n, low) == pytest.approx(Z, abs=2e-3)
    assert score_by_brute_force(fixed, broken, n, high) == pytest.approx(-Z, abs=2e-3)


@pytest.mark.parametrize("n", [1, 2, 20, 1000, 10**6])
def test_tango_with_no_flips_or_only_flips_has_the_hand_solved_ends(n):
    edge = Z**2 / (n + Z**2)
    assert st.tango_interval(0, 0, n) == pytest.approx((-edge, edge), rel=1e-9)
    assert st.tango_interval(n, 0, n) == pytest.approx(((n - Z**2) / (n + Z**2), 1.0), rel=1e-9)
    assert st.tango_interval(0, n, n) == pytest.approx((-1.0, -(n - Z**2) / (n + Z**2)), rel=1e-9)


def test_tango_always_has_width_holds_the_estimate_and_mirrors():
    seen = 0
    for n in (1, 2, 3, 7, 15):
        for fixed, broken in itertools.product(range(n + 1), repeat=2):
            if fixed + broken > n:
                continue
            low, high = st.tango_interval(fixed, broken, n)
            assert -1 <= low <= (fixed - broken) / n <= high <= 1
            assert high - low > 0.1
            assert st.tango_interval(broken, fixed, n) == (-high, -low)
            seen += 1
    assert seen == 3 + 6 + 10 + 36 + 136


@pytest.mark.parametrize(
    ("n", "rates"),
    [
        (20, {(0.02, 0.05): 0.998, (0.05, 0.05): None, (0.05, 0.10): None}),
        (50, {(0.02, 0.05): 0.977, (0.05, 0.05): None, (0.05, 0.10): None}),
        (100, {(0.02, 0.05): None, (0.05, 0.05): 0.957, (0.05, 0.10): None}),
    ],
)
def test_tango_covers_the_truth_at_least_93_times_in_100(n, rates):
    """Exact, over all outcomes; the figures are docs/facts.md."""
    log_factorial = [math.lgamma(count + 1) for count in range(n + 1)]
    covered = dict.fromkeys(rates, 0.0)
    for fixed in range(n + 1):
        for broken in range(n + 1 - fixed):
            same = n - fixed - broken
            ways = log_factorial[n] - log_factorial[fixed] - log_factorial[broken] - log_factorial[same]
            chance = {
                (b, f): math.exp(ways + fixed * math.log(f) + broken * math.log(b) + same * math.log(1 - b - f))
                for b, f in rates
            }
            if max(chance.values()) < 1e-9:
                continue
            low, high = st.tango_interval(fixed, broken, n)
            for b, f in rates:
                covered[b, f] += chance[b, f] * (low <= f - b <= high)
    for rate, published in rates.items():
        assert covered[rate] >= 0.93
        if published:
            assert covered[rate] == pytest.approx(published, abs=0.001)


def test_tango_refuses_impossible_counts():
    for fixed, broken, n in ((3, 3, 5), (-1, 0, 5), (0, 0, 0)):
        with pytest.raises(ValueError, match=f"fixed={fixed}, broken={broken}, n={n}"):
            st.tango_interval(fixed, broken, n)


# McNemar, Wilson, Holm


def midp_by_hand(fixed: int, broken: int) -> Fraction:
    flips, fewer = fixed + broken, min(fixed, broken)
    ways, below = 1, 0  # ways to choose `count` of all flips, and their sum below `fewer`: whole numbers, exact
    for count in range(fewer):
        below += ways
        ways = ways * (flips - count) // (count + 1)
    return min(Fraction(1), Fraction(2 * below + ways, 2**flips))


def test_midp_equals_the_binomial_sum_for_every_small_count():
    pairs = list(itertools.product(range(25), repeat=2))
    assert len(pairs) == 625
    for fixed, broken in pairs:
        assert st.mcnemar_midp(fixed, broken) == pytest.approx(float(midp_by_hand(fixed, broken)), rel=1e-12)


@pytest.mark.parametrize(("fixed", "broken"), [(1000, 1100), (3200, 2900), (5000, 4700), (1500, 600)])
def test_midp_stays_exact_for_thousands_of_flips(fixed, broken):
    assert st.mcnemar_midp(fixed, broken) == pytest.approx(float(midp_by_hand(fixed, broken)), rel=1e-8)


def test_midp_gives_the_published_values():
    assert st.mcnemar_midp(6, 16) == pytest.approx(0.034690, abs=5e-7)  # Cavo 2012, R contingencytables
    assert st.mcnemar_midp(1, 7) == pytest.approx(0.0391, abs=5e-5)  # Bentur 2009, Fagerland 2013: 0.039
    assert st.mcnemar_midp(0, 0) == 1.0


def test_wilson_gives_newcombes_values_and_keeps_to_0_and_1():
    assert st.wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)  # Newcombe 1998, table I
    assert st.wilson_interval(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert st.wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert st.wilson_interval(29, 29) == pytest.approx((0.8830, 1.0), abs=5e-5)
    with pytest.raises(ValueError, match="right=3, n=2"):
        st.wilson_interval(3, 2)


def test_wilson_agrees_with_statsmodels():
    proportion = pytest.importorskip("statsmodels.stats.proportion")
    for right, n in ((1, 9), (50, 100), (499, 500)):
        theirs = proportion.proportion_confint(right, n, method="wilson")
        assert st.wilson_interval(right, n) == pytest.approx(theirs, abs=1e-12)


def test_holm_gives_the_hand_worked_example_in_the_order_given():
    # sorted: .005 x4 = .02, .01 x3 = .03, .03 x2 = .06, .04 x1 = .04 but never below the one before: .06
    assert st.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert st.holm([0.6, 0.7]) == [1.0, 1.0]
    assert st.holm([]) == []


def test_holm_agrees_with_statsmodels():
    multitest = pytest.importorskip("statsmodels.stats.multitest")
    p = np.random.default_rng(0).random(15) ** 3
    assert st.holm(list(p)) == pytest.approx(list(multitest.multipletests(p, method="holm")[1]))


# Student's t


@pytest.mark.parametrize(
    ("q", "df", "t"),
    [(0.975, 1, 12.706205), (0.975, 9, 2.262157), (0.95, 5, 2.015048), (0.995, 29, 2.756386), (0.975, 120, 1.979930)],
)
def test_t_quantile_gives_the_printed_table(q, df, t):
    assert st.student_t_quantile(q, df) == pytest.approx(t, abs=1e-6)
    assert st.student_t_quantile(1 - q, df) == pytest.approx(-t, abs=1e-6)
    assert st.student_t_sf(t, df) == pytest.approx(1 - q, abs=1e-6)


def test_t_agrees_with_scipy_from_the_middle_to_the_far_tail():
    theirs = pytest.importorskip("scipy.stats").t
    for df in (1, 2, 3.5, 9, 48, 1000, 1e5):
        for q in (0.5, 0.6, 0.9, 0.975, 0.9999, 1 - 1e-9):
            assert st.student_t_quantile(q, df) == pytest.approx(theirs.ppf(q, df), rel=1e-8, abs=1e-12)
        for t in (-3.0, 0.0, 1e-9, 0.5, 2.0, 9.0, 400.0):
            assert st.student_t_sf(t, df) == pytest.approx(theirs.sf(t, df), rel=1e-8, abs=1e-300)
    assert st.student_t_sf(math.inf, 5) == 0.0


def test_paired_t_gives_students_own_sleep_example():
    """Student 1908; the figures are those of R's t.test(extra ~ group, paired = TRUE)."""
    mean, ci95, p = st.paired_t([1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4])
    assert mean == pytest.approx(1.58)
    assert ci95 == pytest.approx((0.7001142, 2.4598858), abs=1e-7)
    assert p == pytest.approx(0.002833, abs=5e-7)


def test_paired_t_needs_two_rows():
    with pytest.raises(ValueError, match="at least 2"):
        st.paired_t([0.3])


# Bootstrap and sign flips


def test_same_seed_gives_the_same_bytes_and_another_seed_does_not():
    d = np.random.default_rng(1).normal(0.1, 1, 80)
    assert st.bca_interval(d, seed=7) == st.bca_interval(d, seed=7) != st.bca_interval(d, seed=8)
    assert st.sign_flip_p(d, seed=7) == st.sign_flip_p(d, seed=7) != st.sign_flip_p(d, seed=8)
    assert st.compare(d * 0, d, seed=3) == st.compare(d * 0, d, seed=3)


def test_bca_of_symmetric_data_is_the_t_interval():
    half = np.abs(np.random.default_rng(2).normal(size=150))
    d = np.concatenate([half, -half])
    _, ci95, _ = st.paired_t(d)
    assert st.bca_interval(d, resamples=20_000) == pytest.approx(ci95, abs=0.03 * (ci95[1] - ci95[0]))


def test_bca_halves_ties_so_that_symmetric_steps_stay_symmetric():
    low, high = st.bca_interval([1] * 10 + [-1] * 10 + [0] * 40, resamples=20_000)
    assert low == pytest.approx(-high, abs=0.01)  # one step of such a mean is 1/60


def test_bca_reaches_further_to_the_long_tail():
    d = np.random.default_rng(3).exponential(size=60)
    low, high = st.bca_interval(d)
    assert high - d.mean() > 1.1 * (d.mean() - low)


def test_bca_agrees_with_scipy():
    scipy_stats = pytest.importorskip("scipy.stats")
    d = np.random.default_rng(4).exponential(size=70) - 0.8
    theirs = scipy_stats.bootstrap((d,), np.mean, n_resamples=20_000, rng=np.random.default_rng(5)).confidence_interval
    width = theirs.high - theirs.low
    assert st.bca_interval(d, resamples=20_000) == pytest.approx((theirs.low, theirs.high), abs=0.03 * width)


def test_sign_flips_are_counted_exactly_on_few_rows():
    assert st.sign_flip_p([1, 2, 3]) == 2 / 8  # only +++ and --- reach 6
    assert st.sign_flip_p([1, 1, -1]) == 1.0
    assert st.sign_flip_p([0.1, 0.2, -0.3, 0.4]) == 10 / 16  # |sum| >= .4; ties are ties in spite of rounding
    assert st.sign_flip_p([5.0]) == 1.0
    assert st.sign_flip_p([0, 0, 0]) == 1.0


def test_a_row_without_a_difference_has_no_sign_to_flip():
    assert st.sign_flip_p([1, 2, 3] + [0] * 500) == 2 / 8


def test_drawn_sign_flips_agree_with_counting_them_all():
    d = np.random.default_rng(6).normal(0.3, 1, 15)
    signs = np.array(list(itertools.product((1, -1), repeat=15)))
    exact = float(np.mean(np.abs(signs @ d) >= abs(d.sum()) - 1e-9))
    assert st.sign_flip_p(d) == pytest.approx(exact, abs=4 * math.sqrt(exact / 10_000))


def test_drawn_sign_flips_count_ties():
    """14 up, 6 down, all of one size: the sum reaches 8 where 14 or more signs agree, a binomial tail."""
    exact = 2 * sum(math.comb(20, count) for count in range(14, 21)) / 2**20
    d = [0.1 + 0.2] * 14 + [-0.3] * 6
    assert st.sign_flip_p(d) == pytest.approx(exact, abs=4 * math.sqrt(exact / 10_000))


def test_drawn_p_is_never_0():
    assert st.sign_flip_p([1.0] * 200, resamples=999) == 1 / 1000


# Rows that share a source


def test_rows_repeated_within_their_group_do_not_narrow_the_interval():
    rng = np.random.default_rng(7)
    for groups in (10, 40):
        d, names = rng.normal(0.2, 1, groups), [f"document {i}" for i in range(groups)]
        once = st.cluster_interval(d, names)
        fivefold = st.cluster_interval(np.repeat(d, 5), np.repeat(names, 5))
        assert fivefold[0] == pytest.approx(once[0])
        assert fivefold[1] == pytest.approx(once[1])
        assert fivefold[2] == pytest.approx(once[2])
        naive = st.compare(np.zeros(5 * groups), np.repeat(d, 5)).ci95
        assert naive[1] - naive[0] < 0.6 * (fivefold[1][1] - fivefold[1][0])


def test_groups_of_one_row_are_the_paired_t():
    d = np.random.default_rng(8).normal(size=12)
    for ours, theirs in zip(st.cluster_interval(d, range(12)), st.paired_t(d), strict=True):
        assert ours == pytest.approx(theirs)


def test_cluster_t_agrees_with_statsmodels_on_unequal_groups():
    regression = pytest.importorskip("statsmodels.regression.linear_model")
    rng = np.random.default_rng(9)
    groups = np.repeat(np.arange(12), rng.integers(1, 15, 12))
    d = rng.normal(size=12)[groups] + rng.normal(0.5, 1, len(groups))
    fit = regression.OLS(d, np.ones(len(d))).fit(cov_type="cluster", cov_kwds={"groups": groups}, use_t=True)
    mean, ci95, p = st.cluster_interval(d, groups)
    assert mean == pytest.approx(fit.params[0])
    assert ci95 == pytest.approx(tuple(fit.conf_int()[0]), rel=1e-9)
    assert p == pytest.approx(fit.pvalues[0], rel=1e-9)


def test_cluster_bootstrap_meets_cluster_t_where_one_takes_over_from_the_other(monkeypatch):
    rng = np.random.default_rng(10)
    groups = np.repeat(np.arange(60), 4)
    d = rng.normal(size=60)[groups] + rng.normal(0.3, 1, 240)
    drawn = st.cluster_interval(d, groups)
    monkeypatch.setattr(st, "BOOTSTRAP_CLUSTERS", 1000)
    by_t = st.cluster_interval(d, groups)
    assert drawn[1] == pytest.approx(by_t[1], abs=0.06 * (by_t[1][1] - by_t[1][0]))
    assert drawn[2] == pytest.approx(by_t[2], abs=0.02)


def test_cluster_interval_needs_two_groups():
    with pytest.raises(ValueError, match="at least 2 groups"):
        st.cluster_interval([0.1, 0.2], ["a", "a"])


def test_flips_shared_by_groups_are_covered_where_rows_alone_are_not():
    rng = np.random.default_rng(11)
    groups, held, held_by_rows = np.repeat(np.arange(30), 5), 0, 0
    for _ in range(200):
        shared = rng.random(150) < 0.7
        draw = np.where(shared, rng.random(30)[groups], rng.random(150))
        base, tuned = (draw < 0.02).astype(int), ((draw >= 0.02) & (draw < 0.07)).astype(int)
        low, high = st.compare(base, tuned, groups=groups).ci95
        held += low <= 0.03 <= high
        low, high = st.compare(base, tuned).ci95
        held_by_rows += low <= 0.03 <= high
    assert held / 200 >= 0.95 - 2 * math.sqrt(0.95 * 0.05 / 200)
    assert held_by_rows / 200 < 0.85


def test_grouping_never_makes_right_wrong_rows_more_certain_than_tango():
    rng = np.random.default_rng(12)
    for groups in (4, 12, 35):
        base, tuned = rng.integers(0, 2, 5 * groups), rng.integers(0, 2, 5 * groups)
        grouped, plain = st.compare(base, tuned, groups=np.arange(5 * groups) % groups), st.compare(base, tuned)
        assert grouped.ci95[0] <= plain.ci95[0] + 1e-12
        assert grouped.ci95[1] >= plain.ci95[1] - 1e-12
        assert grouped.p >= plain.p


def test_a_row_without_a_group_stands_alone():
    d = np.random.default_rng(13).normal(size=6)
    labelled = st.cluster_interval(d, ["a", "a", None, None, "b", "b"])
    assert labelled == st.cluster_interval(d, ["a", "a", "c", "d", "b", "b"])


# compare


@pytest.mark.parametrize(
    ("base", "tuned", "groups", "words"),
    [
        (*rows(5, 2, 30), None, "Tango score interval, mid-p McNemar"),
        (*rows(5, 2, 30), list(range(30)), "Tango score interval, mid-p McNemar"),
        (np.arange(49) / 49, np.cos(np.arange(49)), None, "paired t interval and test"),
        (np.arange(50) / 50, np.cos(np.arange(50)), None, "BCa bootstrap, sign flips"),
        (np.zeros(90), np.arange(90) % 9 == 0, None, "Tango score interval, mid-p McNemar"),
        (np.zeros(90), (np.arange(90) % 9 == 0) * 0.3, None, "wider of BCa bootstrap and t"),
        (np.arange(60) / 60, np.cos(np.arange(60)), np.arange(60) // 5, "cluster t over 12 groups"),
        (np.arange(60) / 60, np.cos(np.arange(60)), np.arange(60) // 2, "cluster bootstrap, sign flips by group"),
        (*rows(5, 2, 30), np.arange(30) // 3, "cluster t over 10 groups; at least Tango score interval"),
    ],
)
def test_compare_names_the_method_that_fits_the_rows(base, tuned, groups, words):
    assert st.compare(base, tuned, groups=groups).method.startswith(words)


def test_compare_of_right_wrong_rows_is_tango_and_midp():
    base, tuned = rows(62, 21, 500)
    paired = st.compare(base, tuned)
    assert (paired.n, paired.difference) == (500, pytest.approx(0.082))
    assert paired.tuned - paired.base == pytest.approx(paired.difference)
    assert paired.ci95 == st.tango_interval(62, 21, 500)
    assert paired.p == st.mcnemar_midp(62, 21)


def test_compare_mirrors_when_base_and_tuned_change_places():
    x, y = np.random.default_rng(14).normal(size=(2, 30))
    for base, tuned in (rows(9, 2, 40), (x, y)):
        there, back = st.compare(base, tuned), st.compare(tuned, base)
        assert back.ci95 == pytest.approx((-there.ci95[1], -there.ci95[0]))
        assert back.difference == pytest.approx(-there.difference)
        assert back.p == pytest.approx(there.p)


@pytest.mark.parametrize("n", [1, 2, 20, 80])
@pytest.mark.parametrize("kind", ["right/wrong", "scores", "grouped", "grouped right/wrong"])
def test_base_against_itself_is_exactly_0_with_p_exactly_1_and_still_unsure(n, kind):
    scores = np.random.default_rng(15).random(n) + np.arange(n)
    scores = np.arange(n) % 2 if "right/wrong" in kind else scores
    groups = np.arange(n) // 4 if "grouped" in kind else None
    paired = st.compare(scores, scores.copy(), groups=groups)
    assert paired.difference == 0.0
    assert paired.p == 1.0
    assert paired.ci95[0] == -paired.ci95[1]
    assert paired.ci95[1] > 0 or (n == 1 and kind in ("scores", "grouped"))  # one lone score has no range at all


def test_rows_that_all_gain_the_same_keep_an_interval_as_wide_as_tangos():
    """A {0, 1/2, 1} score that rises from 0 to 1 on all 20 rows is the right/wrong case with all rows fixed."""
    grouped = st.compare([0] * 20, [1] * 20, groups=[i // 2 for i in range(20)])
    assert grouped.ci95 == pytest.approx(st.tango_interval(10, 0, 10))
    halves = st.compare([0.0] * 20, [0.5] * 20)
    assert halves.ci95 == pytest.approx(tuple(end / 2 for end in st.tango_interval(20, 0, 20)))
    assert halves.p < 0.001
    assert st.compare([0.0] * 3, [0.5] * 3).p == 2 / 8


def test_one_group_or_one_row_shows_nothing():
    assert st.compare([0, 1, 0], [1, 1, 1], groups=["a", "a", "a"]).ci95 == (-1.0, 1.0)
    lone = st.compare([0.2], [0.8])
    assert lone.ci95 == pytest.approx((-0.6, 0.6))
    assert lone.p == 1.0


def test_few_differing_rows_get_the_wider_of_t_and_bca():
    d = np.where(np.arange(100) % 10 == 0, np.random.default_rng(16).normal(size=100), 0.0)
    low, high = st.compare(np.zeros(100), d).ci95
    for other in (st.paired_t(d)[1], st.bca_interval(d)):
        assert low <= other[0]
        assert high >= other[1]


@pytest.mark.parametrize(
    ("base", "tuned", "groups", "message"),
    [
        ([1, 0], [1], None, "base has 2 rows, tuned 1"),
        ([], [], None, "base has shape"),
        ([0.1, math.nan, 0.2], [0.1, 0.2, 0.3], None, r"base\[1\] is nan"),
        ([0.1, 0.2, 0.3], [0.1, 0.2, math.inf], None, r"tuned\[2\] is inf"),
        ([math.nan] * 7, [0.1] * 7, None, r"base\[4\] is nan and 2 more"),
        ([None, 1.0], [0.0, 1.0], None, r"base\[0\] is nan"),
        ([[0.1, 0.2]], [[0.1, 0.2]], None, r"base has shape \(1, 2\)"),
        ([0, 1, 1], [1, 1, 1], ["a", "b"], "groups has 2 labels for 3 rows"),
    ],
)
def test_compare_refuses_what_cannot_be_paired_and_names_the_place(base, tuned, groups, message):
    with pytest.raises(ValueError, match=message):
        st.compare(base, tuned, groups=groups)


@pytest.mark.parametrize(("n", "rate"), [(40, 0.1), (100, 0.05), (300, 0.1)])
def test_two_equally_good_models_differ_in_at_most_5_of_100_comparisons(n, rate):
    rng, runs = np.random.default_rng(17), 1000
    found_by_p = found_by_interval = 0
    for _ in range(runs):
        draw = rng.random(n)
        paired = st.compare(draw < rate, (draw >= rate) & (draw < 2 * rate))
        found_by_p += paired.p < 0.05
        found_by_interval += paired.ci95[0] > 0 or paired.ci95[1] < 0
    limit = 0.05 + 2 * math.sqrt(0.05 * 0.95 / runs)
    assert found_by_p / runs <= limit
    assert found_by_interval / runs <= limit


# Metrics that do not average


def test_pool_of_a_mean_agrees_with_compare():
    base, tuned = rows(60, 25, 300)
    pooled = st.paired_pool(base, tuned, lambda values: sum(values) / len(values))
    paired = st.compare(base, tuned)
    assert pooled.difference == pytest.approx(paired.difference)
    assert pooled.ci95 == pytest.approx(paired.ci95, abs=0.01)
    assert pooled.p == pytest.approx(paired.p, abs=0.002)


def test_pool_finds_a_planted_gain_in_f1_and_no_gain_in_itself():
    labels = [i % 3 == 0 for i in range(200)]
    base = [(label, label ^ (i % 4 == 0)) for i, label in enumerate(labels)]
    tuned = [(label, label ^ (i % 16 == 0)) for i, label in enumerate(labels)]
    paired = st.paired_pool(base, tuned, f1, resamples=300)
    assert (paired.base, paired.tuned) == (f1(base), f1(tuned))
    assert paired.difference == f1(tuned) - f1(base)
    assert 0 < paired.ci95[0] < paired.difference < paired.ci95[1]
    assert paired.p == 1 / 301
    assert paired == st.paired_pool(base, tuned, f1, resamples=300)
    itself = st.paired_pool(base, base, f1, resamples=100)
    assert (itself.difference, itself.p) == (0.0, 1.0)
    assert itself.ci95[0] == -itself.ci95[1] < 0


def test_pool_over_groups_is_less_certain_when_groups_repeat_rows():
    labels = np.random.default_rng(18).random(30) < 0.4
    base = [(bool(label), bool(label) ^ (i % 3 == 0)) for i, label in enumerate(labels) for _ in range(5)]
    tuned = [(bool(label), bool(label) ^ (i % 5 == 0)) for i, label in enumerate(labels) for _ in range(5)]
    plain = st.paired_pool(base, tuned, f1, resamples=300)
    grouped = st.paired_pool(base, tuned, f1, resamples=300, groups=[i // 5 for i in range(150)])
    assert grouped.ci95[1] - grouped.ci95[0] > 1.6 * (plain.ci95[1] - plain.ci95[0])
    assert grouped.p > 1.5 * plain.p


def test_pool_counts_draws_it_cannot_score_and_stops_when_they_are_most():
    base = [(1, 1), (1, 0)] + [(0, 0)] * 10
    tuned = [(1, 1), (1, 1)] + [(0, 0)] * 10
    assert "of 400 draws could not be scored" in st.paired_pool(base, tuned, f1, resamples=200).method

    def only_whole(values):
        return f1(values) if values in (base, tuned) else math.nan

    with pytest.raises(ValueError, match="could not be scored on"):
        st.paired_pool(base, tuned, only_whole, resamples=50)
    with pytest.raises(ValueError, match="nan for base"):
        st.paired_pool([(0, 0)], [(0, 0)], f1)
    with pytest.raises(ValueError, match="base has 12 rows, tuned 11"):
        st.paired_pool(base, tuned[1:], f1)


# What a test set could see


@pytest.mark.parametrize(
    ("discordant", "points"),
    [
        (0.05, [8.9, 6.3, 4.4, 2.8, 2.0, 1.4]),
        (0.10, [12.5, 8.9, 6.3, 4.0, 2.8, 2.0]),
        (0.20, [17.7, 12.5, 8.9, 5.6, 4.0, 2.8]),
    ],
)
def test_smallest_detectable_gives_table_1b(discordant, points):
    seen = [100 * st.smallest_detectable(n, discordant) for n in (50, 100, 200, 500, 1000, 2000)]
    assert seen == pytest.approx(points, abs=0.06)


def test_smallest_detectable_is_seen_with_the_power_it_promises():
    """Exact: over all numbers of differing rows, and of fixed ones among them, with the module's own test."""
    n, discordant = 200, 0.2
    fixed_share = (1 + st.smallest_detectable(n, discordant) / discordant) / 2
    power = 0.0
    for flips in range(15, 75):
        differing = math.comb(n, flips) * discordant**flips * (1 - discordant) ** (n - flips)
        for fixed in range(flips // 2, flips + 1):
            if st.mcnemar_midp(fixed, flips - fixed) < 0.05:
                chance = math.comb(flips, fixed) * fixed_share**fixed * (1 - fixed_share) ** (flips - fixed)
                power += differing * chance
    assert 0.78 <= power <= 0.85


def test_smallest_detectable_never_exceeds_the_whole():
    assert st.smallest_detectable(1, 0.5) == 1.0


def test_rows_needed_is_smallest_detectable_the_other_way_round():
    for n in (1, 15, 50, 100, 777, 2000):
        for discordant in (0.05, 0.1, 0.2, 1.0):
            if st.smallest_detectable(n, discordant) < 1:
                assert st.rows_needed(st.smallest_detectable(n, discordant), discordant) == n
    assert st.rows_needed(-0.04, 0.1) == st.rows_needed(0.04, 0.1) == 491  # 7.849 x .1 / .0016


def test_smallest_detectable_mean_agrees_with_statsmodels():
    weightstats = pytest.importorskip("statsmodels.stats.power")
    for n in (5, 20, 100, 1000):
        theirs = weightstats.TTestPower().solve_power(nobs=n, alpha=0.05, power=0.8)
        assert st.smallest_detectable_mean(n, sd=2.0) == pytest.approx(2 * theirs, rel=0.04 if n == 5 else 0.01)
    assert st.smallest_detectable_mean(1, sd=2.0) == math.inf


def test_power_refuses_what_has_no_answer():
    with pytest.raises(ValueError, match="discordant=0"):
        st.smallest_detectable(100, 0.0)
    with pytest.raises(ValueError, match="n=0"):
        st.smallest_detectable(0)
    with pytest.raises(ValueError, match="difference is 0"):
        st.rows_needed(0.0, 0.1)
