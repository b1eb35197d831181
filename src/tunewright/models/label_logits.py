"""Logits only where a label is, a few rows at a time: the whole matrix (rows x vocabulary) is never made.

The head's input is caught by a hook, so that no model class is named; what a family does to its logits afterwards
(a soft cap, a scale) is found by asking the model itself, once. A model that answers otherwise keeps its own way, and
`find_head` says why. Slopes are taken while the piece is there, as in Liger (arXiv:2410.10989): a token's gradient is
its upstream factor times a slope known in the forward pass, so a frozen head costs no second product.
Does not know which function of the logits is wanted.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

Score = Callable[[Tensor, Tensor], Tensor]  # (n, V) logits and (n,) labels -> (n,), each row by itself
# the same with its slopes by the logits: (n,) and (n, V), both float32; the logits may be overwritten
Slopes = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
# What families do to their logits, by the word in their config that says so; each is tried on the model itself
TAILS: Mapping[str, Callable[[Tensor, float], Tensor]] = {
    "final_logit_softcapping": lambda logits, cap: torch.tanh(logits / cap) * cap,  # Gemma
    "logit_scale": lambda logits, scale: logits * scale,  # Cohere
    "logits_scaling": lambda logits, scale: logits / scale,  # Granite
    "lm_head_multiplier": lambda logits, scale: logits * scale,  # Falcon-H1
}
ROOM = {"cpu": 2**22}  # numbers in one piece: 131 rows of a vocabulary of 32,000 stay near the cache (measured)
LARGE = 2**27  # the same on other devices


@dataclass(frozen=True)
class Head:
    """The last product of a language model, and what is done to its logits. `module` None: `why` it was not found."""

    module: nn.Module | None
    tail: Callable[[Tensor], Tensor] | None = None
    why: str = ""


# by output layer, so that a model is asked before anything is put around it: hooks that count would count the question
_FOUND: weakref.WeakKeyDictionary[nn.Module, Head] = weakref.WeakKeyDictionary()
_whole: contextvars.ContextVar[bool] = contextvars.ContextVar("whole", default=False)


@contextlib.contextmanager
def every_logit() -> Iterator[None]:
    """Inside, models make the logits of all their tokens: for whoever listens to a model's own output."""
    token = _whole.set(True)
    try:
        yield
    finally:
        _whole.reset(token)


def find_head(model: nn.Module) -> Head:
    """The head that, put behind the model's last hidden states, gives the model's own logits bit by bit."""
    if _whole.get():
        return Head(None, why="every logit is wanted")
    words = _words(model)
    if words is None:
        return Head(None, why="the model names no output layer")
    if words not in _FOUND:
        _FOUND[words] = _ask(model, words)
    return _FOUND[words]


def _words(model: nn.Module) -> nn.Module | None:
    try:
        return model.get_output_embeddings()  # type: ignore[operator,no-any-return]
    except (AttributeError, NotImplementedError):
        return None


@torch.no_grad()
def _ask(model: nn.Module, head: nn.Module) -> Head:
    training = [(module, module.training) for module in model.modules()]
    config: Any = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config  # type: ignore[union-attr,operator]
    ids = torch.randint(config.vocab_size, (2, 5), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids.to(next(model.parameters()).device)}
    try:
        model.eval()
        whole = model(**inputs, use_cache=False).logits
        hidden = caught(model, head, inputs)
        if hidden is None:
            return Head(None, why="its output layer is not called once, on one vector a token")
        own = head(hidden)
    except (TypeError, ValueError, RuntimeError, IndexError) as error:  # whatever a family's forward refuses
        return Head(None, why=f"it cannot be asked ({(str(error).splitlines() or [''])[0][:100]})")
    finally:
        for module, mode in training:
            module.training = mode
    for name, apply in TAILS.items():
        value = getattr(config, name, None)
        if value is not None and value != 1 and torch.equal(apply(own, value).float(), whole.float()):
            return Head(head, lambda logits, apply=apply, value=value: apply(logits, value))  # type: ignore[misc]
    if torch.equal(own.float(), whole.float()):
        return Head(head)
    return Head(None, why="its logits are not those of its output layer")


def caught(model: nn.Module, head: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor | None:
    """(B, T, D): what reaches the head, of the given tokens alone; the head itself stands idle.

    Virtual tokens before the given ones are left out. None if the head is not called exactly once, as expected.
    """
    found: list[Tensor] = []

    def catch(hidden: Tensor, *args: Any, **named: Any) -> Tensor:
        found.append(hidden)
        return hidden.new_zeros(()).expand(len(hidden), 1, width)

    width, before = _width(head), head.__dict__.get("forward")
    head.forward = catch  # type: ignore[assignment,method-assign]
    try:
        # with a cache, transformers ignores that position_ids begin anew, and documents leak (docs/facts.md)
        model(**inputs, use_cache=False)
    finally:
        del head.forward
        if before is not None:
            head.forward = before  # type: ignore[method-assign]
    rows, length = inputs["input_ids"].shape
    fits = len(found) == 1 and found[0].ndim == 3 and len(found[0]) == rows and found[0].shape[1] >= length
    return found[0][:, -length:] if fits else None


def score_in_pieces(head: Head, rows: Tensor, labels: Tensor, score: Score, slopes: Slopes | None = None) -> Tensor:
    """score(logits of each row, its label), (n,) float32. rows: (n, D) hidden states.   labels: (n,) int64.

    slopes: `score` and its slopes written out, which a head that is one plain product takes instead of autograd.
    """
    assert head.module is not None
    module, tail = head.module, head.tail

    def ask(piece: Tensor, wanted: Tensor) -> Tensor:
        logits = logits_of(piece)
        return score(logits if tail is None else tail(logits), wanted)

    logits_of: Callable[[Tensor], Tensor] = module
    if _is_plain(module) and not any(p.requires_grad for p in module.parameters()):
        logits_of = lambda piece: nn.functional.linear(piece, *_cast_once(module))  # noqa: E731
    size = max(1, ROOM.get(rows.device.type, LARGE) // _width(head.module))
    parameters = [p for p in head.module.parameters() if p.requires_grad]
    if torch.is_grad_enabled() and (rows.requires_grad or parameters):
        how = _written_out(head, slopes) if slopes else None
        take = how or functools.partial(_by_autograd, ask, tuple(parameters))
        return _InPieces.apply(rows, labels, take, size, *parameters)  # type: ignore[no-any-return,no-untyped-call]
    pieces = [ask(rows[i : i + size], labels[i : i + size]) for i in range(0, len(rows), size)]
    return torch.cat(pieces) if pieces else rows.new_zeros(0, dtype=torch.float32)


def _is_plain(module: nn.Module) -> TypeGuard[nn.Linear]:
    watched = module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__
    return type(module) is nn.Linear and not watched


def _in_kind(tensor: Tensor) -> Tensor:
    """As autocast would have it in a product."""
    kind = tensor.device.type
    return tensor.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else tensor


_CAST: weakref.WeakKeyDictionary[nn.Module, tuple[Any, Tensor]] = weakref.WeakKeyDictionary()


def _cast_once(module: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """Weight and bias as autocast would have them. A frozen weight is cast once; autocast does it for every call."""
    weight, bias = module.weight.detach(), None if module.bias is None else _in_kind(module.bias.detach())
    if module.weight.requires_grad or not torch.is_autocast_enabled(weight.device.type):
        return _in_kind(weight), bias
    of = (weight.data_ptr(), module.weight._version, torch.get_autocast_dtype(weight.device.type))
    if _CAST.get(module, (None,))[0] != of:
        _CAST[module] = (of, _in_kind(weight))
    return _CAST[module][1], bias


def _width(head: nn.Module) -> int:
    """V, or a number as large as vocabularies are."""
    weight = getattr(head, "weight", None)
    return int(getattr(head, "out_features", 0) or (weight.shape[0] if weight is not None else 2**15))


# One piece: rows (n, D), labels (n,), factors (n,) or None -> scores (n,), their slopes by the rows, by each parameter
Take = Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor, list[Tensor | None]]]


def _by_autograd(
    ask: Score, parameters: tuple[Tensor, ...], piece: Tensor, labels: Tensor, factors: Tensor | None
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    with torch.enable_grad():
        piece = piece.detach().requires_grad_()
        found = ask(piece, labels)
        cost = found.sum() if factors is None else (found * factors).sum()
        by_piece, *by_weight = torch.autograd.grad(cost, [piece, *parameters], allow_unused=True)
    return found.detach(), by_piece, list(by_weight)


def _written_out(head: Head, slopes: Slopes) -> Take | None:
    """Three products and nothing kept between them, for a head that is one plain product and the model's last word."""
    module = head.module
    if module is None or head.tail is not None or not _is_plain(module):
        return None
    weight, bias = _cast_once(module)
    trains = [p is module.weight for p in module.parameters() if p.requires_grad]

    @torch.no_grad()
    def take(piece: Tensor, labels: Tensor, factors: Tensor | None) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        given = piece.detach().to(weight.dtype)
        scores, slope = slopes(nn.functional.linear(given, weight, bias), labels)
        if factors is not None:
            slope.mul_(factors.unsqueeze(-1))
        thin = slope.to(weight.dtype)
        by_weight: list[Tensor | None] = [
            (thin.T @ given).float() if is_weight else slope.sum(0) for is_weight in trains
        ]
        return scores, (thin @ weight).to(piece.dtype), by_weight

    return take


class _InPieces(torch.autograd.Function):
    """Scores, with their slopes by the rows, and by the head's own weights where those train."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, labels: Tensor, take: Take, size: int, *parameters: Tensor) -> Tensor:
        ctx.autocast = (torch.is_autocast_enabled(rows.device.type), torch.get_autocast_dtype(rows.device.type))
        ctx.take, ctx.size = take, size
        ctx.random = torch.get_rng_state()  # dropout in an adapted head: drawn the same if it must be drawn again
        scores, slopes, sums = _slopes(take, size, rows, labels, None, parameters)
        ctx.save_for_backward(rows, labels, slopes, *sums)
        return scores

    @staticmethod
    def backward(ctx: Any, factors: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        rows, labels, slopes, *sums = ctx.saved_tensors
        by_row = (slopes * factors.unsqueeze(-1)).to(rows.dtype)
        if len(factors) == 0 or not sums:
            return (by_row, None, None, None, *sums)
        if bool((factors == factors[0]).all()):  # as in every sum: what was added up needs only a scale
            return (by_row, None, None, None, *(total * factors[0] for total in sums))
        enabled, kind = ctx.autocast
        devices = [rows.device] if rows.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), torch.autocast(rows.device.type, kind, enabled=enabled):
            torch.set_rng_state(ctx.random)
            _, _, sums = _slopes(ctx.take, ctx.size, rows, labels, factors, sums)
        return (by_row, None, None, None, *sums)


def _slopes(
    take: Take, size: int, rows: Tensor, labels: Tensor, factors: Tensor | None, parameters: Sequence[Tensor]
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """(scores (n,), their gradients by their own row (n, D), by each parameter in sum), scores weighed by factors."""
    scores, slopes = [], []
    sums = [torch.zeros_like(p) for p in parameters]
    for start in range(0, len(rows), size):
        part = slice(start, start + size)
        found, by_piece, by_weight = take(rows[part], labels[part], None if factors is None else factors[part])
        scores.append(found)
        slopes.append(by_piece)
        for total, one in zip(sums, by_weight, strict=True):
            if one is not None:
                total.add_(one)
    if not scores:
        return rows.new_zeros(0, dtype=torch.float32), torch.zeros_like(rows), sums
    return torch.cat(scores), torch.cat(slopes), sums
