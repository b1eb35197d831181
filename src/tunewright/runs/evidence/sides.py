"""Base and tuned, open side by side on the same held-out rows: all that a gauge of the evidence may ask.

A gauge is one file in `runs/evidence/gauges/` with one function, `measure(sides) -> dict`, ready for JSON. It raises
NotRun with the reason where it has nothing to measure; that reason is shown in its place. It knows no task, no method
and no model by name. Knows contracts; nothing of run folders.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from tunewright.contracts import Baseline, Example, Loaded, Prediction, Record, Task
from tunewright.data.batches import Examples
from tunewright.engine.evaluate import predict_rows, score_rows

WORK = 2e12  # weights times tokens: 22 million weights answer 3,500 rows of 25 tokens in 30 s on two cores
ON_GPU = 50.0  # times as much
SIZED_ROWS = 20  # rows whose length is looked at


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
    groups:   columns whose values part the test rows, as the recipe names them.
    harness:  public benchmarks that the recipe names.
    planted:  rows of our own that were trained on besides `training`, each with a secret (data/canaries.py).
    quick:    no further pass over a model is wanted; what needs one raises NotRun.
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
    groups: tuple[str, ...] = ()
    harness: tuple[str, ...] = ()
    planted: Sequence[Record] = ()
    quick: bool = False

    def answers(self, model: nn.Module, records: Sequence[Record], validating: bool = False) -> list[Prediction]:
        """What a model answers to rows that carry their targets.

        validating: as far as the first metric needs it, where answering in full is slow (`Task.validate`).
        """
        examples = Examples(records, lambda r: self.task.encode(r, self.loaded))
        return predict_rows(self.task, model, self.loaded, examples, batch_size=self.batch_size, validating=validating)

    def affordable(self, times: int, records: Sequence[Record]) -> int:
        """How many rows like these both sides can answer so many times in about half a minute each.

        Counted as work and not in seconds, so that it is the same each time: weights times tokens, or patches of
        16 x 16 pixels.
        """
        device = next((p.device.type for p in self.tuned.parameters()), "cpu")
        examples = [self.task.encode(record, self.loaded) for record in records[:SIZED_ROWS]]
        size = sum(e["length"] if "length" in e else _patches(e) for e in examples) / max(1, len(examples))
        weights = sum(p.numel() for p in self.tuned.parameters())
        return int(WORK * (ON_GPU if device == "cuda" else 1.0) / max(1.0, weights * size * times))

    def scores(self, predictions: Sequence[Prediction], records: Sequence[Record]) -> list[dict[str, Any]]:
        """The task's metrics, row by row."""
        return score_rows(self.task, predictions, records)


def _patches(example: Example) -> float:
    return max((v.numel() for v in example.values() if isinstance(v, Tensor)), default=1) / (3 * 16 * 16)


Gauge = Callable[[Sides], dict[str, Any]]
