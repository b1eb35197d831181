"""The frozen trunk runs once: the same losses and weights as when it runs in every step, wherever it applies."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from tunewright.contracts import Callback
from tunewright.engine import trunk_cache
from tunewright.runs import checking
from tunewright.runs.training import train

OPTIONS = {
    "num_train_epochs": 3, "per_device_train_batch_size": 8, "precision": "float32", "logging_steps": 1,
    "learning_rate": 0.01, "optim": "sgd", "packing": False,
}  # fmt: skip
CELLS = [
    ("text-classification", {"name": "layers", "last": 1}),
    ("text-classification", {"name": "layers", "unfreeze": 0.5}),
    ("text-classification", {"name": "head", "solver": "steps"}),
    ("image-classification", {"name": "layers", "last": 1}),
    ("image-classification", {"name": "head", "solver": "steps"}),
    ("causal-lm", {"name": "layers", "last": 1}),
    ("sft", {"name": "layers", "last": 1}),
]


def trained(tiny_recipe, folder, task, method, **more):
    """(losses by step, last weights, what was said)."""
    settings = OPTIONS | more
    if task not in ("causal-lm", "sft"):
        settings = {k: v for k, v in settings.items() if k != "packing"}
    run = train(tiny_recipe(task, method=method, train=settings), folder, quiet=True, say=lambda text: None)
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line and "learning_rate" in line]
    return losses, load_file(run.path / "model" / "model.safetensors"), run.read_json("data.json")["settings"]


@pytest.mark.parametrize(
    ("task", "method"), CELLS, ids=lambda x: x if isinstance(x, str) else "-".join(map(str, x.values()))
)
def test_the_run_is_the_uncached_one(tiny_recipe, tmp_path, monkeypatch, task, method):
    losses, weights, said = trained(tiny_recipe, tmp_path / "kept", task, method)
    assert any("trunk ran once" in line for line in said), said
    monkeypatch.setattr(trunk_cache, "ROOM", 0)
    plain, wanted, said = trained(tiny_recipe, tmp_path / "plain", task, method)
    assert any("runs in every step: its activations need more" in line for line in said), said
    assert len(losses) == len(plain) >= 9
    assert losses == pytest.approx(plain, rel=1e-6)
    moved = False
    for name, tensor in wanted.items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-6, atol=1e-6)
        moved |= bool(tensor.any())
    assert moved


@pytest.mark.parametrize(
    ("task", "method", "more", "reason"),
    [
        ({"name": "image-classification", "flip": True}, {"name": "layers", "last": 1}, {}, "augmented"),
        ("causal-lm", {"name": "layers", "last": 1}, {"packing": True}, "packed"),
    ],
)
def test_where_it_cannot_be_the_reason_is_said(tiny_recipe, tmp_path, task, method, more, reason):
    name = task if isinstance(task, str) else task["name"]
    settings = {k: v for k, v in (OPTIONS | more).items() if k != "packing" or name == "causal-lm"}
    run = train(
        tiny_recipe(name, task=task, method=method, train=settings), tmp_path / "a", quiet=True, say=lambda text: None
    )
    said = run.read_json("data.json")["settings"]
    assert any("trunk runs in every step" in line and reason in line for line in said), said


@pytest.mark.parametrize("method", ["full", "lora"])
def test_nothing_is_done_where_all_blocks_train(tiny_recipe, tmp_path, method):
    said = train(
        tiny_recipe(method=method, train=OPTIONS | {"packing": None}), tmp_path / "a", quiet=True, say=lambda t: None
    ).read_json("data.json")["settings"]
    assert not any("trunk" in line for line in said)


def test_a_row_that_is_drawn_twice_by_one_name_rules_it_out():
    batch = {"input_ids": torch.zeros(2, 3), "row": ["a", "a"]}
    assert not trunk_cache._by_row(batch)
    assert trunk_cache._by_row(batch | {"row": ["a", "b"]})
    assert not trunk_cache._by_row(batch | {"row": ["a", "b"], "position_ids": torch.zeros(2, 3)})


class Stops(Callback):
    """Fails after so many steps, as a machine does."""

    def __init__(self, after):
        self.after = after

    def on_step(self, state, logs):
        if state.step == self.after:
            raise RuntimeError("the power went")


def test_a_resumed_run_ends_with_the_same_bytes(tiny_recipe, tmp_path):
    recipe = tiny_recipe(method={"name": "layers", "unfreeze": 0.6}, train=OPTIONS | {"packing": None, "save_steps": 2})
    quiet = {"quiet": True, "say": lambda text: None}
    whole = train(recipe, tmp_path / "whole", **quiet)
    for after in (5, 9):
        with pytest.raises(RuntimeError, match="power"):
            train(recipe, tmp_path / "cut", callbacks=[Stops(after)], **quiet)
    cut = train(recipe, tmp_path / "cut", **quiet)
    wanted, found = (load_file(run.path / "model" / "model.safetensors") for run in (whole, cut))
    assert len(wanted) > 5
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    assert any("trunk ran once" in line for line in whole.read_json("data.json")["settings"])


def test_dropout_below_what_trains_rules_it_out(prepared):
    """A dropout of the whole model, as GPT-2 has it behind its word table."""
    train_options = {"num_train_epochs": 3, "packing": False}
    ready, task, loaded = prepared("causal-lm", method={"name": "layers", "last": 1}, train=train_options)
    body = loaded.model.model
    body.add_module("drop", torch.nn.Dropout(0.5))
    body.embed_tokens.register_forward_hook(lambda module, args, output: body.drop(output))
    model = ready.method.apply(loaded.model, loaded)
    trunk = trunk_cache.TrunkCache(
        task, loaded, checking.planned_steps(ready, task, loaded), torch.device("cpu"), "float32"
    )
    for rate, said in ((0.5, "dropout below what trains"), (0.0, "ran once")):
        body.drop.p = rate
        trunk.follow(model)
        assert said in loaded.notes[-1]


def test_blocks_that_hand_on_more_than_they_show_rule_it_out(prepared):
    """A block that leaves something for a later one on the side: kept activations would lack it."""
    train_options = {"num_train_epochs": 3, "packing": False}
    ready, task, loaded = prepared("causal-lm", method={"name": "layers", "last": 1}, train=train_options)
    first, last = loaded.model.model.layers[0], loaded.model.model.layers[-1]
    left = [0.0]

    first.self_attn.register_forward_hook(lambda module, args, output: left.__setitem__(0, left[0] + 1.0))
    first.register_forward_pre_hook(lambda module, args: left.__setitem__(0, 0.0))
    last.register_forward_pre_hook(lambda module, args: (args[0] * (1 + left[0]), *args[1:]))
    model = ready.method.apply(loaded.model, loaded)
    steps = checking.planned_steps(ready, task, loaded)
    trunk_cache.TrunkCache(task, loaded, steps, torch.device("cpu"), "float32").follow(model)
    assert "bears no kept activations" in loaded.notes[-1]
