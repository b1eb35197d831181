"""Padded places are left out of the blocks that run, where a model bears that: its loss is asked both ways.

Knows blocks by name and order and the loss only as a way to call the model; how tokens are laid end to end is
models/unpadded.py. Rows that are packed already, and pictures, have no padding, and a task that makes its inputs while
it trains has no loss before: nothing is said of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from tunewright.contracts import Batch, Loaded, Task
from tunewright.data.batches import Steps
from tunewright.engine.trunk import FINE, Trunk
from tunewright.models.unpadded import attend_by_places, unpadded

LOOKED_AT = 64  # rows of which the shortest and the longest are asked


class Unpadding:
    """What `ask` found; `over` does nothing where it found a reason against."""

    def __init__(self, task: Task, trunk: Trunk, loaded: Loaded, steps: Steps) -> None:
        """trunk: how the loss is asked."""
        self._task, self._trunk, self._loaded, self._steps = task, trunk, loaded, steps
        self._blocks: list[nn.Module] = []
        self._asked = False

    def ask(self, model: nn.Module) -> None:
        """Once a run. What came of it stands in `loaded.notes`."""
        if self._asked:
            return
        self._asked = True
        batch = self._uneven() if type(self._task).prepare is Task.prepare else None
        if batch is None:
            return
        names = self._loaded.layout.blocks if self._loaded.layout else ()
        blocks = [self._loaded.model.get_submodule(name) for name in names]
        why = self._why_not(model, blocks, batch)
        if why:
            self._loaded.notes.append(f"Padded places run through every block: {why}.")
            return
        self._blocks = blocks
        self._loaded.notes.append("Padded places are left out between the first and the last block while training.")

    def _uneven(self) -> Batch | None:
        """A short and a long row together, if rows are padded in this run."""
        examples = self._steps.examples
        lengths = {i: examples[i]["length"] for i in range(min(LOOKED_AT, len(examples))) if "length" in examples[i]}
        if len(set(lengths.values())) < 2:
            return None
        by_length = sorted(lengths, key=lambda i: lengths[i])
        batch = self._steps.together([by_length[0], *by_length[-1:] * 2])
        padded = "attention_mask" in batch and "position_ids" not in batch and not bool(batch["attention_mask"].all())
        return batch if padded else None

    def _why_not(self, model: nn.Module, blocks: list[nn.Module], batch: Batch) -> str:
        if not blocks:
            return "it has no blocks"
        if next(model.parameters()).device.type != "cpu":
            return "asking each batch for its places would make a GPU wait, and was measured on processors alone"
        if any(getattr(block, "gradient_checkpointing", False) for block in blocks):
            return "blocks are computed again in the backward pass"
        attend_by_places()
        try:
            with unpadded(blocks, always=True) as found, torch.no_grad():
                without = self._trunk.cost(model, batch)
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError):
            return "this model cannot be run without them"
        if not found:
            return "its blocks are given more than a mask of padding"
        with torch.no_grad():
            plain = self._trunk.cost(model, batch)
        fine = abs(plain - without) <= FINE[self._trunk.precision] * max(abs(plain), 1.0)
        return "" if fine else f"its loss moves by {abs(plain - without):.2g} without them"

    @contextlib.contextmanager
    def over(self, left_out: Sequence[nn.Module]) -> Iterator[None]:
        """Inside, the blocks run on real tokens alone; but for those that are left out themselves."""
        blocks = self._blocks[len(left_out) :]
        with unpadded(blocks) if blocks else contextlib.nullcontext():
            yield
