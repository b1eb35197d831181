"""Does it do better on rows it trained on than on others? The gap of both models, and how much of it training made.

Training rows can be easier or harder than held-out ones, so a gap alone says little: the base never saw either, and its
gap on the same rows is what such rows differ by. What is left is the gain on training rows minus the gain on held-out
rows. Knows rows and scores, no model and no method.

Intervals: each side's own (Wilson, t, Tango, BCa), put together for different rows as in metrics/combining.py
(Newcombe 1998, Stat. Med. 17:873; Zou and Donner 2008, Stat. Med. 27:1693).
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tunewright.contracts import Metric, Prediction, Record
from tunewright.data.batches import derive_seed
from tunewright.metrics import statistics
from tunewright.metrics.combining import Estimate, apart
from tunewright.runs.evidence.sides import NotRun, Sides

PASSES = True
ABOUT = "overfitting"
FEWEST_ROWS = 15  # as for a verdict

Floats = npt.NDArray[np.float64]
Answered = tuple[Sequence[Record], Sequence[Prediction], Sequence[Prediction]]  # rows, base's answers, tuned answers


def measure(sides: Sides) -> dict[str, Any]:
    """Scores of base and tuned on training, validation and held-out rows; each gap to the held-out rows."""
    if sides.quick:
        raise NotRun("it needs a pass over training rows, which was left out")
    metric = next((m for m in sides.task.metrics if m.pool is None), None)
    if metric is None:
        raise NotRun("this task's metrics exist for all rows together only")
    if min(len(sides.test), len(sides.training)) < FEWEST_ROWS:
        few = min((len(sides.test), "held-out"), (len(sides.training), "training"))
        raise NotRun(f"{few[0]} {few[1]} rows are fewer than {FEWEST_ROWS}")
    sets: dict[str, Answered] = {"test": (sides.test, sides.before, sides.after)}
    most = max(FEWEST_ROWS, sides.affordable(2, sides.training))
    for name, records in (("train", sides.training), ("validation", sides.validation)):
        rows = drawn(records, min(len(sides.test), most), sides.seed)
        if len(rows) >= FEWEST_ROWS:
            sets[name] = rows, *_asked(sides, rows, validating=metric == sides.task.metrics[0])
    scored = {name: _scored(sides, metric, answered) for name, answered in sets.items()}
    found: dict[str, Any] = {
        "metric": metric.name, "higher_is_better": metric.higher_is_better, "proportion": metric.proportion,
        "baseline": sides.baseline.name,
        "sets": [
            {"set": name, "of": len(records)} | one_set(*scored[name], sides.seed)
            for name, records in (("train", sides.training), ("validation", sides.validation), ("test", sides.test))
            if name in scored
        ],
    }  # fmt: skip
    sign = 1.0 if metric.higher_is_better else -1.0
    found["gaps"] = {name: gaps(scored[name], scored["test"], sign, sides.seed) for name in scored if name != "test"}
    found["drawn"] = "by row id, as many as there are held-out rows" + (
        "" if most >= len(sides.test) else f"; {most} at most, to keep the time within bounds"
    )
    return found | {"sentence": sentence(found)}


def _asked(sides: Sides, rows: Sequence[Record], validating: bool) -> tuple[list[Prediction], list[Prediction]]:
    """Base and tuned on rows not asked about before; where only the first metric is read, no more than that."""
    tuned = sides.answers(sides.tuned, rows, validating)
    return sides.baseline.predict(rows) if sides.base is None else sides.answers(sides.base, rows, validating), tuned


def drawn(records: Sequence[Record], count: int, seed: int) -> list[Record]:
    """So many of the rows, the same ones each time."""
    return heapq.nsmallest(count, records, key=lambda r: derive_seed(seed, "overfitting", r["row"]))


def _scored(sides: Sides, metric: Metric, answered: Answered) -> tuple[Floats, Floats, list[str | None] | None]:
    """Base's scores, tuned scores, and what each row came from."""
    rows, before, after = answered
    base, tuned = (
        np.array([scores[metric.name] for scores in sides.scores(answers, rows)], dtype=np.float64)
        for answers in (before, after)
    )
    units = [r["extra"].get(sides.group) for r in rows] if sides.group else None
    return base, tuned, [str(u) if u not in (None, "") else None for u in units] if units else None


Scored = tuple[Floats, Floats, "list[str | None] | None"]


# ------------------------------------------------------------------------ intervals
def one_set(base: Floats, tuned: Floats, units: list[str | None] | None, seed: int) -> dict[str, Any]:
    """Both models on the rows of one set."""
    sides = {"base": mean(base, units), "tuned": mean(tuned, units)}
    return {"n": len(base)} | {
        key: value for side, e in sides.items() for key, value in ((side, e.value), (f"{side}_ci95", [e.low, e.high]))
    }


def gaps(train: Scored, test: Scored, sign: float, seed: int) -> dict[str, Any]:
    """How much better than on held-out rows: tuned, base, and what training added (gain there minus gain here).

    sign: -1.0 where lower scores are better; above 0 always means better on the first rows.
    """
    found = {
        "tuned": apart(_turned(mean(train[1], train[2]), sign), _turned(mean(test[1], test[2]), sign)),
        "base": apart(_turned(mean(train[0], train[2]), sign), _turned(mean(test[0], test[2]), sign)),
        "added": apart(_turned(gain(*train, seed), sign), _turned(gain(*test, seed), sign)),
    }
    return {name: {"difference": e.value, "ci95": [e.low, e.high]} for name, e in found.items()}


def mean(scores: Floats, units: list[str | None] | None) -> Estimate:
    """A model's mean score; where rows share a source never more certain than by sources."""
    low, high = statistics.mean_interval(scores)
    keys = [unit if unit is not None else i for i, unit in enumerate(units or ())]
    if 1 < len(set(keys)) < len(keys):
        _, (left, right), _ = statistics.cluster_interval(scores, keys)
        low, high = min(low, left), max(high, right)
    return Estimate(float(scores.mean()), low, high)


def gain(base: Floats, tuned: Floats, units: list[str | None] | None, seed: int) -> Estimate:
    paired = statistics.compare(base, tuned, groups=units, seed=seed)
    return Estimate(paired.difference, *paired.ci95)


def _turned(estimate: Estimate, sign: float) -> Estimate:
    low, high = sorted((sign * estimate.low, sign * estimate.high))
    return Estimate(sign * estimate.value, low, high)


# ----------------------------------------------------------------------------- words
def sentence(found: dict[str, Any]) -> str:
    """What the gap is, what the base's is, and whether training made the difference."""
    train = found["gaps"]["train"]
    points = found["proportion"]
    name = found["metric"].replace("_", " ")
    before = "the base" if found["baseline"] == "base" else f"the baseline ({found['baseline']})"
    base, added = (_said(train[key], points) for key in ("base", "added"))
    what = "" if points else f" in {name}"
    reach = _said(train["tuned"], points).partition(", ")[2]
    opening = f"It does {_way(train['tuned'], points)}{what} on rows it trained on than on held-out ones ({reach}); "
    opening += f"{before} on the same rows: {base}. "
    low, high = train["added"]["ci95"]
    if low > 0:
        return f"{opening}Beyond that, training made a gap of {added}."
    if high < 0:
        return f"{opening}Training narrowed the gap: {added}."
    return f"{opening}That training made a gap is not shown: {added}."


def _way(gap: dict[str, Any], points: bool) -> str:
    size = abs(gap["difference"])
    shown = f"{100 * size:.1f} points" if points else f"{size:.3g}"
    return f"{shown} {'better' if gap['difference'] >= 0 else 'worse'}"


def _said(gap: dict[str, Any], points: bool) -> str:
    unit = " points" if points else ""
    value, low, high = (f"{100 * v:+.1f}" if points else f"{v:+.3g}" for v in (gap["difference"], *gap["ci95"]))
    return f"{value}{unit}, 95% interval {low} to {high}"
