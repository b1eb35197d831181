"""One vector for each input: what a model's last layer made of it, averaged, or what its head was given to decide by.
Knows transformers' way of asking for it.

No task: whoever calls the model does it inside the `with` block, however it likes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def last_states(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collects (B, D) float32 on the CPU for every call of the model inside the block; nothing if it hides them."""
    found: list[Tensor] = []

    def asked(_: nn.Module, args: Any, named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, named | {"output_hidden_states": True}

    def answered(_: nn.Module, args: Any, named: dict[str, Any], output: Any) -> None:
        states = getattr(output, "hidden_states", None)
        if states:
            found.append(pooled(states[-1].detach().float(), named.get("attention_mask")).cpu())

    handles = (
        model.register_forward_pre_hook(asked, with_kwargs=True),
        model.register_forward_hook(answered, with_kwargs=True),
    )
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class HeadCall:
    """One call of a head's last linear layer: given (B, D) or (B, T, D), gave (..., C), and the model's logits."""

    given: Tensor
    gave: Tensor
    logits: Tensor
    bias: bool

    def decided_by(self) -> Tensor:
        """(B, D): the vector that the answer was read from. A decoder's head reads every token, and one of them counts:
        the one whose outputs are the model's logits."""
        if self.given.ndim == 2:
            return self.given
        away = (self.gave - self.logits.unsqueeze(1)).abs().amax(-1)
        return self.given[torch.arange(len(self.given), device=self.given.device), away.argmin(1)]


@contextlib.contextmanager
def head_calls(model: nn.Module, head: str, outputs: int) -> Iterator[list[HeadCall]]:
    """Collects the last linear layer of a head for every call of the model inside the block.

    Found by place and width, `outputs`, so that wrappers around it (adapters, a trained copy) are looked through.
    """
    found: list[HeadCall] = []
    last: list[tuple[Tensor, Tensor, bool]] = []

    def ran(layer: nn.Linear, given: tuple[Tensor, ...], gave: Tensor) -> None:
        last[:] = [(given[0].detach(), gave.detach(), layer.bias is not None)]

    def answered(_: nn.Module, given: Any, output: Any) -> None:
        if last:
            given_, gave, bias = last.pop()
            found.append(HeadCall(given_.float(), gave.float(), output.logits.detach().float(), bias))

    layers = [
        m for name, m in model.named_modules()
        if isinstance(m, nn.Linear) and m.out_features == outputs and f".{head}." in f".{name}."
    ]  # fmt: skip
    handles = [layer.register_forward_hook(ran) for layer in layers] + [model.register_forward_hook(answered)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def pooled(states: Tensor, mask: Tensor | None = None) -> Tensor:
    """The mean over places: (B, T, D) over real tokens, (B, D, H, W) over pixels. Returns (B, D).

    mask: (B, T), 1 for real tokens. Virtual tokens stand before the real ones and are left out.
    """
    if states.ndim == 4:
        return states.mean((2, 3))
    if mask is None or mask.ndim != 2:
        return states.mean(1)
    real = mask.to(states).unsqueeze(-1)
    return (states[:, -mask.shape[1] :] * real).sum(1) / real.sum(1)
