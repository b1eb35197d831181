"""What general skills did it lose? Our own small questions, each with one right end and three wrong ones.

Base and tuned choose the likeliest end; rows right before and wrong now are broken, the reverse fixed. A count of both
and not a mean, because recalling one fact does not make up for another: Harmon 2025, arXiv 2510.17776. Knows Sides, no
task, method or model by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tunewright.metrics import statistics
from tunewright.models.generation import writes
from tunewright.runs.evidence import neutral
from tunewright.runs.evidence.bases import base_model
from tunewright.runs.evidence.choosing import chosen_ends
from tunewright.runs.evidence.sides import NotRun, Sides

PASSES = True
ABOUT = "general skills"
CHANCE = 0.25  # four ends
SHOWN = 20  # broken items spelt out


def measure(sides: Sides) -> dict[str, Any]:
    """Broken and fixed over all items and by kind, with Tango's interval; shares also as far above chance."""
    base, sides = base_model(sides)
    if not writes(base, sides.loaded.layout.head, sides.loaded.processor):
        raise NotRun("only a language model can be asked general questions")
    items = neutral.items()
    before, after = (chosen_ends(model, sides.loaded.processor, items) for model in (base, sides.tuned))
    right = [[float(end == item["right"]) for end, item in zip(ends, items, strict=True)] for ends in (before, after)]
    kinds = dict.fromkeys(item["kind"] for item in items)
    by_kind = []
    for kind in kinds:
        places = [i for i, item in enumerate(items) if item["kind"] == kind]
        by_kind.append({"kind": kind} | _flips([[side[i] for i in places] for side in right]))
    whole = _flips(right)
    low, _ = statistics.wilson_interval(round(sum(right[0])), len(items))
    broken = [
        {"kind": item["kind"], "prompt": item["prompt"], "right": item["right"], "tuned": end}
        for item, end, b, t in zip(items, after, *right, strict=True)
        if b > t
    ]
    return whole | {
        "chance": CHANCE,
        "above_chance": {side: (whole[side] - CHANCE) / (1 - CHANCE) for side in ("base", "tuned")},
        "base_knows": low > CHANCE,
        "by_kind": by_kind,
        "broken_items": broken[:SHOWN],
        "sentence": _sentence(whole, low > CHANCE),
    }


def _flips(right: Sequence[Sequence[float]]) -> dict[str, Any]:
    paired = statistics.compare(*right)
    pairs = list(zip(*right, strict=True))
    return {
        "n": paired.n, "base": paired.base, "tuned": paired.tuned, "difference": paired.difference,
        "ci95": list(paired.ci95), "p": paired.p, "method": paired.method,
        "broken": pairs.count((1.0, 0.0)), "fixed": pairs.count((0.0, 1.0)),
        "kept_right": pairs.count((1.0, 1.0)), "still_wrong": pairs.count((0.0, 0.0)),
    }  # fmt: skip


def _sentence(whole: dict[str, Any], knows: bool) -> str:
    if not knows:
        return f"The base itself answers these {whole['n']} questions no better than by chance: nothing could be lost."
    low, high = (100 * end for end in whole["ci95"])
    return (
        f"Of {whole['n']} general questions it broke {whole['broken']} and fixed {whole['fixed']} "
        f"({100 * whole['difference']:+.1f} points, 95% interval {low:+.1f} to {high:+.1f})."
    )
