"""The frozen trunk once, against in every step: CPU time of the steps of one run, by number of epochs.

    python benchmarks/trunk_cache.py MODEL ROWS.csv                     text classification, the last block trains
    python benchmarks/trunk_cache.py MODEL ROWS.csv --epochs 1 3 10 --last 2 --rounds 5

Interleaved, every run a process of its own, one thread, medians with their range. The last losses must agree.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def measure(model: str, rows: str, epochs: float, last: int, kept: bool) -> dict[str, float]:
    """One run; the CPU time from the start of `fit` to its end, the cache's filling included."""
    import tunewright.runs.training as training
    from tunewright.engine import trunk_cache
    from tunewright.recipe import Recipe

    trunk_cache.ROOM = trunk_cache.ROOM if kept else -1
    plain, spent = training.fit, []

    def timed(*args, **named):
        import torch

        torch.set_num_threads(1)
        began = time.process_time()
        found = plain(*args, **named)
        spent.append(time.process_time() - began)
        return found

    training.fit = timed
    tree = {
        "model": model, "task": "text-classification", "data": {"train": rows},
        "method": {"name": "layers", "last": last},
        "train": {"num_train_epochs": epochs, "precision": "float32", "logging_steps": 1},
        "evaluate": {"quick": True},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        run = training.train(Recipe.of(tree)[0], Path(folder) / "run", quiet=True, say=lambda text: None)
        lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
        notes = [line for line in run.read_json("data.json")["settings"] if "trunk" in line]
    return {"seconds": spent[0], "loss": [line["loss"] for line in lines if "learning_rate" in line][-1], "said": notes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("rows")
    parser.add_argument("--epochs", type=float, nargs="+", default=[1, 3, 10])
    parser.add_argument("--last", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--one", choices=["kept", "plain"], help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        print(json.dumps(measure(asked.model, asked.rows, asked.epochs[0], asked.last, asked.one == "kept")))
        return
    for epochs in asked.epochs:
        found: dict[str, list[dict]] = {"plain": [], "kept": []}
        for _ in range(asked.rounds):
            for kind, results in found.items():
                words = [sys.executable, __file__, asked.model, asked.rows, "--one", kind, "--last", str(asked.last)]
                done = subprocess.run(
                    [*words, "--epochs", str(epochs)], capture_output=True, text=True, check=True,
                    env=os.environ | {"OMP_NUM_THREADS": "1"},
                )  # fmt: skip
                results.append(json.loads(done.stdout.splitlines()[-1]))
        plain, kept = ([r["seconds"] for r in found[kind]] for kind in ("plain", "kept"))
        assert abs(found["plain"][0]["loss"] - found["kept"][0]["loss"]) <= 1e-4, found
        ratios = [a / b for a, b in zip(plain, kept, strict=True)]
        print(
            f"{epochs:g} epochs: plain {statistics.median(plain):.2f} s, kept {statistics.median(kept):.2f} s, "
            f"{statistics.median(ratios):.2f} x [{min(ratios):.2f} .. {max(ratios):.2f}]  {found['kept'][0]['said']}"
        )


if __name__ == "__main__":
    main()
