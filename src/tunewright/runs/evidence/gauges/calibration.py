"""Can its confidence be trusted? Calibration of base and tuned on the held-out rows, and what one temperature mends.

A calibration error is never shown without the floor that chance alone gives at so few rows. Knows predictions that
carry `score` and rows that are right or wrong; no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tunewright.contracts import Prediction, Record
from tunewright.data.batches import derive_seed
from tunewright.metrics import calibration, statistics
from tunewright.metrics.calibration import Floats
from tunewright.runs.evidence.sides import NotRun, Sides

ABOUT = "how far its confidence can be trusted"
FEWEST_ROWS = 15  # as for a verdict
FITTING_ROWS = 500  # validation rows from which a temperature is read, at most


def measure(sides: Sides) -> dict[str, Any]:
    """Error with its floor, Brier score, too sure or not, curve; and all of it again after a temperature."""
    right = [_right(sides, answers) for answers in (sides.before, sides.after)]
    sure = [_confidences(answers) for answers in (sides.before, sides.after)]
    if len(sides.test) < FEWEST_ROWS:
        raise NotRun(f"{len(sides.test)} held-out rows are fewer than {FEWEST_ROWS}")
    found: dict[str, Any] = {"n": len(sides.test), "bins": calibration.BINS, "baseline": sides.baseline.name}
    found |= {
        side: one_side(c, r, sides.seed) | {"curve": calibration.curve(c, r), "alone": calibration.alone(c, r)}
        for side, c, r in zip(("base", "tuned"), sure, right, strict=True)
    }
    found["brier"] = _pair([(c - r) ** 2 for c, r in zip(sure, right, strict=True)], sides)
    found["too_sure"] = _pair([c - r for c, r in zip(sure, right, strict=True)], sides)
    try:
        found["temperature"] = temperature(sides)
    except NotRun as reason:
        found["temperature"] = {"not_run": str(reason)}
    return found


def one_side(confidence: Floats, right: Floats, seed: int) -> dict[str, Any]:
    """Error, its floor, and what is left above the floor's mean; `calibrated` where chance explains all of it."""
    error, floor = calibration.expected_error(confidence, right), calibration.floor(confidence, seed=seed)
    return {
        "ece": error, "floor_mean": float(floor.mean()), "floor_p95": float(np.quantile(floor, 0.95)),
        "above_floor": max(0.0, error - float(floor.mean())), "calibrated": bool(error <= np.quantile(floor, 0.95)),
        "confidence": float(confidence.mean()), "right": float(right.mean()),
    }  # fmt: skip


def _right(sides: Sides, answers: Sequence[Prediction]) -> Floats:
    """1.0 for every right row by the first metric that knows only right and wrong."""
    scores = sides.scores(answers, sides.test)
    for metric in sides.task.metrics:
        if metric.pool is None and metric.proportion and all(s.get(metric.name) in (0.0, 1.0) for s in scores):
            return np.array([s[metric.name] for s in scores], dtype=np.float64)
    raise NotRun("rows are not right or wrong here")


def _confidences(answers: Sequence[Prediction]) -> Floats:
    found = [answer.get("score") for answer in answers]
    if not found or not all(isinstance(score, int | float) and 0 <= score <= 1 for score in found):
        raise NotRun("the answers carry no confidence")
    return np.array(found, dtype=np.float64)


def _pair(costs: Sequence[Floats], sides: Sides) -> dict[str, Any]:
    """A cost of every row, of base and of tuned, with the interval of its difference."""
    units = [r["extra"].get(sides.group) for r in sides.test] if sides.group else None
    paired = statistics.compare(costs[0], costs[1], groups=units, seed=sides.seed)
    return {
        "n": paired.n, "base": paired.base, "tuned": paired.tuned, "difference": paired.difference,
        "ci95": list(paired.ci95), "p": paired.p, "method": paired.method,
    }  # fmt: skip


# --------------------------------------------------------------------- temperature
def temperature(sides: Sides) -> dict[str, Any]:
    """Read off validation rows, tried on the held-out ones, for base and tuned."""
    if sides.quick:
        raise NotRun("it needs a pass over validation rows, which was left out")
    if not sides.validation:
        raise NotRun("there are no validation rows to read it from: data.validation, or train.early_stopping_patience")
    rows = sorted(sides.validation, key=lambda r: derive_seed(sides.seed, "temperature", r["row"]))[:FITTING_ROWS]
    found: dict[str, Any] = {"n": len(rows)}
    answers = {"base": sides.baseline.predict(rows), "tuned": sides.answers(sides.tuned, rows)}
    for side, asked, held_out in (("base", answers["base"], sides.before), ("tuned", answers["tuned"], sides.after)):
        shares, truth = _shares(sides, asked, rows)
        if np.ptp(shares, axis=0).max() == 0:  # a baseline that always says the same has none
            continue
        fitted = calibration.fit_temperature(shares, truth)
        cooled = calibration.at_temperature(_shares(sides, held_out, sides.test)[0], fitted).max(axis=1)
        found[side] = {"value": fitted, **one_side(cooled, _right(sides, held_out), sides.seed)}
        found[side]["brier"] = float(((cooled - _right(sides, held_out)) ** 2).mean())
    return found


def _shares(sides: Sides, answers: Sequence[Prediction], rows: Sequence[Record]) -> tuple[Floats, list[int]]:
    """Probabilities of all classes (rows, classes), and the place of each right one."""
    names = list(answers[0].get("scores") or ())
    truths = [sides.task.truth(record) for record in rows]
    if not names or any(set(answer.get("scores") or ()) != set(names) for answer in answers):
        raise NotRun("the answers carry no probability for every class")
    if not all(truth in names for truth in truths):
        raise NotRun("a right answer is none of the classes")
    shares = np.array([[answer["scores"][name] for name in names] for answer in answers], dtype=np.float64)
    return shares, [names.index(str(truth)) for truth in truths]
