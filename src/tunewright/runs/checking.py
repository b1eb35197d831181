"""Before a single step: everything that would stop or spoil a run, and what will be trained on, shown.

Knows recipe, data, task and method as contracts. Collects every fault there is before it raises.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tunewright import find
from tunewright.contracts import Loaded, Method, Task
from tunewright.data import records
from tunewright.data.batches import Examples, Steps
from tunewright.errors import DataError, Fault, ModelError, RecipeError, UserError
from tunewright.models.load import resolve
from tunewright.models.surgery import count_parameters
from tunewright.recipe import Choice, Recipe
from tunewright.runs.evidence.verdict import visible_sentence


@dataclass(frozen=True)
class Prepared:
    """A recipe whose task, method and data are there and sound."""

    recipe: Recipe
    task: Task
    method: Method
    data: records.Data
    notes: list[str] = field(default_factory=list)


def prepare(recipe: Recipe) -> Prepared:
    """Build task and method, read the data, find the base. Raises with all faults of all of them together."""
    faults: list[Fault] = []
    task = _build("tasks", recipe.task, Task, faults)
    method = _build("methods", recipe.method, Method, faults)
    data = None
    if task is not None:
        validation = recipe.train.early_stopping_patience is not None
        data, found = records.load(recipe.data, task.fields, seed=recipe.seed, validation=validation)
        faults += found
    try:
        resolve(recipe.model)
    except ModelError as error:
        faults += error.faults
    if faults or task is None or method is None or data is None:
        raise _kind(faults)(faults)
    data.facts["notes"] = data.notes
    return Prepared(recipe, task, method, data)


def with_the_rest(error: RecipeError) -> UserError:
    """The faults of a recipe, and those of the data, task, method and base that its sound part names."""
    if error.rest is None:
        return error
    try:
        prepare(error.rest)
    except UserError as more:
        return UserError([*error.faults, *more.faults])
    return error


def _build(folder: str, choice: Choice, kind: type[Any], faults: list[Fault]) -> Any:
    try:
        return find.build(folder, choice.name, choice.options, kind)
    except RecipeError as error:
        faults += error.faults
        return None


def _kind(faults: Sequence[Fault]) -> type[UserError]:
    """The most telling class for what was found; they are the same to the exit code."""
    return DataError if all("." in f.where and " " in f.where for f in faults) else UserError


def load(prepared: Prepared) -> tuple[Task, Loaded]:
    """The base in the task's shape, and the task fitted to the training rows."""
    import torch

    from tunewright.data.batches import derive_seed

    torch.manual_seed(derive_seed(prepared.recipe.seed, "head"))  # a new head is drawn while loading
    loaded = prepared.task.load(prepared.recipe.model, prepared.data.labels)
    return prepared.task.fit_to(prepared.data.train), loaded


def planned_steps(prepared: Prepared, task: Task, loaded: Loaded) -> Steps:
    """The training rows as steps."""
    train = prepared.recipe.train
    rows = task.rows(loaded, prepared.data.train)
    return Steps(
        Examples(rows, lambda record: task.encode(record, loaded)), task.collate, task.augment,
        seed=prepared.recipe.seed, batch_size=train.per_device_train_batch_size,
        accumulation=train.gradient_accumulation_steps, epochs=train.num_train_epochs, max_steps=train.max_steps,
    )  # fmt: skip


def lengths(examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Lengths and truncation over examples that have them; {} where examples have no length."""
    if not len(examples) or "length" not in examples[0]:
        return {}
    sizes = np.array([examples[i]["length"] for i in range(len(examples))])
    cut = sum(examples[i].get("truncated", 0) > 0 for i in range(len(examples)))
    return {
        "lengths": {
            "min": int(sizes.min()), "median": int(np.median(sizes)), "p95": int(np.quantile(sizes, 0.95)),
            "max": int(sizes.max()), "unit": "tokens",
        },
        "truncated": {"rows": int(cut), "of": len(examples)},
    }  # fmt: skip


def settings(prepared: Prepared, steps: Steps) -> list[str]:
    """What was chosen where the recipe left it open, each with its reason."""
    train, method = prepared.recipe.train, prepared.method
    rate = train.learning_rate
    said = [
        f"learning_rate {rate:g}, from the recipe."
        if rate is not None
        else f"learning_rate {method.learning_rate:g}, the method's own: {method.learning_rate_reason}."
    ]
    rows = min(train.per_device_train_batch_size * train.gradient_accumulation_steps, len(steps.examples))
    said.append(f"{len(steps)} steps of {rows} rows, {steps.per_epoch} steps a pass over {len(steps.examples)} rows.")
    return said + method.remarks()


def check(recipe: Recipe) -> dict[str, Any]:
    """Everything `tunewright check` shows, ready for JSON. Raises UserError with all faults."""
    prepared = prepare(recipe)
    task, loaded = load(prepared)
    steps = planned_steps(prepared, task, loaded)
    example = steps.examples[0]
    facts = {key: value for key, value in prepared.data.facts.items() if key != "split"}
    model = prepared.method.apply(loaded.model, loaded)
    trainable, total = count_parameters(model)
    return {
        "ok": True,
        "digest": recipe.digest(),
        **facts,
        **lengths(steps.examples),
        "rows": {name: len(getattr(prepared.data, name)) for name in ("train", "validation", "test")},
        "example": {"row": example["row"], "shown": task.show(example, loaded)},
        "test_can_show": visible_sentence(len(prepared.data.test)),
        "settings": [*settings(prepared, steps), *loaded.notes],
        "task": dataclasses.asdict(prepared.task),
        "method": dataclasses.asdict(prepared.method),
        "trainable_parameters": trainable,
        "total_parameters": total,
        "base": loaded.origin,
    }
