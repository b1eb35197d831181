"""(IA)3: keys, values and the inner activation of the feed-forward, each scaled by a learned vector. Through peft.

Use it when there are only some dozen rows, or thousands of adapters to keep: it trains a few thousand numbers, costs
nothing once it is merged, and cannot change much.

Liu et al. 2022, arXiv 2205.05638: softmax(Q (l_k K)^T) (l_v V) and W2 (l_ff act(W1 x)), all l = 1 at first. Where one
product makes queries, keys and values its whole output is scaled; in a convolutional net, the output channels of every
convolution that mixes them. Knows Layout, never a model class.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from tunewright.contracts import Loaded, Method
from tunewright.errors import Fault, MethodError
from tunewright.models import peft_adapters
from tunewright.models.places import down_projections, keys_and_values, own_head
from tunewright.models.quantize import dequantized, is_quantized

# Channels are scaled one after the other through dozens of layers: on photographs 3e-2 fell from 93 % right to 74 %
OF_CONVOLUTIONS = 0.1


@dataclass(frozen=True)
class Ia3(Method):
    learning_rate: ClassVar[float] = 3e-2
    learning_rate_reason: ClassVar[str] = (
        "vectors at 1 must travel far: best of 3e-3 to 1e-1 on a small encoder, where the paper's 3e-3 hardly learnt"
    )
    standalone: ClassVar[bool] = False
    imports: ClassVar[tuple[str, ...]] = ("peft",)

    @property
    def keeps_base(self) -> bool:
        return True

    def apply(self, model: nn.Module, loaded: Loaded) -> nn.Module:
        import peft

        outputs, inputs = _scaled(model, loaded)
        config = peft.IA3Config(
            # full names: "output.dense" would also be the end of "attention.output.dense"
            target_modules=[*outputs, *inputs],
            feedforward_modules=inputs,
            fan_in_fan_out=any(type(model.get_submodule(name)).__name__ == "Conv1D" for name in outputs + inputs),
            # a head that is not named here stays random, untrained and unsaved, without a word (docs/facts.md)
            modules_to_save=list(own_head(model, loaded)) or None,
        )
        return peft_adapters.put_on(model, config, loaded)

    def groups(
        self, model: nn.Module, loaded: Loaded, learning_rate: float, weight_decay: float
    ) -> list[dict[str, Any]]:
        """No decay on the vectors: it would pull them to 0, and what changes nothing is 1."""
        vectors: dict[bool, list[tuple[str, nn.Parameter]]] = {False: [], True: []}  # of a convolution or not
        groups = []
        for group in super().groups(model, loaded, learning_rate, weight_decay):
            for name, p in group["params"]:
                if ".ia3_l." in name:
                    vectors[p.ndim > 2].append((name, p))
            others = [(name, p) for name, p in group["params"] if ".ia3_l." not in name]
            groups += [group | {"params": others}] * bool(others)
        rates = {False: learning_rate, True: learning_rate * OF_CONVOLUTIONS}
        scaled = [{"params": named, "lr": rates[kind], "weight_decay": 0.0} for kind, named in vectors.items() if named]
        return [*scaled, *groups]

    @contextlib.contextmanager
    def reference(self, model: nn.Module, start: nn.Module | None) -> Iterator[nn.Module]:
        with model.disable_adapter():  # type: ignore[operator]
            yield model

    def merge(self, model: nn.Module) -> nn.Module:
        """Folded in float32: a base in bf16 would round the scales away, and one of few bits is de-quantised first."""
        plain = dequantized(model) if is_quantized(model) else copy.deepcopy(model)
        return plain.float().merge_and_unload(safe_merge=True)  # type: ignore[operator]

    def save(self, model: nn.Module, loaded: Loaded, folder: Path) -> None:
        peft_adapters.save(model, loaded, folder)

    def open(self, loaded: Loaded, folder: Path) -> nn.Module:
        return peft_adapters.reopen(loaded, folder)

    def opening(self, loaded: Loaded) -> list[str]:
        return peft_adapters.opening(loaded, super().opening(loaded))


def _scaled(model: nn.Module, loaded: Loaded) -> tuple[list[str], list[str]]:
    """Names of the products whose outputs are scaled, and of those whose inputs are.

    Raises MethodError where a model has neither.
    """
    keys, fused = keys_and_values(loaded.layout)
    inner = down_projections(model, loaded.layout)
    mixing = [name for name in loaded.layout.mlp if isinstance(model.get_submodule(name), nn.Conv2d)]
    outputs = keys or ([] if inner else mixing)
    if not outputs and not inner:
        problem = "no keys, values, feed-forward or convolutions found inside layers that repeat"
        remedy = "Use method=lora, method=head or method=full."
        raise MethodError(Fault(problem, where="method ia3", remedy=remedy))
    if outputs is mixing:
        loaded.notes.append(f"(IA)3 moves the vectors of convolutions at {OF_CONVOLUTIONS:g} of the learning rate.")
    if keys and fused:
        loaded.notes.append("(IA)3 scales queries too: this model makes them in one product with keys and values.")
    return outputs, inner
