"""How often does the interval of the verdict hold the truth? The whole grid, n = 20 to 1,000, as a table for the docs.

    python benchmarks/coverage.py exact                 # right/wrong rows: every outcome counted, no draws; a minute
    python benchmarks/coverage.py drawn --sets 2000     # continuous scores: simulated sets of rows; half an hour

Knows metrics/statistics.py alone. The table stands in docs/what-the-verdict-means.md; tests/test_coverage.py holds
every cell of it at 93% or more.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from tunewright.metrics import statistics

SIZES = (20, 50, 100, 200, 500, 1000)
# shares of rows (broken, fixed): none better, a little better, much better, many flips both ways
RATES = (
    (0.01, 0.01), (0.01, 0.04), (0.02, 0.05), (0.05, 0.05), (0.05, 0.10), (0.02, 0.20), (0.10, 0.10), (0.05, 0.40),
    (0.20, 0.30),
)  # fmt: skip
FEW_ODDS = 1e-12  # outcomes rarer than this are left out: all of them together stay below 1e-6
Floats = npt.NDArray[np.float64]
Draw = Callable[[np.random.Generator, int], Floats]


# ------------------------------------------------------------- right and wrong rows
def exact(n: int, broken: float, fixed: float) -> float:
    """The chance that Tango's interval holds fixed - broken, summed over every outcome of n rows.

    For each number of broken rows the outcomes that hold the truth stand in one piece, as both ends of the interval
    rise with the number of fixed rows; its two ends are found by bisection.
    """
    truth = fixed - broken
    factorial = np.array([math.lgamma(count + 1) for count in range(n + 1)])
    total = 0.0
    for b in range(n + 1):
        counts = np.arange(n - b + 1)
        same = n - b - counts
        logs = factorial[n] - factorial[b] - factorial[counts] - factorial[same]
        logs = logs + b * math.log(broken) + counts * math.log(fixed) + same * math.log(1 - broken - fixed)
        likely = np.flatnonzero(logs > math.log(FEW_ODDS))
        if not likely.size:
            continue
        least, most = int(likely[0]), int(likely[-1])
        first = _first(least, most + 1, lambda f, b=b: statistics.tango_interval(f, b, n)[1] >= truth)
        last = _first(first, most + 1, lambda f, b=b: statistics.tango_interval(f, b, n)[0] > truth)
        total += float(np.exp(logs[first:last]).sum())
    return total


def _first(low: int, high: int, true: Callable[[int], bool]) -> int:
    """The first number from `low` on for which a fact that stays true is true; `high` where it never is."""
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if true(middle) else (middle + 1, high)
    return low


# ---------------------------------------------------------------- continuous scores
def _overlap(rng: np.random.Generator, n: int) -> Floats:
    """Scores in [0, 1] such as ROUGE-L: two related beta draws a row."""
    common = rng.beta(2, 3, n)
    return 0.5 * common + 0.5 * rng.beta(2.5, 3, n) - (0.5 * common + 0.5 * rng.beta(2, 3, n))


def _loss(rng: np.random.Generator, n: int) -> Floats:
    """Differences of losses: mostly small, some rows far off, on one side more."""
    return rng.gamma(2.0, 0.3, n) - rng.gamma(1.5, 0.3, n)


def _few(rng: np.random.Generator, n: int) -> Floats:
    """Most rows answered alike: four of ten differ."""
    return np.where(rng.random(n) < 0.4, rng.normal(0.1, 0.3, n), 0.0)


def _heavy(rng: np.random.Generator, n: int) -> Floats:
    """Tails heavier than the normal's, both sides alike (t, 4 degrees of freedom)."""
    return rng.standard_t(4, n) * 0.2 + 0.05


KINDS: dict[str, tuple[Draw, float]] = {
    "overlap": (_overlap, 0.5 * (2.5 / 5.5 - 0.4)), "loss": (_loss, 0.15), "few differ": (_few, 0.04),
    "heavy tails": (_heavy, 0.05),
}  # fmt: skip


def drawn(kind: str, n: int, sets: int, seed: int = 0) -> float:
    """In what share of simulated sets the interval that `compare` chooses holds the true mean difference."""
    draw, truth = KINDS[kind]
    rng = np.random.default_rng([seed, n, sorted(KINDS).index(kind)])
    held = 0
    for one in range(sets):
        low, high = statistics.compare(np.zeros(n), draw(rng, n), seed=one).ci95
        held += low <= truth <= high
    return held / sets


# ---------------------------------------------------------------------- the tables
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("exact", "drawn"))
    parser.add_argument("--sets", type=int, default=2000, help="simulated sets a cell")
    options = parser.parse_args()
    print(f"| {'broken, fixed' if options.what == 'exact' else 'differences'} | " + " | ".join(map(str, SIZES)) + " |")
    print("|---|" + "---:|" * len(SIZES))
    if options.what == "exact":
        for broken, fixed in RATES:
            cells = [f"{100 * exact(n, broken, fixed):.1f}" for n in SIZES]
            print(f"| {100 * broken:.0f} %, {100 * fixed:.0f} % | " + " | ".join(cells) + " |", flush=True)
    else:
        for kind in KINDS:
            cells = [f"{100 * drawn(kind, n, options.sets):.1f}" for n in SIZES]
            print(f"| {kind} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
