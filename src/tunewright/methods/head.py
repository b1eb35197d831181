"""Transfer learning: the pre-trained trunk stays frozen, a new head learns to speak the task's labels.

Use it when rows are few (below 50 a class), when the base already knows the subject, or first of all: it takes
seconds, and everything else must beat it.

Where the head is one linear layer over one vector a row, it is solved instead of stepped: the trunk runs once, and
L2-regularised logistic regression on its features finds the optimum (LBFGS), the strength chosen by cross-validation.
Knows Layout, never a model class.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from torch import nn

from tunewright.contracts import Batch, Loaded, Method, Task
from tunewright.errors import Fault, MethodError
from tunewright.models.places import whole_head
from tunewright.models.probe import solve_head
from tunewright.models.surgery import freeze


@dataclass(frozen=True)
class Head(Method):
    solver: Literal["auto", "steps"] = "auto"  # auto: the optimum by LBFGS where the head is linear; steps: by gradient

    learning_rate: ClassVar[float] = 3e-3
    learning_rate_reason: ClassVar[str] = "a head alone stands rates from 1e-3 to 1e-2"
    standalone: ClassVar[bool] = True

    def remarks(self) -> list[str]:
        solved = "The head is solved, not stepped, where it is one linear layer; rate and steps then play no part."
        return [solved] if self.solver == "auto" else []

    @property
    def keeps_base(self) -> bool:
        return False

    def apply(self, model: nn.Module, loaded: Loaded) -> nn.Module:
        places = whole_head(loaded)
        if not places:
            raise MethodError(Fault("this model has no head that could be trained alone", where="method head"))
        freeze(model, except_for=places)
        if not any(p.requires_grad for p in model.parameters()):
            problem = f"the head ({', '.join(places)}) shares its weights with the embedding, so it cannot train alone"
            raise MethodError(Fault(problem, where="method head", remedy="Use method=lora or method=full."))
        return model

    def start(self, model: nn.Module, task: Task, loaded: Loaded, batches: Iterable[Batch]) -> str | None:
        if self.solver == "steps" or (said := solve_head(model, task, loaded, batches)) is None:
            return None
        return f"{said}; rate, epochs and batch size of the recipe play no part."

    def merge(self, model: nn.Module) -> nn.Module:
        return copy.deepcopy(model)

    def save(self, model: nn.Module, loaded: Loaded, folder: Path) -> None:
        model.save_pretrained(folder)  # type: ignore[operator]
        loaded.processor.save_pretrained(folder)
