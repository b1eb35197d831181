"""What to do next: one line, the most useful one, by an order that was fixed before any result was seen.

The order is that of `CASES`, and docs/the-report.md says it. Knows the verdict and the gauges as record.py reads them;
measures nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tunewright.runs.report import words
from tunewright.runs.report.record import Measure, Record, mapping, sequence

Step = dict[str, Any]  # do: the decision in a few words; why: a sentence; command: what to type, or ""
MOST_HINTS = 2  # more would push the picture of all rows off the first screen


def next_step(record: Record) -> Step:
    """The first case that speaks, and under `also` what else stands in the way of use."""
    said = next(step for case in CASES if (step := case(record)))
    hints = [hint for case in HINTS if (hint := case(record)) and hint not in said["why"]]
    return {"command": "", **said, "why": words.sentence(said["why"]), "also": hints[:MOST_HINTS]}


def _is(record: Record, *answers: str) -> bool:
    return record.verdict.get("answer") in answers


def _given(record: Record) -> str:
    return str(record.evidence.get("advice") or record.verdict.get("advice") or "")


# ------------------------------------------------------------------ the cases, in order
def _no_verdict(record: Record) -> Step:
    if not _is(record, "no verdict"):
        return {}
    return {"do": "Do not decide yet.", "why": _given(record) or "The reason stands above."}


def _worse(record: Record) -> Step:
    if not _is(record, "worse"):
        return {}
    why = "Look at the rows that broke, then try a smaller learning rate, fewer epochs or another method."
    return {"do": "Do not use it.", "why": why}


def _strength(record: Record) -> Step:
    """Less of the change keeps the gain and gives back what it cost: the sweep's recommendation."""
    found, _ = record.gauge("changed")
    best = mapping(found.get("recommended"))
    strength = best.get("strength")
    if not words.is_number(strength) or not 0 < strength < 1 or not best.get("command"):
        return {}
    entry = next((e for e in map(mapping, sequence(found.get("sweep"))) if e.get("strength") == strength), {})
    kept = mapping(entry.get("kept"))
    twin = {"proportion": mapping(found.get("metric")).get("proportion", False)}
    task = Measure.read({**twin, **mapping(entry.get("against_full"))}, record.margin)
    rest = Measure.read(kept, record.margin)
    name = kept.get("name") or "kept skills"
    why = (
        f"Against full strength, so turned that + is better: {name} {rest.shown_difference} "
        f"({words.plural(rest.n, 'row')}, 95% interval {rest.interval}), your task {task.shown_difference} "
        f"({words.plural(task.n, 'row')}, {task.interval}). This writes that model:"
    )
    do = f"{'If you take this trade, take' if _is(record, 'trade') else 'Use'} it at {_percent(strength)} strength."
    return {"do": do, "why": why, "command": str(best["command"])}


def _trade(record: Record) -> Step:
    if not _is(record, "trade"):
        return {}
    return {"do": "Decide which matters more to you.", "why": _given(record).removeprefix(
        "Decide which of the two matters more to you. ") or "It is better here and worse there."}  # fmt: skip


def _cannot_tell(record: Record) -> Step:
    if not _is(record, "can't tell"):
        return {}
    why = "This test is too small for a change of this size. Add held-out rows, as many as are named above, and "
    return {
        "do": "Keep the base for now.",
        "why": f"{why}run `tunewright evaluate` on them; no new training is needed.",
    }


def _no_change(record: Record) -> Step:
    if not _is(record, "no meaningful change"):
        return {}
    why = "What changed is smaller than what you said matters. `tunewright methods` lists other ways to train."
    return {"do": "Keep the base.", "why": why}


def _group_lost(record: Record) -> Step:
    found, _ = record.gauge("groups")
    lost = [
        (str(column.get("column")), group)
        for column in map(mapping, sequence(found.get("columns")))
        for group in map(mapping, sequence(column.get("groups")))
        if group.get("changed") == "worse" and not group.get("few")
    ]
    if not lost:
        return {}
    column, group = lost[0]
    m = Measure.read({"proportion": found.get("proportion", False), **group}, record.margin)
    others = f" So it did for {words.plural(len(lost) - 1, 'other group')}." if len(lost) > 1 else ""
    name = f"{column} {words.short(group.get('value'), 40)}"
    why = (
        f"There it went from {m.shown(m.base)} to {m.shown(m.tuned)} ({words.plural(m.n, 'row')}, "
        f"{m.shown_difference}, 95% interval {m.interval}).{others}"
    )
    return {"do": f"Do not use it for {name} yet.", "why": why}


def _questions_lost(record: Record) -> Step:
    found, _ = record.gauge("probe")
    if not found.get("base_knows"):
        return {}
    m = Measure.read({"proportion": True, **found}, record.margin)
    if m.finding != "worse":
        return {}
    why = (
        f"It broke {words.count(found.get('broken'))} of {words.plural(m.n, 'general question')} and fixed "
        f"{words.count(found.get('fixed'))}. A smaller learning rate, fewer epochs or some general rows among the "
        "training rows keep more."
    )  # fmt: skip
    return {"do": "Use it for this task alone.", "why": why}


def _broken(record: Record) -> Step:
    flips = mapping(record.evidence.get("flips"))
    broken, kept = flips.get("broken"), flips.get("kept_right")
    if not _is(record, "better") or not words.is_number(broken) or not broken:
        return {}
    before = broken + (kept if words.is_number(kept) else 0)
    return {
        "do": "Use it if you can live with what broke.",
        "why": f"Look at the {words.plural(broken, 'broken row')} before you use it: of {words.plural(before, 'row')} "
        f"that the base had right, it now gets {words.count(broken)} wrong ({words.share(broken / before)}).",
    }  # fmt: skip


def _good(record: Record) -> Step:
    if not _is(record, "better"):
        return {}
    flips = mapping(record.evidence.get("flips"))
    if flips:
        return {"do": "Use it.", "why": "It broke no row. A second seed would show how much of the gain is luck."}
    why = "Its score is better; likelier answers are not yet right ones, so read some of them beside the base's."
    return {"do": "Read its answers before you use it.", "why": why}


def _anything(record: Record) -> Step:
    return {"do": "", "why": _given(record) or "Read the parts below."}


CASES: tuple[Callable[[Record], Step], ...] = (
    _no_verdict, _worse, _strength, _trade, _cannot_tell, _no_change, _group_lost, _questions_lost, _broken, _good,
    _anything,
)  # fmt: skip


# ---------------------------------------------------------------------------- hints
def _messy(record: Record) -> str:
    found, _ = record.gauge("robustness")
    lines = [mapping(line) for line in sequence(found.get("severities"))]
    gain = mapping(lines[-1].get("gain")) if lines else {}
    way: dict[str, Any] = {key: found[key] for key in ("higher_is_better", "proportion") if key in found}
    m = Measure.read({**way, **gain, "n": found.get("n")}, record.margin)
    if m.finding != "worse":
        return ""
    return f"In the messiest input it falls behind the base ({m.shown_difference}, 95% interval {m.interval})."


def _confidence(record: Record) -> str:
    found, _ = record.gauge("calibration")
    tuned = mapping(found.get("tuned"))
    if not words.is_number(tuned.get("ece")) or tuned.get("calibrated") is not False:
        return ""
    way = mapping(found.get("too_sure")).get("tuned")
    said = "too sure" if words.is_number(way) and way > 0 else "not sure enough"
    heat = mapping(mapping(found.get("temperature")).get("tuned"))
    value = heat.get("value")
    mends = words.is_number(value) and words.is_number(heat.get("ece")) and heat["ece"] < 0.8 * tuned["ece"]
    cure = f" Dividing its logits by {words.number(value)} mends part of it." if mends else ""
    off = words.points(tuned["ece"]).lstrip("+")
    chance = words.points(tuned.get("floor_p95")).lstrip("+")
    return f"Do not trust its confidence as it is: off by {off}, chance alone shows up to {chance}; {said}.{cure}"


def _percent(strength: float) -> str:
    return f"{words.number(100 * strength)}%"


HINTS: tuple[Callable[[Record], str], ...] = (_messy, _confidence)
