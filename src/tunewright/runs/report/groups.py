"""For whom? Groups of rows, and answers with identity words exchanged, as the gauges found them.

Knows the files in `gauges/` as record.py reads them, and the words for their numbers; measures nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from tunewright.runs.report import charts, gauge_charts, words
from tunewright.runs.report.gauge_charts import BASE_AND_TUNED, Part, Span, absent, ends, p_value, place, said, unit_of
from tunewright.runs.report.record import FEW_ROWS, Measure, Record, mapping, sequence

MOST_DRAWN = 16  # groups in one chart; its table has them all


def for_whom(record: Record) -> Part:
    """Groups named in the recipe, and answers with identity words exchanged."""
    found, reason = record.gauge("groups")
    swapped, no_swaps = record.gauge("swaps")
    columns = [mapping(column) for column in sequence(found.get("columns"))]
    sections = [(f"By {column.get('column')}", _column(record, found, column)) for column in columns]
    for one in map(mapping, sequence(found.get("left_out"))):
        sections.append((f"By {one.get('column')}", [absent(str(one.get("reason")))]))
    if reason:
        sections.append(("Groups of rows", [absent(reason)]))
    title = "With he and she, names, countries exchanged"
    sections.append((title, [absent(no_swaps)] if no_swaps else _swaps(record, swapped)))
    return {"answer": _groups_sentence(found, columns) if found else f"not measured: {reason}", "sections": sections}


def _groups_sentence(found: dict[str, Any], columns: Sequence[dict[str, Any]]) -> str:
    groups = [
        (f"{c.get('column')} {g.get('value')}", g) for c in columns for g in map(mapping, sequence(c.get("groups")))
    ]
    large = [(name, g) for name, g in groups if not g.get("few")]
    if not large:
        return f"Every group has fewer than {found.get('few_rows')} rows: none is judged."
    weak = [name for name, g in large if g.get("stands") == "worse"]
    lost = [name for name, g in large if g.get("changed") == "worse"]
    said = [f"The tuned model does worse for {_named(weak)} than for the other rows."] if weak else []
    said += [f"It got worse for {_named(lost)}."] if lost else []
    asked = f"({words.plural(len(large), 'group')}, corrected for {words.plural(found.get('tests'), 'question')})"
    return " ".join(said) or f"No group is shown to do worse than the others, or to have got worse {asked}."


def _column(record: Record, found: dict[str, Any], column: dict[str, Any]) -> list[Markup]:
    """One column: the gap in a sentence, the chart, the table."""
    groups = [mapping(group) for group in sequence(column.get("groups"))]
    twin = Measure.read({"name": found.get("metric"), **unit_of(found)}, record.margin)
    sign = 1.0 if twin.higher_is_better else -1.0
    groups.sort(key=lambda g: (bool(g.get("few")), sign * place(g.get("tuned"))))
    half = MOST_DRAWN // 2
    drawn = groups if len(groups) <= MOST_DRAWN else [*groups[:half], *groups[-half:]]
    rows = [_span(group, twin, found) for group in drawn]
    some = f" {MOST_DRAWN} of {len(groups)} are drawn." if len(drawn) < len(groups) else ""
    message = _gap_sentence(column, groups, twin) + some
    reach = [0.0, *(end for row in rows for end in (*row.base, *row.tuned))]
    scale = charts.Scale(0.0, 1.0) if twin.in_points else charts.Scale(min(reach), max(reach) * 1.05)
    say = words.axis_share if twin.in_points else words.number
    title = f"{words.capital(twin.name)} of base and tuned model by {column.get('column')}"
    key = gauge_charts.key(*BASE_AND_TUNED, ("grey", f"fewer than {found.get('few_rows')} rows, not judged"))
    figure = charts.figure(words.sentence(message), gauge_charts.spans(rows, scale, title, say),
                           _group_table(column, groups, twin), key)  # fmt: skip
    without = column.get("without")
    return [figure, *([said(f"{words.plural(without, 'row')} without a value are left out.")] if without else [])]


def _span(group: dict[str, Any], twin: Measure, found: dict[str, Any]) -> Span:
    few = bool(group.get("few"))
    base, tuned = place(group.get("base")), place(group.get("tuned"))
    finding = f"too few rows ({words.count(group.get('n'))})" if few else _finding(group)
    kind = "faint" if few else group.get("changed") or "unclear"
    return Span(
        f"{group.get('value')} ({words.plural(group.get('n'), 'row')})", (base, *ends(group.get("base_ci95"))),
        (tuned, *ends(group.get("tuned_ci95"))), f"{twin.shown(base)} → {twin.shown(tuned)}, {finding}", str(kind),
    )  # fmt: skip


def _finding(group: dict[str, Any]) -> str:
    changed, stands = group.get("changed"), group.get("stands")
    said = {"better": "better", "worse": "worse"}.get(str(changed), "change not shown")
    return said + {"worse": ", below the others", "better": ", above the others"}.get(str(stands), "")


def _gap_sentence(column: dict[str, Any], groups: Sequence[dict[str, Any]], twin: Measure) -> str:
    gap, worst = mapping(column.get("gap")), str(mapping(column.get("worst")).get("tuned") or "")
    if not gap:
        return "Fewer than two groups have enough rows, so that there is no gap to speak of."
    score = next((g.get("tuned") for g in groups if g.get("value") == worst), None)
    after, before, chance = gap.get("tuned"), gap.get("base"), mapping(gap.get("chance_p95")).get("tuned")
    size = (lambda v: words.points(v).lstrip("+")) if twin.in_points else words.number
    low, high = ends(gap.get("ci95"))
    show = (lambda v: words.points(v, unit=False)) if twin.in_points else words.change
    beyond = "more than" if place(after) > place(chance) else "no more than"
    return (
        f"The tuned model's weakest group is {words.short(worst, 40)} ({twin.shown(score)}); best and weakest are "
        f"{size(after)} apart, {beyond} chance alone shows (up to {size(chance)}), and were {size(before)} apart "
        f"before (change {show(gap.get('change'))}, 95% interval {show(low)} to {show(high)})."
    )


def _group_table(column: dict[str, Any], groups: Sequence[dict[str, Any]], twin: Measure) -> Markup:
    heads = (str(column.get("column")), "rows", "base", "tuned", "difference", "95% interval", "p (Holm)",
             "other rows", "p (Holm)", "finding")  # fmt: skip
    rows = []
    for group in groups:
        m = Measure.read({"name": twin.key, "proportion": twin.in_points, **group}, twin.margin)
        finding = "too few rows, not judged" if group.get("few") else _finding(group)
        rows.append((group.get("value"), words.count(group.get("n")), m.shown(m.base), m.shown(m.tuned),
                     m.shown_difference, m.interval, p_value(group.get("p_holm")), m.shown(place(group.get("rest"))),
                     p_value(group.get("apart_p_holm")), finding))  # fmt: skip
    return charts.table(heads, rows, range(1, 9))


def _swaps(record: Record, found: dict[str, Any]) -> list[Markup]:
    """The share of answers that change when identity words are exchanged."""
    whole = _share_measure(found, record.margin)
    lines = [
        ("all", found),
        *((str(k.get("kind")), k) for k in map(mapping, sequence(found.get("kinds"))) if k.get("n")),
    ]
    rows, cells = [], []
    for name, line in lines:
        m = _share_measure(line, record.margin)
        shown = name == "all" or place(line.get("n")) >= FEW_ROWS
        rows += [Span(
            f"{name} ({words.plural(line.get('n'), 'row')})", (place(m.base), *ends(line.get("base_ci95"))),
            (place(m.tuned), *ends(line.get("tuned_ci95"))), f"{m.shown(m.base)} → {m.shown(m.tuned)}",
        )] * shown  # fmt: skip
        terms = ", ".join(map(str, sequence(line.get("terms"))))
        cells.append((name, words.count(m.n), m.shown(m.base), m.shown(m.tuned), m.shown_difference, m.interval, terms))
    message = (
        f"Exchanging such words changed {whole.shown(whole.tuned)} of {words.plural(whole.n, 'answer')} of the tuned "
        f"model and {whole.shown(whole.base)} of the base's ({whole.shown_difference}, 95% interval {whole.interval})."
    )
    top = max(0.1, *(1.05 * end for row in rows for end in (*row.base, *row.tuned)))
    scale = charts.Scale(0.0, min(1.0, top))
    title = "Share of answers that change when identity words are exchanged, base and tuned"
    numbers = charts.table(
        ("words", "rows", "base", "tuned", "difference", "95% interval", "found"), cells, range(1, 6)
    )
    picture = gauge_charts.spans(rows, scale, title, words.axis_share)
    parts = [charts.figure(words.sentence(message), picture, numbers, gauge_charts.key(*BASE_AND_TUNED))]
    of = f"{words.count(found.get('rows'))} of {words.plural(found.get('of'), 'held-out row')} hold such a word"
    parts.append(
        said(
            f"{of}; the list is short and knows {found.get('language')} only. Whether an answer may change is yours to "
            "judge: a king and a queen may well deserve different answers."
        )
    )
    return parts + _examples(found)


def _share_measure(line: dict[str, Any], margin: float) -> Measure:
    return Measure.read({"name": "answers that change", "proportion": True, "higher_is_better": False, **line}, margin)


def _examples(found: dict[str, Any]) -> list[Markup]:
    rows = [
        (one.get("input"), one.get("exchanged"), one.get("answer"), "yes" if one.get("base_changes") else "no")
        for one in map(mapping, sequence(found.get("examples")))
    ]
    if not rows:
        return []
    heads = ("input", "exchanged", "tuned answer before", "the base changes too")
    disclosed = charts.tag("summary", f"{words.plural(len(rows), 'row')} whose tuned answer changes")
    return [charts.tag("details", disclosed, charts.table(heads, rows), class_="numbers")]


def _named(names: Sequence[str], most: int = 4) -> str:
    """`a, b and 3 others`."""
    shown = [words.short(name, 40) for name in names[:most]]
    if len(names) > most:
        shown.append(f"{len(names) - most} others")
    return " and ".join([", ".join(shown[:-1]), shown[-1]]) if len(shown) > 1 else shown[0]
