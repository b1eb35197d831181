"""The frozen trunk once, against in every step; and a second run on the same data, against itself cold.

    python benchmarks/trunk_cache.py MODEL ROWS.csv                     text classification, the last block trains
    python benchmarks/trunk_cache.py MODEL ROWS.csv --epochs 1 3 10 --last 2 --rounds 5
    python benchmarks/trunk_cache.py MODEL ROWS.csv --warm --rounds 5   what an earlier run left on the disk is used
    python benchmarks/trunk_cache.py MODEL FOLDER --warm --task image-classification

Interleaved, every run a process of its own, one thread, medians with their range. The last losses must agree, and so
must the scores of a run that is measured cold and warm.
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
from typing import Any

LAYERS = '{"name": "layers", "last": 1}'
# name -> the run before, and the run that is measured: (method, seed)
WARM = {
    "head, the same again": (("head", 0), ("head", 0)),
    "head, second seed": (("head", 0), ("head", 1)),
    "head after layers": ((LAYERS, 0), ("head", 0)),
    "layers, second seed": ((LAYERS, 0), (LAYERS, 1)),
}


def measure(asked: argparse.Namespace) -> dict[str, Any]:
    """One run; the CPU time from the start of `fit` to its end, the cache's filling included, and of the process."""
    import tunewright.runs.training as training
    from tunewright.engine import trunk_cache
    from tunewright.recipe import Recipe

    trunk_cache.ROOM = -1 if asked.one == "plain" else trunk_cache.ROOM
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
        "model": asked.model, "task": asked.task, "data": {"train": asked.rows}, "seed": asked.seed,
        "method": json.loads(asked.method) if asked.method else {"name": "layers", "last": asked.last},
        "train": {"num_train_epochs": asked.epochs[0], "precision": "float32", "logging_steps": 1},
        "evaluate": {"quick": True},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        run = training.train(Recipe.of(tree)[0], Path(folder) / "run", quiet=True, say=lambda text: None)
        lines = run.lines("metrics")
        notes = [line for line in run.read_json("data.json")["settings"] if "trunk" in line]
        score = run.read_json("evidence.json")["measures"][0]["tuned"]
    losses = [line["loss"] for line in lines if "learning_rate" in line]
    return {
        "seconds": spent[0], "process": time.process_time(), "loss": losses[-1] if losses else None, "score": score,
        "said": notes,
    }  # fmt: skip


def run_one(asked: argparse.Namespace, kind: str, epochs: float, store: str, **more: Any) -> dict[str, Any]:
    """A run in a process of its own; store: the folder of the shared cache, "" for none."""
    words = [sys.executable, __file__, asked.model, asked.rows, "--one", kind, "--last", str(asked.last)]
    words += ["--epochs", str(epochs), "--task", asked.task]
    words += [word for name, value in more.items() for word in (f"--{name}", str(value))]
    place = {"TUNEWRIGHT_CACHE_DIR": store} if store else {"TUNEWRIGHT_CACHE": "off"}
    environ = os.environ | {"OMP_NUM_THREADS": "1"} | place
    done = subprocess.run(words, capture_output=True, text=True, check=True, env=environ)
    return json.loads(done.stdout.splitlines()[-1])


def compare_once(asked: argparse.Namespace, epochs: float) -> None:
    """The trunk once in a run, against in every step."""
    found: dict[str, list[dict]] = {"plain": [], "kept": []}
    for _ in range(asked.rounds):
        for kind, results in found.items():
            results.append(run_one(asked, kind, epochs, ""))
    assert abs(found["plain"][0]["loss"] - found["kept"][0]["loss"]) <= 1e-4, found
    tell(f"{epochs:g} epochs", "plain", found["plain"], "kept", found["kept"])


def compare_warm(asked: argparse.Namespace, name: str) -> None:
    """A run that finds what another left, against the same run in an empty store."""
    (before, seed_before), (method, seed) = WARM[name]
    cold, warm = [], []
    named = {"method": method if method.startswith("{") else json.dumps(method), "seed": seed}
    first = {"method": before if before.startswith("{") else json.dumps(before), "seed": seed_before}
    for _ in range(asked.rounds):
        with tempfile.TemporaryDirectory() as empty, tempfile.TemporaryDirectory() as store:
            cold.append(run_one(asked, "kept", asked.epochs[0], empty, **named))
            run_one(asked, "kept", asked.epochs[0], store, **first)
            warm.append(run_one(asked, "kept", asked.epochs[0], store, **named))
    assert {r["score"] for r in cold} == {r["score"] for r in warm}, (cold, warm)
    tell(name, "cold", cold, "warm", warm)


def tell(what: str, one: str, slow: list[dict], two: str, fast: list[dict]) -> None:
    for part, label in (("seconds", "fit"), ("process", "whole process")):
        before, now = [r[part] for r in slow], [r[part] for r in fast]
        ratios = [a / b for a, b in zip(before, now, strict=True)]
        print(
            f"{what}, {label}: {one} {statistics.median(before):.2f} s, {two} {statistics.median(now):.2f} s, "
            f"{statistics.median(ratios):.2f} x [{min(ratios):.2f} .. {max(ratios):.2f}]", flush=True
        )  # fmt: skip
    print(f"    {fast[0]['said']}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("rows")
    parser.add_argument("--task", default="text-classification")
    parser.add_argument("--epochs", type=float, nargs="+")
    parser.add_argument("--last", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warm", action="store_true")
    parser.add_argument("--only", choices=list(WARM), nargs="+", default=list(WARM), help="with --warm: these alone")
    parser.add_argument("--one", choices=["kept", "plain"], help=argparse.SUPPRESS)
    parser.add_argument("--method", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=42, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    asked.epochs = asked.epochs or ([3] if asked.warm else [1, 3, 10])
    if asked.one:
        print(json.dumps(measure(asked)))
    elif asked.warm:
        for name in asked.only:
            compare_warm(asked, name)
    else:
        for epochs in asked.epochs:
            compare_once(asked, epochs)


if __name__ == "__main__":
    main()
