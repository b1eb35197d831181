"""What watches a run: the progress bar on stderr and the log in the run folder. Neither changes learning."""

from __future__ import annotations

import sys

from torch import nn

from tunewright.contracts import Callback, State
from tunewright.rundir import RunDir


class Log(Callback):
    """metrics.jsonl and evaluations.jsonl."""

    def __init__(self, run: RunDir, every: int) -> None:
        self._run, self._every = run, every

    def on_start(self, state: State, model: nn.Module) -> None:
        self._run.rewind("metrics", state.step)
        self._run.rewind("evaluations", state.step)

    def on_step(self, state: State, logs: dict[str, float]) -> None:
        if state.step % self._every == 0 or state.step in (1, state.total):
            self._run.append("metrics", {"step": state.step, "epoch": round(state.epoch, 4), **logs})

    def on_evaluate(self, state: State, scores: dict[str, float]) -> None:
        self._run.append("evaluations", {"step": state.step, "epoch": round(state.epoch, 4), **scores})


class Progress(Callback):
    """A bar with the loss and the time left."""

    def __init__(self, quiet: bool = False) -> None:
        self._quiet = quiet

    def on_start(self, state: State, model: nn.Module) -> None:
        from tqdm import tqdm

        self._bar = tqdm(
            total=state.total, initial=state.step, desc="training", unit="step", file=sys.stderr, leave=False,
            disable=self._quiet or not state.total, mininterval=0.5 if sys.stderr.isatty() else 15,
        )  # fmt: skip

    def on_step(self, state: State, logs: dict[str, float]) -> None:
        self._bar.set_postfix(loss=f"{logs['loss']:.4f}", refresh=False)
        self._bar.update()

    def on_end(self, state: State, model: nn.Module) -> None:
        self._bar.close()

    def on_error(self, state: State, error: BaseException) -> None:
        self._bar.close()
