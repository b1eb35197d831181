"""The fifteen promises as a table: what is promised, what was measured in this very run, what peers were seen to do.

A test that measures for a promise says so with `measured(number, ...)`; one that is only marked counts as one case.
The table adds them up. Without enough of them, or with less than promised, the run fails: a promise nobody measured is
not kept.

    pytest --promises              the short table at the end of a test run, as in CI
    make promises                  the full one: more kills, everything marked slow among the promises
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest


@dataclass(frozen=True)
class Promise:
    """kind: "all" of what was tried; "at most" or "at least" the limit.

    short, full: how much must have been tried, in a short and in a full run, for the figure to count.
    peer: what was measured on the most used trainer of the field (docs/promises.md says how).
    """

    number: int
    text: str
    promised: str
    peer: str
    short: int
    full: int
    kind: str = "all"
    limit: float = 0.0


PROMISES = (
    Promise(1, "A killed run continues by itself", "every kill -9", "105 of 151", 6, 100),
    Promise(2, "... and ends with the same bytes", "every run", "105 of 105 that load", 6, 100),
    Promise(3, "A damaged checkpoint is found and skipped", "every damage", "0 of 18, 5 of them silent", 12, 40),
    Promise(4, "The newest and the best good checkpoint are never lost", "every fault", "lost in 3 of 3", 4, 4),
    Promise(
        5, "Micro-batch, accumulation and ranks change nothing", "<= 1e-5", "8 times too long, 11 of 14", 8, 8,
        "at most", 1e-5,
    ),
    Promise(6, "Out of memory changes the speed alone", "<= 1e-6", "batch 32 became 8", 4, 4, "at most", 1e-6),
    Promise(7, "Frozen is frozen, trained is trained", "every cell", "12 of 12 buffers drifted", 20, 20),
    Promise(8, "What is trained on is shown, nothing else is learnt", "every case", "dropped without a word", 30, 30),
    # the sixty-sixth is about preference pairs and boxes, which are no task here yet
    Promise(9, "Bad input costs seconds, and is located", "65 of 65", "about 5 of 66", 65, 65),
    Promise(10, "NaN never passes as success", "every poison", "logged as 0.0, exit 0", 3, 3),
    Promise(
        11, "Saved is trained is served", "<= 1e-5", "a head lost without a word", 20, 20, "at most", 1e-5,
    ),
    Promise(
        12, "Better means shown better: false wins, base against itself", "<= 5 % + 2 s.e.", "a bare number", 200, 200,
        "at most", 0.05 + 2 * (0.05 * 0.95 / 200) ** 0.5,
    ),
    Promise(13, "Every gain comes with what it broke and what it cost", "every report", "a bare number", 10, 10),
    Promise(14, "Opening data runs nothing, reads nothing outside", "every payload", "/etc/passwd read", 40, 40),
    Promise(15, "No secret and no script leaves", "every payload", "a token in a checkpoint", 25, 25),
)  # fmt: skip


@dataclass
class Found:
    """What the tests said about one promise."""

    got: int = 0
    tried: int = 0
    worst: float | None = None
    rows: dict[int, bool] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)

    def add(self, said: dict[str, Any], passed: bool) -> None:
        self.tried += said.get("of", 1)
        self.got += said.get("got", 1) if passed else 0
        if "value" in said:
            self.worst = max(said["value"], self.worst if self.worst is not None else said["value"])
        for row in said.get("rows", ()):
            self.rows[row] = self.rows.get(row, True) and passed


def gathered(reports: Iterable[pytest.TestReport]) -> dict[int, Found]:
    """By promise; a test that failed counts as tried and not kept."""
    found = {p.number: Found() for p in PROMISES}
    for report in reports:
        said = [json.loads(value) for name, value in report.user_properties if name == "promise"]
        for one in said:
            found[one["promise"]].add(one, report.passed)
        spoken = {one["promise"] for one in said}
        for number in _marked(report) - spoken:
            found[number].add({}, report.passed)
        if report.failed:
            for number in spoken | _marked(report):
                found[number].broken.append(report.nodeid)
    return found


def _marked(report: pytest.TestReport) -> set[int]:
    return {number for name, value in report.user_properties if name == "promises" for number in json.loads(value)}


def judged(promise: Promise, found: Found, full: bool) -> tuple[str, bool]:
    """The measured figure in words, and whether the promise is kept."""
    if found.rows:
        good = sum(found.rows.values())
        return f"{good} of {len(found.rows)}", good == len(found.rows) >= promise.short and not found.broken
    enough = found.tried >= (promise.full if full else promise.short)
    if promise.kind == "all":
        return f"{found.got} of {found.tried}", enough and found.got == found.tried and not found.broken
    if found.worst is None:
        return "not measured", False
    kept = found.worst <= promise.limit
    return f"{found.worst:.2g} ({found.tried} cases)", enough and kept and not found.broken


def table(reports: Iterable[pytest.TestReport], full: bool) -> tuple[list[str], list[Promise]]:
    """The lines of the table, and the promises that fell short."""
    found = gathered(reports)
    lines = [f"{'':>2}  {'promise':<64} {'promised':<17} {'measured':<22} peer"]
    short = []
    for promise in PROMISES:
        words, kept = judged(promise, found[promise.number], full)
        sign = "kept" if kept else "SHORT"
        lines.append(
            f"{promise.number:>2}  {promise.text:<64} {promise.promised:<17} {words:<22} {promise.peer:<28} {sign}"
        )
        lines += [f"      failed: {name}" for name in found[promise.number].broken[:3]]
        short += [] if kept else [promise]
    return lines, short
