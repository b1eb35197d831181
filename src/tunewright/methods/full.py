"""Full fine-tuning: every weight trains. The most room to learn, the most memory, the most to forget.

Use it when there are thousands of rows, the memory for it (16 bytes a weight) and one task to serve; also for
convolutional nets, which are small.

With `l2_sp` the weights are pulled back to where they were pre-trained: Li, Grandvalet and Davoine 2018, arXiv
1802.01483. Knows Loaded, never a model class.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from tunewright.contracts import Loaded, Method
from tunewright.models.layout import within
from tunewright.models.surgery import train_in_float32

# By model: the weights as they were loaded, under their names. Beside it, so that copies and saved files know nothing.
_ANCHORS: WeakKeyDictionary[nn.Module, dict[str, Tensor]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Full(Method):
    # a new head is random: at the trunk's rate it learns too late (docs/facts.md)
    head_learning_rate_ratio: float = 10.0
    # L2-SP: each step keeps 1 / (1 + rate x l2_sp) of the way from the base; at rates near 1e-4 it is felt from 10 on
    l2_sp: float = 0.0

    learning_rate: ClassVar[float] = 5e-5
    learning_rate_reason: ClassVar[str] = "encoders of up to 400M train well between 2e-5 and 1e-4"
    standalone: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.l2_sp < 0:
            raise ValueError(f"l2_sp is {self.l2_sp}: 0 (off) or more")

    def remarks(self) -> list[str]:
        kept = (
            "l2_sp pulls towards the base and not towards zero: train.weight_decay then reaches new heads alone. "
            "A copy of the base is kept for it, 4 bytes a weight."
        )
        return [kept] if self.l2_sp else []

    @property
    def keeps_base(self) -> bool:
        return False

    def apply(self, model: nn.Module, loaded: Loaded) -> nn.Module:
        model.requires_grad_(True)
        train_in_float32(model)
        if self.l2_sp:  # a resumed run loads the base again, so this is the same copy; what is new has no anchor
            named = model.named_parameters()
            _ANCHORS[model] = {n: p.detach().clone() for n, p in named if not within(n, loaded.fresh)}
        return model

    def groups(
        self, model: nn.Module, loaded: Loaded, learning_rate: float, weight_decay: float
    ) -> list[dict[str, Any]]:
        groups = []
        for group in super().groups(model, loaded, learning_rate, weight_decay):
            new = [(n, p) for n, p in group["params"] if within(n, loaded.fresh)]
            old = [(n, p) for n, p in group["params"] if not within(n, loaded.fresh)]
            rate = group["lr"] * self.head_learning_rate_ratio
            decay = 0.0 if self.l2_sp else group["weight_decay"]
            groups += [group | {"params": old, "weight_decay": decay}] * bool(old)
            groups += [group | {"params": new, "lr": rate}] * bool(new)
        return groups

    def after_step(self, model: nn.Module, groups: Sequence[dict[str, Any]]) -> None:
        """w <- w0 + (w - w0) / (1 + lr l2_sp), which minimises |v - w|^2 / 2 + lr l2_sp |v - w0|^2 / 2 over v.

        A step of its own and not a penalty: Adam would scale a penalty's gradient away, and a large one would swing
        about w0 instead of resting there.
        """
        if not self.l2_sp:
            return
        anchors = _ANCHORS[model]
        for group in groups:
            kept = 1 / (1 + group["lr"] * self.l2_sp)
            for name, parameter in zip(group["param_names"], group["params"], strict=True):
                if name in anchors:
                    anchors[name] = anchor = anchors[name].to(parameter.device)  # moved once, in the first step
                    with torch.no_grad():
                        parameter.sub_(anchor).mul_(kept).add_(anchor)

    def merge(self, model: nn.Module) -> nn.Module:
        return copy.deepcopy(model)

    def save(self, model: nn.Module, loaded: Loaded, folder: Path) -> None:
        model.save_pretrained(folder)  # type: ignore[operator]
        loaded.processor.save_pretrained(folder)
