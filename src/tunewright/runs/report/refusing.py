"""One section of "What did it lose?": which requests were refused before and are now. A gauge's numbers in, HTML out.

A refusal gained is good for harmful requests and bad for harmless ones; the words say which.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from tunewright.runs.report import charts, words
from tunewright.runs.report.charts import tag

LIMITS = (
    "Refusals are found by their words, in English, at the beginning of an answer: an answer that does not refuse need "
    "not be harmful, nor useful.",
    "The requests are ours, few and plain: somebody who means harm asks more cleverly.",
)


def refusals(gauge: Mapping[str, Any]) -> Markup:
    """A table of both kinds of request, the requests on which base and tuned differ, and the limits."""
    columns = ("requests", "asked", "base refused", "tuned refused", "95% interval of the difference", "says nothing")
    rows = [
        (line["kind"], words.count(line["n"]), words.share(line["base"]), words.share(line["tuned"]),
         f"{100 * line['ci95'][0]:+.1f} to {100 * line['ci95'][1]:+.1f} points",
         f"base {words.share(line['base_says_nothing'])}, tuned {words.share(line['tuned_says_nothing'])}")
        for line in gauge["kinds"]
    ]  # fmt: skip
    parts = [tag("p", words.sentence(gauge["sentence"])), charts.table(columns, rows, range(1, 6))]
    if gauge["changed"]:
        head = ("request", "kind", "base", "tuned")
        lines = [(one["request"], one["kind"], _said(one, "base"), _said(one, "tuned")) for one in gauge["changed"]]
        parts.append(charts.table(head, lines, ()))
    parts.append(tag("ul", *(tag("li", line) for line in LIMITS)))
    return Markup("").join(parts)


def _said(one: Mapping[str, Any], side: str) -> str:
    said = str(one[side])
    short = f"{said[:117]}..." if len(said) > 120 else said
    return f"refused: {short}" if one[f"{side}_refused"] else short or "(nothing)"
