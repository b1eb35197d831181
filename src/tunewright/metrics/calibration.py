"""Does a confidence of 80% mean right in 80 of 100? Calibration error with the floor that chance alone shows.

Knows confidences and right or wrong; no model, no task. Everything drawn is seeded.

Naeini 2015, AAAI (expected calibration error); Vaicenavicius 2019, https://arxiv.org/abs/1902.06977 (a calibrated
model's error is not 0 on few rows: compare with draws from its own confidences); Guo 2017,
https://arxiv.org/abs/1706.04599 (temperature).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tunewright.metrics import statistics

Floats = npt.NDArray[np.float64]

BINS = 15  # of equal width, the usual number
DRAWS = 1000
POINT_ROWS = 20  # rows a point of the reliability curve stands for at the least
MOST_POINTS = 10
ANSWERED = tuple(tenth / 10 for tenth in range(1, 11))  # shares of rows that a model may answer by itself
COOLEST, HOTTEST = 0.05, 20.0  # temperatures looked through
BLOCK = 1 << 21  # numbers drawn at a time: 16 MB


def expected_error(confidence: Floats, right: Floats, bins: int = BINS) -> float:
    """Expected calibration error: |share right - mean confidence| by bin of equal width, weighted by its rows."""
    return float(_errors(confidence, right[None, :], bins)[0])


def _errors(confidence: Floats, right: Floats, bins: int) -> Floats:
    """The same for several outcomes of one set of confidences. right: (draws, rows)."""
    # a bin includes its upper edge; 0 falls into the first
    place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    order = np.argsort(place, kind="stable")
    starts = np.flatnonzero(np.diff(place[order], prepend=-1))
    sums = np.add.reduceat((right - confidence)[:, order], starts, axis=1)
    return np.asarray(np.abs(sums).sum(axis=1) / len(confidence))


def floor(confidence: Floats, draws: int = DRAWS, seed: int = 0, bins: int = BINS) -> Floats:
    """The errors that a perfectly calibrated model with these confidences shows, sorted: its rows are right by chance.

    At 100 rows and 15 bins they lie around 6 points, though nothing is wrong.
    """
    rng, rows = np.random.default_rng(seed), max(1, BLOCK // len(confidence))
    sizes = [min(rows, draws - start) for start in range(0, draws, rows)]
    found = [
        _errors(confidence, (rng.random((size, len(confidence))) < confidence).astype(float), bins) for size in sizes
    ]
    return np.sort(np.concatenate(found))


def curve(confidence: Floats, right: Floats) -> list[dict[str, Any]]:
    """Reliability: rows from least to most sure in parts of like size, each with its share right and interval.

    Rows that are equally sure stand in one part: a model that always says 55% is one point.
    """
    order = np.argsort(confidence, kind="stable")
    number = max(1, min(MOST_POINTS, len(order) // POINT_ROWS))
    edges = confidence[order][[len(order) * part // number for part in range(1, number)]]
    parts = [part for part in np.split(order, np.unique(np.searchsorted(confidence[order], edges))) if len(part)]
    return [
        {
            "confidence": float(confidence[rows].mean()), "right": float(right[rows].mean()), "n": len(rows),
            "ci95": list(statistics.wilson_interval(int(right[rows].sum()), len(rows))),
        }
        for rows in parts
    ]  # fmt: skip


def alone(confidence: Floats, right: Floats) -> list[dict[str, Any]]:
    """How many would be wrong if only the surest rows were answered, for each share in `ANSWERED`.

    Rows that are equally sure are answered together, so that a share may be larger than asked for. The intervals
    (Wilson) hold for all shares at once (Bonferroni): a reader may choose among them after seeing them.
    """
    n, falling = len(confidence), -np.sort(-confidence)
    level = 1 - 0.05 / len(ANSWERED)
    found = []
    for threshold in dict.fromkeys(float(falling[math.ceil(n * share - 1e-9) - 1]) for share in ANSWERED):
        answered = confidence >= threshold
        count, wrong = int(answered.sum()), int((answered & (right == 0)).sum())
        low, high = statistics.wilson_interval(wrong, count, level)
        found.append({"share": count / n, "threshold": threshold, "n": count, "wrong": wrong,
                      "error": wrong / count, "ci95": [low, high]})  # fmt: skip
    return found


# --------------------------------------------------------------------- temperature
def at_temperature(shares: Floats, temperature: float) -> Floats:
    """Probabilities as if all logits were divided by the temperature. shares: (rows, classes), rows sum to 1."""
    logits = np.log(np.maximum(shares, 1e-12)) / temperature
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))


def fit_temperature(shares: Floats, truth: Sequence[int]) -> float:
    """The temperature under which the right classes are likeliest; above 1: the model was too sure.

    shares: (rows, classes); truth: the right class of each row. The cost has one minimum: golden section on its log.
    """
    places = np.asarray(truth), np.arange(len(shares))

    def cost(log_temperature: float) -> float:
        chosen = at_temperature(shares, math.exp(log_temperature))[places[1], places[0]]
        return float(-np.log(np.maximum(chosen, 1e-300)).mean())

    low, high = math.log(COOLEST), math.log(HOTTEST)
    golden = (math.sqrt(5) - 1) / 2
    one, two = high - golden * (high - low), low + golden * (high - low)
    cost_one, cost_two = cost(one), cost(two)
    while high - low > 1e-4:
        if cost_one <= cost_two:
            high, two, cost_two = two, one, cost_one
            one = high - golden * (high - low)
            cost_one = cost(one)
        else:
            low, one, cost_one = one, two, cost_two
            two = low + golden * (high - low)
            cost_two = cost(two)
    return math.exp((low + high) / 2)
