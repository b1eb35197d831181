"""A run folder becomes a predictor: the tuned model with its processor and label names, in a new process.

Knows run folders, tasks and methods as contracts. Scores are computed in float32 on a CPU.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from tunewright import find
from tunewright.contracts import Loaded, Method, Prediction, Record, Task
from tunewright.data import inspection
from tunewright.data.batches import Examples
from tunewright.engine.distributed import choose_device
from tunewright.engine.evaluate import predict_rows
from tunewright.errors import DataError, Fault, ModelError, RunError
from tunewright.models.load import resolve, weights_digest
from tunewright.recipe import ModelSpec, Recipe
from tunewright.rundir import RunDir


@dataclass(frozen=True)
class Predictor:
    """The tuned model of a run, ready to answer."""

    task: Task
    model: nn.Module
    loaded: Loaded
    recipe: Recipe

    def __call__(self, records: Sequence[Record]) -> list[Prediction]:
        examples = Examples(records, lambda r: self.task.encode(r, self.loaded, target=False))
        size = self.recipe.train.per_device_eval_batch_size
        return predict_rows(self.task, self.model, self.loaded, examples, batch_size=size)


def open_run(path: str | Path, base: str | None = None) -> Predictor:
    """Open a finished run. `base`: where the base model lies now, if it was moved and the run needs it.

    Raises RunError, or ModelError that says what to do if the base is gone or is not the one trained on.
    """
    run = RunDir.open(path)
    folder = run.path / "model"
    if not (folder / "config.json").is_file():
        remedy = "Start `tunewright train` again with its recipe: it continues."
        raise RunError(Fault("the run is not finished: model/ is not there", where=str(run.path), remedy=remedy))
    recipe = run.recipe()
    task: Task = find.build("tasks", recipe.task.name, recipe.task.options, Task)  # type: ignore[type-abstract]
    method: Method = find.build("methods", recipe.method.name, recipe.method.options, Method)  # type: ignore[type-abstract]
    if method.standalone:
        loaded = task.load(ModelSpec(str(folder)))
        model = loaded.model
    else:
        loaded = task.load(_base(recipe, folder, base), _labels(folder))
        model = method.open(loaded, folder)
    device, _ = choose_device()
    return Predictor(task, model.to(device).eval(), loaded, recipe)


def _labels(folder: Path) -> tuple[str, ...]:
    names = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("id2label", {})
    return tuple(name for _, name in sorted(names.items(), key=lambda item: int(item[0])))


def _base(recipe: Recipe, folder: Path, moved_to: str | None) -> ModelSpec:
    """The base an adapter belongs to, proven by its SHA-256: on another one the answers would be silently wrong."""
    spec = replace(recipe.model, checkpoint=moved_to) if moved_to else recipe.model
    try:
        place, _ = resolve(spec)
    except ModelError as error:
        remedy = "If the base was moved, say where it is: --base FOLDER."
        raise ModelError(
            [*error.faults, Fault("this run is an adapter and needs its base", where="base", remedy=remedy)]
        ) from error
    trained_on = json.loads((folder / "base.json").read_text(encoding="utf-8"))["sha256"]
    found = weights_digest(place)
    if found != trained_on:
        raise ModelError(
            Fault(
                "not the base that the adapter was trained on",
                where=f"base {spec.checkpoint}",
                expected=f"weights with SHA-256 {trained_on[:12]}",
                got=found[:12],
                remedy="Give the right folder or revision: --base FOLDER.",
            )
        )
    return spec


def single_record(task: Task, value: str) -> Record:
    """One text or one picture as a record of the task's input field."""
    name, field = next((n, f) for n, f in task.fields.items() if f.kind != "label")
    read = inspection.FROM_TEXT.get(field.kind, str)
    if field.kind == "image" and not Path(value).is_file():
        raise DataError(Fault("no such file", where=value, field=name, expected="a picture"))
    return {name: read(value), "row": value if field.kind == "image" else "1", "where": "the command line", "extra": {}}


def as_output(records: Sequence[Record], predictions: Sequence[Prediction]) -> list[dict[str, Any]]:
    """One object per input, as `--json` prints them."""
    return [{"row": r["row"], **p} for r, p in zip(records, predictions, strict=True)]
