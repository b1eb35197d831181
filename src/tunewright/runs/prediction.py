"""A run folder becomes a predictor: the tuned model with its processor and label names, in a new process.

Knows run folders, tasks and methods as contracts. Scores are computed in float32 on a CPU.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from tunewright import find
from tunewright.contracts import Field, Loaded, Method, Prediction, Record, Task
from tunewright.data import inspection
from tunewright.data.batches import Examples
from tunewright.data.raw import RawRow
from tunewright.engine.distributed import choose_device
from tunewright.engine.evaluate import predict_rows
from tunewright.errors import DataError, Fault, ModelError, RunError
from tunewright.importing import bring
from tunewright.models.load import LOADING, resolve, weights_digest
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
    bring(*LOADING, *(() if is_whole(folder) else method_of(recipe).imports))
    task = task_of(recipe)
    if is_whole(folder):
        loaded = task.load(ModelSpec(str(folder)))
        model = loaded.model
    else:
        loaded = task.load(base_of(recipe, folder, base, "this run is an adapter"), labels_of(folder))
        model = method_of(recipe).open(loaded, folder)
    device, _ = choose_device()
    return Predictor(task, model.to(device).eval(), loaded, recipe)


def task_of(recipe: Recipe) -> Task:
    """The task of a recipe."""
    return find.build("tasks", recipe.task.name, recipe.task.options, Task)  # type: ignore[type-abstract]


def method_of(recipe: Recipe) -> Method:
    """The method of a recipe."""
    return find.build("methods", recipe.method.name, recipe.method.options, Method)  # type: ignore[type-abstract]


def is_whole(folder: Path) -> bool:
    """Whether a `model/` holds all weights and needs no base: what a method trained whole, and what was merged.

    Read off the folder and not off the method: a merged LoRA run is whole. The names are those of transformers.
    """
    return any((folder / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json"))


def labels_of(folder: Path) -> tuple[str, ...]:
    """The label names that a run's `model/` knows, in order of their ids."""
    names = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("id2label", {})
    return tuple(name for _, name in sorted(names.items(), key=lambda item: int(item[0])))


def base_of(recipe: Recipe, folder: Path, moved_to: str | None, why: str) -> ModelSpec:
    """The base that `model/` was trained from, proven by its SHA-256: on another one an adapter's answers would be
    silently wrong, and a comparison would compare nothing.

    why: what needs it, for the error.
    """
    spec = replace(recipe.model, checkpoint=moved_to) if moved_to else recipe.model
    try:
        place, _ = resolve(spec)
    except ModelError as error:
        remedy = "If the base was moved, say where it is: --base FOLDER."
        raise ModelError([*error.faults, Fault(f"{why} and needs its base", where="base", remedy=remedy)]) from error
    trained_on = json.loads((folder / "base.json").read_text(encoding="utf-8"))["sha256"]
    found = weights_digest(place)
    if found != trained_on:
        raise ModelError(
            Fault(
                "not the base that the run was trained on",
                where=f"base {spec.checkpoint}",
                expected=f"weights with SHA-256 {trained_on[:12]}",
                got=found[:12],
                remedy="Give the right folder or revision: --base FOLDER.",
            )
        )
    return spec


def input_field(task: Task) -> tuple[str, Field]:
    """The name and field of what the task is asked about."""
    return next((name, field) for name, field in task.fields.items() if field.kind != "label")


def single_record(task: Task, value: str, row: str = "1") -> Record:
    """One text or one picture as a record of the task's input field, checked like a row of a file.

    Raises DataError if it is empty, not there, or no picture.
    """
    name, field = input_field(task)
    if field.kind in inspection.FROM_TEXT:  # made of several columns in a file; here of one text
        if not value.strip():
            raise DataError(Fault("the text is empty", where=f"text {row}", field=name, expected="a text"))
        return {name: inspection.FROM_TEXT[field.kind](value), "row": row, "where": f"text {row}", "extra": {}}
    raw, root = RawRow(row, f"text {row}", {name: value}), Path()
    if field.kind == "image":
        path = Path(value).resolve()
        raw, root = RawRow(value, value, {name: path.name}), path.parent
    try:
        values, faults = inspection.check_row(raw, {name: name}, {name: field}, root, Counter())
    except FileNotFoundError as error:
        raise DataError(Fault("no such file", where=raw.where, field=name, expected="a picture")) from error
    except OSError as error:
        raise DataError(Fault(f"no picture ({error.strerror})", where=raw.where, field=name)) from error
    if faults:
        raise DataError(faults)
    return {**values, "row": raw.row, "where": raw.where, "extra": {}}


def as_output(records: Sequence[Record], predictions: Sequence[Prediction]) -> list[dict[str, Any]]:
    """One object per input, as `--json` prints them."""
    return [{"row": r["row"], **p} for r, p in zip(records, predictions, strict=True)]
