"""Base and tuned on the same rows: each metric with its difference, interval and p; which rows flipped; confusion.

Knows predictions, records and metrics; not models, not tasks by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tunewright.contracts import Metric, Prediction, Record, Task
from tunewright.data import inspection
from tunewright.metrics import statistics

SHOWN_FLIPS = 600  # rows kept in evidence.json; all of them stand in predictions.jsonl
SHOWN_OTHERS = 40  # of each kind of row whose score did not change
SHOWN_SAMPLES = 20  # rows shown where no row is right or wrong
LONGEST_INPUT = 2000  # characters of an input kept beside a flip


def measure(
    metric: Metric,
    base: Sequence[Any],
    tuned: Sequence[Any],
    groups: Sequence[object] | None,
    baseline: str | None,
    about: str = "task",
    seed: int = 0,
) -> dict[str, Any]:
    """One entry of evidence.json's `measures`; the field `p` and the interval are of the paired difference."""
    if metric.pool:
        paired = statistics.paired_pool(base, tuned, metric.pool, seed=seed, groups=groups)
    else:
        paired = statistics.compare(base, tuned, groups=groups, seed=seed)
    return {
        "name": metric.name,
        "about": about,
        "n": paired.n,
        **({"baseline": baseline} if baseline else {}),
        "base": paired.base,
        "tuned": paired.tuned,
        "difference": paired.difference,
        "ci95": list(paired.ci95),
        "p": paired.p,
        "higher_is_better": metric.higher_is_better,
        "proportion": metric.proportion,
        "method": paired.method,
    }


def correct(measures: Sequence[dict[str, Any]], first: str) -> None:
    """Write `p_holm` into all but the task's first metric, which was declared before anything was seen.

    Three families, each asked together: the task's other metrics, the first metric on the sets of other skills (these
    can make the verdict a trade), and all other metrics there.
    """
    families: dict[tuple[str, bool], list[dict[str, Any]]] = {}
    for found in measures:
        family = str(found["about"]), found["name"] == first
        if family != ("task", True):
            families.setdefault(family, []).append(found)
    for asked in families.values():
        for found, p in zip(asked, statistics.holm([m["p"] for m in asked]), strict=True):
            found["p_holm"] = p


def flips(
    task: Task,
    records: Sequence[Record],
    base: Sequence[tuple[Prediction, dict[str, Any]]],
    tuned: Sequence[tuple[Prediction, dict[str, Any]]],
) -> dict[str, Any] | None:
    """Rows that one side has right and the other wrong, the confidently broken first; None without right and wrong.

    `others`: the surest rows of the same score, answered otherwise (`changed`) or wrongly as before (`same_wrong`).
    """
    name = task.metrics[0].name
    if not all(scores[name] in (0.0, 1.0) for _, scores in (*base, *tuned)):
        return None
    counts = {"fixed": 0, "broken": 0, "kept_right": 0, "still_wrong": 0, "changed": 0, "same_wrong": 0}
    kinds = {(0.0, 1.0): "fixed", (1.0, 0.0): "broken", (1.0, 1.0): "kept_right", (0.0, 0.0): "still_wrong"}
    examples = []
    others: dict[str, list[dict[str, Any]]] = {"changed": [], "still_wrong": []}
    for record, (before, b), (after, t) in zip(records, base, tuned, strict=True):
        kind = kinds[b[name], t[name]]
        counts[kind] += 1
        shown = {
            "row": record["row"],
            "kind": kind,
            **shown_input(task, record),
            **_answers(task, record, before, after),
        }
        if kind in ("fixed", "broken"):
            examples.append(shown)
        elif shown["base"] != shown["tuned"]:
            counts["changed"] += 1
            others["changed"].append(shown | {"kind": "changed"})
        elif kind == "still_wrong":
            counts["same_wrong"] += 1
            others["still_wrong"].append(shown)
    examples.sort(key=lambda e: (e["kind"] != "broken", *_surest(e)))
    few = [row for rows in others.values() for row in sorted(rows, key=_surest)[:SHOWN_OTHERS]]
    return counts | {"examples": examples[:SHOWN_FLIPS], "others": few}


def _surest(example: dict[str, Any]) -> tuple[float, str]:
    return -example["score"], example["row"]


def samples(
    task: Task, records: Sequence[Record], base: Sequence[Prediction], tuned: Sequence[Prediction]
) -> list[dict[str, Any]]:
    """The first rows with both answers, in the order of the data: nobody chose them. [] where answers are no texts."""
    pairs = [(r, b, t) for r, b, t in zip(records, base, tuned, strict=True) if "text" in b and "text" in t]
    return [
        {"row": r["row"], **shown_input(task, r), "truth": task.truth(r), "base": b["text"], "tuned": t["text"]}
        for r, b, t in pairs[:SHOWN_SAMPLES]
    ]


def shown_input(task: Task, record: Record) -> dict[str, Any]:
    """What stood in the row, by the kind of its fields: a picture as its path, the rest as text."""
    pictures = [name for name, field in task.fields.items() if field.kind == "image"]
    readable = [(name, inspection.AS_TEXT[f.kind]) for name, f in task.fields.items() if f.kind in inspection.AS_TEXT]
    texts = [as_text(record[name]) for name, as_text in readable]
    shown = {"input": (" | ".join(texts) or record["row"])[:LONGEST_INPUT]}
    return shown | ({"image": str(record[pictures[0]])} if pictures else {})


def _answers(task: Task, record: Record, before: Prediction, after: Prediction) -> dict[str, Any]:
    shown = [p.get("label", p.get("text")) for p in (before, after)]
    return {"truth": task.truth(record), "base": shown[0], "tuned": shown[1], "score": after.get("score", 0.0)}


def confusion(
    labels: Sequence[str], records: Sequence[Record], base: Sequence[Prediction], tuned: Sequence[Prediction]
) -> dict[str, Any] | None:
    """Counts by truth (row) and answer (column), for base and tuned; None where predictions are no labels."""
    if not labels or not all("label" in p for p in (*base, *tuned)):
        return None
    place = {name: i for i, name in enumerate(labels)}

    def table(predictions: Sequence[Prediction]) -> list[list[int]]:
        counts = [[0] * len(labels) for _ in labels]
        for record, prediction in zip(records, predictions, strict=True):
            counts[place[record["label"]]][place[prediction["label"]]] += 1
        return counts

    return {"labels": list(labels), "base": table(base), "tuned": table(tuned)}
