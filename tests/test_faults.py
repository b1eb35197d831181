"""What goes wrong while a run is under way: full disks, NaN, strange losses, changed minds, damage.

Each fault is made for real where it can be (a small tmpfs, a cut file); each run is then ended by the same command and
compared with the run that nobody disturbed. Signals and memory have files of their own.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_text_rows
from fault_runs import SHORT, At, Killed, bytes_of, fit_one, killed, logged, run_of, said_while
from test_engine import DAMAGE, tiny_checkpoint

from tunewright import find
from tunewright.contracts import Callback, Loss, Method, State, Task
from tunewright.engine import checkpoint, keeping
from tunewright.engine.callbacks import Log, Suspicion
from tunewright.errors import RunError, TrainError
from tunewright.recipe import Recipe, TrainSpec
from tunewright.rundir import RunDir
from tunewright.runs import training


# ------------------------------------------------------------------------ full disk
@pytest.fixture
def disk(tmp_path):
    """A disk of three MiB, and a way to fill it."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(place)], capture_output=True)
    if done.returncode:
        pytest.skip(f"no small disk can be mounted here: {done.stderr.decode().strip()}")

    class Disk:
        path = place

        def fill(self) -> None:
            with (place / "ballast").open("wb", buffering=0) as file:
                file.write(bytes(os.statvfs(place).f_bavail * os.statvfs(place).f_frsize))

        def empty(self) -> None:
            (place / "ballast").unlink()

    yield Disk()
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.fixture(scope="module")
def short(tiny_recipe, tmp_path_factory):
    """A recipe, and the bytes of its undisturbed run."""
    recipe = tiny_recipe(train=SHORT | {"max_steps": 60})
    run, _ = run_of(recipe, tmp_path_factory.mktemp("short") / "run")
    return recipe, bytes_of(run.path)


@pytest.mark.promise(4)
@pytest.mark.parametrize("known", ["free space is asked for", "free space is not known"])
def test_a_full_disk_is_named_training_goes_on_and_the_end_is_the_same(short, disk, monkeypatch, measured, known):
    recipe, whole = short
    if known == "free space is not known":  # as under a quota: the write itself must say so
        free = shutil.disk_usage(disk.path)._replace(free=2**40)
        monkeypatch.setattr(keeping.shutil, "disk_usage", lambda path: free)
    run, said = run_of(recipe, disk.path / "run", At(_3=disk.fill, _51=disk.empty))
    told = [line for line in said if "disk is full" in line]
    assert "checkpoint 4 needs 0.1 MiB" in told[0]
    assert "the one of step 2 stands" in told[0]
    assert ("0.0 MiB are free" in told[0]) == (known == "free space is asked for")
    assert "metrics.jsonl waits for room" in told[1]
    assert len(told) == 2, "each is said once"
    assert [line for line in said if "There is room again: checkpoint 51" in line]
    assert bytes_of(run.path) == whole, "weights, optimiser and every line of the log"
    assert not list(run.path.glob("checkpoints/*.tmp-*"))
    measured(4)


AFTER = {
    "_save_model": "model/ needs up to 0.0 MiB, 0.0 MiB are free",
    "_evidence": "what was being written needs",
    "write_report": "what was being written needs",
    "write_card": "what was being written needs",
}


@pytest.mark.parametrize("moment", AFTER)
def test_a_full_disk_after_training_exits_1_and_the_same_command_finishes(
    short, disk, monkeypatch, tmp_path, cli, moment
):
    recipe, whole = short
    recipe.write(tmp_path / "recipe.yaml")
    words = ("train", tmp_path / "recipe.yaml", f"output_dir={disk.path / 'run'}")
    real = getattr(training, moment)

    def full(*args):
        disk.fill()
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(training, moment, full)
        code, _, said = cli(*words)
    assert code == 1
    assert f"the disk is full: {AFTER[moment]}" in said
    assert "give the same command again" in said
    assert "Traceback" not in said
    assert not (disk.path / "run" / "README.md").exists()
    disk.empty()
    code, _, said = cli(*words)
    assert code == 0, said
    assert bytes_of(disk.path / "run") == whole
    assert (disk.path / "run" / "report.html").stat().st_size > 1000


@pytest.mark.promise(4)
@pytest.mark.parametrize("room_again", [7, 99])
def test_the_best_weights_found_while_the_disk_was_full_are_not_lost(tmp_path, monkeypatch, measured, room_again):
    """Validation says 1, 2, 1, 1, and there is no room from step 4 on, which is the best."""
    answers, step, weights = iter([1.0, 2.0, 1.0, 1.0]), [0], {}

    def evaluate(model):
        weights[step[0]] = model.w.item()
        return {"accuracy": next(answers)}

    class Watch(Callback):
        def on_step(self, state, logs):
            step[0] = state.step

    real = shutil.disk_usage
    monkeypatch.setattr(
        keeping.shutil, "disk_usage", lambda path: real(path)._replace(free=0 if 4 <= step[0] < room_again else 2**40)
    )
    spec = TrainSpec(
        learning_rate=0.1, max_steps=20, per_device_train_batch_size=1, optim="sgd", lr_scheduler_type="constant",
        eval_steps=2, early_stopping_patience=2, save_steps=2, save_total_limit=2, max_grad_norm=0,
    )  # fmt: skip
    state, model = fit_one(tmp_path, spec, Watch(), evaluate=evaluate)
    assert state.best_step == 4
    assert model.w.item() == weights[4] != weights[8]
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == (["000004", "000007", "000008"] if room_again == 7 else ["000002"])
    measured(4)


def test_a_log_that_cannot_even_be_begun_waits_for_room(tmp_path, monkeypatch):
    """The file's own first block may be what is wanting."""
    run, said, real = RunDir(tmp_path), [], Path.open

    def full(self, *args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    log = Log(run, 1, said.append)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        log.on_step(State(step=1, total=3), {"loss": 1.0})
    assert Path.open is real
    log.on_step(State(step=2, total=3), {"loss": 2.0})
    assert [line["loss"] for line in run.lines("metrics")] == [1.0, 2.0]
    assert len(said) == 1


def test_a_full_disk_does_not_keep_a_run_from_its_lock(disk):
    (disk.path / "run.lock").touch()
    disk.fill()
    run = RunDir(disk.path)
    with run.locked(), pytest.raises(RunError, match="in use by another process"), RunDir(disk.path).locked():
        pass
    disk.empty()
    with run.locked(), pytest.raises(RunError, match=f"in use by process {os.getpid()}"), RunDir(disk.path).locked():
        pass


def test_what_a_killed_save_left_makes_room_at_the_next_start(tmp_path):
    run, path = tiny_checkpoint(tmp_path, 2)
    shutil.copytree(path, path.with_name("000004.tmp-999"))
    path.rename(path.with_name("000002.tmp-replaced"))  # killed between the two renames of a save of the same step
    assert checkpoint.latest(run, "digest")[0].name == "000002"
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["000002"]


# ------------------------------------------------------------------------------ NaN
LAYER = "bert.encoder.layer.1.intermediate.dense"


def poison(kind: str):
    """What turns into NaN in the sixth step; the fourth is saved."""

    class Poison(Callback):
        def on_start(self, state, model):
            self.model, self.layer = model, model.get_submodule(LAYER)

        def on_step(self, state, logs):
            if state.step != 5:
                return
            if kind == "weight":
                with torch.no_grad():
                    self.layer.weight[0, 0] = float("nan")
            if kind == "gradient":
                self.layer.weight.register_hook(lambda gradient: gradient * float("nan"))
            if kind == "activation":
                self.layer.register_forward_hook(lambda module, given, output: output / 0)

    return Poison()


@pytest.mark.promise(10)
@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("loss", "loss and grad_norm not finite.*; first in the loss"),
        ("gradient", f"grad_norm not finite.*; first in the gradient of {LAYER}.weight"),
        ("weight", f"loss and grad_norm not finite.*; first in module {LAYER}"),
        ("activation", f"loss and grad_norm not finite.*; first in module {LAYER}"),
    ],
)
def test_nan_stops_before_the_step_and_names_step_rows_and_module(
    tiny_recipe, tmp_path, monkeypatch, measured, kind, expected
):
    recipe = tiny_recipe(train=SHORT)
    whole, _ = run_of(recipe, tmp_path / "whole")
    with monkeypatch.context() as patch:
        if kind == "loss":
            task, calls = find.find("tasks", "text-classification", Task), [0]
            loss = task.loss

            def bad(self, model, batch, loaded):
                calls[0] += torch.is_grad_enabled()  # not where the model is only asked something
                found = loss(self, model, batch, loaded)
                factor = float("nan") if calls[0] >= 6 else 1.0
                return Loss({term: value * factor for term, value in found.totals.items()})

            patch.setattr(task, "loss", bad)
        text, _ = said_while(TrainError, recipe, tmp_path / "run", poison(kind))
    assert re.search(f"step 6 of 9: {expected}", text), text
    assert "rows rows.csv:" in text
    assert "the step was not taken" in text
    assert (tmp_path / "run" / "error.txt").read_text().strip() == text
    assert checkpoint.latest(RunDir(tmp_path / "run"), recipe.digest())[0].name == "000004"
    run, said = run_of(recipe, tmp_path / "run")
    assert "Continuing after step 4 of 9 (checkpoint 000004)." in said
    assert bytes_of(run.path) == bytes_of(whole.path), "the step that was not taken was taken now"
    measured(10)


def test_a_run_that_met_nan_exits_1(tiny_recipe, tmp_path, monkeypatch, cli):
    task = find.find("tasks", "text-classification", Task)
    monkeypatch.setattr(
        task, "loss", lambda self, model, batch, loaded: Loss({"cross_entropy": model.classifier.weight.sum() / 0})
    )
    tiny_recipe(train=SHORT).write(tmp_path / "recipe.yaml")
    code, _, said = cli("train", tmp_path / "recipe.yaml", f"output_dir={tmp_path / 'run'}")
    assert code == 1
    assert "step 1 of 9: loss and grad_norm not finite" in said
    assert "Traceback" not in said


@pytest.mark.promise(4)
@pytest.mark.parametrize("step", [4, 5, 20])
def test_weights_that_are_not_finite_are_never_written_nor_the_best(tmp_path, monkeypatch, measured, step):
    """They come with the update itself, its gradient finite: at a save, between saves, and in the last step."""
    full, real = find.find("methods", "full", Method), find.find("methods", "full", Method).after_step
    taken = [0]

    def overflow(self, model, groups):
        real(self, model, groups)
        taken[0] += 1
        if taken[0] == step:
            with torch.no_grad():
                model.w.fill_(float("inf"))

    monkeypatch.setattr(full, "after_step", overflow)
    spec = TrainSpec(
        learning_rate=0.1, max_steps=20, per_device_train_batch_size=1, optim="sgd", eval_steps=2, save_steps=2,
        early_stopping_patience=9, save_total_limit=2,
    )  # fmt: skip
    with pytest.raises(TrainError, match="finite"):
        fit_one(tmp_path, spec, evaluate=lambda model: {"accuracy": abs(model.w.item()) if step != 4 else 0.5})
    found, skipped = checkpoint.latest(RunDir(tmp_path), "d")
    state, tensors, _ = checkpoint.load(found)
    assert skipped == []
    assert state.step == (step - 1) // 2 * 2
    assert state.best_step <= state.step
    assert checkpoint.at_step(RunDir(tmp_path), state.best_step).is_dir()
    assert tensors["model"]["w"].isfinite().all()
    measured(4)


@pytest.mark.promise(4)
@pytest.mark.parametrize("days", [-30, 30])
def test_a_clock_that_is_wrong_loses_no_checkpoint(tmp_path, measured, days):
    """The best is that of step 4, of ten steps; every folder's time is set a month off as soon as it stands."""
    answers = iter([1.0, 2.0, 1.0, 1.0, 1.0])

    class Skew(Callback):
        def on_step(self, state, logs):
            for path in (tmp_path / "checkpoints").glob("*"):
                os.utime(path, (time.time() + (state.step % 3 - 1) * days * 86400,) * 2)

    spec = TrainSpec(
        learning_rate=0.1, max_steps=10, per_device_train_batch_size=1, optim="sgd", eval_steps=2, save_steps=1,
        early_stopping_patience=9, save_total_limit=2,
    )  # fmt: skip
    fit_one(tmp_path, spec, Skew(), evaluate=lambda model: {"accuracy": next(answers)})
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["000004", "000009", "000010"]
    assert checkpoint.latest(RunDir(tmp_path), "d")[0].name == "000010"
    measured(4)


# ------------------------------------------------------------------- strange losses
def warnings_of(losses: list[float]) -> list[str]:
    said: list[str] = []
    watch = Suspicion(said.append)
    for i, loss in enumerate(losses):
        watch.on_step(State(step=i + 1, total=len(losses)), {"loss": loss})
    return said


def test_a_dead_loss_warns_once():
    said = warnings_of([1.0] * 5 + [0.0] * 100)
    assert len(said) == 1
    assert said[0].startswith("Warning at step 15: the loss has been 0 or less for 10 steps")


def test_an_exploding_loss_warns_once():
    said = warnings_of([2.0] * 20 + [2.0 * 1.2**i for i in range(60)])
    assert len(said) == 1
    assert "the loss has risen from 2 to" in said[0]


@pytest.mark.parametrize("seed", range(20))
def test_a_noisy_loss_does_not_warn(seed):
    """Falling from 3 to 0.05 with noise of half its size, and single batches ten times as hard; also below zero."""
    rng = torch.Generator().manual_seed(seed)
    noise = torch.rand(500, generator=rng) + 0.5
    losses = [0.05 + 3 * 0.99**i for i in range(500)] * noise.numpy()
    losses[::97] *= 10
    assert warnings_of(losses.tolist()) == []
    assert warnings_of((losses - 3).tolist()) == []


# ----------------------------------------------------------- what differs on resuming
@pytest.fixture
def stopped(tiny_recipe, tmp_path):
    """A run that was killed in its sixth of nine steps, its recipe, and rows of its own."""
    rows = write_text_rows(tmp_path / "rows.csv", 60)
    recipe = tiny_recipe(train=SHORT, data={"train": str(rows), "holdout": 0.3})
    said_while(Killed, recipe, tmp_path / "run", At(_6=killed))
    return recipe, tmp_path / "run", rows


def with_train(recipe: Recipe, **keys: Any) -> Recipe:
    return dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, **keys))


def test_a_changed_learning_rate_needs_leave_and_is_then_used(stopped, tmp_path):
    recipe, out, _ = stopped
    changed = with_train(recipe, learning_rate=5e-4)
    with pytest.raises(RunError, match=r"train.learning_rate: 0.001 there, 0.0005 now.*--allow-change"):
        run_of(changed, out)
    run, said = run_of(changed, out, allow_change=True)
    assert "Continuing after step 4 of 9 (checkpoint 000004)." in said
    undisturbed = logged(run_of(recipe, tmp_path / "undisturbed")[0].path, "learning_rate")
    rates = [rate * (1 if i < 4 else 0.5) for i, rate in enumerate(undisturbed)]
    assert logged(run.path, "learning_rate") == pytest.approx(rates)
    noted = run.lines("changes")
    assert [line["changes"] for line in noted] == ["train.learning_rate: 0.001 there, 0.0005 now"]
    assert "learning_rate: 0.0005" in (out / "recipe.yaml").read_text()


def test_changed_rows_need_leave(stopped):
    recipe, out, rows = stopped
    rows.write_text(rows.read_text().replace("sun", "day", 1))
    with pytest.raises(RunError, match=r"began with other data: .*rows.csv differs.*--allow-change"):
        run_of(recipe, out)
    _, said = run_of(recipe, out, allow_change=True)
    assert [line for line in said if "Other data than at the start of this run, as allowed" in line]
    assert "Continuing after step 4 of 9 (checkpoint 000004)." in said


@pytest.mark.parametrize("section", ["model", "task", "method", "seed"])
def test_another_model_task_method_or_seed_is_another_run(stopped, section, tiny_recipe):
    recipe, out, _ = stopped
    others = {
        "model": dataclasses.replace(recipe.model, revision="other"),
        "task": dataclasses.replace(recipe.task, options={"max_length": 9}),
        "method": dataclasses.replace(recipe.method, name="lora"),
        "seed": 1,
    }
    with pytest.raises(RunError, match=rf"{section}[^:]*: .* there, .* now") as found:
        RunDir.create(out, dataclasses.replace(recipe, **{section: others[section]}), allow_change=True)
    assert "allow-change" not in str(found.value)


def test_what_was_measured_is_not_given_to_another_model(short, tmp_path, tiny_recipe):
    """Once the test rows are opened a change would train on and keep the old evidence."""
    recipe = tiny_recipe(train=SHORT)
    run, _ = run_of(recipe, tmp_path / "run")
    before = (run.path / "recipe.yaml").read_text()
    for finished in (True, False):
        if not finished:
            (run.path / "README.md").unlink()
        with pytest.raises(RunError, match="another recipe") as found:
            run_of(with_train(recipe, max_steps=20), run.path, allow_change=True)
        assert "--allow-change" not in str(found.value)
    assert (run.path / "recipe.yaml").read_text() == before


def test_the_recipe_of_a_run_under_way_is_not_changed_by_another_process(stopped):
    recipe, out, _ = stopped
    before = (out / "recipe.yaml").read_text()
    with RunDir(out).locked(), pytest.raises(RunError, match="in use by process"):
        run_of(with_train(recipe, max_steps=20), out, allow_change=True)
    assert (out / "recipe.yaml").read_text() == before


@pytest.mark.parametrize("name", ["torch", "transformers", "peft"])
def test_another_version_of_a_library_is_said(stopped, name):
    recipe, out, _ = stopped
    stored = json.loads((out / "environment.json").read_text())
    now, stored[name] = stored[name], "0.0.1"
    (out / "environment.json").write_text(json.dumps(stored))
    _, said = run_of(recipe, out)
    assert [line for line in said if f"This run began with {name} 0.0.1, now {now}" in line]


def test_a_start_that_was_cut_short_is_begun_again(tiny_recipe, tmp_path):
    recipe = tiny_recipe(train=SHORT)
    for leftover in ("checkpoints", "recipe.yaml.tmp", "recipe.yaml.tmp.partial", "recipe.yaml.partial"):
        out = tmp_path / leftover
        (out / "checkpoints").mkdir(parents=True)
        if leftover != "checkpoints":
            (out / leftover).write_text("half")
        assert RunDir.create(out, recipe).recipe() == recipe
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "recipe.yaml").write_text("model: mine")
    with pytest.raises(RunError, match="no run"):
        RunDir.create(tmp_path / "own", recipe)


# ------------------------------------------------------------- damage to a real run
REAL = {"lora": ("text-classification", "lora"), "image full": ("image-classification", "full")}


@pytest.fixture(scope="module")
def killed_runs(tiny_recipe, tmp_path_factory):
    """A run killed in its sixth step with checkpoints 2 and 4, and the bytes of the whole one."""
    found = {}
    for name, (task, method) in REAL.items():
        folder = tmp_path_factory.mktemp("real")
        recipe = tiny_recipe(task, method=method, train=SHORT)
        whole, _ = run_of(recipe, folder / "whole")
        said_while(Killed, recipe, folder / "run", At(_6=killed))
        assert sorted(p.name for p in (folder / "run" / "checkpoints").iterdir()) == ["000002", "000004"]
        found[name] = recipe, folder / "run", bytes_of(whole.path)
    return found


@pytest.mark.promise(3)
@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("file", ["MANIFEST.json", "model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("name", REAL)
def test_a_damaged_run_falls_back_says_so_and_ends_the_same(killed_runs, tmp_path, measured, name, file, damage):
    recipe, begun, whole = killed_runs[name]
    out = tmp_path / "run"
    shutil.copytree(begun, out)
    DAMAGE[damage](out / "checkpoints" / "000004" / file)
    run, said = run_of(recipe, out)
    told = [line for line in said if line.startswith("checkpoint 000004 skipped: ")]
    assert len(told) == 1
    assert file in told[0]
    assert "Continuing after step 2 of 9 (checkpoint 000002)." in said
    assert (out / "quarantine" / "000004").is_dir()
    assert bytes_of(run.path) == whole
    measured(3)


@pytest.mark.promise(3)
def test_every_flipped_bit_of_a_manifest_is_found(tmp_path, measured):
    """It holds the hashes of the others, and nothing holds its own."""
    _, path = tiny_checkpoint(tmp_path, 2)
    manifest = path / "MANIFEST.json"
    content, found = manifest.read_bytes(), 0
    for i in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[i // 8] ^= 1 << i % 8
        manifest.write_bytes(flipped)
        found += checkpoint.verify(path, {"digest"}) is not None
    assert found == 8 * len(content)
    manifest.write_bytes(content)
    assert checkpoint.verify(path, {"digest"}) is None
    measured(3, got=found, of=found)
