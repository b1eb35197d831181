"""Can I trust its confidence? Calibration of both models, each error beside the floor of chance, and a temperature.

Knows the gauge's file as record.py reads it, and the words for its numbers; measures nothing.
"""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from tunewright.runs.report import charts, gauge_charts, words
from tunewright.runs.report.gauge_charts import DASHED_AND_SOLID, Part, Slope, absent, ends, place, said
from tunewright.runs.report.record import Measure, Record, mapping, sequence

SAFE = 0.05  # share wrong that the upper end of the interval may reach where a model answers by itself


def confidence(record: Record) -> Part:
    """Calibration of both models, each error beside the floor of chance, and what a temperature does."""
    found, reason = record.gauge("calibration")
    if reason:
        return {"answer": f"not measured: {reason}", "sections": []}
    base, tuned = mapping(found.get("base")), mapping(found.get("tuned"))
    sections = [
        ("Said and done", [_curve_figure(found, base, tuned)]),
        ("How far off, beside what chance alone shows", _floor_figures(found, base, tuned)),
        ("How much may it answer by itself?", [_alone_figure(base, tuned)]),
    ]
    return {"answer": _confidence_sentence(found, tuned, record), "sections": sections}


def _points(value: Any) -> str:
    return words.points(place(value)).lstrip("+")


def _confidence_sentence(found: dict[str, Any], tuned: dict[str, Any], record: Record) -> str:
    chance = (
        f"where chance alone shows up to {_points(tuned.get('floor_p95'))} on {words.plural(found.get('n'), 'row')}"
    )
    opening = f"The tuned model's confidence is off by {_points(tuned.get('ece'))} (ECE), {chance}"
    if tuned.get("calibrated"):
        return words.sentence(f"{opening}: no more than that, so nothing is shown to be wrong with it.")
    sure = mapping(found.get("too_sure")).get("tuned")
    way = "too sure" if place(sure) > 0 else "not sure enough"
    return words.sentence(f"{opening}: more than that; on the whole it is {way}, by {_points(abs(place(sure)))}.")


def _curve_figure(found: dict[str, Any], base: dict[str, Any], tuned: dict[str, Any]) -> Markup:
    slopes, rows = [], []
    for side, data, kind in (("base", base, "validation"), ("tuned", tuned, "training")):
        points = [mapping(point) for point in sequence(data.get("curve"))]
        places = [(place(p.get("confidence")), place(p.get("right")), *ends(p.get("ci95"))) for p in points]
        slopes.append(Slope(side, kind, tuple(places)))
        rows += [
            (
                side,
                words.share(x),
                words.share(y),
                f"{words.share(low)} to {words.share(high)}",
                words.count(p.get("n")),
            )
            for (x, y, low, high), p in zip(places, points, strict=True)
        ]
    message = (
        f"The tuned model says {words.share(tuned.get('confidence'))} on average and is right in "
        f"{words.share(tuned.get('right'))}; the base says {words.share(base.get('confidence'))} and is right in "
        f"{words.share(base.get('right'))}."
    )
    title = "Reliability: share right over confidence, base and tuned"
    key = gauge_charts.key(*DASHED_AND_SOLID, ("diagonal", "as right as it is sure; below it, too sure"))
    heads = ("model", "confidence", "share right", "95% interval", "rows")
    return charts.figure(
        words.sentence(message), gauge_charts.reliability(slopes, title), charts.table(heads, rows, (1, 2, 3, 4)), key
    )


def _floor_figures(found: dict[str, Any], base: dict[str, Any], tuned: dict[str, Any]) -> list[Markup]:
    heat = mapping(found.get("temperature"))
    cooled = {side: mapping(heat.get(side)) for side in ("base", "tuned")}
    lines = [("base", base), ("tuned", tuned)]
    lines += [(f"{side} at temperature {words.number(c.get('value'))}", c) for side, c in cooled.items() if c]
    drawn, rows = [], []
    for name, data in lines:
        within = bool(data.get("calibrated"))
        finding = "no more than chance" if within else "more than chance"
        shown = f"{_points(data.get('ece'))}, {finding}"
        drawn.append(
            (name, place(data.get("ece")), place(data.get("floor_p95")), shown, "unclear" if within else "worse")
        )
        rows.append((name, _points(data.get("ece")), _points(data.get("floor_mean")), _points(data.get("floor_p95")),
                     _points(data.get("above_floor")), finding))  # fmt: skip
    heads = ("model", "ECE", "chance, mean", "chance, 95 of 100", "above the mean", "finding")
    message = (
        f"A perfectly calibrated model as sure as the tuned one would be off by {_points(tuned.get('floor_mean'))} on "
        f"average on so few rows; the tuned model is off by {_points(tuned.get('ece'))}."
    )
    key = gauge_charts.key(
        ("mark", f"expected calibration error, {words.count(found.get('bins'))} bins, in points"),
        ("grey band", "what chance alone shows in 95 of 100 draws"),
        ("ring", "no more than that"),
        ("square", "more"),
    )
    title = "Expected calibration error beside its floor"
    figure = charts.figure(
        words.sentence(message), gauge_charts.floors(drawn, title), charts.table(heads, rows, range(1, 5)), key
    )
    return [figure, *_temperature(heat, cooled, tuned), *_costs(found)]


def _alone_figure(base: dict[str, Any], tuned: dict[str, Any]) -> Markup:
    """The threshold helper: the share wrong among the surest rows, over how many of them are answered."""
    sides = {"base": _answered(base), "tuned": _answered(tuned)}
    if not sides["tuned"]:
        return absent("this run's gauge was measured before there was a threshold helper")
    slopes = []
    for (side, lines), kind in zip(sides.items(), ("validation", "training"), strict=True):
        points = tuple((10 * place(p.get("share")) - 1, place(p.get("error")), *ends(p.get("ci95"))) for p in lines)
        slopes.append(Slope(side, kind, points))
    highest = max(high for slope in slopes for *_, high in slope.points)
    places = [words.axis_share(tenth / 10) for tenth in range(1, 11)]
    title = "Share wrong among the surest rows, base and tuned, over the share of rows that is answered"
    scale = charts.Scale(0.0, min(1.0, 1.05 * highest) or 1.0)
    picture = gauge_charts.slopes(slopes, title, scale, places, words.axis_share)
    heads = ("model", "rows answered", "if surer than", "rows", "wrong", "share wrong", "95% interval")
    rows = [
        (side, words.share(p.get("share")), words.share(p.get("threshold")), words.count(p.get("n")),
         words.count(p.get("wrong")), words.share(p.get("error")), _wrong_interval(p))
        for side, lines in sides.items() for p in lines
    ]  # fmt: skip
    key = gauge_charts.key(
        *DASHED_AND_SOLID,
        ("left to right", "the surest tenth alone, up to all rows; the intervals hold for all at once"),
    )
    message = _alone_sentence(sides["tuned"])
    return charts.figure(words.sentence(message), picture, charts.table(heads, rows, range(1, 7)), key)


def _answered(side: dict[str, Any]) -> list[dict[str, Any]]:
    return [mapping(line) for line in sequence(side.get("alone"))]


def _wrong_interval(line: dict[str, Any]) -> str:
    low, high = ends(line.get("ci95"))
    return f"{words.share(low)} to {words.share(high)}"


def _alone_sentence(lines: list[dict[str, Any]]) -> str:
    """The largest share of which surely few are wrong; or the largest with half the errors; or that there is none."""
    whole = place(lines[-1].get("error"))
    safe = [line for line in lines if ends(line.get("ci95"))[1] <= SAFE]
    fewer = [line for line in lines if place(line.get("error")) <= whole / 2]
    if not safe and not fewer:
        return "Being surer does not make it right twice as often: no threshold is of much use here."
    chosen = (safe or fewer)[-1]
    return (
        f"If it answers by itself only where it is surer than {words.share(chosen.get('threshold'))}, that is "
        f"{words.share(chosen.get('share'))} of rows, {words.share(chosen.get('error'))} of those are wrong "
        f"({words.count(chosen.get('wrong'))} of {words.count(chosen.get('n'))}, 95% interval "
        f"{_wrong_interval(chosen)}), against {words.share(whole)} of all rows."
    )


def _costs(found: dict[str, Any]) -> list[Markup]:
    """Brier score and over-confidence: per-row costs, and so with an interval of the difference."""
    rows = []
    for key, name, points in (
        ("brier", "Brier score (lower is better)", False),
        ("too_sure", "confidence − share right", True),
    ):
        m = Measure.read(
            {"name": name, "proportion": points, "higher_is_better": False, **mapping(found.get(key))}, 0.0
        )
        shown = (lambda v: words.points(v)) if points else words.number
        rows.append((name, words.count(m.n), shown(m.base), shown(m.tuned), m.shown_difference, m.interval))
    return [charts.table(("measure", "rows", "base", "tuned", "difference", "95% interval"), rows, range(1, 6))]


def _temperature(heat: dict[str, Any], cooled: dict[str, dict[str, Any]], tuned: dict[str, Any]) -> list[Markup]:
    if not cooled["tuned"]:
        return [absent(f"a temperature ({heat.get('not_run') or 'the gauge holds none'})")]
    value = place(cooled["tuned"].get("value"))
    return [said(
        f"Dividing the tuned model's logits by {words.number(value)}, "
        f"read from {words.plural(heat.get('n'), 'validation row')}, "
        f"moves its error from {_points(tuned.get('ece'))} to {_points(cooled['tuned'].get('ece'))}; no answer changes."
    )]  # fmt: skip
