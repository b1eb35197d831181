"""Attention of short rows in as few passes over memory as torch's operations allow, its slopes written out.

The plain way turns a mask into numbers in every layer, looks in every layer for tokens that may look at nothing, and
scales queries and keys apart. Here a mask is read once for all layers, the scale is part of the product, and the
backward pass finds the probabilities and nothing else of their size but what dropout kept. Float32 on a CPU, as many
heads of keys as of queries, a mask of yes and no, or none, looking back alone or everywhere. Does not know biases and
windows: who calls asks `suits` first, and goes the plain way elsewhere.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any

import torch
from torch import Tensor

from tunewright.models import lean_dropout

BLOCK = 512  # tokens: so many lengths share the numbers of who looks ahead


def suits(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, dropout: float) -> bool:
    """Whether `attend` knows this call. query: (B, H, T, D); key, value: (B, K, S, D); mask: (B or 1, 1 or H, T, S)."""
    if torch.is_autocast_enabled(query.device.type) or query.device.type != "cpu":
        return False
    if not (query.dtype == key.dtype == value.dtype == torch.float32 and query.shape[:2] == key.shape[:2]):
        return False
    if value.shape != key.shape or (dropout and not lean_dropout.suits(query, dropout)):
        return False
    if mask is None:
        return not is_causal or query.shape[2] in (1, key.shape[2])
    return mask.dtype == torch.bool and mask.ndim == 4 and _as_numbers(mask) is not None


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:  # fmt: skip
    """(B, T, H, D), contiguous. Only where `suits` said so; is_causal counts where there is no mask."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    length = query.shape[2]
    if mask is None:
        added = _backwards(-(-length // BLOCK) * BLOCK)[..., :length, :length] if is_causal and length > 1 else None
    else:
        added = _as_numbers(mask)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value)):
        return _Attention.apply(query, key, value, added, scale, dropout)  # type: ignore[no-any-return,no-untyped-call]
    q, k, v = (_by_head(tensor) for tensor in (query, key, value))
    weights = _weights(q, k, added, scale, query.shape[1])
    if dropout:
        weights *= lean_dropout.kept(weights.shape, dropout)
    return _by_place(torch.bmm(weights, v), query)


_last: tuple[weakref.ref[Tensor], int, Tensor | None] | None = None


def _as_numbers(mask: Tensor) -> Tensor | None:
    """0 where a token may look, -inf elsewhere; None where one may look at nothing. All layers bring the same mask."""
    global _last
    if mask.is_inference():  # torch does not count its changes
        return _read(mask)
    if _last is None or _last[0]() is not mask or _last[1] != mask._version:
        _last = (weakref.ref(mask), mask._version, _read(mask))
    return _last[2]


@functools.lru_cache(maxsize=4)
def _backwards(length: int) -> Tensor:
    """(1, 1, length, length): 0 where a token looks back or at itself, -inf ahead."""
    return torch.full((1, 1, length, length), -torch.inf).triu_(1)


def _read(mask: Tensor) -> Tensor | None:
    return torch.zeros(mask.shape).masked_fill_(~mask, -torch.inf) if bool(mask.any(-1).all()) else None


def _by_head(tensor: Tensor) -> Tensor:
    """(B, H, T, D) -> (B * H, T, D), contiguous."""
    return tensor.reshape(-1, *tensor.shape[2:])


def _by_place(tensor: Tensor, like: Tensor) -> Tensor:
    """(B * H, T, D) -> (B, T, H, D), contiguous."""
    return tensor.view(*like.shape[:2], *tensor.shape[1:]).transpose(1, 2).contiguous()


def _weights(q: Tensor, k: Tensor, added: Tensor | None, scale: float, heads: int) -> Tensor:
    """(B * H, T, S): how much each token looks at each."""
    scores = torch.baddbmm(q.new_empty(()), q, k.transpose(1, 2), beta=0, alpha=scale)
    if added is not None:
        scores.view(-1, heads, *scores.shape[1:]).add_(added)
    return torch.softmax(scores, -1)


class _Attention(torch.autograd.Function):
    """query, key, value: (B, H, T, D), (B, H, S, D) twice; added: to the scores, or None."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, added: Tensor | None, scale: float, dropout: float
    ) -> Tensor:
        q, k, v = (_by_head(tensor) for tensor in (query, key, value))
        weights = _weights(q, k, added, scale, query.shape[1])
        kept = lean_dropout.kept(weights.shape, dropout) if dropout else None
        ctx.save_for_backward(q, k, v, weights, kept)
        ctx.scale, ctx.heads = scale, query.shape[:2]
        return _by_place(torch.bmm(weights if kept is None else weights * kept, v), query)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Any, ...]:
        q, k, v, weights, kept = ctx.saved_tensors
        slope = _by_head(slope.transpose(1, 2))
        by_v = torch.bmm((weights if kept is None else weights * kept).transpose(1, 2), slope)
        by_weights = torch.bmm(slope, v.transpose(1, 2))
        if kept is not None:
            by_weights *= kept
        by_scores = torch._softmax_backward_data(by_weights, weights, -1, weights.dtype)
        none = q.new_empty(())
        by_q = torch.baddbmm(none, by_scores, k, beta=0, alpha=ctx.scale)
        by_k = torch.baddbmm(none, by_scores.transpose(1, 2), q, beta=0, alpha=ctx.scale)
        return *(by.view(*ctx.heads, *by.shape[1:]) for by in (by_q, by_k, by_v)), None, None, None
