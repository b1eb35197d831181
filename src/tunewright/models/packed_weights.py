"""Frozen weights laid out beforehand as oneDNN's products want them, for as long as a trunk runs over all rows.

A product otherwise lays out its weight anew in every call, and copies the bias over its output before it adds to it.
Each layer is asked: only one that gives the very same bits either way is taken, so nothing that is kept depends on
this. Float32 on a CPU, without gradients; needs a second copy of these weights meanwhile. Knows torch's linear layer
and no model.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

ROWS = 256  # places of a call that the layout is made for; others are computed as well


@contextlib.contextmanager
def packed(modules: Iterable[nn.Module]) -> Iterator[int]:
    """Inside, linear layers in these modules use weights laid out beforehand; gives how many do."""
    ops = torch.ops.mkldnn
    able = hasattr(ops, "_reorder_linear_weight") and hasattr(ops, "_linear_pointwise")
    layers = {layer for module in modules for layer in module.modules() if isinstance(layer, nn.Linear)} if able else ()
    taken = []
    try:
        for layer in filter(_is_plain, layers):
            laid_out = ops._reorder_linear_weight(layer.weight.detach(), ROWS)
            if _is_equal(layer, laid_out):
                layer.forward = functools.partial(_forward, layer, laid_out)  # type: ignore[method-assign]
                taken.append(layer)
        yield len(taken)
    finally:
        for layer in taken:
            del layer.forward


def _is_plain(layer: nn.Linear) -> bool:
    if type(layer) is not nn.Linear or "forward" in vars(layer):
        return False
    weight = layer.weight
    frozen = not any(p.requires_grad for p in layer.parameters())
    return frozen and weight.device.type == "cpu" and weight.dtype == torch.float32 and min(weight.shape) > 1


def _is_equal(layer: nn.Linear, laid_out: Tensor) -> bool:
    """Whether the bits are those of the layer's own pass, for few places and many."""
    asked = torch.randn(ROWS, layer.in_features, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        return all(
            torch.equal(_product(layer, laid_out, x), functional.linear(x, layer.weight, layer.bias))
            for x in (asked, asked[:40])
        )


def _product(layer: nn.Linear, laid_out: Tensor, x: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, laid_out, layer.bias, "none", [], "")  # type: ignore[no-any-return]


def _forward(layer: nn.Linear, laid_out: Tensor, x: Tensor) -> Tensor:
    plain = x.dtype != torch.float32 or torch.is_autocast_enabled("cpu") or torch.is_grad_enabled()
    return functional.linear(x, layer.weight, layer.bias) if plain else _product(layer, laid_out, x)
