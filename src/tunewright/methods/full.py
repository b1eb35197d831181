"""Full fine-tuning: every weight trains. The most room to learn, the most memory, the most to forget.

Use it when there are thousands of rows, the memory for it (16 bytes a weight) and one task to serve; also for
convolutional nets, which are small.

Knows Loaded, never a model class.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from tunewright.contracts import Loaded, Method
from tunewright.models.layout import within
from tunewright.models.surgery import train_in_float32


@dataclass(frozen=True)
class Full(Method):
    head_learning_rate_ratio: float = (
        10.0  # a new head is random: at the trunk's rate it learns too late (docs/facts.md)
    )

    learning_rate: ClassVar[float] = 5e-5
    learning_rate_reason: ClassVar[str] = "encoders of up to 400M train well between 2e-5 and 1e-4"
    standalone: ClassVar[bool] = True

    @property
    def keeps_base(self) -> bool:
        return False

    def apply(self, model: nn.Module, loaded: Loaded) -> nn.Module:
        model.requires_grad_(True)
        train_in_float32(model)
        return model

    def groups(
        self, model: nn.Module, loaded: Loaded, learning_rate: float, weight_decay: float
    ) -> list[dict[str, Any]]:
        groups = []
        for group in super().groups(model, loaded, learning_rate, weight_decay):
            new = [(n, p) for n, p in group["params"] if within(n, loaded.fresh)]
            old = [(n, p) for n, p in group["params"] if not within(n, loaded.fresh)]
            rate = group["lr"] * self.head_learning_rate_ratio
            groups += [group | {"params": old}] * bool(old) + [group | {"params": new, "lr": rate}] * bool(new)
        return groups

    def merge(self, model: nn.Module) -> nn.Module:
        return copy.deepcopy(model)

    def save(self, model: nn.Module, loaded: Loaded, folder: Path) -> None:
        model.save_pretrained(folder)  # type: ignore[operator]
        loaded.processor.save_pretrained(folder)
