"""What watches a run: the progress bar on stderr and the log in the run folder. Neither changes learning."""

from __future__ import annotations

import collections
import errno
import math
import sys
from collections.abc import Callable

from torch import nn

from tunewright.contracts import Callback, State
from tunewright.rundir import RunDir

RECENT = 10  # steps whose mean is looked at: one hard batch is no explosion
DEAD = 1e-7
EXPLODED = 3.0  # times the lowest mean so far, and at least one whole unit above it


class Log(Callback):
    """metrics.jsonl and evaluations.jsonl."""

    def __init__(self, run: RunDir, every: int, say: Callable[[str], None] = lambda text: None) -> None:
        self._run, self._every, self._say = run, every, say
        self._owed: dict[str, list[dict[str, float]]] = {}

    def on_start(self, state: State, model: nn.Module) -> None:
        self._run.rewind("metrics", state.step)
        self._run.rewind("evaluations", state.step)

    def on_step(self, state: State, logs: dict[str, float]) -> None:
        if state.step % self._every == 0 or state.step in (1, state.total):
            self._write("metrics", state, logs)

    def on_evaluate(self, state: State, scores: dict[str, float]) -> None:
        self._write("evaluations", state, scores)

    def on_end(self, state: State, model: nn.Module) -> None:
        for name, lines in self._owed.items():
            if lines:
                self._run.append(name, *lines)

    def _write(self, name: str, state: State, values: dict[str, float]) -> None:
        """Lines that a full disk refuses are kept and written with the next one; training goes on."""
        lines = self._owed.setdefault(name, [])
        lines.append({"step": state.step, "epoch": round(state.epoch, 4), **values})
        try:
            self._run.append(name, *lines)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            if len(lines) == 1:
                self._say(f"The disk is full: {name}.jsonl waits for room in {self._run.path}. Training goes on.")
            return
        lines.clear()


class Suspicion(Callback):
    """Warns, once each, of a loss that is dead or has exploded. It never stops a run: the verdict is the judge."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say, self._recent, self._lowest = say, collections.deque[float](maxlen=RECENT), math.inf
        self._said: set[str] = set()

    def on_step(self, state: State, logs: dict[str, float]) -> None:
        self._recent.append(logs["loss"])
        if len(self._recent) < RECENT:
            return
        mean = sum(self._recent) / RECENT
        largest = max(abs(loss) for loss in self._recent)
        if largest <= DEAD:
            what = f"{largest:.2g} or less for {RECENT} steps"
            self._warn(
                "dead", state, f"the loss has been {what}: nothing is left to learn, or nothing reaches the model"
            )
        if mean - self._lowest > max(1.0, (EXPLODED - 1) * abs(self._lowest)):
            what = f"from {self._lowest:.3g} to {mean:.3g} (means of {RECENT} steps)"
            self._warn("exploded", state, f"the loss has risen {what}: lower train.learning_rate")
        self._lowest = min(self._lowest, mean)

    def _warn(self, kind: str, state: State, text: str) -> None:
        if kind not in self._said:
            self._said.add(kind)
            self._say(f"Warning at step {state.step}: {text}.")


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
