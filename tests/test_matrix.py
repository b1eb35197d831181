"""Every task with every method on a tiny model: it learns, frozen stays frozen, saved is what was trained."""

from __future__ import annotations

import hashlib
import html
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import REFUSED, every_cell, same_answers
from safetensors.torch import load_file, save_file

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

    return min(1.0, max(5e-3, 10 * find.find("methods", method, Method).learning_rate))


def fields(method: str) -> set[str]:
    from tunewright.contracts import Method

    return set(find.find("methods", method, Method).__dataclass_fields__)


@pytest.mark.parametrize(("task", "method"), CELLS)
def test_the_loss_falls(cell, task, method):
    _, watch = cell(task, method)
    epoch = len(watch.losses) // EPOCHS
    assert sum(watch.losses[-epoch:]) < 0.95 * sum(watch.losses[:epoch])


@pytest.mark.promise(7)
@pytest.mark.parametrize(("task", "method"), CELLS)
def test_c25_frozen_stays_bit_equal_buffers_included_and_all_that_trains_moves(cell, task, method, measured):
    _, watch = cell(task, method)
    measured(7, got=int(watch.before == watch.after and not watch.still))
    assert watch.before == watch.after
    assert watch.still == []


REOPENED = """
import json, sys
from tunewright.rundir import RunDir
from tunewright.runs import checking
from tunewright.runs.evidence.gather import tuned_answers
from tunewright.runs.prediction import open_run
found = {}
for method, path in json.loads(sys.stdin.read()).items():
    run, predictor = RunDir.open(path), open_run(path)
    rows = checking.prepare(run.recipe()).data.test
    measured = tuned_answers(predictor.task, predictor.model, predictor.loaded, rows, 32, None)
    found[method] = measured, predictor(rows)
print(json.dumps(found))
"""


@pytest.mark.parametrize("task", find.names("tasks"))
def test_c33_a_new_process_gives_the_same_outputs(cell, task):
    """One process opens the runs of all methods; what it answers is what was measured when they ended."""
    runs = {method: cell(task, method)[0] for name, method in CELLS if name == task}
    given = json.dumps({method: str(run.path) for method, run in runs.items()})
    words = [sys.executable, "-c", REOPENED]
    done = subprocess.run(words, input=given, capture_output=True, text=True, env=os.environ, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.keys() == runs.keys()
    for method, (measured, asked) in found.items():
        written = [json.loads(x) for x in (runs[method].path / "predictions.jsonl").read_text().splitlines()]
        same_answers([line["tuned"] for line in written], measured, abs=1e-6)
        for known, unknown in zip(measured, asked, strict=True):  # without the answer at hand it says the same
            if shared := {k: v for k, v in unknown.items() if k in known}:
                same_answers([{k: known[k] for k in shared}], [shared], abs=1e-6)


class Pulled(Exception):
    """The plug."""


class Plug(Callback):
    """Pulls it after a step that no checkpoint was written for."""

    def on_step(self, state, logs):
        if state.step == STOPPED_AFTER:
            raise Pulled


SAVED_EVERY, STOPPED_AFTER = 4, 11  # of 15 steps


@pytest.mark.parametrize(("task", "method"), CELLS)
def test_c50_stopped_in_the_middle_and_started_again_ends_with_the_same_bytes(tiny_recipe, tmp_path, task, method):
    options = {"name": method} | ({"solver": "steps"} if "solver" in fields(method) else {})
    steps = {"max_steps": 15, "save_steps": SAVED_EVERY, "learning_rate": rate(method), "logging_steps": 1}
    recipe = tiny_recipe(task, method=options, train=steps | {"precision": "float32"})
    quiet = {"quiet": True, "say": lambda text: None}
    with pytest.raises(Pulled):
        train(recipe, tmp_path / "stopped", callbacks=[Plug()], **quiet)
    assert (tmp_path / "stopped" / "checkpoints" / "000008").is_dir()
    said: list[str] = []
    runs = [
        train(recipe, tmp_path / "stopped", quiet=True, say=said.append),
        train(recipe, tmp_path / "straight", **quiet),
    ]
    assert any("Continuing after step 8 of 15" in text for text in said)
    weights = [{p.name: p.read_bytes() for p in (run.path / "model").glob("*.safetensors")} for run in runs]
    assert weights[0] == weights[1] != {}
    logs = [[json.loads(x) | {"seconds": 0} for x in (r.path / "metrics.jsonl").read_text().splitlines()] for r in runs]
    assert logs[0] == logs[1]
    assert len(logs[0]) == 15


ALONE = """
import json, os, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "tunewright":
            raise ImportError("tunewright is not here")

sys.meta_path.insert(0, Blocker())
import torch, transformers
from safetensors.torch import load_file, save_file
transformers.logging.set_verbosity_error()
torch.set_num_threads(1)
found = {}
for name, (folder, inputs) in json.loads(sys.stdin.read()).items():
    os.chdir(folder)
    usage = json.load(open("usage.json"))
    there = {}
    exec("\\n".join(usage["load"]), there)
    with torch.inference_mode():
        found[name] = there["model"].eval()(**load_file(inputs)).logits.clone()
assert "tunewright" not in sys.modules
save_file(found, sys.argv[1])
"""


@pytest.mark.promise(11)
@pytest.mark.parametrize("task", find.names("tasks"))
def test_the_lines_of_the_card_open_every_result_without_us(cell, tmp_path, task, measured):
    """Logits in a process that cannot import tunewright, by the lines that the card gives, equal ours."""
    wanted, ours = {}, {}
    for method in (method for name, method in CELLS if name == task):
        run, _ = cell(task, method)
        predictor = open_run(run.path)
        record = checking.prepare(run.recipe()).data.test[0]
        batch = predictor.task.collate([predictor.task.encode(record, predictor.loaded)])
        inputs = {k: batch[k] for k in ("input_ids", "attention_mask", "pixel_values") if k in batch}
        with torch.inference_mode():
            ours[method] = predictor.model(**inputs).logits.clone()
        save_file(inputs, tmp_path / f"{method}.safetensors")
        wanted[method] = (str(run.path), str(tmp_path / f"{method}.safetensors"))
    assert len(wanted) >= 3
    words = [sys.executable, "-c", ALONE, str(tmp_path / "theirs.safetensors")]
    done = subprocess.run(words, input=json.dumps(wanted), capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == 0, done.stderr
    theirs = load_file(tmp_path / "theirs.safetensors")
    assert theirs.keys() == ours.keys()
    for method, logits in ours.items():
        # of the largest logit where that is above 1: the other process leaves its products to another library
        measured(11, value=float((theirs[method] - logits).abs().max() / logits.abs().max().clamp_min(1)))
        torch.testing.assert_close(theirs[method], logits, atol=1e-5, rtol=1e-4, msg=method)
    several = torch.stack([logits for logits in ours.values()])
    assert several.std(0).max() > 1e-3, "the methods ended in different places"


@pytest.mark.promise(13)
@pytest.mark.parametrize(("task", "method"), CELLS)
def test_beside_the_gain_stands_what_it_broke_what_it_cost_and_what_was_not_measured(cell, task, method):
    run, _ = cell(task, method)
    evidence = json.loads((run.path / "evidence.json").read_text())
    verdict, cost, flips = evidence["verdict"], evidence["cost"], evidence.get("flips")
    page, card = (html.unescape((run.path / name).read_text()) for name in ("report.html", "README.md"))
    for measure in evidence["measures"]:
        low, high = measure["ci95"]
        assert low <= measure["difference"] <= high
        assert measure["n"] == len(checking.prepare(run.recipe()).data.test)
    if flips is not None:  # where a row is right or wrong
        kinds = ("fixed", "broken", "kept_right", "still_wrong")
        assert sum(flips[kind] for kind in kinds) == evidence["measures"][0]["n"]
        assert f"fixed {flips['fixed']}, broke {flips['broken']}" in page
    assert cost["train_seconds"] > 0
    assert cost["peak_memory_bytes"] > cost["trainable_parameters"] > 0
    assert verdict["sentence"].partition(":")[0] in page
    assert verdict["sentence"].partition(":")[0] in card
    assert any("forgot" in said for said in verdict["not_measured"]), "no rows of other skills were given"
    for said in verdict["not_measured"]:
        assert said.partition(" (")[0] in page


@pytest.mark.parametrize(("task", "method"), CELLS)
def test_c69_evaluation_is_the_same_for_every_batch_size(cell, task, method):
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
