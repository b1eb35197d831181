"""Our side: the product itself, a recipe through `tunewright.runs.training.train`, in a user's default way.

Counted is `fit`, with whatever it prepares and saves; evidence, gauges and the report are not, as no peer makes any.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peer_meter import Meter
from peer_works import ALPHA, RANK, Work

LORA = {"name": "lora", "r": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.0, "target_modules": "all-linear"}
TASKS = {
    "sft": {"name": "sft", "max_new_tokens": 1},  # answers are not counted; they need not be long
    "cls": {"name": "text-classification"},
    "img": {"name": "image-classification"},
}


def run(work: Work, configuration: str, inputs: dict[str, str], meter: Meter) -> dict[str, Any]:
    """One run in a fresh folder; losses by step, and accuracy where there is one."""
    from tunewright.contracts import Callback
    from tunewright.recipe import Recipe
    from tunewright.runs import training

    class Losses(Callback):
        def on_step(self, state: Any, logs: dict[str, float]) -> None:
            losses.append(logs["loss"])

    if work.method == "lora":
        import peft  # noqa: F401  (the product imports it in `fit`; the others have done so when their clock starts)
    losses: list[float] = []
    training.fit = timed(training.fit, meter.training)
    training.checking.planned_steps = timed(training.checking.planned_steps, meter.preparing)
    with tempfile.TemporaryDirectory() as folder:
        recipe = Recipe.of(tree(work, configuration, inputs))[0]
        made = training.train(recipe, Path(folder) / "run", quiet=True, say=lambda text: None, callbacks=[Losses()])
        notes = made.read_json("data.json")["settings"]
        measures = made.read_json("evidence.json")["measures"]
    accuracy = {} if work.kind == "sft" else {"accuracy": measures[0]["tuned"]}
    return {"losses": losses, "steps": len(losses), "notes": notes, **accuracy}


def tree(work: Work, configuration: str, inputs: dict[str, str]) -> dict[str, Any]:
    """The recipe. What it leaves out is the product's own choice."""
    method: dict[str, Any] = LORA if work.method == "lora" else {"name": work.method}
    if configuration == "steps":
        method = {**method, "solver": "steps"}
    if configuration.endswith("layers"):
        method = {"name": "layers", "last": 1}
    train = {
        "num_train_epochs": work.epochs, "per_device_train_batch_size": work.batch, "precision": work.precision,
        "lr_scheduler_type": "constant", "warmup_steps": 0,
    }  # fmt: skip
    if method["name"] == work.method:
        train["learning_rate"] = work.rate
    model = {"checkpoint": inputs["model"], "dtype": "bfloat16"} if configuration == "half" else inputs["model"]
    return {
        "model": model, "task": TASKS[work.kind], "method": method, "train": train,
        "data": {"train": inputs["train"], "test": inputs["test"]}, "evaluate": {"quick": True},
        "seed": 1 if configuration.endswith("seed") else 0,
    }  # fmt: skip


def timed(act: Callable[..., Any], stretch: Callable[[], Any]) -> Callable[..., Any]:
    """The same function, measured."""

    def measured(*args: Any, **named: Any) -> Any:
        with stretch():
            return act(*args, **named)

    return measured
