"""The interval of the verdict holds the truth in 93 of 100 sets or more, in every cell from 20 to 1,000 rows."""

from __future__ import annotations

import importlib.util
import itertools
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from tunewright.metrics import statistics

ROOT = Path(__file__).parents[1]


def script():
    spec = importlib.util.spec_from_file_location("coverage_grid", ROOT / "benchmarks" / "coverage.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["coverage_grid"] = module
    spec.loader.exec_module(module)
    return module


grid = script()


def test_the_grid_reaches_from_20_to_1000_rows():
    assert grid.SIZES == (20, 50, 100, 200, 500, 1000)
    assert len(grid.RATES) >= 9
    assert len(grid.KINDS) >= 4


@pytest.mark.parametrize("n", grid.SIZES)
def test_the_interval_of_flips_covers_in_every_cell(n):
    for broken, fixed in grid.RATES:
        assert grid.exact(n, broken, fixed) >= 0.93, (broken, fixed)


def test_the_count_of_outcomes_is_the_one_by_hand():
    """All outcomes of 12 rows, one after the other: no bisection, no logarithms."""
    n, broken, fixed = 12, 0.1, 0.25
    covered = 0.0
    for b, f in itertools.product(range(n + 1), repeat=2):
        if b + f <= n:
            ways = math.comb(n, b) * math.comb(n - b, f)
            low, high = statistics.tango_interval(f, b, n)
            chance = ways * broken**b * fixed**f * (1 - broken - fixed) ** (n - b - f)
            covered += chance * (low <= fixed - broken <= high)
    assert grid.exact(n, broken, fixed) == pytest.approx(covered, abs=1e-9)


def test_an_interval_too_narrow_would_be_caught(monkeypatch):
    """The same grid with the usual Wald interval, which is known to cover too seldom."""

    def wald(fixed, broken, n, level=0.95):
        mean = (fixed - broken) / n
        half = 1.96 * math.sqrt(max((fixed + broken) / n - mean**2, 0) / n)
        return mean - half, mean + half

    monkeypatch.setattr(grid.statistics, "tango_interval", wald)
    assert grid.exact(20, 0.02, 0.05) < 0.85


@pytest.mark.parametrize("kind", grid.KINDS)
def test_the_true_difference_of_each_kind_is_its_mean(kind):
    draw, truth = grid.KINDS[kind]
    d = draw(np.random.default_rng(1), 400_000)
    assert d.mean() == pytest.approx(truth, abs=4 * d.std() / math.sqrt(len(d)))


@pytest.mark.parametrize("kind", grid.KINDS)
def test_the_interval_of_scores_covers_at_20_rows(kind):
    """2,000 sets: three standard errors of a share of 95% are 1.5 points."""
    assert grid.drawn(kind, 20, 2000, seed=7) >= 0.93 - 0.015


@pytest.mark.slow
@pytest.mark.parametrize("n", [n for n in grid.SIZES if n > 20])
@pytest.mark.parametrize("kind", grid.KINDS)
def test_the_interval_of_scores_covers_in_every_cell(kind, n):
    assert grid.drawn(kind, n, 1000, seed=7) >= 0.93 - 0.02


def test_the_published_table_is_what_the_script_says():
    """Its first two columns, counted again."""
    text = (ROOT / "docs" / "what-the-verdict-means.md").read_text(encoding="utf-8")
    lines = re.findall(r"^\| (\d+) %, (\d+) % \| ([\d. |]+) \|$", text, flags=re.M)
    assert len(lines) == len(grid.RATES)
    for broken, fixed, cells in lines:
        shown = [float(cell) for cell in cells.split("|")]
        assert len(shown) == len(grid.SIZES)
        assert min(shown) >= 93
        for n, value in zip(grid.SIZES[:2], shown, strict=False):
            assert round(100 * grid.exact(n, int(broken) / 100, int(fixed) / 100), 1) == value
