"""How cost grows: with rows (1k to 300k), sequence length (128 to 4096) and model size (15M to 400M Llama shapes).

    python benchmarks/growth.py                       all three, under 25 minutes on two cores
    python benchmarks/growth.py --what rows length --rounds 1

Every point is a process of its own, one thread, CPU time; the median of the rounds. The exponent is the slope of a
straight line through logarithms of the top half of the range, so that fixed costs of starting do not flatter it.
Rows: start to the end of ten steps, so reading, checking, splitting and encoding of all rows, and the peak of memory.
Length and size: one step of LoRA in float32, the first left out; lengths share 4096 tokens a step, sizes take 512.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SHAPES = {  # name -> width, blocks, heads, width of the mlp; the vocabulary is a few words, so these are bodies
    "15M": (384, 8, 6, 1024), "40M": (576, 10, 9, 1536), "100M": (768, 14, 12, 2048), "200M": (1024, 16, 16, 2752),
    "400M": (1280, 20, 20, 3456),
}  # fmt: skip
POINTS: dict[str, list[Any]] = {
    "rows": [1_000, 3_000, 10_000, 30_000, 100_000, 300_000],
    "length": [128, 256, 512, 1024, 2048, 4096],
    "size": list(SHAPES),
}
STEPS = 3  # of length and size


class Done(Exception):
    """Ends a run once its steps are taken."""


def measure(what: str, point: Any) -> dict[str, float]:
    """One point: CPU seconds, peak memory in MB, and what it is counted by."""
    import torch

    import tunewright.runs.training as training
    from tunewright.contracts import Callback
    from tunewright.recipe import Recipe

    torch.set_num_threads(1)
    clock: list[float] = []

    class Clock(Callback):
        def on_start(self, state: Any, model: Any) -> None:
            torch.set_num_threads(1)
            body = sum(p.numel() for n, p in model.named_parameters() if "lora" not in n)
            sizes.append(body)

        def on_step(self, state: Any, logs: Any) -> None:
            clock.append(time.process_time())

    def stop(*given: Any) -> None:
        raise Done

    sizes: list[int] = []
    training._answers = stop
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tree = made_rows(folder, point) if what == "rows" else made_text(folder, what, point)
        began = time.process_time()
        try:
            recipe = Recipe.of(tree)[0]
            training.train(recipe, folder / "run", quiet=True, say=lambda text: None, callbacks=[Clock()])
        except Done:
            pass
    seconds = clock[-1] - began if what == "rows" else (clock[-1] - clock[0]) / (len(clock) - 1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"by": sizes[0] if what == "size" else point, "seconds": seconds, "peak": peak}


def made_rows(folder: Path, count: int) -> dict[str, Any]:
    """So many texts of 5 to 20 words for a tiny encoder: what grows is the handling of rows."""
    from tunewright.models import tiny

    rng = random.Random(0)  # noqa: S311
    with (folder / "rows.csv").open("w", encoding="utf-8") as file:
        file.write("text,label\n")
        for i in range(count):
            words = " ".join(rng.choice(tiny.WORDS) for _ in range(rng.randint(5, 20)))
            file.write(f"{words} {i},{rng.choice(['good', 'bad'])}\n")
    model = tiny.text_encoder(folder / "model")
    return {
        "model": str(model), "task": "text-classification", "data": {"train": str(folder / "rows.csv")},
        "method": "full", "train": {"max_steps": 10, "precision": "float32"}, "evaluate": {"quick": True},
    }  # fmt: skip


def made_text(folder: Path, what: str, point: Any) -> dict[str, Any]:
    """One document for a Llama shape, cut into windows of which a step takes so many."""
    from tunewright.models import tiny

    length, shape, tokens = (point, "15M", 4096) if what == "length" else (512, point, 512)
    width, blocks, heads, inner = SHAPES[shape]
    model = tiny.causal_lm(
        folder / "model", hidden_size=width, num_hidden_layers=blocks, num_attention_heads=heads,
        num_key_value_heads=heads, intermediate_size=inner, max_position_embeddings=8192,
    )  # fmt: skip
    file = model / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": 8192}))
    rng = random.Random(0)  # noqa: S311
    for split, documents in (("train", STEPS * tokens // length), ("test", 2)):
        lines = [" ".join(rng.choice(tiny.WORDS) for _ in range(length - 8)) for _ in range(max(4, documents))]
        with (folder / f"{split}.jsonl").open("w", encoding="utf-8") as out:
            out.writelines(json.dumps({"text": line}) + "\n" for line in lines)
    return {
        "model": str(model), "task": {"name": "causal-lm", "max_length": length}, "method": "lora",
        "data": {"train": str(folder / "train.jsonl"), "test": str(folder / "test.jsonl")},
        "train": {
            "max_steps": STEPS, "precision": "float32", "packing": False,
            "per_device_train_batch_size": tokens // length,
        },
        "evaluate": {"quick": True},
    }  # fmt: skip


def exponent(xs: list[float], ys: list[float]) -> float:
    """The slope of log y over log x in the top half of the range."""
    half = len(xs) // 2
    x, y = ([math.log(value) for value in values[half:]] for values in (xs, ys))
    return statistics.linear_regression(x, y).slope


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--what", nargs="+", choices=list(POINTS), default=list(POINTS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--most", type=int, help="only so many points of each, the smallest")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        what, point = asked.one
        print(json.dumps(measure(what, point if what == "size" else int(point))))
        return
    for what in asked.what:
        points = POINTS[what][: asked.most]
        found: dict[Any, list[dict[str, float]]] = {point: [] for point in points}
        for _ in range(asked.rounds):
            for point, results in found.items():
                results.append(apart(what, point))
        tokens = {"rows": 1, "length": 4096, "size": 512}[what]
        seconds = [statistics.median(r["seconds"] for r in results) for results in found.values()]
        peaks = [statistics.median(r["peak"] for r in results) for results in found.values()]
        for point, second, peak in zip(points, seconds, peaks, strict=True):
            each = f", {second / tokens * 1e3:.3g} ms a token" if tokens > 1 else ""
            print(f"{what} {point}: {second:.2f} s{each}, peak {peak:,.0f} MB", flush=True)
        if len(points) >= 4:
            by = [float(results[0]["by"]) for results in found.values()]
            what_of = "a token's time" if what == "length" else "time"
            print(
                f"{what}: {what_of} grows with exponent {exponent(by, seconds):.2f}, memory {exponent(by, peaks):.2f}"
            )


def apart(what: str, point: Any) -> dict[str, float]:
    """One point in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--one", what, str(point)], capture_output=True, text=True, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    main()
