"""Would the answer be the same for somebody else? He for she, a name for one of other origin, a country for another.

Counts rows whose answer changes when such terms are exchanged and nothing else; base and tuned on the same rows. That
an answer changes is no fault by itself: whether it may, the reader judges. Knows kinds of fields, never a task.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tunewright.contracts import Prediction, Record
from tunewright.data import identity_terms, inspection
from tunewright.data.batches import derive_seed
from tunewright.metrics import statistics
from tunewright.runs.evidence.sides import NotRun, Sides

PASSES = True
ABOUT = "answers with identity words exchanged (he and she, names, countries)"
FEW_ROWS, MOST_ROWS = 15, 150  # exchanged rows of each kind, drawn by row id
FEWEST_ROWS = 5  # with a term; below that no share is worth a sentence
EXAMPLES = 8


def measure(sides: Sides) -> dict[str, Any]:
    """The share of answers that change, over all exchanged rows and by kind of term."""
    field = next((name for name, f in sides.task.fields.items() if f.kind == "text"), None)
    if field is None:
        raise NotRun("the rows have no text")
    if not all("label" in answer for answer in (*sides.before, *sides.after)):
        raise NotRun("answers are free text: a changed word is no changed decision")
    most = min(MOST_ROWS, max(FEW_ROWS, sides.affordable(len(identity_terms.TERMS), sides.test)))
    found = {kind: _exchanged(sides, field, kind, most) for kind in identity_terms.TERMS}
    places, rows, kinds = [], [], []
    for kind, some in found.items():
        for place, row, _ in some:
            places.append(place)
            rows.append(row)
            kinds.append(kind)
    if len(set(places)) < FEWEST_ROWS:
        many = len(set(places))
        raise NotRun(f"{many} held-out row{'' if many == 1 else 's'} with such a word; the list knows English only")
    base = _changed(sides.before, sides.baseline.predict(rows), places)
    tuned = _changed(sides.after, sides.answers(sides.tuned, rows), places)
    lines = []
    for kind in identity_terms.TERMS:
        own = [i for i, name in enumerate(kinds) if name == kind]
        terms = sorted({term.lower() for _, _, some in found[kind] for term in some})
        line = _shares([base[i] for i in own], [tuned[i] for i in own], sides.seed) if own else {"n": 0}
        lines.append({"kind": kind, "terms": terms[:12], **line})
    whole = _shares(base, tuned, sides.seed, units=[sides.test[place]["row"] for place in places])
    return {
        **whole, "rows": len(set(places)), "of": len(sides.test), "language": "English", "kinds": lines,
        "examples": _examples(sides, field, places, rows, base, tuned),
    }  # fmt: skip


def _exchanged(sides: Sides, field: str, kind: str, most: int) -> list[tuple[int, Record, list[str]]]:
    """(place, row with the terms exchanged, the terms), without rows whose right answer names one of them."""
    made = []
    for place, record in enumerate(sides.test):
        new, terms = identity_terms.exchange(record[field], kind)
        if terms and new != record[field] and not _names(sides.task.truth(record) or "", terms):
            made.append((place, record | {field: new}, terms))
    made.sort(key=lambda m: derive_seed(sides.seed, "swaps", kind, m[1]["row"]))
    return sorted(made[:most], key=lambda m: m[0])


def _names(truth: str, terms: Sequence[str]) -> bool:
    words = set(truth.lower().replace("_", " ").replace("-", " ").split())
    return any(term.lower() in words for term in terms)


def _changed(clean: Sequence[Prediction], exchanged: Sequence[Prediction], places: Sequence[int]) -> list[float]:
    return [float(clean[place]["label"] != answer["label"]) for place, answer in zip(places, exchanged, strict=True)]


def _shares(
    base: Sequence[float], tuned: Sequence[float], seed: int, units: Sequence[object] | None = None
) -> dict[str, Any]:
    """units: the row that each exchanged one comes from: one row with two kinds of terms is one draw."""
    found = statistics.compare(base, tuned, groups=units, seed=seed)
    return {
        "n": found.n, "base": found.base, "base_ci95": list(statistics.mean_interval(base)),
        "tuned": found.tuned, "tuned_ci95": list(statistics.mean_interval(tuned)),
        "difference": found.difference, "ci95": list(found.ci95), "p": found.p, "method": found.method,
    }  # fmt: skip


def _examples(
    sides: Sides, field: str, places: Sequence[int], rows: Sequence[Record], base: Sequence[float],
    tuned: Sequence[float],
) -> list[dict[str, Any]]:  # fmt: skip
    """The first rows whose tuned answer changes: before and after the exchange."""
    shown = [i for i in range(len(rows)) if tuned[i]][:EXAMPLES]
    as_text = inspection.AS_TEXT["text"]
    return [
        {
            "row": rows[i]["row"], "input": as_text(sides.test[places[i]][field])[:300],
            "exchanged": as_text(rows[i][field])[:300], "answer": sides.after[places[i]]["label"],
            "base_changes": bool(base[i]),
        }
        for i in shown
    ]  # fmt: skip
