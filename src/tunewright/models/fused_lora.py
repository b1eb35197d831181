"""A LoRA layer's forward and backward pass in its few products, added in place; equal to peft's to rounding.

peft's layer is three products, a scaling and a sum, each of them a tensor as large as the layer's output; under
autocast the frozen weight and the input are cast anew in every call. Here what is frozen is cast once, an input that
several layers read is cast once, and the backward pass finds that input and the low-rank product, nothing else.
Only where gradients are wanted, and only while a layer is plain LoRA: merged, switched off, with dropout, DoRA or
several adapters it takes peft's own way. Does not know few-bit layers and convolutions: those stay as they are.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any

import torch
from torch import Tensor, nn


def fuse(model: nn.Module) -> int:
    """Give every LoRA layer on a plain matrix product the fused pass; how many there are."""
    from peft.tuners.lora import Linear

    found = [m for m in model.modules() if type(m) is Linear and type(m.base_layer) is nn.Linear]
    for layer in found:
        layer.__class__ = _fused_class()  # type: ignore[assignment]
    return len(found)


@functools.cache
def _fused_class() -> type[nn.Module]:
    from peft.tuners.lora import Linear

    class FusedLinear(Linear):  # type: ignore[misc]
        def forward(self, x: Tensor, *args: Any, **named: Any) -> Tensor:
            kind = _kind(self, x) if torch.is_grad_enabled() and not args and not named else None
            if kind is None:
                return super().forward(x, *args, **named)  # type: ignore[no-any-return]
            name, weight = self.active_adapters[0], _thin(self, kind)
            bias = self.base_layer.bias
            return _Fused.apply(  # type: ignore[no-any-return,no-untyped-call]
                x, _once(x, kind), weight, None if bias is None else bias.to(kind),
                self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name],
            )  # fmt: skip

    FusedLinear.__name__ = FusedLinear.__qualname__ = Linear.__name__  # who prints or asks for names finds peft's
    return FusedLinear


def _kind(layer: Any, x: Tensor) -> torch.dtype | None:
    """The number format of this call's products; None where the layer is not plain LoRA now."""
    names = layer.active_adapters
    if layer.disable_adapters or layer.merged or len(names) != 1 or names[0] not in layer.lora_A:
        return None
    name, base = names[0], layer.base_layer
    dropout = layer.lora_dropout[name]
    if name in layer.lora_variant or layer.fan_in_fan_out or (layer.training and getattr(dropout, "p", 0)):
        return None
    parts = (base, layer.lora_A[name], layer.lora_B[name])
    if any(type(part) is not nn.Linear or part._forward_hooks or part._forward_pre_hooks for part in parts):
        return None
    if any(p.requires_grad for p in base.parameters()) or parts[2].bias is not None:
        return None
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype if x.dtype == base.weight.dtype == parts[1].weight.dtype else None


def _thin(layer: Any, kind: torch.dtype) -> Tensor:
    """The frozen weight in this format, kept beside the one it was made of."""
    weight = layer.base_layer.weight
    if weight.dtype == kind:
        return weight  # type: ignore[no-any-return]
    of = (weight.data_ptr(), weight._version, kind, weight.device)
    if getattr(layer, "_thin", (None,))[0] != of:
        layer._thin = (of, weight.detach().to(kind))
    return layer._thin[1]  # type: ignore[no-any-return]


_last: tuple[weakref.ref[Tensor], int, Tensor] | None = None


def _once(x: Tensor, kind: torch.dtype) -> Tensor:
    """The input in this format; query, key and value read the same one, one after the other."""
    global _last
    if x.dtype == kind:
        return x.detach()
    if _last is None or _last[0]() is not x or _last[1] != x._version or _last[2].dtype != kind:
        _last = (weakref.ref(x), x._version, x.detach().to(kind))
    return _last[2]


class _Fused(torch.autograd.Function):
    """x W' + b + s (x A') B'. x: (..., K); W: (N, K); A: (r, K); B: (N, r)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, given: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
    ) -> Tensor:
        flat = given.reshape(-1, given.shape[-1])
        low = flat @ a.to(given.dtype).T
        out = flat @ weight.T if bias is None else torch.addmm(bias, flat, weight.T)
        out.addmm_(low, b.to(given.dtype).T, alpha=scale)
        ctx.save_for_backward(flat, low, weight, a, b)
        ctx.scale, ctx.shape, ctx.kind = scale, x.shape, x.dtype
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        flat, low, weight, a, b = ctx.saved_tensors
        slope = slope.reshape(-1, slope.shape[-1]).to(flat.dtype)
        through = slope @ b.to(flat.dtype)  # (n, r)
        by_x = None
        if ctx.needs_input_grad[0]:
            by_x = slope @ weight
            by_x = by_x.addmm_(through, a.to(flat.dtype), alpha=ctx.scale).to(ctx.kind).view(ctx.shape)
        by_a = (through.T @ flat).to(a.dtype).mul_(ctx.scale) if ctx.needs_input_grad[4] else None
        by_b = (slope.T @ low).to(b.dtype).mul_(ctx.scale) if ctx.needs_input_grad[5] else None
        return by_x, None, None, None, by_a, by_b, None
