"""Shared ground of the tests: offline, tiny checkpoints, rows by field kind, ready recipes."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach for a hub; set before transformers is imported
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# no test may find what another left, nor clear what is a person's; those of the cache have their own folder
os.environ["TUNEWRIGHT_CACHE"] = "off"
os.environ["TUNEWRIGHT_CACHE_DIR"] = str(Path(tempfile.gettempdir()) / f"tunewright-tests-{os.getpid()}")

import copy
import csv
import json
import random
import re
from typing import Any

import promises
import pytest

SHARED = Path(__file__).parents[2] / "shared"
GOOD, BAD = ["good", "sun", "day"], ["bad", "rain", "night"]
COLOURS = {"red": (220, 40, 40), "blue": (40, 40, 220)}


def shared(path: str) -> Path:
    """A file of the shared real data; the test is skipped, and says so, where there is none."""
    found = SHARED / path
    if not found.exists():
        pytest.skip(f"real data not here: shared/{path}")
    return found


def write_text_rows(path: Path, n: int, seed: int = 0) -> Path:
    """A CSV of n different rows: five words of one mood among letters; the label is the mood."""
    rng = random.Random(seed)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for i in range(n):
            label = ["bad", "good"][i % 2]
            mood = BAD if label == "bad" else GOOD
            words = rng.choices(mood, k=5) + rng.sample("abcdefghijklmnop", rng.randint(2, 9))
            rng.shuffle(words)
            writer.writerow([" ".join(words), label])
    return path


def write_image_rows(folder: Path, n: int, seed: int = 0) -> Path:
    """Class folders of n noisy 20 x 20 pictures, reddish and bluish."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(seed)
    for i in range(n):
        name = ["blue", "red"][i % 2]
        (folder / name).mkdir(parents=True, exist_ok=True)
        pixels = np.clip(np.array(COLOURS[name]) + rng.normal(0, 40, (20, 20, 3)), 0, 255).astype("uint8")
        Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


def write_conversation_rows(path: Path, n: int, seed: int = 0) -> Path:
    """JSONL of n different questions, five to nine words of one mood among letters; the answer names the mood twice."""
    rng = random.Random(seed)
    with path.open("w") as file:
        for i in range(n):
            mood = ["bad", "good"][i % 2]
            words = rng.choices(BAD if mood == "bad" else GOOD, k=3) + rng.sample("abcdefghijklmnop", rng.randint(2, 6))
            rng.shuffle(words)
            row = {"prompt": " ".join(words), "completion": f"very {mood} {words[0]}"}
            file.write(json.dumps(row) + "\n")
    return path


def same_answers(one: list[dict[str, Any]], two: list[dict[str, Any]], abs: float) -> None:
    """Predictions of any task, equal in what they say: numbers within `abs`, everything else exactly."""
    assert len(one) == len(two) > 0
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        assert a
        for key, value in a.items():
            numbers = isinstance(value, float) or (isinstance(value, dict) and value)
            assert value == (pytest.approx(b[key], abs=abs) if numbers else b[key]), key


ROWS = {
    "text": lambda where, n, seed=0: write_text_rows(where / "rows.csv", n, seed),
    "image": lambda where, n, seed=0: write_image_rows(where / "rows", n, seed),
    "conversation": lambda where, n, seed=0: write_conversation_rows(where / "rows.jsonl", n, seed),
}


# What makes no sense: no tokens, nothing to put tokens before. Each must be refused before the first step.
REFUSED: set[tuple[str, str]] = {("image-classification", "prefix"), ("image-classification", "prompt")}


def every_cell() -> list[tuple[str, str]]:
    """(task, method), all that work together."""
    from tunewright import find

    both = [(task, method) for task in find.names("tasks") for method in find.names("methods")]
    return [cell for cell in both if cell not in REFUSED]


def tiny_tree(task_name: str, where: Path, *, n: int = 60, dropout: float = 0.0, **keys: Any) -> dict[str, Any]:
    """A recipe's mapping for any task: a tiny checkpoint and rows, chosen by what the task says it needs.

    Without the gauges that ask the models again: who looks at those says so (`evaluate={}`).
    """
    from tunewright import find
    from tunewright.contracts import Task
    from tunewright.models import tiny

    where.mkdir(parents=True, exist_ok=True)
    task = find.find("tasks", task_name, Task)
    base = where / "base"
    if not base.exists():
        base.mkdir()
        tiny.MAKERS[task.auto_class](base, dropout=dropout)
    kind = next(field.kind for field in task.fields.values() if field.kind != "label")
    rows = ROWS[kind](where, n)
    return {
        "model": str(base),
        "task": task_name,
        "data": {"train": str(rows), "holdout": 0.3},
        "method": "full",
        "evaluate": {"quick": True},
    } | keys


@pytest.fixture(scope="session")
def tiny_recipe(tmp_path_factory: pytest.TempPathFactory):
    """`tiny_recipe("text-classification", method="lora", train={...})` -> a Recipe on shared tiny files."""
    from tunewright.recipe import Recipe

    root = tmp_path_factory.mktemp("tiny")

    def make(task_name: str = "text-classification", **keys: Any):
        return Recipe.of(tiny_tree(task_name, root / task_name) | keys)[0]

    return make


@pytest.fixture(scope="session")
def prepared(tiny_recipe):
    """`prepared("text-classification")` -> (what `check` prepares, task, a base of one's own to change)."""
    from tunewright.runs import checking

    made: dict[str, tuple] = {}

    def make(name: str, **keys: Any):
        key = name + str(keys)
        if key not in made:
            ready = checking.prepare(tiny_recipe(name, **keys))
            made[key] = (ready, *checking.load(ready))
        ready, task, loaded = made[key]
        return ready, task, copy.deepcopy(loaded)

    return make


@pytest.fixture
def cli(capsys):
    """`cli("check", ...)` -> (exit code, stdout, stderr)."""

    from tunewright.cli import main

    def call(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(word) for word in words])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


# ------------------------------------------------------------------- the promises
def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--promises", action="store_true", help="print the table of promises; fail where one falls short")
    parser.addoption("--kills", type=int, default=6, help="how many runs are killed (the full table: 100)")


@pytest.fixture
def measured(record_property):
    """`measured(5, value=1e-7)`: what this test found for a promise; see promises.py."""

    def note(promise: int, **said: Any) -> None:
        record_property("promise", json.dumps({"promise": promise, **said}))

    return note


ROWS_OF_BAD_INPUT = re.compile(r"test_row_((?:\d\d_)+)")  # test_row_29_30_31_...: these rows of the table


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if ROWS_OF_BAD_INPUT.match(item.name):
            item.add_marker(pytest.mark.promise(9))


@pytest.fixture(autouse=True)
def _promised(request: pytest.FixtureRequest) -> None:
    """A test that fails before it could say what it measured still breaks its promise."""
    if mark := request.node.get_closest_marker("promise"):
        request.node.user_properties.append(("promises", json.dumps(mark.args)))
    if number := ROWS_OF_BAD_INPUT.match(request.node.name):
        rows = [int(n) for n in number[1].split("_") if n]
        request.node.user_properties.append(("promise", json.dumps({"promise": 9, "rows": rows})))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if not config.getoption("--promises"):
        return
    reports = [r for key in ("passed", "failed", "error") for r in terminalreporter.stats.get(key, [])]
    lines, short = promises.table(reports, full=config.getoption("--kills") >= 100)
    terminalreporter.section("the promises")
    for line in lines:
        terminalreporter.write_line(line)
    if short:  # even where every single test passed
        terminalreporter.write_line(f"{len(short)} promises fall short: " + ", ".join(str(p.number) for p in short))
        terminalreporter._session.exitstatus = pytest.ExitCode.TESTS_FAILED
