"""Base and tuned, open side by side on the same held-out rows: all that a gauge of the evidence may ask.

A gauge is one file in `runs/evidence/gauges/` with one function, `measure(sides) -> dict`, ready for JSON. It raises
NotRun with the reason where it has nothing to measure; that reason is shown in its place. It knows no task, no method
and no model by name. Knows contracts; nothing of run folders.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from tunewright.contracts import Baseline, Loaded, Prediction, Record, Task
from tunewright.data.batches import Examples
from tunewright.engine.evaluate import predict_rows, score_rows


class NotRun(Exception):
    """A gauge has nothing to measure here; the message is the reason, one sentence without a full stop."""


@dataclass(frozen=True)
class Sides:
    """before, after: what base and tuned answered to `test`, in its order.

    base:     the model that was there before training, adapters off; None where `baseline` is no model (a majority).
    baseline: answers for the base to any rows, whether it is a model or not.
    plain:    the tuned model as plain weights with the base's own parameter names, None where it cannot be folded.
    validation: rows that neither trained nor are tested on, () where there are none.
    trunk:    opens the base in the tuned model's shape, also where `base` is None; what its `fresh` names is random.
    general:  rows of other skills by the name of their set, as `evaluate.general` gives them.
    name:     the run as a person would type it after a command.
    """

    task: Task
    loaded: Loaded
    tuned: nn.Module
    base: nn.Module | None
    plain: Callable[[], nn.Module] | None
    baseline: Baseline
    training: Sequence[Record]
    validation: Sequence[Record]
    test: Sequence[Record]
    before: Sequence[Prediction]
    after: Sequence[Prediction]
    margin: float
    group: str | None
    seed: int
    batch_size: int = 32
    trunk: Callable[[], Loaded] | None = None
    general: Mapping[str, Sequence[Record]] = field(default_factory=dict)
    name: str = "RUN"

    def answers(self, model: nn.Module, records: Sequence[Record]) -> list[Prediction]:
        """What a model answers to rows that carry their targets."""
        examples = Examples(records, lambda r: self.task.encode(r, self.loaded))
        return predict_rows(self.task, model, self.loaded, examples, batch_size=self.batch_size)

    def scores(self, predictions: Sequence[Prediction], records: Sequence[Record]) -> list[dict[str, Any]]:
        """The task's metrics, row by row."""
        return score_rows(self.task, predictions, records)


Gauge = Callable[[Sides], dict[str, Any]]
