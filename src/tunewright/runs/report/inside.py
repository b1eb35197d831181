"""Two parts of the page: what changed inside, and what it lost. A gauge's numbers in, HTML out. Knows no run.

Drawn like charts.py: a sentence, a picture that needs no colour, and its table behind a disclosure. Everything comes
out escaped. Moved is not lost: only questions that were answered before and are not now are called broken.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from tunewright.runs.report import charts, refusing, words
from tunewright.runs.report.charts import Scale, tag, text
from tunewright.runs.report.gauge_charts import Part
from tunewright.runs.report.record import Record

Gauge = Mapping[str, Any]
LINE = 50  # px of one line
RIGHT = 52.0  # percent: where the second column begins
COLUMN = 46.0  # percent: how wide a column is
KINDS = {"helps": "better", "harms": "worse", "unclear": "unclear"}
SAME = {"difference": 0.0, "ci95": [0.0, 0.0]}  # full strength against itself
SAID = {"helps": "needed", "harms": "better without", "unclear": "unclear"}


def changed(record: Record) -> Part:
    """The page's "What changed inside?"."""
    found, reason = record.gauge("changed")
    return _view(found.get("sentence"), reason, lambda: part(found))


def elsewhere(record: Record) -> Part:
    """The page's "What did it lose?"."""
    moved, no_moves = record.gauge("divergence")
    asked, no_questions = record.gauge("probe")
    refused, no_requests = record.gauge("refusals")
    answers = [found["sentence"] for found in (asked, moved) if found.get("sentence")]
    reason = "" if answers else f"{no_moves}; {no_questions}"
    gauges = ((moved, no_moves), (asked, no_questions), (refused, no_requests))
    return _view(" ".join(answers), reason, lambda: lost(*({"not_run": no} if no else found for found, no in gauges)))


def _view(answer: str | None, reason: str, drawn: Callable[[], str]) -> Part:
    """A gauge's file may have been written by another hand: what cannot be drawn is said, and the page stands."""
    if reason:
        return {"answer": f"not measured: {reason}", "sections": []}
    try:
        return {"answer": answer or "", "sections": [("", [Markup(drawn())])]}  # noqa: S704  escaped where it is made
    except (KeyError, TypeError, ValueError, AttributeError, IndexError):
        return {"answer": "not measured: the gauge's file cannot be read", "sections": []}


def part(gauge: Gauge) -> str:
    """What changed inside? How far each part moved beside what the result needs of it, and the strengths below."""
    if "not_run" in gauge:
        return str(_absent(gauge["not_run"]))
    limits = tag("ul", *(tag("li", words.sentence(line)) for line in gauge["limits"]))
    return str(Markup("").join([_parts(gauge), _sweep(gauge), tag("h3", "What this cannot say"), limits]))


def lost(divergence: Gauge, probe: Gauge, refusals: Gauge) -> str:
    """What did it lose? Questions answered before and not now, requests refused, and how far it moved unasked."""
    parts = (
        ("General questions, before and after", probe, _flips),
        ("Does it still refuse what it should, and help otherwise?", refusals, refusing.refusals),
        ("How far it moved on other inputs", divergence, _drift),
    )
    drawn = [
        part
        for title, found, draw in parts
        for part in (tag("h3", title), _absent(found["not_run"]) if "not_run" in found else draw(found))
    ]
    return str(Markup("").join(drawn))


def _absent(reason: str) -> Markup:
    return tag("p", f"not measured: {reason}", class_="absent")


# ------------------------------------------------------------------- two columns
def _column(values: Sequence[float], left: float, width: float = COLUMN) -> Scale:
    """A scale that holds all values and 0, in one of the two columns; or wider, where there is only one."""
    low, high = min([0.0, *values]), max([0.0, *values])
    room = 0.08 * ((high - low) or 1.0)
    return Within(low - room, high + room, left=left, width=width)


@dataclass(frozen=True)
class Within(Scale):
    """A scale that is one column wide and not the whole picture."""

    width: float = COLUMN  # percent

    def share(self, value: float) -> float:
        way = (value - self.low) / ((self.high - self.low) or 1.0)
        return self.left + self.width * min(1.0, max(0.0, way))


def _effect(effect: Gauge | None, scale: Scale, y: float, kind: str) -> list[Markup]:
    """Zero, the interval and the dot of one effect; nothing but zero where there is none."""
    parts = [charts.vertical(scale.at(0), y - 10, y + 10, "zero")]
    if effect is None:
        return parts
    low, high = effect["ci95"]
    parts.append(tag("line", x1=scale.at(low), x2=scale.at(high), y1=f"{y:g}", y2=f"{y:g}", class_=f"reach {kind}"))
    parts += [charts.vertical(scale.at(end), y - 5, y + 5, f"reach {kind}") for end in (low, high)]
    return [*parts, charts.mark(kind, scale.at(effect["difference"]), y)]


def _ends(effects: Sequence[Gauge]) -> list[float]:
    return [value for effect in effects for value in (*effect["ci95"], effect["difference"])]


def _size(proportion: bool) -> Callable[[Any], str]:
    return words.points if proportion else words.change


def _interval(effect: Gauge, size: Callable[[Any], str]) -> str:
    return f"{_bare(size(effect['ci95'][0]))} to {_bare(size(effect['ci95'][1]))}"


def _bare(said: str) -> str:
    return said.removesuffix(" points")


# ----------------------------------------------------------------- what changed inside
def _parts(gauge: Gauge) -> Markup:
    """One line a part: left how far its weights moved, right what is lost where they are put back."""
    parts, size = gauge["parts"], _size(gauge["metric"]["proportion"])
    furthest = max(p["moved"]["relative_norm"] for p in parts) or 1.0
    scale = _column(_ends([p["needs"] for p in parts if "needs" in p]), RIGHT)
    drawn = [text("0%", 16, "how far it moved", "tick"), text(f"{RIGHT}%", 16, "what the result needs of it", "tick")]
    for i, one in enumerate(parts):
        drawn += _part_line(one, 28 + LINE * i, furthest, scale, size)
    picture = charts.drawing("Parts of the model: change of weights, and effect", 36 + LINE * len(parts), *drawn)
    n, of = gauge["rows"]["n"], gauge["rows"]["of"]
    rows = words.plural(n, "test row") if n == of else f"{words.count(n)} of {words.plural(of, 'test row')}"
    key = tag(
        "p", "Bar: change of the weights, as a share of the base's. Dot and line: what the score loses where the part "
        f"is put back to the base, with its 95% interval, on {rows}. Circle: needed. Square: better without it. Ring: "
        "unclear, Holm's correction for all parts included.", class_="key",
    )  # fmt: skip
    return charts.figure(words.sentence(gauge["sentence"]), picture, _parts_table(parts, size), key)


def _part_line(one: Gauge, top: float, furthest: float, scale: Scale, size: Callable[[Any], str]) -> list[Markup]:
    moved, needs, y = one["moved"]["relative_norm"], one.get("needs"), top + 30
    finding = needs["finding"] if needs else "unclear"
    said = f"{_bare(size(needs['difference']))}, {SAID[finding]}" if needs else "unchanged"
    return [
        text("0%", top + 16, words.short(one["name"], 24), "label"),
        text(f"{COLUMN}%", top + 16, words.share(moved), "value", "end"),
        text("100%", top + 16, said, f"value {KINDS[finding]}", "end"),
        tag("rect", x="0%", y=f"{y - 4:g}", width=f"{COLUMN}%", height=8, rx=4, class_="track"),
        tag("rect", x="0%", y=f"{y - 4:g}", width=f"{COLUMN * moved / furthest:.2f}%", height=8, rx=4, class_="bar"),
        *_effect(needs, scale, y, KINDS[finding]),
    ]


def _parts_table(parts: Sequence[Gauge], size: Callable[[Any], str]) -> Markup:
    columns = ("part", "moved", "effective rank", "of rank", "needs", "95% interval", "p (Holm)", "finding", "alone",
               "95% interval")  # fmt: skip
    rows = []
    for one in parts:
        moved, needs, alone = one["moved"], one.get("needs"), one.get("alone")
        shape = [words.number(moved[key]) if key in moved else "" for key in ("effective_rank", "of_rank")]
        effects = ["", "", "", "unchanged", "", ""]
        if needs and alone:
            effects = [
                size(needs["difference"]), _interval(needs, size), words.number(needs["p_holm"]),
                SAID[needs["finding"]], size(alone["difference"]), _interval(alone, size),
            ]  # fmt: skip
        rows.append((one["name"], words.share(moved["relative_norm"]), *shape, *effects))
    return charts.table(columns, rows, (1, 2, 3, 4, 5, 6, 8, 9))


# ---------------------------------------------------------------------------- strength
def _sweep(gauge: Gauge) -> Markup:
    """One line a strength, against full strength: left the task, right what was kept, where that was asked."""
    sweep, best, size = gauge["sweep"], gauge["recommended"], _size(gauge["metric"]["proportion"])
    kept = [entry["kept"] for entry in sweep if "kept" in entry]
    width = COLUMN - 2.0 if kept else 96.0
    task_scale = _column(_ends([entry["against_full"] for entry in sweep]), 2.0, width)
    kept_scale, kept_size = _column(_ends(kept), RIGHT), _size(any(one.get("proportion") for one in kept))
    metric = words.name(gauge["metric"]["name"])
    drawn = [text("2%", 16, f"{metric}, against full strength", "tick")]
    drawn += [text(f"{RIGHT}%", 16, words.short(f"{kept[0]['name']}, against it", 40), "tick")] if kept else []
    for i, entry in enumerate(sweep):
        top, chosen = 28 + LINE * i, entry["strength"] == best["strength"]
        name = f"strength {words.number(entry['strength'])}{' ◆' if chosen else ''}"
        drawn.append(text("0%", top + 16, name, "label"))
        columns = [(entry["against_full"], task_scale, f"{COLUMN if kept else 100}%", size)]
        columns += [(entry["kept"], kept_scale, "100%", kept_size)] if "kept" in entry else []
        for given, scale, end, say in columns:
            effect = SAME if entry["strength"] == 1 else given
            kind = _kind(effect)
            drawn.append(text(end, top + 16, _bare(say(effect["difference"])), f"value {kind}", "end"))
            drawn += _effect(effect, scale, top + 30, kind)
    picture = charts.drawing("Strengths of the change, each against full strength", 36 + LINE * len(sweep), *drawn)
    key = tag(
        "p", "◆: recommended. 0 is the base, 1 the tuned model; right is better. Line: 95% interval.", class_="key"
    )
    command = tag("pre", best["command"], class_="copy") if "command" in best else ""
    told = f"Recommended strength: {words.number(best['strength'])}, because {best['why']}."
    return charts.figure(
        words.sentence(told), picture, _sweep_table(sweep, metric, size), Markup("").join([key, command])
    )


def _kind(effect: Gauge) -> str:
    low, high = effect["ci95"]
    return "better" if low > 0 else "worse" if high < 0 else "unclear"


def _sweep_table(sweep: Sequence[Gauge], metric: str, size: Callable[[Any], str]) -> Markup:
    columns = ["strength", metric, "against full", "95% interval"]
    with_kept = "kept" in sweep[0]
    columns += ["kept", "kept against full", "95% interval"] if with_kept else []
    rows = []
    for entry in sweep:
        row = [words.number(entry["strength"]), words.number(entry["value"])]
        row += [size(entry["against_full"]["difference"]), _interval(entry["against_full"], size)]
        if with_kept:
            kept = entry["kept"]
            points = bool(kept.get("proportion"))
            value = words.share(kept["value"]) if points else words.number(kept["value"])
            row += [value, _size(points)(kept["difference"]), _interval(kept, _size(points))]
        rows.append(row)
    return charts.table(columns, rows, range(len(columns)))


# ------------------------------------------------------------------------ what it lost
def _flips(probe: Gauge) -> Markup:
    """Right and wrong before, by right and wrong now: four cells, their counts in them."""
    cells = (
        ("kept_right", "right before, right now", "right"),
        ("broken", "right before, wrong now: broken", "mistaken"),
        ("fixed", "wrong before, right now: fixed", "right"),
        ("still_wrong", "wrong before, wrong now", "mistaken"),
    )
    drawn = []
    for i, (key, said, class_) in enumerate(cells):
        x, y = 50 * (i % 2), 64 * (i // 2)
        shade = f"{0.35 * probe[key] / (probe['n'] or 1):.3f}"
        drawn += [
            tag("rect", x=f"{x + 0.5}%", y=y + 2, width="49%", height=58, rx=6, fill_opacity=shade, class_=class_),
            text(f"{x + 25}%", y + 26, words.count(probe[key]), "label", "middle"),
            text(f"{x + 25}%", y + 46, said, "tick", "middle"),
        ]  # fmt: skip
    title = ", ".join(f"{said}: {words.count(probe[key])}" for key, said, _ in cells)
    columns = ("kind", "questions", "base", "tuned", "broken", "fixed", "95% interval of the difference")
    rows = [
        (one["kind"], words.count(one["n"]), words.share(one["base"]), words.share(one["tuned"]),
         words.count(one["broken"]), words.count(one["fixed"]), _interval(one, words.points))
        for one in [*probe["by_kind"], {"kind": "all", **probe}]
    ]  # fmt: skip
    above = probe["above_chance"]
    key = tag(
        "p", f"Above chance ({words.share(probe['chance'])}), as a share of what lies above it: base "
        f"{words.share(above['base'])}, tuned {words.share(above['tuned'])}.", class_="key",
    )  # fmt: skip
    picture = charts.drawing(title, 130, *drawn)
    return charts.figure(words.sentence(probe["sentence"]), picture, charts.table(columns, rows, range(1, 7)), key)


def _drift(gauge: Gauge) -> Markup:
    """Every gauge that ran as a dot with its interval, those of one unit on one axis from 0; then what did not run."""
    ran = [entry for entry in gauge["gauges"] if "not_run" not in entry]
    units = dict.fromkeys(entry["unit"] for entry in ran)
    figures = [_dots([entry for entry in ran if entry["unit"] == unit], unit) for unit in units]
    absent = [_absent(f"{e['name']}, {e['not_run']}") for e in gauge["gauges"] if "not_run" in e]
    limits = tag("ul", *(tag("li", words.sentence(line)) for line in gauge["limits"]))
    return Markup("").join([*figures, *absent, limits])


def _dots(entries: Sequence[Gauge], unit: str) -> Markup:
    scale = Scale(0.0, max([1e-9, *(1.08 * entry["ci95"][1] for entry in entries)]))
    drawn: list[Markup] = []
    for i, entry in enumerate(entries):
        y = LINE * i + 34
        drawn += [
            text("0%", y - 16, words.short(entry["name"], 44), "label"),
            text("100%", y - 16, words.number(entry["value"]), "value", "end"),
            *charts.lane(scale, y),
            *_effect({**entry, "difference": entry["value"]}, scale, y, "unclear"),
        ]
    bottom = LINE * len(entries)
    picture = charts.drawing(
        f"How far it moved, {unit}", bottom + 26, *drawn, *charts.axis(scale, bottom, words.number)
    )
    columns = ("gauge", "on", "inputs", f"moved, {unit}", "95% interval", "base against itself", "how")
    rows = [
        (e["name"], e["on"], words.count(e["n"]), words.number(e["value"]),
         f"{words.number(e['ci95'][0])} to {words.number(e['ci95'][1])}",
         words.number(e.get("floor")), e["method"])
        for e in entries
    ]  # fmt: skip
    most = max(entries, key=lambda entry: entry["value"])
    said = f"It moved by up to {words.number(most['value'])} {unit}, on {most['on']}; 0 is the base against itself."
    key = tag("p", "Ring: moved. Line: 95% interval over inputs. Further is not worse.", class_="key")
    return charts.figure(said, picture, charts.table(columns, rows, (2, 3, 4, 5)), key)
