"""The engine's promises: cutting a step up changes nothing, killed runs end with the same bytes, NaN never passes."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file

from tunewright import find
from tunewright.contracts import Callback, Loaded, Loss, Method, State, Task
from tunewright.data.batches import Steps, derive_seed
from tunewright.engine import checkpoint, optimizers, schedules
from tunewright.engine.fit import fit
from tunewright.errors import RecipeError, TrainError
from tunewright.models.surgery import set_mode
from tunewright.recipe import TrainSpec
from tunewright.rundir import RunDir
from tunewright.runs import checking, training
from tunewright.runs.training import train

TASKS = find.names("tasks")


# ------------------------------------------------- accumulation (silent bugs: the factor 8 in 11 of 14 model classes)
def weights_after(
    tiny_recipe, tmp_path, task: str, batch: int, accumulation: int, **options
) -> dict[str, torch.Tensor]:
    """All weights after three steps of plain SGD on eight rows a step, dropout 0, float32."""
    recipe = tiny_recipe(
        task,
        task={"name": task, **options},
        train={
            "max_steps": 3, "per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation,
            "optim": "sgd", "learning_rate": 0.1, "precision": "float32", "lr_scheduler_type": "constant",
            "warmup_steps": 0, "max_grad_norm": 0,
        },
    )  # fmt: skip
    run = train(recipe, tmp_path / f"{task}-{batch}x{accumulation}", quiet=True, say=lambda text: None)
    return load_file(run.path / "model" / "model.safetensors")


FIRST_LABEL = "the first label"  # what it is called depends on the rows
OPTIONS = [
    {}, {"class_weights": "balanced"}, {"class_weights": {FIRST_LABEL: 3.0}}, {"train_on": "all"},
]  # fmt: skip
VARIANTS = [
    (task, options)
    for task in TASKS
    for options in OPTIONS
    if options.keys() <= {f.name for f in dataclasses.fields(find.find("tasks", task, Task))}
]


@pytest.mark.promise(5)
@pytest.mark.parametrize(("task", "options"), VARIANTS)
def test_a_step_cut_into_micro_batches_is_the_same_step(tiny_recipe, tmp_path, task, options, measured):
    if options.get("class_weights") == {FIRST_LABEL: 3.0}:
        options = {"class_weights": {checking.prepare(tiny_recipe(task)).data.labels[0]: 3.0}}
    whole = weights_after(tiny_recipe, tmp_path, task, 8, 1, **options)
    for batch, accumulation in ((2, 4), (1, 8)):
        cut = weights_after(tiny_recipe, tmp_path, task, batch, accumulation, **options)
        worst = max((whole[name] - cut[name]).abs().max().item() for name in whole)
        measured(5, value=worst)
        assert worst <= 1e-5, f"{batch} x {accumulation}: {worst}"


@dataclasses.dataclass(frozen=True)
class Counting(Task):
    """One number per row; the loss of a row is w times it, so a gradient can be worked out by hand."""

    fields: ClassVar = {}
    metrics: ClassVar = ()

    def load(self, spec, labels=()): ...

    def encode(self, record, loaded, *, target=True): ...

    def collate(self, examples):
        return {"row": [e["row"] for e in examples], "x": torch.stack([e["x"] for e in examples])}

    def weights(self, batch):
        return {"sum": float(len(batch["x"]))}

    def loss(self, model, batch, loaded):
        return Loss({"sum": model(batch["x"]).sum()})

    def predict(self, model, batch, loaded): ...

    def score(self, prediction, record): ...


class One(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return self.w * x


def fit_counting(tmp_path, rows, spec: TrainSpec, callbacks=(), **kwargs):
    examples = [{"row": f"r{i}", "x": torch.tensor([float(x)])} for i, x in enumerate(rows)]
    steps = Steps(
        examples, Counting().collate, lambda e, rng: e, seed=0, batch_size=spec.per_device_train_batch_size,
        accumulation=spec.gradient_accumulation_steps, epochs=spec.num_train_epochs, max_steps=spec.max_steps,
    )  # fmt: skip
    (tmp_path / "checkpoints").mkdir(parents=True, exist_ok=True)
    loaded = Loaded(One(), None, None)
    full = find.build("methods", "full", {}, Method)
    return fit(Counting(), full, loaded, steps, spec, RunDir(tmp_path), digest="d", callbacks=callbacks, **kwargs)


def test_c04_the_last_step_of_an_epoch_is_the_mean_of_the_rows_it_has(tmp_path):
    """Ten rows in steps of four: the third step holds two, and is divided by two."""
    seen = []

    class Watch(Callback):
        def on_step(self, state, logs):
            seen.append(logs["grad_norm"])

    spec = TrainSpec(
        learning_rate=1e-7, num_train_epochs=1, per_device_train_batch_size=1, gradient_accumulation_steps=4,
        optim="sgd", max_grad_norm=0,
    )  # fmt: skip
    fit_counting(tmp_path, [3.0] * 10, spec, [Watch()])
    assert seen == pytest.approx([3.0, 3.0, 3.0])


def test_sgd_moves_by_rate_times_mean(tmp_path):
    spec = TrainSpec(
        learning_rate=0.5, max_steps=1, per_device_train_batch_size=4, optim="sgd", lr_scheduler_type="constant",
        warmup_steps=0, max_grad_norm=0,
    )  # fmt: skip
    _, model = fit_counting(tmp_path, [1.0, 2.0, 3.0, 6.0], spec)
    assert model.w.item() == pytest.approx(-0.5 * 3.0)


def test_clipping_scales_the_whole_gradient_down_to_the_limit(tmp_path):
    spec = TrainSpec(
        learning_rate=1.0, max_steps=1, per_device_train_batch_size=1, optim="sgd", lr_scheduler_type="constant",
        warmup_steps=0, max_grad_norm=0.25,
    )  # fmt: skip
    _, model = fit_counting(tmp_path, [8.0], spec)
    assert model.w.item() == pytest.approx(-0.25, rel=1e-4)


# ----------------------------------------------------------------------- not finite
@pytest.mark.promise(10)
def test_c48_a_loss_that_is_not_finite_stops_before_the_step_and_names_rows(tmp_path, measured):
    spec = TrainSpec(learning_rate=0.1, num_train_epochs=1, per_device_train_batch_size=2, optim="sgd")
    with pytest.raises(TrainError, match=r"step \d+ of 3.*rows r"):
        fit_counting(tmp_path, [1.0, 1.0, 1.0, float("nan"), 1.0, 1.0], spec)
    measured(10)


def test_a_step_without_anything_to_learn_from_is_an_error(tmp_path):
    class Empty(Counting):
        def weights(self, batch):
            return {"sum": 0.0}

    examples = [{"row": "r", "x": torch.ones(1)}]
    steps = Steps(
        examples, Counting().collate, lambda e, r: e, seed=0, batch_size=1, accumulation=1, epochs=1, max_steps=1
    )
    full = find.build("methods", "full", {}, Method)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(TrainError, match="nothing to learn from"):
        fit(Empty(), full, Loaded(One(), None, None), steps, TrainSpec(), RunDir(tmp_path), digest="d")


# ------------------------------------------------------------------------ batches
def make_steps(n=10, batch=2, accumulation=2, epochs=2.0, seed=0, max_steps=None):
    examples = [{"row": f"r{i}"} for i in range(n)]
    return Steps(
        examples, lambda e: {"row": [x["row"] for x in e]}, lambda e, rng: e, seed=seed, batch_size=batch,
        accumulation=accumulation, epochs=epochs, max_steps=max_steps,
    )  # fmt: skip


def test_a_step_depends_on_seed_epoch_and_step_alone():
    one, two = make_steps(), make_steps()
    forwards = [one[i] for i in range(len(one))]
    backwards = [two[i] for i in reversed(range(len(two)))][::-1]
    assert forwards == backwards
    assert [make_steps(seed=1)[i] for i in range(3)] != forwards[:3]


def test_every_epoch_sees_every_row_once_in_another_order():
    steps = make_steps(n=10)
    epochs = [[row for i in range(3 * e, 3 * e + 3) for batch in steps[i] for row in batch["row"]] for e in range(2)]
    assert all(sorted(rows) == sorted(f"r{i}" for i in range(10)) for rows in epochs)
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize(("n", "batch", "expected"), [(1, 8, 1), (2, 8, 1), (7, 8, 1), (8, 8, 1), (9, 8, 2)])
def test_c55_few_rows_still_make_a_step(n, batch, expected):
    assert len(make_steps(n=n, batch=batch, accumulation=1, epochs=1)) == expected


def test_max_steps_wins_over_epochs_and_goes_on_into_new_epochs():
    steps = make_steps(n=4, batch=2, accumulation=1, epochs=1, max_steps=7)
    assert len(steps) == 7
    assert steps[6][0]["row"]


def test_derived_seeds_do_not_depend_on_the_process():
    expected = int.from_bytes(hashlib.sha256(b"0/1/a").digest()[:7], "little")
    assert derive_seed(0, 1, "a") == expected


# ---------------------------------------------------------------------- schedules
def test_schedules_against_closed_forms():
    assert [schedules.factor("linear", s, 10, 0) for s in (0, 5, 9)] == pytest.approx([1.0, 0.5, 0.1])
    assert [schedules.factor("cosine", s, 8, 0) for s in (0, 4)] == pytest.approx([1.0, 0.5])
    assert schedules.factor("cosine", 6, 8, 0) == pytest.approx(0.5 * (1 + math.cos(0.75 * math.pi)))
    assert [schedules.factor("constant", s, 10, 4) for s in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert schedules.warmup_count(0.1, 200) == 20
    assert schedules.warmup_count(7, 200) == 7
    assert schedules.warmup_count(500, 200) == 200


def test_c44_the_rate_follows_optimiser_steps_not_micro_batches(tmp_path):
    rates = {}

    class Watch(Callback):
        def __init__(self, key):
            rates[key] = self.seen = []

        def on_step(self, state, logs):
            self.seen.append(logs["learning_rate"])

    for accumulation in (1, 4):
        spec = TrainSpec(
            learning_rate=0.1, num_train_epochs=1, per_device_train_batch_size=8 // accumulation // 2,
            gradient_accumulation_steps=accumulation, optim="sgd", lr_scheduler_type="linear", warmup_steps=0,
        )  # fmt: skip
        fit_counting(tmp_path / str(accumulation), [1.0] * 16, spec, [Watch(accumulation)])
    assert rates[1] == pytest.approx(rates[4])
    assert rates[1] == pytest.approx([0.1, 0.075, 0.05, 0.025])


# --------------------------------------------------------------------- optimisers
@pytest.mark.parametrize("name", sorted(optimizers.MAKERS))
def test_optimizer_state_by_name_gives_the_same_next_step(name):
    def model():
        torch.manual_seed(0)
        return torch.nn.Linear(3, 2)

    def step(m, optimizer):
        m(torch.ones(4, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    def build(m):
        return optimizers.build(name, [{"params": list(m.named_parameters()), "lr": 0.1, "weight_decay": 0.0}])

    one = model()
    first = build(one)
    step(one, first)
    two, state = copy.deepcopy(one), {k: v.clone() for k, v in optimizers.state_by_name(first).items()}
    second = build(two)
    optimizers.load_state(second, state)
    step(one, first)
    step(two, second)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_adamw_in_one_pass_is_torchs_plain_adamw():
    """Twenty steps with decay and two rates: weights and moments as torch's own loop over tensors has them."""
    torch.manual_seed(0)
    one = torch.nn.Sequential(torch.nn.Linear(37, 19), torch.nn.LayerNorm(19), torch.nn.Linear(19, 3))
    two, x = copy.deepcopy(one), torch.randn(8, 37)
    fast = optimizers.build("adamw", _two_groups(one))
    plain = torch.optim.AdamW(_two_groups(two), betas=(0.9, 0.999), eps=1e-8, fused=False, foreach=False)
    assert fast.defaults["fused"]
    for _ in range(20):
        for model, optimizer in ((one, fast), (two, plain)):
            model(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    before, after = optimizers.state_by_name(plain), optimizers.state_by_name(fast)
    assert set(before) == set(after)
    assert len(before) == 3 * 6
    for a, b in [*((before[k], after[k]) for k in before), *zip(one.parameters(), two.parameters(), strict=True)]:
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def _two_groups(model):
    named = list(model.named_parameters())
    return [
        {"params": named[:1], "lr": 0.03, "weight_decay": 0.1},
        {"params": named[1:], "lr": 0.01, "weight_decay": 0.0},
    ]


def test_c32_adamw_decays_matrices_only(tiny_recipe):
    ready = checking.prepare(tiny_recipe())
    _, loaded = checking.load(ready)
    method = find.build("methods", "full", {}, Method)
    groups = method.groups(method.apply(loaded.model, loaded), loaded, 1e-3, 0.1)
    decayed = {n for g in groups if g["weight_decay"] for n, _ in g["params"]}
    assert decayed
    assert not any("LayerNorm" in n or n.endswith("bias") for n in decayed)
    assert {g["lr"] for g in groups} == {1e-3, 1e-2}, "the new head has its own rate"


# -------------------------------------------------------------------- checkpoints
def tiny_checkpoint(tmp_path, step):
    run = RunDir(tmp_path)
    (tmp_path / "checkpoints").mkdir(exist_ok=True)
    tensors = {"model": {"w": torch.full((3,), float(step))}, "optimizer": {"w::step": torch.tensor(float(step))}}
    return run, checkpoint.save(run, State(step=step, total=9), "digest", tensors, {})


def test_a_checkpoint_holds_only_safetensors_and_json(tmp_path):
    _, path = tiny_checkpoint(tmp_path, 3)
    assert sorted(p.name for p in path.iterdir()) == [
        "MANIFEST.json", "model.safetensors", "optimizer.safetensors", "state.json",
    ]  # fmt: skip
    state, tensors, _ = checkpoint.load(path)
    assert state == State(step=3, total=9)
    assert tensors["model"]["w"].tolist() == [3.0] * 3


DAMAGE = {
    "cut": lambda p: p.write_bytes(p.read_bytes()[:-1]),
    "emptied": lambda p: p.write_bytes(b""),
    "one bit flipped": lambda p: p.write_bytes(p.read_bytes()[:-1] + bytes([p.read_bytes()[-1] ^ 1])),
    "deleted": lambda p: p.unlink(),
}


@pytest.mark.promise(3)
@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["MANIFEST.json", "model.safetensors", "optimizer.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_found_named_and_skipped(tmp_path, name, damage, measured):
    run, good = tiny_checkpoint(tmp_path, 1)
    _, bad = tiny_checkpoint(tmp_path, 2)
    DAMAGE[damage](bad / name)
    found, skipped = checkpoint.latest(run, "digest")
    measured(3, got=int(found == good and len(skipped) == 1 and name in skipped[0]))
    assert found == good
    assert len(skipped) == 1
    assert "000002" in skipped[0]
    assert name in skipped[0]
    assert (run.path / "quarantine" / "000002").is_dir()


@pytest.mark.promise(4)
def test_the_newest_is_by_step_and_not_by_time(tmp_path, measured):
    for step in (1, 2, 10):
        run, path = tiny_checkpoint(tmp_path, step)
        os.utime(path, (2e9 - step * 1e6,) * 2)
    assert checkpoint.latest(run, "digest")[0].name == "000010"
    checkpoint.rotate(run, 2, best_step=1)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["000001", "000002", "000010"]
    checkpoint.rotate(run, 2, best_step=None)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["000002", "000010"]
    measured(4)


def test_a_checkpoint_of_another_recipe_is_not_taken(tmp_path):
    run, _ = tiny_checkpoint(tmp_path, 1)
    found, skipped = checkpoint.latest(run, "other")
    assert found is None
    assert "another recipe" in skipped[0]


# ------------------------------------------------------------------ early stopping
def test_c52_early_stopping_restores_the_best_weights(tmp_path):
    """Validation says 1, 2, 1, 1: the weights of the second evaluation are the result."""
    answers, weights = iter([1.0, 2.0, 1.0, 1.0]), []

    class Judged(Counting):
        metrics = (find.find("tasks", "text-classification", Task).metrics[0],)

    def evaluate(model):
        weights.append(model.w.item())
        return {"accuracy": next(answers)}

    spec = TrainSpec(
        learning_rate=0.1, max_steps=20, per_device_train_batch_size=1, optim="sgd", lr_scheduler_type="constant",
        eval_steps=2, early_stopping_patience=2, save_steps=100, max_grad_norm=0,
    )  # fmt: skip
    steps = Steps(
        [{"row": "r", "x": torch.ones(1)}], Judged().collate, lambda e, r: e, seed=0, batch_size=1, accumulation=1,
        epochs=1, max_steps=20,
    )  # fmt: skip
    (tmp_path / "checkpoints").mkdir()
    full = find.build("methods", "full", {}, Method)
    state, model = fit(
        Judged(), full, Loaded(One(), None, None), steps, spec, RunDir(tmp_path), digest="d", evaluate=evaluate
    )
    assert state.step == 8
    assert state.best_step == 4
    assert "no better accuracy" in state.stop
    assert model.w.item() == weights[1] != weights[3]


# ----------------------------------------------------------------------- dropout
def test_a_step_has_the_same_dropout_whatever_ran_before(tiny_recipe, tmp_path):
    """Two runs of the same recipe with dropout end with the same bytes, one of them evaluating on the way."""
    ends = []
    for name, every in (("a", 1000), ("b", 1)):
        recipe = tiny_recipe(method="lora", train={"max_steps": 4, "precision": "float32", "logging_steps": 1})
        recipe = dataclasses.replace(recipe, method=dataclasses.replace(recipe.method, options={"lora_dropout": 0.5}))
        run = train(recipe, tmp_path / name, quiet=True, say=lambda t: None, callbacks=[Disturb(every)])
        ends.append(load_file(run.path / "model" / "adapter_model.safetensors"))
    assert all(torch.equal(ends[0][k], ends[1][k]) for k in ends[0])


class Disturb(Callback):
    """Draws random numbers, as a careless callback would."""

    def __init__(self, every):
        self.every = every

    def on_step(self, state, logs):
        if state.step % self.every == 0:
            torch.rand(7)


def test_batch_norm_statistics_move_only_when_asked():
    norm = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 1), torch.nn.BatchNorm2d(2))
    set_mode(norm)
    assert not norm[1].training
    set_mode(norm, train_batch_norm=True)
    assert norm[1].training


# ----------------------------------------------------------------------- kill -9
KILLED = {"num_train_epochs": 30, "save_steps": 3, "logging_steps": 1, "precision": "float32", "learning_rate": 1e-3}


def start(recipe_file: Path, out: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "tunewright", "train", str(recipe_file), f"output_dir={out}"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def digest_of(folder: Path) -> dict[str, str]:
    names = [p for p in folder.rglob("*.safetensors")]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in names}


@pytest.mark.parametrize("method", ["lora", "full"])
def test_killed_and_started_again_ends_with_the_same_bytes(tiny_recipe, tmp_path, method):
    recipe = tiny_recipe(method=method, train=KILLED, task={"name": "text-classification"})
    file = tmp_path / "recipe.yaml"
    recipe.write(file)
    whole = start(file, tmp_path / "whole")
    assert whole.wait(timeout=300) == 0, whole.stderr.read()

    out = tmp_path / "killed"
    kills = 0
    for patience in (0.05, 0.2, 0.4):
        process = start(file, out)
        seen = checkpoints_of(out)
        while process.poll() is None and checkpoints_of(out) <= seen:
            time.sleep(0.005)
        time.sleep(patience)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
    last = start(file, out)
    assert last.wait(timeout=300) == 0
    assert kills >= 1
    assert "Continuing after step" in last.stderr.read()
    assert digest_of(out / "model") == digest_of(tmp_path / "whole" / "model")
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps)), "no step logged twice"
    losses = [
        [json.loads(x)["loss"] for x in (r / "metrics.jsonl").read_text().splitlines()]
        for r in (out, tmp_path / "whole")
    ]
    assert losses[0] == losses[1]


def checkpoints_of(out: Path) -> int:
    done = [int(p.name) for p in (out / "checkpoints").glob("*") if p.name.isdigit()] if out.exists() else []
    return max(done, default=0)


# ------------------------------------------------------------- a base in half precision
@pytest.mark.parametrize("method", ["full", "head", "lora"])
@pytest.mark.parametrize("task", ["text-classification", "image-classification", "sft"])
def test_a_base_in_half_precision_trains_on_a_machine_without_bf16_units(
    tiny_recipe, tmp_path, monkeypatch, task, method
):
    """Beside the float32 of what trains, its products are taken in bf16 wherever they are; full leaves nothing half."""
    monkeypatch.setattr(training, "choose_precision", lambda *asked: ("float32", "this device has no bf16 units"))
    recipe = tiny_recipe(task, method=method, train={"max_steps": 2})
    recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, dtype="bfloat16"))
    said: list[str] = []
    run = training.train(recipe, tmp_path / "run", quiet=True, say=said.append)
    assert run.finished
    assert any("Precision bf16" in text for text in said) == (method != "full")


@pytest.mark.parametrize("method", ["head", "lora"])
def test_float32_asked_of_a_base_in_half_precision_is_refused_before_the_first_step(tiny_recipe, tmp_path, method):
    recipe = tiny_recipe(method=method, train={"max_steps": 2, "precision": "float32"})
    recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, dtype="bfloat16"))
    with pytest.raises(RecipeError, match=r"train\.precision[^$]*model\.dtype=float32"):
        checking.check(recipe)
    with pytest.raises(RecipeError, match=r"train\.precision"):
        training.train(recipe, tmp_path / "run", quiet=True, say=lambda text: None)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    full = dataclasses.replace(recipe, method=dataclasses.replace(recipe.method, name="full"))
    assert checking.check(full)["ok"], "what trains is float32, so nothing is left in half precision"
