"""Two models as weights: what differs between them, part by part, and putting weights into a model.

Weights are float tensors by name, on the CPU in float32. Knows torch modules and Layout; no method, no task.

Effective rank: Roy and Vetterli 2007, "The effective rank: a measure of effective dimensionality".
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tunewright.contracts import Layout
from tunewright.models.layout import within

Weights = Mapping[str, Tensor]
EXACT_SIDE = 1024  # up to there all singular values are computed; above, a sketch of SKETCH of them
SKETCH = 128
SHOWN_VALUES = 5
FLOAT32 = torch.finfo(torch.float32).eps


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and saved statistics in float32 on the CPU; shared ones once."""
    saved = set(model.state_dict())
    named = [*model.named_parameters(), *((n, b) for n, b in model.named_buffers() if n in saved)]
    return {name: value.detach().float().cpu().clone() for name, value in named if value.is_floating_point()}


@torch.no_grad()
def put(model: nn.Module, given: Weights) -> nn.Module:
    """The same model, with these weights in their places."""
    places = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, value in given.items():
        places[name].copy_(value)
    return model


def in_common(base: Weights, tuned: Weights, fresh: tuple[str, ...] = ()) -> list[str]:
    """Names that have a value in both, of the same shape, and do not lie in a module that is new in the tuned one."""
    return [n for n in tuned if n in base and base[n].shape == tuned[n].shape and not within(n, fresh)]


# ------------------------------------------------------------------------- parts
@dataclass(frozen=True)
class Part:
    """A stretch of a model that is looked at as one. places: its modules; () where it is what others leave over."""

    name: str
    kind: str  # "embedding", "block", "head" or "other"
    places: tuple[str, ...]
    names: tuple[str, ...]  # of its weights


def parts_of(names: Iterable[str], layout: Layout, most_blocks: int = 12) -> list[Part]:
    """The model cut into embedding, blocks, head and the rest (norms, poolers, positions), shallow to deep.

    Neighbouring blocks of one list are joined until at most `most_blocks` are left, or one group a list. Parts
    without weights (a head that shares the embedding's) are left out.
    """
    left = list(names)

    def take(places: tuple[str, ...]) -> tuple[str, ...]:
        taken = tuple(n for n in left if within(n, places))
        left[:] = [n for n in left if n not in taken]
        return taken

    found = []
    for places in joined(layout.blocks, most_blocks):
        numbers = [layout.blocks.index(place) + 1 for place in places]
        name = f"block {numbers[0]}" if len(numbers) == 1 else f"blocks {numbers[0]}-{numbers[-1]}"
        found.append(Part(name, "block", places, take(places)))
    before = (layout.embedding,) if layout.embedding else ()
    after = (layout.head,) if layout.head else ()
    head = Part("head", "head", after, take(after))
    found = [Part("embedding", "embedding", before, take(before)), *found]
    found += [Part("norms and the rest", "other", (), tuple(left)), head]
    return [part for part in found if part.names]


def joined(blocks: Sequence[str], most: int) -> list[tuple[str, ...]]:
    """Neighbours in groups of like size, never across two lists (encoder and decoder)."""
    lists = [list(group) for _, group in itertools.groupby(blocks, key=lambda name: name.rpartition(".")[0])]
    size = 1
    while sum(math.ceil(len(one) / size) for one in lists) > max(most, len(lists)):
        size += 1
    return [tuple(one[i : i + size]) for one in lists for i in range(0, len(one), size)]


# ------------------------------------------------------------------------ changes
def moved(base: Weights, tuned: Weights, names: Sequence[str]) -> dict[str, Any]:
    """How far these weights went: the norm of the change as a share of the base's norm, and its shape.

    effective_rank, of_rank and singular_values are those of the matrix with the largest change; absent where no
    matrix changed. What is no larger than rounding in float32 is no direction.
    """
    change = math.sqrt(sum(_square(tuned[n] - base[n]) for n in names))
    whole = math.sqrt(sum(_square(base[n]) for n in names))
    found: dict[str, Any] = {"relative_norm": change / whole if whole else 0.0, "norm": change}
    found["weights"] = sum(base[n].numel() for n in names)
    matrices = {n: _square(tuned[n] - base[n]) for n in names if base[n].ndim in (2, 4)}  # 4: a convolution
    if not matrices or not max(matrices.values()):
        return found
    largest = max(matrices, key=lambda n: matrices[n])
    return found | {"matrix": largest} | spectrum(base[largest].flatten(1), tuned[largest].flatten(1))


def _square(tensor: Tensor) -> float:
    return float(tensor.double().square().sum())


def spectrum(base: Tensor, tuned: Tensor) -> dict[str, Any]:
    """The change of one matrix: its largest singular values, its rank, and in how many directions most of it lies.

    effective_rank: exp of the entropy of the singular values as shares; never above the rank. A matrix whose smaller
    side is above 1024 is sketched: where 128 directions do not hold all of it, rank and effective rank are absent.
    """
    delta = tuned - base
    side = min(delta.shape)
    exact = side <= EXACT_SIDE
    values = torch.linalg.svdvals(delta) if exact else _sketched(delta)
    # the difference of two rounded matrices: by Weyl, no singular value is off by more than the rounding's norm
    rounding = 2 * FLOAT32 * math.sqrt(max(_square(base), _square(tuned)))
    kept = values[values > rounding].double()
    shown = {"singular_values": kept[:SHOWN_VALUES].tolist(), "of_rank": side}
    missed = 0.0 if exact else max(0.0, _square(delta) - float(kept.square().sum()))
    if missed > 1e-4 * _square(delta) or not len(kept):
        return shown
    shares = kept / kept.sum()
    return shown | {"rank": len(kept), "effective_rank": float(torch.exp(-(shares * shares.log()).sum()))}


def _sketched(delta: Tensor) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return torch.svd_lowrank(delta, SKETCH)[1]
