"""AdamW with moments of a byte each: near the plain one, a quarter of its memory, the same run after a resume."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tunewright.contracts import Callback
from tunewright.engine import eight_bit, optimizers
from tunewright.errors import UserError
from tunewright.runs import checking
from tunewright.runs.training import train

needs_it = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed (extra [quant])"
)


def stepped(name: str, count: int = 30) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Linear(128, 64)
    optimizer = optimizers.build(name, [{"params": list(model.named_parameters()), "lr": 1e-3, "weight_decay": 0.1}])
    for _ in range(count):
        (model(torch.randn(16, 128)) - 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


@needs_it
def test_it_goes_where_plain_adamw_goes():
    """30 steps of 1e-3: every weight within a tenth of the way that is possible, on average within a hundredth."""
    (plain, _), (small, _) = stepped("adamw"), stepped("adamw_8bit")
    away = (plain.weight - small.weight).abs()
    assert 0 < away.mean() < 0.01 * 30 * 1e-3
    assert away.max() < 0.1 * 30 * 1e-3
    torch.testing.assert_close(plain.bias, small.bias, rtol=1e-4, atol=1e-5)  # 64 numbers: kept in float32


@needs_it
def test_moments_take_a_quarter_of_the_memory():
    (_, plain), (_, small) = stepped("adamw", 1), stepped("adamw_8bit", 1)

    def size(optimizer, *keys):
        state = optimizers.state_by_name(optimizer)
        return sum(state[f"weight::{key}"].nbytes for key in keys)

    assert size(small, "state1", "state2", "absmax1", "absmax2") < 0.27 * size(plain, "exp_avg", "exp_avg_sq")


@needs_it
def test_no_two_saved_tensors_share_memory():
    """The table of 8-bit values is one for all parameters; safetensors refuses to write it twice."""
    model = nn.Sequential(nn.Linear(128, 64), nn.Linear(64, 128))
    optimizer = optimizers.build("adamw_8bit", [{"params": list(model.named_parameters()), "lr": 0.1}])
    model(torch.ones(2, 128)).sum().backward()
    optimizer.step()
    state = optimizers.state_by_name(optimizer)
    assert sum(name.endswith("qmap1") for name in state) == 2
    assert len({tensor.data_ptr() for tensor in state.values()}) == len(state)


@needs_it
def test_a_run_that_was_stopped_ends_with_the_same_bytes(tiny_recipe, tmp_path):
    recipe = tiny_recipe(train={"optim": "adamw_8bit", "max_steps": 6, "save_steps": 3, "precision": "float32"})
    whole = train(recipe, tmp_path / "whole", quiet=True, say=lambda text: None)
    again = tmp_path / "again"

    class Leave(Callback):
        def on_step(self, state, logs):
            if state.step == 4:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(recipe, again, quiet=True, say=lambda text: None, callbacks=[Leave()])
    said: list[str] = []
    run = train(recipe, again, quiet=True, say=said.append)
    assert any("Continuing after step 3" in text for text in said)
    first, second = (load_file(r.path / "model" / "model.safetensors") for r in (whole, run))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_where_it_is_missing_the_remedy_is_named(tiny_recipe, monkeypatch):
    monkeypatch.setattr(eight_bit, "missing", lambda: "bitsandbytes is not installed")
    with pytest.raises(UserError, match=r"train.optim.*pip install 'tunewright\[quant\]'"):
        checking.prepare(tiny_recipe(train={"optim": "adamw_8bit"}))
