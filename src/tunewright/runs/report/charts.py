"""Inline SVG drawn by hand: row strip, forest plot, dumbbell, curve, confusion matrix, bars. Knows numbers, no run.

Widths are in percent and no viewBox scales the text, so a chart fits any screen and its words stay 12 px or more.
Colour is never alone: gains are blue circles, losses orange squares, what is unclear is a hollow ring, and each is
also a word. Every figure is a title, a sentence and its table (Chartability; docs/what-the-verdict-means.md, "Access").
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from tunewright.runs.report import words
from tunewright.runs.report.record import FEW_ROWS, Measure

STRIP = (
    ("kept_right", "kept right", "both right"),
    ("fixed", "fixed", "base wrong, tuned right"),
    ("broken", "broke", "base right, tuned wrong"),
    ("still_wrong", "still wrong", "both wrong"),
)
THINNEST = 0.4  # percent of the strip: one row in 10,000 must still be seen
MOST_POINTS = 240  # of a curve: more cannot be told apart on a screen
MOST_LABELS = 12  # in a matrix; the labels with most errors stay, the others are joined
MOST_PAIRS = 40  # rows of the table beside a matrix
NAME = 34  # characters of a label in a chart; its table has the whole


def tag(name: str, *children: Any, **attributes: Any) -> Markup:
    """An element with escaped attributes and children.

    In a key an inner underscore reads as a hyphen, a trailing one is dropped. An empty attribute is left out.
    """
    pairs = Markup("").join(
        Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), value)
        for key, value in attributes.items()
        if value != ""
    )
    if not children:
        return Markup("<{}{}/>").format(name, pairs)
    return Markup("<{0}{1}>{2}</{0}>").format(name, pairs, Markup("").join(children))


def drawing(title: str, height: int, *parts: Any, class_: str = "plot") -> Markup:
    """One <svg>, as wide as its place and `height` px high, with its title."""
    return tag("svg", tag("title", title), *parts, class_=class_, width="100%", height=height, role="img")


def text(x: Any, y: float, content: Any, class_: str = "", anchor: str = "") -> Markup:
    return tag("text", content, x=x, y=f"{y:g}", class_=class_, text_anchor=anchor)


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], numeric: Sequence[int] = ()) -> Markup:
    """A table whose cells name their column, so that a narrow screen can show each row as a card."""
    head = tag("tr", *(tag("th", c, scope="col", class_="num" if i in numeric else "") for i, c in enumerate(columns)))
    body = [
        tag("tr", *(
            tag("td", tag("span", cell, dir="auto"), data_label=columns[i], class_="num" if i in numeric else "")
            for i, cell in enumerate(row)
        ))
        for row in rows
    ]  # fmt: skip
    return tag("div", tag("table", tag("thead", head), tag("tbody", *body or [Markup("")])), class_="scroll")


def figure(message: str, picture: Markup, numbers: Markup, key: Markup | str = "") -> Markup:
    """A chart as people and screen readers get it: the sentence, the picture, the numbers behind a disclosure."""
    disclosure = tag("details", tag("summary", "The numbers as a table"), numbers, class_="numbers")
    return tag("figure", tag("figcaption", message), picture, key, disclosure)


@dataclass(frozen=True)
class Scale:
    """Values from `low` to `high` laid out from left to right, `left` to 98 percent of the width.

    `mirrored` puts the low values right, so that right is better for every measure.
    """

    low: float
    high: float
    mirrored: bool = False
    left: float = 2.0

    def share(self, value: float) -> float:
        way = (value - self.low) / ((self.high - self.low) or 1.0)
        return self.left + (98 - self.left) * min(1.0, max(0.0, 1 - way if self.mirrored else way))

    def at(self, value: float) -> str:
        return f"{self.share(value):.2f}%"

    def ticks(self, about: int = 5) -> list[float]:
        """Round values inside the scale, `about` as many as asked."""
        span = (self.high - self.low) or 1.0
        power = 10.0 ** math.floor(math.log10(span / about))
        step = next((m * power for m in (1, 2, 5, 10) if span / (m * power) <= about), 10 * power)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [index * step for index in range(first, last + 1)]


def mark(kind: str, x: str, y: float) -> Markup:
    """Better is a filled circle, worse a square, unclear a ring."""
    if kind == "worse":
        return tag("rect", x=x, y=f"{y - 6:g}", width=12, height=12, class_="mark worse", transform="translate(-6 0)")
    return tag("circle", cx=x, cy=f"{y:g}", r=6, class_=f"mark {kind}")


def vertical(x: str, top: float, bottom: float, class_: str) -> Markup:
    return tag("line", x1=x, x2=x, y1=f"{top:g}", y2=f"{bottom:g}", class_=class_)


def axis(scale: Scale, bottom: float, say: Any) -> list[Markup]:
    """The words of round values below the lanes; the outermost lean inwards."""
    return [text(scale.at(value), bottom + 18, say(value), "tick", _lean(scale, value)) for value in scale.ticks()]


def lane(scale: Scale, y: float) -> list[Markup]:
    """The ground of one mark: a faint line to slide on, and round values across it that run through no word."""
    ground = tag("line", x1="0%", x2="100%", y1=f"{y:g}", y2=f"{y:g}", class_="grid")
    return [ground, *(vertical(scale.at(value), y - 12, y + 12, "grid") for value in scale.ticks())]


def _lean(scale: Scale, value: float) -> str:
    place = scale.share(value)
    return "" if place < scale.left + 4 else "end" if place > 94 else "middle"


# ---------------------------------------------------------------- all rows in one strip
def row_strip(counts: dict[str, int]) -> Markup:
    """All rows in four blocks, to scale: kept right, fixed, broke, still wrong. The tiles beneath carry the counts."""
    total = sum(counts.values())
    raw = [max(100 * counts[key] / total, THINNEST) if counts[key] else 0.0 for key, _, _ in STRIP]
    widths = [100 * width / sum(raw) for width in raw]
    starts = itertools.accumulate([0.0, *widths])
    blocks = [
        tag("rect", tag("title", f"{word}: {words.plural(counts[key], 'row')}"), x=f"{start:.3f}%", y=0,
            width=f"{width:.3f}%", height=56, class_=f"block {key}")
        for (key, word, _), start, width in zip(STRIP, starts, widths, strict=False) if counts[key]
    ]  # fmt: skip
    said = ", ".join(f"{word} {words.count(counts[key])}" for key, word, _ in STRIP)
    return drawing(f"All {words.plural(total, 'row')}: {said}", 56, _patterns(), *blocks, class_="plot strip")


def _patterns() -> Markup:
    """Stripes for what broke and dots for what stayed wrong: both survive grey print."""
    stripes = tag("pattern", tag("rect", width=8, height=8, class_="broken-ground"),
                  tag("path", d="M-2 2 2-2M0 8 8 0M6 10 10 6", class_="broken-stripe"),
                  id="stripes", width=8, height=8, patternUnits="userSpaceOnUse")  # fmt: skip
    dots = tag("pattern", tag("rect", width=8, height=8, class_="wrong-ground"),
               *(tag("circle", cx=at, cy=at, r="1.2", class_="wrong-dot") for at in (2, 6)),
               id="dots", width=8, height=8, patternUnits="userSpaceOnUse")  # fmt: skip
    return tag("defs", stripes, dots)


def swatch(key: str, word: str) -> Markup:
    block = tag("rect", x="0.75", y="0.75", width="16.5", height="16.5", rx=3, class_=f"block {key}")
    return tag("svg", tag("title", f"colour and pattern of: {word}"), block, width=18, height=18, class_="swatch")


# ---------------------------------------------------------------- differences with intervals
def forest(measures: Sequence[Measure]) -> Markup:
    """One line per measure of the same unit: its difference with the 95% interval, zero, and the margin as a band."""
    step, scale = 60, _difference_scale(measures)
    bottom = step * len(measures)
    say = words.axis_points if measures[0].in_points else words.change
    parts = list(itertools.chain.from_iterable(_forest_line(m, scale, step * i) for i, m in enumerate(measures)))
    parts += [
        *axis(scale, bottom, say),
        text("0%", bottom + 38, "◀ worse", "tick"),
        text("100%", bottom + 38, "better ▶", "tick", "end"),
    ]
    return drawing(f"Difference with 95% interval: {', '.join(m.name for m in measures)}", bottom + 46, *parts)


def _difference_scale(measures: Sequence[Measure]) -> Scale:
    ends = [v for m in measures for v in (m.low, m.high, m.difference) if v is not None]
    margin = measures[0].margin
    shown = margin if measures[0].in_points or max(map(abs, ends), default=margin) >= margin else 0.0
    low, high = min([*ends, -1.5 * shown, 0.0]), max([*ends, 1.5 * shown, 0.0])
    room = 0.06 * ((high - low) or 1.0)
    return Scale(low - room, high + room, mirrored=not measures[0].higher_is_better)


def _forest_line(measure: Measure, scale: Scale, top: float) -> list[Markup]:
    few = measure.about == "group" and measure.n is not None and measure.n < FEW_ROWS
    finding = f"too few rows ({words.count(measure.n)})" if few else measure.finding
    kind = "faint" if few else measure.direction
    y = top + 40
    left, right = sorted((scale.share(-measure.margin), scale.share(measure.margin)))
    parts = [text("0%", top + 18, words.short(measure.name, NAME), "label"),
             text("100%", top + 18, f"{measure.shown_difference}, {finding}", f"value {kind}", "end"),
             tag("rect", x=f"{left:.2f}%", width=f"{right - left:.2f}%", y=f"{y - 12:g}", height=24, class_="band"),
             *lane(scale, y), vertical(scale.at(0), y - 12, y + 12, "zero")]  # fmt: skip
    if measure.difference is None:
        return parts
    if measure.low is not None and measure.high is not None:
        parts.append(tag("line", x1=scale.at(measure.low), x2=scale.at(measure.high), y1=f"{y:g}", y2=f"{y:g}",
                         class_=f"reach {kind}"))  # fmt: skip
        parts += [vertical(scale.at(end), y - 5, y + 5, f"reach {kind}") for end in (measure.low, measure.high)]
    return [*parts, mark(kind, scale.at(measure.difference), y)]


# ---------------------------------------------------------------- before and after
def dumbbell(rows: Sequence[tuple[str, float, float]], title: str) -> Markup:
    """Shares of base (ring) and tuned (filled) per line, joined; the axis runs from 0% to 100%."""
    step, scale = 54, Scale(0.0, 1.0)
    parts: list[Markup] = []
    for index, (name, base, tuned) in enumerate(rows):
        y = step * index + 36
        kind = "better" if tuned > base else "worse" if tuned < base else "unclear"
        parts += [
            text("0%", y - 20, words.short(name, NAME), "label"),
            text("100%", y - 20, f"{words.share(base)} → {words.share(tuned)}", "value", "end"), *lane(scale, y),
            tag("line", x1=scale.at(base), x2=scale.at(tuned), y1=y, y2=y, class_=f"reach {kind}"),
            mark("unclear", scale.at(base), y), mark("better" if kind == "unclear" else kind, scale.at(tuned), y),
        ]  # fmt: skip
    bottom = step * len(rows)
    return drawing(title, bottom + 26, *parts, *axis(scale, bottom, words.axis_share))


def bars(rows: Sequence[tuple[str, float]], title: str) -> Markup:
    """Counts as bars from zero."""
    most = max((value for _, value in rows), default=1) or 1
    parts: list[Markup] = []
    for index, (name, value) in enumerate(rows):
        y = 4 + 40 * index
        parts += [text("0%", y + 13, words.short(name, NAME), "label"),
                  text("100%", y + 13, words.count(value), "value", "end"),
                  tag("rect", x=0, y=y + 20, width="100%", height=8, rx=4, class_="track"),
                  tag("rect", x=0, y=y + 20, width=f"{100 * value / most:.2f}%", height=8, rx=4,
                      class_="bar")]  # fmt: skip
    return drawing(title, 8 + 40 * len(rows), *parts)


# ---------------------------------------------------------------- learning curves
@dataclass(frozen=True)
class Series:
    """One line of a curve: `kind` is `training` (solid, thin and its running mean) or `validation` (dashed, dots)."""

    name: str
    kind: str
    points: tuple[tuple[float, float], ...]


def curve(series: Sequence[Series], title: str, share: bool) -> Markup:
    """Values over steps, the value axis from zero. `share` says that values lie in [0, 1]."""
    values = [y for line in series for _, y in line.points]
    steps = [x for line in series for x, _ in line.points]
    up = Scale(min(0.0, *values), 1.0 if share and max(values) <= 1 else 1.08 * max(max(values), 1e-9))
    along = Scale(min(steps), max(max(steps), min(steps) + 1), left=11.0)  # values stand in the gutter
    top, bottom = 12.0, 232.0

    def height(value: float) -> float:
        return bottom - (bottom - top) * (value - up.low) / ((up.high - up.low) or 1.0)

    parts: list[Markup] = []
    for value in up.ticks(4):
        line = tag("line", x1="10%", x2="100%", y1=f"{height(value):.1f}", y2=f"{height(value):.1f}", class_="grid")
        parts += [
            line,
            text("0%", height(value) + 4, words.axis_share(value) if share else words.number(value), "tick"),
        ]
    for value in along.ticks(4):
        parts.append(text(along.at(value), bottom + 18, f"step {words.count(value)}", "tick", _lean(along, value)))
    for line_ in series:
        parts += _line(line_, along, height, bottom)
    return drawing(title, int(bottom) + 28, *parts)


def _line(line: Series, along: Scale, height: Any, bottom: float) -> list[Markup]:
    raw = thin(line.points)
    smooth = running_mean(raw) if line.kind == "training" and len(raw) > 20 else raw

    def path(points: Sequence[tuple[float, float]], class_: str) -> Markup:
        # the inner viewBox stretches x from 0 to 1000; y stays in px, and strokes keep their width
        corners = " ".join(f"{10 * along.share(x):.1f},{height(y):.1f}" for x, y in points)
        return tag("polyline", points=corners, class_=class_, vector_effect="non-scaling-stroke")

    lines = [path(raw, f"line {line.kind} raw")] if smooth is not raw else []
    inner = tag("svg", tag("title", line.name), *lines, path(smooth, f"line {line.kind}"), x=0, y=0, width="100%",
                height=f"{bottom:g}", viewBox=f"0 0 1000 {bottom:g}", preserveAspectRatio="none")  # fmt: skip
    show_dots = line.kind != "training" or len(raw) <= 20
    dots = [tag("circle", cx=along.at(x), cy=f"{height(y):.1f}", r=4, class_=f"dot {line.kind}") for x, y in raw]
    return [inner, *(dots if show_dots and len(raw) <= 60 else [])]


def thin(points: Sequence[tuple[float, float]], most: int = MOST_POINTS) -> list[tuple[float, float]]:
    """At most `most` points: means of neighbours, the first and the last kept as they are."""
    if len(points) <= most:
        return list(points)
    inner, cells = points[1:-1], most - 2
    means = []
    for cell in range(cells):
        part = inner[cell * len(inner) // cells : (cell + 1) * len(inner) // cells]
        means.append((sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)))
    return [points[0], *means, points[-1]]


def running_mean(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Each value as the mean of a window around it, an eighth of the curve wide and narrower at its ends."""
    half = max(1, len(points) // 16)
    smooth = []
    for index, (x, _) in enumerate(points):
        reach = min(half, index, len(points) - 1 - index)
        near = points[index - reach : index + reach + 1]
        smooth.append((x, sum(y for _, y in near) / len(near)))
    return smooth


# ---------------------------------------------------------------- who is taken for whom
def matrix(labels: Sequence[str], counts: Sequence[Sequence[int]], who: str) -> Markup:
    """Counts by truth (row) and answer (column); the shade is the share of the row, the outlined diagonal is right."""
    gutter, cell, top = 30.0, 40, 46
    width = (100 - gutter) / len(labels)
    parts = [text("0%", 14, "truth ↓", "tick"), text("100%", 14, f"answer of the {who} model →", "tick", "end")]
    for j, label in enumerate(labels):
        heading = words.short(label, 12) if len(labels) < 4 else str(j + 1)
        parts.append(text(f"{gutter + width * (j + 0.5):.2f}%", 36, heading, "label", "middle"))
    for i, row in enumerate(counts):
        name = labels[i] if len(labels) < 4 else f"{i + 1} {labels[i]}"
        parts.append(text("0%", top + cell * i + 25, words.short(name, 17), "label"))
        parts += [
            _cell(row, i, j, f"{gutter + width * j:.2f}%", f"{width:.2f}%", top + cell * i, cell)
            for j in range(len(labels))
        ]
        parts += [
            text(
                f"{gutter + width * (j + 0.5):.2f}%",
                top + cell * i + 25,
                words.count(value),
                "cell" if value else "cell none",
                "middle",
            )
            for j, value in enumerate(row)
        ]
    return drawing(f"Confusion matrix of the {who} model", top + cell * len(labels) + 4, *parts)


def _cell(row: Sequence[int], i: int, j: int, x: str, width: str, y: float, height: int) -> Markup:
    shade = 0.45 * row[j] / (sum(row) or 1)  # darker than this, the number on it falls below 4.5:1
    return tag("rect", x=x, y=f"{y + 2:g}", width=width, height=height - 4, rx=3, fill_opacity=f"{shade:.3f}",
               class_="right" if i == j else "mistaken")  # fmt: skip


def joined(labels: Sequence[str], base: Sequence[Sequence[int]], tuned: Sequence[Sequence[int]]) -> tuple[
    list[str], list[list[int]], list[list[int]]
]:  # fmt: skip
    """The labels with most errors, and one line for all others, where a matrix would have too many."""
    if len(labels) <= MOST_LABELS:
        return list(labels), [list(row) for row in base], [list(row) for row in tuned]
    span = range(len(labels))
    errors = {i: sum(m[i][j] + m[j][i] for m in (base, tuned) for j in span if i != j) for i in span}
    shown = sorted(sorted(span, key=lambda i: -errors[i])[: MOST_LABELS - 1])
    place = {i: shown.index(i) if i in shown else len(shown) for i in span}

    def fold(counts: Sequence[Sequence[int]]) -> list[list[int]]:
        small = [[0] * (len(shown) + 1) for _ in range(len(shown) + 1)]
        for i, j in itertools.product(span, span):
            small[place[i]][place[j]] += counts[i][j]
        return small

    return [*(labels[i] for i in shown), f"{len(labels) - len(shown)} others"], fold(base), fold(tuned)


def pairs(
    labels: Sequence[str], base: Sequence[Sequence[int]], tuned: Sequence[Sequence[int]]
) -> list[tuple[str, str, int, int]]:
    """(truth, answer, base, tuned) of every mix-up, those of the tuned model first, at most `MOST_PAIRS`."""
    span = range(len(labels))
    found = [
        (labels[i], labels[j], base[i][j], tuned[i][j])
        for i in span
        for j in span
        if i != j and base[i][j] + tuned[i][j]
    ]
    return sorted(found, key=lambda pair: (-pair[3], -pair[2], pair[0], pair[1]))[:MOST_PAIRS]
