"""Does it hold when input is messy? Base and tuned on the same messy rows, against the same rows clean.

Two looks: each row with one kind of mess, drawn by its id, in five strengths; and every kind alone at the middle
strength. Knows kinds of fields, never a task: what `Field.kind` has a mess for in MESSES is messed up.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tunewright.contracts import Prediction, Record
from tunewright.data import perturb_images, perturb_text
from tunewright.data.batches import derive_seed
from tunewright.metrics import statistics
from tunewright.runs.evidence.sides import NotRun, Sides

PASSES = True
ABOUT = "messy input"
MIDDLE = 3  # the strength at which kinds are compared
MOST_ROWS, FEWEST_ROWS = 150, 15  # rows drawn from the held-out ones
ALPHA = 0.05
EXAMPLES = 8

Mess = Callable[[Any, str, int, np.random.Generator, Collection[str], Path], Any]


# ------------------------------------------------------------------ mess by kind of field
def _text(value: str, edit: str, severity: int, rng: np.random.Generator, keep: Collection[str], room: Path) -> str:
    return perturb_text.perturb(value, edit, severity, rng, keep)


def _conversation(
    value: list[dict[str, str]], edit: str, severity: int, rng: np.random.Generator, keep: Collection[str], room: Path
) -> list[dict[str, str]]:
    """The last question; what was answered stays as it is."""
    asked = [place for place, message in enumerate(value) if message["role"] == "user"]
    if not asked:
        return value
    new = perturb_text.perturb(value[asked[-1]]["content"], edit, severity, rng, keep)
    return [m | {"content": new} if place == asked[-1] else m for place, m in enumerate(value)]


def _image(value: str, kind: str, severity: int, rng: np.random.Generator, keep: Collection[str], room: Path) -> str:
    """The path of a messy copy in `room`."""
    from PIL import Image, ImageOps

    with Image.open(value) as opened:
        picture = ImageOps.exif_transpose(opened).convert("RGB")
    path = room / f"{derive_seed(value, kind, severity)}.png"
    perturb_images.perturb(picture, kind, severity, rng).save(path, compress_level=1)
    return str(path)


MESSES: dict[str, tuple[Mess, tuple[str, ...]]] = {
    "text": (_text, tuple(perturb_text.EDITS)),
    "conversation": (_conversation, tuple(perturb_text.EDITS)),
    "image": (_image, tuple(perturb_images.KINDS)),
}


@dataclass(frozen=True)
class Messy:
    """Makes rows messy, the same way for every model: the generator depends on seed, row and kind, not on strength."""

    field: str
    mess: Mess
    kinds: tuple[str, ...]
    keep: frozenset[str]
    seed: int
    room: Path

    def row(self, record: Record, kind: str, severity: int) -> Record | None:
        """The record with its field messed up; None where this kind finds nothing to do in it."""
        rng = np.random.default_rng(derive_seed(self.seed, "mess", kind, record["row"]))
        new = self.mess(record[self.field], kind, severity, rng, self.keep, self.room)
        return None if new == record[self.field] else record | {self.field: new}

    def kind_of(self, record: Record) -> str | None:
        """The one kind for a row that is messed up once: the first, in an order of its own, that finds a place."""
        order = np.random.default_rng(derive_seed(self.seed, "kind", record["row"])).permutation(len(self.kinds))
        named = (self.kinds[int(i)] for i in order)
        return next((kind for kind in named if self.row(record, kind, MIDDLE) is not None), None)


# ------------------------------------------------------------------------- the gauge
def measure(sides: Sides) -> dict[str, Any]:
    """Scores by strength and by kind of mess, each beside the clean score of the same rows."""
    field, kind = _field(sides)
    if len(sides.test) < FEWEST_ROWS:
        raise NotRun(f"{len(sides.test)} held-out rows are fewer than {FEWEST_ROWS}")
    if any(sides.task.truth(record) is None for record in sides.test):
        raise NotRun("what is read here is also what is predicted: a messy text has another right answer")
    asking = _Asking.of(sides)
    mess, kinds = MESSES[kind]
    keep = frozenset(word.lower() for label in sides.loaded.labels for word in perturb_text.WORD.findall(label))
    places = _drawn(sides, len(kinds) + len(perturb_text.SEVERITIES))
    with tempfile.TemporaryDirectory() as room:
        messy = Messy(field, mess, kinds, keep, sides.seed, Path(room))
        severities = by_severity(asking, messy, places)
        alone = by_kind(asking, messy, places)
    return {
        "metric": asking.metric.name, "higher_is_better": asking.metric.higher_is_better,
        "proportion": asking.metric.proportion, "field": field, "kind": kind, "n": len(places), "of": len(sides.test),
        "middle": MIDDLE, "severities": severities, "kinds": alone, "worst": _worst(alone, asking.sign),
    }  # fmt: skip


def _field(sides: Sides) -> tuple[str, str]:
    found = [(name, field.kind) for name, field in sides.task.fields.items() if field.kind in MESSES]
    if not found:
        kinds = ", ".join(sorted({field.kind for field in sides.task.fields.values()}))
        raise NotRun(f"no mess is known for fields of this kind ({kinds})")
    return found[0]


def _drawn(sides: Sides, times: int) -> list[int]:
    """Places of the held-out rows that are asked: drawn by row id, so that they stay when other rows come."""
    order = sorted(range(len(sides.test)), key=lambda i: derive_seed(sides.seed, "robustness", sides.test[i]["row"]))
    most = sides.affordable(times, [sides.test[i] for i in order])
    return sorted(order[: min(MOST_ROWS, max(FEWEST_ROWS, most))])


@dataclass(frozen=True)
class _Asking:
    """How both sides answer messy rows and are scored: by the first metric, in short where answers are long texts."""

    sides: Sides
    metric: Any
    short: bool

    @classmethod
    def of(cls, sides: Sides) -> _Asking:
        metric = next((m for m in sides.task.metrics if m.pool is None), None)
        if metric is None:
            raise NotRun("this task's metrics exist for all rows together only")
        short = any("text" in answer for answer in sides.after)
        if short and sides.base is None:
            raise NotRun("the base is no model here, and its full answers take too long")
        return cls(sides, metric, short)

    @property
    def sign(self) -> float:
        return 1.0 if self.metric.higher_is_better else -1.0

    def scores(self, records: Sequence[Record]) -> tuple[list[float], list[float]]:
        """Base and tuned, row by row."""
        sides, answers = self.sides, []
        answers.append(sides.answers(sides.base, records, True) if self.short and sides.base is not None
                       else sides.baseline.predict(records))  # fmt: skip
        answers.append(sides.answers(sides.tuned, records, self.short))
        base, tuned = (self._values(side, records) for side in answers)
        return base, tuned

    def clean(self, places: Sequence[int]) -> tuple[list[float], list[float]]:
        """The same for rows as they are, which were answered before."""
        rows = [self.sides.test[place] for place in places]
        base, tuned = (self._values([side[p] for p in places], rows) for side in (self.sides.before, self.sides.after))
        return base, tuned

    def _values(self, answers: Sequence[Prediction], records: Sequence[Record]) -> list[float]:
        return [float(scores[self.metric.name]) for scores in self.sides.scores(answers, records)]

    def units(self, places: Sequence[int]) -> list[Any] | None:
        group = self.sides.group
        return [self.sides.test[p]["extra"].get(group) for p in places] if group else None


def by_severity(asking: _Asking, messy: Messy, places: Sequence[int]) -> list[dict[str, Any]]:
    """Clean (0) and each strength: both scores, the tuned model's gain over the base, and what mess cost each side.

    Only rows in which some kind finds a place.
    """
    kinds = {place: messy.kind_of(asking.sides.test[place]) for place in places}
    kept = [place for place in places if kinds[place] is not None]
    if not kept:
        raise NotRun("no row has anything that could be messed up")
    clean, units = asking.clean(kept), asking.units(kept)
    lines = [_line(asking, 0, clean, clean, units)]
    for severity in perturb_text.SEVERITIES:
        rows = [messy.row(asking.sides.test[p], str(kinds[p]), severity) or asking.sides.test[p] for p in kept]
        lines.append(_line(asking, severity, clean, asking.scores(rows), units))
    return lines


def by_kind(asking: _Asking, messy: Messy, places: Sequence[int]) -> list[dict[str, Any]]:
    """Each kind alone, on the rows in which it finds a place; what it cost, corrected for asking about all (Holm)."""
    lines: list[dict[str, Any]] = []
    for kind in messy.kinds:
        made = {place: messy.row(asking.sides.test[place], kind, MIDDLE) for place in places}
        rows = {place: record for place, record in made.items() if record is not None}
        if not rows:
            lines.append({"kind": kind, "n": 0})
            continue
        kept = list(rows)
        found = _line(asking, MIDDLE, asking.clean(kept), asking.scores(list(rows.values())), asking.units(kept))
        lines.append({"kind": kind, **found})
    asked = [line["cost"]["tuned"] for line in lines if line["n"] >= FEWEST_ROWS]
    for line, p in zip(asked, statistics.holm([one["p"] for one in asked]), strict=True):
        line["p_holm"] = p
    return lines


def _line(asking: _Asking, severity: int, clean: Sequence[list[float]], messy: Sequence[list[float]],
          units: list[Any] | None) -> dict[str, Any]:  # fmt: skip
    seed = asking.sides.seed
    gain = statistics.compare(messy[0], messy[1], groups=units, seed=seed)
    costs = [statistics.compare(clean[side], messy[side], groups=units, seed=seed) for side in (0, 1)]
    # per row: what mess changed at the tuned model beyond what it changed at the base
    moved = [np.subtract(messy[side], clean[side]) for side in (0, 1)]
    beyond = statistics.compare(moved[0], moved[1], groups=units, seed=seed)
    return {
        "severity": severity, "n": gain.n, "base": gain.base, "tuned": gain.tuned,
        "base_ci95": list(statistics.mean_interval(messy[0])), "tuned_ci95": list(statistics.mean_interval(messy[1])),
        "gain": _paired(gain), "cost": {side: _paired(c) for side, c in zip(("base", "tuned"), costs, strict=True)},
        "beyond_base": _paired(beyond),
    }  # fmt: skip


def _paired(found: statistics.Paired) -> dict[str, Any]:
    return {"difference": found.difference, "ci95": list(found.ci95), "p": found.p, "method": found.method}


def _worst(lines: Sequence[dict[str, Any]], sign: float) -> str | None:
    """The kind that cost the tuned model most, if any cost it something beyond chance."""
    shown = [line for line in lines if line["n"] >= FEWEST_ROWS and line["cost"]["tuned"]["p_holm"] <= ALPHA]
    worse = [line for line in shown if sign * line["cost"]["tuned"]["difference"] < 0]
    return min(worse, key=lambda line: sign * line["cost"]["tuned"]["difference"])["kind"] if worse else None
