"""Better on rows it trained on? The scores of both models on training, validation and held-out rows, and the gap.

Knows the gauge's file as record.py reads it, and the words for its numbers; measures nothing.
"""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from tunewright.runs.report import charts, gauge_charts, words
from tunewright.runs.report.charts import Scale
from tunewright.runs.report.gauge_charts import BASE_AND_TUNED, Span, absent, ends, place
from tunewright.runs.report.record import Measure, Record, mapping, sequence

TITLE = "Is it better on the rows it trained on?"
SETS = {"train": "training rows", "validation": "validation rows", "test": "held-out rows"}
GAPS = (("tuned", "tuned model's gap"), ("base", "base's gap on the same rows"), ("added", "gap that training made"))


def sections(record: Record) -> list[tuple[str, list[Markup]]]:
    """One section of "How did it learn?", or why there is none."""
    found, reason = record.gauge("overfitting")
    if reason:
        return [(TITLE, [absent(reason)])]
    message = words.sentence(found.get("sentence") or "The gap was measured.")
    key = gauge_charts.key(*BASE_AND_TUNED, ("rows", f"drawn {found.get('drawn') or 'by row id'}"))
    picture = charts.figure(message, _picture(found, record), _numbers(found, record), key)
    return [(TITLE, [picture])]


def _read(found: dict[str, Any], record: Record, row: dict[str, Any]) -> Measure:
    unit = {"name": found.get("metric"), "higher_is_better": True} | gauge_charts.unit_of(found)
    return Measure.read(unit | row, record.margin)


def _picture(found: dict[str, Any], record: Record) -> Markup:
    spans, values = [], []
    for one in map(mapping, sequence(found.get("sets"))):
        m = _read(found, record, one)
        base, tuned = ((place(one.get(s)), *ends(one.get(f"{s}_ci95"))) for s in ("base", "tuned"))
        name = f"{SETS.get(str(one.get('set')), str(one.get('set')))} ({words.count(one.get('n'))})"
        spans.append(Span(name, base, tuned, f"{m.shown(m.base)} → {m.shown(m.tuned)}"))
        values += [*base, *tuned]
    share = bool(found.get("proportion"))
    low, high = min(values, default=0.0), max(values, default=1.0)
    room = 0.08 * ((high - low) or 1.0)
    low, high = (max(0.0, low - room), min(1.0, high + room)) if share else (low - room, high + room)
    scale = Scale(low, high, mirrored=found.get("higher_is_better") is False)
    title = f"{words.name(found.get('metric'))} on training and held-out rows, base and tuned"
    return gauge_charts.spans(spans, scale, title, words.axis_share if share else words.number)


def _numbers(found: dict[str, Any], record: Record) -> Markup:
    rows = []
    for one in map(mapping, sequence(found.get("sets"))):
        m = _read(found, record, one)
        shown = [
            f"{m.shown(one.get(s))} ({' to '.join(m.shown(v) for v in ends(one.get(f'{s}_ci95')))})"
            for s in ("base", "tuned")
        ]
        name = SETS.get(str(one.get("set")), str(one.get("set")))
        rows.append((name, f"{words.count(one.get('n'))} of {words.count(one.get('of'))}", *shown))
    gaps = []
    for name, found_gaps in mapping(found.get("gaps")).items():
        for key, said in GAPS:
            gap = mapping(mapping(found_gaps).get(key))
            m = _read(found, record, {**gap, "higher_is_better": True})  # above 0 is better in the file already
            gaps.append((f"{SETS.get(name, name)} minus held-out", said, m.shown_difference, m.interval))
    sets = charts.table(("rows", "scored", "base, 95% interval", "tuned, 95% interval"), rows, (1, 2, 3))
    return sets + charts.table(("gap", "of", "better by", "95% interval"), gaps, (2, 3))
