"""Prompt tuning: a few trained vectors stand before the words of every input; the model itself stays as it is.

Use it when one large served model must do many tasks, each in a few kilobytes. It equals full tuning only from about
ten billion weights on; take lora below that.

Lester et al. 2021, arXiv 2104.08691. Through peft, in PEFT's own format. In a text encoder the vectors take the first
places, so that a head that reads place 0 reads the first of them. Knows Layout, never a model class.
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
from tunewright.models.layout import speaks_words

WHERE = "method prompt"


@dataclass(frozen=True)
class Prompt(Method):
    num_virtual_tokens: int = 16  # each takes a place from the text; Lester 2021: 20 to 100 in models of billions
    # what they begin as: embeddings of random ordinary words, of init_text, or noise as wide as the word table
    init: Literal["vocabulary", "text", "random"] = "vocabulary"
    init_text: str | None = None  # for init: text; its tokens are repeated or cut to num_virtual_tokens
    head_learning_rate_ratio: float = 0.01  # of a new head: 3e-3 at the recommended rate

    learning_rate: ClassVar[float] = 0.3
    learning_rate_reason: ClassVar[str] = "the few vectors must go far, and nothing else moves: 0.3 as in Lester 2021"
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
        if not self.head_learning_rate_ratio > 0:
            raise ValueError(f"head_learning_rate_ratio is {self.head_learning_rate_ratio}: above 0")

    def remarks(self) -> list[str]:
        return ["Prompt tuning learns slowly: below some hundred steps it can stand where guessing stands."]

    @property
    def keeps_base(self) -> bool:
        return True

    def reserve(self, loaded: Loaded) -> None:
        virtual_tokens.reserve(loaded, self.num_virtual_tokens, WHERE)

    def apply(self, model: nn.Module, loaded: Loaded) -> nn.Module:
        count = self.num_virtual_tokens
        self.reserve(loaded)
        ids = (
            virtual_tokens.text_ids(loaded, self.init_text, count, WHERE)
            if self.init_text is not None
            else virtual_tokens.word_ids(loaded, count)
        )
        rows = virtual_tokens.embedded(model, loaded, ids)
        if self.init == "random":
            rows = rows.mean() + rows.std() * torch.randn_like(rows)
        adapted = virtual_tokens.wrap(model, loaded, "PromptTuningConfig", count, WHERE)
        table: Any = virtual_tokens.trained(adapted).embedding
        table.weight.data.copy_(rows)
        virtual_tokens.require_effect(adapted, loaded, WHERE)
        return adapted

    def groups(
        self, model: nn.Module, loaded: Loaded, learning_rate: float, weight_decay: float
    ) -> list[dict[str, Any]]:
        return virtual_tokens.groups(model, learning_rate, self.head_learning_rate_ratio, weight_decay)

    def reference(self, model: nn.Module, start: nn.Module | None) -> AbstractContextManager[nn.Module]:
        return virtual_tokens.without(model)

    def merge(self, model: nn.Module) -> nn.Module:
        remedy = "Use the adapter as it is, or train with lora, bottleneck or full."
        raise MethodError(Fault("virtual tokens cannot be folded into the weights", WHERE, remedy=remedy))

    def save(self, model: nn.Module, loaded: Loaded, folder: Path) -> None:
        peft_adapters.save(model, loaded, folder)

    def open(self, loaded: Loaded, folder: Path) -> nn.Module:
        return virtual_tokens.reopen(loaded, folder, self.num_virtual_tokens, WHERE)

    def opening(self, loaded: Loaded) -> list[str]:
        head = loaded.layout.head
        return virtual_tokens.opening(loaded.model, hooked=head is not None and speaks_words(loaded.model, head))
