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
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Score = Callable[[Tensor, Tensor], Tensor]  # (n, V) logits and (n,) labels -> (n,), each row by itself
# What families do to their logits, by the word in their config that says so; each is tried on the model itself
TAILS: Mapping[str, Callable[[Tensor, float], Tensor]] = {
    "final_logit_softcapping": lambda logits, cap: torch.tanh(logits / cap) * cap,  # Gemma
    "logit_scale": lambda logits, scale: logits * scale,  # Cohere
    "logits_scaling": lambda logits, scale: logits / scale,  # Granite
    "lm_head_multiplier": lambda logits, scale: logits * scale,  # Falcon-H1
}
ROOM = {"cpu": 2**23}  # numbers in one piece: 256 rows of a vocabulary of 32,000 stay near the cache (measured)
LARGE = 2**27  # the same on other devices


@dataclass(frozen=True)
class Head:
    """The last product of a language model, and what is done to its logits. `module` None: `why` it was not found."""

    module: nn.Module | None
    tail: Callable[[Tensor], Tensor] = lambda logits: logits
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
    """(B, T, D): what reaches the head, of the given tokens alone; the head itself is called on one token a row.

    Virtual tokens before the given ones are left out. None if the head is not called exactly once, as expected.
    """
    found: list[Tensor] = []

    def catch(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        found.append(args[0])
        return (args[0][:, :1], *args[1:])

    handle = head.register_forward_pre_hook(catch, prepend=True)
    try:
        # with a cache, transformers ignores that position_ids begin anew, and documents leak (docs/facts.md)
        model(**inputs, use_cache=False)
    finally:
        handle.remove()
    rows, length = inputs["input_ids"].shape
    fits = len(found) == 1 and found[0].ndim == 3 and len(found[0]) == rows and found[0].shape[1] >= length
    return found[0][:, -length:] if fits else None


def score_in_pieces(head: Head, rows: Tensor, labels: Tensor, score: Score) -> Tensor:
    """score(logits of each row, its label), (n,) float32. rows: (n, D) hidden states.   labels: (n,) int64."""
    assert head.module is not None
    logits_of = _cast_once(head.module, rows.device)

    def ask(piece: Tensor, wanted: Tensor) -> Tensor:
        return score(head.tail(logits_of(piece)), wanted)

    weight = getattr(head.module, "weight", None)
    width = int(getattr(head.module, "out_features", 0) or (weight.shape[0] if weight is not None else 2**15))
    size = max(1, ROOM.get(rows.device.type, LARGE) // width)
    parameters = [p for p in head.module.parameters() if p.requires_grad]
    if torch.is_grad_enabled() and (rows.requires_grad or parameters):
        return _InPieces.apply(rows, labels, ask, size, *parameters)  # type: ignore[no-any-return,no-untyped-call]
    pieces = [ask(rows[i : i + size], labels[i : i + size]) for i in range(0, len(rows), size)]
    return torch.cat(pieces) if pieces else rows.new_zeros(0, dtype=torch.float32)


def _cast_once(module: nn.Module, device: torch.device) -> Callable[[Tensor], Tensor]:
    """The head as a function. Autocast casts a frozen weight anew for every piece: here once."""
    watched = module._forward_hooks or module._forward_pre_hooks
    if type(module) is not nn.Linear or watched or any(p.requires_grad for p in module.parameters()):
        return module
    if not torch.is_autocast_enabled(device.type):
        return module
    kind = torch.get_autocast_dtype(device.type)
    weight, bias = module.weight.to(kind), None if module.bias is None else module.bias.to(kind)
    return lambda rows: nn.functional.linear(rows, weight, bias)


class _InPieces(torch.autograd.Function):
    """Scores, with their slopes by the rows, and by the head's own weights where those train."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, labels: Tensor, ask: Score, size: int, *parameters: Tensor) -> Tensor:
        ctx.autocast = (torch.is_autocast_enabled(rows.device.type), torch.get_autocast_dtype(rows.device.type))
        ctx.ask, ctx.size, ctx.parameters = ask, size, parameters
        ctx.random = torch.get_rng_state()  # dropout in an adapted head: drawn the same if it must be drawn again
        scores, slopes, sums = _slopes(ask, size, rows, labels, None, parameters)
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
            _, _, sums = _slopes(ctx.ask, ctx.size, rows, labels, factors, ctx.parameters)
        return (by_row, None, None, None, *sums)


def _slopes(
    ask: Score, size: int, rows: Tensor, labels: Tensor, factors: Tensor | None, parameters: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """(scores (n,), their gradients by their own row (n, D), by each parameter in sum), scores weighed by factors."""
    scores, slopes = [], []
    sums = [torch.zeros_like(p) for p in parameters]
    for start in range(0, len(rows), size):
        part = slice(start, start + size)
        with torch.enable_grad():
            piece = rows[part].detach().requires_grad_()
            found = ask(piece, labels[part])
            cost = found.sum() if factors is None else (found * factors[part]).sum()
            by_piece, *by_weight = torch.autograd.grad(cost, [piece, *parameters], allow_unused=True)
        scores.append(found.detach())
        slopes.append(by_piece)
        for total, one in zip(sums, by_weight, strict=True):
            if one is not None:
                total.add_(one)
    if not scores:
        return rows.new_zeros(0, dtype=torch.float32), torch.zeros_like(rows), sums
    return torch.cat(scores), torch.cat(slopes), sums
