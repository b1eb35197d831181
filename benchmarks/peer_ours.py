"""Our side: the product itself, a recipe through `tunewright.runs.training.train`, in a user's default way.

Counted is `fit`, with whatever it prepares and saves; evidence, gauges and the report are not, as no peer makes any.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peer_meter import Meter
from peer_works import ALPHA, RANK, RATE, Work

LORA = {"name": "lora", "r": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.0, "target_modules": "all-linear"}


def run(work: Work, configuration: str, inputs: dict[str, str], meter: Meter) -> dict[str, Any]:
    """One run in a fresh folder; losses by step, and accuracy where there is one."""
    from tunewright.recipe import Recipe
    from tunewright.runs import training

    training.fit = counted(training.fit, meter)
    training.checking.planned_steps = prepared(training.checking.planned_steps, meter)
    losses = Losses()
    with tempfile.TemporaryDirectory() as folder:
        recipe = Recipe.of(tree(work, configuration, inputs))[0]
        made = training.train(recipe, Path(folder) / "run", quiet=True, say=lambda text: None, callbacks=[losses])
        notes = made.read_json("data.json")["settings"]
    return {"losses": losses.found, "steps": len(losses.found), "notes": notes}


def tree(work: Work, configuration: str, inputs: dict[str, str]) -> dict[str, Any]:
    """The recipe. What it leaves out is the product's own choice."""
    train = {
        "num_train_epochs": work.epochs, "per_device_train_batch_size": work.batch, "precision": work.precision,
        "learning_rate": RATE[work.method], "lr_scheduler_type": "constant", "warmup_steps": 0,
    }  # fmt: skip
    return {
        "model": inputs["model"], "task": {"name": "sft", "max_new_tokens": 1},
        "data": {"train": inputs["train"], "test": inputs["test"]},
        "method": LORA if work.method == "lora" else {"name": work.method},
        "train": train, "evaluate": {"quick": True},
    }  # fmt: skip


def counted(fit: Callable[..., Any], meter: Meter) -> Callable[..., Any]:
    def timed(*args: Any, **named: Any) -> Any:
        with meter.training():
            return fit(*args, **named)

    return timed


def prepared(planned: Callable[..., Any], meter: Meter) -> Callable[..., Any]:
    def timed(*args: Any, **named: Any) -> Any:
        with meter.preparing():
            return planned(*args, **named)

    return timed


class Losses:
    """A callback of the engine that keeps what every step cost."""

    def __new__(cls) -> Any:
        from tunewright.contracts import Callback

        class Kept(Callback):
            def __init__(self) -> None:
                self.found: list[float] = []

            def on_step(self, state: Any, logs: dict[str, float]) -> None:
                self.found.append(logs["loss"])

        return Kept()
