"""Bugs that spoil a model without a word: the half of the catalogue (silent_bugs.py) that is about training.

Each test is named after its entry and computes the right answer by another way: a sum by hand, torch's own function,
a formula. Where the bug has a usual form, the test also shows that this form would be noticed.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROWS, every_cell, same_answers, tiny_tree
from safetensors.torch import load_file

from tunewright import find
from tunewright.contracts import Callback, Method, State, Task
from tunewright.data.batches import Examples, Steps
from tunewright.engine import optimizers
from tunewright.engine.evaluate import predict_rows
from tunewright.engine.finite import stop_unless_finite
from tunewright.engine.fit import Workplace, accumulate, fit, judge
from tunewright.engine.packing import packed_collate
from tunewright.engine.precision import suit_storage
from tunewright.errors import MethodError, RecipeError, TrainError
from tunewright.models.surgery import set_mode
from tunewright.recipe import Recipe, TrainSpec
from tunewright.rundir import RunDir
from tunewright.runs import checking, training

TASKS, CELLS = find.names("tasks"), every_cell()
FOLDING = [(task, name) for task, name in CELLS if find.find("methods", name, Method).folds]
BEFORE = [(task, name) for task, name in CELLS if not find.find("methods", name, Method).packs]  # prompts, prefixes
PACKING = [(t, m) for t, m in CELLS if find.find("tasks", t, Task).packs and find.find("methods", m, Method).packs]
SGD = {
    "optim": "sgd", "learning_rate": 0.1, "precision": "float32", "warmup_steps": 0, "max_grad_norm": 0,
    "logging_steps": 1,
}  # fmt: skip


def test_there_are_tasks_and_methods_to_try():
    assert len(TASKS) >= 4
    assert len(FOLDING) >= 12
    assert len(BEFORE) >= 4
    assert len(PACKING) >= 8


# ------------------------------------------------------------------------- ground
def build(name: str, **options: Any) -> Method:
    return find.build("methods", name, options, Method)


def applied(method: Method, loaded) -> torch.nn.Module:
    """The method on the base, away from where it begins: a LoRA at its start would hide what is wrong with it."""
    method.reserve(loaded)
    model = method.apply(loaded.model, loaded)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    set_mode(model, dropout=False)
    return model


def gradients(model) -> dict[str, torch.Tensor]:
    """What the parameters hold, which they lose."""
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    assert found
    return found


def step(task, method, model, loaded, micro_batches) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """The gradients and the log of one step of the engine."""
    logs = filled(task, method, model, loaded, micro_batches)
    return gradients(model), logs


def filled(task, method, model, loaded, micro_batches) -> dict[str, float]:
    """The log of one step of the engine, whose gradients the parameters now hold."""
    place = Workplace(precision=suit_storage("auto", "float32", model)[0])
    return accumulate(task, method, model, loaded, micro_batches, place, 0, State(total=1), print)


def summed(task, model, loaded, batch) -> tuple[dict[str, torch.Tensor], float, float]:
    """By hand: gradients of the summed loss of a batch, the sum, and how many items it counts."""
    cost = torch.stack(list(task.loss(model, batch, loaded).totals.values())).sum()
    cost.backward()
    (count,) = task.weights(batch).values()
    return gradients(model), cost.item(), count


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor], atol: float = 1e-5) -> bool:
    scale = max(float(g.abs().max()) for g in two.values())
    assert one.keys() == two.keys()
    return max(float((one[n] - two[n]).abs().max()) for n in one) <= atol * max(1.0, scale)


def mixed(parts: list[tuple[dict[str, torch.Tensor], float]]) -> dict[str, torch.Tensor]:
    """Gradients of several batches, each with the factor beside it."""
    return {n: sum(factor * g[n] for g, factor in parts) for n in parts[0][0]}


# ------------------------------------------------------------------- the loss of a step
@pytest.mark.parametrize(("name", "method_name"), CELLS)
def test_c01_accumulation_changes_neither_the_update_nor_the_logged_loss(prepared, name, method_name):
    ready, task, loaded = prepared(name)
    method = build(method_name)
    model = applied(method, loaded)
    examples = [task.encode(r, loaded) for r in ready.data.train[:8]]
    found = []
    for size in (8, 4, 2, 1):
        batches = [task.collate(examples[i : i + size]) for i in range(0, 8, size)]
        found.append(step(task, method, model, loaded, batches))
    assert max(float(g.abs().max()) for g in found[0][0].values()) > 1e-3
    for slopes, logs in found[1:]:
        assert same(slopes, found[0][0])
        assert logs["loss"] == pytest.approx(found[0][1]["loss"], rel=1e-5)


@pytest.mark.parametrize("name", TASKS)
def test_c02_a_step_is_the_mean_over_its_items_and_no_mean_of_means(prepared, name):
    """One row and seven others: the one must not weigh as much as the seven."""
    ready, task, loaded = prepared(name)
    method = build("full")
    model = applied(method, loaded)
    examples = sorted((task.encode(r, loaded) for r in ready.data.train[:8]), key=lambda e: e.get("length", 0))
    batches = [task.collate(examples[:1]), task.collate(examples[1:])]
    (one, a, n), (two, b, m) = (summed(task, model, loaded, batch) for batch in batches)
    slopes, logs = step(task, method, model, loaded, batches)
    assert same(slopes, mixed([(one, 1 / (n + m)), (two, 1 / (n + m))]))
    assert not same(slopes, mixed([(one, 0.5 / n), (two, 0.5 / m)]), atol=1e-3)
    assert logs["loss"] == pytest.approx((a + b) / (n + m), rel=1e-5)
    assert logs["items"] == n + m


@pytest.mark.parametrize("name", TASKS)
def test_c04_the_short_last_step_of_an_epoch_is_divided_by_what_it_has(prepared, name):
    """Steps of four micro-batches, two left over at the end: their mean, not their sum over four."""
    ready, task, loaded = prepared(
        name, train={"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "packing": False}
    )
    ready = dataclasses.replace(ready, data=dataclasses.replace(ready.data, train=ready.data.train[:10]))
    steps = checking.planned_steps(ready, task, loaded)
    model = applied(ready.method, loaded)
    last = steps[steps.per_epoch - 1]
    assert (steps.per_epoch, len(last)) == (3, 2)
    parts = [summed(task, model, loaded, batch) for batch in last]
    count = sum(n for _, _, n in parts)
    slopes, logs = step(task, ready.method, model, loaded, last)
    assert same(slopes, mixed([(g, 1 / count) for g, _, _ in parts]))
    assert not same(slopes, mixed([(g, 0.5 / count) for g, _, _ in parts]), atol=1e-2)
    assert logs["loss"] == pytest.approx(sum(cost for _, cost, _ in parts) / count, rel=1e-5)


@pytest.mark.parametrize(("name", "method_name"), PACKING)
def test_c17_packed_rows_give_the_update_of_padded_ones_under_every_method(prepared, name, method_name):
    ready, task, loaded = prepared(name)
    method = build(method_name)
    model = applied(method, loaded)
    examples = [task.encode(r, loaded) for r in ready.data.train[:8]]
    joined = {key: torch.cat([e[key] for e in examples[:3]]) for key in ("input_ids", "labels")}
    examples = [examples[0] | joined | {"length": len(joined["labels"])}, *examples[3:]]
    packed, padded = packed_collate(examples), task.collate(examples)
    assert len(packed["input_ids"]) < len(padded["input_ids"])
    (one, log), (two, other) = (step(task, method, model, loaded, [batch]) for batch in (packed, padded))
    assert same(one, two)
    assert log["loss"] == pytest.approx(other["loss"], rel=1e-5)
    assert log["items"] == other["items"]


WEIGHTED = [n for n in TASKS if "class_weights" in find.find("tasks", n, Task).__dataclass_fields__]


@pytest.mark.parametrize("name", WEIGHTED)
def test_c20_weights_of_classes_divide_as_torchs_do_however_the_step_is_cut(prepared, name):
    ready, _, _ = prepared(name)
    rare = ready.data.labels[0]
    ready, task, loaded = prepared(name, task={"name": name, "class_weights": {rare: 5.0}})
    rows = sorted(ready.data.train, key=lambda r: r["label"])
    rows = rows[:3] + rows[-5:]  # three of one class, then five of the other
    assert len({r["label"] for r in rows}) == 2
    model = applied(build("full"), loaded)
    examples = [task.encode(r, loaded) for r in rows]
    whole = task.collate(examples)
    inputs = {k: whole[k] for k in ("input_ids", "attention_mask", "pixel_values") if k in whole}
    weights = torch.tensor([5.0 if label == rare else 1.0 for label in loaded.labels])
    torch.nn.functional.cross_entropy(model(**inputs).logits, whole["labels"], weights).backward()
    expected = gradients(model)
    for size in (8, 3, 1):
        batches = [task.collate(examples[i : i + size]) for i in range(0, 8, size)]
        assert same(step(task, build("full"), model, loaded, batches)[0], expected)


@pytest.mark.parametrize(("name", "method_name"), BEFORE)
def test_c41_what_a_method_puts_before_a_text_counts_as_no_item_of_the_loss(prepared, name, method_name):
    """The mean is over the rows' own items: each row alone, unpadded, with the prompt before it."""
    ready, task, loaded = prepared(name)
    examples = [task.encode(r, loaded) for r in ready.data.train[:6]]
    count = sum(sum(task.weights(task.collate([e])).values()) for e in examples)
    method = build(method_name)
    model = applied(method, loaded)
    alone = [summed(task, model, loaded, task.collate([e])) for e in examples]
    _, logs = step(task, method, model, loaded, [task.collate(examples[:1]), task.collate(examples[1:])])
    assert logs["items"] == count == sum(n for _, _, n in alone)
    assert logs["loss"] == pytest.approx(sum(cost for _, cost, _ in alone) / count, rel=1e-5)


# ------------------------------------------------------------------ frozen, and what trains
@pytest.mark.parametrize("name", TASKS)
def test_c26_a_frozen_trunk_gives_the_same_features_twice(tmp_path, name):
    ready = checking.prepare(Recipe.of(tiny_tree(name, tmp_path, dropout=0.5))[0])
    task, loaded = checking.load(ready)
    model = build("head").apply(loaded.model, loaded)
    batch = task.collate([task.encode(r, loaded) for r in ready.data.train[:4]])
    seen: list[torch.Tensor] = []

    def note(module, given, output):
        seen.append((output[0] if isinstance(output, tuple) else output).detach().clone())

    model.get_submodule(loaded.layout.blocks[-1]).register_forward_hook(note)

    def twice() -> bool:
        task.loss(model, batch, loaded)  # a model is asked once how it ends: not counted
        seen.clear()
        for seed in (1, 2):
            torch.manual_seed(seed)
            task.loss(model, batch, loaded)
        return torch.equal(*seen)

    set_mode(model)
    assert twice()
    model.train()
    noisy = any(isinstance(m, torch.nn.Dropout) and m.p for m in model.modules())
    noisy = noisy or bool(getattr(model.config, "attention_dropout", 0))
    assert twice() != noisy, "the base has noise that this would show"


@pytest.mark.parametrize("name", TASKS)
def test_c27_what_is_kept_of_a_row_is_not_what_chance_made_of_it(prepared, name):
    cls = find.find("tasks", name, Task)
    random = {f.name: True for f in dataclasses.fields(cls) if f.default is False}  # all that can be switched on
    ready, task, loaded = prepared(name, task={"name": name, **random}, train={"num_train_epochs": 6})
    steps = checking.planned_steps(ready, task, loaded)
    drawn: dict[str, list[torch.Tensor]] = {}
    for i in range(len(steps)):
        for batch in steps[i]:
            for row, pixels in zip(batch["row"], batch.get("pixel_values", []), strict=False):
                drawn.setdefault(row, []).append(pixels)
    for i, record in enumerate(steps.examples.records):
        fresh, kept = task.encode(record, loaded), steps.examples[i]
        assert all(kept[k].equal(v) for k, v in fresh.items() if isinstance(v, torch.Tensor)), "changed in place"
    if cls.augment is not Task.augment:
        several = [row for row, ways in drawn.items() if not all(way.equal(ways[0]) for way in ways)]
        assert len(several) > len(drawn) / 2, "one draw was kept for all epochs"


@pytest.mark.parametrize("order", ["whole", "one by one", "two ranks"])
def test_c56_chance_depends_on_the_row_and_not_on_who_draws_it(order):
    def drawn(batch: int, share: tuple[int, int] = (0, 1)) -> dict[tuple[int, str], float]:
        examples = [{"row": f"r{i}"} for i in range(12)]
        steps = Steps(
            examples, lambda chosen: chosen, lambda e, rng: e | {"x": torch.rand((), generator=rng).item()}, seed=0,
            batch_size=batch, accumulation=12 // batch // share[1], epochs=3, max_steps=None, share=share,
        )  # fmt: skip
        return {(i, e["row"]): e["x"] for i in range(len(steps)) for part in steps[i] for e in part}

    whole = drawn(12)
    assert len(set(whole.values())) == len(whole) == 36, "no two rows and no two epochs share a draw"
    other = {"whole": drawn(12), "one by one": drawn(1), "two ranks": drawn(6, (0, 2)) | drawn(6, (1, 2))}[order]
    assert other == whole


VARIANTS = [
    (task, name, {}) for task, name in CELLS
] + [
    ("text-classification", "layers", {"layer_decay": 0.5}), ("causal-lm", "layers", {"layer_decay": 0.5}),
    ("text-classification", "layers", {"unfreeze": 0.5}), ("sft", "lora", {"loraplus_lr_ratio": 16.0}),
    ("sft", "lora", {"use_dora": True}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "method_name", "options"), VARIANTS)
def test_c31_every_weight_that_trains_stands_in_one_group_once(prepared, name, method_name, options):
    _, _, loaded = prepared(name)
    method = build(method_name, **options)
    model = method.apply(loaded.model, loaded)
    optimizer = optimizers.build("adamw", method.groups(model, loaded, 1e-3, 0.1))
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == len(set(held))
    assert set(held) == {id(p) for p in model.parameters() if p.requires_grad}


# ----------------------------------------------------------------------------- folding
def base_of(tmp_path: Path, name: str, dtype: str | None = None, **config: Any):
    """A base of its own kind for a task: what stands in a recipe, prepared and loaded."""
    from tunewright.models import tiny

    tiny.MAKERS[find.find("tasks", name, Task).auto_class](tmp_path / "other", **config)
    spec = {"checkpoint": str(tmp_path / "other")} | ({"dtype": dtype} if dtype else {})
    ready = checking.prepare(Recipe.of(tiny_tree(name, tmp_path, n=30, model=spec))[0])
    return ready, *checking.load(ready)


TYING = [(t, m) for t, m in FOLDING if find.find("tasks", t, Task).auto_class == "AutoModelForCausalLM"]


@pytest.mark.parametrize(("name", "method_name"), TYING)
def test_c35_a_table_shared_with_the_head_survives_folding_and_saving(tmp_path, name, method_name):
    import transformers

    ready, task, loaded = base_of(tmp_path, name, tie_word_embeddings=True)
    assert loaded.model.get_output_embeddings().weight is loaded.model.get_input_embeddings().weight
    method = build(method_name)
    if method_name == "head":
        with pytest.raises(MethodError, match="shares its weights"):
            applied(method, loaded)
        return
    model = applied(method, loaded)
    batch = task.collate([task.encode(r, loaded) for r in ready.data.train[:4]])
    method.merge(model).save_pretrained(tmp_path / "merged")
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        own, again = (task.validate(m, batch, loaded) for m in (model.eval(), opened))
    same_answers(own, again, abs=1e-5)


@pytest.mark.parametrize(("name", "method_name"), FOLDING)
def test_c36_a_base_in_half_precision_is_folded_in_float32_and_left_as_it_was(tmp_path, name, method_name):
    ready, task, loaded = base_of(tmp_path, name, "bfloat16")
    assert any(p.dtype == torch.bfloat16 for p in loaded.model.parameters())
    method = build(method_name)
    model = applied(method, loaded)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    merged = [method.merge(model) for _ in range(3)][-1]
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    batch = task.collate([task.encode(r, loaded) for r in ready.data.train[:4]])
    with torch.no_grad():
        own, folded = (task.validate(m.float().eval(), batch, loaded) for m in (copy.deepcopy(model), merged))
    same_answers(own, folded, abs=1e-5)


# ------------------------------------------------------------------ optimiser and schedule
def fitted(recipe: Recipe, folder: Path, callbacks=(), said: list[str] | None = None):
    """The loop alone, without evidence and report."""
    ready = checking.prepare(recipe)
    task, loaded = checking.load(ready)
    steps, run = checking.planned_steps(ready, task, loaded), RunDir.create(folder, recipe)
    say = (said if said is not None else []).append
    fit(task, ready.method, loaded, steps, recipe.train, run, digest="d", callbacks=callbacks, say=say)
    return loaded


@pytest.mark.parametrize("name", TASKS)
def test_c44_the_rate_follows_the_formula_however_the_step_is_cut(tiny_recipe, tmp_path, name):
    class Watch(Callback):
        def on_start(self, state, model):
            self.rates = []

        def on_step(self, state, logs):
            self.rates.append(logs["learning_rate"])

    for accumulation in (1, 4):
        options = SGD | {"max_steps": 4, "per_device_train_batch_size": 4 // accumulation}
        recipe = tiny_recipe(name, train=options | {"gradient_accumulation_steps": accumulation})
        watch = Watch()
        loaded = fitted(recipe, tmp_path / str(accumulation), [watch])
        head = build("full").groups(loaded.model, loaded, 0.1, 0.0)
        top = max(g["lr"] for g in head if g["params"])  # a new head has a rate of its own
        assert watch.rates == pytest.approx([top * 0.5 * (1 + math.cos(math.pi * k / 4)) for k in range(4)])


@pytest.mark.parametrize(("name", "method_name"), CELLS)
def test_c45_a_small_step_moves_every_weight_of_a_base_in_half_precision(tmp_path, name, method_name):
    """bf16 keeps eight bits: a step of 1e-5 would leave most weights where they are."""
    ready, task, loaded = base_of(tmp_path, name, "bfloat16")
    method = build(method_name)
    model = applied(method, loaded)
    batch = task.collate([task.encode(r, loaded) for r in ready.data.train[:8]])
    optimizer = optimizers.build("adamw", method.groups(model, loaded, 1e-5, 0.0))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    accumulate(task, method, model, loaded, [batch], Workplace(precision="bf16"), 0, State(total=1), print)
    optimizer.step()
    pushed = {n: p.grad.abs() > 1e-5 for n, p in model.named_parameters() if p.grad is not None}
    still = sum(int((pushed[n] & (p == before[n])).sum()) for n, p in model.named_parameters() if n in pushed)
    assert sum(int(places.sum()) for places in pushed.values()) > 20
    assert still == 0
    assert {t.dtype for t in optimizers.state_by_name(optimizer).values()} == {torch.float32}


@pytest.mark.parametrize("name", sorted(optimizers.MAKERS))
def test_c46_nothing_is_kept_in_float16_where_a_small_epsilon_would_be_zero(name):
    weight = torch.nn.Parameter(torch.ones(3, 2))
    optimizer = optimizers.build(name, [{"params": [("w", weight)], "lr": 0.1, "weight_decay": 0.0}])
    weight.sum().backward()
    optimizer.step()
    assert weight.dtype == torch.float32
    kinds = {t.dtype for t in optimizers.state_by_name(optimizer).values()}
    assert kinds <= {torch.float32, *([torch.int64, torch.uint8] if name == "adamw_8bit" else [])}  # and their count
    assert torch.tensor(1e-8, dtype=torch.float16) == 0
    with pytest.raises(RecipeError, match="precision"):
        Recipe.of({"model": "m", "task": "sft", "data": "d.jsonl", "train": {"precision": "fp16"}})


def test_c47_adam_corrects_the_bias_of_its_means():
    """Kingma and Ba 2015, algorithm 1, three steps by hand; without correction the first is a third as long."""
    weight = torch.nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    optimizer = optimizers.build("adamw", [{"params": [("w", weight)], "lr": 0.1, "weight_decay": 0.0}])
    m = v = 0.0
    expected = 1.0
    for t, slope in enumerate((0.5, -0.2, 3.0), 1):
        m, v = 0.9 * m + 0.1 * slope, 0.999 * v + 0.001 * slope**2
        expected -= 0.1 * (m / (1 - 0.9**t)) / (math.sqrt(v / (1 - 0.999**t)) + 1e-8)
        weight.grad = torch.tensor([slope], dtype=torch.float64)
        optimizer.step()
        assert weight.item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", TASKS)
def test_c48_a_nan_is_named_with_its_place_whatever_the_base_is_stored_in(tmp_path, name, dtype):
    ready, task, loaded = base_of(tmp_path, name, dtype)
    method = build("head")
    model = applied(method, loaded)
    spoilt = next(n for n, p in model.named_parameters() if p.requires_grad)
    model.get_parameter(spoilt).data.view(-1)[0] = math.nan
    batches = [task.collate([task.encode(r, loaded) for r in ready.data.train[:2]])]
    logs = filled(task, method, model, loaded, batches)
    place = spoilt.rpartition(".")[0]
    with pytest.raises(TrainError, match=rf"loss not finite; .* rows .*; first in module {place}[. ]"):
        stop_unless_finite(logs | {"grad_norm": 1.0}, State(total=1), task, model, loaded, batches)


# ------------------------------------------------------------------- choosing and stopping
@pytest.fixture(scope="module")
def chosen(tiny_recipe, tmp_path_factory):
    """`chosen(task)` -> a run told that its second evaluation is the best, the weights at each, the rows seen; once."""
    made: dict[str, tuple] = {}

    def make(name: str):
        if name in made:
            return made[name]
        weights, seen = [], []
        validation, predict = training._validation, training.predict_rows

        def told(task, loaded, prepared):
            real, answers = validation(task, loaded, prepared), iter([1.0, 2.0, 1.5, 1.5])
            metric = task.metrics[0]

            def evaluate(model):
                real(model)
                weights.append({n: t.clone() for n, t in model.state_dict().items()})
                return {metric.name: next(answers) * (1 if metric.higher_is_better else -1)}

            return evaluate

        def watched(task, model, loaded, examples, **keys):
            if keys.get("validating"):
                seen.append({record["row"] for record in examples.records})
            return predict(task, model, loaded, examples, **keys)

        recipe = tiny_recipe(name, train=SGD | {"max_steps": 20, "eval_steps": 2, "early_stopping_patience": 2})
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(training, "predict_rows", watched)
            patch.setattr(training, "_validation", told)
            out = tmp_path_factory.mktemp("chosen") / name
            made[name] = training.train(recipe, out, quiet=True, say=lambda text: None), weights, seen
        return made[name]

    return make


@pytest.mark.parametrize("name", TASKS)
def test_c52_what_is_saved_is_the_best_and_not_the_last(chosen, name):
    run, weights, _ = chosen(name)
    saved = load_file(run.path / "model" / "model.safetensors")
    assert len(weights) == 4
    assert all(torch.equal(tensor, weights[1][n]) for n, tensor in saved.items())
    assert not all(torch.equal(tensor, weights[3][n]) for n, tensor in saved.items())


@pytest.mark.parametrize("name", TASKS)
def test_c53_the_best_is_chosen_on_validation_rows_and_is_never_a_nan(chosen, name):
    run, _, seen = chosen(name)
    split = json.loads((run.path / "data.json").read_text())["split"]
    assert len(seen) == 4
    assert all({split[row] for row in rows} == {"validation"} for rows in seen)

    task = find.build("tasks", name, {}, Task)
    metric, spec, state = task.metrics[0], TrainSpec(early_stopping_patience=9), State(total=9)
    better = 1.0 if metric.higher_is_better else -1.0
    for value, is_best in ((math.nan, False), (better, True), (math.nan, False), (2 * better, True), (better, False)):
        assert judge(task, state, {metric.name: value}, spec, []) == is_best
    assert state.best == 2 * better


@pytest.mark.parametrize("n", [1, 2, 7])
@pytest.mark.parametrize("name", TASKS)
def test_c55_fewer_rows_than_a_batch_still_train(prepared, name, n):
    ready, task, loaded = prepared(name)
    ready = dataclasses.replace(ready, data=dataclasses.replace(ready.data, train=ready.data.train[:n]))
    steps = checking.planned_steps(ready, task, loaded)
    assert (steps.batch_size, steps.per_epoch, len(steps)) == (8, 1, 3)
    model = applied(ready.method, loaded)
    slopes, logs = step(task, ready.method, model, loaded, steps[0])
    assert {row for batch in steps[0] for row in batch["row"]} == {r["row"] for r in ready.data.train}
    assert math.isfinite(logs["loss"])
    assert max(float(g.abs().max()) for g in slopes.values()) > 0


# ------------------------------------------------------------------------------- splits
def content(value: Any) -> str:
    """What a row says, without any word of ours: the bytes of a picture, else the value itself."""
    return Path(value).read_bytes().hex() if Path(str(value)).is_file() else json.dumps(value)


@pytest.mark.parametrize("name", TASKS)
def test_c70_copies_stand_on_one_side_and_an_evaluation_can_be_repeated(tmp_path, name):
    tree = tiny_tree(name, tmp_path, n=40, train={"early_stopping_patience": 2})
    rows = Path(tree["data"]["train"])
    if rows.is_dir():
        for picture in sorted(rows.rglob("*.png")):
            shutil.copy(picture, picture.with_name(f"copy-{picture.name}"))
    else:
        lines = rows.read_text().splitlines(keepends=True)
        rows.write_text("".join([*lines, *lines[rows.suffix == ".csv" :]]))
    ready = checking.prepare(Recipe.of(tree)[0])
    task, loaded = checking.load(ready)
    kind = next(field for field, f in task.fields.items() if f.kind in ROWS)
    parts = [ready.data.train, ready.data.validation, ready.data.test]
    sides = [{content(record[kind]) for record in part} for part in parts]
    assert sum(len(part) for part in parts) == 80
    assert sum(len(side) for side in sides) == 40 == len(set().union(*sides))
    assert all(sides)
    examples = Examples(ready.data.test, lambda r: task.encode(r, loaded))
    same_answers(*(predict_rows(task, loaded.model, loaded, examples) for _ in range(2)), abs=0)
