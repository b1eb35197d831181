"""For whom did it get better? Base and tuned on the rows of each value of a named column, and the gap between them.

Two questions a group: did it change from base to tuned, and does the tuned model do otherwise there than on all other
rows. All questions are corrected together (Holm), so that in 19 of 20 runs without any true effect nothing is flagged.
Knows rows and scores, no model.

Fisher's exact test with mid-p: Fagerland, Lydersen, Laake 2017, "Statistical Analysis of Contingency Tables", ch. 4.
Welch 1947, Biometrika 34:28.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tunewright.contracts import Metric
from tunewright.metrics import statistics
from tunewright.runs.evidence.sides import NotRun, Sides

ABOUT = "groups of rows"
FEW_ROWS = 20  # a group below this is shown, and neither tested nor ranked: its interval is wider than any finding
MOST_GROUPS = 40  # of one column; a column with more values is no grouping
ALPHA = 0.05
DRAWS = 1000  # of shuffled group labels and of resampled rows

Floats = npt.NDArray[np.float64]


def measure(sides: Sides) -> dict[str, Any]:
    """Scores by group for each column of the recipe's `evaluate.groups`."""
    if not sides.groups:
        raise NotRun("no column named: evaluate.groups")
    metric = next((m for m in sides.task.metrics if m.pool is None), None)
    if metric is None or not sides.test:
        raise NotRun("no held-out rows" if not sides.test else "this task's metrics exist for all rows together only")
    base, tuned = (
        np.array([scores[metric.name] for scores in sides.scores(answers, sides.test)], dtype=np.float64)
        for answers in (sides.before, sides.after)
    )
    units = [value_of(r["extra"].get(sides.group)) or None for r in sides.test] if sides.group else None
    columns, left_out = [], []
    for column in sides.groups:
        values = [value_of(record["extra"].get(column)) for record in sides.test]
        if reason := _unfit(values):
            left_out.append({"column": column, "reason": reason})
        else:
            columns.append(by_group(column, values, base, tuned, metric, units, sides.seed))
    if not columns:
        raise NotRun("; ".join(f"{one['column']}: {one['reason']}" for one in left_out))
    num_tests = correct([group for column in columns for group in column["groups"]], metric.higher_is_better)
    return {
        "metric": metric.name, "higher_is_better": metric.higher_is_better, "proportion": metric.proportion,
        "n": len(base), "few_rows": FEW_ROWS, "tests": num_tests, "columns": columns, "left_out": left_out,
    }  # fmt: skip


def value_of(value: Any) -> str:
    """A group's name; "" for a row that has none."""
    return str(value).strip() if value is not None else ""


def _unfit(values: Sequence[str]) -> str:
    found = {value for value in values if value}
    if len(found) < 2:
        return f"{len(found)} value{'' if len(found) == 1 else 's'} in the held-out rows, so nothing to compare"
    if len(found) > MOST_GROUPS:
        return f"{len(found)} different values; a grouping has at most {MOST_GROUPS}"
    return ""


# ---------------------------------------------------------------------- one column
def by_group(
    column: str, values: Sequence[str], base: Floats, tuned: Floats, metric: Metric,
    units: Sequence[str | None] | None = None, seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Each group's scores, its change, and how it stands against the other rows; worst group and gap.

    units: what the rows came from (document, speaker); rows of one unit count as one for both questions, not for a
        side's own interval.
    """
    names = sorted(set(values) - {""})
    member = np.array([names.index(value) if value else -1 for value in values])
    known = member >= 0
    groups: list[dict[str, Any]] = []
    for index, name in enumerate(names):
        inside = member == index
        rows, others = np.flatnonzero(inside), np.flatnonzero(known & ~inside)
        paired = statistics.compare(
            base[rows], tuned[rows], groups=[units[int(i)] for i in rows] if units else None, seed=seed
        )
        groups.append({
            "value": name, "n": len(rows), "few": len(rows) < FEW_ROWS,
            "base": paired.base, "base_ci95": list(statistics.mean_interval(base[rows])),
            "tuned": paired.tuned, "tuned_ci95": list(statistics.mean_interval(tuned[rows])),
            "difference": paired.difference, "ci95": list(paired.ci95), "p": paired.p, "method": paired.method,
            "apart_p": apart(_draws(tuned, rows, units), _draws(tuned, others, units)),
            "rest": float(tuned[others].mean()),
        })  # fmt: skip
    ranked = [group for group in groups if not group["few"]]
    found = {"column": column, "groups": groups, "without": int((~known).sum())}
    if len(ranked) < 2:
        return found | {"gap": None, "worst": None}
    sign = 1.0 if metric.higher_is_better else -1.0
    worst = {side: min(ranked, key=lambda g: sign * g[side])["value"] for side in ("base", "tuned")}
    large = [index for index, group in enumerate(groups) if not group["few"]]
    return found | {"worst": worst, "gap": gap(member, large, base, tuned, seed)}


def _draws(scores: Floats, rows: npt.NDArray[np.int64], units: Sequence[str | None] | None) -> Floats:
    """The scores of these rows; where rows come from one unit, the mean of each unit: as many draws as there are."""
    if units is None:
        return scores[rows]
    by_unit: dict[object, list[float]] = {}
    for row in map(int, rows):
        by_unit.setdefault(units[row] if units[row] is not None else row, []).append(float(scores[row]))
    return np.array([sum(values) / len(values) for values in by_unit.values()])


def gap(member: npt.NDArray[np.int64], groups: Sequence[int], base: Floats, tuned: Floats, seed: int) -> dict[str, Any]:
    """Best group minus worst group, for base and tuned; what chance alone shows; how much it changed.

    Some gap always shows, so beside it stands the 95th percentile of gaps when group labels are shuffled. The
    interval of the change comes from rows drawn anew within each group.
    """
    kept = np.isin(member, groups)
    member, base, tuned = member[kept], base[kept], tuned[kept]
    rng = np.random.default_rng(seed)
    rows = [np.flatnonzero(member == group) for group in groups]
    sizes = [len(places) for places in rows]

    def reach(means: Floats) -> Floats:
        return np.asarray(np.ptp(means, axis=-1))

    def means(scores: Floats) -> Floats:
        return np.array([scores[places].mean() for places in rows])

    draws = max(100, min(DRAWS, 20_000_000 // len(member)))
    order = rng.permuted(np.broadcast_to(np.arange(len(member)), (draws, len(member))), axis=1)
    cuts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    chance = {side: reach(np.add.reduceat(scores[order], cuts, axis=1) / sizes)
              for side, scores in (("base", base), ("tuned", tuned))}  # fmt: skip
    change = np.empty((draws, 2, len(rows)))
    for index, places in enumerate(rows):
        drawn = places[rng.integers(0, len(places), size=(draws, len(places)))]
        change[:, 0, index], change[:, 1, index] = base[drawn].mean(axis=1), tuned[drawn].mean(axis=1)
    moved = reach(change[:, 1]) - reach(change[:, 0])
    before, after = float(reach(means(base))), float(reach(means(tuned)))
    return {
        "base": before, "tuned": after, "change": after - before,
        "ci95": [float(end) for end in np.quantile(moved, (0.025, 0.975))],
        "chance_p95": {side: float(np.quantile(values, 0.95)) for side, values in chance.items()},
        "method": f"rows drawn anew within groups, labels shuffled, {draws} draws each",
    }  # fmt: skip


# ------------------------------------------------------------------- many questions
def correct(groups: Sequence[dict[str, Any]], higher_is_better: bool) -> int:
    """Holm over all questions asked of groups that are large enough; writes p and finding into each. How many."""
    asked = [(group, key) for group in groups if not group["few"] for key in ("p", "apart_p")]
    for (group, key), p in zip(asked, statistics.holm([group[key] for group, key in asked]), strict=True):
        group[f"{key}_holm"] = p
    sign = 1.0 if higher_is_better else -1.0
    for group in groups:
        change = "" if group["few"] or group["p_holm"] > ALPHA else _way(sign * group["difference"])
        lag = "" if group["few"] or group["apart_p_holm"] > ALPHA else _way(sign * (group["tuned"] - group["rest"]))
        group |= {"changed": change, "stands": lag}
    return len(asked)


def _way(gain: float) -> str:
    return "better" if gain > 0 else "worse" if gain < 0 else ""


def apart(inside: Floats, outside: Floats) -> float:
    """Two-sided p for "these rows score like the others": Fisher's mid-p for right/wrong rows, Welch's t for others."""
    if not len(inside) or not len(outside):
        return 1.0
    both = np.concatenate([inside, outside])
    if np.isin(both, (0, 1)).all():
        return fisher_midp(int(inside.sum()), len(inside), int(outside.sum()), len(outside))
    if min(len(inside), len(outside)) < 2:
        return 1.0
    errors = [float(scores.var(ddof=1)) / len(scores) for scores in (inside, outside)]
    total = sum(errors)
    if total == 0:
        return float(inside.mean() == outside.mean())
    df = total**2 / sum(e**2 / (len(s) - 1) for e, s in zip(errors, (inside, outside), strict=True))
    return 2 * statistics.student_t_sf(abs(float(inside.mean() - outside.mean())) / math.sqrt(total), df)


def fisher_midp(right: int, n: int, other_right: int, other_n: int) -> float:
    """Two-sided mid-p of Fisher's exact test: is the share right of n another than other_right of other_n?

    Tables less likely than the one found count whole, those as likely half.
    """
    total = right + other_right
    low, high = max(0, total - other_n), min(n, total)
    logs = [_choose(n, k) + _choose(other_n, total - k) for k in range(low, high + 1)]
    found, most = logs[right - low], max(logs)
    weights = [math.exp(value - most) for value in logs]
    less = sum(w for w, value in zip(weights, logs, strict=True) if value < found - 1e-9)
    equal = sum(w for w, value in zip(weights, logs, strict=True) if abs(value - found) <= 1e-9)
    return min(1.0, (less + equal / 2) / sum(weights))


def _choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
