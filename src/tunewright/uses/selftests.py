"""The promises that everything rests on, measured here and now on tiny models: `doctor` and the tests call these.

Each function measures one thing and says the figure and its bound. Knows tasks and methods only as contracts.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from tunewright import find
from tunewright.contracts import Batch, Callback, Loaded, Method, State, Task
from tunewright.engine import checkpoint
from tunewright.engine.fit import Workplace, fit
from tunewright.errors import MethodError
from tunewright.models import tiny
from tunewright.recipe import Recipe
from tunewright.rundir import RunDir
from tunewright.runs import checking

WORDS = {"good": "good sun day", "bad": "bad rain night"}
LETTERS = "abcdefghijklmnopqrstuvwxyz"
NUM_ROWS = 24


@dataclass(frozen=True)
class Measured:
    """One self-test. value: what was measured; it passes up to `bound`, None where it could not be asked."""

    name: str
    value: float | None
    bound: float
    what: str
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        return self.value is None or self.value <= self.bound


# ------------------------------------------------------------------------- rows
def _sentence(i: int) -> str:
    return f"{WORDS[_label(i)]} {' '.join(LETTERS[i : i + 2 + i % 3])}"


def _label(i: int) -> str:
    return ("bad", "good")[i % 2]


def _image(i: int, folder: Path) -> str:
    from PIL import Image

    Image.new("RGB", (16, 16), ((220, 40, 3 * i), (40, 3 * i, 220))[i % 2]).save(folder / f"{i}.png")
    return f"{i}.png"


# kind of field -> its columns in row i; a task with another kind is named as not tested.
VALUES: dict[str, Callable[[int, Path, str], dict[str, Any]]] = {
    "text": lambda i, folder, name: {name: _sentence(i)},
    "label": lambda i, folder, name: {name: _label(i)},
    "image": lambda i, folder, name: {name: _image(i, folder)},
    "conversation": lambda i, folder, name: {"prompt": _sentence(i), "completion": f"very {_label(i)} day"},
}


def untestable(task_name: str) -> str:
    """Why no tiny model or rows can be made for a task (a missing extra is a reason); "" where they can."""
    try:
        task = find.find("tasks", task_name, Task)  # type: ignore[type-abstract]
    except ImportError as error:
        return "" if (error.name or "").startswith("tunewright") else f"the package {error.name} is not installed"
    if task.auto_class not in tiny.MAKERS:
        return f"models/tiny.py makes no {task.auto_class}"
    kinds = sorted({field.kind for field in task.fields.values()} - set(VALUES))
    return f"no rows are made here for fields of kind {', '.join(kinds)}" if kinds else ""


def tiny_recipe(folder: Path, task_name: str, method: dict[str, Any], **train: Any) -> Recipe:
    """A recipe over a tiny base and rows that suit the task's fields."""
    folder.mkdir(parents=True, exist_ok=True)
    task = find.find("tasks", task_name, Task)  # type: ignore[type-abstract]
    base, rows = folder / "base", folder / "rows.jsonl"
    if not base.exists():
        base.mkdir()
        tiny.MAKERS[task.auto_class](base)
        with rows.open("w", encoding="utf-8") as file:
            for i in range(NUM_ROWS):
                parts = [VALUES[field.kind](i, folder, name) for name, field in task.fields.items()]
                file.write(json.dumps({column: v for part in parts for column, v in part.items()}) + "\n")
    exact = {"precision": "float32", "lr_scheduler_type": "constant", "warmup_steps": 0, "max_grad_norm": 0}
    tree = {"model": str(base), "task": task_name, "data": {"train": str(rows), "holdout": 0.2}, "method": method}
    return Recipe.of(tree | {"train": exact | train})[0]


def _method(name: str) -> dict[str, Any]:
    """The method with its defaults; a head that would be solved is stepped here, through the loop."""
    fields = {f.name for f in dataclasses.fields(find.find("methods", name, Method))}  # type: ignore[type-abstract]
    return {"name": name} | ({"solver": "steps"} if "solver" in fields else {})


def _fitted(folder: Path, recipe: Recipe, *watchers: Callback) -> nn.Module:
    prepared = checking.prepare(recipe)
    task, loaded = checking.load(prepared)
    steps = checking.planned_steps(prepared, task, loaded)
    run = RunDir.create(folder, recipe)
    _, model = fit(
        task, prepared.method, loaded, steps, recipe.train, run, digest=recipe.digest(), workplace=Workplace(),
        callbacks=watchers, seed=recipe.seed,
    )  # fmt: skip
    return model


# ------------------------------------------------------------------ what is promised
def accumulation(task_name: str, folder: Path) -> Measured:
    """Eight rows at once, and eight times one row: the same weights after three steps of SGD."""
    what = "8 x 1 row against 1 x 8 rows, three steps: largest difference of a weight"
    ends = []
    for batch, cuts in ((8, 1), (1, 8)):
        recipe = tiny_recipe(
            folder, task_name, {"name": "full"}, optim="sgd", learning_rate=0.1, max_steps=3,
            per_device_train_batch_size=batch, gradient_accumulation_steps=cuts,
        )  # fmt: skip
        model = _fitted(folder / f"run-{batch}x{cuts}", recipe)
        ends.append({n: p.detach() for n, p in model.named_parameters()})
    name = f"accumulation, {task_name}"
    return Measured(name, max(float((ends[0][n] - ends[1][n]).abs().max()) for n in ends[0]), 1e-5, what)


class _Stillness(Callback):
    """Frozen tensors, buffers included, that changed; trainable ones that did not."""

    def on_start(self, state: State, model: nn.Module) -> None:
        self.before = {name: tensor.detach().clone() for name, tensor in _tensors(model)}
        self.frozen = {n for n, t in _tensors(model) if not t.requires_grad}

    def on_end(self, state: State, model: nn.Module) -> None:
        same = {name for name, tensor in _tensors(model) if torch.equal(tensor, self.before[name])}
        self.wrong = len(self.frozen - same) + len(same - self.frozen)


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def frozen(task_name: str, method_name: str, folder: Path) -> Measured:
    """After three steps, what is frozen is bit-equal and all that trains has moved."""
    watch = _Stillness()
    recipe = tiny_recipe(folder, task_name, _method(method_name), learning_rate=1e-2, max_steps=3)
    _fitted(folder / f"run-{method_name}", recipe, watch)
    what = f"tensors that should have stayed ({len(watch.frozen)} frozen) or moved, and did not"
    return Measured(f"frozen stays frozen, {method_name} ({task_name})", float(watch.wrong), 0, what)


def merged(task_name: str, method_name: str, folder: Path) -> Measured:
    """The folded model costs what the adapted one costs, row by row; and the base costs something else."""
    name = f"merged = unmerged, {method_name} ({task_name})"
    prepared = checking.prepare(tiny_recipe(folder, task_name, _method(method_name)))
    task, loaded = checking.load(prepared)
    model = prepared.method.apply(loaded.model, loaded).eval()
    batches = [task.collate([task.encode(record, loaded)]) for record in prepared.data.train[:8]]
    before = _costs(task, model, batches, loaded)
    rng = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:  # as after training: a LoRA at its start would fold to nothing
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=rng)
    try:
        folded = prepared.method.merge(model).eval()
    except MethodError:
        return Measured(name, None, 2e-5, "this method cannot be folded into its base")
    own, other = (_costs(task, m, batches, loaded) for m in (model, folded))
    moved = float((own - before).abs().max())
    if moved < 1e-3:  # then nothing would have been compared
        return Measured(name, float("inf"), 2e-5, f"what trains moves the loss by {moved:.1e} only: no test")
    what = f"largest difference of a row's loss, which what trains had moved by {moved:.1e}"
    return Measured(name, float((own - other).abs().max()), 2e-5, what)


@torch.no_grad()
def _costs(task: Task, model: nn.Module, batches: list[Batch], loaded: Loaded) -> Tensor:
    """(B,) the loss of each row, a mean over its items."""
    rows = []
    for batch in batches:
        totals, counts = task.loss(model, batch, loaded).totals, task.weights(batch)
        rows.append(torch.stack([value / counts[term] for term, value in totals.items()]).sum())
    return torch.stack(rows)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "cut": lambda p: p.write_bytes(p.read_bytes()[:-1]),
    "emptied": lambda p: p.write_bytes(b""),
    "one bit flipped": lambda p: p.write_bytes(p.read_bytes()[:-1] + bytes([p.read_bytes()[-1] ^ 1])),
    "deleted": lambda p: p.unlink(),
}


def damage(folder: Path) -> Measured:
    """A checkpoint in which any one file is hurt is passed over for the one before it."""
    missed = tried = 0
    for hurt in DAMAGE:
        for name in ("MANIFEST.json", "model.safetensors", "optimizer.safetensors", "state.json"):
            run = RunDir(folder / f"{hurt}-{name}")
            (run.path / "checkpoints").mkdir(parents=True)
            tensors = {"model": {"w": torch.ones(3)}, "optimizer": {"w::step": torch.tensor(1.0)}}
            good, bad = (checkpoint.save(run, State(step=i, total=9), "digest", tensors, {}) for i in (1, 2))
            DAMAGE[hurt](bad / name)
            found, skipped = checkpoint.latest(run, "digest")
            tried += 1
            missed += found != good or not skipped or name not in skipped[0]
    return Measured("checkpoint damage is found", float(missed), 0, f"of {tried} damaged checkpoints not found")


# --------------------------------------------------------------------------- all
def tests() -> list[tuple[str, Callable[[Path], Measured]]]:
    """Every self-test as (name of its folder, function of the folder): tasks once, methods on the first task."""
    cells: list[tuple[str, Callable[[Path], Measured]]] = [("damage", damage)]
    known = [name for name in find.names("tasks") if not untestable(name)]
    opened = [name for name in known if _opens(name)]
    for task_name in known:
        cells.append((task_name, lambda folder, t=task_name: accumulation(t, folder)))  # type: ignore[misc]
    for number, method_name in enumerate(find.names("methods")):
        task_name = opened[number % len(opened)]  # in turn: every method once, every kind of model in use
        for test in (frozen, merged):
            cells.append((task_name, lambda folder, f=test, t=task_name, m=method_name: f(t, m, folder)))  # type: ignore[misc]
    return cells


def _opens(task_name: str) -> bool:
    """Whether a task's file can be imported; one that cannot fails its own test, not those of the methods."""
    try:
        find.find("tasks", task_name, Task)  # type: ignore[type-abstract]
    except ImportError:
        return False
    return True


def run_all() -> list[Measured]:
    """All of them in a folder that is gone afterwards. A test that raises has failed, with what it said."""
    found = []
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="tunewright-") as place:
        for room, test in tests():
            began = time.perf_counter()
            try:
                measured = test(Path(place) / room)
            except Exception as error:  # whatever it is, the other tests still say something
                measured = Measured(room, float("inf"), 0, f"{type(error).__name__}: {error}")
            found.append(dataclasses.replace(measured, seconds=round(time.perf_counter() - began, 3)))
    for task_name in find.names("tasks"):
        if why := untestable(task_name):
            found.append(Measured(f"accumulation, {task_name}", None, 1e-5, f"not tested: {why}"))
    return found
