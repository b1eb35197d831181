"""Inline SVG for the gauges: groups with intervals, slopes over messier input, reliability, error beside its floor.

Same rules as charts.py: widths in percent, no scaled text, shape and word beside colour. Base is a ring and a dashed
line, tuned is filled and solid. Knows numbers, no run.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from tunewright.runs.report import words
from tunewright.runs.report.charts import NAME, Scale, axis, drawing, lane, mark, tag, text, vertical
from tunewright.runs.report.record import sequence

Say = Callable[[float], str]
Part = dict[str, Any]  # answer: one sentence; sections: (title, [figures and paragraphs])
BASE_AND_TUNED = (("ring", "base"), ("filled", "tuned"), ("line", "95% interval"))
DASHED_AND_SOLID = (
    ("dashed line with rings", "base"),
    ("solid line, filled", "tuned"),
    ("upright line", "95% interval"),
)


@dataclass(frozen=True)
class Span:
    """One line of `spans`: base and tuned, each a value with its interval (low, high), and what is said of them."""

    name: str
    base: tuple[float, float, float]
    tuned: tuple[float, float, float]
    said: str
    kind: str = "unclear"  # better, worse, unclear, faint


def spans(rows: Sequence[Span], scale: Scale, title: str, say: Say) -> Markup:
    """Two lanes a row: base as a ring, tuned as a filled mark, each on its 95% interval."""
    step = 72
    parts: list[Markup] = []
    for index, row in enumerate(rows):
        top = step * index
        parts += [text("0%", top + 16, words.short(row.name, NAME), "label"),
                  text("100%", top + 16, row.said, f"value {row.kind}", "end")]  # fmt: skip
        for (value, low, high), y, filled in ((row.base, top + 34, False), (row.tuned, top + 54, True)):
            kind = row.kind if filled and row.kind != "unclear" else "tuned" if filled else "unclear"
            kind = "faint" if row.kind == "faint" else kind
            reach = tag("line", x1=scale.at(low), x2=scale.at(high), y1=y, y2=y, class_=f"reach {kind}")
            parts += [*lane(scale, y), reach, *(vertical(scale.at(end), y - 4, y + 4, f"reach {kind}")
                                                for end in (low, high)), mark(kind, scale.at(value), y)]  # fmt: skip
    bottom = step * len(rows)
    return drawing(title, bottom + 26, *parts, *axis(scale, bottom, say))


@dataclass(frozen=True)
class Slope:
    """One line of `slopes`: (place on the axis, value, low, high) from left to right."""

    name: str
    kind: str  # "training": solid, filled; "validation": dashed, rings
    points: tuple[tuple[float, float, float, float], ...]


TOP, BOTTOM = 12.0, 232.0


def slopes(lines: Sequence[Slope], title: str, scale: Scale, places: Sequence[str], say: Say) -> Markup:
    """Values over named places, each with its interval; the value axis is `scale`, from zero for shares."""
    along = Scale(0.0, len(places) - 1.0, left=11.0)

    def at(place: float) -> str:  # room for the outermost marks and words
        return f"{11 + 4 + 0.94 * (along.share(place) - 11):.2f}%"

    parts = _ground(scale, say)
    parts += [text(at(i), BOTTOM + 18, name, "tick", "middle") for i, name in enumerate(places)]
    parts += _traces(lines, at, scale)
    return drawing(title, int(BOTTOM) + 28, *parts)


def _traces(lines: Sequence[Slope], at: Callable[[float], str], scale: Scale) -> list[Markup]:
    """Each line with its points and their intervals; two lines stand a little apart, so that none hides the other."""
    parts: list[Markup] = []
    for shift, line in zip((-3, 3), lines, strict=False):
        for (x1, y1, *_), (x2, y2, *_) in itertools.pairwise(line.points):
            parts.append(tag("line", x1=at(x1), x2=at(x2), y1=_height(scale, y1), y2=_height(scale, y2),
                             class_=f"line {line.kind}", transform=f"translate({shift} 0)"))  # fmt: skip
        for x, y, low, high in line.points:
            reach = vertical(at(x), float(_height(scale, high)), float(_height(scale, low)), f"whisker {line.kind}")
            dot = tag("circle", cx=at(x), cy=_height(scale, y), r=5, class_=f"dot {line.kind}")
            parts.append(tag("g", reach, dot, transform=f"translate({shift} 0)"))
    return parts


def _height(scale: Scale, value: float) -> str:
    share = (value - scale.low) / ((scale.high - scale.low) or 1.0)
    return f"{BOTTOM - (BOTTOM - TOP) * min(1.0, max(0.0, share)):.1f}"


def _ground(scale: Scale, say: Say) -> list[Markup]:
    """Lines across at round values, their words in the gutter."""
    parts: list[Markup] = []
    for value in scale.ticks(5):
        y = _height(scale, value)
        parts += [
            tag("line", x1="10%", x2="100%", y1=y, y2=y, class_="grid"),
            text("0%", float(y) + 4, say(value), "tick"),
        ]
    return parts


# ------------------------------------------------------------------- confidence
def reliability(lines: Sequence[Slope], title: str) -> Markup:
    """Share right over confidence; on the dashed diagonal both agree, below it the model is too sure."""
    scale, along = Scale(0.0, 1.0), Scale(0.0, 1.0, left=11.0)
    parts = _ground(scale, words.axis_share)
    parts.append(tag("line", x1=along.at(0), x2=along.at(1), y1=_height(scale, 0), y2=_height(scale, 1), class_="zero"))
    for value in (0.0, 0.25, 0.5, 0.75, 1.0):
        lean = "end" if value == 1 else "middle" if value else ""
        parts.append(text(along.at(value), BOTTOM + 18, words.axis_share(value), "tick", lean))
    parts += _traces(lines, along.at, scale)
    parts += [text("55%", BOTTOM + 36, "how sure it said it was", "tick", "middle"),
              text("0%", BOTTOM + 36, "share right ↑", "tick")]  # fmt: skip
    return drawing(title, int(BOTTOM) + 44, *parts)


def floors(rows: Sequence[tuple[str, float, float, str, str]], title: str) -> Markup:
    """Errors as marks, each over the grey band that chance alone fills: (name, error, end of the band, said, kind)."""
    scale, step = Scale(0.0, max([0.1, *(1.1 * v for _, error, end, _, _ in rows for v in (error, end))])), 54
    parts: list[Markup] = []
    for index, (name, error, end, said, kind) in enumerate(rows):
        y = step * index + 36
        width = scale.share(end) - scale.share(0)
        parts += [
            text("0%", y - 20, words.short(name, NAME), "label"), text("100%", y - 20, said, f"value {kind}", "end"),
            tag("rect", x=scale.at(0), width=f"{width:.2f}%", y=y - 12, height=24, class_="band"), *lane(scale, y),
            mark(kind, scale.at(error), y),
        ]  # fmt: skip
    bottom = step * len(rows)
    return drawing(title, bottom + 26, *parts, *axis(scale, bottom, lambda value: words.number(100 * round(value, 9))))


# ------------------------------------------------------- what the files say, in words
def key(*signs: tuple[str, str]) -> Markup:
    """What the marks mean, in words."""
    return tag("p", "; ".join(f"{sign}: {meaning}" for sign, meaning in signs) + ".", class_="key")


def place(value: Any) -> float:
    """A number from a file, 0 where it is none."""
    return float(value) if words.is_number(value) else 0.0


def ends(value: Any) -> tuple[float, float]:
    """The two ends of an interval in a file."""
    low, high = [*sequence(value), None, None][:2]
    return place(low), place(high)


def p_value(value: Any) -> str:
    return "" if not words.is_number(value) else "< 0.001" if value < 0.001 else words.number(value)


def unit_of(found: dict[str, Any]) -> dict[str, Any]:
    return {key: found[key] for key in ("higher_is_better", "proportion") if key in found}


def absent(reason: str) -> Markup:
    return tag("p", f"not measured: {reason}", class_="absent")


def said(sentence: str) -> Markup:
    return tag("p", words.sentence(sentence), dir="auto")
