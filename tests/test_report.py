"""The report room: a run folder in; a page and a card out that are honest, safe, small and the same each time."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

INTENTS = ("billing", "cancel order", "delivery", "refund", "login & password", "other")
TICKETS = (
    "My card was charged twice for order 5521, I want the second charge back today",
    "please stop the order i made this morning, wrong address",
    "Where is my parcel? The tracking page has said 'in transit' since Monday.",
    "I can't get into my account, the reset mail never arrives",
    "Does the blue one come in size 44?",
    "I sent the shoes back three weeks ago and have heard nothing since. " * 8,
)


def text_run(folder: Path, flips: int = 31, seed: int = 0) -> Path:
    """A run on support tickets with six labels and a clear verdict. Every number in it is made up."""
    draw = random.Random(seed)
    examples = []
    for index in range(flips):
        truth, other = draw.sample(INTENTS, 2)
        broken = index < 10
        examples.append({
            "row": f"tickets.jsonl:{index * 7 + 3}", "kind": "broken" if broken else "fixed", "input": draw.choice(TICKETS),
            "truth": truth, "base": truth if broken else other, "tuned": other if broken else truth, "score": draw.uniform(0.4, 1),
        })  # fmt: skip
    measure = {
        "about": "task",
        "n": 500,
        "baseline": "zero-shot",
        "higher_is_better": True,
        "p": 1e-30,
        "method": "Tango score interval",
    }
    write(folder, "evidence.json", {
        "verdict": {
            "answer": "better",
            "sentence": "The tuned model is clearly better at your task: it fixed 210 of 500 rows and broke 10 "
                        "(+40.0 points, 95% interval +35.6 to +44.4).",
            "margin": 0.02, "smallest_detectable": 0.0402,
            "not_measured": ["robustness: evaluate.perturb is off", "groups: no group column was named"],
        },
        "measures": [
            {**measure, "name": "accuracy", "base": 0.51, "tuned": 0.91, "difference": 0.4, "ci95": [0.356, 0.444], "proportion": True},
            {**measure, "name": "macro_f1", "base": 0.4782, "tuned": 0.8991, "difference": 0.4209, "ci95": [0.37, 0.47], "proportion": True,
             "method": "paired bootstrap, 10,000 draws"},
            {**measure, "name": "log_loss", "base": 1.4231, "tuned": 0.31239, "difference": -1.11071, "ci95": [-1.23, -0.99],
             "higher_is_better": False, "proportion": False, "method": "t on the differences"},
            {**measure, "about": "general", "name": "accuracy", "n": 600, "base": 0.71, "tuned": 0.707, "difference": -0.0033,
             "ci95": [-0.0166, 0.0098], "proportion": True},
            {**measure, "about": "calibration", "name": "ece", "base": 0.21, "tuned": 0.041, "difference": -0.169, "ci95": [-0.2, -0.13],
             "higher_is_better": False, "proportion": False},
        ],
        "flips": {"fixed": 210, "broken": 10, "kept_right": 245, "still_wrong": 35, "examples": examples},
        "baseline": {"name": "zero-shot", "text": "The base has no head for your labels, so it chose the label whose name it found likeliest."},
        "confusion": {"labels": list(INTENTS), "base": squares(500, 0.51, draw), "tuned": squares(500, 0.91, draw)},
        "cost": {"train_seconds": 754.2, "peak_memory_bytes": 2.31e9, "predicted_peak_memory_bytes": 2.45e9,
                 "trainable_parameters": 22_715_142, "total_parameters": 22_715_142, "rows_per_second": 61.28},
        "advice": "Look at the 10 broken rows before you use it.",
    })  # fmt: skip
    steps = [{"step": s, "epoch": s / 100, "loss": 1.8 * math.exp(-s / 70) + 0.2 + draw.gauss(0, 0.09) * math.exp(-s / 200),
              "learning_rate": 2e-5, "grad_norm": 1.0, "seconds": s * 2.5} for s in range(1, 301)]  # fmt: skip
    lines(folder, "metrics.jsonl", steps)
    lines(folder, "evaluations.jsonl", [
        {"step": s, "epoch": s / 100, "split": "validation", "loss": 1.7 * math.exp(-s / 80) + 0.29, "accuracy": 0.91 - 0.4 * math.exp(-s / 60),
         "macro_f1": 0.9 - 0.43 * math.exp(-s / 60)} for s in range(0, 301, 30)
    ])  # fmt: skip
    write(folder, "data.json", {
        "files": [
            {"file": "tickets.jsonl", "split": "train", "format": "jsonl", "sha256": "9f2c" * 16, "rows_read": 5040, "rows_kept": 4987,
             "dropped": {"empty text": 12, "exact duplicate": 41}},
        ],
        "labels": {"train": dict(zip(INTENTS, (1490, 1022, 811, 602, 377, 185), strict=True)),
                   "test": dict(zip(INTENTS, (166, 110, 90, 71, 43, 20), strict=True))},
        "duplicates": {"exact": 41, "near": 9}, "conflicts": 3, "overlap_dropped": 5,
        "lengths": {"min": 2, "median": 31, "p95": 118, "max": 502, "unit": "tokens"}, "truncated": {"rows": 4, "of": 4987},
        "notes": ["3 inputs carry two different labels; all were kept.", "holdout 0.1 was drawn by group of equal texts."],
    })  # fmt: skip
    write(folder, "environment.json", {
        "tunewright": "0.1.0", "python": "3.11.9", "torch": "2.9.1", "transformers": "5.1.0", "device": "cuda (H200)", "precision": "bf16",
        "precision_reason": "the device supports it (SM 9.0)", "threads": 2, "seed": 0, "platform": "Linux x86_64",
    })  # fmt: skip
    write(folder, "usage.json", {
        "load": ["from transformers import pipeline", 'classify = pipeline("text-classification", model="runs/tickets/model")',
                 'classify("Where is my parcel?")'],
        "predict": ['tunewright predict runs/tickets "Where is my parcel?"', "tunewright predict runs/tickets new.jsonl --json"],
        "library": "transformers", "pipeline": "text-classification",
        "base": {"checkpoint": "sentence-transformers/all-MiniLM-L6-v2", "revision": "c9745ed1d9f2"}, "labels": list(INTENTS),
        "task": "text-classification", "method": "full", "name": "tickets",
    })  # fmt: skip
    (folder / "recipe.yaml").write_text(
        "model:\n  checkpoint: sentence-transformers/all-MiniLM-L6-v2\ntask: text-classification\ndata:\n  train: tickets.jsonl\n"
        "  holdout: 0.1             # default\nmethod: full\ntrain:\n  learning_rate: 2.0e-05   # given\nseed: 0\n", encoding="utf-8")  # fmt: skip
    return folder


def image_run(folder: Path) -> Path:
    """A run on images with two labels that ends in "can't tell"; some files of the folder are absent."""
    from PIL import Image

    draw = random.Random(3)
    (folder / "pictures").mkdir()
    examples = []
    for index in range(9):
        path = folder / "pictures" / f"leaf_{index}.png"
        shade = (40 + 20 * index, 150 - 9 * index, 60)
        picture = Image.radial_gradient("L").resize((200, 150)).point(lambda v: 255 - v)
        Image.merge("RGB", [picture.point(lambda v, s=s: v * s // 255) for s in shade]).save(path)
        broken = index < 4
        examples.append({"row": path.name, "kind": "broken" if broken else "fixed", "input": path.name, "image": f"pictures/{path.name}",
                         "truth": "healthy" if index % 2 else "rust", "base": "healthy" if broken == bool(index % 2) else "rust",
                         "tuned": "rust" if broken == bool(index % 2) else "healthy", "score": draw.uniform(0.5, 1)})  # fmt: skip
    write(folder, "evidence.json", {
        "verdict": {"answer": "can't tell", "margin": 0.02, "smallest_detectable": 0.112, "not_measured": ["general: no general rows were given"],
                    "sentence": "Can't tell: this test could only have seen a change of about 11 points; about 4500 more rows would settle it. "
                                "It fixed 5 of 60 rows and broke 4 (+1.7 points, 95% interval -8.5 to +12.1)."},
        "measures": [{"name": "accuracy", "about": "task", "n": 60, "baseline": "majority", "base": 0.85, "tuned": 0.8667,
                      "difference": 0.0167, "ci95": [-0.085, 0.121], "p": 0.77, "higher_is_better": True, "proportion": True,
                      "method": "Tango score interval"}],
        "flips": {"fixed": 5, "broken": 4, "kept_right": 47, "still_wrong": 4, "examples": examples},
        "confusion": {"labels": ["healthy", "rust"], "base": [[28, 4], [5, 23]], "tuned": [[29, 3], [5, 23]]},
        "cost": {"train_seconds": 21.4, "peak_memory_bytes": 811_000_000, "trainable_parameters": 1538, "total_parameters": 21_800_000},
        "advice": "Add held-out rows, or accept that a change this small cannot be shown with these.",
    })  # fmt: skip
    write(
        folder,
        "solved.json",
        {"text": "The head was solved in closed form from 540 rows; there were no steps to draw."},
    )
    write(folder, "usage.json", {"name": "leaves", "task": "image-classification", "method": "head", "library": "transformers",
                                 "pipeline": "image-classification", "base": {"checkpoint": "./models/vit-tiny"},
                                 "load": ['pipeline("image-classification", model="runs/leaves/model")']})  # fmt: skip
    return folder


def squares(total: int, right: float, draw: random.Random) -> list[list[int]]:
    """A made-up confusion matrix with `right` of each row on the diagonal."""
    size = len(INTENTS)
    matrix = [[0] * size for _ in range(size)]
    for row in range(size):
        for _ in range(total // size):
            matrix[row][row if draw.random() < right else draw.choice([c for c in range(size) if c != row])] += 1
    return matrix


def write(folder: Path, name: str, value: Any) -> None:
    (folder / name).write_text(json.dumps(value), encoding="utf-8")


def lines(folder: Path, name: str, values: list[dict[str, Any]]) -> None:
    (folder / name).write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
