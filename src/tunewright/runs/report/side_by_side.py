"""Several runs on one page: score, gain, what broke, what it cost, gain against forgetting, and where they differ.

Knows the comparison's table (uses/comparison.py makes it) and run folders as record.py reads them; measures nothing.
The page is self-contained, runs no script, and is the same bytes for the same runs.
"""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from tunewright.rundir import RunDir
from tunewright.runs.report import charts, words
from tunewright.runs.report.charts import Scale, mark, tag, text
from tunewright.runs.report.flips import Fit, passage
from tunewright.runs.report.page import LIMIT, filled
from tunewright.runs.report.record import Measure, Record, clean, mapping, read, sequence

Table = dict[str, Any]
MOST_ROWS = 300  # rows on which the runs differ, spelt out
ALPHA = 0.05
LEFT, TOP, BOTTOM = 13.0, 16.0, 330.0  # of the plot: the gutter of its value axis in percent, its ends in px
LIMITS = (
    "One training run each, unless the runs are repeats: another seed could change their order.",
    "The best run is the best on these very rows, which flatters it; a fresh test set would be fairer to the others.",
    "A gain is against that run's own baseline, which may differ from run to run; the table names it.",
    "Choosing among many runs by one test set uses that set up: keep some rows that no choice has seen.",
)


@dataclass(frozen=True)
class Forgetting:
    """What stands on the plot's axis across: one value a run with its interval, and what it is, in words."""

    label: str
    left: str
    right: str
    values: tuple[tuple[float, float, float], ...]
    say: Callable[[float], str]
    shown: tuple[str, ...]
    note: str


def write_side_by_side(table: Table, rows: Sequence[Table], paths: Sequence[Path], out: Path) -> Path:
    """Write the page to `out` and return its path. Raises RunError if a run's evidence is unreadable."""
    records = [read(path) for path in paths]
    page = ""
    for most in (MOST_ROWS, 100, 20, 0):
        page = render(table, rows, records, most)
        if len(page.encode()) <= LIMIT:
            break
    out.parent.mkdir(parents=True, exist_ok=True)
    RunDir(out.parent).write_text(out.name, page)
    return out


def render(table: Table, rows: Sequence[Table], records: Sequence[Record], most: int = MOST_ROWS) -> str:
    """The page's HTML; everything that comes from data is escaped by jinja or by charts.tag."""
    table, rows = clean(table), clean(list(rows))
    marks = _marks(len(records))
    names = [f"{sign} · {line['run']}" for sign, line in zip(marks, table["runs"], strict=True)]
    gains = [_gain(record) for record in records]
    across = forgetting(records)
    return filled(
        "side_by_side.html", names=names, table=table, metric=words.name(table["metric"]),
        headline=headline(table, names), runs=_runs(table, records, names, gains, across),
        plot=_plot_figure(names, marks, gains, across), pairs=_pairs(table, names, records[0].margin),
        differ=_differ(table, rows, names, most), limits=LIMITS,
    )  # fmt: skip


def _marks(number: int) -> list[str]:
    letters = string.ascii_uppercase
    return [letters[i] if i < len(letters) else f"{letters[i % 26]}{i // 26}" for i in range(number)]


def _gain(record: Record) -> Measure:
    return next((m for m in record.measures if m.about == "task"), Measure("measure", "measure"))


# ---------------------------------------------------------------------------- words
def headline(table: Table, names: Sequence[str]) -> dict[str, str]:
    """Which run is best, and from how many others it can be told apart."""
    pairs, best = table["against_best"], names[table["best"]]
    behind = [pair for pair in pairs if pair["p_holm"] <= ALPHA]
    score = table["scores"][table["best"]]
    low, high = (_value(table, end) for end in score["ci95"])
    told = (
        f"{words.capital(words.name(table['metric']))} {_value(table, score['score'])} on {words.count(table['n'])} "
        f"held-out rows (95% interval {low} to {high})."
    )
    if len(behind) == len(pairs):
        others = "the other run" if len(pairs) == 1 else f"all {len(pairs)} other runs"
        return {"opening": f"{best} is better than {others}", "rest": told, "tone": "better", "word": "told apart"}
    same = [names[pair["run"]] for pair in pairs if pair not in behind]
    rest = f"{told} Of those that cannot be told apart, take the cheapest, or the one that keeps most."
    opening = f"{best} scores highest, but these rows cannot tell it from {_listed(same)}"
    return {"opening": opening, "rest": rest, "tone": "unclear", "word": "can't tell"}


def _listed(names: Sequence[str]) -> str:
    some = [*names[:3], f"{len(names) - 3} more"] if len(names) > 4 else list(names)
    return some[0] if len(some) == 1 else f"{', '.join(some[:-1])} and {some[-1]}"


def _value(table: Table, value: Any) -> str:
    return words.share(value) if table["proportion"] else words.number(value)


# ------------------------------------------------------------------ what was kept
def forgetting(records: Sequence[Record]) -> Forgetting | None:
    """The first of these that every run has: kept rows, general questions, how far it moved; None where none is."""
    return _kept_rows(records) or _questions(records) or _moved(records)


def _kept_rows(records: Sequence[Record]) -> Forgetting | None:
    sets = [{m.name: m for m in r.measures if m.about == "general" and m.key == _gain(r).key} for r in records]
    shared = [name for name in sets[0] if all(name in one for one in sets)]
    found = [one[shared[0]] for one in sets] if shared else []
    more = f" {len(shared) - 1} more such sets stand in the runs' own reports." if len(shared) > 1 else ""
    note = (
        f"Kept rows of the run's own choice: tuned minus before, {words.count(found[0].n) if found else 0} rows.{more}"
    )
    return _of_measures(found, f"change of {shared[0]}" if shared else "", note)


def _questions(records: Sequence[Record]) -> Forgetting | None:
    gauges = [record.gauge("probe")[0] for record in records]
    if not all(words.is_number(gauge.get("difference")) for gauge in gauges):
        return None
    found = [Measure.read({"name": "general questions", "proportion": True, **g}, 0.02) for g in gauges]
    return _of_measures(
        found, "general questions", f"{words.count(found[0].n)} packaged questions: fixed minus broken."
    )


def _of_measures(found: Sequence[Measure], label: str, note: str) -> Forgetting | None:
    if not found or any(m.difference is None for m in found):
        return None
    sign = 1.0 if found[0].higher_is_better else -1.0
    values = tuple(_turned(m, sign) for m in found)
    say = words.axis_points if found[0].in_points else words.change
    shown = tuple(_with_interval(m) for m in found)
    return Forgetting(label, "◀ lost", "kept or gained ▶", values, say, shown, note)


def _turned(m: Measure, sign: float) -> tuple[float, float, float]:
    middle = m.difference or 0.0
    low, high = (m.low, m.high) if m.low is not None and m.high is not None else (middle, middle)
    return sign * middle, *sorted((sign * low, sign * high))  # type: ignore[return-value]


def _moved(records: Sequence[Record]) -> Forgetting | None:
    sets = []
    for record in records:
        lines = map(mapping, sequence(record.gauge("divergence")[0].get("gauges")))
        sets.append({str(g.get("name")): g for g in lines if words.is_number(g.get("value"))})
    shared = [name for name in sets[0] if all(name in one for one in sets)]
    if not shared:
        return None
    found = [one[shared[0]] for one in sets]
    values = []
    for gauge in found:
        ends = [v for v in sequence(gauge.get("ci95")) if words.is_number(v)]
        values.append((float(gauge["value"]), *(ends if len(ends) == 2 else [gauge["value"]] * 2)))
    shown = tuple(f"{words.number(v)} ({words.number(low)} to {words.number(high)})" for v, low, high in values)
    label = f"{shared[0]}, on {found[0].get('on')}, {found[0].get('unit')}"
    note = "No run was asked what it lost: this is how far it moved from its base, and further is not worse by itself."
    return Forgetting(label, "moved little", "moved far ▶", tuple(values), words.number, shown, note)


# ---------------------------------------------------------------------------- tables
def _runs(table: Table, records: Sequence[Record], names: Sequence[str], gains: Sequence[Measure],
          across: Forgetting | None) -> Markup:  # fmt: skip
    kept = across.label if across else "other skills"
    heads = ("run", "method", "score (95% interval)", "gain (95% interval)", "gain over", "fixed", "broke", kept,
             "training", "weights trained")  # fmt: skip
    rows = []
    for i, (line, record, gain) in enumerate(zip(table["runs"], records, gains, strict=True)):
        flips, cost = (mapping(record.evidence.get(key)) for key in ("flips", "cost"))
        low, high = (_value(table, end) for end in table["scores"][i]["ci95"])
        trained, total = (cost.get(f"{key}_parameters") for key in ("trainable", "total"))
        share = words.share(trained / total) if words.is_number(trained) and words.is_number(total) and total else ""
        rows.append((
            names[i], line["method"], f"{_value(table, table['scores'][i]['score'])} ({low} to {high})",
            _with_interval(gain), line["baseline"], words.count(flips.get("fixed")),
            words.count(flips.get("broken")), across.shown[i] if across else words.UNKNOWN,
            words.duration(line["train_seconds"]), share or words.UNKNOWN,
        ))  # fmt: skip
    return charts.table(heads, rows, (2, 3, 5, 6, 7, 8, 9))


def _pairs(table: Table, names: Sequence[str], margin: float) -> Markup:
    """Every run against the best, on the same rows: a line each, and its table."""
    best = names[table["best"]]
    unit = {"proportion": table["proportion"], "higher_is_better": table["higher_is_better"]}
    found = []
    for pair in table["against_best"]:
        low, high = pair["ci95"]
        if pair["p_holm"] > ALPHA:  # the drawn line agrees with the corrected test
            low, high = min(low, 0.0), max(high, 0.0)
        row = {**unit, **pair, "n": table["n"], "ci95": [low, high], "name": "difference"}
        found.append((names[pair["run"]], pair, Measure.read(row, margin)))
    drawn = [_named(m, name) for name, _, m in found]
    rows = [
        (name, m.shown_difference, Measure.read({**unit, **pair, "name": "x"}, margin).interval, _p(pair["p"]),
         _p(pair["p_holm"]), "told apart" if pair["p_holm"] <= ALPHA else "can't tell", pair["method"])
        for name, pair, m in found
    ]  # fmt: skip
    heads = (f"run − {best}", "difference", "95% interval", "p", "p (Holm)", "finding", "how")
    message = f"Each run against {best}, row by row on the same {words.count(table['n'])} rows."
    key = tag("p", "Dot: difference. Line: 95% interval, drawn to 0 where the test corrected for all pairs (Holm) "
              "shows nothing. Grey band: the change you said does not matter.", class_="key")  # fmt: skip
    return charts.figure(message, charts.forest(drawn), charts.table(heads, rows, (1, 2, 3, 4)), key)


def _named(measure: Measure, name: str) -> Measure:
    return dataclasses.replace(measure, name=name)


def _p(p: float) -> str:
    return "< 0.001" if p < 0.001 else words.number(p)


def _with_interval(m: Measure) -> str:
    return f"{m.shown_difference} ({m.interval})" if m.interval else m.shown_difference


# ------------------------------------------------------------------------------ plot
def _plot_figure(
    names: Sequence[str], marks: Sequence[str], gains: Sequence[Measure], across: Forgetting | None
) -> Markup:
    if any(m.difference is None for m in gains):
        return charts.tag("p", "not measured: a run holds no gain", class_="absent")
    if across is None:
        why = (
            "not measured: what the runs lost (no kept rows, questions or movement that all of them have); gains alone:"
        )
        return Markup("").join([charts.tag("p", why, class_="absent"), charts.forest(list(gains))])
    rows = [(name, _with_interval(gain), shown) for name, gain, shown in zip(names, gains, across.shown, strict=True)]
    unit = ", in points" if gains[0].in_points else ""
    message = f"Gain at the task{unit} (up), against {across.label} (across). {across.note}"
    key = tag("p", "Cross: 95% intervals of both. Circle: better. Square: worse. Ring: unclear.", class_="key")
    picture = _plot(marks, gains, across)
    numbers = charts.table(("run", "gain (95% interval)", f"{across.label} (95% interval)"), rows, (1, 2))
    return charts.figure(message, picture, numbers, key)


def _plot(marks: Sequence[str], gains: Sequence[Measure], across: Forgetting) -> Markup:
    """One cross a run: up is gain, across is what was kept; the lines at 0 stand for the base."""
    sign = 1.0 if gains[0].higher_is_better else -1.0
    ups = [_turned(gain, sign) for gain in gains]
    along, up = _scale([v for point in across.values for v in point], LEFT), _scale([v for p in ups for v in p], 0.0)

    def height(value: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * (value - up.low) / ((up.high - up.low) or 1.0)

    say_up = words.axis_points if gains[0].in_points else words.change
    parts = _axes(along, up, height, across, say_up)
    named: dict[tuple[float, float], list[str]] = {}
    for name, gain, (x, x1, x2), (y, y1, y2) in zip(marks, gains, across.values, ups, strict=True):
        kind = gain.direction
        named.setdefault((round(along.share(x) / 3), round(height(y) / 14)), []).append(name)
        parts += [
            tag("line", x1=along.at(x1), x2=along.at(x2), y1=f"{height(y):.1f}", y2=f"{height(y):.1f}",
                class_=f"reach {kind}"),
            charts.vertical(along.at(x), height(y2), height(y1), f"reach {kind}"), mark(kind, along.at(x), height(y)),
        ]  # fmt: skip
    places = {name: place for place, group in named.items() for name in group[:1]}
    for name, (x, *_), (y, *_) in zip(marks, across.values, ups, strict=True):
        if name in places:  # runs that stand on one spot share a label
            said = ", ".join(named[places[name]])
            parts.append(tag("text", said, x=along.at(x), y=f"{height(y) - 10:.1f}", dx=10, class_="label"))
    return charts.drawing("Gain at the task against what was kept, one cross a run", int(BOTTOM) + 48, *parts)


def _axes(along: Scale, up: Scale, height: Callable[[float], float], across: Forgetting,
          say_up: Callable[[float], str]) -> list[Markup]:  # fmt: skip
    """Round values of both axes; the lines at 0 are dashed."""
    parts: list[Markup] = []
    for value in up.ticks(6):
        level, class_ = height(value), "grid" if abs(value) > 1e-12 else "zero"
        parts += [tag("line", x1=f"{LEFT - 1}%", x2="100%", y1=f"{level:.1f}", y2=f"{level:.1f}", class_=class_),
                  text("0%", level + 4, say_up(value), "tick")]  # fmt: skip
    for value in along.ticks(6):
        spot, class_ = along.at(value), "grid" if abs(value) > 1e-12 else "zero"
        lean = "end" if along.share(value) > 94 else "middle"
        parts += [charts.vertical(spot, TOP, BOTTOM, class_), text(spot, BOTTOM + 18, across.say(value), "tick", lean)]
    ends = (text(f"{LEFT}%", BOTTOM + 40, across.left, "tick"), text("100%", BOTTOM + 40, across.right, "tick", "end"))
    return [*parts, *ends]


def _scale(values: Sequence[float], left: float) -> Scale:
    low, high = min([0.0, *values]), max([0.0, *values])
    room = 0.08 * ((high - low) or 1.0)
    return Scale(low - room if low < 0 else low, high + room, left=left)


# ------------------------------------------------------------------------------ rows
def _differ(table: Table, rows: Sequence[Table], names: Sequence[str], most: int) -> dict[str, Any]:
    """The rows on which answers differ, with a sign where a row is right or wrong."""
    judged = table["proportion"] and all(v in (0.0, 1.0) for line in rows for v in line["scores"] if v is not None)
    fit = Fit(head=240, tail=0)
    shown = [
        {"row": str(line["row"]), "input": passage(line["input"], fit, "its text stands in the data"),
         "truth": passage(line["truth"], fit, "no right answer given"),
         "answers": [
             {"said": passage(answer, fit, "no answer"), "sign": _sign(score) if judged else ""}
             for answer, score in zip(line["answers"], line["scores"], strict=True)
         ]}
        for line in rows[:most]
    ]  # fmt: skip
    left = len(rows) - len(shown)
    more = f"{words.plural(left, 'more row')} not shown here, to keep the page small." if left > 0 else ""
    answer = f"{words.plural(len(rows), 'row')} of {words.count(table['n'])}."
    return {"answer": answer, "rows": shown, "more": more, "names": list(names)}


def _sign(score: float | None) -> str:
    return {1.0: "right", 0.0: "wrong"}.get(score if score is not None else -1.0, "")
