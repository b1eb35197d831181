"""Inputs that belong to nobody's task: short texts, questions with one right end, drawn pictures. All are our own.

neutral.txt: one text a line. probe.jsonl: one item a line, {"kind", "prompt", "right", "wrong": [three]}; another line
is another item. requests.jsonl: what an assistant should refuse, and what only sounds like it. Pictures are drawn from
a seed. Knows files and pixels; no model.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from tunewright.contracts import Field, Record
from tunewright.data.batches import derive_seed

PICTURES = 120
SIDE = 96  # pixels; processors make of it what a model reads
READABLE = ("text", "image")  # kinds of fields that can be filled from here


def texts() -> list[str]:
    """About 200 English texts of a sentence or two: facts, instructions, talk, weather, sums."""
    return _read("neutral.txt").splitlines()


def items() -> list[dict[str, Any]]:
    """The questions of the general probe."""
    return [json.loads(line) for line in _read("probe.jsonl").splitlines()]


def requests() -> list[dict[str, Any]]:
    """What people ask of an assistant: {"kind": "harmful" or "harmless", "request"}; each harmless one sounds alike."""
    return [json.loads(line) for line in _read("requests.jsonl").splitlines()]


def _read(name: str) -> str:
    return (resources.files("tunewright.runs.evidence") / name).read_text(encoding="utf-8")


def records(fields: dict[str, Field], folder: Path) -> list[Record] | None:
    """Rows without an answer, whose fields hold neutral texts or pictures; None where a field is of another kind.

    folder: where pictures are written to.
    """
    inputs = {name: field.kind for name, field in fields.items() if field.kind != "label"}
    if not inputs or not set(inputs.values()) <= set(READABLE):
        return None
    files = pictures(folder) if "image" in inputs.values() else []
    said = texts()
    n = len(files) or len(said)
    found = []
    for i in range(n):
        values = {name: str(files[i]) if kind == "image" else said[i % len(said)] for name, kind in inputs.items()}
        found.append({"row": f"neutral:{i + 1}", "where": f"neutral:{i + 1}", "extra": {}, **values})
    return found


def pictures(folder: Path, n: int = PICTURES) -> list[Path]:
    """Gradients, shapes and noise in turn, as PNG files; always the same ones."""
    from PIL import Image

    made = []
    for i in range(n):
        rng = np.random.default_rng(derive_seed("picture", i))
        pixels = (_gradient, _shapes, _noise)[i % 3](rng)
        made.append(folder / f"{i + 1}.png")
        Image.fromarray(np.clip(pixels, 0, 255).astype("uint8")).save(made[-1])
    return made


def _colour(rng: np.random.Generator) -> Any:
    return rng.uniform(0, 255, 3)


def _grid() -> Sequence[Any]:
    return np.meshgrid(np.linspace(-1, 1, SIDE), np.linspace(-1, 1, SIDE))


def _gradient(rng: np.random.Generator) -> Any:
    """From one colour to another, in any direction or out from a point."""
    x, y = _grid()
    angle = rng.uniform(0, 2 * np.pi)
    straight = (x * np.cos(angle) + y * np.sin(angle) + 1.5) / 3
    round_ = np.hypot(x - rng.uniform(-1, 1), y - rng.uniform(-1, 1)) / 2.5
    way = (straight if rng.random() < 0.5 else round_)[..., None]
    return (1 - way) * _colour(rng) + way * _colour(rng)


def _shapes(rng: np.random.Generator) -> Any:
    """A few discs, boxes and stripes on one ground."""
    x, y = _grid()
    picture = np.broadcast_to(_colour(rng), (SIDE, SIDE, 3)).copy()
    for _ in range(rng.integers(1, 6)):
        a, b = x - rng.uniform(-0.8, 0.8), y - rng.uniform(-0.8, 0.8)
        size = rng.uniform(0.15, 0.6)
        kinds = (np.hypot(a, b) < size, np.maximum(np.abs(a), np.abs(b)) < size, np.sin(12 * (a + b) / size) > 0.6)
        picture[kinds[rng.integers(3)]] = _colour(rng)
    return picture


def _noise(rng: np.random.Generator) -> Any:
    """Coarse or fine grain around one colour."""
    grain = int(rng.choice([1, 2, 4, 8, 16]))
    coarse = rng.normal(0, rng.uniform(20, 80), (SIDE // grain, SIDE // grain, 3))
    return _colour(rng) + coarse.repeat(grain, 0).repeat(grain, 1)
