"""Which training rows pushed an answer, and which look mislabelled: products of features and errors of a last layer.

The gradient of the cross-entropy with respect to a linear last layer is the error times the feature, so the product of
two rows' gradients needs no backward pass: (e_i . e_j)(f_i . f_j). To first order, a small step on row i lowers the
loss of row j by the learning rate times that: TracIn at the last checkpoint, Pruthi 2020, arXiv 2002.08484. Knows
numbers alone. float64.
"""

from __future__ import annotations

import torch
from torch import Tensor


def errors(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Softmax minus one-hot, (N, C): the gradient of the cross-entropy with respect to the logits."""
    one_hot = torch.nn.functional.one_hot(labels, probabilities.shape[-1])
    return probabilities.double() - one_hot.double()


def products(features: Tensor, errors: Tensor, others: Tensor, their_errors: Tensor, *, bias: bool) -> Tensor:
    """Dot product of the last layer's gradients of every row with every other, (N, M).

    features (N, D) and errors (N, C) of one set, (M, D) and (M, C) of the other. bias: the layer has one, whose
    gradient is the error itself.
    """
    likeness = features.double() @ others.double().T + float(bias)
    return likeness * (errors.double() @ their_errors.double().T)


def cosines(features: Tensor, others: Tensor) -> Tensor:
    """How alike the layer sees every row and every other, (N, M), in [-1, 1]."""
    one, two = (torch.nn.functional.normalize(x.double(), dim=-1) for x in (features, others))
    return one @ two.T


def token_products(one: tuple[Tensor, Tensor], two: tuple[Tensor, Tensor], *, bias: bool) -> float:
    """The same for two texts, whose gradient is the sum over their tokens. Each: features (T, D), errors (T, V)."""
    return float(products(*one, *two, bias=bias).sum())
