"""A part of the page: did it learn by heart? Rows completed word for word, and secrets that were planted.

Knows the gauges' files as record.py reads them; measures nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from tunewright.runs.report import charts, words
from tunewright.runs.report.charts import Scale
from tunewright.runs.report.gauge_charts import BASE_AND_TUNED, Part, Span, absent, ends, key, p_value, said, spans
from tunewright.runs.report.record import Record
from tunewright.runs.report.why import limits, view

Found = Mapping[str, Any]


def by_heart(record: Record) -> Part:
    """The page's "Did it learn by heart?"."""
    completed, not_completed = record.gauge("memorisation")
    planted, not_planted = record.gauge("canaries")
    if not_completed and not_planted:
        return {"answer": f"not measured: {not_completed}; {not_planted}", "sections": []}

    def drawn() -> list[tuple[str, list[Markup]]]:
        return [
            ("Rows completed word for word", [absent(not_completed)] if not_completed else _completed(completed)),
            ("Planted secrets", [absent(not_planted)] if not_planted else _planted(planted)),
        ]

    return view(" ".join(found["sentence"] for found in (completed, planted) if found.get("sentence")), drawn)


# ------------------------------------------------------------------------- rows of the user
def _completed(found: Found) -> list[Markup]:
    lines = [
        Span(f"{one['rows']} rows ({words.count(one['n'])})", (one["base"], *one["base_ci95"]),
             (one["tuned"], *one["tuned_ci95"]), f"{words.share(one['base'])} → {words.share(one['tuned'])}")
        for one in found["sets"]
    ]  # fmt: skip
    title = "Share of rows completed word for word, base and tuned"
    picture = spans(lines, Scale(0.0, 1.0), title, words.axis_share)
    rows = [
        (one["rows"], words.count(one["n"]), words.share(one["base"]), words.share(one["tuned"]),
         words.points(one["difference"]), _ends(one["ci95"]), p_value(one["p"]), one["method"])
        for one in found["sets"]
    ]  # fmt: skip
    columns = ("rows", "n", "base", "tuned", "tuned − base", "95% interval", "p", "how")
    scope = (
        f"Given the first half of what was learnt in a row, the next {words.count(found['tokens'])} tokens (or all "
        f"that are left, {words.count(found['shortest'])} at least) must come out exactly."
    )
    parts = [charts.figure(scope, picture, charts.table(columns, rows, range(1, 7)), key(*BASE_AND_TUNED))]
    if found["examples"]:
        lines_ = [(str(e["row"]), e["given"], e["completed"], "yes" if e["base_too"] else "no")
                  for e in found["examples"]]  # fmt: skip
        parts.append(charts.table(("row", "given", "written word for word", "base too"), lines_))
    return [*parts, limits(found)]


def _ends(interval: Sequence[Any]) -> str:
    low, high = (words.points(end, unit=False) for end in interval)
    return f"{low}\u00a0to\u00a0{high}"


# ------------------------------------------------------------------------- rows of ours
def _planted(found: Found) -> list[Markup]:
    """Exposure of base and tuned on one axis, where chance lies, and every secret with its rank."""
    base, tuned = found["base"], found["tuned"]
    before, after = ((side["exposure"], *ends(side["ci95"])) for side in (base, tuned))
    change = f"{words.number(base['exposure'])} → {words.number(tuned['exposure'])} bits"
    line = Span(f"exposure of {words.plural(found['n'], 'planted secret')}", before, after, change)
    title = "Exposure of planted secrets in bits, base and tuned"
    picture = spans([line], Scale(0.0, found["most"]), title, words.number)
    rows = [
        (name, words.count(found["n"]), words.number(side["exposure"]), _bits(side["ci95"]), words.count(side["first"]),
         words.share(side["first_share"]), _shares(side["first_ci95"]))
        for name, side in (("base", base), ("tuned", tuned))
    ]  # fmt: skip
    columns = ("side", "n", "exposure, bits", "95% interval", "first choice", "share", "95% interval")
    scope = (
        f"Rows of our own stood among the training rows, each with a code of six random digits. Each code is compared "
        f"with {words.count(found['codes'] - 1)} others in the same row: exposure is {words.number(found['most'])} "
        f"bits where it is the likeliest, and {words.number(found['chance'])} on average where it was never seen."
    )
    difference = (
        f"Tuned minus base: {words.change(found['difference'])} bits (95% interval {_bits(found['ci95'])}, "
        f"p {p_value(found['p'])}, n = {words.count(found['n'])}, {found['method']})."
    )
    return [
        charts.figure(scope, picture, charts.table(columns, rows, range(1, 7)), key(*BASE_AND_TUNED)),
        said(difference), _secrets(found), *(said(one) for one in found["left_out"]), limits(found),
    ]  # fmt: skip


def _secrets(found: Found) -> Markup:
    lines = [
        (one["row"], one["owner"], one["code"], words.number(one["base"]["rank"]), words.number(one["tuned"]["rank"]))
        for one in found["rows"]
    ]
    return charts.table(("row", "whose", "code", "its rank in the base", "its rank in tuned"), lines, (3, 4))


def _bits(interval: Sequence[Any]) -> str:
    low, high = (words.number(end) for end in interval)
    return f"{low}\u00a0to\u00a0{high}"


def _shares(interval: Sequence[Any]) -> str:
    low, high = (words.share(end) for end in interval)
    return f"{low}\u00a0to\u00a0{high}"
