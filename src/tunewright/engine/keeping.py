"""When a run's checkpoints are written, and what happens where they cannot be: a full disk is named and tried again.

Knows checkpoints, free space and finite numbers. Does not know what is trained.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace

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


@dataclass(frozen=True)
class Snapshot:
    """What one checkpoint holds."""

    state: State
    parts: dict[str, dict[str, Tensor]]
    rates: list[float]

    @property
    def size(self) -> int:
        """Bytes on the disk, at the most."""
        return int(SLACK * sum(t.numel() * t.element_size() for part in self.parts.values() for t in part.values()))

    def copied(self) -> Snapshot:
        parts = {name: {k: t.detach().cpu().clone() for k, t in part.items()} for name, part in self.parts.items()}
        return Snapshot(self.state, parts, self.rates)


class Keeper:
    """Writes the checkpoints of one run. `owed`: the last one could not be written; it is tried again every step.

    stands: the state of the checkpoint that this start continued from.
    """

    def __init__(
        self,
        run: RunDir,
        digest: str,
        method: Method,
        train: TrainSpec,
        say: Callable[[str], None],
        stands: State | None = None,
    ) -> None:
        self._run, self._digest, self._method, self._train, self._say = run, digest, method, train, say
        self._stands = replace(stands) if stands else None
        self._best: Snapshot | None = None  # found while the disk was full: it will not come again
        self.owed = False

    def __call__(self, state: State, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """A checkpoint, written by the first rank; the others wait, so that nobody runs ahead of a file.

        Raises TrainError if what trains is not finite: such weights never replace good ones.
        """
        written = self._written(state, model, optimizer) if is_first() else True
        self.owed = from_first(lambda: not written)
        gathered(None)

    def _written(self, state: State, model: nn.Module, optimizer: torch.optim.Optimizer) -> bool:
        best_step = state.best_step if self._train.early_stopping_patience else None
        if state != self._stands and not self._saved(state, model, optimizer, is_best=state.step == best_step):
            return False
        checkpoint.rotate(self._run, self._train.save_total_limit, best_step)
        return True

    def _saved(self, state: State, model: nn.Module, optimizer: torch.optim.Optimizer, is_best: bool) -> bool:
        tensors = self._method.state(model)
        if self._train.train_batch_norm:
            tensors |= dict(model.named_buffers())
        _refuse_non_finite(tensors, state)
        parts = {"model": tensors, "optimizer": optimizers.state_by_name(optimizer)}
        now = Snapshot(replace(state), parts, [g["initial_lr"] for g in optimizer.param_groups])
        if self._best and not is_best and not self._fits(self._best):
            return False
        self._best = None
        if not self._fits(now):
            self._best = now.copied() if is_best else None
            return False
        if self.owed:
            self._say(f"There is room again: checkpoint {state.step} is written.")
        return True

    def _fits(self, snapshot: Snapshot) -> bool:
        """Whether it could be written; a full disk is said once."""
        state, free = snapshot.state, shutil.disk_usage(self._run.path).free
        try:
            if free >= snapshot.size:
                self._run.sync()  # no checkpoint without the log lines before it
                checkpoint.save(self._run, state, self._digest, snapshot.parts, {"rates": snapshot.rates})
                self._stands = state
                return True
        except (OSError, SafetensorError) as error:
            if not is_full(error):
                raise
            free = shutil.disk_usage(self._run.path).free
        if not self.owed:
            last = max(checkpoint.steps(self._run), default=None)
            stands = f"the one of step {last} stands" if last is not None else "there is none yet"
            self._say(
                f"The disk is full: checkpoint {state.step} needs {megabytes(snapshot.size)}, {megabytes(free)} are "
                f"free in {self._run.path}; {stands}. Training goes on and tries again every step: make room."
            )
        return False

    def best(self, step: int) -> dict[str, Tensor]:
        """The trained tensors of the best step."""
        if self._best:
            return self._best.parts["model"]
        return checkpoint.load(checkpoint.at_step(self._run, step))[1]["model"]


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
