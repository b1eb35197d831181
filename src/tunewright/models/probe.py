"""A linear head solved instead of stepped: the trunk runs once, then L2-regularised logistic regression (LBFGS).

The optimum is the same whatever the order of rows. Knows tasks as contracts and heads as linear layers; not which
method asks.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tunewright.contracts import Batch, Loaded, Task
from tunewright.models.places import whole_head

# C, as scikit-learn spells it: large trusts the rows, small the prior
STRENGTHS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
FOLDS = 5
PRECISE, CHOOSING = 1e-7, 1e-5  # the largest slope left in the head that is kept, and in those that only choose C


def solve_head(model: nn.Module, task: Task, loaded: Loaded, batches: Iterable[Batch]) -> str | None:
    """Put the optimum into the one linear layer that is the head, and say how; None where there is no such layer.

    The head is what trains of `model`, or else `loaded.fresh` or the layout's head.
    """
    layer = _head_layer(model, loaded)
    if layer is None:
        return None
    found = _features(model, layer, task, loaded, batches)
    if found is None:
        return None
    features, labels, weights = found
    strength, scores = _choose_strength(features, labels, weights, layer.out_features)
    weight, bias = solve(features, labels, weights, layer.out_features, strength)
    layer.weight.data.copy_(weight.to(layer.weight))
    layer.bias.data.copy_(bias.to(layer.bias))
    tried = f"{len(scores)} values, {scores[strength]:.3f} the lowest"
    return (
        f"The head was solved on {len(labels)} rows of cached features (LBFGS, L2, C = {strength:g} by "
        f"{FOLDS}-fold cross-validated log loss, {tried})"
    )


def _head_layer(model: nn.Module, loaded: Loaded) -> nn.Linear | None:
    """The linear layer that is all of the head. A new pooler before it is no part of a linear head."""
    places = whole_head(loaded)
    layers = [
        module
        for place in places
        for name, module in model.get_submodule(place).named_modules()
        if any(True for _ in module.parameters(recurse=False))
    ]
    layer = layers[0] if len(layers) == 1 else None
    return layer if isinstance(layer, nn.Linear) and layer.bias is not None else None


def _features(
    model: nn.Module, layer: nn.Module, task: Task, loaded: Loaded, batches: Iterable[Batch]
) -> tuple[Tensor, Tensor, Tensor] | None:
    """What reaches the head, by row: (N, D), labels (N,), weights (N,). None if it is not one vector a row."""
    inputs: list[Tensor] = []
    rows: list[Tensor] = []
    labels, weights = [], []
    handle = layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    model.eval()  # dropout in a cached feature would be noise learnt by heart
    try:
        with torch.inference_mode():
            for batch in batches:
                if "labels" not in batch or batch["labels"].ndim != 1:
                    return None
                inputs.clear()
                task.predict(model, batch, loaded)
                if len(inputs) != 1 or inputs[0].ndim != 2:
                    return None
                rows.append(inputs[0].float().cpu())
                labels.append(batch["labels"].cpu())
                weights.append(batch["weights"].cpu())
    finally:
        handle.remove()
    # float64: the optimum is found to more digits than float32 keeps, so that the order of rows does not show
    return torch.cat(rows).double(), torch.cat(labels), torch.cat(weights).double()


@dataclass(frozen=True)
class _Rotated:
    """Features of unit variance along their principal axes: the penalty is what it was, and the slopes are even.

    W of the scaled features is `turned.T @ V`: a rotation leaves |W| alone. Axes along which no row differs are left
    out: the penalty holds the optimum at 0 there.
    """

    rows: Tensor  # (N, R)
    turned: Tensor  # (D, R)
    spread: Tensor  # (R,) variance along each axis
    mean: Tensor  # (D,) of the features as they came
    scale: Tensor  # (D,)

    @classmethod
    def of(cls, features: Tensor) -> _Rotated:
        mean, scale = features.mean(0), features.std(0, correction=0).clamp_min(1e-9)
        scaled = (features - mean) / scale
        count, width = scaled.shape
        wide = width > count  # fewer rows than numbers in a row: the axes are found among the rows
        spread, axes = torch.linalg.eigh((scaled @ scaled.T if wide else scaled.T @ scaled) / count)
        kept = spread > 1e-12 * spread[-1]
        spread, axes = spread[kept], axes[:, kept]
        turned = scaled.T @ axes / (spread * count).sqrt() if wide else axes
        return cls(scaled @ turned, turned, spread, mean, scale)

    def unfold(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """The same layer for the features as they came: weight (C, D), bias (C,)."""
        folded = weight @ self.turned.T / self.scale
        return folded, bias - folded @ self.mean


def solve(features: Tensor, labels: Tensor, weights: Tensor, classes: int, strength: float) -> tuple[Tensor, Tensor]:
    """Multinomial logistic regression: minimise sum of weighted cross-entropies + |W|^2 / (2 C); the bias is free.

    features: (N, D) float64; scaled here to unit variance, and the scale folded back into the weights.
    Returns weight (C, D) and bias (C,). On unit-variance features the same optimum as scikit-learn's.
    """
    given = _Rotated.of(features)
    return given.unfold(*_optimum(given, labels, weights, classes, strength, PRECISE))


def _optimum(
    given: _Rotated,
    labels: Tensor,
    weights: Tensor,
    classes: int,
    strength: float,
    precise: float,
    start: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """(weight (C, R), bias (C,)) along the axes. precise: the largest slope left; start: where the search begins.

    The search moves in units of each axis's own curvature (a quarter of its variance, and the penalty's), so that a
    few dozen steps reach what took hundreds.
    """
    count = len(labels)
    unit = (given.spread / 4 + 1 / (strength * count)).rsqrt()
    weight = torch.zeros(classes, len(unit), dtype=torch.float64) if start is None else start[0] / unit
    bias = torch.zeros(classes, dtype=torch.float64) if start is None else start[1].clone()
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=500, tolerance_grad=precise, tolerance_change=precise * 1e-5,
        line_search_fn="strong_wolfe",
    )  # fmt: skip
    rows = given.rows * unit
    targets = nn.functional.one_hot(labels, classes).double()
    shares = (weights / count).unsqueeze(-1)
    prior = unit.square() / (strength * count)

    def cost() -> Tensor:
        logprob = torch.log_softmax(rows @ weight.T + bias, dim=-1)
        slope = (logprob.exp() - targets) * shares  # the gradient of cross-entropy by the logits, (N, C)
        weight.grad = slope.T @ rows + weight * prior
        bias.grad = slope.sum(0)
        return -(logprob * targets * shares).sum() + (weight.square() * prior).sum() / 2

    optimizer.step(cost)
    return weight * unit, bias


def _choose_strength(
    features: Tensor, labels: Tensor, weights: Tensor, classes: int
) -> tuple[float, dict[float, float]]:
    """The C with the lowest cross-validated log loss: finer than accuracy where rows are few.

    Each search begins at the optimum of the next smaller C, and is as fine as the choice needs.
    """
    folds = _folds(labels)
    scores = dict.fromkeys(STRENGTHS, 0.0)
    for fold in range(FOLDS):
        inside, outside = folds != fold, folds == fold
        given, found = _Rotated.of(features[inside]), None
        for strength in STRENGTHS:
            found = _optimum(given, labels[inside], weights[inside], classes, strength, CHOOSING, found)
            weight, bias = given.unfold(*found)
            losses = nn.functional.cross_entropy(features[outside] @ weight.T + bias, labels[outside], reduction="none")
            scores[strength] += float((losses * weights[outside]).sum()) / float(weights.sum())
    return min(scores, key=lambda c: scores[c]), scores


def _folds(labels: Tensor) -> Tensor:
    """(N,) fold of each row: every class dealt out in turn, so that no fold misses one."""
    folds = torch.zeros_like(labels)
    for name in labels.unique():
        rows = (labels == name).nonzero().squeeze(-1)
        folds[rows] = torch.arange(len(rows)) % FOLDS
    return folds
