"""Would more data help? The score after an eighth, a quarter and half of the rows, and the curve through them.

Knows learning_curve.json as record.py reads it, and the words for its numbers; measures nothing.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from tunewright.runs.report import charts, gauge_charts, words
from tunewright.runs.report.charts import Scale, drawing, tag, text, vertical
from tunewright.runs.report.gauge_charts import absent, ends, place
from tunewright.runs.report.record import Measure, Record, mapping, sequence

TITLE = "Would more data help?"
TOP, BOTTOM = 12.0, 232.0


def sections(record: Record) -> list[tuple[str, list[Markup]]]:
    """One section of "How did it learn?", or how it would be measured."""
    found = record.part("learning_curve.json")
    points = [mapping(point) for point in sequence(found.get("points"))]
    if len(points) < 2:
        return [(TITLE, [absent("`tunewright evaluate RUN --learning-curve` trains on an eighth to half of the rows")])]
    unit = {"name": found.get("metric")} | gauge_charts.unit_of(found)
    m = Measure.read(unit, record.margin)
    key = gauge_charts.key(
        ("filled mark", "tuned, trained on so many rows"), ("upright line", "95% interval over held-out rows"),
        ("dashed line across", "base"), ("thin line", _fitted(found)),
    )  # fmt: skip
    message = words.sentence(found.get("sentence") or "The curve was measured.")
    return [(TITLE, [charts.figure(message, _picture(found, points, m), _numbers(found, points, m), key)])]


def _fitted(found: dict[str, Any]) -> str:
    fit = mapping(found.get("fit"))
    if fit.get("kind") == "power law":
        a, b, c = (words.number(fit.get(name)) for name in ("a", "b", "c"))
        return f"error = {a} + {b} (n / {words.count(fit.get('unit'))})^−{c}, to twice the rows"
    return f"a straight line over log rows ({fit.get('why_not_power_law') or 'few points'}), to twice the rows"


def _score(found: dict[str, Any], error: Any) -> float:
    """The score that an error of the fit stands for."""
    if found.get("higher_is_better") is False:
        return place(error)
    return 1 - place(error) if found.get("proportion") else -place(error)


def _picture(found: dict[str, Any], points: Sequence[dict[str, Any]], m: Measure) -> Markup:
    base = place(mapping(found.get("base")).get("score"))
    fitted = [
        (place(p.get("rows")), _score(found, p.get("error")))
        for p in map(mapping, sequence(mapping(found.get("fit")).get("expected"))) if place(p.get("rows")) > 0
    ]  # fmt: skip
    drawn = [(place(p.get("rows")), place(p.get("score")), *ends(p.get("ci95"))) for p in points]
    values = [base, *(v for p in drawn for v in p[1:]), *(y for _, y in fitted)]
    room = 0.06 * ((max(values) - min(values)) or 1.0)
    low, high = min(values) - room, max(values) + room
    up = Scale(max(0.0, low), min(1.0, high)) if m.in_points else Scale(low, high)
    sizes = [x for x, *_ in (*drawn, *fitted)]
    along = Scale(math.log2(max(1.0, min(sizes))) - 0.2, math.log2(max(sizes)) + 0.2, left=11.0)

    def at(rows: float) -> str:
        return along.at(math.log2(max(1.0, rows)))

    def height(value: float) -> float:
        share = (value - up.low) / ((up.high - up.low) or 1.0)
        return round(BOTTOM - (BOTTOM - TOP) * min(1.0, max(0.0, share)), 1)

    parts: list[Markup] = []
    for value in up.ticks(5):
        said = words.axis_share(value) if m.in_points else words.number(value)
        parts.append(tag("line", x1="10%", x2="100%", y1=height(value), y2=height(value), class_="grid"))
        parts.append(text("0%", height(value) + 4, said, "tick"))
    for rows in sorted(set(sizes)):
        parts.append(text(at(rows), BOTTOM + 18, words.count(rows), "tick", "middle"))
    parts.append(tag("line", x1="10%", x2="100%", y1=height(base), y2=height(base), class_="line validation"))
    for (x1, y1), (x2, y2) in itertools.pairwise(fitted):
        parts.append(tag("line", x1=at(x1), x2=at(x2), y1=height(y1), y2=height(y2), class_="line training raw"))
    for rows, value, left, right in drawn:
        parts.append(vertical(at(rows), height(right), height(left), "whisker training"))
        parts.append(tag("circle", cx=at(rows), cy=height(value), r=5, class_="dot training"))
    parts.append(text("55%", BOTTOM + 36, "training rows, each step twice as many", "tick", "middle"))
    return drawing(f"{m.name} over training rows, with the base", int(BOTTOM) + 44, *parts)


def _numbers(found: dict[str, Any], points: Sequence[dict[str, Any]], m: Measure) -> Markup:
    seconds = mapping(found.get("train_seconds"))
    rows = [
        (words.count(p.get("rows")), m.shown(p.get("score")), " to ".join(m.shown(v) for v in ends(p.get("ci95"))),
         words.duration(seconds.get(str(p.get("rows")))))
        for p in points
    ]  # fmt: skip
    steps = []
    for step in map(mapping, sequence(found.get("steps"))):
        s = Measure.read({**gauge_charts.unit_of(found), **step, "name": "step"}, m.margin)
        change = (s.shown_difference, s.interval, gauge_charts.p_value(s.p))
        steps.append((f"{words.count(step.get('from'))} to {words.count(step.get('to'))}", *change))
    first = charts.table(("training rows", "score", "95% interval", "training time"), rows, range(4))
    return first + charts.table(("rows", "change", "95% interval", "p"), steps, (1, 2, 3))
