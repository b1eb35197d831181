"""Which training rows pushed an answer, and which look mislabelled: products of features and errors of a last layer.

The gradient of the cross-entropy with respect to a linear last layer is the error times the feature, so the product of
two rows' gradients needs no backward pass: (e_i . e_j)(f_i . f_j). To first order, a small step on row i lowers the
loss of row j by the learning rate times that: TracIn at the last checkpoint, Pruthi 2020, arXiv 2002.08484.

That product alone names the same few rows for every answer: those of largest error, seen along the one direction that a
tuned layer mostly uses. So features are whitened (the layer's own curvature: Koh and Liang 2017, arXiv 1703.04730) and
a row's size is divided out (RelatIF: Barshan 2020, arXiv 2003.11630). Knows numbers alone. float64.
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


def whitened(features: Tensor, others: Tensor, damping: float = 0.1) -> tuple[Tensor, Tensor]:
    """Both sets, centred and turned so that the first, (N, D), spreads alike in all directions; products of the results
    are products under the inverse covariance.

    damping: added to every variance, as a share of the mean one, so that directions without data do not blow up.
    """
    mean = features.double().mean(0)
    one, two = features.double() - mean, others.double() - mean
    variances, directions = torch.linalg.eigh(one.T @ one / len(one))
    spread = (variances.clamp(min=0) + damping * variances.mean()).clamp(min=torch.finfo(torch.float64).tiny).sqrt()
    return one @ directions / spread, two @ directions / spread


def pushes(features: Tensor, errors: Tensor, others: Tensor, their_errors: Tensor) -> Tensor:
    """How far a step on each row of the first set lowers the loss of each of the other, (N, M), sizes divided out.

    The cosine of their gradients in whitened features: 1 pushes exactly there, -1 exactly away, 0 does nothing.
    """
    one, two = whitened(features, others)
    normal = torch.nn.functional.normalize
    given, asked = (normal(e.double(), dim=-1) for e in (errors, their_errors))
    return products(normal(one, dim=-1), given, normal(two, dim=-1), asked, bias=False)


def left_out(features: Tensor, labels: Tensor, classes: int) -> Tensor:
    """What all other rows say about each one's own label, (N,): the lower, the more suspect that label is.

    A ridge regression on whitened features with the row left out, in closed form from the hat matrix (Allen 1974,
    PRESS): its output for the label, minus what guessing gives.
    """
    n, wanted = len(features), torch.nn.functional.one_hot(labels, classes).double()
    wanted = wanted - wanted.mean(0)
    white, _ = whitened(features, features)
    hat = (white @ white.T + 1) / n
    own = hat.diagonal().unsqueeze(1).clamp(max=1 - 1e-9)
    said = (hat @ wanted - own * wanted) / (1 - own)
    return said.gather(1, labels.unsqueeze(1)).squeeze(1)


def token_products(one: tuple[Tensor, Tensor], two: tuple[Tensor, Tensor], *, bias: bool) -> float:
    """`products` for two texts, whose gradient is the sum over their tokens. Each: features (T, D), errors (T, V)."""
    return float(products(*one, *two, bias=bias).sum())
