"""Predictions and per-row scores over rows, in float32 on a CPU. Knows tasks only as contracts."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from tunewright.contracts import Example, Loaded, Prediction, Record, Task
from tunewright.engine import memory
from tunewright.engine.distributed import split_rows, to_device
from tunewright.engine.precision import compute_in
from tunewright.errors import Fault, TrainError
from tunewright.models.surgery import stores_half

Show = Callable[[int], object]


def predict_rows(
    task: Task,
    model: nn.Module,
    loaded: Loaded,
    examples: Sequence[Example],
    *,
    batch_size: int = 32,
    progress: Show | None = None,
    validating: bool = False,
    say: Callable[[str], None] = lambda text: print(text, file=sys.stderr),
) -> list[Prediction]:
    """One prediction per example, in their order, whatever the batch size and the number of ranks.

    Rows of like length share a batch, so that little is padded; padding is masked, so that it does not show. Where
    memory does not reach, batches are halved and asked again. Raises TrainError if a single row does not fit.
    """
    device = next(model.parameters()).device
    order = sorted(range(len(examples)), key=lambda i: examples[i].get("length", 0))
    answer = task.validate if validating else task.predict

    def ask(chosen: Sequence[int]) -> list[Prediction]:
        found: list[Prediction] = []
        size = batch_size
        while len(found) < len(chosen):
            rows = chosen[len(found) : len(found) + size]
            try:
                found += answer(model, to_device(task.collate([examples[i] for i in rows]), device), loaded)
                if progress:
                    progress(len(rows))
                continue
            except (RuntimeError, MemoryError) as error:
                if not memory.is_out(error):
                    raise
                if len(rows) == 1:
                    where, said = f"row {examples[rows[0]].get('row', rows[0])}", memory.first_line(error)
                    problem = "memory does not reach for the answer to a single row"
                    raise TrainError(Fault(problem, where, got=said, remedy=memory.LESS)) from error
            size = len(rows) // 2
            memory.give_back()
            say(f"Out of memory while answering: {size} rows at a time from here on. The answers stay the same.")
        return found

    model.eval()
    # float32 on a CPU; weights that are stored in half precision (model.dtype) need autocast beside a float32 head
    half = device.type == "cuda" or stores_half(model)
    with torch.inference_mode(), compute_in("bf16" if half else "float32", device):
        answers = split_rows(order, ask)
    return [answers[place] for place in sorted(range(len(order)), key=lambda place: order[place])]


def score_rows(task: Task, predictions: Sequence[Prediction], records: Sequence[Record]) -> list[dict[str, Any]]:
    """The task's metrics of every row."""
    return [task.score(p, r) for p, r in zip(predictions, records, strict=True)]


def overall(task: Task, scores: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Each metric over all rows."""
    return {m.name: m.overall([s[m.name] for s in scores]) for m in task.metrics if scores and m.name in scores[0]}
