"""Prefix tuning: trained keys and values stand before those of every attention; the model itself stays as it is.

Use it when many tasks share one large served model and prompt is too weak: it reaches every layer, in some ten
kilobytes a task. It makes each input longer; take lora where answers must be fast.

Li and Liang 2021, arXiv 2101.00190. Through peft, in PEFT's own format. An attention then answers
(1 - l) Attention(q, K, V) + l Attention(q, prefix keys, prefix values), l being the prefix's share of the softmax.
Knows Layout, never a model class.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from tunewright.contracts import Loaded, Method
from tunewright.errors import Fault, MethodError
from tunewright.models import peft_adapters, virtual_tokens

WHERE = "method prefix"
HEAD_RATE = 3e-3  # what a new head stands; the vectors' rate would throw it about


@dataclass(frozen=True)
class Prefix(Method):
    num_virtual_tokens: int = 16  # Li and Liang 2021: 10 for short outputs, up to 200; each takes a place from the text
    prefix_projection: bool = False  # train them through a small network that is thrown away: slower, steadier
    # what they begin as: the keys and values that the base itself gives random ordinary words, or init_text; or noise.
    # None: vocabulary; with prefix_projection random, as nobody can turn the network round
    init: Literal["vocabulary", "text", "random"] | None = None
    init_text: str | None = None  # for init: text; its tokens are repeated or cut to num_virtual_tokens
    head_learning_rate_ratio: float | None = None  # of a new head; None: so that it trains at 3e-3

    learning_rate: ClassVar[float] = 3e-2
    learning_rate_reason: ClassVar[str] = "keys and values trained directly stand a hundred times the rate of weights"
    standalone: ClassVar[bool] = False
    imports: ClassVar[tuple[str, ...]] = ("peft",)
    folds: ClassVar[bool] = False
    additive: ClassVar[bool] = False
    packs: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.num_virtual_tokens < 1:
            raise ValueError(f"num_virtual_tokens is {self.num_virtual_tokens}: 1 or more")
        if (self.init == "text") != (self.init_text is not None):
            raise ValueError("init: text and init_text belong together: give both, or neither")
        if self.prefix_projection and self.init not in (None, "random"):
            raise ValueError(f"init is {self.init}: with prefix_projection a prefix can only begin at random")
        if self.head_learning_rate_ratio is not None and not self.head_learning_rate_ratio > 0:
            raise ValueError(f"head_learning_rate_ratio is {self.head_learning_rate_ratio}: above 0")

    @property
    def keeps_base(self) -> bool:
        return True

    def recommended(self) -> tuple[float, str]:
        if self.prefix_projection:
            return 5e-4, "through its network a prefix trains at a network's rate, 5e-5 to 5e-4 (Li and Liang 2021)"
        return self.learning_rate, self.learning_rate_reason

    def reserve(self, loaded: Loaded) -> None:
        virtual_tokens.reserve(loaded, self.num_virtual_tokens, WHERE)

    def apply(self, model: nn.Module, loaded: Loaded) -> nn.Module:
        self.reserve(loaded)
        adapted = virtual_tokens.wrap(
            model,
            loaded,
            "PrefixTuningConfig",
            self.num_virtual_tokens,
            WHERE,
            prefix_projection=self.prefix_projection,
        )
        if not self.prefix_projection and self.init != "random":
            self._begin_as_words(model, adapted, loaded)
        virtual_tokens.require_effect(adapted, loaded, WHERE)
        adapted.gradient_checkpointing_enable = _refuse_checkpointing  # type: ignore[assignment]
        return adapted

    def _begin_as_words(self, model: nn.Module, adapted: nn.Module, loaded: Loaded) -> None:
        """The prefix of a language model is then, to the last digit, a prompt of these words."""
        from peft import initialize_kv_prefix_from_past_key_values
        from transformers import DynamicCache

        ids = (
            virtual_tokens.text_ids(loaded, self.init_text, self.num_virtual_tokens, WHERE)
            if self.init_text is not None
            else virtual_tokens.word_ids(loaded, self.num_virtual_tokens)
        )
        cache, body = DynamicCache(), model.base_model
        row = torch.tensor([ids], device=next(model.parameters()).device)
        try:
            with torch.no_grad():
                body(input_ids=row, attention_mask=torch.ones_like(row), past_key_values=cache)  # type: ignore[operator]
            initialize_kv_prefix_from_past_key_values(adapted, past_key_values=cache)
        except virtual_tokens.UNFIT as error:
            raise virtual_tokens.unfit(WHERE, error) from error

    def groups(
        self, model: nn.Module, loaded: Loaded, learning_rate: float, weight_decay: float
    ) -> list[dict[str, Any]]:
        ratio = self.head_learning_rate_ratio or HEAD_RATE / self.recommended()[0]
        return virtual_tokens.groups(model, learning_rate, ratio, weight_decay)

    def reference(self, model: nn.Module, start: nn.Module | None) -> AbstractContextManager[nn.Module]:
        return virtual_tokens.without(model)

    def merge(self, model: nn.Module) -> nn.Module:
        remedy = "Use the adapter as it is, or train with lora, bottleneck or full."
        raise MethodError(Fault("a prefix cannot be folded into the weights", WHERE, remedy=remedy))

    def save(self, model: nn.Module, loaded: Loaded, folder: Path) -> None:
        peft_adapters.save(model, loaded, folder)

    def open(self, loaded: Loaded, folder: Path) -> nn.Module:
        return virtual_tokens.reopen(loaded, folder, self.num_virtual_tokens, WHERE)


def _refuse_checkpointing(**options: Any) -> None:
    """transformers drops keys from outside where it computes a layer twice, and stops over two sizes in the depths."""
    problem = "a prefix does not survive gradient checkpointing, which leaves out keys and values from outside"
    remedy = "Leave it out, or use method=prompt or method=lora."
    raise MethodError(Fault(problem, "train.gradient_checkpointing", remedy=remedy))
