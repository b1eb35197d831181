"""bf16 products do not stop small steps: what trains is float32, and moves as far as in float32."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from tunewright.runs.training import train

STEPS, RATE = 24, 2e-5  # a weight of 0.1 in bf16 knows no smaller step than 2e-4: ten times what Adam wants here


def moved(tiny_recipe, folder, precision: str, task: str, method: str) -> tuple[dict[str, torch.Tensor], list[float]]:
    options = {
        "max_steps": STEPS, "per_device_train_batch_size": 8, "learning_rate": RATE, "precision": precision,
        "lr_scheduler_type": "constant", "warmup_steps": 0, "weight_decay": 0.0, "logging_steps": 1,
    }  # fmt: skip
    recipe = tiny_recipe(task, method=method, train=options)
    run = train(recipe, folder / precision, quiet=True, say=lambda text: None)
    tuned = load_file(run.path / "model" / "model.safetensors")
    base = load_file(f"{recipe.model.checkpoint}/model.safetensors")
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    drawn = {name: tuned[name] - base[name] for name in base.keys() & tuned.keys() if base[name].is_floating_point()}
    return drawn, [line["loss"] for line in lines if "learning_rate" in line]


@pytest.mark.parametrize("task", ["causal-lm", "text-classification"])
def test_learning_in_bf16_does_not_stagnate(tiny_recipe, tmp_path, task):
    exact, losses = moved(tiny_recipe, tmp_path, "float32", task, "full")
    half, halved = moved(tiny_recipe, tmp_path, "bf16", task, "full")
    assert losses != halved, "products were in bf16"
    far, near = (sum(float(d.abs().sum()) for d in one.values()) for one in (half, exact))
    assert 0.85 * near <= far <= 1.15 * near
    assert halved[-1] == pytest.approx(losses[-1], abs=0.05)


def test_the_control_weights_in_bf16_would_stand_still(tiny_recipe, tmp_path):
    """So that the test above can fail: the same steps on weights that are stored in bf16 get nowhere."""
    exact, _ = moved(tiny_recipe, tmp_path, "float32", "causal-lm", "full")
    base = load_file(f"{tiny_recipe('causal-lm').model.checkpoint}/model.safetensors")
    name = max(exact, key=lambda n: exact[n].numel())
    stored = base[name].to(torch.bfloat16)
    start = stored.clone()
    for _ in range(STEPS):
        stored += (exact[name] / STEPS).to(torch.bfloat16)
    assert float((stored - start).abs().sum()) < 0.5 * float(exact[name].abs().sum())
