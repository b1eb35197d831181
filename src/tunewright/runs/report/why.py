"""A part of the page: why this answer? What two gauges found, in words and shades.

Knows the gauges' files as record.py reads them; measures nothing. Suggested is not proven: nothing here says "because".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from tunewright.runs.report import charts, words
from tunewright.runs.report.charts import tag
from tunewright.runs.report.flips import Fit, Pictures
from tunewright.runs.report.gauge_charts import Part, absent, key, said
from tunewright.runs.report.record import Record

Found = Mapping[str, Any]
STEPS = 4  # shades of a word or region, from a quarter of the strongest on
TEXT = 220  # characters of a training row
PICTURE = 168  # px: the longer side of a picture under its regions
FAINT = 0.2  # a row whose strongest piece is weaker than this is shaded as weakly as it is
LISTED = 5  # pieces of one answer in the table
WAYS = {"toward": "▲ toward", "against": "▼ against"}
TURNS = "↺"
UNREADABLE = "not measured: the gauge's file cannot be read"


# ------------------------------------------------------------------- why this answer?
def why(record: Record, fit: Fit) -> Part:
    """Words or regions that an answer rests on, the training rows that pushed it, and labels to look at again."""
    rests, no_rests = record.gauge("attribution")
    pushes, no_pushes = record.gauge("influence")
    if no_rests and no_pushes:
        reasons = no_pushes if no_rests == no_pushes else f"{no_pushes}; {no_rests}"
        return {"answer": f"not measured: {reasons}", "sections": []}
    pictures = Pictures(record.folder, min(fit.pictures, 24))

    def drawn() -> list[tuple[str, list[Markup]]]:
        sections = [("What the answer rests on", [absent(no_rests)] if no_rests else _resting(rests, fit, pictures))]
        if no_pushes:
            return [*sections, ("Training rows that pushed it", [absent(no_pushes)])]
        return [
            *sections,
            ("Training rows that pushed it: suggested, not proven", _pushing(pushes, fit)),
            ("Training rows whose labels look wrong", _suspected(pushes, fit)),
        ]

    answers = [found["sentence"] for found in (pushes, rests) if found.get("sentence")]
    return view(" ".join(answers), drawn)


def view(answer: str, drawn: Callable[[], list[tuple[str, list[Markup]]]]) -> Part:
    """A gauge's file may have been written by another hand: what cannot be drawn is said, and the page stands."""
    try:
        return {"answer": words.sentence(answer), "sections": drawn()}
    except (KeyError, TypeError, ValueError, AttributeError, IndexError):
        return {"answer": UNREADABLE, "sections": []}


def limits(found: Found) -> Markup:
    return tag("ul", *(tag("li", words.sentence(line)) for line in found["limits"]))


# ------------------------------------------------------------------ words and regions
def _resting(found: Found, fit: Fit, pictures: Pictures) -> list[Markup]:
    rows = found["rows"][: max(2, fit.rows // 6)]
    odds = "log-odds" in found["unit"]
    order = "that changed sides, broken first" if odds else "whose score moved, the worst first"
    scope = f"{words.plural(found['n'], 'row')} of {words.count(found['of'])} {order}. "
    if small := found.get("answered_otherwise"):
        scope += f"{words.plural(small, 'row')} left out: asked again, a model answers otherwise than before. "
    way = "Each region is greyed" if found["kind"] == "image" else "Each word is left out"
    scope += f"{way}, and both models are asked again. " + (
        "Numbers are log-odds that the answer loses: 0.7 halves its odds, 2.3 makes them a tenth."
        if odds
        else "Numbers are what the right text costs more, in nats a token."
    )
    if found.get("baseline", "base") != "base":
        scope += f" “Base” is the baseline that is called {found['baseline']} above."
    shades = key(
        ("the darker", "the more the answer rests on it"),
        ("orange" if found["kind"] == "image" else "dotted line", "the answer grows surer without it"),
        ("framed" if found["kind"] == "image" else TURNS, "without it the answer turns"),
    )
    left = len(found["rows"]) - len(rows)
    more = [said(f"{words.plural(left, 'more row')} not shown here, to keep the page small.")] if left > 0 else []
    return [said(scope), shades, *(_rested(row, pictures) for row in rows), *more, limits(found)]


def _rested(row: Found, pictures: Pictures) -> Markup:
    """One row: each side's answer over its shaded words or regions, and the strongest of them as a table."""
    most = max([*(abs(v) for side in row["rests"].values() for v in side["lost"]), FAINT])
    names = row.get("pieces") or [f"row {i // row['grid'][1] + 1}, column {i % row['grid'][1] + 1}"
                                  for i in range(row["grid"][0] * row["grid"][1])]  # fmt: skip
    uri, reason = ("", "") if "pieces" in row else pictures.thumbnail(row.get("image"), PICTURE)
    sides = []
    for name in ("base", "tuned"):
        answer = f"{name}: {words.short(row[name], 60)}" if row.get(name) else name
        side = row["rests"][name]
        shaded = _words(names, side, most) if "pieces" in row else _regions(row, side, most, uri, reason)
        note = "" if any(side["lost"]) else tag("p", "Nothing that is left out changes this answer.", class_="quiet")
        sides.append(tag("div", tag("p", tag("b", answer, dir="auto")), shaded, note))
    truth = f", right is “{words.short(row['truth'], 60)}”" if row.get("truth") else ""
    caption = f"{words.capital(str(row['kind']))}: row {row['row']}{truth}."
    return charts.figure(caption, tag("div", *sides, class_="pair"), _piece_table(names, row["rests"]))


def _shade(value: float, most: float) -> int:
    """0 to STEPS, with the sign of the value."""
    step = min(STEPS, int(STEPS * abs(value) / most + 0.5))
    return step if value > 0 else -step


def _words(pieces: Sequence[str], side: Found, most: float) -> Markup:
    turns = set(side.get("turns", ()))
    parts: list[Any] = []
    for i, (piece, value) in enumerate(zip(pieces, side["lost"], strict=True)):
        step = _shade(value, most)
        blank = piece[: len(piece) - len(piece.lstrip())]
        word = piece.lstrip() + (TURNS if i in turns else "")
        class_ = f"rests-{step}" if step > 0 else "rests-against"
        parts += [blank, tag("mark", word, class_=class_) if step else word]
    return tag("p", *parts, class_="passage rests", dir="auto")


def _regions(row: Found, side: Found, most: float, uri: str, reason: str) -> Markup:
    """The picture under a grid whose cells are shaded, and numbered where they count most."""
    if not uri:
        return tag("p", reason or "no picture", class_="absent")
    down, across = row["grid"]
    cells: list[Markup] = [tag("image", href=uri, width=across, height=down, preserveAspectRatio="none")]
    turns = set(side.get("turns", ()))
    for i, value in enumerate(side["lost"]):
        step, (y, x) = _shade(value, most), divmod(i, across)
        if step:
            opacity = f"{0.15 + 0.14 * abs(step):.2f}"
            class_ = "region rests" if step > 0 else "region against"
            cells.append(tag("rect", x=x, y=y, width=1, height=1, class_=class_, fill_opacity=opacity))
        if i in turns:
            cells.append(tag("rect", x=x + 0.06, y=y + 0.06, width=0.88, height=0.88, class_="region turns"))
    title = tag("title", f"Regions that the answer rests on: {row['row']}")
    return tag("svg", title, *cells, viewBox=f"0 0 {across} {down}", width=PICTURE, height=PICTURE, role="img",
               class_="regions", preserveAspectRatio="none")  # fmt: skip


def _piece_table(names: Sequence[str], rests: Found) -> Markup:
    lost = [rests[side]["lost"] for side in ("base", "tuned")]
    order = sorted(range(len(names)), key=lambda i: (-max(abs(side[i]) for side in lost), i))[:LISTED]
    turns = [set(rests[side].get("turns", ())) for side in ("base", "tuned")]
    rows = []
    for i in order:
        cells = [words.change(side[i]) + (", turns" if i in t else "") for side, t in zip(lost, turns, strict=True)]
        rows.append((words.short(names[i], 60), *cells))
    return charts.table(("left out", "base loses", "tuned loses"), rows, (1, 2))


# ------------------------------------------------------------------------ training rows
def _pushing(found: Found, fit: Fit) -> list[Markup]:
    scope = (
        f"Of {words.plural(found['n'], 'training row')} looked at (of {words.count(found['of'])}), those whose "
        f"gradient at the last layer points most toward {found['toward']}, or against it: 1 is exactly there, "
        f"{words.MINUS}1 exactly against, 0 neither. A likeness and no experiment."
    )
    if not found["flips"]:
        return [said(scope), absent(str(found.get("no_flips", "no row changed sides"))), limits(found)]
    shown = found["flips"][: max(3, fit.rows // 4)]
    left = len(found["flips"]) - len(shown)
    more = [said(f"{words.plural(left, 'more row')} not shown here, to keep the page small.")] if left > 0 else []
    return [said(scope), *(_pushed(row, i == 0) for i, row in enumerate(shown)), *more, limits(found)]


def _pushed(row: Found, unfolded: bool) -> Markup:
    """A flipped row and its table of training rows."""
    columns = ("way", "push", "training row", "its label", "tuned answers it")
    lines = [
        (WAYS.get(one["way"], ""), words.change(one["push"]), words.short(one["input"], TEXT),
         words.short(one.get("label", ""), 80), words.short(one.get("answer", ""), 80))
        for one in row["pushed_by"]
    ]  # fmt: skip
    answered = f"{row['base']} → {row['tuned']}" if "base" in row and "tuned" in row else ""
    parts = [tag("b", words.capital(str(row["kind"]))), " ", tag("span", words.short(row["input"], TEXT), dir="auto")]
    parts += [tag("span", words.short(answered, 120), class_="where", dir="auto")] if answered else []
    summary = tag("summary", *parts)
    return tag("details", summary, charts.table(columns, lines, (1,)), class_="pushed",
               open="open" if unfolded else "")  # fmt: skip


def _suspected(found: Found, fit: Fit) -> list[Markup]:
    suspects = found["suspects"]
    if "not_run" in suspects:
        return [absent(str(suspects["not_run"]))]
    shown = suspects["rows"][: max(5, fit.rows // 3)]
    scope = (
        f"The {words.count(suspects['listed'])} of {words.plural(suspects['n'], 'training row')} whose label the other "
        "training rows deny most, when each is guessed from all others. Hard and rare rows stand here too: read "
        "before you change a label."
    )
    lines = [
        (str(i), words.short(one["input"], TEXT), str(one["row"]), words.short(one.get("label", ""), 80),
         words.short(one.get("answer", ""), 80), words.share(one.get("score")))
        for i, one in enumerate(shown, 1)
    ]  # fmt: skip
    left = suspects["listed"] - len(shown)
    more = [said(f"{words.plural(left, 'more row')} not shown here, to keep the page small.")] if left > 0 else []
    columns = ("", "training row", "where", "its label", "tuned answers", "how sure")
    return [said(scope), charts.table(columns, lines, (0, 5)), *more]
