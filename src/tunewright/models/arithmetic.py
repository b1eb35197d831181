"""Arithmetic on the weights of models that grew from one base: means, sums of changes, TIES, DARE.

Weights are tensors by name; every model has the same names and shapes. Sums are made in float64, tensor by tensor, and
given back in float32, so that the order of the models does not show. Knows tensors only.

Task arithmetic: Ilharco 2022, arXiv 2212.04089. TIES: Yadav 2023, arXiv 2306.01708. DARE: Yu 2023, arXiv 2311.03099.
Weighted means (soups, interpolation with the base): Wortsman 2021 and 2022, arXiv 2109.01903 and 2203.05482.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Generator, Tensor

Weights = Mapping[str, Tensor]


def mean(models: Sequence[Weights], shares: Sequence[float]) -> dict[str, Tensor]:
    """sum_i share_i W_i. Shares that add up to 1; one that is 1 among zeros gives that model, number for number.

    It is not written W0 + sum_i share_i (W_i - W0), which is the same in real numbers and not in floating point.
    """
    return {name: _sum([m[name] for m in models], shares).float() for name in models[0]}


def changes(base: Weights, model: Weights) -> dict[str, Tensor]:
    """W - W0: the task vector of one model."""
    return {name: model[name].float() - base[name].float() for name in base}


def add(base: Weights, deltas: Sequence[Weights], factors: Sequence[float]) -> dict[str, Tensor]:
    """W0 + sum_i factor_i delta_i."""
    return {name: (base[name].double() + _sum([d[name] for d in deltas], factors)).float() for name in base}


def trim(delta: Weights, density: float) -> dict[str, Tensor]:
    """The largest changes by magnitude, over all tensors together; the rest is 0.

    density: the share that stays, of the numbers that changed at all: a LoRA leaves most tensors as they were, and
    these zeros say nothing about what is large. Where several stand at the edge, all of them stay.
    """
    sizes = torch.cat([change.abs().flatten() for change in delta.values()])
    sizes = sizes[sizes > 0]
    if not len(sizes):
        return dict(delta)
    kept = max(1, round(density * len(sizes)))
    edge = sizes.kthvalue(len(sizes) - kept + 1).values
    return {name: torch.where(change.abs() >= edge, change, 0.0) for name, change in delta.items()}


def ties(
    base: Weights, deltas: Sequence[Weights], weights: Sequence[float], density: float, scale: float
) -> dict[str, Tensor]:
    """W0 + scale * (trim each, elect a sign by total mass, mean of those that agree with it).

    A number whose masses cancel to exactly 0 keeps the base's value.
    """
    kept = [trim(delta, density) for delta in deltas]
    return {
        name: (base[name].double() + scale * _disjoint_mean([k[name] for k in kept], weights)).float() for name in base
    }


def _disjoint_mean(changes: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The weighted mean of the non-zero changes whose sign is that of the weighted sum; 0 where there is none."""
    sign = torch.sign(_sum(changes, weights))
    total, count = torch.zeros_like(sign), torch.zeros_like(sign)
    for change, weight in zip(changes, weights, strict=True):
        agrees = torch.sign(change.double()) * sign > 0
        total += torch.where(agrees, weight * change.double(), 0.0)
        count += agrees * weight
    return total / count.masked_fill(count == 0, 1.0)


def dropped(delta: Weights, density: float, generator: Generator) -> dict[str, Tensor]:
    """Each change kept with probability `density` and divided by it, so that its expectation stays; else 0."""
    found = {}
    for name in sorted(delta):  # sorted: the same draw whatever order the names come in
        kept = torch.rand(delta[name].shape, generator=generator) < density
        found[name] = torch.where(kept, delta[name] / density, 0.0)
    return found


def dare(
    base: Weights,
    deltas: Sequence[Weights],
    shares: Sequence[float],
    density: float,
    scale: float,
    generators: Sequence[Generator],
) -> dict[str, Tensor]:
    """W0 + scale * weighted mean of the changes after `dropped`; shares add up to 1, one generator a model."""
    thinned = [dropped(delta, density, draw) for delta, draw in zip(deltas, generators, strict=True)]
    return add(base, thinned, [scale * share for share in shares])


def _sum(tensors: Sequence[Tensor], factors: Sequence[float]) -> Tensor:
    """sum_i factor_i tensor_i in float64."""
    total = torch.zeros(tensors[0].shape, dtype=torch.float64, device=tensors[0].device)
    for tensor, factor in zip(tensors, factors, strict=True):
        total += factor * tensor.double()
    return total
