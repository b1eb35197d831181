"""Metrics of single-label classification: accuracy, macro F1, log loss. Knows predictions, not models."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from tunewright.contracts import Metric, Prediction


def macro_f1(pairs: Sequence[Sequence[str]]) -> float:
    """Unweighted mean of the F1 of every class that occurs as truth or as answer.

    pairs: (truth, answer) of each row. As scikit-learn's f1_score(average="macro").
    """
    truths, answers = Counter(t for t, _ in pairs), Counter(a for _, a in pairs)
    right = Counter(t for t, a in pairs if t == a)
    classes = truths | answers
    return sum(2 * right[name] / (truths[name] + answers[name]) for name in classes) / len(classes)


ACCURACY = Metric("accuracy")
MACRO_F1 = Metric("macro_f1", pool=macro_f1)
LOG_LOSS = Metric("log_loss", higher_is_better=False, proportion=False)
SMALLEST = 1e-12  # a probability of 0 would cost infinitely much


def score_class(prediction: Prediction, truth: str) -> dict[str, Any]:
    """The three metrics of one row, as their `pool` or mean wants them."""
    return {
        "accuracy": float(prediction["label"] == truth),
        "macro_f1": (truth, prediction["label"]),
        "log_loss": -math.log(max(prediction["scores"].get(truth, 0.0), SMALLEST)),
    }
