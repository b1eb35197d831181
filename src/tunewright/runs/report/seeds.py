"""Would another seed give the same? What the runs beside this one gave, where `train --seeds` made several.

Knows seeds.json as record.py reads it, and the words for its numbers; measures nothing.
"""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from tunewright.runs.report import charts, words
from tunewright.runs.report.record import Measure, Record, mapping, sequence

HEADS = ("measure", "rows", "base", "tuned", "gain", "95%, rows and seeds", "95%, rows alone", "gains of the runs",
         "mean gain of all seeds, 95%")  # fmt: skip


def sentence(record: Record) -> str:
    """What stands in the place of "one training run": "" where there was only one."""
    measure, lines = _first(record), _runs(record)
    if not measure or len(lines) < 2:
        return ""
    m = Measure.read(measure, record.margin)
    seeds = ", ".join(str(line.get("seed")) for line in lines)
    return words.sentence(
        f"{len(lines)} training runs, seeds {seeds}; this page is one of them. On {m.name} they changed by "
        f"{_gains(measure, m)}; over other rows and other seeds: {m.shown_difference}, 95% interval {m.interval}."
    )


def groups(record: Record) -> list[dict[str, Any]]:
    """The section in "Is it better?": every run, their mean, and on how many rows they agree; [] for one run."""
    measure, lines = _first(record), _runs(record)
    if not measure or len(lines) < 2:
        return []
    drawn = [
        Measure.read(mapping(own) | {"name": f"seed {line.get('seed')}"}, record.margin)
        for line in lines for own in sequence(line.get("measures"))[:1]
    ]  # fmt: skip
    drawn.append(Measure.read(measure | {"name": "all seeds: rows and seeds"}, record.margin))
    message = mapping(record.part("seeds.json").get("verdict")).get("sentence") or "Several seeds were trained."
    key = charts.tag(
        "p",
        "Dot: difference. Line: 95% interval, of one seed over rows, of all seeds over rows and seeds.",
        class_="key",
    )
    picture = charts.figure(words.sentence(message), charts.forest(drawn), _table(record), key)
    return [{"title": "Would another seed give the same?", "figures": [picture, *_agreement(record)]}]


def _first(record: Record) -> dict[str, Any]:
    found = map(mapping, sequence(record.part("seeds.json").get("measures")))
    return next((m for m in found if m.get("about") == "task"), {})


def _runs(record: Record) -> list[dict[str, Any]]:
    return [mapping(line) for line in sequence(record.part("seeds.json").get("seeds"))]


def _gains(measure: dict[str, Any], m: Measure) -> str:
    gains = [g for g in sequence(mapping(measure.get("runs")).get("gains")) if words.is_number(g)]
    shown = [words.points(g, unit=False) if m.in_points else words.change(g) for g in gains]
    return ", ".join(shown) + (" points" if m.in_points else "")


def _table(record: Record) -> Markup:
    rows = []
    for one in map(mapping, sequence(record.part("seeds.json").get("measures"))):
        m = Measure.read(one, record.margin)
        rows_alone = Measure.read({**one, "ci95": one.get("rows_ci95")}, record.margin).interval
        runs = Measure.read({**one, "ci95": mapping(one.get("runs")).get("ci95")}, record.margin).interval
        rows.append((m.name, words.count(m.n), m.shown(m.base), m.shown(m.tuned), m.shown_difference, m.interval,
                     rows_alone, _gains(one, m), runs))  # fmt: skip
    return charts.table(HEADS, rows, range(1, len(HEADS)))


def _agreement(record: Record) -> list[Markup]:
    rows = mapping(record.part("seeds.json").get("rows"))
    if not words.is_number(rows.get("agree")) or not rows.get("n"):
        return []
    low, high = [*sequence(rows.get("agree_ci95")), None, None][:2]
    agree, all_fixed, fixed, all_broken, broken = (
        words.count(rows.get(key))
        for key in ("agree", "fixed_by_all", "fixed_by_some", "broken_by_all", "broken_by_some")
    )
    share = f"{words.share(rows['agree'] / rows['n'])}, 95% interval {words.share(low)} to {words.share(high)}"
    said = (
        f"On {agree} of {words.plural(rows['n'], 'row')} ({share}) all seeds are right, or all are wrong. Fixed by "
        f"every seed: {all_fixed} of the {fixed} that some seed fixed; broken by every seed: {all_broken} of {broken}."
    )
    return [charts.tag("p", words.sentence(said), dir="auto")]
