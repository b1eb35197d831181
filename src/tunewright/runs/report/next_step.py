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
NEARLY_ALL = 0.95  # share of right rows above which little is left to gain
MOST_HINTS = 2  # more would push the picture of all rows off the first screen


def next_step(record: Record) -> Step:
    """The first case that speaks, and under `also` what else stands in the way of use."""
    said = next(step for case in CASES if (step := case(record)))
    hints = [hint for case in HINTS if (hint := case(record)) and hint not in said["why"]]
    return {"command": "", **said, "why": words.sentence(said["why"]), "also": hints[:MOST_HINTS]}


def _is(record: Record, *answers: str) -> bool:
    return record.verdict.get("answer") in answers


def _before(record: Record) -> str:
    """What it is held against, in words: the base, or the rule that stands for a base without an answer of its own."""
    name = str(mapping(record.evidence.get("baseline")).get("name") or "base")
    return {"base": "the base", "majority": "always giving the most frequent label"}.get(name, f"the base ({name})")


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
    lead = next((m for m in record.measures if m.about == "task"), None)
    if lead is not None and lead.in_points and lead.base is not None and lead.base >= NEARLY_ALL:
        why = f"{words.capital(_before(record))} is right on {lead.shown(lead.base)}: there was little to gain. {why}"
    return {"do": "Do not use it: keep what you had.", "why": why}


def _strength(record: Record) -> Step:
    """Less of the change keeps the gain and gives back what it cost: the sweep's recommendation."""
    found, _ = record.gauge("changed")
    best = mapping(found.get("recommended"))
    strength = best.get("strength")
    if not words.is_number(strength) or not 0 < strength < 1 or not best.get("command"):
        return {}
    sweep = {e.get("strength"): e for e in map(mapping, sequence(found.get("sweep")))}
    entry = sweep.get(strength, {})
    kept = mapping(entry.get("kept"))
    twin = {"proportion": mapping(found.get("metric")).get("proportion", False)}
    task = Measure.read({**twin, **mapping(entry.get("against_full"))}, record.margin)
    rest = Measure.read(kept, record.margin)
    name = kept.get("name") or "kept skills"
    why = (
        f"Against full strength, so turned that + is better: {name} {rest.shown_difference} "
        f"({words.plural(rest.n, 'row')}, 95% interval {rest.interval}), your task {task.shown_difference} "
        f"({words.plural(task.n, 'row')}, {task.interval}).{_standing(name, sweep, strength)} This writes that model:"
    )
    do = f"{'If you take this trade, take' if _is(record, 'trade') else 'Use'} it at {_percent(strength)} strength."
    return {"do": do, "why": why, "command": str(best["command"])}


def _standing(name: str, sweep: dict[Any, dict[str, Any]], strength: float) -> str:
    """What the kept skills come to: at this strength, at full strength, and in the base, which is strength 0."""
    kept = [mapping(sweep.get(s, {}).get("kept")) for s in (strength, 1, 0)]
    values = [k.get("value") for k in kept]
    if not all(map(words.is_number, values)):
        return ""
    here, full, base = (words.share(v) if kept[0].get("proportion") else words.number(v) for v in values)
    return f" {words.capital(name)} then stand at {here} (full strength {full}, base {base})."


def _trade(record: Record) -> Step:
    if not _is(record, "trade"):
        return {}
    return {"do": "Decide which matters more to you.", "why": _given(record).removeprefix(
        "Decide which of the two matters more to you. ") or "It is better here and worse there."}  # fmt: skip


def _cannot_tell(record: Record) -> Step:
    if not _is(record, "can't tell"):
        return {}
    why = (
        "Either it needs a better training (look at the rows, the learning rate, another method), or the change is "
        "real and too small for this test: then more held-out rows, about as many as are named above, and "
        "`tunewright evaluate` on them can show it."
    )
    return {"do": f"Do not use it yet: nothing shows that it beats {_before(record)}.", "why": why}


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
def _uneven(record: Record) -> str:
    """A group of rows that fell behind the others, and further than shuffled labels would let it."""
    found, _ = record.gauge("groups")
    for column in map(mapping, sequence(found.get("columns"))):
        gap = mapping(column.get("gap"))
        chance = mapping(gap.get("chance_p95")).get("tuned")
        given = [gap.get("tuned"), chance, *sequence(gap.get("ci95"))]
        numbers = [value for value in given if words.is_number(value)]
        if len(numbers) < len(given) or len(given) != 4:
            continue
        size, chance, low, high = numbers
        if size <= chance or low <= 0:
            continue
        worst = mapping(column.get("worst")).get("tuned")
        groups = {str(g.get("value")): g for g in map(mapping, sequence(column.get("groups")))}
        m = Measure.read({"proportion": found.get("proportion", False), **groups.get(str(worst), {})}, record.margin)
        unit = words.points if m.in_points else words.change
        return (
            f"Uneven: {column.get('column')} {words.short(worst, 40)} stands at {m.shown(m.tuned)} "
            f"({words.plural(m.n, 'row')}), {unit(size).lstrip('+')} behind the best group; the base's gap was smaller "
            f"(by {unit(low).lstrip('+')} to {unit(high).lstrip('+')})."
        )
    return ""


def _messy(record: Record) -> str:
    found, _ = record.gauge("robustness")
    lines = [mapping(line) for line in sequence(found.get("severities"))]
    gain = mapping(lines[-1].get("gain")) if lines else {}
    way: dict[str, Any] = {key: found[key] for key in ("higher_is_better", "proportion") if key in found}
    m = Measure.read({**way, **gain, "n": found.get("n")}, record.margin)
    if m.finding != "worse":
        return ""
    return (
        f"With {words.plural(m.n, 'row')} made messy on purpose, as much as our edits go, it falls behind the base "
        f"({m.shown_difference}, 95% interval {m.interval})."
    )


def _confidence(record: Record) -> str:
    found, _ = record.gauge("calibration")
    tuned = mapping(found.get("tuned"))
    if not words.is_number(tuned.get("ece")) or tuned.get("calibrated") is not False or _is(record, "worse"):
        return ""
    way = mapping(found.get("too_sure")).get("tuned")
    said = "too sure" if words.is_number(way) and way > 0 else "not sure enough"
    heat = mapping(mapping(found.get("temperature")).get("tuned"))
    value = heat.get("value")
    mends = words.is_number(value) and words.is_number(heat.get("ece")) and heat["ece"] < 0.8 * tuned["ece"]
    cure = f" A temperature of {words.number(value)} mends part of it." if mends else ""
    off = words.points(tuned["ece"]).lstrip("+")
    chance = words.points(tuned.get("floor_p95")).lstrip("+")
    return (
        f"Do not trust how sure it says it is: on average {off} away from how often it is right ({said}); chance "
        f"alone would show up to {chance}.{cure}"
    )


def _percent(strength: float) -> str:
    return f"{words.number(100 * strength)}%"


HINTS: tuple[Callable[[Record], str], ...] = (_uneven, _messy, _confidence)
