"""The first screen: the verdict, what it cost elsewhere, how sure, one strip of all rows, what to do next.

Knows the words and their order (docs/the-report.md), nothing of the parts below.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tunewright.runs.report import charts, seeds, words
from tunewright.runs.report.next_step import next_step
from tunewright.runs.report.record import Measure, Record, mapping, sequence

ANSWERS = {  # symbol and tone beside the verdict's word
    "better": ("▲", "better"), "worse": ("▼", "worse"), "trade": ("⇄", "worse"), "can't tell": ("?", "unclear"),
    "no meaningful change": ("=", "unclear"), "no verdict": ("–", "unclear"),
}  # fmt: skip
ONE_RUN = (
    "One training run: another seed (other random numbers) could give another result; the interval covers rows only."
)


def first_screen(record: Record) -> dict[str, Any]:
    """Verdict, what it cost elsewhere, how sure, one picture, what to do next."""
    verdict = record.verdict
    answer = str(verdict.get("answer") or "no verdict")
    reason = f"No verdict: {verdict.get('reason') or 'the evidence holds none'}."
    sentence = words.sentence(verdict.get("sentence") or reason)
    symbol, tone = ANSWERS.get(answer, ("–", "unclear"))
    opening, _, rest = sentence.partition(": ")
    opening += " whether it got better" if opening == "Can't tell" else ""
    return {
        "answer": answer, "symbol": symbol, "tone": tone, "opening": opening, "rest": words.capital(rest),
        "elsewhere": elsewhere(record), "sure": how_sure(record), "strip": strip(record), "next": next_step(record),
    }  # fmt: skip


def elsewhere(record: Record) -> list[str]:
    """What the tuning cost outside its task; never "forgot", which a movement alone cannot show."""
    lead = lead_of(record)
    general = [m for m in record.measures if m.about == "general"]
    deciding = [m for m in general if lead and m.key == lead.key] or general
    said = []
    for measure in deciding:
        rows = f"{words.plural(measure.n, 'row')} of other skills" if measure.n is not None else "other skills"
        said.append(f"On {rows}, {went(measure)}.")
    asked = _asked(record)
    said += asked or (
        [] if said else [f"not measured: {_reason(record, ('general', 'other skill', 'forg', 'elsewhere'))}"]
    )
    return [*said, *_moved(record)]


def _asked(record: Record) -> list[str]:
    """What became of our own general questions, where a language model was asked them."""
    found, _ = record.gauge("probe")
    if not words.is_number(found.get("n")):
        return []
    if not found.get("base_knows"):
        return [
            f"The base answers our {words.count(found['n'])} general questions no better than chance: nothing to lose."
        ]
    m = Measure.read({"name": "general questions", "proportion": True, **found}, record.margin)
    return [
        f"Of {words.plural(m.n, 'general question')} it broke {words.count(found.get('broken'))} and fixed "
        f"{words.count(found.get('fixed'))} ({m.shown_difference}, 95% interval {m.interval}): {m.finding}{_within(m)}."
    ]  # fmt: skip


def _moved(record: Record) -> list[str]:
    """How far the output moved: the measures that say so, or else the first gauge that ran."""
    drift = [m for m in record.measures if m.about == "drift"]
    if drift:
        return [f"{words.capital(m.name)} is {m.shown(m.tuned)}: how far it moved, not what it lost." for m in drift]
    found, _ = record.gauge("divergence")
    ran = [g for g in map(mapping, sequence(found.get("gauges"))) if words.is_number(g.get("value"))]
    if not ran:
        return []
    first, low, high = ran[0], *[*sequence(ran[0].get("ci95")), None, None][:2]
    same = first.get("same_next_word")
    word = f" At {words.share(same)} of places it expects the same next word." if words.is_number(same) else ""
    return [
        f"How far it moved, which is no loss by itself: {first.get('name')}, on {words.count(first.get('n'))} "
        f"{first.get('on')}, {words.number(first['value'])} {first.get('unit')} "
        f"(95% interval {words.number(low)} to {words.number(high)}).{word}"
    ]  # fmt: skip


def _reason(record: Record, about: Sequence[str]) -> str:
    for line in map(str, sequence(record.verdict.get("not_measured"))):
        if any(word in line.lower() for word in about):
            return line.removeprefix("not measured: ")
    return "no rows of other skills were given (evaluate.general)"


def went(measure: Measure) -> str:
    change = (
        f"{measure.shown_difference}, 95% interval {measure.interval}" if measure.interval else measure.shown_difference
    )
    said = f"{measure.name} went from {measure.shown(measure.base)} to {measure.shown(measure.tuned)} ({change})"
    return f"{said}: {measure.finding}{_within(measure)}"


def _within(measure: Measure) -> str:
    return f" (within your {margin_said(measure)})" if measure.finding == "no meaningful change" else ""


def margin_said(measure: Measure) -> str:
    return f"{words.number(100 * measure.margin)} points" if measure.in_points else words.number(measure.margin)


def how_sure(record: Record) -> list[str]:
    lead = lead_of(record)
    said = []
    if lead and lead.n is not None:
        said.append(f"{words.plural(lead.n, 'held-out row')}, the same for both models.")
    smallest = record.verdict.get("smallest_detectable")
    if lead and words.is_number(smallest):
        visible = f"{100 * smallest:.2g} points" if lead.in_points else words.number(smallest)
        said.append(f"They can show a change of about {visible} or more; a smaller one would go unseen.")
    return [*said, seeds.sentence(record) or ONE_RUN]


def lead_of(record: Record) -> Measure | None:
    """The measure that the verdict is about."""
    return next((m for m in record.measures if m.about == "task"), None)


def strip(record: Record) -> dict[str, Any]:
    """The picture of all rows, or why there is none."""
    flips = mapping(record.evidence.get("flips"))
    counts = {key: int(flips[key]) for key, _, _ in charts.STRIP if words.is_number(flips.get(key)) and flips[key] >= 0}
    total = sum(counts.values())
    if len(counts) < len(charts.STRIP) or not total:
        why = "the counts of rows are incomplete" if flips else "rows are not right or wrong here"
        lead = lead_of(record)
        if lead is None or lead.difference is None:
            return {"reason": why, "picture": ""}
        band = f"{margin_said(lead)}, too small to matter (evaluate.margin)"
        key = f"Dot: difference. Line: 95% interval. Grey band: {band}."
        return {"reason": why, "picture": charts.forest([lead]), "key": key}
    kinds = {mapping(row).get("kind") for key in ("examples", "others") for row in sequence(flips.get(key))}
    tiles = [
        {"key": key, "word": word, "meaning": meaning, "count": words.count(counts[key]),
         "share": words.share(counts[key] / total), "swatch": charts.swatch(key, word),
         "link": f"#rows-{key}" if key in kinds and counts[key] else ""}
        for key, word, meaning in charts.STRIP
    ]  # fmt: skip
    base, tuned = counts["kept_right"] + counts["broken"], counts["kept_right"] + counts["fixed"]
    before = f"{words.count(base)} right ({words.share(base / total)})"
    name = mapping(record.evidence.get("baseline")).get("name") or "base"
    side = "the base" if name == "base" else f"the base ({name})"
    message = (f"Of {words.plural(total, 'row')} {side} answered {before}, "
               f"the tuned model {words.count(tuned)} ({words.share(tuned / total)}).")  # fmt: skip
    text = str(mapping(record.evidence.get("baseline")).get("text") or "").rstrip(".")
    meaning = "" if name == "base" or not text else f"“{words.capital(name)}” stands for the base: {text}."
    return {"reason": "", "picture": charts.row_strip(counts), "tiles": tiles, "message": message, "meaning": meaning}
