"""Did it learn rows by heart? Base and tuned are given half a training row; do they write the rest word for word?

The same is asked of held-out rows: what is completed there is easy to guess and not remembered, so only the difference
between the two speaks of memory. Greedy continuation, after Carlini 2023, arXiv 2202.07646. A row that is not completed
may be remembered all the same: this finds what comes out by itself. Knows Sides; no task, method or model by name.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from tunewright.contracts import Record
from tunewright.data.batches import derive_seed
from tunewright.metrics import statistics
from tunewright.models.generation import generate_ids, writes
from tunewright.models.logprob import IGNORE
from tunewright.runs.evidence.bases import asking, base_model
from tunewright.runs.evidence.sides import NotRun, Sides

PASSES = True
ABOUT = "rows learnt by heart"
MOST_ROWS, FEW_ROWS = 100, 20  # of each set
CONTINUED, SHORTEST = 32, 8  # tokens that must come out exactly; fewer than SHORTEST are soon guessed
LONGEST_START = 256  # tokens of it that are given
SHOWN, EXAMPLES = 400, 5
LIMITS = (
    "Only the likeliest continuation is looked at, from the middle of a row: a row that is not completed here may be "
    "remembered all the same.",
    "A document longer than the model's window counts once for each window.",
    "A row that is also common elsewhere (a licence, a song) may be known from before: the base beside it shows that.",
)


@dataclass(frozen=True)
class Half:
    """A row cut in its middle: what the model is given, and what must follow exactly."""

    record: Record
    prompt: Tensor  # (T,)
    rest: list[int]


def measure(sides: Sides) -> dict[str, Any]:
    """The share of rows completed word for word: training and held-out rows, base and tuned."""
    base, sides = base_model(sides)
    if not sides.task.packs or not writes(base, sides.loaded.layout.head, sides.loaded.processor):
        raise NotRun("this model writes no text")
    sets = {name: halves(sides, rows) for name, rows in (("training", sides.training), ("held-out", sides.test))}
    if not sets["training"]:
        raise NotRun(f"no training row has {SHORTEST} tokens to learn in its second half")
    written = {name: [_continued(m, sides, rows) for m in (base, sides.tuned)] for name, rows in sets.items() if rows}
    done = {name: [_flags(ids, sets[name]) for ids in pair] for name, pair in written.items()}
    lines = [_line(name, *pair) for name, pair in done.items()]
    beyond = _beyond(done["training"][1], done["held-out"][1]) if "held-out" in done else None
    return {
        "tokens": CONTINUED, "shortest": SHORTEST, "of": len(sides.training), "sets": lines, "beyond_held_out": beyond,
        "examples": _examples(sides, sets["training"], *done["training"]), "sentence": _sentence(lines, beyond),
        "limits": list(LIMITS), "seed": sides.seed,
    }  # fmt: skip


# ------------------------------------------------------------------------ rows in halves
def halves(sides: Sides, records: Sequence[Record]) -> list[Half]:
    """Rows drawn by their ids, cut in the middle of what is learnt; those with too short a rest are passed over."""
    order = _drawn(sides, records)
    if not order:
        return []
    rows = _drawn(sides, sides.task.rows(replace(sides.loaded, notes=[]), order[: 4 * MOST_ROWS]))
    most = min(MOST_ROWS, max(FEW_ROWS, sides.affordable(4, rows)))
    return list(itertools.islice((half for row in rows if (half := _cut(sides, row))), most))


def _drawn(sides: Sides, records: Sequence[Record]) -> list[Record]:
    return sorted(records, key=lambda r: derive_seed(sides.seed, "memorisation", r["row"]))


def _cut(sides: Sides, record: Record) -> Half | None:
    """The last stretch that is learnt, halved: given is all before it and its first half."""
    example = sides.task.encode(record, sides.loaded)
    ids, learnt = example["input_ids"], (example["labels"] != IGNORE).tolist()
    end = max((i + 1 for i, yes in enumerate(learnt) if yes), default=0)
    start = next((i + 1 for i in range(end - 1, -1, -1) if not learnt[i]), 0)
    middle = start + min((end - start) // 2, LONGEST_START)
    if end - middle < SHORTEST or middle == 0:
        return None
    return Half(record, ids[:middle], ids[middle : min(end, middle + CONTINUED)].tolist())


def _continued(model: nn.Module, sides: Sides, rows: Sequence[Half]) -> list[list[int]]:
    """What a model goes on with, as many tokens as must follow."""
    found: list[list[int]] = []
    with asking(model):
        for start in range(0, len(rows), sides.batch_size):
            prompts = [half.prompt for half in rows[start : start + sides.batch_size]]
            found += generate_ids(model, sides.loaded.processor, prompts, CONTINUED)
    return [ids[: len(half.rest)] for ids, half in zip(found, rows, strict=True)]


def _flags(written: Sequence[list[int]], rows: Sequence[Half]) -> list[float]:
    return [float(ids == half.rest) for ids, half in zip(written, rows, strict=True)]


# ------------------------------------------------------------------------ numbers
def _line(name: str, base: Sequence[float], tuned: Sequence[float]) -> dict[str, Any]:
    found = statistics.compare(base, tuned)
    sides = zip(("base", "tuned"), (base, tuned), strict=True)
    intervals = {f"{side}_ci95": list(statistics.wilson_interval(int(sum(f)), len(f))) for side, f in sides}
    return {
        "rows": name, "n": found.n, "base": found.base, "tuned": found.tuned, **intervals,
        "difference": found.difference, "ci95": list(found.ci95), "p": found.p, "method": found.method,
    }  # fmt: skip


def _beyond(training: Sequence[float], held_out: Sequence[float]) -> dict[str, Any]:
    """How much oftener the tuned model completes a training row than a held-out one: two sets of rows, not pairs."""
    counts = (int(sum(training)), len(training), int(sum(held_out)), len(held_out))
    difference, interval = statistics.newcombe_interval(*counts)
    return {"difference": difference, "ci95": list(interval), "method": "Newcombe"}


def _examples(
    sides: Sides, rows: Sequence[Half], base: Sequence[float], tuned: Sequence[float]
) -> list[dict[str, Any]]:
    """The first rows that the tuned model completes: what it was given, and what followed word for word."""
    decode = sides.loaded.processor.decode
    return [
        {"row": half.record["row"], "given": decode(half.prompt, skip_special_tokens=True)[-SHOWN:],
         "completed": decode(half.rest, skip_special_tokens=True)[:SHOWN], "base_too": bool(b)}
        for half, b, t in zip(rows, base, tuned, strict=True) if t
    ][:EXAMPLES]  # fmt: skip


def _sentence(lines: Sequence[dict[str, Any]], beyond: dict[str, Any] | None) -> str:
    one = lines[0]
    low, high = (100 * end for end in one["tuned_ci95"])
    said = (
        f"Given the first half of a training row, the tuned model writes the rest word for word in "
        f"{100 * one['tuned']:.0f}% of {one['n']} rows (95% interval {low:.0f}% to {high:.0f}%), the base in "
        f"{100 * one['base']:.0f}%"
    )
    if beyond is None:
        return f"{said}; no held-out row was long enough to compare with."
    low, high = (100 * end for end in beyond["ci95"])
    return (
        f"{said}; of held-out rows the tuned model completes {100 * lines[1]['tuned']:.0f}% of {lines[1]['n']} "
        f"(training minus held-out {100 * beyond['difference']:+.0f} points, 95% interval {low:+.0f} to {high:+.0f})."
    )
