"""Does it hold when input is messy? Scores over strengths of mess, and what each kind costs.

Knows the gauge's file as record.py reads it, and the words for its numbers; measures nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from tunewright.runs.report import charts, gauge_charts, words
from tunewright.runs.report.gauge_charts import (
    DASHED_AND_SOLID,
    Part,
    Slope,
    absent,
    ends,
    p_value,
    place,
    said,
    unit_of,
)
from tunewright.runs.report.record import Measure, Record, mapping, sequence

ALPHA = 0.05
FEW_ROWS = 15  # kinds of mess that fewer rows have a place for are named and not judged


def messy(record: Record) -> Part:
    """Scores over strengths of mess, and what each kind costs."""
    found, reason = record.gauge("robustness")
    if reason:
        return {"answer": f"not measured: {reason}", "sections": []}
    lines = [mapping(line) for line in sequence(found.get("severities"))]
    kinds = [mapping(line) for line in sequence(found.get("kinds"))]
    if len(lines) < 2:
        return {"answer": "not measured: the gauge holds no strengths", "sections": []}
    twin = Measure.read({"name": found.get("metric"), **unit_of(found)}, record.margin)
    scope = (
        f"{words.count(found.get('n'))} of {words.plural(found.get('of'), 'held-out row')}, drawn by row id, each made "
        "messy in the same way for both models."
    )
    name = str(mapping(record.evidence.get("baseline")).get("name") or "base")
    scope += "" if name == "base" else f" “Base” is the baseline that is called {name} above."
    sections = [
        ("Messier and messier", [_slope_figure(record, found, lines, twin), said(scope)]),
        (
            f"Which mess costs most (strength {words.count(found.get('middle'))} of 5)",
            _kind_figures(record, found, kinds),
        ),
    ]
    return {"answer": _messy_sentence(found, lines, twin, record), "sections": sections}


def _messy_sentence(found: dict[str, Any], lines: Sequence[dict[str, Any]], twin: Measure, record: Record) -> str:
    clean, last = lines[0], lines[-1]
    gain = _gain(last, twin, record)
    ahead = {"better": "it stays ahead of the base", "worse": "it falls behind the base"}.get(
        gain.direction, f"against the base: {gain.finding}"
    )
    lost = (
        f"Most is lost to {found['worst']}." if found.get("worst") else "No single kind is shown to cost it anything."
    )
    before, after = ({side: twin.shown(place(line.get(side))) for side in ("base", "tuned")} for line in (clean, last))
    return words.sentence(
        f"In the strongest mess the tuned model goes from {before['tuned']} to {after['tuned']}, the base from "
        f"{before['base']} to {after['base']}; {ahead} ({gain.shown_difference}, 95% interval {gain.interval}). {lost}"
    )


def _gain(line: dict[str, Any], twin: Measure, record: Record) -> Measure:
    row = {"name": twin.key, "proportion": twin.in_points, "higher_is_better": twin.higher_is_better}
    return Measure.read({**row, "n": line.get("n"), **mapping(line.get("gain"))}, record.margin)


def _point(line: dict[str, Any], side: str) -> tuple[float, float, float]:
    return place(line.get(side)), *ends(line.get(f"{side}_ci95"))


def _slope_figure(record: Record, found: dict[str, Any], lines: Sequence[dict[str, Any]], twin: Measure) -> Markup:
    slopes = [
        Slope(side, kind, tuple((float(i), *_point(line, side)) for i, line in enumerate(lines)))
        for side, kind in (("base", "validation"), ("tuned", "training"))
    ]
    highest = max(high for slope in slopes for *_, high in slope.points)
    scale = charts.Scale(0.0, 1.0 if twin.in_points else 1.05 * highest)
    say = words.axis_share if twin.in_points else words.number
    places = ["clean", *(words.count(line.get("severity")) for line in lines[1:])]
    rows = []
    for name, line in zip(places, lines, strict=True):
        gain, cost = _gain(line, twin, record), mapping(mapping(line.get("cost")).get("tuned"))
        lost = Measure.read({"name": twin.key, "proportion": twin.in_points, **cost}, record.margin)
        rows.append((name, words.count(line.get("n")), twin.shown(place(line.get("base"))),
                     twin.shown(place(line.get("tuned"))), gain.shown_difference, gain.interval, gain.finding,
                     lost.shown_difference, lost.interval))  # fmt: skip
    heads = ("strength", "rows", "base", "tuned", "tuned − base", "95% interval", "finding", "tuned, against clean",
             "95% interval")  # fmt: skip
    beyond = mapping(lines[-1].get("beyond_base"))
    moved = Measure.read({"name": twin.key, "proportion": twin.in_points, **unit_of(found), **beyond}, record.margin)
    said_so = {
        "better": "Mess at strength 5 costs the tuned model less than it costs the base",
        "worse": "Mess at strength 5 costs the tuned model more than it costs the base",
    }.get(moved.direction, "What mess at strength 5 costs is not shown to differ between tuned model and base")
    message = f"{said_so} ({moved.shown_difference}, 95% interval {moved.interval})."
    title = f"{words.capital(twin.name)} of base and tuned model over messier input"
    picture = gauge_charts.slopes(slopes, title, scale, places, say)
    return charts.figure(words.sentence(message), picture, charts.table(heads, rows, (1, 2, 3, 4, 5, 7, 8)),
                         gauge_charts.key(*DASHED_AND_SOLID))  # fmt: skip


def _kind_figures(record: Record, found: dict[str, Any], kinds: Sequence[dict[str, Any]]) -> list[Markup]:
    """Forest plot of what each kind costs the tuned model against the same rows clean; few rows stand below it."""
    large = [line for line in kinds if place(line.get("n")) >= FEW_ROWS]
    few = [f"{line.get('kind')} ({words.count(line.get('n'))})" for line in kinds if line not in large]
    left = [said(f"Fewer than {FEW_ROWS} rows have a place for: {', '.join(few)}.")] if few else []
    if not large:
        return left or [absent("the gauge holds no kinds")]
    lines = [(line, _cost(line, "tuned", found, record), _cost(line, "base", found, record)) for line in large]
    rows = [
        (line.get("kind"), words.count(line.get("n")), tuned.shown_difference, tuned.interval,
         p_value(mapping(mapping(line.get("cost")).get("tuned")).get("p_holm")), _judged(line, tuned).finding,
         base.shown_difference, base.interval)
        for line, tuned, base in lines
    ]  # fmt: skip
    heads = ("kind", "rows", "tuned, messy − clean", "95% interval", "p (Holm)", "finding", "base, messy − clean",
             "95% interval")  # fmt: skip
    worst = found.get("worst")
    named = f"Most is lost to {worst}" if worst else "No kind of mess is shown to cost the tuned model anything"
    message = f"{named}; {words.plural(len(large), 'kind')} asked about, and corrected for that."
    picture = charts.forest([_judged(line, tuned) for line, tuned, _ in lines])
    key = gauge_charts.key(
        ("dot", "messy minus clean on the same rows"),
        ("line", "95% interval, drawn to 0 where the corrected test shows nothing"),
        ("grey band", "the change you said does not matter"),
    )
    return [charts.figure(words.sentence(message), picture, charts.table(heads, rows, (1, 2, 3, 4, 6, 7)), key), *left]


def _cost(line: dict[str, Any], side: str, found: dict[str, Any], record: Record) -> Measure:
    """What this kind cost one side. The metric's unit is known by `proportion`, so the kind may stand as its name."""
    name = f"{line.get('kind')} ({words.plural(line.get('n'), 'row')})"
    cost = mapping(mapping(line.get("cost")).get(side))
    row = {"proportion": False, "name": name, "about": "robustness", "n": line.get("n")}
    return Measure.read({**row, **unit_of(found), **cost}, record.margin)


def _judged(line: dict[str, Any], measure: Measure) -> Measure:
    """The measure as its corrected test allows to speak of it."""
    p = mapping(mapping(line.get("cost")).get("tuned")).get("p_holm")
    if measure.low is None or measure.high is None or (words.is_number(p) and p <= ALPHA):
        return measure
    return dataclasses.replace(measure, low=min(measure.low, 0.0), high=max(measure.high, 0.0))
