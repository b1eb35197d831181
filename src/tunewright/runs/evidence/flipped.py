"""The held-out rows that changed sides, for gauges that look at single answers: broken first, the surest ones ahead.

Where no row is right or wrong, those whose score fell or rose most stand for them. Knows Sides and metrics.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tunewright.contracts import Prediction, Record
from tunewright.runs.evidence import measures
from tunewright.runs.evidence.sides import NotRun, Sides

BROKEN_SHARE = 0.75  # of the rows looked at, where there are enough fixed ones


@dataclass(frozen=True)
class Flip:
    """One row, what became of it ("broken", "fixed", "worse", "better"), and what both sides said."""

    record: Record
    kind: str
    before: Prediction
    after: Prediction

    def shown(self, sides: Sides, most: int = 300) -> dict[str, Any]:
        """What a person needs to recognise it."""
        facts = {"row": self.record["row"], "kind": self.kind, **measures.shown_input(sides.task, self.record)}
        facts["input"] = facts["input"][:most]
        answers = [answer.get("label", answer.get("text")) for answer in (self.before, self.after)]
        names = ("truth", "base", "tuned")
        said = zip(names, (sides.task.truth(self.record), *answers), strict=True)
        return facts | {name: value[:most] for name, value in said if isinstance(value, str)}


def flips(sides: Sides, most: int) -> tuple[list[Flip], int]:
    """At most so many rows that changed sides, and how many there are in all. Raises NotRun where there is none."""
    metric = next((m for m in sides.task.metrics if m.pool is None), None)
    if metric is None or not sides.test:
        raise NotRun("this task's metrics exist for all rows together only" if metric is None else "no held-out rows")
    sign = 1.0 if metric.higher_is_better else -1.0
    scores = [[float(s[metric.name]) for s in sides.scores(a, sides.test)] for a in (sides.before, sides.after)]
    right_or_wrong = all(value in (0.0, 1.0) for side in scores for value in side)
    names = ("fixed", "broken") if right_or_wrong else ("better", "worse")
    found = []
    for place, (base, tuned) in enumerate(zip(*scores, strict=True)):
        change = sign * (tuned - base)
        if change:
            sure = float(sides.after[place].get("score", 0.0)) if right_or_wrong else abs(change)
            flip = Flip(sides.test[place], names[change < 0], sides.before[place], sides.after[place])
            found.append((change > 0, -sure, str(flip.record["row"]), flip))
    if not found:
        raise NotRun("no held-out row changed sides")
    found.sort(key=lambda one: one[:3])
    broken, fixed = ([one[3] for one in found if one[0] is side] for side in (False, True))
    first = min(len(broken), max(int(BROKEN_SHARE * most), most - len(fixed)))
    return broken[:first] + fixed[: most - first], len(found)
