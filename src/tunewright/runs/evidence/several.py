"""One recipe, several seeds: what they have in common, how far apart they lie, and a verdict over rows and seeds.

Every run saw the same training rows and answered the same held-out rows, so the gain of a row can be averaged over the
runs. Its interval over rows and the t interval over runs are put together by metrics/combining.py. Knows scores and
measures, no folder.

Why the mean of several runs, and not the best: Bouthillier et al. 2021, https://arxiv.org/abs/2103.03098.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

from tunewright.contracts import Metric
from tunewright.metrics import statistics
from tunewright.metrics.combining import Estimate, over_runs, rows_and_runs
from tunewright.runs.evidence.verdict import verdict

Rows = Sequence[Any]  # one metric of one run, row by row, as `Task.score` gave it
BOTH = "mean of the runs row by row; over runs Student's t; the squares of both half-widths added"


def measure(
    metric: Metric, base: Sequence[Rows], tuned: Sequence[Rows], groups: Sequence[object] | None, seed: int = 0
) -> dict[str, Any]:
    """One metric over all runs, in the form of evidence.json's measures; `ci95` covers other rows and other seeds.

    base, tuned: by run, the same rows in the same order.
    rows_ci95: over rows, for these runs.   runs: gain of each, their mean's t interval, least and most.
    """
    if metric.pool:
        pool = metric.pool
        rows = statistics.paired_pool(_columns(base), _columns(tuned), _mean_of(pool), seed=seed, groups=groups)
        gains = [pool(t) - pool(b) for b, t in zip(base, tuned, strict=True)]
    else:
        before, after = np.array(base, dtype=np.float64), np.array(tuned, dtype=np.float64)
        rows = statistics.compare(_even(before), _even(after), groups=groups, seed=seed)
        gains = [float(gain) for gain in (after - before).mean(axis=1)]
    runs = over_runs(gains)
    both = rows_and_runs(rows.ci95, runs)
    return {
        "name": metric.name, "about": "task", "n": rows.n, "base": rows.base, "tuned": rows.tuned,
        "difference": rows.difference, "ci95": [both.low, both.high], "p": p_of(both),
        "higher_is_better": metric.higher_is_better, "proportion": metric.proportion,
        "method": f"{rows.method}; {BOTH}", "rows_ci95": list(rows.ci95),
        "runs": {"gains": gains, "ci95": [runs.low, runs.high], "least": min(gains), "most": max(gains)},
    }  # fmt: skip


def _even(scores: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The mean over runs; where all runs agree exactly their value, so that right and wrong stay 1 and 0."""
    return np.where(np.ptp(scores, axis=0) == 0, scores[0], scores.mean(axis=0))


def _columns(runs: Sequence[Rows]) -> list[tuple[Any, ...]]:
    return list(zip(*runs, strict=True))


def _mean_of(pool: Callable[[Sequence[Any]], float]) -> Callable[[Sequence[Any]], float]:
    """A metric over all rows, of each run, then their mean."""
    return lambda rows: sum(pool(list(run)) for run in zip(*rows, strict=True)) / len(rows[0])


def p_of(estimate: Estimate) -> float:
    """The two-sided p that agrees with a 95% interval: above 0.05 exactly where the interval holds 0."""
    reach = estimate.value - estimate.low if estimate.value > 0 else estimate.high - estimate.value
    if reach == 0 or estimate.value == 0:
        return float(estimate.value == 0)
    return math.erfc(abs(estimate.value) / reach * NormalDist().inv_cdf(0.975) / math.sqrt(2))


def agreement(base: Sequence[Rows], tuned: Sequence[Rows]) -> dict[str, Any]:
    """On how many rows all runs are right, or all wrong; which flips they share. Rows are right (1) or wrong (0)."""
    before, after = np.array(base, dtype=np.float64), np.array(tuned, dtype=np.float64)
    if not np.isin(np.concatenate([before, after]), (0.0, 1.0)).all():
        return {"not_run": "rows are not right or wrong here"}
    fixed, broken = after > before, after < before
    agree = int((np.ptp(after, axis=0) == 0).sum())
    return {
        "n": before.shape[1], "agree": agree, "agree_ci95": list(statistics.wilson_interval(agree, before.shape[1])),
        "fixed_by_all": int(fixed.all(axis=0).sum()), "fixed_by_some": int(fixed.any(axis=0).sum()),
        "broken_by_all": int(broken.all(axis=0).sum()), "broken_by_some": int(broken.any(axis=0).sum()),
    }  # fmt: skip


def judged(measures: Sequence[dict[str, Any]], seeds: Sequence[int], margin: float) -> dict[str, Any]:
    """The verdict of evidence/verdict.py over rows and seeds, and its sentence."""
    first = next((m for m in measures if m["about"] == "task"), None)
    kept: dict[str, dict[str, Any]] = {}
    for m in measures:
        if m["about"] == "general":
            kept.setdefault(m["set"], m)
    result = verdict(first, None, margin, [], general=list(kept.values()))
    sentence = result["sentence"]
    sentence = f"Over {len(seeds)} seeds, {sentence[:1].lower()}{sentence[1:]}"
    if first is not None and result["answer"] != "no verdict":
        sentence += f" The interval covers other rows and other seeds; the runs gave {each(first)}."
        if result["answer"] == "can't tell" and _width(first["runs"]["ci95"]) > _width(first["rows_ci95"]):
            sentence += " Seeds differ more here than rows do: more seeds, or a steadier recipe, would settle more."
    return result | {"sentence": sentence}


def _width(interval: Sequence[float]) -> float:
    return interval[1] - interval[0]


def each(measure: dict[str, Any]) -> str:
    """`+20.1, +21.4 and +22.0 points`: the gain of each run."""
    points = measure["proportion"]
    shown = [f"{100 * gain:+.1f}" if points else f"{gain:+.3g}" for gain in measure["runs"]["gains"]]
    return f"{', '.join(shown[:-1])} and {shown[-1]}" + (" points" if points else "")
