"""What in the row does an answer rest on? Base and tuned side by side, for rows that changed sides.

One word is left out, or one region of a picture greyed, and both models are asked again: what the log-odds of each
model's own answer lose, the answer rests on, and most plainly where the answer turns. Occlusion: Zeiler and Fergus
2014, arXiv 1311.2901, section 4.2; words left out: Li 2016, arXiv 1612.08220. Says on what, never why; words that work
only together are not seen one by one. Knows kinds of fields (as robustness.py does), never a task.
"""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunewright.contracts import Prediction, Record
from tunewright.data.batches import derive_seed
from tunewright.metrics import statistics
from tunewright.runs.evidence.flipped import Flip, flips
from tunewright.runs.evidence.sides import NotRun, Sides

PASSES = True
ABOUT = "which words or regions an answer rests on"
MOST_FLIPS, FEWEST_FLIPS = 10, 2
MOST_PICTURES = 5  # each is opened a hundred times
MOST_PIECES = 40  # of a text; longer ones are taken in stretches of as many words as it needs
GRID = 7  # a picture in 7 x 7 regions
SIDE = 640  # pixels: larger pictures are made smaller first, the same way for both models
GREY = (128, 128, 128)
CLEAR = 0.1  # nats: below that no piece is said to matter
SURE = 1e-6  # probabilities closer to 0 or 1 have rounded away
LIMITS = (
    "A row without one of its words is a row that nobody wrote: the model may answer it oddly for that alone.",
    "Words that carry an answer only together each look unimportant here.",
    "What an answer rests on is not why it was learnt.",
)


@dataclass(frozen=True)
class Occluded:
    """A row as both models are asked about it, and once without each of its pieces."""

    whole: Record
    without: list[Record]
    facts: dict[str, Any]  # how to show the pieces: "pieces" of a text in order, or the "grid" of a picture


Occlude = Callable[[Record, str, Path], Occluded | None]


# ------------------------------------------------------------------ pieces by kind of field
def stretches(text: str) -> list[str]:
    """A text in at most MOST_PIECES pieces of as many words each, blanks and all: joined, they are the text."""
    words = re.findall(r"\s*\S+\s*?(?=\s|$)", text)
    tail = text[sum(map(len, words)) :]
    each = -(-len(words) // MOST_PIECES) or 1
    pieces = ["".join(words[i : i + each]) for i in range(0, len(words), each)]
    return [*pieces[:-1], pieces[-1] + tail] if pieces else []


def _left_out(text: str) -> tuple[list[str], list[str]]:
    pieces = stretches(text)
    return pieces, ["".join(pieces[:i] + pieces[i + 1 :]).strip() for i in range(len(pieces))]


def _text(record: Record, field: str, room: Path) -> Occluded | None:
    pieces, texts = _left_out(record[field])
    if len(pieces) < 2:
        return None
    return Occluded(record, [record | {field: text} for text in texts], {"pieces": pieces})


def _conversation(record: Record, field: str, room: Path) -> Occluded | None:
    """The last question; what was answered stays as it is."""
    messages = record[field]
    asked = [place for place, message in enumerate(messages) if message["role"] == "user"]
    pieces, texts = _left_out(messages[asked[-1]]["content"]) if asked else ([], [])
    if len(pieces) < 2:
        return None
    talks = [[m | {"content": text} if i == asked[-1] else m for i, m in enumerate(messages)] for text in texts]
    return Occluded(record, [record | {field: talk} for talk in talks], {"pieces": pieces})


def _image(record: Record, field: str, room: Path) -> Occluded | None:
    """Copies in `room`; region by region from the upper left, row by row."""
    from PIL import Image, ImageOps

    with Image.open(record[field]) as opened:
        picture = ImageOps.exif_transpose(opened).convert("RGB")
    small = max(picture.size) > SIDE
    picture.thumbnail((SIDE, SIDE))
    name = derive_seed("occluded", str(record["row"]))
    paths = [room / f"{name}_{i}.bmp" for i in range(GRID * GRID + 1)]
    if small:
        picture.save(paths[0])
    columns, rows = ([round(i * side / GRID) for i in range(GRID + 1)] for side in picture.size)
    for i, path in enumerate(paths[1:]):
        y, x = divmod(i, GRID)
        greyed = picture.copy()
        greyed.paste(GREY, (columns[x], rows[y], columns[x + 1], rows[y + 1]))
        greyed.save(path)
    shrunk, *without = (record | {field: str(path)} for path in paths)
    return Occluded(shrunk if small else record, without, {"grid": [GRID, GRID]})


OCCLUSIONS: dict[str, Occlude] = {"text": _text, "conversation": _conversation, "image": _image}


# ------------------------------------------------------------------------- the gauge
def measure(sides: Sides) -> dict[str, Any]:
    """For each flipped row what every piece is worth to either side's answer, and how often both rest on the same."""
    named = ((name, field.kind) for name, field in sides.task.fields.items() if field.kind in OCCLUSIONS)
    field, kind = next(named, ("", ""))
    if not field:
        raise NotRun("the rows have neither text nor pictures")
    if any(sides.task.truth(record) is None for record in sides.test):
        raise NotRun("what is read here is also what is predicted: a text without a word has another right answer")
    chosen, total = flips(sides, MOST_FLIPS)
    asking = _Asking.of(sides)
    chosen = chosen[: _most(sides, chosen)]
    lines, otherwise = [], 0
    with tempfile.TemporaryDirectory() as room:
        for flip in chosen:
            made = OCCLUSIONS[kind](flip.record, field, Path(room))
            line = _line(sides, asking, flip, made) if made is not None else None
            lines += [line] if line else []
            otherwise += made is not None and line is None
    if not lines:
        raise NotRun("no row that changed sides has two words or more, or asked again it is answered otherwise")
    return {
        "field": field, "kind": kind, "unit": asking.unit, "n": len(lines), "of": total, "rows": lines,
        "answered_otherwise": otherwise, "baseline": sides.baseline.name, **_counts(lines),
        "sentence": _sentence(lines, total, kind), "limits": list(LIMITS),
    }  # fmt: skip


def _most(sides: Sides, chosen: Sequence[Flip]) -> int:
    """How many rows are affordable: each costs as many answers as it has pieces, from both models."""
    pictures = "image" in {f.kind for f in sides.task.fields.values()}
    pieces, most = (GRID * GRID, MOST_PICTURES) if pictures else (MOST_PIECES, MOST_FLIPS)
    return max(FEWEST_FLIPS, min(most, sides.affordable(2 * pieces, [flip.record for flip in chosen])))


@dataclass(frozen=True)
class _Asking:
    """How a side is asked what a row is worth: by the probability of an answer, or by the cost of the right text."""

    sides: Sides
    short: bool

    @classmethod
    def of(cls, sides: Sides) -> _Asking:
        if all("scores" in answer for answer in (*sides.before, *sides.after)):
            return cls(sides, False)
        if sides.base is None or not all("loss" in answer for answer in sides.after):
            raise NotRun("answers have neither probabilities nor a cost")
        return cls(sides, True)

    @property
    def unit(self) -> str:
        return "nats a token of the right text" if self.short else "log-odds of its answer"

    def worth(self, records: Sequence[Record]) -> list[dict[str, Any]]:
        """Base and tuned: their answer to the first record, what it loses in each other, and where it turns."""
        sides = self.sides
        if self.short:
            assert sides.base is not None
            costs = [sides.answers(model, records, True) for model in (sides.base, sides.tuned)]
            return [{"lost": [a["loss"] - side[0]["loss"] for a in side[1:]]} for side in costs]
        return [_lost(side) for side in (sides.baseline.predict(records), sides.answers(sides.tuned, records))]


def _lost(answers: Sequence[Prediction]) -> dict[str, Any]:
    name = answers[0]["label"]
    whole, *without = (log_odds(answer["scores"][name]) for answer in answers)
    turns = [i for i, answer in enumerate(answers[1:]) if answer["label"] != name]
    return {"answer": name, "lost": [whole - one for one in without], "turns": turns}


def log_odds(p: float) -> float:
    kept = min(1 - SURE, max(SURE, p))
    return math.log(kept / (1 - kept))


def _line(sides: Sides, asking: _Asking, flip: Flip, made: Occluded) -> dict[str, Any] | None:
    """None where it is answered otherwise now, as a picture made small may be: another answer is in question."""
    found = dict(zip(("base", "tuned"), asking.worth([made.whole, *made.without]), strict=True))
    answers = {name: side.pop("answer") for name, side in found.items() if "answer" in side}
    if answers and answers != {"base": flip.before["label"], "tuned": flip.after["label"]}:
        return None
    for side in found.values():
        side["top"] = _top(side["lost"])
    return flip.shown(sides) | made.facts | {"rests": found}


def _top(lost: Sequence[float]) -> int | None:
    """The place of the piece that is worth most; None where none is worth anything."""
    best = max(range(len(lost)), key=lambda i: (lost[i], -i))
    return best if lost[best] >= CLEAR else None


def _counts(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """In how many rows one piece turns an answer; and on how many both sides rest on the same piece first."""
    counted: dict[str, Any] = {}
    for side in ("base", "tuned"):
        judged = [line["rests"][side] for line in lines if "turns" in line["rests"][side]]
        turned = sum(bool(one["turns"]) for one in judged)
        interval = list(statistics.wilson_interval(turned, len(judged))) if judged else None
        counted[side] = {"n": len(judged), "turned": turned, "ci95": interval}
    tops = [[line["rests"][side]["top"] for side in ("base", "tuned")] for line in lines]
    both = [pair for pair in tops if None not in pair]
    same = sum(base == tuned for base, tuned in both)
    interval = list(statistics.wilson_interval(same, len(both))) if both else None
    return {"turns": counted, "same_top": {"n": len(both), "same": same, "ci95": interval}}


def _sentence(lines: Sequence[dict[str, Any]], total: int, kind: str) -> str:
    what, counts = "region" if kind == "image" else "word", _counts(lines)
    turned, same = counts["turns"]["tuned"], counts["same_top"]
    moved = "that changed sides" if turned["n"] else "whose score moved"
    said = f"Looked at: {len(lines)} of {total} rows {moved}."
    if turned["n"]:
        said += f" In {turned['turned']} of them one {what} alone turns the tuned model's answer{_interval(turned)}."
    if not same["n"]:
        return f"{said} The base's answers rest on no single {what}, so there is nothing to compare."
    return f"{said} Base and tuned rest on the same {what} first in {same['same']} of {same['n']}{_interval(same)}."


def _interval(counted: dict[str, Any]) -> str:
    low, high = (100 * end for end in counted["ci95"])
    return f" (95% interval {low:.0f}% to {high:.0f}%)"
