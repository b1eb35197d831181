"""What every file in tasks/ and methods/ must do, proven by its existing there."""

from __future__ import annotations

import dataclasses
import inspect

import pytest
import torch
from conftest import REFUSED, every_cell, same_answers, tiny_tree

from tunewright import find
from tunewright.contracts import Field, Loss, Method, Metric, Task
from tunewright.data import records
from tunewright.errors import MethodError
from tunewright.metrics import statistics
from tunewright.models.surgery import set_mode
from tunewright.recipe import Recipe

TASKS, METHODS, CELLS = find.names("tasks"), find.names("methods"), every_cell()


def test_the_folders_are_not_empty():
    assert len(TASKS) >= 2
    assert len(METHODS) >= 3


# ----------------------------------------------------------------------- tasks
@pytest.mark.parametrize("name", TASKS)
def test_task_is_a_frozen_dataclass_equal_to_itself(name):
    cls = find.find("tasks", name, Task)
    assert dataclasses.is_dataclass(cls)
    assert cls() == cls()
    with pytest.raises(dataclasses.FrozenInstanceError):
        cls().anything = 1


@pytest.mark.parametrize("name", TASKS)
def test_task_declares_fields_metrics_and_who_opens_its_result(name):
    cls = find.find("tasks", name, Task)
    assert cls.fields
    assert all(isinstance(f, Field) and f.kind in records.inspection.KINDS for f in cls.fields.values())
    assert cls.metrics
    assert all(isinstance(m, Metric) for m in cls.metrics)
    import transformers

    assert hasattr(transformers, cls.auto_class)


@pytest.mark.parametrize("name", TASKS)
def test_encode_is_pure(prepared, name):
    ready, task, loaded = prepared(name)
    one, two = (task.encode(ready.data.train[0], loaded) for _ in range(2))
    assert one.keys() == two.keys()
    assert one["row"] == ready.data.train[0]["row"]
    assert all(torch.equal(one[k], two[k]) if isinstance(one[k], torch.Tensor) else one[k] == two[k] for k in one)


@pytest.mark.parametrize("name", TASKS)
def test_without_target_the_answer_is_not_in_the_example(prepared, name):
    ready, task, loaded = prepared(name)
    examples = [task.encode(dict(r, label="?"), loaded, target=False) for r in ready.data.train[:3]]
    assert not any(key in e for e in examples for key in ("label", "labels"))
    predictions = task.predict(loaded.model.eval(), task.collate(examples), loaded)
    assert len(predictions) == 3
    import json

    json.dumps(predictions, allow_nan=False)


@pytest.mark.parametrize("name", TASKS)
def test_loss_is_a_sum_over_what_weights_counts(prepared, name):
    """Twice the rows cost the sum of both, and count the sum of both."""
    ready, task, loaded = prepared(name)
    examples = [task.encode(r, loaded) for r in ready.data.train[:6]]
    model = loaded.model.eval()
    with torch.no_grad():
        parts = [task.loss(model, task.collate(e), loaded) for e in (examples[:2], examples[2:], examples)]
        counts = [task.weights(task.collate(e)) for e in (examples[:2], examples[2:], examples)]
    assert all(isinstance(p, Loss) for p in parts)
    for term, total in parts[2].totals.items():
        assert total.dtype == torch.float32
        torch.testing.assert_close(parts[0].totals[term] + parts[1].totals[term], total, atol=1e-5, rtol=1e-5)
        assert counts[0][term] + counts[1][term] == pytest.approx(counts[2][term])


@pytest.mark.parametrize("name", TASKS)
def test_augment_depends_on_its_generator_alone(prepared, name):
    ready, task, loaded = prepared(name)
    example = task.encode(ready.data.train[0], loaded)
    one, two = (task.augment(example, torch.Generator().manual_seed(5)) for _ in range(2))
    assert all(torch.equal(one[k], two[k]) if isinstance(one[k], torch.Tensor) else one[k] == two[k] for k in one)


@pytest.mark.parametrize("name", TASKS)
def test_scores_are_per_row_and_every_metric_pools(prepared, name):
    ready, task, loaded = prepared(name)
    rows = ready.data.test
    predictions = task.predict(loaded.model.eval(), task.collate([task.encode(r, loaded) for r in rows]), loaded)
    scores = [task.score(p, r) for p, r in zip(predictions, rows, strict=True)]
    for metric in task.metrics:
        value = metric.overall([s[metric.name] for s in scores])
        assert isinstance(value, float)
        if metric.pool is None:
            assert value == pytest.approx(statistics.compare(*[[s[metric.name] for s in scores]] * 2).base)


@pytest.mark.parametrize("name", TASKS)
def test_baseline_answers_like_a_prediction(prepared, name):
    ready, task, loaded = prepared(name)
    baseline = task.baseline(ready.recipe.model, loaded, ready.data.train)
    assert baseline is not None or not loaded.fresh, "a random head is nothing to compare with"
    if baseline is None:
        return
    answers = baseline.predict(ready.data.test)
    assert len(answers) == len(ready.data.test)
    assert all(task.score(a, r) for a, r in zip(answers, ready.data.test, strict=True))


@pytest.mark.parametrize("name", TASKS)
def test_show_says_what_the_model_sees(prepared, name):
    ready, task, loaded = prepared(name)
    record = ready.data.train[0]
    shown = task.show(task.encode(record, loaded), loaded)
    assert (task.truth(record) or record[next(iter(task.fields))]) in shown


# --------------------------------------------------------------------- methods
@pytest.mark.parametrize("method_name", METHODS)
def test_method_recommends_a_rate_with_a_reason(method_name):
    cls = find.find("methods", method_name, Method)
    assert 1e-6 < cls.learning_rate < 1
    assert len(cls.learning_rate_reason) > 20
    assert isinstance(cls.standalone, bool)
    assert not inspect.isabstract(cls)
    assert find.build("methods", method_name, {}, Method).recommended() == (cls.learning_rate, cls.learning_rate_reason)


@pytest.mark.parametrize("method_name", METHODS)
def test_method_says_in_a_line_when_to_use_it(method_name):
    assert 40 < len(find.advice("methods", method_name)) < 400


@pytest.mark.parametrize(("name", "method_name"), sorted(REFUSED))
def test_what_makes_no_sense_is_refused_with_a_way_out(prepared, name, method_name):
    _, _, loaded = prepared(name)
    with pytest.raises(MethodError, match=r"lora|head|full"):
        find.build("methods", method_name, {}, Method).apply(loaded.model, loaded)


@pytest.mark.parametrize(("name", "method_name"), CELLS)
def test_after_apply_the_model_is_called_as_before_and_starts_where_the_base_was(prepared, name, method_name):
    ready, task, loaded = prepared(name)
    batch = task.collate([task.encode(r, loaded) for r in ready.data.train[:4]])
    with torch.no_grad():
        before = task.predict(loaded.model.eval(), batch, loaded)
        method = find.build("methods", method_name, {}, Method)
        model = method.apply(loaded.model, loaded).eval()
        after = task.predict(model, batch, loaded)
    assert [a.keys() for a in before] == [a.keys() for a in after]
    if method.additive:
        same_answers(before, after, abs=1e-5)


@pytest.mark.parametrize(("name", "method_name"), CELLS)
def test_what_trains_is_float32_includes_what_is_fresh_and_stands_in_one_group(prepared, name, method_name):
    _ready, _task, loaded = prepared(name)
    method = find.build("methods", method_name, {}, Method)
    model = method.apply(loaded.model, loaded)
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert trainable
    assert all(p.dtype == torch.float32 for p in trainable.values())
    for place in loaded.fresh:
        assert any(place in n for n in trainable), f"{place} is random and does not train"
    grouped = [n for g in method.groups(model, loaded, 1e-3, 0.1) for n, _ in g["params"]]
    assert sorted(grouped) == sorted(trainable), "every trainable parameter in exactly one group"
    for group in method.groups(model, loaded, 1e-3, 0.1):
        assert all(p.ndim > 1 for _, p in group["params"]) or group["weight_decay"] == 0
    assert set(method.state(model)) >= set(trainable)


@pytest.mark.parametrize(("name", "method_name"), CELLS)
def test_merged_answers_as_unmerged_or_merging_is_refused(prepared, name, method_name):
    ready, task, loaded = prepared(name)
    method = find.build("methods", method_name, {}, Method)
    model = method.apply(loaded.model, loaded)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:  # as after training: a LoRA at its start would merge to nothing
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    batch = task.collate([task.encode(r, loaded) for r in ready.data.train[:4]])
    if not method.folds:
        with pytest.raises(MethodError, match="fold"):
            method.merge(model)
        return
    with torch.no_grad():
        model.eval()
        own = task.predict(model, batch, loaded)
        merged = method.merge(model).eval()
        for answers in (task.predict(merged, batch, loaded), task.predict(model, batch, loaded)):
            same_answers(own, answers, abs=2e-5)
    assert type(merged).__module__.startswith("transformers"), "a merged model is a plain one"


@pytest.mark.parametrize(("name", "method_name"), CELLS)
def test_c26_frozen_parts_stand_in_eval_mode_and_batch_norms_always_do(prepared, name, method_name):
    _, _, loaded = prepared(name)
    model = find.build("methods", method_name, {}, Method).apply(loaded.model, loaded)
    set_mode(model)
    norms = [m for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    assert not any(m.training for m in norms)
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            assert not module.training


def test_tiny_trees_exist_for_every_task(tmp_path):
    for name in TASKS:
        assert Recipe.of(tiny_tree(name, tmp_path / name))[0].task.name == name
