"""The verdict: words decided before the numbers. Knows one measure, its flips and the user's margin.

Wording and order of the cases: docs/what-the-verdict-means.md, after the GRADE guidelines' fixed sentences.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tunewright.contracts import Metric
from tunewright.metrics import statistics

FEWEST_ROWS = 15  # below that no interval is worth a sentence
ALPHA = 0.05
SECOND_SEED = "A second seed would show how much of the gain is luck: `--seeds 3`."
USUAL_SHARE = 0.1  # of rows on which two models differ; table 1b's middle line


def smallest_visible(n: int, discordant: float = USUAL_SHARE) -> float:
    """The smallest true change of a right/wrong metric that n rows show in 80 of 100 cases."""
    return statistics.smallest_detectable(n, discordant=discordant)


def visible_sentence(n: int, metric: Metric | None = None) -> str:
    """For `check` and the start of `train`: what the test set could show at all. `metric`: None, a right/wrong one."""
    if n < FEWEST_ROWS:
        return f"{n} held-out rows: fewer than {FEWEST_ROWS}, so there will be no verdict."
    if metric is not None and not metric.proportion:
        return (
            f"{n} held-out rows: how small a change of {metric.name} they can show depends on how much rows differ "
            "from each other, and is said with the verdict."
        )
    few, usual, many = (_points(smallest_visible(n, share)) for share in (0.05, USUAL_SHARE, 0.2))
    return (
        f"{n} held-out rows: no change under {usual} points can be seen if base and tuned differ on a tenth of "
        f"the rows ({few} points on a twentieth, {many} on a fifth)."
    )


def _points(share: float) -> str:
    """Whole points, and tenths where a whole one says too little."""
    return f"{100 * share:.0f}" if share >= 0.0195 else f"{100 * share:.1f}"


def verdict(
    measure: dict[str, Any] | None,
    flips: dict[str, Any] | None,
    margin: float,
    not_measured: list[str],
    overlap: int = 0,
    general: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """evidence.json's `verdict`: answer, sentence, margin, smallest_detectable, not_measured.

    general: measures of what should be kept, with its name under "set". Better here and worse there is a trade.
    """
    facts: dict[str, Any] = {"margin": margin, "not_measured": not_measured}
    if measure is None or measure["n"] < FEWEST_ROWS or overlap:
        n = measure["n"] if measure else 0
        reason = (
            f"{overlap} test row{'s also stand' if overlap > 1 else ' also stands'} in the training data"
            if overlap
            else f"{n} held-out rows are fewer than {FEWEST_ROWS}"
        )
        return {"answer": "no verdict", "sentence": f"No verdict: {reason}.", "reason": reason} | facts
    visible, share = _visible(measure, flips)
    sign = 1.0 if measure["higher_is_better"] else -1.0
    answer, opening = _judged(measure, measure["p"], margin)
    change = _change(measure, flips)
    lost = _lost(general, margin)
    if answer == "better" and lost:
        names = ", ".join(m["set"] for m in lost)
        there = "".join(f"; on {m['set']} it {_change(m, None)}" for m in lost)
        sentence = f"A trade, {opening.removeprefix('is ')} and worse on {names}: it {change}{there}."
        return {"answer": "trade", "sentence": sentence, "smallest_detectable": visible} | facts
    if answer == "can't tell":
        opening += f": this test could only have seen a change of about {_size(visible, measure['proportion'])}"
        opening += _more_rows(sign * measure["difference"], share, measure["n"], margin)
        sentence = f"{opening}. It {change}."
    else:
        sentence = f"The tuned model {opening}: it {change}."
    return {"answer": answer, "sentence": sentence, "smallest_detectable": visible} | facts


def _judged(measure: dict[str, Any], p: float, margin: float) -> tuple[str, str]:
    sign = 1.0 if measure["higher_is_better"] else -1.0
    low, high = sorted(sign * end for end in measure["ci95"])
    if p > ALPHA:  # few flips: interval and test can disagree by a hair, and then nothing is shown
        low, high = min(low, 0.0), max(high, 0.0)
    return classify(low, high, margin, measure["proportion"])


def _lost(general: Sequence[dict[str, Any]], margin: float) -> list[dict[str, Any]]:
    """The sets that got worse; the more sets are asked about, the clearer each must be (Holm)."""
    p_values = statistics.holm([m["p"] for m in general])
    return [m for m, p in zip(general, p_values, strict=True) if _judged(m, p, margin)[0] == "worse"]


def _visible(measure: dict[str, Any], flips: dict[str, Any] | None) -> tuple[float, float]:
    """The smallest change these rows show, and the share of rows that differ (0: scores are not right or wrong)."""
    if flips:
        share = max(flips["fixed"] + flips["broken"], 1) / measure["n"]
        return smallest_visible(measure["n"], share), share
    low, high = measure["ci95"]
    return (high - low) / 2 * (1.96 + 0.84) / 1.96, 0.0  # 80 % power from the interval's own standard error


def classify(low: float, high: float, margin: float, proportion: bool) -> tuple[str, str]:
    """(answer, words) for an interval of the gain; `low` and `high` are so turned that more is better."""
    d = _size(margin, proportion)
    if -margin <= low and high <= margin:
        if low > 0 or high < 0:
            return "no meaningful change", f"has a real but tiny {'gain' if low > 0 else 'loss'}, below your {d}"
        return "no meaningful change", f"shows no meaningful change (within your {d})"
    if low > margin:
        return "better", "is clearly better at your task"
    if low > 0:
        return "better", f"is better at your task, but maybe by less than the {d} you said matters"
    if high < 0:
        return "worse", "is worse at your task"
    return "can't tell", "Can't tell"


def _change(measure: dict[str, Any], flips: dict[str, Any] | None) -> str:
    """`fixed 62 of 500 rows and broke 21 (+8.2 points, 95% interval +4.8 to +11.8)`."""
    unit = " points" if measure["proportion"] else ""
    values = (measure["difference"], *measure["ci95"])
    difference, low, high = (f"{100 * v:+.1f}" if measure["proportion"] else f"{v:+.3g}" for v in values)
    numbers = f"{difference}{unit}, 95% interval {low} to {high}"
    if flips is None:
        return f"changed {measure['name']} from {measure['base']:.3g} to {measure['tuned']:.3g} ({numbers})"
    return f"fixed {flips['fixed']} of {measure['n']} rows and broke {flips['broken']} ({numbers})"


def _size(value: float, proportion: bool) -> str:
    if not proportion:
        return f"{value:.3g}"
    points = 100 * value
    return f"{points:.2g} points" if points != 1 else "1 point"


def _more_rows(difference: float, share: float, n: int, margin: float) -> str:
    """How many more rows would settle a change of the size seen, or of the margin where that is larger."""
    wanted = max(abs(difference), margin)
    if wanted <= 0 or share <= 0:
        return ""
    more = statistics.rows_needed(wanted, max(share, wanted)) - n
    return f"; about {_round(more)} more rows would settle it" if more > 0 else ""


def _round(rows: int) -> int:
    """Two digits are all that such a forecast is worth."""
    digits = len(str(rows))
    step = 10 ** max(0, digits - 2)
    return -(-rows // step) * step


def advice(verdict: dict[str, Any], flips: dict[str, Any] | None) -> str:
    """One line: what to do next."""
    answer = verdict["answer"]
    if answer == "no verdict":
        return (
            f"Give at least {FEWEST_ROWS} test rows that are not in the training data; 200 show a change of 6 points."
        )
    if answer == "can't tell":
        return "Add held-out rows, or accept that a change this small cannot be shown with these."
    if answer == "worse":
        look = "broken rows" if flips else "answers side by side"
        return f"Do not use it. Look at the {look}, then try a smaller learning rate or another method."
    if answer == "trade":
        return (
            "Decide which of the two matters more to you. A smaller learning rate, fewer epochs, lora instead of full, "
            "or some general rows among the training rows keep more of what it knew."
        )
    if answer == "no meaningful change":
        return "Keep the base, or try another method: `tunewright methods` lists them."
    if flips and flips["broken"]:
        return f"Look at the {flips['broken']} broken rows before you use it."
    if flips is None:
        return "Read its answers beside the base's before you use it: likelier answers are not yet right ones."
    return f"Use it; its lines stand below. {SECOND_SEED}"
