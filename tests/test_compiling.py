"""Compiled blocks learn what plain ones learn; nothing else of a run changes."""

from __future__ import annotations

import copy
import json
import logging
import shutil

import pytest
import torch
from conftest import tiny_tree
from safetensors.torch import load_file

from tests.test_packing import model_of
from tunewright.contracts import Callback, Loaded, State
from tunewright.engine import compiling
from tunewright.errors import RecipeError, UserError
from tunewright.models.layout import layout_of
from tunewright.recipe import Recipe
from tunewright.runs import checking
from tunewright.runs.training import train


@pytest.fixture
def graphs(monkeypatch):
    """Graphs that were compiled, by a backend that only traces; from the second step on."""
    found: list[torch.fx.GraphModule] = []

    def backend(graph, inputs):
        found.append(graph)
        return graph.forward

    monkeypatch.setattr(compiling, "BACKEND", backend)
    monkeypatch.setattr(compiling, "OPTIONS", None)
    monkeypatch.setattr(compiling, "PLAIN_STEPS", 1)
    # what torch would write for its own profiler is kept by pytest otherwise, page by page
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "disabled", True)
    compiling._compiled_class.cache_clear()
    torch._dynamo.reset()
    yield found
    compiling._compiled_class.cache_clear()


def trained(recipe, folder, **keys):
    said: list[str] = []
    run = train(recipe, folder, quiet=True, say=said.append, **keys)
    lines = (run.path / "metrics.jsonl").read_text().splitlines()
    weights = next((run.path / "model").glob("*.safetensors"))
    return [json.loads(line)["loss"] for line in lines], load_file(weights), said


@pytest.mark.parametrize(
    ("task", "method"),
    [
        ("text-classification", "layers"),
        pytest.param("text-classification", "lora", marks=pytest.mark.slow),
        pytest.param("causal-lm", "lora", marks=pytest.mark.slow),  # packed: attention breaks the graphs, half a minute
    ],
)
def test_losses_and_weights_are_those_of_the_plain_run(tiny_recipe, tmp_path, graphs, task, method):
    keys = {"max_steps": 5, "precision": "float32", "logging_steps": 1, "learning_rate": 1e-2}
    losses, weights, _ = trained(tiny_recipe(task, method=method, train=keys), tmp_path / "plain")
    assert not graphs
    compiled = tiny_recipe(task, method=method, train=keys | {"torch_compile": True})
    again, others, said = trained(compiled, tmp_path / "compiled")
    assert graphs
    assert len(losses) == 5
    assert again == pytest.approx(losses, abs=1e-5)
    assert weights.keys() == others.keys()
    for name in weights:
        torch.testing.assert_close(weights[name], others[name], rtol=1e-4, atol=1e-5)
    assert any("From step 2 on 2 blocks are compiled" in text for text in said)
    assert any(text.startswith("torch_compile: compiling took about") for text in said)


def test_only_a_pass_that_is_trained_on_is_compiled(graphs):
    model = model_of("llama", "sdpa")
    loaded = Loaded(model, None, layout_of(model))
    names, kinds = set(model.state_dict()), [type(m).__name__ for m in model.modules()]
    ids = torch.arange(3, 12)[None]
    plain = model(ids).logits
    compiling.compile_blocks(model, loaded, True, 0)
    model.train()(ids)
    assert not graphs, "the first step goes plain"
    compiling.compile_blocks(model, loaded, True, 1)
    compiling.compile_blocks(model, loaded, True, 2)
    assert torch.equal(model.eval()(ids).logits, plain)
    with torch.no_grad():
        model.train()(ids)
    assert not graphs
    torch.testing.assert_close(model(ids).logits, plain)
    assert graphs
    assert set(model.state_dict()) == names
    assert [type(m).__name__ for m in model.modules()] == kinds
    assert torch.equal(copy.deepcopy(model).eval()(ids).logits, plain)


def test_a_run_may_go_on_without_it(tiny_recipe, tmp_path, graphs):
    keys = {"max_steps": 4, "save_steps": 2, "precision": "float32"}

    class Leave(Callback):
        def on_step(self, state, logs):
            if state.step == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(tiny_recipe(train=keys | {"torch_compile": True}), tmp_path / "run", callbacks=[Leave()])
    assert graphs
    _, _, said = trained(tiny_recipe(train=keys), tmp_path / "run", allow_change=True)
    assert any("Continuing after step 2" in text for text in said)


def test_where_nothing_can_be_compiled_that_is_said_before_the_first_step(tiny_recipe, monkeypatch):
    def broken(graph, inputs):
        raise OSError("there is no C++ compiler")

    monkeypatch.setattr(compiling, "BACKEND", broken)
    monkeypatch.setattr(compiling, "OPTIONS", None)
    with pytest.raises(UserError, match=r"train.torch_compile.*OSError: there is no C\+\+ compiler.*g\+\+"):
        checking.prepare(tiny_recipe(train={"torch_compile": True}))


def test_a_model_without_blocks_is_refused():
    model = torch.nn.Linear(2, 2)
    with pytest.raises(RecipeError, match="no blocks"):
        compiling.what(Loaded(model, None, layout_of(model)))


def test_what_it_was_worth_by_hand():
    """Plain: 1 s an item; compiled: 0.5 s, but for one step of 10 items that took 25 s, 20 of them compiling."""
    said: list[str] = []
    now = 0
    worth = compiling.Worth(said.append, lambda: now)
    state = State(total=7)
    worth.on_start(state, torch.nn.Linear(1, 1))
    for seconds in (99, 10, 10, 10, 25, 5, 5):
        now += seconds
        state.step, state.seen = state.step + 1, state.seen + 10
        worth.on_step(state, {})
        now += 1000
        worth.on_evaluate(state, {})  # the time of an evaluation is nobody's
    worth.on_end(state, torch.nn.Linear(1, 1))
    assert said[0].startswith("torch_compile: compiling took about 20.0 s; compiled steps were 2.00 times as fast")
    assert "saved 15.0 s in 3 steps" in said[0]


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler here")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_real_backend_learns_the_same_dropout_included(tmp_path, monkeypatch, checkpointing):
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "disabled", True)
    keys = {"max_steps": 8, "precision": "float32", "logging_steps": 1, "learning_rate": 1e-3}
    keys |= {"gradient_checkpointing": checkpointing}
    tree = tiny_tree("text-classification", tmp_path, dropout=0.2) | {"method": "full"}
    plain, compiled = (Recipe.of(tree | {"train": keys | {"torch_compile": asked}})[0] for asked in (False, True))
    losses, weights, _ = trained(plain, tmp_path / "plain")
    again, others, _ = trained(compiled, tmp_path / "compiled")
    assert again == pytest.approx(losses, abs=1e-5)
    for name in weights:
        torch.testing.assert_close(weights[name], others[name], rtol=1e-4, atol=1e-5)
