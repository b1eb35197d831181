"""Memory runs out: the batch is cut, the update stays the same, and what cannot be cut says so."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import same_answers
from fault_runs import SHORT, TASKS, At, Judged, Killed, bytes_of, fit_one, killed, logged, run_of, said_while
from safetensors.torch import load_file

from tunewright import find
from tunewright.contracts import Loss, Task
from tunewright.engine import checkpoint, memory
from tunewright.engine.evaluate import predict_rows
from tunewright.errors import TrainError
from tunewright.recipe import Recipe, TrainSpec
from tunewright.runs import checking


class Fails(torch.autograd.Function):
    """The identity, until memory is wanting in its backward."""

    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def little_memory(patch, name: str, rows: int, where: str = "loss", after: int = 0) -> type[Task]:
    """This task runs out of memory in loss or backward, or answering, of more than so many rows; not before the
    call number `after`."""
    kind, calls = find.find("tasks", name, Task), [0]
    loss, predict = kind.loss, kind.predict

    def num(batch) -> int:
        return next(len(value) for value in batch.values() if isinstance(value, torch.Tensor))

    def short_loss(self, model, batch, loaded):
        calls[0] += 1
        if calls[0] <= after or num(batch) <= rows:
            return loss(self, model, batch, loaded)
        if where == "loss":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        found = loss(self, model, batch, loaded)
        return Loss({term: Fails.apply(value) for term, value in found.totals.items()}, found.logs)

    def short_predict(self, model, batch, loaded):
        if len(batch["row"]) > rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return predict(self, model, batch, loaded)

    if where == "predict":
        patch.setattr(kind, "predict", short_predict)
    else:
        patch.setattr(kind, "loss", short_loss)
    return kind


STEPPED = {
    "max_steps": 3, "per_device_train_batch_size": 8, "optim": "sgd", "learning_rate": 0.1, "precision": "float32",
    "lr_scheduler_type": "constant", "warmup_steps": 0, "max_grad_norm": 0, "logging_steps": 1, "save_steps": 1,
}  # fmt: skip


def trained(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def enough(tiny_recipe, tmp_path_factory):
    """Each task with enough memory: recipe and run folder. Two micro-batches of eight rows a step."""
    made = {}

    def make(task: str, **train: Any) -> tuple[Recipe, Path]:
        key = (task, *sorted(train))
        if key not in made:
            recipe = tiny_recipe(task, train=STEPPED | {"gradient_accumulation_steps": 2} | train)
            made[key] = recipe, run_of(recipe, tmp_path_factory.mktemp("enough") / task)[0].path
        return made[key]

    return make


def test_a_cut_batch_has_every_row_once_and_its_lists_with_it():
    for rows in range(1, 18):
        batch = {"row": [f"r{i}" for i in range(rows)], "x": torch.arange(rows), "documents": ["a"] * (rows + 3)}
        for pieces in (1, 2, 4, 8, 16, 32):
            cut = memory.cut(batch, pieces)
            assert [len(piece["x"]) for piece in cut] == [len(piece["row"]) for piece in cut]
            assert torch.cat([piece["x"] for piece in cut]).tolist() == list(range(rows))
            assert [row for piece in cut for row in piece["row"]] == batch["row"]
            assert all(piece["documents"] == batch["documents"] for piece in cut)
            assert max(len(piece["x"]) for piece in cut) <= -(-rows // min(pieces, rows))


@pytest.mark.promise(6)
@pytest.mark.parametrize("where", ["loss", "backward", "second backward"])
@pytest.mark.parametrize("task", TASKS)
def test_out_of_memory_gives_the_same_update(enough, tmp_path, monkeypatch, measured, task, where):
    """second backward: gradients of the first micro-batch are there already, and must not count twice."""
    recipe, whole = enough(task, packing=False) if task in ("sft", "causal-lm") else enough(task)
    little_memory(monkeypatch, task, 4, where.split()[-1], after=1 if where.startswith("second") else 0)
    run, said = run_of(recipe, tmp_path / "run")
    told = [line for line in said if "Out of memory" in line]
    assert len(told) == 1
    assert "in step 1: micro-batches of 8 rows are cut into 2 pieces" in told[0]
    one, two = trained(whole), trained(run.path)
    worst = max((one[name] - two[name]).abs().max().item() for name in one)
    assert worst <= 1e-6
    assert logged(run.path, "loss") == pytest.approx(logged(whole, "loss"), abs=1e-6)
    assert logged(run.path, "grad_norm") == pytest.approx(logged(whole, "grad_norm"), rel=1e-5)
    measured(6, value=worst)


@pytest.mark.promise(6)
@pytest.mark.parametrize("task", [t for t in TASKS if find.find("tasks", t, Task).packs])
def test_out_of_memory_with_packed_rows_gives_the_same_update(enough, tmp_path, monkeypatch, measured, task):
    recipe, whole = enough(task, packing=True)
    little_memory(monkeypatch, task, 1)
    run, said = run_of(recipe, tmp_path / "run")
    assert [line for line in said if "Out of memory" in line]
    one, two = trained(whole), trained(run.path)
    worst = max((one[name] - two[name]).abs().max().item() for name in one)
    assert worst <= 1e-6
    assert logged(run.path, "loss") == pytest.approx(logged(whole, "loss"), abs=1e-6)
    measured(6, value=worst)


@pytest.mark.parametrize("task", TASKS)
def test_a_run_that_was_cut_for_memory_is_cut_when_it_continues(enough, tmp_path, monkeypatch, task):
    recipe, _ = enough(task, packing=False) if task in ("sft", "causal-lm") else enough(task)
    little_memory(monkeypatch, task, 2)
    whole, _ = run_of(recipe, tmp_path / "whole")
    said_while(Killed, recipe, tmp_path / "run", At(_3=killed))
    assert checkpoint.load(tmp_path / "run" / "checkpoints" / "000002")[0].pieces == 4
    run, said = run_of(recipe, tmp_path / "run")
    assert not [line for line in said if "Out of memory" in line], "it knows"
    assert bytes_of(run.path) == bytes_of(whole.path)


def test_a_single_row_that_does_not_fit_is_an_error_with_a_remedy(tiny_recipe, tmp_path, monkeypatch):
    recipe = tiny_recipe(train=STEPPED)
    little_memory(monkeypatch, "text-classification", 0)
    text, said = said_while(TrainError, recipe, tmp_path / "run")
    assert "step 1: memory does not reach for a single row; got CUDA out of memory" in text
    assert "gradient_checkpointing" in text
    assert len([line for line in said if "Out of memory" in line]) == 3, "8, 4, 2"


def test_rows_that_belong_together_are_not_parted(tmp_path):
    """Cutting a contrastive batch would change what is learnt."""

    @dataclasses.dataclass(frozen=True)
    class Coupled(Judged):
        couples_rows = True

        def loss(self, model, batch, loaded):
            raise torch.OutOfMemoryError("out of memory")

    spec = TrainSpec(learning_rate=0.1, max_steps=1, per_device_train_batch_size=4)
    with pytest.raises(TrainError, match=r"4 rows, which this task cannot part.*per_device_train_batch_size"):
        fit_one(tmp_path, spec, rows=[1.0] * 4, task=Coupled())


@pytest.mark.parametrize("task", TASKS)
def test_out_of_memory_while_answering_gives_the_same_answers(tiny_recipe, monkeypatch, task):
    ready = checking.prepare(tiny_recipe(task))
    chosen, loaded = checking.load(ready)
    examples = [chosen.encode(r, loaded) for r in ready.data.test]
    said: list[str] = []
    before = predict_rows(chosen, loaded.model, loaded, examples)
    little_memory(monkeypatch, task, 3, "predict")
    after = predict_rows(chosen, loaded.model, loaded, examples, say=said.append)
    same_answers(before, after, abs=1e-6)
    assert [line.split(":")[1].split(" rows")[0] for line in said] == [" 9", " 4", " 2"]
    little_memory(monkeypatch, task, 0, "predict")
    with pytest.raises(TrainError, match=r"single row.*got CUDA out of memory"):
        predict_rows(chosen, loaded.model, loaded, examples, say=said.append)


def test_memory_that_is_wanting_elsewhere_is_no_fault_of_ours(tiny_recipe, tmp_path, monkeypatch, cli):
    def wanting(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(torch.optim.AdamW, "step", wanting)
    tiny_recipe(train=SHORT).write(tmp_path / "recipe.yaml")
    code, _, said = cli("train", tmp_path / "recipe.yaml", f"output_dir={tmp_path / 'run'}")
    assert code == 1
    assert "memory does not reach; got CUDA out of memory" in said
    assert "Traceback" not in said


# ------------------------------------------------------------------------ freed pages
PAGES = """
import resource, sys
import torch
from tunewright.engine import memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.ones(8 << 20)  # 32 MB: 8,192 pages of 4 kB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

plain, said = faults(), memory.keep_pages()
faults()
kept = faults()
memory.give_back()
print(plain, kept, faults(), said)
"""


@pytest.mark.skipif(memory._libc() is None, reason="this is not glibc")
def test_freed_memory_stays_for_the_next_step_and_is_given_back_when_wanting():
    done = subprocess.run([sys.executable, "-c", PAGES], capture_output=True, text=True, check=True)
    plain, kept, after, said = done.stdout.split(" ", 3)
    assert "stays with the process" in said
    assert int(kept) * 20 < int(plain)
    assert int(after) > 20 * max(int(kept), 1)


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(memory, "_libc", lambda: None)
    assert memory.keep_pages() == ""
    memory.give_back()
