"""Shared ground of the tests of faults: runs that end otherwise than planned, and what must not differ afterwards."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_engine import Counting, One

from tunewright import find
from tunewright.contracts import Callback, Loaded, Method, Task
from tunewright.data.batches import Steps
from tunewright.engine.fit import fit
from tunewright.recipe import Recipe, TrainSpec
from tunewright.rundir import RunDir
from tunewright.runs.training import train

TASKS = find.names("tasks")
HERE = Path(__file__).parent
SHORT = {"max_steps": 9, "save_steps": 2, "logging_steps": 1, "precision": "float32", "learning_rate": 1e-3}


class At(Callback):
    """Does something after some steps."""

    def __init__(self, **what: Any) -> None:
        self.what = {int(name[1:]): call for name, call in what.items()}

    def on_step(self, state, logs):
        if state.step in self.what:
            self.what[state.step]()


class Killed(BaseException):
    """As a kill -9: nothing catches it."""


def killed() -> None:
    raise Killed


def run_of(recipe: Recipe, out: Path, *callbacks: Callback, **keys: Any) -> tuple[RunDir, list[str]]:
    said: list[str] = []
    return train(recipe, out, quiet=True, say=said.append, callbacks=callbacks, **keys), said


def said_while(error: type[BaseException], recipe: Recipe, out: Path, *callbacks: Callback) -> tuple[str, list[str]]:
    """What a run says that ends with this error."""
    said: list[str] = []
    with pytest.raises(error) as found:
        train(recipe, out, quiet=True, say=said.append, callbacks=callbacks)
    return str(found.value), said


def bytes_of(out: Path) -> dict[str, str]:
    """What must not differ: weights, the last checkpoint with its optimiser, and both logs without their clock."""
    last = max((out / "checkpoints").glob("[0-9]*"))
    files = [*(out / "model").glob("*.safetensors"), *last.glob("*.safetensors")]
    assert len(files) == 3
    found = {f"{p.parent.name}/{p.name}": hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
    for name in ("metrics", "evaluations"):
        path = out / f"{name}.jsonl"
        lines = [json.loads(x) | {"seconds": 0} for x in path.read_text().splitlines()] if path.exists() else []
        found[name] = json.dumps(lines)
    return found


@dataclasses.dataclass(frozen=True)
class Judged(Counting):
    metrics = (find.find("tasks", "text-classification", Task).metrics[0],)


def fit_one(
    folder: Path, spec: TrainSpec, *callbacks: Callback, rows=(1.0,), evaluate=None, task: Task | None = None, **keys
):
    """`fit` on the model of one weight. Its gradient is the mean of the rows."""
    examples = [{"row": f"r{i}", "x": torch.tensor([float(x)])} for i, x in enumerate(rows)]
    steps = Steps(
        examples, Counting().collate, lambda e, rng: e, seed=0, batch_size=spec.per_device_train_batch_size,
        accumulation=1, epochs=1, max_steps=spec.max_steps,
    )  # fmt: skip
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    full = find.build("methods", "full", {}, Method)
    return fit(
        task or Judged(), full, Loaded(One(), None, None), steps, spec, RunDir(folder), digest="d", callbacks=callbacks,
        evaluate=evaluate, **keys,
    )  # fmt: skip


def newest(out: Path) -> int:
    return max((int(p.name) for p in (out / "checkpoints").glob("*") if p.name.isdigit()), default=0)


def logged(out: Path, key: str) -> list[float]:
    return [json.loads(line)[key] for line in (out / "metrics.jsonl").read_text().splitlines()]
