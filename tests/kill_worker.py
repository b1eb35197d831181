"""Trains tiny models in forked children and kills them with SIGKILL at random moments; says how each ended.

    python tests/kill_worker.py FOLDER KILLS SEED CELL [CELL ...]        a cell: task/method[/option=value]

One process has everything imported and forks for each start, so that a kill costs a second and not ten. Prints one
JSON object a trial: which step the kill came after, whether the next start resumed by itself, and whether it ended with
the bytes of the run that nobody disturbed (weights, optimiser, log).
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from conftest import tiny_tree

from tunewright.contracts import Callback
from tunewright.recipe import Recipe
from tunewright.runs.training import train

TRAIN = {"num_train_epochs": 6, "save_steps": 2, "logging_steps": 1, "precision": "float32", "learning_rate": 1e-3}
SLOW = 0.004  # seconds added to a step: as on a real model most of the time is spent in steps, not at the start


class Slower(Callback):
    def on_step(self, state, logs):
        time.sleep(SLOW)


def recipe_of(cell: str, folder: Path) -> Recipe:
    task, method, *options = cell.split("/")
    chosen = {"name": method} | {k: json.loads(v) for k, v in (o.split("=") for o in options)}
    return Recipe.of(tiny_tree(task, folder / task, method=chosen, train=TRAIN))[0]


def start(recipe: Recipe, out: Path, said: Path) -> int:
    """Fork a child that trains; its process id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        with said.open("w") as file:
            train(recipe, out, quiet=True, say=lambda text: print(text, file=file, flush=True), callbacks=[Slower()])
        code = 0
    except BaseException as error:
        said.write_text(said.read_text() + f"\n{type(error).__name__}: {error}")
    finally:
        os._exit(code)


def ended(child: int) -> bool:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def bytes_of(out: Path) -> dict[str, str]:
    """What must not differ: weights, the last checkpoint with its optimiser, and the log without its clock."""
    last = max((out / "checkpoints").glob("[0-9]*"))
    files = [*(out / "model").glob("*.safetensors"), *last.glob("*.safetensors")]
    found = {f"{p.parent.name}/{p.name}": hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
    for name in ("metrics", "evaluations"):
        path = out / f"{name}.jsonl"
        lines = [json.loads(x) | {"seconds": 0} for x in path.read_text().splitlines()] if path.exists() else []
        found[name] = hashlib.sha256(json.dumps(lines).encode()).hexdigest()
    return found


def trial(cell: str, recipe: Recipe, folder: Path, whole: dict[str, str], seconds: float, rng: random.Random) -> dict:
    """One kill at a random moment of a run, and one more start."""
    out, said = folder / "killed", folder / "said.txt"
    finished = True
    while finished:  # a machine that is quicker for once ends before the kill: that is no trial
        shutil.rmtree(out, ignore_errors=True)
        child = start(recipe, out, said)
        time.sleep(rng.uniform(0.1, 0.9) * seconds)
        os.kill(child, signal.SIGKILL)
        finished = ended(child)
    saved = sorted(int(p.name) for p in (out / "checkpoints").glob("[0-9]*") if p.name.isdigit())
    half = len(list((out / "checkpoints").glob("*.tmp-*")))
    found = {"cell": cell, "saved": saved[-1:], "half_saves": half, "ended": ended(start(recipe, out, said))}
    text = said.read_text()
    found["resumed"] = found["ended"] and ("Continuing after step" in text or not saved or (out / "model").exists())
    found["same"] = found["ended"] and bytes_of(out) == whole
    return found if found["same"] else found | {"said": text[-500:]}


def one_thread(seed: int) -> None:
    """On one core: a pool of threads does not survive a fork."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[seed % len(cores)]})
    torch.set_num_threads(1)


def main(folder: Path, kills: int, seed: int, cells: list[str]) -> None:
    one_thread(seed)
    rng = random.Random(seed)
    for number, cell in enumerate(cells):
        place = folder / cell.replace("/", "-")
        place.mkdir(parents=True)
        recipe = recipe_of(cell, folder)
        train(recipe, place / "warm", quiet=True, say=lambda text: None)  # imports everything; children inherit it
        began = time.monotonic()
        assert ended(start(recipe, place / "whole", place / "said.txt"))
        seconds = time.monotonic() - began
        whole = bytes_of(place / "whole")
        for _ in range(len(range(number, kills, len(cells)))):
            print(json.dumps(trial(cell, recipe, place, whole, seconds, rng)), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
