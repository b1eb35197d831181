"""How alike two models see the same inputs: linear CKA and shared neighbours of their vectors.

Vectors are (N, D), one an input, in the same order; D may differ. Knows numbers only. Everything is in float64 and
without chance, so that a set of vectors against itself gives exactly 1.

CKA: Kornblith et al. 2019, https://arxiv.org/abs/1905.00414, eq. 4 and section 3. Intervals: jackknife, Miller 1974.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tunewright.metrics.statistics import Interval, student_t_quantile

NEIGHBOURS = 10


def linear_cka(one: Tensor, two: Tensor) -> float:
    """Linear CKA in [0, 1]: 1 where one is a rotation and a scaling of the other. nan where all vectors are the same.

    one: (N, D), two: (N, E). Columns are centred here.
    """
    return _cka(_gram(one), _gram(two))


def cka_with_interval(one: Tensor, two: Tensor) -> tuple[float, Interval]:
    """Linear CKA and its 95% interval over inputs, by leaving out one input after the other; inside [0, 1]."""
    x, y = _gram(one), _gram(two)
    whole, n = _cka(x, y), len(x)
    without = _joint_without_one(x, y) / (_joint_without_one(x, x) * _joint_without_one(y, y)).sqrt()
    error = math.sqrt((n - 1) / n * float((without - without.mean()).square().sum()))
    half = student_t_quantile(0.975, n - 1) * error
    return whole, (max(0.0, whole - half), min(1.0, whole + half))


def _joint_without_one(x: Tensor, y: Tensor) -> Tensor:
    """sum of products of the two centred Gram matrices, (N,): with the i-th input left out of both."""
    n = len(x) - 1
    rows = [(g.sum(1) - g).fill_diagonal_(0.0) for g in (x, y)]  # (i, j): sum of row j without input i
    products = x * y
    whole = products.sum() - 2 * products.sum(1) + products.diagonal()
    totals = [g.sum() - 2 * g.sum(1) + g.diagonal() for g in (x, y)]
    return whole - 2 / n * (rows[0] * rows[1]).sum(1) + totals[0] * totals[1] / n**2


def _gram(vectors: Tensor) -> Tensor:
    """(N, N) products of the vectors."""
    if vectors.ndim != 2 or len(vectors) < 3:
        raise ValueError(f"vectors have shape {tuple(vectors.shape)}; expected (N, D) with at least 3 of them.")
    rows = vectors.double()
    rows = rows - rows.mean(0)  # nothing is lost by it, and large common parts do not eat digits
    return rows @ rows.T


def _centred(gram: Tensor) -> Tensor:
    return gram - gram.mean(0) - gram.mean(1, keepdim=True) + gram.mean()


def _cka(x: Tensor, y: Tensor) -> float:
    x, y = _centred(x), _centred(y)
    own = float((x * x).sum() * (y * y).sum())
    return float((x * y).sum()) / math.sqrt(own) if own > 0 else math.nan


def neighbour_overlap(one: Tensor, two: Tensor, k: int = NEIGHBOURS) -> list[float]:
    """Of each vector's k nearest others in the one set, the share that is nearest in the other too; by cosine."""
    if len(one) != len(two) or len(one) <= k:
        raise ValueError(f"{len(one)} and {len(two)} vectors: expected as many, and more than {k}.")
    first, second = _nearest(one, k), _nearest(two, k)
    return [len(set(a) & set(b)) / k for a, b in zip(first, second, strict=True)]


def _nearest(vectors: Tensor, k: int) -> list[list[int]]:
    length = torch.nn.functional.normalize(vectors.double(), dim=-1)
    likeness = length @ length.T
    likeness.fill_diagonal_(-math.inf)
    return likeness.topk(k, dim=-1).indices.tolist()
