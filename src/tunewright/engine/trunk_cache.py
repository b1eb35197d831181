"""The frozen trunk runs once: what reaches the lowest block that trains is kept, row by row, for all later passes.

The rows go through in the order of the data, so what is kept depends on nothing but data and batch size, and a resumed
run gets the same bytes. A row's activation was computed beside other neighbours than in its own batch, and so differs
from the uncached one by rounding (1e-6). Knows blocks by name and order; every model is asked whether it bears it.
In memory only; not yet shared between runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tunewright.contracts import Batch, Loaded, Precision, Task
from tunewright.data.batches import Steps
from tunewright.engine import memory
from tunewright.engine.distributed import to_device
from tunewright.engine.precision import compute_in
from tunewright.models.surgery import set_mode

ROOM = 2 << 30  # bytes of activations kept; where they need more, the trunk runs every time
FINE: dict[Precision, float] = {"float32": 1e-5, "bf16": 2e-2}  # how far the loss may move, relative


class TrunkCache:
    """Activations below the boundary, and a way to put them in the place of the blocks that made them."""

    def __init__(self, task: Task, loaded: Loaded, steps: Steps, device: torch.device, precision: Precision) -> None:
        self._task, self._loaded, self._steps = task, loaded, steps
        self._device, self._precision = device, precision
        self._below: list[nn.Module] = []
        self._kept: dict[str, Tensor] = {}
        self._beside = -1  # how many Nones blocks give beside the activation; -1: it comes bare, in no tuple

    def follow(self, model: nn.Module) -> None:
        """Look where the boundary is now, and fill the cache for it; `loaded.notes` says what came of it, and why."""
        before = self._below
        self._below, self._kept = [], {}
        if why := self._why_not():
            return self._note(before, why)
        modes = [(module, module.training) for module in model.modules()]
        try:
            model.eval()
            with torch.no_grad():
                why = self._fill(model)
        except (RuntimeError, MemoryError) as error:
            if not memory.is_out(error):
                raise
            why = "memory does not reach for its activations"
        finally:
            for module, mode in modes:
                module.training = mode
        if why:
            self._below, self._kept = [], {}
            return self._note(before, why)
        size = sum(t.numel() * t.element_size() for t in self._kept.values()) / 1e6
        self._loaded.notes.append(
            f"The frozen trunk ran once: what {len(self._below)} of {len(self._loaded.layout.blocks)} blocks make of "
            f"{len(self._kept)} rows is kept ({size:.3g} MB)."
        )
        return None

    def _note(self, before: list[nn.Module], why: str) -> None:
        if before or why != NOTHING:
            self._loaded.notes.append(f"The frozen trunk runs in every step: {why}.")

    def _why_not(self) -> str:
        """What rules it out before the model is asked."""
        if len(self._steps) <= self._steps.per_epoch:
            return NOTHING  # every row is seen once
        blocks = self._loaded.layout.blocks if self._loaded.layout else ()
        if not blocks or any(p.requires_grad for p in self._loaded.model.get_submodule(blocks[0]).parameters()):
            return NOTHING
        if self._task.augments:
            return "rows are augmented, so that no two passes see the same input"
        if type(self._task).prepare is not Task.prepare:
            return "this task makes its inputs while it trains"
        return ""

    # ------------------------------------------------------------------ filling
    def _fill(self, model: nn.Module) -> str:
        """Keep what comes out below the boundary for every row; a reason where that cannot be."""
        first = to_device(next(self._steps.once_over()), self._device)
        if not _by_row(first):
            return "rows are packed, so that one activation holds several"
        plain = self._cost(model, first)  # also: whatever asks a model something once does it now, unwatched
        self._below, why = self._boundary(model, first)
        if not self._below:
            return why
        if self._is_noisy(model, first):
            return "dropout below what trains is drawn anew in every step"
        model.eval()
        taken = 0
        for batch in self._steps.once_over():
            here = to_device(batch, self._device)
            output = self._lower(model, here)
            tensor = _only_tensor(output)
            if tensor is None or len(tensor) != memory.rows_of(here):
                return "its blocks hand on more than one tensor"
            self._beside = -1 if isinstance(output, Tensor) else len(output) - 1
            for row, kept in zip(batch["row"], _rows(tensor, here), strict=True):
                self._kept[row] = kept.cpu().clone()
                taken += kept.numel() * kept.element_size()
            if taken > ROOM:
                return f"its activations need more than {ROOM >> 30} GB"
        if len(self._kept) != len(self._steps.examples):
            return "row ids repeat"
        with self.under(first):
            cached = self._cost(model, first)
        if not abs(plain - cached) <= FINE[self._precision] * max(abs(plain), 1.0):
            return f"this model bears no kept activations (its loss moved by {abs(plain - cached):.2g})"
        return ""

    def _lower(self, model: nn.Module, batch: Batch) -> Any:
        """What the highest frozen block gives; what stands above it is not run."""
        given: list[Any] = []

        def enough(module: nn.Module, args: Any, output: Any) -> None:
            given.append(output)
            raise _Enough

        handle = self._below[-1].register_forward_hook(enough)
        try:
            with contextlib.suppress(_Enough):
                self._cost(model, batch)
        finally:
            handle.remove()
        return given[0]

    def _is_noisy(self, model: nn.Module, batch: Batch) -> bool:
        """Whether the trunk, as it stands while the rest trains, gives other numbers by chance.

        A dropout with nothing of its own to train follows the module around it, which may train higher up (GPT-2).
        """
        set_mode(model, dropout=self._task.dropout)
        found = []
        with torch.random.fork_rng(devices=[]):
            for seed in (1, 2):
                torch.manual_seed(seed)
                found.append(_only_tensor(self._lower(model, batch)))
        return found[0] is not None and found[1] is not None and not torch.equal(found[0], found[1])

    def _cost(self, model: nn.Module, batch: Batch) -> float:
        with compute_in(self._precision, self._device):
            loss = self._task.loss(model, batch, self._loaded)
        return float(sum(value.float() for value in loss.totals.values()))

    def _boundary(self, model: nn.Module, batch: Batch) -> tuple[list[nn.Module], str]:
        """The blocks that are done before anything trains is called, found by watching one batch."""
        inside = list(model.modules())
        blocks = [self._loaded.model.get_submodule(name) for name in self._loaded.layout.blocks]
        if not all(any(block is module for module in inside) for block in blocks):
            return [], "its blocks were put into others"
        done: list[nn.Module] = []
        began: list[int] = []  # how many blocks were done when something that trains was called
        trains = [m for m in inside if any(p.requires_grad for p in m.parameters(recurse=False))]
        handles = [m.register_forward_pre_hook(lambda module, args: began.append(len(done))) for m in trains]
        handles += [b.register_forward_hook(lambda module, args, output: done.append(module)) for b in blocks]
        try:
            self._cost(model, batch)
        finally:
            for handle in handles:
                handle.remove()
        below = blocks[: min(began, default=0)]
        if any(p.requires_grad for block in below for p in block.parameters()):
            return [], "parts that train are not called by themselves"
        if done != blocks:
            return [], "its blocks are not called one after the other, once each"
        return below, NOTHING

    # -------------------------------------------------------------------- using
    @contextlib.contextmanager
    def under(self, batch: Batch) -> Iterator[None]:
        """Inside, the frozen blocks do nothing and the highest of them gives what was kept for these rows."""
        if not self._below:
            yield
            return
        *idle, last = self._below
        kept = [self._kept[row].to(self._device) for row in batch["row"]]
        given = _together(kept, batch)
        for block in idle:
            block.forward = lambda hidden, *args, **named: self._shaped(hidden)
        last.forward = lambda *args, **named: self._shaped(given)
        try:
            yield
        finally:
            for block in self._below:
                del block.forward

    def _shaped(self, hidden: Tensor) -> Any:
        return hidden if self._beside < 0 else (hidden, *[None] * self._beside)


NOTHING = "nothing is to be gained"


class _Enough(Exception):
    """Ends a forward pass of which the rest is not needed."""


def _by_row(batch: Batch) -> bool:
    """Whether a batch holds each of its rows by itself."""
    rows = batch.get("row", [])
    return "position_ids" not in batch and len(rows) == memory.rows_of(batch) == len(set(rows))


def _only_tensor(output: Any) -> Tensor | None:
    """What a block hands on, if that is one tensor."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, tuple) and isinstance(output[0], Tensor) and all(part is None for part in output[1:]):
        return output[0]
    return None


def _together(kept: list[Tensor], batch: Batch) -> Tensor:
    """(B, ...) activations, with zeros where the batch is padded: the blocks above mask those places."""
    if "attention_mask" not in batch:
        return torch.stack(kept)
    given = kept[0].new_zeros(len(kept), batch["attention_mask"].shape[1], *kept[0].shape[1:])
    for row, one in zip(given, kept, strict=True):
        row[: len(one)] = one
    return given


def _rows(tensor: Tensor, batch: Batch) -> list[Tensor]:
    """One activation a row: real tokens alone where rows are padded at their end."""
    mask = batch.get("attention_mask")
    if mask is None:
        return list(tensor)
    return [one[: int(count)] for one, count in zip(tensor, mask.sum(-1), strict=True)]
