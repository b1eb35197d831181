"""What test_ranks.py runs in its own process and under torchrun: every task trained on the same tiny files."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

from conftest import tiny_tree

from tunewright.contracts import Callback
from tunewright.engine import distributed, fit
from tunewright.recipe import Recipe
from tunewright.runs.training import train

TRAIN = {
    "max_steps": 3, "gradient_accumulation_steps": 1, "optim": "sgd", "learning_rate": 0.1, "precision": "float32",
    "lr_scheduler_type": "constant", "warmup_steps": 0, "max_grad_norm": 0, "logging_steps": 1,
}  # fmt: skip


class Stop(Callback):
    """As a user's: heard on the first rank alone, and obeyed by all."""

    def on_step(self, state, logs):
        assert distributed.is_first()
        state.stop = "enough" if state.step == 2 else None


def prepare_accident() -> None:
    """In its second step the last rank meets with an accident of its own."""
    whole = fit.clip

    def clip(model, limit):
        clip.calls += 1
        if clip.calls == 2 and distributed.rank() == 1:
            raise ArithmeticError("an accident of this rank")
        return whole(model, limit)

    clip.calls = 0
    fit.clip = clip


def main(folder: Path, place: str, batch: int, tasks: list[str]) -> None:
    distributed.join()
    for name in tasks:
        # 13 rows, of which 9 train: a step of 8 rows, then one of a single row, so that one rank has none
        tree = distributed.from_first(lambda name=name: tiny_tree(name, folder / name, n=13))
        options = TRAIN | {"per_device_train_batch_size": batch, "per_device_eval_batch_size": 3}
        recipe = Recipe.of(tree | {"train": options})[0]
        callbacks = [Stop()] if place == "stopped" else []
        run = train(recipe, folder / name / place, quiet=True, say=lambda text: None, callbacks=callbacks)
        print(f"{name} {distributed.size()} {run.path}")


if __name__ == "__main__":
    here = Path(sys.argv[1])  # one launch for all of it: starting processes costs more than training
    main(here, "two", 4, sys.argv[2:])
    main(here, "stopped", 4, sys.argv[2:3])
    prepare_accident()
    main(here, "fails", 4, sys.argv[2:3])
