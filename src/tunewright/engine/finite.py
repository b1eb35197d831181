"""NaN and infinity: stopped before the step, with the rows and the module in which they began.

Knows tasks as contracts and modules by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from tunewright.contracts import Batch, Loaded, State, Task
from tunewright.engine import memory
from tunewright.engine.distributed import gathered
from tunewright.engine.precision import compute_as_stored
from tunewright.errors import Fault, TrainError


def stop_unless_finite(
    logs: dict[str, float], state: State, task: Task, model: nn.Module, loaded: Loaded, micro_batches: Sequence[Batch]
) -> None:
    """NaN must never pass as success: elsewhere it is logged as 0.0 and the run exits 0 (docs/facts.md)."""
    bad = [name for name in ("loss", "grad_norm") if not math.isfinite(logs[name])]
    if bad:
        pieces = [piece for batch in micro_batches for piece in memory.cut(batch, state.pieces)]
        suspects = gathered(first_not_finite(task, model, loaded, pieces))
        found = next((s for s in suspects if s[0]), suspects[0])
        rows = found[1] or [row for _, _, rows in suspects for row in rows]
        shown = f"rows {', '.join(rows[:8])}{' ...' if len(rows) > 8 else ''}"
        raise TrainError(
            Fault(
                f"{' and '.join(bad)} not finite; the step was not taken and the last checkpoint stands",
                where=f"step {state.step + 1} of {state.total}",
                got=shown + (f"; first in {found[0]}" if found[0] else ""),
                remedy="Lower train.learning_rate, or try train.precision=float32.",
            )
        )


def first_not_finite(
    task: Task, model: nn.Module, loaded: Loaded, micro_batches: Sequence[Batch]
) -> tuple[str, list[str], list[str]]:
    """Where it began on this rank: (the first module whose output, or parameter whose gradient, is not finite; "" for
    none, rows of the micro-batch it came with, all rows of the step)."""
    everything = [row for batch in micro_batches for row in batch.get("row", [])]
    for batch in micro_batches:
        if found := _watch(task, model, loaded, batch):
            return found, list(batch.get("row", [])), everything
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not torch.isfinite(parameter.grad).all():
            return f"the gradient of {name}", [], everything
    return "", [], everything


def _watch(task: Task, model: nn.Module, loaded: Loaded, batch: Batch) -> str:
    """The first module in order of computation that gives a number which is not finite; the loss if only that does."""
    found: list[str] = []

    def look(name: str) -> Callable[[nn.Module, object, object], None]:
        def hook(module: nn.Module, given: object, output: object) -> None:
            first = output[0] if isinstance(output, tuple) and output else output
            if isinstance(first, Tensor) and first.is_floating_point() and not torch.isfinite(first).all():
                found.append(name or type(model).__name__)

        return hook

    handles = [module.register_forward_hook(look(name)) for name, module in model.named_modules()]
    try:
        device = next(model.parameters()).device
        with torch.no_grad(), compute_as_stored(model, device):
            loss = task.loss(model, batch, loaded)
    finally:
        for handle in handles:
            handle.remove()
    if found:
        return f"module {found[0]}"
    return "" if all(torch.isfinite(value).all() for value in loss.totals.values()) else "the loss"
