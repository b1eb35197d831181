"""Do rows of like length in one step cost accuracy? The same runs with and without, seed by seed.

    python benchmarks/lengths.py MODEL TRAIN TEST                          lora and full, 1,000 rows, 5 seeds
    python benchmarks/lengths.py MODEL TRAIN TEST --methods lora --seeds 3 --rows 300

One JSON line a run, then the mean difference of each method with its 95 % interval (t, paired by seed). Both ways see
the same rows; a seed gives the new head and the order of rows.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 8: 2.365, 10: 2.262}  # Student's t, by number of pairs


class Measured(Exception):
    """Carries the scores out of a run whose evidence is not wanted."""


def measure(asked: argparse.Namespace, method: str, seed: int, by_length: bool) -> dict[str, float]:
    """One run: its scores on the test rows."""
    import torch

    import tunewright.runs.training as training
    from tunewright.data.batches import Examples
    from tunewright.engine.evaluate import overall, predict_rows, score_rows
    from tunewright.recipe import Recipe

    plain = training.fit, training._answers

    def fit(task: Any, method: Any, loaded: Any, steps: Any, *args: Any, **named: Any) -> Any:
        torch.set_num_threads(1)
        if not by_length:
            steps._lengths = None
        return plain[0](task, method, loaded, steps, *args, **named)

    def answers(task: Any, model: Any, loaded: Any, prepared: Any, quiet: bool) -> Any:
        rows = prepared.data.test
        found = predict_rows(task, model, loaded, Examples(rows, lambda row: task.encode(row, loaded)))
        raise Measured(overall(task, score_rows(task, found, rows)))

    training.fit, training._answers = fit, answers
    tree = {
        "model": asked.model, "task": "text-classification", "method": method, "seed": seed,
        "data": {"train": asked.train, "test": asked.test, "limit": asked.rows, "seed": 0},
        "train": {"precision": "float32", "per_device_train_batch_size": 16},
        "evaluate": {"quick": True},
    }  # fmt: skip
    try:
        with tempfile.TemporaryDirectory() as folder:
            training.train(Recipe.of(tree)[0], Path(folder) / "run", quiet=True, say=lambda text: None)
    except Measured as found:
        return found.args[0]
    finally:
        training.fit, training._answers = plain
    raise AssertionError("the run ended without an answer")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("train")
    parser.add_argument("test")
    parser.add_argument("--methods", nargs="+", default=["lora", "full"])
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=5, choices=sorted(T95))
    asked = parser.parse_args()
    for method in asked.methods:
        apart: dict[str, list[float]] = {}
        for seed in range(asked.seeds):
            with_it, without = (measure(asked, method, seed, by_length) for by_length in (True, False))
            print(json.dumps({"method": method, "seed": seed, "by_length": with_it, "random": without}), flush=True)
            for name, value in with_it.items():
                apart.setdefault(name, []).append(value - without[name])
        for name, values in apart.items():
            half = T95[asked.seeds] * statistics.stdev(values) / len(values) ** 0.5
            print(f"{method}: {name} {statistics.mean(values):+.4f} +- {half:.4f} by length, against random order")


if __name__ == "__main__":
    main()
