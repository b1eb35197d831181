"""Texts against the expected text: exact match and ROUGE-L, per row. Knows strings only."""

from __future__ import annotations

import re

from tunewright.contracts import Metric

EXACT_MATCH = Metric("exact_match")
ROUGE_L = Metric("rougeL", proportion=False)
WORDS = re.compile(r"[^\W_]+")  # rouge-score keeps a-z0-9 only; the same on English, and other scripts are not lost


def exact_match(answer: str, truth: str) -> float:
    """1.0 where the texts are equal up to white space."""
    return float(answer.split() == truth.split())


def rouge_l(answer: str, truth: str) -> float:
    """F1 of the longest common subsequence of words, in lower case, without stemming; 0.0 where either has no word.

    Lin 2004, "ROUGE: a package for automatic evaluation of summaries", section 3, beta = 1.
    """
    one, two = WORDS.findall(answer.lower()), WORDS.findall(truth.lower())
    common = longest_common(one, two)
    return 2 * common / (len(one) + len(two)) if common else 0.0


def longest_common(one: list[str], two: list[str]) -> int:
    """Length of the longest common subsequence."""
    line = [0] * (len(two) + 1)
    for word in one:
        diagonal = 0
        for j, other in enumerate(two, 1):
            diagonal, line[j] = line[j], diagonal + 1 if word == other else max(line[j], line[j - 1])
    return line[-1]
