"""The report: a run folder becomes one self-contained `report.html`, readable with scripts off, from file://, in print.

Knows what the page says and in which order; how it looks is template.html and style.css.
Nothing in it moves with the clock, so the same run gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from tunewright.rundir import RunDir
from tunewright.runs.report import (
    calibration,
    charts,
    groups,
    history,
    inside,
    learning_curve,
    overfitting,
    robustness,
    seeds,
    words,
)
from tunewright.runs.report.flips import Fit, flipped_rows
from tunewright.runs.report.record import Measure, Record, mapping, read, sequence

LIMIT = 1_500_000  # bytes of the whole page, docs/what-the-verdict-means.md
HERE = Path(__file__).parent
ANSWERS = {  # symbol and tone beside the verdict's word
    "better": ("▲", "better"), "worse": ("▼", "worse"), "trade": ("⇄", "worse"), "can't tell": ("?", "unclear"),
    "no meaningful change": ("=", "unclear"), "no verdict": ("–", "unclear"),
}  # fmt: skip
ABOUT = (
    ("task", "At your task"), ("general", "At other skills"), ("robustness", "With messy input"),
    ("group", "Group by group"), ("calibration", "How far its confidence can be trusted"),
    ("drift", "How far the output moved"),
)  # fmt: skip
ONE_RUN = "One training run. Another seed could differ; this interval covers rows only."
FITS = (
    Fit(),
    Fit(tail=300),
    Fit(rows=40, pictures=20, tail=0),
    Fit(rows=15, pictures=8, head=200, tail=0),
    Fit(rows=0),
)


def write_report(run: Path) -> Path:
    """Write `report.html` into the run folder and return its path.

    Only evidence.json must be there; any other file that is absent is said to be, in its place.
    Raises RunError if evidence.json is absent or unreadable.
    """
    record = read(run)
    page = ""
    for fit in FITS:
        page = render(record, fit)
        if len(page.encode()) <= LIMIT:
            break
    RunDir(run).write_text("report.html", page)
    return run / "report.html"


def render(record: Record, fit: Fit) -> str:
    """The page's HTML. Everything that comes from data is escaped by jinja or by charts.tag."""
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(HERE), autoescape=True, trim_blocks=True,
                                     lstrip_blocks=True, undefined=jinja2.StrictUndefined)  # fmt: skip
    style = Markup((HERE / "style.css").read_text(encoding="utf-8"))  # noqa: S704  a file of ours, no data
    usage = record.part("usage.json")
    head = {
        "name": record.name, "task": usage.get("task") or "", "method": usage.get("method") or "",
        "base": record.base_name,
    }  # fmt: skip
    return environment.get_template("template.html").render(
        style=style, head=head, first=first_screen(record), better=better(record), rows=flipped_rows(record, fit),
        errors=errors(record), whom=groups.for_whom(record), lost=inside.elsewhere(record),
        messy=robustness.messy(record), confidence=calibration.confidence(record), inside=inside.changed(record),
        learning=history.learning(record) | {"sections": _growth(record)},
        data=history.data(record),
        cost=history.cost(record), usage=history.use(record),
        made=history.made(record), limits=limits(record),
    )  # fmt: skip


def _growth(record: Record) -> list[tuple[str, list[Markup]]]:
    return [*overfitting.sections(record), *learning_curve.sections(record)]


# ---------------------------------------------------------------- the first screen
def first_screen(record: Record) -> dict[str, Any]:
    """Verdict, what it cost elsewhere, how sure, one picture, what to do next."""
    verdict = record.verdict
    answer = str(verdict.get("answer") or "no verdict")
    reason = f"No verdict: {verdict.get('reason') or 'the evidence holds none'}."
    sentence = words.sentence(verdict.get("sentence") or reason)
    symbol, tone = ANSWERS.get(answer, ("–", "unclear"))
    opening, colon, rest = sentence.partition(": ")
    return {
        "answer": answer, "symbol": symbol, "tone": tone, "opening": opening + colon.strip(), "rest": rest,
        "elsewhere": elsewhere(record), "sure": how_sure(record), "strip": strip(record), "next": advice(record),
    }  # fmt: skip


def elsewhere(record: Record) -> list[str]:
    """What the tuning cost outside its task; never "forgot", which drift alone cannot show."""
    said = []
    lead = _lead(record)
    general = [m for m in record.measures if m.about == "general"]
    deciding = [m for m in general if lead and m.key == lead.key] or general
    for measure in record.measures:
        if measure in deciding:
            rows = f"{words.plural(measure.n, 'row')} of other skills" if measure.n is not None else "other skills"
            said.append(f"On {rows}, {_went(measure)}.")
        elif measure.about == "drift":
            said.append(
                f"{words.capital(measure.name)} is {measure.shown(measure.tuned)}: how far it moved, not what it lost."
            )
    return said or [f"not measured: {_reason(record, ('general', 'other skill', 'forg', 'elsewhere'))}"]


def _reason(record: Record, about: Sequence[str]) -> str:
    for line in map(str, sequence(record.verdict.get("not_measured"))):
        if any(word in line.lower() for word in about):
            return line.removeprefix("not measured: ")
    return "no rows of other skills were given (evaluate.general)"


def _went(measure: Measure) -> str:
    change = (
        f"{measure.shown_difference}, 95% interval {measure.interval}" if measure.interval else measure.shown_difference
    )
    said = f"{measure.name} went from {measure.shown(measure.base)} to {measure.shown(measure.tuned)} ({change})"
    within = f" (within your {_margin(measure)})" if measure.finding == "no meaningful change" else ""
    return f"{said}: {measure.finding}{within}"


def _margin(measure: Measure) -> str:
    return f"{words.number(100 * measure.margin)} points" if measure.in_points else words.number(measure.margin)


def how_sure(record: Record) -> list[str]:
    lead = _lead(record)
    said = []
    if lead and lead.n is not None:
        said.append(f"{words.plural(lead.n, 'held-out row')}, the same for both models.")
    smallest = record.verdict.get("smallest_detectable")
    if lead and words.is_number(smallest):
        visible = f"{100 * smallest:.2g} points" if lead.in_points else words.number(smallest)
        rows = "With so few rows only" if record.verdict.get("answer") == "can't tell" else "With this many rows"
        said.append(f"{rows} a change of about {visible} or more can be seen.")
    return [*said, seeds.sentence(record) or ONE_RUN]


def _lead(record: Record) -> Measure | None:
    return next((m for m in record.measures if m.about == "task"), None)


def strip(record: Record) -> dict[str, Any]:
    """The picture of all rows, or why there is none."""
    flips = mapping(record.evidence.get("flips"))
    counts = {key: int(flips[key]) for key, _, _ in charts.STRIP if words.is_number(flips.get(key)) and flips[key] >= 0}
    total = sum(counts.values())
    if len(counts) < len(charts.STRIP) or not total:
        lead = _lead(record)
        drawn = lead is not None and lead.difference is not None
        why = "the counts of rows are incomplete" if flips else "rows are not right or wrong here"
        return {"reason": why, "picture": charts.forest([lead]) if lead and drawn else ""}
    kinds = {mapping(row).get("kind") for row in sequence(flips.get("examples"))}
    tiles = [
        {"key": key, "word": word, "meaning": meaning, "count": words.count(counts[key]),
         "share": words.share(counts[key] / total), "swatch": charts.swatch(key, word),
         "link": f"#rows-{key}" if key in kinds and counts[key] else ""}
        for key, word, meaning in charts.STRIP
    ]  # fmt: skip
    base, tuned = counts["kept_right"] + counts["broken"], counts["kept_right"] + counts["fixed"]
    before = f"{words.count(base)} right ({words.share(base / total)})"
    name = mapping(record.evidence.get("baseline")).get("name") or "base"
    side = "the base" if name == "base" else f"the baseline ({name})"
    message = (f"Of {words.plural(total, 'row')} {side} answered {before}, "
               f"the tuned model {words.count(tuned)} ({words.share(tuned / total)}).")  # fmt: skip
    return {"reason": "", "picture": charts.row_strip(counts), "tiles": tiles, "message": message}


def advice(record: Record) -> str:
    given = record.evidence.get("advice") or record.verdict.get("advice")
    broken = mapping(record.evidence.get("flips")).get("broken")
    if given:
        return str(given)
    return f"Look at the {words.plural(broken, 'broken row')} before you use it." if broken else "Read the parts below."


# ---------------------------------------------------------------- is it better?
def better(record: Record) -> dict[str, Any]:
    """A forest plot per unit and subject, each with its table."""
    measures = record.measures
    groups = [
        {"title": title, "figures": [_forest(panel) for panel in _panels([m for m in measures if m.about == about])]}
        for about, title in ABOUT if any(m.about == about for m in measures)
    ]  # fmt: skip
    groups += seeds.groups(record)
    lead = _lead(record)
    return {"answer": f"{words.capital(_went(lead))}." if lead else "not measured: the evidence holds no measure",
            "groups": groups, "baseline": baseline(record)}  # fmt: skip


def _panels(measures: Sequence[Measure]) -> list[list[Measure]]:
    """Measures that can share an axis: shares by direction together, anything else alone."""
    panels: dict[Any, list[Measure]] = {}
    for index, measure in enumerate(measures):
        panels.setdefault(("share", measure.higher_is_better) if measure.in_points else index, []).append(measure)
    return list(panels.values())


def _forest(measures: Sequence[Measure]) -> Markup:
    if all(m.difference is None for m in measures):
        return _without_base(measures)
    columns = ("measure", "rows", "base", "tuned", "difference", "95% interval", "p", "p, corrected", "finding", "how")
    rows = [
        (m.name, words.count(m.n), m.shown(m.base), m.shown(m.tuned), m.shown_difference, m.interval or words.UNKNOWN,
         _p(m.p), _corrected(m), m.finding, m.method or words.UNKNOWN)
        for m in measures
    ]  # fmt: skip
    lead = measures[0]
    message = f"{words.capital(_went(lead))}." if len(measures) == 1 else _many(measures)
    way = "" if lead.higher_is_better else " Lower values are better here, so the axis runs from high to low."
    key = Markup('<p class="key">Dot: difference. Line: 95% interval. Grey band: the {} you said do not matter.{}</p>')
    numbers = charts.table(columns, rows, range(1, 8))
    return charts.figure(message, charts.forest(measures), numbers, key.format(_margin(lead), way))


def _without_base(measures: Sequence[Measure]) -> Markup:
    said = ", ".join(f"{m.name} of the tuned model is {m.shown(m.tuned)}" for m in measures)
    return charts.tag("p", f"not measured: there is no base value to compare with; {said}", class_="absent")


def _many(measures: Sequence[Measure]) -> str:
    found: dict[str, int] = {}
    for measure in measures:
        found[measure.finding] = found.get(measure.finding, 0) + 1
    return (
        f"Of {len(measures)} measures: " + ", ".join(f"{amount} {finding}" for finding, amount in found.items()) + "."
    )


def _p(p: float | None) -> str:
    return "" if p is None else "< 0.001" if p < 0.001 else words.number(p)


def _corrected(measure: Measure) -> str:
    """Holm's p where several measures are asked together; the declared one stands alone."""
    return _p(measure.p_holm) if measure.p_holm is not None else ""


def baseline(record: Record) -> str:
    given = mapping(record.evidence.get("baseline"))
    lead = _lead(record)
    name = given.get("name") or (lead.baseline if lead else "")
    if not name:
        return "What stands for “before” is the base model itself."
    text = str(given.get("text") or "").rstrip(".")
    return f"What stands for “before”: {name}" + (f", that is {text}." if text else ".")


# ---------------------------------------------------------------- where does it err?
def errors(record: Record) -> dict[str, Any]:
    """Confusion matrices side by side, and per label what share is found."""
    confusion = mapping(record.evidence.get("confusion"))
    labels = [str(label) for label in sequence(confusion.get("labels"))]
    base, tuned = (_counts(confusion.get(side), len(labels)) for side in ("base", "tuned"))
    if not labels or base is None or tuned is None:
        reason = (
            "the evidence's confusion is not square"
            if labels
            else "this task's answers are no labels, or none were counted"
        )
        return {"answer": f"not measured: {reason}", "figures": []}
    before, after = (sum(map(sum, m)) - sum(m[i][i] for i in range(len(labels))) for m in (base, tuned))
    mixed = charts.pairs(labels, base, tuned)
    worst = (
        f" Most often {mixed[0][0]} is taken for {mixed[0][1]} ({words.count(mixed[0][3])})."
        if mixed and mixed[0][3]
        else ""
    )
    figures = [_matrices(labels, base, tuned, mixed), _found(labels, base, tuned)]
    return {"answer": f"{words.count(before)} errors before, {words.count(after)} after.{worst}", "figures": figures}


def _counts(value: Any, size: int) -> list[list[int]] | None:
    """A square of counts, or None."""
    lines = [sequence(line) for line in sequence(value)]
    if len(lines) != size or any(len(line) != size or not all(map(words.is_number, line)) for line in lines):
        return None
    return [[int(cell) for cell in line] for line in lines]


def _matrices(labels: list[str], base: list[list[int]], tuned: list[list[int]], mixed: list[Any]) -> Markup:
    names, first, second = charts.joined(labels, base, tuned)
    both = charts.tag("div", charts.matrix(names, first, "base"), charts.matrix(names, second, "tuned"), class_="pair")
    numbers = charts.table(("truth", "answer", "base", "tuned"), mixed, (2, 3))
    message = "Who is taken for whom: rows are the truth, columns the answer; the outlined diagonal is right."
    return charts.figure(message, both, numbers)


def _found(labels: list[str], base: list[list[int]], tuned: list[list[int]]) -> Markup:
    lines = [(f"{label} ({words.plural(sum(tuned[i]), 'row')})", base[i][i] / sum(base[i]), tuned[i][i] / sum(tuned[i]))
             for i, label in enumerate(labels) if sum(base[i]) and sum(tuned[i])]  # fmt: skip
    if not lines:
        return charts.tag("p", "not measured: no label has a row", class_="absent")
    lines.sort(key=lambda line: line[2] - line[1])
    drawn = lines if len(lines) <= 16 else [*lines[:8], *lines[-8:]]
    some = "" if drawn == lines else " The eight that lost most and the eight that gained most are drawn."
    message = f"What share of each label is found (recall): ring is the base, filled is the tuned model.{some}"
    numbers = charts.table(
        ("label", "base", "tuned"), [(n, words.share(b), words.share(t)) for n, b, t in lines[:200]], (1, 2)
    )
    return charts.figure(message, charts.dumbbell(drawn, "Share of each label found by base and tuned model"), numbers)


# ---------------------------------------------------------------- limits
def limits(record: Record) -> dict[str, Any]:
    """What did not run, and what no report of this kind can say."""
    not_measured = [str(line).removeprefix("not measured: ") for line in sequence(record.verdict.get("not_measured"))]
    fixed = [
        seeds.sentence(record) or ONE_RUN,
        "The held-out rows stand for your future rows only as far as these will look like them.",
        "What was not measured can still have changed: other skills, safety, fairness, rare inputs.",
        "Examples show what changed, not why; nothing here is a proof of cause.",
    ]
    if any(m.about == "drift" for m in record.measures):
        fixed.append("Drift says how far the output moved; it does not say which skill was lost, or that one was.")
    answer = (
        f"{words.plural(len(not_measured), 'thing')} not measured."
        if not_measured
        else "Everything asked for was measured."
    )
    return {"answer": answer, "not_measured": not_measured, "fixed": fixed}
