"""The report: a run folder becomes one self-contained `report.html`, readable with scripts off, from file://, in print.

Knows what the page says and in which order; how it looks is template.html and style.css. One script of ours, rows.js,
filters rows; the page's policy lets a browser run that text and no other, by its hash.
Nothing in it moves with the clock, so the same run gives the same bytes.
"""

from __future__ import annotations

import base64
import hashlib
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
    heart,
    history,
    inside,
    learning_curve,
    overfitting,
    robustness,
    seeds,
    why,
    words,
)
from tunewright.runs.report.first import ONE_RUN, first_screen, lead_of, margin_said, went
from tunewright.runs.report.flips import Fit, flipped_rows
from tunewright.runs.report.record import Measure, Record, mapping, read, sequence

LIMIT = 1_500_000  # bytes of the whole page, docs/what-the-verdict-means.md
HERE = Path(__file__).parent
ABOUT = (
    ("task", "At your task"), ("general", "At other skills"), ("robustness", "With messy input"),
    ("group", "Group by group"), ("calibration", "How far its confidence can be trusted"),
    ("drift", "How far the output moved"),
)  # fmt: skip
FITS = (
    Fit(),
    Fit(tail=300),
    Fit(rows=200, others=20, pictures=60, tail=300),
    Fit(rows=40, others=10, pictures=20, tail=0),
    Fit(rows=15, others=5, pictures=8, head=200, tail=0),
    Fit(rows=0, others=0),
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
    usage = record.part("usage.json")
    head = {
        "name": record.name, "task": usage.get("task") or "", "method": usage.get("method") or "",
        "base": record.base_name,
    }  # fmt: skip
    views = {
        "first": first_screen(record), "better": better(record), "rows": flipped_rows(record, fit),
        "errors": errors(record), "whom": groups.for_whom(record), "lost": inside.elsewhere(record),
        "messy": robustness.messy(record), "confidence": calibration.confidence(record),
        "inside": inside.changed(record), "why": why.why(record, fit), "heart": heart.by_heart(record),
        "learning": history.learning(record) | {"sections": _growth(record)}, "data": history.data(record),
        "cost": history.cost(record), "usage": history.use(record), "made": history.made(record),
        "limits": limits(record),
    }  # fmt: skip
    return filled("template.html", ours("rows.js"), head=head, **views)


def filled(template: str, script: Markup | str = "", **views: Any) -> str:
    """A template of ours with our style, and the policy that allows these two texts and nothing else."""
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(HERE), autoescape=True, trim_blocks=True,
                                     lstrip_blocks=True, undefined=jinja2.StrictUndefined)  # fmt: skip
    environment.filters["coded"] = words.code_parts
    style = ours("style.css")
    return environment.get_template(template).render(policy=policy(style, script), style=style, script=script, **views)


def ours(name: str) -> Markup:
    """A file beside this one as it goes into the page: no data in it, and nothing that would end its element."""
    text = (HERE / name).read_text(encoding="utf-8").strip()
    assert "</" not in text, name
    return Markup(text)  # noqa: S704


def policy(style: str, script: str) -> str:
    """The content-security policy: nothing is fetched, and what is inline must have the hash of our text."""
    source = f"'{_hashed(script)}'" if script else "'none'"
    return (
        f"default-src 'none'; script-src {source}; style-src '{_hashed(style)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _hashed(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _growth(record: Record) -> list[tuple[str, list[Markup]]]:
    return [*overfitting.sections(record), *learning_curve.sections(record)]


# ---------------------------------------------------------------- is it better?
def better(record: Record) -> dict[str, Any]:
    """A forest plot per unit and subject, each with its table."""
    measures = record.measures
    groups = [
        {"title": title, "figures": [_forest(panel) for panel in _panels([m for m in measures if m.about == about])]}
        for about, title in ABOUT if any(m.about == about for m in measures)
    ]  # fmt: skip
    groups += seeds.groups(record)
    lead = lead_of(record)
    return {"answer": f"{words.capital(went(lead))}." if lead else "not measured: the evidence holds no measure",
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
    message = f"{words.capital(went(lead))}." if len(measures) == 1 else _many(measures)
    way = "" if lead.higher_is_better else " Lower values are better here, so the axis runs from high to low."
    key = Markup('<p class="key">Dot: difference. Line: 95% interval. Grey band: {}, too small to matter.{}</p>')
    numbers = charts.table(columns, rows, range(1, 8))
    return charts.figure(message, charts.forest(measures), numbers, key.format(margin_said(lead), way))


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
    lead = lead_of(record)
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
