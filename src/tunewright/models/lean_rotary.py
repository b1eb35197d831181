"""Rotary positions in a third of the passes over memory: x * cos + rotated(x) * sin, with its slopes written out.

Models spell it as eight operations on copies of queries and keys, and autograd keeps most of them. The function that a
module calls is asked with numbers first: only one that turns the whole of queries and keys in halves, (B, H, T, D) by
(B, T, D), is exchanged, in this model's modules alone (their class gets its own forward, with that one name bound
anew). Where no gradient is wanted the model's own function runs, bit by bit. Does not know interleaved or partial
turns.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

NAME = "apply_rotary_pos_emb"  # what transformers' models call it


def make_lean_turns(model: nn.Module) -> int:
    """Give every module that turns queries and keys that way the lean pass; how many there are."""
    found = 0
    for module in model.modules():
        kind = _lean_class(type(module))  # type: ignore[arg-type]
        if kind is not None:
            module.__class__ = kind
            found += 1
    return found


@functools.cache
def _lean_class(kind: type[nn.Module]) -> type[nn.Module] | None:
    """The same class, whose forward finds our function under that name; None where there is nothing to exchange."""
    forward: Any = kind.__dict__.get("forward")
    own = isinstance(forward, types.FunctionType) and NAME in forward.__code__.co_names
    if not own or "_turns_leanly" in kind.__dict__:
        return None
    plain = forward.__globals__.get(NAME)
    if plain is None or not _turns_in_halves(plain):
        return None
    bound = types.FunctionType(
        forward.__code__, forward.__globals__ | {NAME: _lean(plain)}, forward.__name__, forward.__defaults__,
        forward.__closure__,
    )  # fmt: skip
    bound.__kwdefaults__ = forward.__kwdefaults__
    functools.update_wrapper(bound, forward)
    named = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "_turns_leanly": True}
    return type(kind.__name__, (kind,), named | {"forward": bound})


@torch.no_grad()
def _turns_in_halves(plain: Callable[..., Any]) -> bool:
    rng = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 3, 5, 8, generator=rng), torch.randn(2, 1, 5, 8, generator=rng)
    cos, sin = torch.randn(2, 5, 8, generator=rng), torch.randn(2, 5, 8, generator=rng)  # halves need not be alike
    try:
        given = plain(q, k, cos, sin)
        wanted = [_turn(x, cos.unsqueeze(1), sin.unsqueeze(1)) for x in (q, k)]
        return len(given) == 2 and all(torch.allclose(a, b, 1e-6, 1e-6) for a, b in zip(given, wanted, strict=True))
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError):  # it is another function of that name
        return False


def _lean(plain: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(plain)
    def turned(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **named: Any) -> Any:
        whole = cos.ndim == 3 and q.ndim == k.ndim == 4 and cos.shape[-1] == q.shape[-1] == k.shape[-1]
        learning = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
        if args or named or not learning or not whole or cos.requires_grad or sin.requires_grad:
            return plain(q, k, cos, sin, *args, **named)
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        return _Turn.apply(q, cos, sin), _Turn.apply(k, cos, sin)  # type: ignore[no-untyped-call]

    return turned


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: (B, H, T, D); cos, sin: (B, 1, T, D)."""
    half = x.shape[-1] // 2
    x = x.to(torch.promote_types(x.dtype, cos.dtype))
    found = x * cos
    found[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    found[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return found


class _Turn(torch.autograd.Function):
    """As `_turn`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.kind = x.dtype
        return _turn(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        half = slope.shape[-1] // 2
        found = slope * cos
        found[..., :half].addcmul_(slope[..., half:], sin[..., half:])
        found[..., half:].addcmul_(slope[..., :half], sin[..., :half], value=-1)
        return found.to(ctx.kind), None, None
