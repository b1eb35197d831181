"""Every task with every method on a tiny model: it learns, frozen stays frozen, saved is what was trained."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import REFUSED, every_cell, same_answers

from tunewright import find
from tunewright.contracts import Callback
from tunewright.rundir import RunDir
from tunewright.runs import checking
from tunewright.runs.prediction import open_run
from tunewright.runs.training import train

EPOCHS = 20
CELLS = every_cell()


def test_the_matrix_has_all_its_cells():
    assert len(CELLS) + len(REFUSED) == len(find.names("tasks")) * len(find.names("methods"))
    assert len(find.names("tasks")) >= 4


def digests(model: torch.nn.Module) -> dict[str, str]:
    """SHA-256 of everything frozen: parameters, and all buffers."""
    frozen = {n: p for n, p in model.named_parameters() if not p.requires_grad} | dict(model.named_buffers())
    return {n: hashlib.sha256(t.detach().cpu().numpy().tobytes()).hexdigest() for n, t in frozen.items()}


class Watch(Callback):
    """Keeps what a cell must be judged by."""

    def on_start(self, state, model):
        self.before, self.losses = digests(model), []
        self.trainable = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}

    def on_step(self, state, logs):
        self.losses.append(logs["loss"])

    def on_end(self, state, model):
        self.after = digests(model)
        self.still = [n for n, p in model.named_parameters() if n in self.trainable and p.equal(self.trainable[n])]


@pytest.fixture(scope="module")
def cell(tiny_recipe, tmp_path_factory):
    made: dict[tuple[str, str], tuple[RunDir, Watch]] = {}

    def make(task: str, method: str):
        if (task, method) not in made:
            # a head that can be solved is stepped here, so that every cell goes through the loop
            options = {"name": method} | ({"solver": "steps"} if "solver" in fields(method) else {})
            recipe = tiny_recipe(
                task,
                method=options,
                train={
                    "num_train_epochs": EPOCHS,
                    "learning_rate": rate(method),
                    "logging_steps": 1,
                    "precision": "float32",
                },
            )
            watch = Watch()
            out = tmp_path_factory.mktemp("cells") / f"{task}-{method}"
            made[task, method] = train(recipe, out, callbacks=[watch], quiet=True, say=lambda text: None), watch
        return made[task, method]

    return make


def rate(method: str) -> float:
    """Tiny models want larger steps than real ones; the methods' own order is kept."""
    from tunewright.contracts import Method

    return max(5e-3, 10 * find.find("methods", method, Method).learning_rate)


def fields(method: str) -> set[str]:
    from tunewright.contracts import Method

    return set(find.find("methods", method, Method).__dataclass_fields__)


@pytest.mark.parametrize(("task", "method"), CELLS)
def test_the_loss_falls(cell, task, method):
    _, watch = cell(task, method)
    epoch = len(watch.losses) // EPOCHS
    assert sum(watch.losses[-epoch:]) < 0.95 * sum(watch.losses[:epoch])


@pytest.mark.parametrize(("task", "method"), CELLS)
def test_frozen_stays_bit_equal_buffers_included_and_all_that_trains_moves(cell, task, method):
    _, watch = cell(task, method)
    assert watch.before == watch.after
    assert watch.still == []


@pytest.mark.parametrize(("task", "method"), CELLS)
def test_a_new_process_gives_the_same_outputs(cell, task, method):
    run, _ = cell(task, method)
    written = [json.loads(line) for line in (run.path / "predictions.jsonl").read_text().splitlines()]
    program = f"""
import json
from tunewright.runs.prediction import open_run
from tunewright.runs import checking
from tunewright.rundir import RunDir
run = RunDir.open({str(run.path)!r})
from tunewright.runs.evidence.gather import tuned_answers
predictor = open_run(run.path)
rows = checking.prepare(run.recipe()).data.test
print(json.dumps([tuned_answers(predictor.task, predictor.model, predictor.loaded, rows, 32, None), predictor(rows)]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=os.environ, check=False)
    assert done.returncode == 0, done.stderr
    measured, asked = json.loads(done.stdout)
    same_answers([line["tuned"] for line in written], measured, abs=1e-6)
    shared = [(m, {k: v for k, v in a.items() if k in m}) for m, a in zip(measured, asked, strict=True)]
    for known, unknown in shared:  # asked without the answer at hand, it says the same
        if unknown:
            same_answers([{k: known[k] for k in unknown}], [unknown], abs=1e-6)


@pytest.mark.parametrize(("task", "method"), CELLS)
def test_evaluation_is_the_same_for_every_batch_size(cell, task, method):
    run, _ = cell(task, method)
    predictor = open_run(run.path)
    rows = checking.prepare(run.recipe()).data.test
    import dataclasses

    answers = []
    for size in (1, 2, 7, 32):
        spec = dataclasses.replace(predictor.recipe.train, per_device_eval_batch_size=size)
        answers.append(dataclasses.replace(predictor, recipe=dataclasses.replace(predictor.recipe, train=spec))(rows))
    for other in answers[1:]:
        same_answers(answers[0], other, abs=1e-6)


@pytest.mark.parametrize(("task", "method"), CELLS)
def test_the_folder_is_the_record(cell, task, method):
    run, _ = cell(task, method)
    for name in ("recipe.yaml", "environment.json", "data.json", "metrics.jsonl", "scores.parquet", "evidence.json"):
        assert (run.path / name).is_file(), name
    for name in ("report.html", "README.md", "model/config.json", "model/base.json", "usage.json"):
        assert (run.path / name).is_file(), name
    assert not list(run.path.rglob("*.bin"))
    assert not list(run.path.rglob("*.pt"))
    assert not (run.path / "error.txt").exists()
