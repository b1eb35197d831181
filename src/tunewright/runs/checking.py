"""Before a single step: everything that would stop or spoil a run, and what will be trained on, shown.

Knows recipe, data, task and method as contracts. Collects every fault there is before it raises.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tunewright import find
from tunewright.contracts import Batch, Example, Loaded, Method, Record, Task
from tunewright.data import canaries, inspection, records
from tunewright.data.batches import Examples, Steps
from tunewright.data.rows import joined
from tunewright.engine import compiling, distributed, eight_bit, offload
from tunewright.engine.packing import how_to_pack
from tunewright.engine.precision import suit_storage
from tunewright.errors import DataError, Fault, ModelError, RecipeError, UserError, nearest
from tunewright.importing import bring, leave_out
from tunewright.models.label_logits import find_head
from tunewright.models.load import LOADING, is_in_few_bits, resolve
from tunewright.models.surgery import count_parameters
from tunewright.recipe import Choice, Recipe
from tunewright.runs.evidence.verdict import visible_sentence

PROCESSOR_MOST = 1024  # tokens: a processor multiplies 256 rows as fast as more (docs/performance.md), in less memory
FEW = 4096  # tokens: elsewhere smaller micro-batches are not cut
MANY_ROWS = 5000  # from here on encoding them takes long enough to show how far it is


@dataclass(frozen=True)
class Prepared:
    """A recipe whose task, method and data are there and sound."""

    recipe: Recipe
    task: Task
    method: Method
    data: records.Data
    general: dict[str, list[Record]] = field(default_factory=dict)  # by name: rows on which nothing should be lost
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
    general = {}
    faults += _missing_harness(recipe)
    faults += _no_place_for_canaries(recipe, task, data)
    faults += _not_on_this_machine(recipe)
    if task is not None and data is not None:
        general = _general(recipe, task, data, faults)
        faults += _missing_groups(recipe, data)
        try:
            task = task.fit_to(data.train)
        except RecipeError as error:
            faults += error.faults
    if method is not None and recipe.export.merged and not method.folds:
        problem = f"{recipe.method.name} cannot be folded into the weights"
        faults.append(Fault(problem, where="export.merged", remedy="Leave it out, or take lora, ia3 or full."))
    if method is not None and recipe.model.quantize and method.standalone:
        problem = f"{recipe.method.name} writes a whole model, which a base in few bits cannot become"
        faults.append(Fault(problem, where="model.quantize", remedy="Leave it out, or take lora, ia3 or bottleneck."))
    try:
        resolve(recipe.model)
    except ModelError as error:
        faults += error.faults
    if faults or task is None or method is None or data is None:
        raise _kind(faults)(faults)
    _plant(recipe, task, data)
    data.facts["notes"] = data.notes
    return Prepared(recipe, task, method, data, general)


def with_the_rest(error: RecipeError) -> UserError:
    """The faults of a recipe, and those of the data, task, method and base that its sound part names."""
    if error.rest is None:
        return error
    try:
        prepare(error.rest)
    except UserError as more:
        return UserError([*error.faults, *more.faults])
    return error


def _general(recipe: Recipe, task: Task, data: records.Data, faults: list[Fault]) -> dict[str, list[Record]]:
    """The rows of `evaluate.general`, read like test rows; those that also stand in the training rows are left out."""
    trained = {inspection.content_key(r, task.fields) for r in data.train} if recipe.evaluate.general else set()
    label = next((name for name, f in task.fields.items() if f.kind == "label"), "")
    found: dict[str, list[Record]] = {}
    for name, place in recipe.evaluate.general_sets.items():
        rows, table, wrong = records.read_inputs(
            Path(place), task.fields, columns=recipe.data.columns, required=tuple(task.fields)
        )
        if label and not wrong:
            wrong = [fault for fault, _ in inspection.unknown_labels(rows, label, data.labels)]
        faults += [dataclasses.replace(f, where=f"evaluate.general {name}, {f.where}") for f in wrong]
        kept = [r for r in rows if inspection.content_key(r, task.fields) not in trained]
        data.notes += [f"evaluate.general {name}: {note}" for note in table.notes]
        if len(kept) < len(rows):
            data.notes.append(
                f"evaluate.general {name}: {len(rows) - len(kept)} rows left out: the model trains on them"
            )
        if not kept and not wrong:
            faults.append(Fault("no row is left to score", where=f"evaluate.general {name}", got=f"{len(rows)} rows"))
        found[name] = [r | {"row": f"{name}/{r['row']}"} for r in kept]
    return found


def _no_place_for_canaries(recipe: Recipe, task: Task | None, data: records.Data | None) -> list[Fault]:
    """Planted secrets that this task would not learn to write, or that could not be told from rows of the user."""
    where, count = "evaluate.canaries", recipe.evaluate.canaries
    if task is None or not count:
        return []
    if not task.packs or canaries.field_of(task.fields) is None:
        read = ", ".join(task.fields)
        problem = f"this task does not learn to write text: no secret can be planted in its rows ({read})"
        return [Fault(problem, where=where, got=str(count), remedy="Leave it out.")]
    if data is not None and any(r["row"].startswith(f"{canaries.NAME}:") for r in data.train):
        problem = f"a file of yours is called {canaries.NAME}, as the planted rows are"
        return [Fault(problem, where=where, got=str(count), remedy="Rename the file, or leave evaluate.canaries out.")]
    return []


def _plant(recipe: Recipe, task: Task, data: records.Data) -> None:
    """Rows of our own behind the training rows, once the user's own are split; noted wherever rows are counted."""
    if not recipe.evaluate.canaries:
        return
    rows = canaries.planted(task.fields, recipe.evaluate.canaries, recipe.seed)
    data.train = joined(data.train, rows)
    many = "row of our own was" if len(rows) == 1 else "rows of our own were"
    last = f" to {rows[-1]['row']}" if len(rows) > 1 else ""
    data.notes.append(f"{len(rows)} {many} planted into the training rows: evaluate.canaries ({rows[0]['row']}{last})")
    data.facts["planted"] = {"rows": len(rows), "ids": [row["row"] for row in rows]}
    data.facts["split"] |= {row["row"]: "train" for row in rows}


def _missing_groups(recipe: Recipe, data: records.Data) -> list[Fault]:
    """Columns of `evaluate.groups` that no test row has."""
    known = sorted({column for record in data.test for column in record["extra"]})
    return [
        Fault(f'there is no column "{column}" beside the task\'s own', "evaluate.groups", "",
              f"one of {', '.join(known)}" if known else "a column that the task does not read", "",
              nearest(column, known))
        for column in recipe.evaluate.groups if column not in known and data.test
    ]  # fmt: skip


def _missing_harness(recipe: Recipe) -> list[Fault]:
    """Benchmarks that nobody here could ask."""
    where, names = "evaluate.harness", recipe.evaluate.harness
    found = [
        Fault("there is no such task file", where=where, got=name)
        for name in names if name.endswith((".yaml", ".yml")) and not Path(name).is_file()
    ]  # fmt: skip
    if names and importlib.util.find_spec("lm_eval") is None:
        remedy = "pip install 'tunewright[harness]', or leave evaluate.harness out."
        found.append(Fault("lm-evaluation-harness is not installed", where=where, remedy=remedy))
    return found


def _not_on_this_machine(recipe: Recipe) -> list[Fault]:
    """Options of training that need what this machine has not; each says what to do instead."""
    train, (device, _) = recipe.train, distributed.choose_device()
    found = []
    if train.optim == "adamw_8bit" and (why := eight_bit.missing()):
        remedy = f"{eight_bit.EXTRA}, or leave it out."
        found.append(Fault(why, "train.optim", got=train.optim, remedy=remedy))
    if train.activation_offload and (why := offload.useless(device)):
        remedy = "Leave it out. Where memory is short, train.gradient_checkpointing=true helps on every device."
        found.append(Fault("cannot help", "train.activation_offload", got=why, remedy=remedy))
    if train.torch_compile and (why := compiling.missing(device)):
        remedy = f"{compiling.REMEDY}, or give this machine a C++ compiler (g++ or clang++)."
        found.append(Fault("nothing can be compiled here", "train.torch_compile", got=why, remedy=remedy))
    return found


def _build(folder: str, choice: Choice, kind: type[Any], faults: list[Fault]) -> Any:
    try:
        return find.build(folder, choice.name, choice.options, kind)
    except RecipeError as error:
        faults += error.faults
        return None


def _kind(faults: Sequence[Fault]) -> type[UserError]:
    """The most telling class for what was found; they are the same to the exit code."""
    return DataError if all("." in f.where and " " in f.where for f in faults) else UserError


def _bring_libraries(recipe: Recipe, method: Method) -> None:
    """Import what opening the base and applying the method will need, while nothing large is alive."""
    if not (recipe.model.quantize or recipe.train.optim == "adamw_8bit" or is_in_few_bits(recipe.model)):
        leave_out("bitsandbytes")  # peft and transformers import it, and a compiler with it, wherever it is installed
    bring(*LOADING, *method.imports)


def load(prepared: Prepared) -> tuple[Task, Loaded]:
    """The base in the task's shape, and the task fitted to the training rows."""
    _bring_libraries(prepared.recipe, prepared.method)
    import torch

    from tunewright.data.batches import derive_seed

    torch.manual_seed(derive_seed(prepared.recipe.seed, "head"))  # a new head is drawn while loading
    loaded = prepared.task.load(prepared.recipe.model, prepared.data.labels)
    prepared.method.reserve(loaded)
    if prepared.recipe.train.torch_compile:
        loaded.notes.append(compiling.what(loaded))
    return prepared.task, loaded


def planned_steps(prepared: Prepared, task: Task, loaded: Loaded) -> Steps:
    """The training rows as steps, of which this process takes its share."""
    train = prepared.recipe.train
    rows = task.rows(loaded, prepared.data.train)
    if lost := _left_out(prepared.data.train, rows):
        prepared.data.facts["left_out"] = {"rows": len(lost), "of": len(prepared.data.train), "ids": lost}
    examples, collate = Examples(rows, lambda record: task.encode(record, loaded)), _collate(prepared, task, loaded)
    sizes = None if task.couples_rows else _sizes(examples)
    padded = collate == task.collate
    if examples.why:
        loaded.notes.append(f"Encoded training rows are kept in memory, up to 2 GB: {examples.why}.")
    if sizes is not None and padded:
        loaded.notes.append("Rows of like length share a step, so that less is padded; steps come in random order.")
    steps = Steps(
        examples, collate, task.augment, lengths=sizes if padded else None, tokens=sizes,
        most=None if sizes is None else _most(sizes, train.per_device_train_batch_size),
        seed=prepared.recipe.seed, batch_size=train.per_device_train_batch_size,
        accumulation=train.gradient_accumulation_steps, epochs=train.num_train_epochs, max_steps=train.max_steps,
        share=distributed.share(),
    )  # fmt: skip
    if steps.most:
        loaded.notes.append(
            f"Micro-batches hold {steps.batch_size} rows and {steps.most} tokens at most, so that none needs much more "
            "memory than the others; what a step learns from stays the same."
        )
    return steps


def _most(sizes: np.ndarray, rows: int) -> int:
    """Tokens of a micro-batch at most: few on a processor; else half as many again as rows of mean length hold."""
    if distributed.choose_device()[0].type == "cpu":
        return PROCESSOR_MOST
    return max(FEW, round(1.5 * rows * float(np.mean(sizes))))


def _sizes(examples: Sequence[Example]) -> np.ndarray | None:
    """The length of every example; None where they have none, or all the same."""
    if not len(examples) or "length" not in examples[0]:
        return None
    found = (example["length"] for example in _watched(examples, "measuring training rows"))
    sizes = np.fromiter(found, dtype=np.int64, count=len(examples))
    return sizes if sizes.min() < sizes.max() else None


def _left_out(records: Sequence[Record], rows: Sequence[Record]) -> list[str]:
    """Row ids of the records from which the task made no training row."""
    if rows is records:
        return []
    used = {row.get("where") for row in rows}
    return [record["row"] for record in records if record["where"] not in used]


def _collate(prepared: Prepared, task: Task, loaded: Loaded) -> Callable[[Sequence[Example]], Batch]:
    """How training rows become a micro-batch: padded by the task, or packed where task and model allow it."""
    asked, method = prepared.recipe.train.packing, prepared.method
    if task.packs and (missing := find_head(loaded.model).why):  # asked here, before a method puts anything around it
        loaded.notes.append(f"Logits are made for every token, labelled or not: {missing}.")
    if asked is False or (asked is None and not task.packs):
        return task.collate
    packed = None
    if not task.packs:
        why = "this task's rows are no token sequences"
    elif not method.packs:
        why = "this method puts something before every single sequence"
    else:
        packed, why = how_to_pack(loaded.model)
    if asked and packed is None:
        raise RecipeError(Fault("cannot be", where="train.packing", got=why, remedy="Leave it out: rows are padded."))
    loaded.notes.append(f"Training rows are {'packed' if packed else 'padded, not packed'}: {why}.")
    return packed or task.collate


def lengths(examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Lengths and truncation over examples that have them; {} where examples have no length."""
    if not len(examples) or "length" not in examples[0]:
        return {}
    sizes, cut = np.empty(len(examples), dtype=np.int64), 0
    for i, example in enumerate(_watched(examples, "reading training rows")):
        sizes[i] = example["length"]
        cut += example.get("truncated", 0) > 0
    return {
        "lengths": {
            "min": int(sizes.min()), "median": int(np.median(sizes)), "p95": int(np.quantile(sizes, 0.95)),
            "max": int(sizes.max()), "unit": "tokens",
        },
        "truncated": {"rows": int(cut), "of": len(examples)},
    }  # fmt: skip


def _watched(rows: Sequence[Any], what: str) -> Iterable[Any]:
    """The rows, with a bar and the time left on stderr where there are so many that a person would wonder."""
    from tqdm import tqdm

    return tqdm(
        (rows[i] for i in range(len(rows))), what, len(rows), leave=False, unit="row", file=sys.stderr,
        disable=len(rows) < MANY_ROWS or not distributed.is_first(),
    )  # fmt: skip


def cut_sentence(prepared: Prepared, task: Task, loaded: Loaded) -> list[str]:
    """How many held-out rows are longer than the model sees: they are scored on what fits, for base and tuned alike."""
    rows = prepared.data.test
    if not rows or "truncated" not in task.encode(rows[0], loaded):
        return []
    cut = sum(task.encode(record, loaded)["truncated"] > 0 for record in _watched(rows, "reading held-out rows"))
    return [f"{cut} of {len(rows)} held-out rows are cut to fit and scored on what is left."] if cut else []


def settings(prepared: Prepared, steps: Steps) -> list[str]:
    """What was chosen where the recipe left it open, each with its reason."""
    train, method = prepared.recipe.train, prepared.method
    rate = train.learning_rate
    own, reason = method.recommended()
    said = [
        f"learning_rate {rate:g}, from the recipe."
        if rate is not None
        else f"learning_rate {own:g}, the method's own: {reason}."
    ]
    step = train.per_device_train_batch_size * train.gradient_accumulation_steps * distributed.size()
    rows = min(step, len(steps.examples))
    said.append(f"{len(steps)} steps of {rows} rows, {steps.per_epoch} steps a pass over {len(steps.examples)} rows.")
    meant = [f"{key} is {shown}" for key, shown in _short_names(prepared.recipe)]
    said += [f"method: {' and '.join(meant)}."] * bool(meant)
    return said + method.remarks()


def _short_names(recipe: Recipe) -> list[tuple[str, str]]:
    """What a method's short name stood for: (key, value with the name it was meant by)."""
    found = []
    for key, source in recipe.came_from.items():
        _, sign, name = source.partition(", meant by ")
        section, _, last = key.partition(".")
        if sign:
            part = recipe.tree()[section][last]
            found.append((key, f"{part}, meant by {name}"))
    return found


def check(recipe: Recipe) -> dict[str, Any]:
    """Everything `tunewright check` shows, ready for JSON. Raises UserError with all faults."""
    prepared = prepare(recipe)
    task, loaded = load(prepared)
    steps = planned_steps(prepared, task, loaded)
    example = steps.examples[0]
    facts = {key: value for key, value in prepared.data.facts.items() if key != "split"}
    model = prepared.method.apply(loaded.model, loaded)
    suit_storage(recipe.train.precision, "float32", model)
    kept = set(prepared.method.state(model))  # also what trains only later
    trainable = sum(p.numel() for name, p in model.named_parameters() if name in kept)
    total = count_parameters(model)[1]
    return {
        "ok": True,
        "digest": recipe.digest(),
        **facts,
        **lengths(steps.examples),
        "rows": {name: len(getattr(prepared.data, name)) for name in ("train", "validation", "test")},
        "example": {"row": example["row"], "shown": task.show(example, loaded)},
        "test_can_show": visible_sentence(len(prepared.data.test), task.metrics[0]),
        "settings": [*settings(prepared, steps), *cut_sentence(prepared, task, loaded), *loaded.notes],
        "task": dataclasses.asdict(prepared.task),
        "method": dataclasses.asdict(prepared.method),
        "trainable_parameters": trainable,
        "total_parameters": total,
        "base": loaded.origin,
    }
