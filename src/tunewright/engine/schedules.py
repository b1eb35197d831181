"""Learning-rate schedules as functions of the step. Knows nothing else, so that resume needs no schedule state."""

from __future__ import annotations

import math

CUT_FRACTION, RATIO = 0.1, 32  # of the slanted triangle, the paper's


def warmup_count(warmup: float, total: int) -> int:
    """Steps of warm-up: a count, or a share of all steps when below 1."""
    return min(total, round(warmup * total) if warmup < 1 else int(warmup))


def factor(kind: str, step: int, total: int, warmup: int) -> float:
    """What the rate is multiplied by in step `step` (the first is 0): up to 1 over the warm-up, then down to 0.

    kind: constant | linear | cosine | slanted_triangular.   Returns a number from 0 to 1; the first step of a warm-up
    is not 0. The slanted triangle has its own rise: a tenth of all steps, from 1/32 on (Howard and Ruder 2018, 3.2).
    """
    if kind == "slanted_triangular":
        cut = max(1, math.floor(total * CUT_FRACTION))
        share = step / cut if step < cut else 1 - (step - cut) / (cut * (1 / CUT_FRACTION - 1))
        return (1 + max(0.0, share) * (RATIO - 1)) / RATIO
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if kind == "constant":
        return 1.0
    progress = (step - warmup) / max(1, total - warmup)
    return 1.0 - progress if kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
