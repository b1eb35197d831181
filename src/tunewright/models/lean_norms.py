"""RMS norms in a third of the passes over memory: weight * x / sqrt(mean(x^2) + eps), with its slopes written out.

Models spell it as six operations, each of which reads and writes everything, and autograd adds ten more. A module is
taken for such a norm if it has one weight, an epsilon, and does that very thing to numbers it is asked about; no name
is looked at. Only where gradients are wanted and numbers are float32; else the module's own forward runs, bit by bit.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

EPSILONS = ("variance_epsilon", "eps")


def make_lean_norms(model: nn.Module) -> int:
    """Give every RMS norm of the model the lean pass; how many there are."""
    found = [module for module in model.modules() if _is_rms_norm(module)]
    for module in found:
        module.__class__ = _lean_class(type(module))  # type: ignore[arg-type]
    return len(found)


def _epsilon(module: nn.Module) -> float | None:
    return next((value for name in EPSILONS if isinstance(value := getattr(module, name, None), float)), None)


@torch.no_grad()
def _is_rms_norm(module: nn.Module) -> bool:
    epsilon, weight = _epsilon(module), getattr(module, "weight", None)
    alone = [name for name, _ in module.named_parameters()] == ["weight"] and not [
        *module.children(),
        *module.buffers(),
    ]
    if not alone or epsilon is None or not isinstance(weight, Tensor) or weight.ndim != 1:
        return False
    if weight.dtype != torch.float32 or module._forward_hooks or module._forward_pre_hooks or hasattr(module, "_lean"):
        return False
    asked = torch.randn(3, len(weight), generator=torch.Generator().manual_seed(0)).to(weight.device)
    asked[1] *= epsilon**0.5  # where the epsilon counts
    try:
        given = module(asked)
    except (TypeError, ValueError, RuntimeError):  # it is no function of one tensor
        return False
    wanted = weight * asked * (asked.square().mean(-1, keepdim=True) + epsilon).rsqrt()
    like = isinstance(given, Tensor) and (given.shape, given.dtype) == (wanted.shape, wanted.dtype)
    return like and torch.allclose(given, wanted, 1e-5, 1e-6)


@functools.cache
def _lean_class(kind: type[nn.Module]) -> type[nn.Module]:
    class Lean(kind):  # type: ignore[misc,valid-type]
        _lean = True

        def forward(self, x: Tensor, *args: Any, **named: Any) -> Tensor:
            plain = args or named or not torch.is_grad_enabled()
            if plain or x.dtype != torch.float32 or self.weight.dtype != torch.float32:
                return super().forward(x, *args, **named)  # type: ignore[no-any-return]
            return _Norm.apply(x, self.weight, _epsilon(self))  # type: ignore[no-any-return,no-untyped-call]

    Lean.__name__, Lean.__qualname__, Lean.__module__ = kind.__name__, kind.__qualname__, kind.__module__
    return Lean


class _Norm(torch.autograd.Function):
    """x: (..., D); weight: (D,)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # type: ignore[override]
        x, weight, scale = ctx.saved_tensors
        by_weight = (slope * x).mul_(scale).flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, by_weight, None
        by_x = slope * weight
        along = torch.linalg.vecdot(by_x, x).unsqueeze(-1).mul_(scale.square()).div_(x.shape[-1])
        return by_x.sub_(x * along).mul_(scale), by_weight, None
