"""When a run's checkpoints are written, and what happens where they cannot be: a full disk is named and tried again.

Knows checkpoints, free space and finite numbers. Does not know what is trained.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from tunewright.contracts import Method, State
from tunewright.engine import checkpoint, optimizers
from tunewright.engine.distributed import from_first, gathered, is_first
from tunewright.errors import Fault, TrainError
from tunewright.recipe import TrainSpec
from tunewright.rundir import RunDir

SLACK = 1.1  # headers, JSON and what a file system keeps for itself


class Keeper:
    """Writes the checkpoints of one run. `owed`: the last one could not be written; it is tried again every step."""

    def __init__(self, run: RunDir, digest: str, method: Method, train: TrainSpec, say: Callable[[str], None]) -> None:
        self._run, self._digest, self._method, self._train, self._say = run, digest, method, train, say
        self.owed = False

    def __call__(self, state: State, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """A checkpoint, written by the first rank; the others wait, so that nobody runs ahead of a file.

        Raises TrainError if what trains is not finite: such weights never replace good ones.
        """
        written = self._written(state, model, optimizer) if is_first() else True
        self.owed = from_first(lambda: not written)
        gathered(None)

    def _written(self, state: State, model: nn.Module, optimizer: torch.optim.Optimizer) -> bool:
        tensors = self._method.state(model)
        if self._train.train_batch_norm:
            tensors |= dict(model.named_buffers())
        _refuse_non_finite(tensors, state)
        parts = {"model": tensors, "optimizer": optimizers.state_by_name(optimizer)}
        needed = int(SLACK * sum(t.numel() * t.element_size() for part in parts.values() for t in part.values()))
        if (free := shutil.disk_usage(self._run.path).free) < needed:
            return self._not_now(state, needed, free)
        try:
            rates = {"rates": [g["initial_lr"] for g in optimizer.param_groups]}
            checkpoint.save(self._run, state, self._digest, parts, rates)
        except (OSError, SafetensorError) as error:
            if not is_full(error):
                raise
            return self._not_now(state, needed, shutil.disk_usage(self._run.path).free)
        if self.owed:
            self._say(f"There is room again: checkpoint {state.step} is written.")
        best = state.best_step if self._train.early_stopping_patience else None
        checkpoint.rotate(self._run, self._train.save_total_limit, best)
        return True

    def _not_now(self, state: State, needed: int, free: int) -> bool:
        if not self.owed:
            last = max(checkpoint.steps(self._run), default=None)
            stands = f"the one of step {last} stands" if last is not None else "there is none yet"
            self._say(
                f"The disk is full: checkpoint {state.step} needs {megabytes(needed)}, {megabytes(free)} are free in "
                f"{self._run.path}; {stands}. Training goes on and tries again every step: make room."
            )
        return False


def _refuse_non_finite(tensors: dict[str, Tensor], state: State) -> None:
    bad = [name for name, t in tensors.items() if t.is_floating_point() and not torch.isfinite(t).all()]
    if bad:
        problem = f"{len(bad)} of {len(tensors)} trained tensors are not finite, {bad[0]} for one; they were not saved"
        remedy = "The last checkpoint stands. Lower train.learning_rate, or try train.precision=float32."
        raise TrainError(Fault(problem, where=f"step {state.step} of {state.total}", remedy=remedy))


def is_full(error: Exception) -> bool:
    """Whether a write failed for want of room (or of quota). safetensors wraps the system's number in words."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return any(f"os error {number}" in str(error) for number in (errno.ENOSPC, errno.EDQUOT))


def megabytes(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
