"""How an error falls with the number of training rows: error = a + b n^-c, or a line over log n where points are few.

Knows numbers only. Fitted by least squares, all sizes counting the same; c is looked for on a grid, and a (what no
amount of rows removes) and b are never below 0.

Cortes et al. 1993, NIPS 6:327 (the form, fitted to small sizes to foresee large ones); Hestness et al. 2017,
https://arxiv.org/abs/1712.00409 (c lies between 0.07 and 0.35 for large nets, up to 1 for simple ones).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

FEWEST_POINTS = 4  # one more than the curve has numbers
EXPONENTS = np.geomspace(0.05, 2.0, 60)


@dataclass(frozen=True)
class Curve:
    """kind: "power law", error = a + b (n / unit)^-c; or "log-linear", error = a - b log2(n / unit)."""

    kind: str
    unit: float  # the largest size fitted
    a: Floats  # (D,), one entry a fitted line
    b: Floats
    c: Floats

    def at(self, n: float) -> Floats:
        """The error expected after so many training rows."""
        if self.kind == "log-linear":
            return np.asarray(self.a - self.b * np.log2(n / self.unit))
        return np.asarray(self.a + self.b * (n / self.unit) ** -self.c)


def fit(sizes: Sequence[int], errors: Floats, floor: bool = True) -> Curve:
    """The best curve for each line of errors.

    errors: (D, S), measured at each of S sizes, 2 or more.   floor: False where an error may fall below 0, so that
    nothing is known of where it ends; then, and for fewer than 4 sizes, a line over log n.
    """
    n, unit = np.asarray(sizes, dtype=np.float64), float(max(sizes))
    lines = np.atleast_2d(np.asarray(errors, dtype=np.float64))
    if len(set(sizes)) < 2 or lines.shape[1] != len(n):
        raise ValueError(f"{lines.shape[1]} errors at sizes {list(sizes)}; expected one a size, 2 sizes or more.")
    if len(set(sizes)) < FEWEST_POINTS or not floor:
        a, slope = _line(np.log2(n / unit), lines)
        return Curve("log-linear", unit, a, -slope, np.zeros(len(lines)))
    tried = [_bounded(((n / unit) ** -c), lines) for c in EXPONENTS]
    misses = np.array([miss for _, _, miss in tried])
    best = misses.argmin(axis=0)
    own = np.arange(len(lines))
    a, b = (np.array([one[i] for one in tried])[best, own] for i in (0, 1))
    return Curve("power law", unit, a, b, EXPONENTS[best])


def _line(x: Floats, lines: Floats) -> tuple[Floats, Floats]:
    """(height at 0, slope) of the least-squares line through each row of `lines`."""
    centred = x - x.mean()
    slope = lines @ centred / (centred @ centred)
    return lines.mean(axis=1) - slope * x.mean(), slope


def _bounded(x: Floats, lines: Floats) -> tuple[Floats, Floats, Floats]:
    """Least squares a + b x with a, b >= 0, and the squares left over; at an edge the other one alone is fitted."""
    a, b = _line(x, lines)
    through_zero = lines @ x / (x @ x)
    a, b = np.where(a < 0, 0.0, a), np.where(a < 0, through_zero, b)
    a, b = np.where(b < 0, np.maximum(lines.mean(axis=1), 0.0), a), np.maximum(b, 0.0)
    misses = np.square(lines - a[:, None] - b[:, None] * x).sum(axis=1)
    return a, b, misses
