"""`train.torch_compile`: the model's blocks are compiled while they train, and the log says what that was worth.

One block at a time, not the model: all blocks of a kind share one compilation, and what other files put around them
(packing, the trunk's cache) stays as it is. Only a forward pass in training that wants gradients is compiled; answers
and scores are computed plainly. Names of weights do not change. The first steps go plain, so that there is something
to compare with; which steps those are depends on their number and never on timing, so a resumed run is the same run.
"""

from __future__ import annotations

import functools
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tunewright.contracts import Callback, Loaded, State
from tunewright.engine.memory import first_line
from tunewright.errors import Fault, RecipeError, TrainError
from tunewright.models.attention import keep_from_compilers

PLAIN_STEPS = 4  # the first of them warms the machine up and is not counted
BACKEND = "inductor"
OPTIONS: dict[str, Any] = {"fallback_random": True}  # dropout draws what the plain pass would draw
REMEDY = "Leave train.torch_compile out"


def missing(device: torch.device) -> str:
    """Why nothing can be compiled here; "" where a small function could be."""
    try:
        torch.compile(_asked, backend=BACKEND, options=OPTIONS)(torch.ones(8, device=device))
    except Exception as error:  # a compiler, a backend or a driver that is not there: each says so in its own class
        return _told(error)
    return ""


def _asked(x: torch.Tensor) -> torch.Tensor:
    return x.sin() + 1


def _told(error: BaseException) -> str:
    """The line that says what is wrong: backends put their own name, and pages, around it."""
    while (inner := getattr(error, "inner_exception", None) or error.__cause__) is not None:
        error = inner
    return f"{type(error).__name__}: {first_line(error)}"


def what(loaded: Loaded) -> str:
    """A sentence on what will be compiled. Raises RecipeError where a model has no blocks."""
    kinds = sorted({type(loaded.model.get_submodule(name)).__name__ for name in loaded.layout.blocks})
    if not kinds:
        problem = "this model has no blocks that follow each other, which is what would be compiled"
        raise RecipeError(Fault(problem, "train.torch_compile", remedy=f"{REMEDY}."))
    count = len(loaded.layout.blocks)
    return f"From step {PLAIN_STEPS + 1} on {count} blocks are compiled while they train ({', '.join(kinds)})."


def compile_blocks(model: nn.Module, loaded: Loaded, asked: bool, step: int) -> None:
    """From the step on that comes after the plain ones, blocks are compiled. Called before every step."""
    if not asked or step < PLAIN_STEPS:
        return
    keep_from_compilers()
    inside = set(model.modules())
    for name in loaded.layout.blocks:
        block = loaded.model.get_submodule(name)
        if block in inside and not hasattr(block, "_is_compiled"):
            block.__class__ = _compiled_class(type(block))  # type: ignore[arg-type]


@functools.cache
def _compiled_class(kind: type[nn.Module]) -> type[nn.Module]:
    """The same module with a compiled pass. A class and no attribute, so that copies are compiled too, and whole."""
    run = torch.compile(kind.forward, backend=BACKEND, dynamic=True, options=OPTIONS)

    class Compiled(kind):  # type: ignore[misc,valid-type]
        _is_compiled = True

        def forward(self, *args: Any, **named: Any) -> Any:
            if not (self.training and torch.is_grad_enabled()):
                return super().forward(*args, **named)
            try:
                return run(self, *args, **named)
            except torch._dynamo.exc.TorchDynamoException as error:
                problem = f"{kind.__name__} cannot be compiled"
                fault = Fault(problem, "train.torch_compile", got=_told(error), remedy=f"{REMEDY}.")
                raise TrainError(fault) from error

    Compiled.__name__, Compiled.__qualname__, Compiled.__module__ = kind.__name__, kind.__qualname__, kind.__module__
    return Compiled


def clock_of(device: torch.device) -> Callable[[], float]:
    """Seconds of processor time where the processor computes, else seconds."""
    return time.perf_counter if device.type != "cpu" else lambda: sum(os.times()[:4])


class Worth(Callback):
    """Says at the end how fast steps were before and after, and about how long compiling took.

    clock: seconds. On a CPU those of the processor, compilers that were started included: they mean the same however
    busy the machine is.
    """

    def __init__(self, say: Callable[[str], None], clock: Callable[[], float]) -> None:
        self._say, self._clock = say, clock
        self._plain: list[float] = []  # seconds an item
        self._compiled: list[tuple[float, float]] = []  # seconds, items
        self._seconds = self._items = 0.0

    def on_start(self, state: State, model: nn.Module) -> None:
        self._seconds, self._items = self._clock(), state.seen

    def on_step(self, state: State, logs: dict[str, float]) -> None:
        now = self._clock()
        seconds, items = now - self._seconds, state.seen - self._items
        self._seconds, self._items = now, state.seen
        if state.step > PLAIN_STEPS:
            self._compiled.append((seconds, items))
        elif state.step > 1:
            self._plain.append(seconds / items)

    def on_evaluate(self, state: State, scores: dict[str, float]) -> None:
        self._seconds = self._clock()

    def on_end(self, state: State, model: nn.Module) -> None:
        self._say(self.sentence())

    def sentence(self) -> str:
        """Compiling is what slow steps took above the median; it happens within them and cannot be seen apart."""
        if not self._compiled:
            return f"torch_compile: nothing was compiled, the first {PLAIN_STEPS} steps go plain."
        now = statistics.median(seconds / items for seconds, items in self._compiled)
        spent = sum(s - now * n for s, n in self._compiled if s > 2 * now * n)
        cost = f"torch_compile: compiling took about {spent:.1f} s"
        if not self._plain:
            return f"{cost}; no plain step of this start to compare with."
        before = statistics.median(self._plain)
        saved = sum((before - now) * n for _, n in self._compiled)
        kind = "saved" if saved >= 0 else "lost"
        return (
            f"{cost}; compiled steps were {before / now:.2f} times as fast as the plain ones and {kind} "
            f"{abs(saved):.1f} s in {len(self._compiled)} steps (medians; {len(self._plain)} plain steps)."
        )
