"""The `init` verb: looks at a person's data, guesses what can be learned from it, and writes a commented recipe.

Knows tasks by their fields alone: whose fields the columns fill is what the data is for. Every guess is said.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tunewright import find
from tunewright.contracts import Task
from tunewright.data import records
from tunewright.data.columns import LOOKED_AT, SHAPES, match
from tunewright.data.sources import Source, open_source
from tunewright.errors import DataError, Fault, ModelError, RunError, UserError
from tunewright.models.load import resolve
from tunewright.recipe import DataSpec, ModelSpec, Recipe

# A small, well-known base for each kind of model; the first that is on this machine is taken, else the first.
BASES: dict[str, tuple[str, ...]] = {
    "AutoModelForSequenceClassification": ("sentence-transformers/all-MiniLM-L6-v2",),
    "AutoModelForImageClassification": ("microsoft/resnet-18",),
    "AutoModelForCausalLM": ("HuggingFaceTB/SmolLM2-135M-Instruct", "HuggingFaceTB/SmolLM2-135M"),
}
FEW_ROWS = 300  # below this a solved head is hard to beat and cannot overfit the trunk


@dataclass(frozen=True)
class Candidate:
    """A task whose fields the data fills."""

    name: str
    task: type[Task]
    columns: dict[str, str]  # what of the task is read from which column
    notes: list[str]

    @property
    def mapped(self) -> dict[str, str]:
        """What data.columns must say: columns whose names are not the fields' own."""
        return {field: column for field, column in self.columns.items() if field != column}

    @property
    def rank(self) -> tuple[int, int, str]:
        """More columns explained is better; then more of them by their very name."""
        exact = sum(field == column for field, column in self.columns.items())
        return -len(self.columns), -exact, self.name


def start(
    place: str, *, model: str | None = None, task: str | None = None, out: Path, force: bool = False
) -> dict[str, Any]:
    """Write a recipe for a file, folder or hub id; what was guessed, and what `check` would still object to.

    Raises RunError if `out` exists, DataError if the data cannot be read or suits no task.
    """
    if out.exists() and not force:
        raise RunError(Fault("this file exists and is left as it is", str(out), remedy="--force, or another name: -o."))
    source = open_source("train", place, None)
    if source.faults:
        raise DataError(source.faults)
    chosen, others = _choose(source, place, task)
    base, why_base = (model, "") if model else _suggest(chosen.task)
    rows, labels = source.num_read, _count_labels(source, chosen)
    method, why_method = _method(chosen, rows)
    besides = f"; also possible: {others}" if others else ""
    guesses = [] if task else [f"task {chosen.name}: {_said(chosen)}{besides}"]
    guesses += [f"model {base}: {why_base}"] if why_base else []
    guesses += [f"method {method}: {why_method}", *chosen.notes]
    text = _recipe(place, out, chosen, base, why_base, method, why_method, rows, labels, bool(task))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")
    return {
        "recipe": str(out), "task": chosen.name, "model": base, "method": method, "rows": rows, "guesses": guesses,
        "faults": _objections(out),
    }  # fmt: skip


# --------------------------------------------------------------------- guessing
def _choose(source: Source, place: str, task: str | None) -> tuple[Candidate, str]:
    """The task that explains most columns and loads without a fault; the names of the others that fit."""
    fitting, why_not = [], []
    for name in [task] if task else find.names("tasks"):
        kind = find.find("tasks", name, Task)  # type: ignore[type-abstract]
        columns, notes, faults = match(source.table, source.name, kind.fields, {})
        if faults and (guessed := _guess_label(source, kind, columns)):
            columns, notes, faults = match(source.table, source.name, kind.fields, guessed)
            column = next(iter(guessed.values()))
            notes.append(f'column "{column}" is the first that looks like a label: few values, which come back')
        if faults:
            why_not.append((name, faults))
        else:
            fitting.append(Candidate(name, kind, columns, notes))
    if not fitting and task:
        raise DataError(why_not[0][1])
    if not fitting:
        faults = [Fault(f"{name} cannot be learned from this: {found[0]}", source.name) for name, found in why_not]
        raise DataError(faults)
    fitting.sort(key=lambda candidate: candidate.rank)
    sound = [c for c in fitting if not _faults(place, c)]
    best = next(iter(sound), fitting[0])
    return best, ", ".join(c.name for c in sound if c is not best)


def _faults(place: str, candidate: Candidate) -> list[Fault]:
    spec = DataSpec(place, columns=candidate.mapped)
    return records.load(spec, candidate.task.fields, seed=0, validation=False)[1]


def _guess_label(source: Source, task: type[Task], columns: dict[str, str]) -> dict[str, str]:
    """{label field: column} where only the label is missing: the first column whose values are like labels."""
    lost = [name for name in task.fields if name not in columns]
    if len(lost) != 1 or task.fields[lost[0]].kind != "label":
        return {}
    rows = source.table.rows[:LOOKED_AT]
    left = [column for column in source.table.columns if column not in columns.values()]
    values = {column: [row.values.get(column) for row in rows] for column in left}
    like = [c for c in left if SHAPES["label"]([value for value in values[c] if value not in (None, "")])]
    return {lost[0]: like[0]} if like else {}


def _said(chosen: Candidate) -> str:
    parts = [f'"{column}" is the {field}' for field, column in chosen.columns.items()]
    return "column " + " and ".join(parts) if parts else "its fields are there"


def _suggest(task: type[Task]) -> tuple[str, str]:
    known = BASES.get(task.auto_class, ())
    for name in known:
        if _is_here(name):
            return name, "a small base of this kind that is on this machine"
    if not known:
        remedy = "Name one: --model FOLDER_OR_ID"
        raise UserError(Fault("no base is known for this task", where="--model", remedy=remedy))
    return known[0], "a small, well-known base of this kind; it is not on this machine yet"


def _is_here(name: str) -> bool:
    """Whether a base opens without the network."""
    before = os.environ.get("HF_HUB_OFFLINE")
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        resolve(ModelSpec(name))
    except ModelError:
        return False
    finally:
        if before is None:
            del os.environ["HF_HUB_OFFLINE"]
        else:
            os.environ["HF_HUB_OFFLINE"] = before
    return True


def _method(chosen: Candidate, rows: int) -> tuple[str, str]:
    if _label(chosen) and rows < FEW_ROWS:
        return "head", f"{rows} rows are few: only a new last layer is trained, which takes seconds; then compare lora"
    return "lora", "small trained additions to a frozen base: little memory, and the base stays as it is"


def _label(chosen: Candidate) -> str:
    return next((name for name, field in chosen.task.fields.items() if field.kind == "label"), "")


def _count_labels(source: Source, chosen: Candidate) -> int:
    column = chosen.columns.get(_label(chosen), "")
    return len({str(row.values.get(column)) for row in source.table.rows}) if column else 0


def _objections(out: Path) -> list[str]:
    """What stands in the way of training, as `check` would say it, base included."""
    from tunewright.runs.checking import prepare

    try:
        prepare(Recipe.read(out)[0])
    except UserError as error:
        return [str(fault) for fault in error.faults]
    return []


# --------------------------------------------------------------------- writing
def _recipe(
    place: str, out: Path, chosen: Candidate, base: str, why_base: str, method: str, why_method: str, rows: int,
    labels: int, given: bool,
) -> str:  # fmt: skip
    """The recipe's text. Paths stand relative to the recipe, so that the folder can move as a whole."""
    there = Path(place).exists()
    train = os.path.relpath(place, out.parent) if there else place
    train = str(Path(place).resolve()) if train.count("../") > 2 else train  # nobody counts that many steps up
    unused = _unused(place, chosen)
    name = Path(place).resolve().name.partition(".")[0] if there else place.partition("/")[2].partition(":")[0]
    size = f"{rows:,} rows" + (f", {labels} labels" if labels else "")
    lines = [
        f"# Written by `tunewright init`. First look: tunewright check {out.name}",
        _line("model", _local(base, out), f"guessed: {why_base}" if why_base else "a folder or a hub id"),
        _line("task", chosen.name, "as asked" if given else f"guessed: {_said(chosen)}"),
        "data:",
        _line("  train", train, size),
        *([_line("  columns", chosen.mapped, "field of the task: column of yours")] if chosen.mapped else []),
        _line("  holdout", 0.1, "share kept aside to compare base and tuned; or name rows: test: other-file"),
        f"  # group: {unused or 'customer'}  # rows with the same value in this column stay on one side",
        "  # on_bad_row: quarantine  # leaves bad rows out and lists them, instead of stopping",
        _line("method", method, f"guessed: {why_method}"),
        "train:",
        _line("  num_train_epochs", 3, "passes over the training rows"),
        _line("  per_device_train_batch_size", 8, "less if memory is short, with more gradient_accumulation_steps"),
        "  # learning_rate: the method's own recommendation, which `check` shows",
        _line("output_dir", f"runs/{name or 'first'}", "the run's folder: model, report, record"),
        _line("seed", 0, ""),
    ]
    return "\n".join(lines) + "\n"


def _line(key: str, value: Any, comment: str) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True).strip()
    text = text.removesuffix("...").strip()
    comment = " ".join(comment.split())  # a column's name may hold a line end; a comment must not
    return f"{key}: {text}" + (f"  # {comment}" if comment else "")


def _local(base: str, out: Path) -> str:
    return os.path.relpath(base, out.parent) if Path(base).is_dir() and not Path(base).is_absolute() else base


def _unused(place: str, chosen: Candidate) -> str:
    """A column that might name what belongs together: not read by the task, and with values that come back."""
    table = open_source("train", place, None).table
    for column in table.columns:
        values = [str(row.values.get(column)) for row in table.rows]
        if column.isidentifier() and column not in chosen.columns.values() and 1 < len(set(values)) < len(values):
            return column
    return ""
