"""Learning-rate schedules as functions of the step. Knows nothing else, so that resume needs no schedule state."""

from __future__ import annotations

import math


def warmup_count(warmup: float, total: int) -> int:
    """Steps of warm-up: a count, or a share of all steps when below 1."""
    return min(total, round(warmup * total) if warmup < 1 else int(warmup))


def factor(kind: str, step: int, total: int, warmup: int) -> float:
    """What the rate is multiplied by in step `step` (the first is 0): up to 1 over the warm-up, then down to 0.

    kind: constant | linear | cosine.   Returns a number from 0 to 1; the first step of a warm-up is not 0.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if kind == "constant":
        return 1.0
    progress = (step - warmup) / max(1, total - warmup)
    return 1.0 - progress if kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
